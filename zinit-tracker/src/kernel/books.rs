//! The loaded programs and maps as one thing: opened or joined, read, changed.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::AsFd as _,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf, RawTracePointRunOptions, TestRun as _,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf},
    programs::{Iter, RawTracePoint},
};
use zinit_ebpf::{
    Adoption, Exit, ExitKey, LAYOUT_VERSION, Layout, NO_SERVICE, Process, Service, ServiceName, StateChange, Stats,
    Stops, TEXT_FILE, Task, map, program, service_flag,
};

use super::{
    events::{EventStream, EventsError},
    filter,
    gate::Gates,
    hooks::{self, HOOKS, Hooks},
    load::{self, LoadError, LoadOptions},
    log::ProgramLog,
    moving::Earlier,
    pins::{Guard, PinDirectory, PinError},
    runs::ProgramRuns,
    sys,
};
use crate::process::ProcessKey;

/// An operation on the kernel's books that failed.
#[derive(Debug, thiserror::Error)]
#[error("failed to {operation}")]
pub struct BooksError {
    operation: &'static str,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

pub(super) fn failed<E: std::error::Error + Send + Sync + 'static>(
    operation: &'static str,
) -> impl FnOnce(E) -> BooksError {
    move |source| BooksError {
        operation,
        source: Box::new(source),
    }
}

/// Programs by use. Those that aya changes on use are behind a lock.
struct Programs {
    spawn: RawTracePoint,
    state: RawTracePoint,
    release: RawTracePoint,
    tasks: Mutex<Iter>,
    adopt: Mutex<Iter>,
    gates: Gates,
    hooks: Mutex<Hooks>,
}

struct Maps {
    processes: HashMap<MapData, u32, Process>,
    /// The same map, and below likewise: aya's typed maps do not give out their descriptors.
    processes_data: MapData,
    services: Mutex<HashMap<MapData, u32, Service>>,
    services_data: MapData,
    adoptions: Mutex<HashMap<MapData, u32, Adoption>>,
    exits: MapData,
    /// `None`: another build has made the maps, which had no such map.
    stops: Option<Mutex<HashMap<MapData, ServiceName, Stops>>>,
    stats: PerCpuArray<MapData, Stats>,
    layout: Mutex<Array<MapData, Layout>>,
    layout_data: MapData,
}

/// The kernel's books.
pub(crate) struct Kernel {
    maps: Maps,
    programs: Programs,
    pins: PinDirectory,
    /// Its shared lock says that this process uses the pins.
    in_use: File,
    max_processes: u32,
    log: Mutex<Option<ProgramLog>>,
}

/// Why the books could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The programs could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The pin directory could not be used.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A map or program could not be used.
    #[error(transparent)]
    Books(#[from] BooksError),
    /// The books of the layout before this one stay as they are, and have to be unloaded by the build that made them.
    #[error("failed to take over the books of layout {version}, which stay as they are")]
    TakeOver {
        /// Their layout.
        version: u32,
        /// What failed.
        source: Box<OpenError>,
    },
}

