//! Services and their members: register, spawn, adopt, list, release.
//!
//! The pinned maps are the database; a [`Tracker`] is one client of them and keeps no state of its own that another
//! client would miss. Where BPF cannot be had, the books are in the memory of this process instead ([`Level`]). How a service is stopped is [`stop`](mod@crate::stop)'s business.

mod adopt;
mod books;
mod compare;
mod config;
mod error;
mod escapes;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod history;
mod level;
mod lineage;
mod member;
mod service;
mod spawn;
mod stops;
mod sweep;
mod usage;
mod wait;

use std::{
    collections::{HashMap, HashSet},
    sync::atomic::AtomicU64,
    time::Duration,
};

pub use adopt::{Adoption, Suspect};
pub use compare::{Comparison, Finding, Method, Missed, Reason, Stranger, Why};
pub use config::{Config, DEFAULT_PINS, Level, Pins};
pub use error::TrackerError;
pub use escapes::{Departure, Escape};
pub use history::{EventLosses, KEPT_EXITS};
pub use level::Tracking;
pub use lineage::{Alive, Creator, Lineage, Link};
pub use member::{Ended, Member};
pub use service::{Service, ServiceId, ServiceInfo, ServiceState};
pub use spawn::COOKIE;
pub use stops::{LastStop, ServiceStops};
pub use sweep::Sign;
pub(crate) use sweep::{Stray, Sweeper};
pub use usage::{CpuShares, MemberLoad, MemberUsage};
pub(crate) use wait::{RECHECK, Watch, Watched};
use zinit_ebpf::{Service as Record, StateChange, Stats, service_state};

use self::books::Books;
use crate::{
    fallback::Sight,
    kernel::{
        EventStream, EventsError, Gate, GateKind, Kernel, KernelError, LoadOptions, PinError, ProgramLog, ProgramRuns,
        check_requirements, check_requirements_to_read,
    },
    process::{
        Machine, Matched, Pidfd, PidfdError, ProcessKey,
        condition::{Condition, condition},
        stat::{self, StartClock},
    },
};

/// How alive a process is that has not been reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Existence {
    /// A thread has not begun to exit.
    Alive,
    /// All threads exit; files, locks and sockets may be open yet.
    Dying,
    /// Nothing is left but its exit status.
    Dead,
}

/// Where the caller stands: its pid namespace, and itself.
#[derive(Clone, Copy, Debug)]
struct Here {
    key: ProcessKey,
    pid_namespace: u32,
    level: u32,
}

/// A client of the machine's tracker.
pub struct Tracker {
    books: Books,
    here: Here,
    clock: StartClock,
    instance: String,
    /// Whether `/proc` may not show a process that exists.
    proc_may_hide: bool,
    /// How many skipped exits there had been when they were last looked for.
    exits_looked_for: AtomicU64,
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracker")
            .field("pins", &self.books.pin_directory())
            .field("instance", &self.instance)
            .finish_non_exhaustive()
    }
}

impl Tracker {
    /// Joins the tracker that is pinned, or loads and pins it.
    fn open_ebpf(config: &Config) -> Result<Self, TrackerError> {
        check_requirements()?;
        let options = LoadOptions {
            max_processes: config.max_processes,
            log: config.program_log,
            without_hook: config.without_hook,
            meanwhile: config.meanwhile,
            replace: config.replace_programs,
            sources: config.sources,
        };
        let kernel = match &config.pins {
            Pins::Shared(directory) => Kernel::open(directory, options)?,
            Pins::Private => Kernel::open_private(options)?,
            Pins::SharedOrPrivate(directory) => match Kernel::open(directory, options) {
                Err(KernelError::Pin(reason @ (PinError::NotBpffs(_) | PinError::Io { .. }))) => {
                    let kernel = Kernel::open_private(options)?;
                    tracing::warn!(%reason, "running unpinned: tracking ends with this process, and others cannot see it");
                    kernel
                }
                result => result?,
            },
        };
        Self::new(kernel, config)
    }

