//! Takes over the books of the layout before this one while its programs and ours run, so that no member is missed:
//!
//! 1. Our maps get its services, without members. 2. Our hooks are attached. They take what a member of the others creates for what a
//!    member of ours creates, so from here on whoever is born is in both. 3. A pass over all processes takes in who was there before.
//! 4. What the others still have, and ours have not, is a process that is gone; if it is not, its service is not proven any more.
//!
//! All that under the lock of the directory, so that nobody registers, spawns, adopts or releases meanwhile. Until the layout record is
//! written, the books before are those that count; whoever finds both complete finishes with [`Earlier::remove_unless_used`]. A program
//! that still uses them can spawn and release where ours do not see it: then nothing is proven of what was taken over.

use std::{collections::HashSet, io, os::fd::AsFd as _, sync::Mutex};

use aya::{
    maps::{Array, HashMap, Map, MapData, MapError},
    programs::{Iter, RawTracePoint},
};
use zinit_ebpf::{Exit, ExitKey, Layout, Process, Service, StateChange, Task, map, program, service_flag};

use super::{
    books::{self, BooksError, OpenError, failed},
    hooks::Hooks,
    pins::PinDirectory,
    sys,
};

/// The books of the layout before this one.
pub(super) struct Earlier {
    pub(super) pins: PinDirectory,
    pub(super) layout: Layout,
    processes: MapData,
    services: MapData,
    exits: MapData,
}

impl Earlier {
    /// Opens them; `None`: whoever loaded them died half way, and nobody has used them.
    pub(super) fn pinned(pins: PinDirectory) -> Result<Option<Self>, OpenError> {
        let Some(layout) = books::pinned_layout(&pins)? else {
            return Ok(None);
        };
        if layout.version != pins.version() {
            return Err(pins.other_layout(&format!("v{}", layout.version)).into());
        }
        Ok(Some(Self {
            processes: books::open_data(&pins, map::PROCESSES)?,
            services: books::open_data(&pins, map::SERVICES)?,
            exits: books::open_data(&pins, map::EXITS)?,
            layout,
            pins,
        }))
    }