/// A lock whose holder panicked still guards consistent data: every change is one system call.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn absent<T>(result: Result<T, MapError>) -> Result<Option<T>, MapError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(None),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Kernel {
    /// Joins what is pinned in the directory, or loads and pins it.
    pub(crate) fn open(directory: &Path, options: LoadOptions) -> Result<Self, OpenError> {
        let pins = PinDirectory::open(directory)?;
        let exclusive = pins.create_exclusive()?;
        let earlier = pins.check_layouts()?;
        if let Some(layout) = pinned_layout(&pins)? {
            let kernel = Self::join_checked(pins, &exclusive, layout)?;
            kernel.remove_earlier(earlier);
            if !options.replace || layout.sources == options.sources {
                return Ok(kernel);
            }
            return kernel.replaced(directory, &exclusive, options);
        }
        // What a loader left that died half way: nobody can have used it.
        pins.remove_layout()?;
        match earlier {
            None => Self::load(pins, &exclusive, options, None),
            Some(earlier) => match Earlier::pinned(earlier.again())? {
                Some(earlier) if options.replace => {
                    let version = earlier.layout.version;
                    Self::take_over(pins, &exclusive, options, &earlier).map_err(|error| OpenError::TakeOver {
                        version,
                        source: Box::new(error),
                    })
                }
                Some(earlier) => Err(earlier
                    .pins
                    .other_layout(&format!("v{}", earlier.layout.version))
                    .into()),
                None => {
                    earlier.remove_layout()?;
                    Self::load(pins, &exclusive, options, None)
                }
            },
        }
    }

    /// Lets this build's programs take the place of those that are pinned.
    fn replaced(self, directory: &Path, exclusive: &Guard, options: LoadOptions) -> Result<Self, OpenError> {
        match self.replace_programs(exclusive, options) {
            Ok(layout) => Self::join(PinDirectory::at(directory), exclusive, layout, None),
            // Those of the other build keep the same books.
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the pinned programs stay those of another build"
                );
                Ok(self)
            }
        }
    }

    /// Takes over what the layout before this one has, and removes it.
    fn take_over(
        pins: PinDirectory,
        exclusive: &Guard,
        options: LoadOptions,
        earlier: &Earlier,
    ) -> Result<Self, OpenError> {
        let directory = pins.base().to_owned();
        // Those that look into both books are replaced in the end, by whoever comes next if not by this one.
        let looking_into_both = LoadOptions {
            max_processes: Some(earlier.layout.max_processes),
            sources: options.sources.map(|byte| !byte),
            ..options
        };
        let kernel = Self::load(pins, exclusive, looking_into_both, Some(earlier))?;
        tracing::info!(
            layout = earlier.layout.version,
            members = kernel.processes().map_or(0, |members| members.len()),
            "the books of the earlier layout were taken over, without a gap"
        );
        kernel.remove_earlier(Some(earlier.pins.again()));
        kernel.replaced(&directory, exclusive, options)
    }

    /// Removes the books of the layout before this one, which were taken over, unless somebody uses them.
    fn remove_earlier(&self, earlier: Option<PinDirectory>) {
        let Some(earlier) = earlier else { return };
        let path = earlier.layout();
        let remove = || match Earlier::pinned(earlier.again())? {
            Some(earlier) => earlier.remove_unless_used(&self.processes()?, &self.tasks()?),
            None => Ok(earlier.remove_layout()?),
        };
        if let Err(error) = remove() {
            tracing::warn!(error = &error as &dyn std::error::Error, path = %path.display(), "the books of the earlier layout stay");
        }
    }

    /// Loads for this process alone: when it ends, everything goes.
    pub(crate) fn open_private(options: LoadOptions) -> Result<Self, OpenError> {
        let pins = PinDirectory::private()?;
        let exclusive = pins.exclusive()?;
        Self::load(pins, &exclusive, options, None)
    }

    /// Joins what is pinned in the directory; `None` if nothing is.
    pub(crate) fn open_existing(directory: &Path) -> Result<Option<Self>, OpenError> {
        let Some(pins) = PinDirectory::existing(directory) else {
            return Ok(None);
        };
        let Some(exclusive) = pins.exclusive_if_there()? else {
            return Ok(None);
        };
        let earlier = pins.check_layouts()?;
        let Some(layout) = pinned_layout(&pins)? else {
            // What a loader left that died half way, attached programs included.
            pins.remove()?;
            return match earlier {
                Some(earlier) if Earlier::pinned(earlier.again())?.is_some() => {
                    Err(earlier.other_layout(&format!("v{}", earlier.version())).into())
                }
                Some(earlier) => {
                    earlier.remove_layout()?;
                    pins.remove()?;
                    Ok(None)
                }
                None => Ok(None),
            };
        };
        Self::join_checked(pins, &exclusive, layout).map(Some)
    }

    fn join_checked(pins: PinDirectory, exclusive: &Guard, layout: Layout) -> Result<Self, OpenError> {
        if layout.version != LAYOUT_VERSION {
            return Err(pins.other_layout(&format!("v{}", layout.version)).into());
        }
        if layout.sources != zinit_ebpf::SOURCES {
            tracing::debug!("the pinned programs are of another build with the same layout");
        }
        Hooks::settle(&pins)?;
        filter::settle(&pins)?;
        let kernel = Self::join(pins, exclusive, layout, None)?;
        match kernel.mend_hooks(exclusive) {
            Ok(mended) if mended.is_empty() => {}
            Ok(hooks) => tracing::warn!(
                ?hooks,
                "hooks were not attached and are again: what happened meanwhile is unknown"
            ),
            // Services that were registered before can be listed and stopped all the same.
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "hooks are not attached"),
        }
        Ok(kernel)
    }

    fn load(
        pins: PinDirectory,
        exclusive: &Guard,
        options: LoadOptions,
        earlier: Option<&Earlier>,
    ) -> Result<Self, OpenError> {
        match load_and_pin(&pins, options, earlier) {
            Ok((layout, log)) => {
                let path = pins.base().to_owned();
                Self::join(pins, exclusive, layout, log).inspect_err(|_| PinDirectory::at(&path).discard())
            }
            Err(error) => {
                pins.discard();
                Err(error)
            }
        }
    }

    fn join(
        pins: PinDirectory,
        _exclusive: &Guard,
        layout: Layout,
        log: Option<ProgramLog>,
    ) -> Result<Self, OpenError> {
        let maps = Maps {
            processes: open_map(&pins, map::PROCESSES, Map::HashMap)?,
            services: Mutex::new(open_map(&pins, map::SERVICES, Map::HashMap)?),
            services_data: open_data(&pins, map::SERVICES)?,
            adoptions: Mutex::new(open_map(&pins, map::ADOPTIONS, Map::HashMap)?),
            processes_data: open_data(&pins, map::PROCESSES)?,
            exits: open_data(&pins, map::EXITS)?,
            stops: match pins.map(map::STOPS).exists() {
                true => Some(Mutex::new(open_map(&pins, map::STOPS, Map::LruHashMap)?)),
                false => None,
            },
            stats: open_map(&pins, map::STATS, Map::PerCpuArray)?,
            layout: Mutex::new(open_map(&pins, map::LAYOUT, Map::Array)?),
            layout_data: open_data(&pins, map::LAYOUT)?,
        };
        let open = |what: &'static str| failed(what);
        let command = |name| RawTracePoint::from_pin(pins.program(name)).map_err(open("open a pinned program"));
        let iterator = |name| {
            Iter::from_pin(pins.program(name))
                .map(Mutex::new)
                .map_err(open("open a pinned program"))
        };
        let programs = Programs {
            spawn: command(program::SPAWN)?,
            state: command(program::STATE)?,
            release: command(program::RELEASE)?,
            tasks: iterator(program::TASKS)?,
            adopt: iterator(program::ADOPT)?,
            gates: Gates::pinned(&pins)?,
            hooks: Mutex::new(Hooks::pinned(&pins, layout.sources)?),
        };
        let in_use = pins.in_use()?;
        Ok(Self {
            maps,
            programs,
            pins,
            in_use,
            max_processes: layout.max_processes,
            log: Mutex::new(log),
        })
    }

    /// Waits until this process alone may register, unregister and unload.
    pub(crate) fn exclusive(&self) -> Result<Guard, PinError> {
        self.pins.exclusive()
    }

    /// As [`Kernel::exclusive`], but does not wait; `None`: another process has use of them.
    pub(crate) fn try_exclusive(&self) -> Result<Option<Guard>, PinError> {
        self.pins.try_exclusive()
    }

    /// Ends this process's use of the pins, and removes them if no other process uses them and `unused` agrees. Returns
    /// whether it did.
    ///
    /// Afterwards these books must not be used any more.
    pub(crate) fn unload_if(&self, unused: impl FnOnce() -> Result<bool, BooksError>) -> Result<bool, OpenError> {
        let _exclusive = self.pins.exclusive()?;
        // Whoever finds the earlier ones alone takes them for those that count.
        let is_alone = || {
            self.remove_earlier(self.pins.check_layouts()?);
            Ok::<_, OpenError>(self.pins.check_layouts()?.is_none())
        };
        if !unused()? || !self.pins.is_only_user(&self.in_use)? || (self.pins.public().is_some() && !is_alone()?) {
            // Under the lock: of several users that leave at once, the last one finds no other.
            self.pins.leave(&self.in_use)?;
            return Ok(false);
        }
        // From here on the pins are what a loader leaves that died half way, so that one who dies now leaves no more.
        lock(&self.maps.layout)
            .set(0, Layout::default(), 0)
            .map_err(failed("write the layout"))?;
        self.pins.remove()?;
        Ok(true)
    }

    /// Waits until nobody registers, unregisters, adopts, releases or unloads; others may wait for the same.
    pub(crate) fn shared(&self) -> Result<Guard, PinError> {
        self.pins.shared()
    }

    pub(super) fn gates(&self) -> &Gates {
        &self.programs.gates
    }

    /// Attaches hooks again that have come loose, and notes with every service that it was unwatched for a while. Returns
    /// which hooks. The caller holds the books exclusively.
    pub(crate) fn mend_hooks(&self, _exclusive: &Guard) -> Result<Vec<&'static str>, OpenError> {
        let mut hooks = self.hooks()?;
        // Nobody replaces them now, but somebody may have since they were opened. What cannot be opened is found loose.
        if let Err(error) = hooks.refresh(&self.pins) {
            tracing::debug!(
                error = &error as &dyn std::error::Error,
                "hooks are judged as they were opened"
            );
        }
        let loose = hooks.loose(&self.pins);
        if loose.is_empty() {
            return Ok(loose);
        }
        // Before they work again: whoever sees them attached finds the note.
        let unwatched = StateChange {
            set_flags: service_flag::UNWATCHED.into(),
            ..StateChange::NONE
        };
        for (id, _) in self.services()? {
            self.change(id, unwatched)?;
        }
        hooks.mend(&self.pins)
    }

    /// Hooks that are loaded but not attached, or not by their own link.
    pub(crate) fn loose_hooks(&self) -> Vec<&'static str> {
        let mut hooks = match self.hooks() {
            Ok(hooks) => hooks,
            // Their pins are gone.
            Err(_) => lock(&self.programs.hooks),
        };
        let loose = hooks.loose(&self.pins);
        if loose.is_empty() || hooks.refresh(&self.pins).is_err() {
            return loose;
        }
        hooks.loose(&self.pins)
    }

    /// The hooks that are in use: other ones than before if another program has replaced them by those of another build.
    fn hooks(&self) -> Result<MutexGuard<'_, Hooks>, BooksError> {
        let sources = self.layout()?.sources;
        let mut hooks = lock(&self.programs.hooks);
        if hooks.sources != sources {
            *hooks = Hooks::pinned(&self.pins, sources)?;
        }
        Ok(hooks)
    }

    fn layout(&self) -> Result<Layout, BooksError> {
        lock(&self.maps.layout).get(&0, 0).map_err(failed("read the layout"))
    }

    /// Loads this build's programs for the same maps, attaches them, and only then lets go of those that are pinned: no event is
    /// missed in between, and one that both see counts once. The caller holds the books exclusively.
    ///
    /// Whoever dies on the way leaves each hook attached, and successors that the next one finds ([`Hooks::settle`]).
    fn replace_programs(&self, _exclusive: &Guard, options: LoadOptions) -> Result<Layout, OpenError> {
        let pins = &self.pins;
        let same = LoadOptions {
            max_processes: Some(self.max_processes),
            ..options
        };
        let (mut ebpf, _) = load::load(same, Some(pins), None)?;
        filter::take_over(&mut ebpf, self.layout()?.sources)?;
        let replaced =
            hooks::pin(&mut ebpf, pins, PinDirectory::successor).and_then(|()| self.succeed(&mut ebpf, options));
        if replaced.is_err() {
            Hooks::settle(pins)?;
        }
        replaced
    }

    /// Lets programs and links that are pinned as successors take their places.
    fn succeed(&self, ebpf: &mut Ebpf, options: LoadOptions) -> Result<Layout, OpenError> {
        let set = |layout: Layout| {
            let set = lock(&self.maps.layout).set(0, layout, 0);
            set.map(|()| layout).map_err(failed("write the layout"))
        };
        // The new programs count from 0, and what services were registered with must not hide what they miss. Before they count:
        // to count some twice is a doubt, to forget some would be none.
        let missed = u32::try_from(self.missed_creations()?).unwrap_or(u32::MAX);
        let layout = set(Layout {
            missed_earlier: missed,
            ..self.layout()?
        })?;
        let loaded: Vec<_> = ebpf
            .programs()
            .filter_map(|(name, program)| program.fd().is_ok().then_some(name))
            .collect();
        for name in &loaded {
            PinDirectory::succeed(&self.pins.program(name))?;
            if HOOKS.iter().any(|(hook, _)| hook == name) {
                PinDirectory::succeed(&self.pins.link(name))?;
            }
            if *name == program::TEXT {
                PinDirectory::succeed(&self.pins.map(TEXT_FILE))?;
            }
        }
        filter::keep(ebpf, options.sources)?;
        let layout = set(Layout {
            sources: options.sources,
            ..layout
        })?;
        tracing::info!("the eBPF programs of another build were replaced, without a gap");
        Ok(layout)
    }

    /// Maps whose pins are gone or lead to other maps: other clients do not see what this one does.
    pub(crate) fn replaced_pins(&self) -> Vec<&'static str> {
        let maps = &self.maps;
        [
            (map::PROCESSES, &maps.processes_data),
            (map::SERVICES, &maps.services_data),
            (map::EXITS, &maps.exits),
            (map::LAYOUT, &maps.layout_data),
        ]
        .into_iter()
        .filter(|(name, data)| !is_pinned(data, &self.pins.map(name)))
        .map(|(name, _)| name)
        .collect()
    }

    /// Every member of every service.
    pub(crate) fn processes(&self) -> Result<Vec<(u32, Process)>, BooksError> {
        sys::entries(self.maps.processes_data.fd().as_fd(), self.max_processes).map_err(failed("list members"))
    }

    /// The entry of a process, whatever its service.
    pub(crate) fn process(&self, tgid: u32) -> Result<Option<Process>, BooksError> {
        absent(self.maps.processes.get(&tgid, 0)).map_err(failed("look up a member"))
    }

    /// Every registered service.
    pub(crate) fn services(&self) -> Result<Vec<(u32, Service)>, BooksError> {
        sys::entries(self.maps.services_data.fd().as_fd(), u32::MAX).map_err(failed("list services"))
    }

    /// The service with this id.
    pub(crate) fn service(&self, id: u32) -> Result<Option<Service>, BooksError> {
        absent(lock(&self.maps.services).get(&id, 0)).map_err(failed("look up a service"))
    }

    /// Enters a new service and returns its id. The caller holds the books exclusively.
    pub(crate) fn insert_service(&self, _exclusive: &Guard, service: &Service) -> Result<u32, BooksError> {
        const NOEXIST: u64 = aya_obj::generated::BPF_NOEXIST as u64;
        let mut layouts = lock(&self.maps.layout);
        let mut layout = layouts.get(&0, 0).map_err(failed("read the layout"))?;
        // Both stand for no service; only a map that another program has written is ever at its end.
        let id = match layout.next_service {
            0 | NO_SERVICE => 1,
            id => id,
        };
        layout.next_service = id + 1;
        layouts.set(0, layout, 0).map_err(failed("write the layout"))?;
        lock(&self.maps.services)
            .insert(id, service, NOEXIST)
            .map_err(failed("register a service"))?;
        Ok(id)
    }

    /// Removes a service. Returns whether it was there. The caller holds the books exclusively.
    pub(crate) fn remove_service(&self, _exclusive: &Guard, id: u32) -> Result<bool, BooksError> {
        absent(lock(&self.maps.services).remove(&id))
            .map(|found| found.is_some())
            .map_err(failed("unregister a service"))
    }

    /// Changes a service without touching its counters. Returns whether it exists.
    pub(crate) fn change(&self, id: u32, change: StateChange) -> Result<bool, BooksError> {
        change_service(&self.programs.state, id, change)
    }

    /// Lets the next process that the calling thread creates join the service. The caller must not change threads
    /// before [`Kernel::withdraw_spawn`].
    pub(crate) fn request_spawn(&self, id: u32) -> Result<(), BooksError> {
        match run(&self.programs.spawn, &[id.into()])? {
            2 => Err(failed("announce a spawn")(io::Error::from(io::ErrorKind::StorageFull))),
            _ => Ok(()),
        }
    }

    /// Ends the request of the calling thread. Returns whether it was still pending: no process was created.
    pub(crate) fn withdraw_spawn(&self) -> Result<bool, BooksError> {
        run(&self.programs.spawn, &[0]).map(|pending| pending == 1)
    }

    /// Takes exactly this process out of its service; `dead`: because it was seen dead. Returns whether it was in one.
    pub(crate) fn release(&self, key: ProcessKey, dead: bool) -> Result<bool, BooksError> {
        run(
            &self.programs.release,
            &[key.tgid.into(), key.start_boottime_ns, dead.into()],
        )
        .map(|result| result == 1)
    }

    /// Exit records, the oldest of which may have been evicted.
    pub(crate) fn exits(&self) -> Result<Vec<(ExitKey, Exit)>, BooksError> {
        sys::entries(self.maps.exits.fd().as_fd(), u32::MAX).map_err(failed("list exit records"))
    }

    /// The stops of every service that has been stopped, of the newest 1,024.
    pub(crate) fn stops(&self) -> Result<Vec<(ServiceName, Stops)>, BooksError> {
        let Some(stops) = &self.maps.stops else {
            return Ok(Vec::new());
        };
        lock(stops)
            .iter()
            .collect::<Result<_, _>>()
            .map_err(failed("list stops"))
    }

    /// Changes the record of a service's stops; one that has none begins with zeros.
    pub(crate) fn change_stops(&self, name: &ServiceName, change: impl FnOnce(&mut Stops)) -> Result<(), BooksError> {
        let Some(stops) = &self.maps.stops else {
            return Ok(());
        };
        let mut stops = lock(stops);
        let mut record = absent(stops.get(name, 0))
            .map_err(failed("read the record of stops"))?
            .unwrap_or_default();
        change(&mut record);
        stops.insert(name, record, 0).map_err(failed("record a stop"))
    }

    /// Counters over all CPUs.
    pub(crate) fn stats(&self) -> Result<Stats, BooksError> {
        let values = self.maps.stats.get(&0, 0).map_err(failed("read the counters"))?;
        Ok(sum(values.iter()))
    }

    /// How often the kernel skipped each hook.
    pub(crate) fn misses(&self) -> Result<Vec<(&'static str, u64)>, BooksError> {
        let runs = self.hooks()?.runs()?;
        Ok(runs.iter().map(|runs| (runs.program, runs.recursion_misses)).collect())
    }

    /// How often each program ran.
    pub(crate) fn program_runs(&self) -> Result<Vec<ProgramRuns>, BooksError> {
        let programs = &self.programs;
        let mut runs = self.hooks()?.runs()?;
        runs.extend(programs.gates.runs()?);
        runs.extend([
            ProgramRuns::of(program::SPAWN, programs.spawn.fd())?,
            ProgramRuns::of(program::STATE, programs.state.fd())?,
            ProgramRuns::of(program::RELEASE, programs.release.fd())?,
            ProgramRuns::of(program::TASKS, lock(&programs.tasks).fd())?,
            ProgramRuns::of(program::ADOPT, lock(&programs.adopt).fd())?,
        ]);
        Ok(runs)
    }

    /// How often the kernel skipped the hook that sees deaths. Such a death is found when it is looked for, or when the
    /// process is reaped.
    pub(crate) fn missed_exits(&self) -> Result<u64, BooksError> {
        let misses = self.misses()?;
        let exit = misses.iter().find(|(name, _)| *name == program::EXIT);
        Ok(exit.map_or(0, |(_, count)| *count))
    }

    /// Creations that no hook saw: the smaller count of the two hooks, since each alone is enough; and of the hooks of earlier builds.
    pub(crate) fn missed_creations(&self) -> Result<u64, BooksError> {
        let missed = missed_by(&self.hooks()?.runs()?);
        Ok(missed + u64::from(self.layout()?.missed_earlier))
    }

    /// Every process that the caller's pid namespace shows, the dead and unreaped included. Members among the latter whose
    /// exit no hook saw leave the books.
    pub(crate) fn tasks(&self) -> Result<Vec<Task>, BooksError> {
        iterate(&self.programs.tasks).map(|bytes| decoded(&bytes))
    }

    /// Requests that a process be taken in by [`Kernel::adopt`].
    pub(crate) fn request_adoption(&self, key: ProcessKey, service: u32) -> Result<(), BooksError> {
        let adoption = Adoption {
            service,
            _pad: 0,
            start_boottime_ns: key.start_boottime_ns,
        };
        lock(&self.maps.adoptions)
            .insert(key.tgid, adoption, 0)
            .map_err(failed("request an adoption"))
    }

    /// Ends all requests, also those of an adopter that died.
    pub(crate) fn withdraw_adoptions(&self) -> Result<(), BooksError> {
        let mut adoptions = lock(&self.maps.adoptions);
        let tgids: Vec<u32> = adoptions
            .keys()
            .collect::<Result<_, _>>()
            .map_err(failed("list adoptions"))?;
        for tgid in tgids {
            absent(adoptions.remove(&tgid)).map_err(failed("withdraw an adoption"))?;
        }
        Ok(())
    }

    /// One pass over all processes: takes in those that were requested, and children of members of adopting services.
    ///
    /// Returns how many it took in.
    pub(crate) fn adopt(&self) -> Result<usize, BooksError> {
        iterate(&self.programs.adopt).map(|marks| marks.len())
    }

    /// Events, for one reader at a time.
    pub(crate) fn events(&self) -> Result<EventStream, EventsError> {
        let map = MapData::from_pin(self.pins.map(map::EVENTS))?;
        EventStream::new(RingBuf::try_from(Map::RingBuf(map))?, &self.pins.events_lock())
    }

    /// What the programs log, if this process loaded them with logging on and nobody has taken it before.
    pub(crate) fn take_log(&self) -> Option<ProgramLog> {
        lock(&self.log).take()
    }

    /// Capacity of `processes`.
    pub(crate) fn max_processes(&self) -> u32 {
        self.max_processes
    }

    /// The directory with the pins; `None` if they are private.
    pub(crate) fn pin_directory(&self) -> Option<&Path> {
        self.pins.public()
    }
}