    /// Joins the tracker that is pinned; `None` if none is. Loads nothing and leaves nothing behind.
    ///
    /// # Errors
    ///
    /// As [`Tracker::open`] at [`Level::Ebpf`], whatever the configuration says: at level `procfs` there is nothing to join.
    pub fn open_existing(config: &Config) -> Result<Option<Self>, TrackerError> {
        check_requirements()?;
        Self::join_existing(config)
    }

    /// As [`Tracker::open_existing`], for who has no right to send signals, and sends none.
    pub(crate) fn open_to_read(config: &Config) -> Result<Option<Self>, TrackerError> {
        check_requirements_to_read()?;
        Self::join_existing(config)
    }

    fn join_existing(config: &Config) -> Result<Option<Self>, TrackerError> {
        if config.level == Level::Procfs {
            return Err(TrackerError::NotShared);
        }
        let directory = match &config.pins {
            Pins::Shared(directory) | Pins::SharedOrPrivate(directory) => directory,
            Pins::Private => return Ok(None),
        };
        Kernel::open_existing(directory)?
            .map(|kernel| Self::new(kernel, config))
            .transpose()
    }

    /// On failure, what was loaded goes, unless somebody uses it.
    fn new(kernel: Kernel, config: &Config) -> Result<Self, TrackerError> {
        match Self::stand(&kernel, config) {
            Ok((instance, here, clock)) => Ok(Self {
                books: Books::Kernel(Box::new(kernel)),
                here,
                clock,
                instance,
                proc_may_hide: stat::proc_may_hide(),
                exits_looked_for: AtomicU64::new(0),
            }),
            Err(error) => {
                let unused = || Ok(kernel.services()?.is_empty());
                if let Err(leftover) = kernel.unload_if(unused) {
                    tracing::warn!(error = %leftover, "failed to remove the pins");
                }
                Err(error)
            }
        }
    }

    /// Who the caller is, as the kernel and `/proc` see it.
    fn stand(kernel: &Kernel, config: &Config) -> Result<(String, Here, StartClock), TrackerError> {
        let instance = service::checked_instance(&config.instance)?.to_owned();
        let pid = std::process::id();
        let task = kernel
            .tasks()?
            .into_iter()
            .find(|task| task.pid == pid)
            .ok_or(TrackerError::NoSelf)?;
        if !stat::is_initial_pid_namespace() && task.pid_namespace_level == 0 {
            return Err(TrackerError::NoSelf);
        }
        let here = Here {
            key: ProcessKey {
                tgid: task.tgid,
                start_boottime_ns: task.start_boottime_ns,
            },
            pid_namespace: task.pid_namespace,
            level: task.pid_namespace_level,
        };
        let clock = StartClock::calibrate(pid, here.key.start_boottime_ns).ok_or(TrackerError::NoProc)?;
        Ok((instance, here, clock))
    }

    /// Removes the pins if no service is registered and no other process uses the tracker. Returns whether it did.
    ///
    /// For one-shot uses: a supervisor just drops the tracker and finds everything again when it starts anew.
    ///
    /// # Errors
    ///
    /// When the pins cannot be removed.
    pub fn close(self) -> Result<bool, TrackerError> {
        self.leave()
    }

    /// As [`Tracker::close`], for one that is shared: afterwards it must not be used any more.
    pub(crate) fn leave(&self) -> Result<bool, TrackerError> {
        self.books.unload_if(|services| services.is_empty())
    }