    /// Why nothing is proven of their services, if something speaks against them that they do not say themselves.
    fn doubts(&self) -> Result<Option<&'static str>, OpenError> {
        if !Hooks::pinned(&self.pins, self.layout.sources)?
            .loose(&self.pins)
            .is_empty()
        {
            return Ok(Some("hooks of theirs were detached"));
        }
        if !self.pins.is_only_user(&self.pins.in_use()?)? {
            return Ok(Some("another program uses them"));
        }
        Ok(None)
    }

    fn services(&self) -> Result<Vec<(u32, Service)>, BooksError> {
        sys::entries(self.services.fd().as_fd(), u32::MAX).map_err(failed("list services of the earlier layout"))
    }

    fn processes(&self) -> Result<Vec<(u32, Process)>, BooksError> {
        sys::entries(self.processes.fd().as_fd(), self.layout.max_processes)
            .map_err(failed("list members of the earlier layout"))
    }

    /// Enters its services, before our hooks are attached. Who has died is counted; who lives is counted when taken over.
    pub(super) fn copy_services(&self, pins: &PinDirectory) -> Result<(), OpenError> {
        let mut services: HashMap<_, u32, Service> = books::open_map(pins, map::SERVICES, Map::HashMap)?;
        for (id, service) in self.services()? {
            let gone = service.forks.saturating_sub(service.live);
            // Layout 1 did not say so: a process that was let go shows all signs of a member.
            let released = match gone > service.exits {
                true => service_flag::RELEASED,
                false => 0,
            };
            let service = Service {
                live: 0,
                forks: gone,
                flags: service.flags | released,
                // Of an adopter that died: nobody adopts now.
                adopting_boottime_ns: 0,
                ..service
            };
            services.insert(id, service, 0).map_err(failed("take over a service"))?;
        }
        Ok(())
    }

    /// Takes in its members and its records of exits. Our hooks are attached. Returns how many creations its hooks have missed.
    pub(super) fn take_members(&self, pins: &PinDirectory) -> Result<u64, OpenError> {
        let iterator = |name| {
            Iter::from_pin(pins.program(name))
                .map(Mutex::new)
                .map_err(failed("open a pinned program"))
        };
        let adopt = iterator(program::ADOPT)?;
        let ours: HashMap<_, u32, Process> = books::open_map(pins, map::PROCESSES, Map::HashMap)?;
        let theirs: HashMap<_, u32, Process> = books::open_map(&self.pins, map::PROCESSES, Map::HashMap)?;
        let has = |books: &HashMap<MapData, u32, Process>, tgid: u32, start: u64| {
            let entry = books::absent(books.get(&tgid, 0)).map_err(failed("look up a member"))?;
            Ok::<_, BooksError>(entry.is_some_and(|entry| entry.start_boottime_ns == start))
        };
        // Events that began before our hooks were attached are over.
        let has_waited = sys::wait_for_hooks();
        books::iterate(&adopt)?;
        // Once more: a process whose leader is replaced by a thread that executes a program can be passed over.
        books::iterate(&adopt)?;
        let mut missing = Vec::new();
        for (tgid, entry) in self.processes()? {
            if !has(&ours, tgid, entry.start_boottime_ns)? {
                missing.push((tgid, entry));
            }
        }
        // Most have died since.
        let mut doubtful = HashSet::new();
        if !missing.is_empty() {
            let living = living(&books::decoded(&books::iterate(&iterator(program::TASKS)?)?));
            for (tgid, entry) in missing {
                let start = entry.start_boottime_ns;
                let may_live = living.as_ref().is_none_or(|living| living.contains(&(tgid, start)));
                if may_live && has(&theirs, tgid, start)? && !has(&ours, tgid, start)? {
                    doubtful.insert(entry.service);
                }
            }
        }
        let against_all = match self.doubts()? {
            None if !has_waited => Some("the kernel does not tell when hooks have run (membarrier)"),
            doubts => doubts,
        };
        if let Some(reason) = against_all {
            tracing::warn!(reason, "nothing is proven of services of the earlier layout");
            doubtful.extend(self.services()?.into_iter().map(|(id, _)| id));
        } else if !doubtful.is_empty() {
            tracing::warn!(services = ?doubtful, "members could not be taken over: nothing is proven of these services");
        }
        self.doubt(pins, &doubtful)?;
        // Who was dying when it was passed over has a record by now.
        sys::wait_for_hooks();
        self.copy_exits(pins)?;
        let missed = books::missed_by(&Hooks::pinned(&self.pins, self.layout.sources)?.runs()?);
        Ok(missed + u64::from(self.layout.missed_earlier))
    }

    /// Says of services that they have members who could not be taken over.
    fn doubt(&self, pins: &PinDirectory, services: &HashSet<u32>) -> Result<(), OpenError> {
        if services.is_empty() {
            return Ok(());
        }
        tracing::warn!(
            ?services,
            "members could not be taken over: nothing is proven of these services"
        );
        let state = RawTracePoint::from_pin(pins.program(program::STATE)).map_err(failed("open a pinned program"))?;
        let unwatched = StateChange {
            set_flags: service_flag::UNWATCHED.into(),
            ..StateChange::NONE
        };
        for id in services {
            books::change_service(&state, *id, unwatched)?;
        }
        Ok(())
    }

    /// Records of members that died before or while this took place; those that both have stay ours.
    fn copy_exits(&self, pins: &PinDirectory) -> Result<(), OpenError> {
        const NOEXIST: u64 = aya_obj::generated::BPF_NOEXIST as u64;
        let mut records: Vec<(ExitKey, Exit)> = sys::entries(self.exits.fd().as_fd(), u32::MAX)
            .map_err(failed("list exit records of the earlier layout"))?;
        // The oldest are evicted first.
        records.sort_by_key(|(_, exit)| exit.exit_boottime_ns);
        let mut exits = books::open_map::<HashMap<_, ExitKey, Exit>>(pins, map::EXITS, Map::LruHashMap)?;
        for (key, exit) in records {
            match exits.insert(key, exit, NOEXIST) {
                Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::AlreadyExists => {}
                result => result.map_err(failed("take over an exit record"))?,
            }
        }
        Ok(())
    }

    /// Removes the pins, hooks first, unless another process uses them or they have a member that ours have not. The caller holds the
    /// directory exclusively, and our books are complete.
    pub(super) fn remove_unless_used(self, ours: &[(u32, Process)], tasks: &[Task]) -> Result<(), OpenError> {
        let in_use = self.pins.in_use()?;
        if !self.pins.is_only_user(&in_use)? {
            tracing::info!(
                layout = self.layout.version,
                "the books of the earlier layout stay as long as another program uses them"
            );
            return Ok(());
        }
        let ours: HashSet<_> = ours
            .iter()
            .map(|(tgid, entry)| (*tgid, entry.start_boottime_ns))
            .collect();
        let living = living(tasks);
        let is_missing = |tgid: u32, entry: &Process| {
            let name = (tgid, entry.start_boottime_ns);
            !ours.contains(&name) && living.as_ref().is_none_or(|living| living.contains(&name))
        };
        if let Some((tgid, _)) = self.processes()?.iter().find(|(tgid, entry)| is_missing(*tgid, entry)) {
            tracing::warn!(
                layout = self.layout.version,
                member = tgid,
                "the books of the earlier layout stay: they have a member that joined there after they were taken over"
            );
            return Ok(());
        }
        // From here on they are what a loader leaves that died half way.
        let mut layouts: Array<_, Layout> = books::open_map(&self.pins, map::LAYOUT, Map::Array)?;
        layouts
            .set(0, Layout::default(), 0)
            .map_err(failed("write the layout"))?;
        Ok(self.pins.remove_layout()?)
    }
}

/// Who lives; `None`: not all of them can be seen from here.
fn living(tasks: &[Task]) -> Option<HashSet<(u32, u64)>> {
    let me = std::process::id();
    let here = tasks.iter().find(|task| task.pid == me)?;
    (here.pid_namespace_level == 0).then(|| {
        let living = tasks.iter().filter(|task| task.live_threads > 0);
        living.map(|task| (task.tgid, task.start_boottime_ns)).collect()
    })
}