/// Loads, pins and attaches everything. The layout is written last: it says that the rest is complete.
fn load_and_pin(
    pins: &PinDirectory,
    options: LoadOptions,
    earlier: Option<&Earlier>,
) -> Result<(Layout, Option<ProgramLog>), OpenError> {
    let (mut ebpf, max_processes) = load::load(options, None, earlier.map(|earlier| &earlier.pins))?;
    pins.create_layout()?;
    let log = logger(&mut ebpf, options);
    for name in map::ALL {
        let map = ebpf.map(name).ok_or(LoadError::NoMap(name))?;
        map.pin(pins.map(name)).map_err(failed("pin a map"))?;
    }
    filter::keep(&mut ebpf, options.sources)?;
    if let Some(earlier) = earlier {
        earlier.copy_services(pins)?;
    }
    hooks::pin(&mut ebpf, pins, Path::to_owned)?;
    if let Some(meanwhile) = options.meanwhile {
        meanwhile();
    }
    let missed = earlier.map(|earlier| earlier.take_members(pins)).transpose()?;
    let layout = Layout {
        version: LAYOUT_VERSION,
        next_service: earlier.map_or(1, |earlier| earlier.layout.next_service),
        max_processes,
        missed_earlier: u32::try_from(missed.unwrap_or(0)).unwrap_or(u32::MAX),
        sources: options.sources,
    };
    let map = ebpf.map_mut(map::LAYOUT).ok_or(LoadError::NoMap(map::LAYOUT))?;
    Array::<_, Layout>::try_from(map)
        .and_then(|mut layouts| layouts.set(0, layout, 0))
        .map_err(map_failed(map::LAYOUT))?;
    Ok((layout, log))
}