    /// Who manages the services that this tracker registers.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// Forgets every service and removes the pins, if no service has a member and no other process uses the tracker.
    ///
    /// # Errors
    ///
    /// [`TrackerError::NotEmpty`] or [`TrackerError::InUse`], and then nothing was changed; or when the pins cannot be
    /// removed.
    pub fn unload(self) -> Result<(), TrackerError> {
        let mut busy = None;
        let unused = |services: &[(u32, Record)]| {
            busy = services.iter().find(|(_, service)| service.live > 0).copied();
            busy.is_none()
        };
        if self.books.unload_if(unused)? {
            return Ok(());
        }
        Err(match busy {
            Some((id, service)) => {
                let info = ServiceInfo::new(id, &service);
                TrackerError::NotEmpty {
                    name: format!("{}/{}", info.instance, info.name),
                    live: info.live,
                }
            }
            None => TrackerError::InUse,
        })
    }

    /// Events as they happen. Hints only; one reader at a time, machine-wide. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When another process reads them.
    pub fn events(&self) -> Result<EventStream, EventsError> {
        self.books.events()
    }

    /// Counters of the programs since they were loaded.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn stats(&self) -> Result<Stats, TrackerError> {
        self.books.stats()
    }

    /// How often the kernel skipped each hook since it was loaded.
    ///
    /// # Errors
    ///
    /// When a program cannot be inspected.
    pub fn misses(&self) -> Result<Vec<(&'static str, u64)>, TrackerError> {
        self.books.misses()
    }

    /// How often each program ran since it was loaded, and for how long.
    ///
    /// # Errors
    ///
    /// When a program cannot be inspected.
    pub fn program_runs(&self) -> Result<Vec<ProgramRuns>, TrackerError> {
        self.books.program_runs()
    }

    /// How many processes can be tracked at a time.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.books.capacity()
    }

    /// Where the maps are pinned; `None`: nowhere, they go with this process.
    #[must_use]
    pub fn pin_directory(&self) -> Option<&std::path::Path> {
        self.books.pin_directory()
    }

    /// What the programs log, if this tracker loaded them with [`Config::program_log`]; `None` the second time.
    #[must_use]
    pub fn program_log(&self) -> Option<ProgramLog> {
        self.books.take_log()
    }

    pub(crate) fn missed_creations(&self) -> Result<u64, TrackerError> {
        self.books.missed_creations()
    }

    /// Does the work behind a closed gate, as a stop that needs one does. Returns which it was, how long closing it took, and
    /// what came of the work; `None`: there is no gate at this level, and nothing was done.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it.
    pub fn with_gate<R>(&self, work: impl FnOnce() -> R) -> Result<Option<(GateKind, Duration, R)>, TrackerError> {
        let gate = self.close_gate()?;
        Ok(gate.map(|gate| (gate.kind, gate.took, work())))
    }

    /// Closes a gate on who forks while it is killed; `None`: there is none at this level.
    pub(crate) fn close_gate(&self) -> Result<Option<Gate>, TrackerError> {
        self.books.close_gate()
    }

    /// What this level sees of a service and what not; `None`: everything.
    pub(crate) fn sight(&self, service: ServiceId) -> Result<Option<Sight>, TrackerError> {
        self.books.sight(service.0)
    }

    pub(crate) fn set_state(&self, service: ServiceId, state: ServiceState) -> Result<(), TrackerError> {
        let state = match state {
            ServiceState::Up => service_state::UP,
            ServiceState::Stopping => service_state::STOPPING,
            ServiceState::Killing => service_state::KILLING,
        };
        let change = StateChange {
            state: state.into(),
            ..StateChange::NONE
        };
        self.books.change(service.0, change)?;
        Ok(())
    }

    /// Attaches hooks that have come loose again; every service then knows that it was unwatched for a while. Members that
    /// died meanwhile leave the books.
    ///
    /// If that cannot be done, the hooks stay loose, which is a doubt and no reason to leave a service alone.
    pub(crate) async fn mend_hooks(&self) -> Result<(), TrackerError> {
        // Without the lock: whoever holds it for long must not hold up every stop.
        if self.loose_hooks().is_empty() {
            return Ok(());
        }
        let exclusive = self.books.exclusive_in_time().await;
        match exclusive.and_then(|exclusive| self.books.mend_hooks(&exclusive)) {
            Ok(mended) if mended.is_empty() => return Ok(()),
            Ok(hooks) => tracing::warn!(
                ?hooks,
                "hooks were not attached and are again: what happened meanwhile is unknown"
            ),
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "hooks are not attached"),
        }
        self.bury_vanished()
    }

    /// Takes out members that are reaped, and that no hook saw dying. Does nothing where the caller does not see everybody.
    fn bury_vanished(&self) -> Result<(), TrackerError> {
        if self.here.level != 0 {
            return Ok(());
        }
        // In this order: a process that is in the books and then not among all is gone.
        let entries = self.books.processes()?;
        let there = self.existing()?;
        let key = |(tgid, entry): &(u32, zinit_ebpf::Process)| ProcessKey {
            tgid: *tgid,
            start_boottime_ns: entry.start_boottime_ns,
        };
        for gone in entries.iter().map(key).filter(|key| !there.contains_key(key)) {
            self.bury(gone)?;
        }
        Ok(())
    }

    /// Hooks that are loaded but not attached.
    pub(crate) fn loose_hooks(&self) -> Vec<&'static str> {
        self.books.loose_hooks()
    }

    /// Maps whose pins are gone or are other maps'.
    pub(crate) fn replaced_pins(&self) -> Vec<&'static str> {
        self.books.replaced_pins()
    }

    /// Whether processes of this service can be invisible to the caller: their registrant is in another pid namespace.
    pub(crate) fn is_out_of_sight(&self, info: &ServiceInfo) -> bool {
        self.here.level != 0 && info.pid_namespace != self.here.pid_namespace
    }

    /// The member, to be signalled. `None`: it is dead, or was released.
    pub(crate) fn open_member(&self, member: &Member) -> Result<Option<Matched>, TrackerError> {
        let books = OneMember { tracker: self, member };
        let matched = match member.pid {
            0 => None,
            pid => Matched::member(&books, pid, member.key)?,
        };
        if matched.is_none() && self.is_member(member)? && member.pid != 0 && self.is_gone(member.key)? {
            // Its exit was missed, and whoever reaped it freed the pid: nothing else will take it out.
            self.bury(member.key)?;
        }
        Ok(matched)
    }

    /// Whether the process is a member of that service right now.
    pub(crate) fn is_member(&self, member: &Member) -> Result<bool, TrackerError> {
        self.is_member_of(member.service, member.key)
    }

    fn is_member_of(&self, service: ServiceId, key: ProcessKey) -> Result<bool, TrackerError> {
        let entry = self.books.process(key.tgid)?;
        Ok(entry.is_some_and(|entry| entry.start_boottime_ns == key.start_boottime_ns && entry.service == service.0))
    }

    /// Whether exactly this process is a member of any service.
    pub(crate) fn is_recorded_alive(&self, key: ProcessKey) -> Result<bool, TrackerError> {
        let entry = self.books.process(key.tgid)?;
        Ok(entry.is_some_and(|entry| entry.start_boottime_ns == key.start_boottime_ns))
    }

    /// Whether the kernel has no living process of this name, as far as the caller's pid namespace shows.
    fn is_gone(&self, key: ProcessKey) -> Result<bool, TrackerError> {
        if self.books.vouch_for(key) {
            return Ok(false);
        }
        let tasks = self.books.tasks()?;
        Ok(!tasks.iter().any(|task| {
            task.tgid == key.tgid && task.start_boottime_ns == key.start_boottime_ns && task.live_threads > 0
        }))
    }

    /// Every process that the caller's pid namespace shows and that is not reaped, by how alive it is.
    pub(crate) fn existing(&self) -> Result<HashMap<ProcessKey, Existence>, TrackerError> {
        let existence = |task: zinit_ebpf::Task| {
            let key = ProcessKey {
                tgid: task.tgid,
                start_boottime_ns: task.start_boottime_ns,
            };
            let existence = match (task.live_threads, task.dead) {
                (1.., _) => Existence::Alive,
                (0, 0) => Existence::Dying,
                (0, _) => Existence::Dead,
            };
            (key, existence)
        };
        Ok(self.books.tasks()?.into_iter().map(existence).collect())
    }

    /// What `/proc` says of exactly this process.
    pub(crate) fn condition(&self, pid: u32, key: ProcessKey) -> Option<Condition> {
        condition(pid, key.start_boottime_ns, self.clock)
    }

    /// A pidfd of the process with this name, if it is not reaped yet.
    ///
    /// If the pid had gone to another process before it was opened, the named one was reaped before that, and `/proc`,
    /// read afterwards, cannot show its start time.
    pub(crate) fn open_matching(&self, pid: u32, key: ProcessKey) -> Result<Option<Pidfd>, TrackerError> {
        if pid == 0 {
            return Ok(None);
        }
        match Pidfd::open(pid)? {
            Some(pidfd) if self.books.agrees(key, &pidfd) && self.has_start_of(pid, key)? => Ok(Some(pidfd)),
            _ => Ok(None),
        }
    }

    fn has_start_of(&self, pid: u32, key: ProcessKey) -> Result<bool, TrackerError> {
        let shown = self
            .clock
            .matches(pid, key.start_boottime_ns)
            .map_err(|source| PidfdError::Match { pid, source })?;
        if shown || self.books.vouch_for(key) {
            return Ok(true);
        }
        if !self.proc_may_hide {
            return Ok(false);
        }
        let tasks = self.books.tasks()?;
        let wanted = |task: &zinit_ebpf::Task| {
            task.pid == pid && task.tgid == key.tgid && task.start_boottime_ns == key.start_boottime_ns
        };
        Ok(tasks.iter().any(wanted))
    }

    /// The pid by which the caller sees exactly this process, tracked or not. `None`: it is dead, or out of sight.
    pub(crate) fn pid_of_process(&self, key: ProcessKey) -> Result<Option<u32>, TrackerError> {
        let tasks = self.books.tasks()?;
        let wanted = |task: &&zinit_ebpf::Task| {
            task.tgid == key.tgid && task.start_boottime_ns == key.start_boottime_ns && task.live_threads > 0
        };
        Ok(tasks.iter().find(wanted).map(|task| task.pid).filter(|pid| *pid != 0))
    }

    /// The caller and its ancestors: no stop may signal one of them.
    pub(crate) fn own_line(&self) -> Result<HashSet<u32>, TrackerError> {
        let tasks = self.books.tasks()?;
        Ok(self.ancestors(&tasks).chain([self.here.key.tgid]).collect())
    }

    /// Buries a member that was seen dead although its exit was not recorded.
    pub(crate) fn bury(&self, key: ProcessKey) -> Result<bool, TrackerError> {
        self.books.release(key, true)
    }

    /// Time since boot, as the records count it: `CLOCK_BOOTTIME` of the initial time namespace.
    #[must_use]
    pub fn now() -> Duration {
        Duration::from_nanos(stat::boottime_ns())
    }
}

/// This machine, for matching a member.
struct OneMember<'a> {
    tracker: &'a Tracker,
    member: &'a Member,
}

impl Machine for OneMember<'_> {
    type Handle = Pidfd;
    type Error = TrackerError;

    fn open(&self, pid: u32) -> Result<Option<Pidfd>, TrackerError> {
        let opened = Pidfd::open(pid)?;
        Ok(opened.filter(|pidfd| self.tracker.books.agrees(self.member.key, pidfd)))
    }

    fn has_start_of(&self, pid: u32, wanted: ProcessKey) -> Result<bool, TrackerError> {
        self.tracker.has_start_of(pid, wanted)
    }

    fn is_recorded(&self, wanted: ProcessKey) -> Result<bool, TrackerError> {
        self.tracker.is_member_of(self.member.service, wanted)
    }
}