/// The layout record, if a complete set of pins is there.
pub(super) fn pinned_layout(pins: &PinDirectory) -> Result<Option<Layout>, OpenError> {
    let path = pins.map(map::LAYOUT);
    if !path.exists() {
        return Ok(None);
    }
    let unreadable = |_| PinError::Unreadable(path.clone());
    let map = MapData::from_pin(&path).map_err(unreadable)?;
    let layouts = Array::<_, Layout>::try_from(Map::Array(map)).map_err(unreadable)?;
    let layout = layouts.get(&0, 0).map_err(unreadable)?;
    Ok((layout.version != 0).then_some(layout))
}

fn logger(ebpf: &mut Ebpf, options: LoadOptions) -> Option<ProgramLog> {
    options.log?;
    ProgramLog::new(ebpf)
        .inspect_err(|error| tracing::warn!(%error, "the programs' log cannot be read"))
        .ok()
}

fn is_pinned(map: &MapData, path: &Path) -> bool {
    let same = |pinned: MapData| Ok(pinned.info()?.id() == map.info()?.id());
    MapData::from_pin(path).and_then(same).unwrap_or(false)
}

pub(super) fn open_map<T>(pins: &PinDirectory, name: &'static str, kind: fn(MapData) -> Map) -> Result<T, LoadError>
where
    T: TryFrom<Map, Error = MapError>,
{
    kind(open_data(pins, name)?).try_into().map_err(map_failed(name))
}

pub(super) fn open_data(pins: &PinDirectory, name: &'static str) -> Result<MapData, LoadError> {
    MapData::from_pin(pins.map(name)).map_err(map_failed(name))
}

fn map_failed(map: &'static str) -> impl FnOnce(MapError) -> LoadError {
    move |source| LoadError::Map {
        map,
        source: Box::new(source),
    }
}

/// The tasks that an iterator wrote.
pub(super) fn decoded(bytes: &[u8]) -> Vec<Task> {
    let (records, _) = bytes.as_chunks::<{ size_of::<Task>() }>();
    let record = |bytes: &[u8; size_of::<Task>()]| {
        // SAFETY: the bytes are as many as a `Task` has, which is plain data; the read needs no alignment.
        unsafe { bytes.as_ptr().cast::<Task>().read_unaligned() }
    };
    records.iter().map(record).collect()
}

/// Counters of all CPUs as one. Whatever has been written there, it has a sum.
pub(super) fn sum<'a>(cpus: impl Iterator<Item = &'a Stats>) -> Stats {
    cpus.fold(Stats::default(), |sum, cpu| Stats {
        seen: sum.seen.saturating_add(cpu.seen),
        tracked: sum.tracked.saturating_add(cpu.tracked),
        ignored: sum.ignored.saturating_add(cpu.ignored),
        insert_failures: sum.insert_failures.saturating_add(cpu.insert_failures),
        delete_failures: sum.delete_failures.saturating_add(cpu.delete_failures),
        exit_failures: sum.exit_failures.saturating_add(cpu.exit_failures),
        stale_replaced: sum.stale_replaced.saturating_add(cpu.stale_replaced),
        healed: sum.healed.saturating_add(cpu.healed),
        event_drops: sum.event_drops.saturating_add(cpu.event_drops),
        kills: sum.kills.saturating_add(cpu.kills),
    })
}

/// Creations that no hook saw: the smaller count of the two hooks, since each alone is enough.
pub(super) fn missed_by(hooks: &[ProgramRuns]) -> u64 {
    let of = |wanted: &str| {
        let runs = hooks.iter().find(|runs| runs.program == wanted);
        runs.map(|runs| runs.recursion_misses)
    };
    let fork = of(program::FORK).unwrap_or(0);
    of(program::WAKEUP_NEW).map_or(fork, |wakeup| wakeup.min(fork))
}

/// Changes a service by the command for that. Returns whether it exists.
pub(super) fn change_service(command: &RawTracePoint, id: u32, change: StateChange) -> Result<bool, BooksError> {
    let arguments = [id.into(), change.state, change.set_flags, change.lost, change.adopting];
    run(command, &arguments).map(|result| result == 1)
}

/// Runs a program in the context of the calling thread and returns its result.
fn run(program: &RawTracePoint, arguments: &[u64]) -> Result<u32, BooksError> {
    let mut options = RawTracePointRunOptions::new();
    options.args[..arguments.len()].copy_from_slice(arguments);
    program
        .test_run(options)
        .map(|result| result.return_value)
        .map_err(failed("run a program"))
}

/// Runs an iterator to its end and returns what it wrote.
pub(super) fn iterate(iterator: &Mutex<Iter>) -> Result<Vec<u8>, BooksError> {
    let mut iterator = lock(iterator);
    let id = iterator.attach().map_err(failed("start a task iterator"))?;
    let link = iterator.take_link(id).map_err(failed("start a task iterator"))?;
    drop(iterator);
    let mut bytes = Vec::new();
    link.into_file()
        .map_err(failed("start a task iterator"))?
        .read_to_end(&mut bytes)
        .map_err(failed("read a task iterator"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_that_somebody_else_wrote_have_a_sum() {
        let forged = Stats {
            seen: u64::MAX,
            kills: 1,
            ..Stats::default()
        };
        let sum = sum([forged, forged].iter());
        assert_eq!((sum.seen, sum.kills), (u64::MAX, 2));
    }
}
