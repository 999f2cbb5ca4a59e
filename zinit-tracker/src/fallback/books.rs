//! The books: the operations that the kernel's books have too.

use std::{
    io,
    os::fd::AsFd as _,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError,
        atomic::{AtomicU32, Ordering},
    },
};

use rustix::event::{EventfdFlags, eventfd};
use tokio::process::{Child, Command};
use zinit_ebpf::{
    Exit, ExitKey, Process, Service, StateChange, Stats, Task, process_flag, service_flag, service_state,
};

use super::{
    bystanders::Bystanders,
    cgroup::{self, Cgroup},
    error::{ProcfsError, unreadable},
    namespaces,
    reaper::Subreaper,
    scan,
    sight::{Blindness, Confinement, Sight},
    state::{Entry, State, comm},
    watcher::Watcher,
};
use crate::process::{
    Door, Pidfd, ProcessKey, stat,
    table::{self, Row},
};

/// `CAP_SYS_PTRACE` of linux/capability.h.
const CAP_SYS_PTRACE: u64 = 1 << 19;
/// Most pidfds that the books hold, and at most a quarter of the descriptors that this process may have.
const MOST_HELD: u64 = 4096;

/// Where this process stands, and what it may see.
#[derive(Clone, Copy, Debug)]
pub(super) struct Surroundings {
    pub me: u32,
    user: u32,
    /// May look into processes of other users.
    traces: bool,
    /// `/proc` hides processes of other users.
    hidden_users: bool,
    /// `/proc` shows processes of other users, if at all, without their files.
    hides_any: bool,
    /// This process creates children through its tracker only.
    pub sole_parent: bool,
    /// How many pidfds may be held.
    pub holdable: usize,
}

impl Surroundings {
    fn look(sole_parent: bool) -> Result<Self, ProcfsError> {
        let me = std::process::id();
        let myself = procfs::process::Process::myself().map_err(|_| ProcfsError::NoProc)?;
        // A `/proc` of another pid namespace shows this process under another pid, or not at all.
        if u32::try_from(myself.pid) != Ok(me) {
            return Err(ProcfsError::NoProc);
        }
        let status = myself.status().map_err(|_| ProcfsError::NoProc)?;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let holdable = limit.map_or(MOST_HELD, |limit| (limit / 4).min(MOST_HELD));
        let traces = status.capeff & CAP_SYS_PTRACE != 0;
        let hidden_users = Row::read(1).map_err(unreadable)?.is_none();
        Ok(Self {
            me,
            user: status.euid,
            traces,
            hidden_users,
            // Pid 1 may be the caller's own user's, or shown to its group.
            hides_any: hidden_users || (!traces && stat::proc_may_hide()),
            sole_parent,
            holdable: usize::try_from(holdable).unwrap_or(usize::MAX),
        })
    }

    /// Whether `/proc` tells this process how that one ended.
    pub(super) fn may_know_status(self, pid: u32) -> bool {
        self.traces || table::user(pid) == Some(self.user)
    }
}

/// What the thread that looks now and then shares with the rest.
pub(super) struct Shared {
    state: Mutex<State>,
    surroundings: Surroundings,
}

impl Shared {
    /// The state is consistent also if its holder panicked: every change is completed before the next can fail.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One look, if there is anything to look for.
    pub(super) fn look(&self) -> Result<(), ProcfsError> {
        let mut state = self.lock();
        if !state.services.is_empty() {
            scan::pass(&mut state, &self.surroundings)?;
        }
        Ok(())
    }
}

/// The books of level `procfs`.
pub(crate) struct Procfs {
    // Dropped first: it uses the rest.
    _watcher: Watcher,
    shared: Arc<Shared>,
    /// Held exclusively to register, unregister, adopt and release, shared to spawn.
    order: RwLock<()>,
    reason: String,
    _subreaper: Subreaper,
}

impl Procfs {
    /// `reason`: why not the kernel's books. `sole_parent`: this process creates children through these books only.
    pub(crate) fn open(reason: String, sole_parent: bool) -> Result<Self, ProcfsError> {
        let surroundings = Surroundings::look(sole_parent)?;
        let subreaper = Subreaper::become_one()?;
        let receives = surroundings.me == 1 || subreaper.was_one();
        // After it has become one: whom a child leaves from now on is given to this process, and in the table or a child of one.
        let rows = table::rows().map_err(unreadable)?;
        let state = State::beside(Bystanders::of(&rows, surroundings.me, receives));
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            surroundings,
        });
        Ok(Self {
            _watcher: Watcher::start(Arc::clone(&shared))?,
            shared,
            order: RwLock::new(()),
            reason,
            _subreaper: subreaper,
        })
    }

    /// Why this level and not the exact one.
    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }

    pub(crate) fn exclusive(&self) -> RwLockWriteGuard<'_, ()> {
        self.order.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None`: another thread has use of them.
    pub(crate) fn try_exclusive(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        match self.order.try_write() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    pub(crate) fn shared(&self) -> RwLockReadGuard<'_, ()> {
        self.order.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }

    /// Every live member, after a look at `/proc`.
    pub(crate) fn processes(&self) -> Result<Vec<(u32, Process)>, ProcfsError> {
        let mut state = self.state();
        scan::pass(&mut state, &self.shared.surroundings)?;
        Ok(state
            .members
            .iter()
            .map(|(pid, member)| (*pid, member.process))
            .collect())
    }

    /// The entry of a process, without a look.
    pub(crate) fn process(&self, pid: u32) -> Option<Process> {
        self.state().members.get(&pid).map(|member| member.process)
    }

    /// Every registered service, with its members as they were last counted.
    pub(crate) fn services(&self) -> Vec<(u32, Service)> {
        let state = self.state();
        state.services.iter().map(|(id, entry)| (*id, entry.record)).collect()
    }

    /// The service with this id. `live` is 0 only after a look that found nobody.
    pub(crate) fn service(&self, id: u32) -> Result<Option<Service>, ProcfsError> {
        let mut state = self.state();
        if !state.services.contains_key(&id) {
            return Ok(None);
        }
        let live = scan::settle(&mut state, id, &self.shared.surroundings)?;
        Ok(state.services.get(&id).map(|entry| Service { live, ..entry.record }))
    }

    pub(crate) fn insert_service(&self, service: &Service) -> u32 {
        let mut state = self.state();
        state.last_service += 1;
        let id = state.last_service;
        state.services.insert(id, Entry::new(*service));
        id
    }

    /// Removes a service and its cgroup. Returns whether it was there.
    pub(crate) fn remove_service(&self, id: u32) -> bool {
        let Some(mut entry) = self.state().services.remove(&id) else {
            return false;
        };
        discard(&mut entry);
        true
    }

    /// Changes a service without touching its counters. Returns whether it exists.
    pub(crate) fn change(&self, id: u32, change: StateChange) -> Result<bool, ProcfsError> {
        let mut state = self.state();
        let Some(entry) = state.services.get_mut(&id) else {
            return Ok(false);
        };
        let record = &mut entry.record;
        if change.state != StateChange::KEEP {
            record.state = u32::try_from(change.state).unwrap_or(service_state::KILLING);
        }
        record.flags |= u32::try_from(change.set_flags).unwrap_or(0);
        record.lost += change.lost;
        match change.adopting {
            0 => record.adopting_boottime_ns = 0,
            StateChange::KEEP => {}
            _ => record.adopting_boottime_ns = stat::boottime_ns(),
        }
        if record.flags & service_flag::ADOPTED != 0 {
            entry.unconfined = true;
        }
        // Nobody can be created in a frozen cgroup, so that one round of kills is enough. Released ones must run on, and so
        // must this process, in case somebody has moved it there.
        let freeze = entry.record.state == service_state::KILLING && !entry.has_released;
        if let Some(cgroup) = &mut entry.cgroup {
            cgroup.freeze(freeze && !cgroup.pids()?.contains(&self.shared.surroundings.me))?;
        }
        Ok(true)
    }

    /// Starts the command as a member; `fork` creates the process. `cookie`: the variable that it and its descendants carry, as `NAME=value`. Returns
    /// whether it could be entered, too; it cannot if `/proc` hides it.
    pub(crate) fn spawn(
        &self,
        id: u32,
        cookie: &str,
        command: &mut Command,
        fork: &mut dyn FnMut(&mut Command) -> io::Result<Child>,
    ) -> Result<io::Result<(Child, bool)>, ProcfsError> {
        // Held until the child is entered: a look meanwhile would take it for an orphan.
        let mut state = self.state();
        let me = Row::read(self.shared.surroundings.me)
            .map_err(unreadable)?
            .ok_or(ProcfsError::NoProc)?;
        let Some(entry) = state.services.get_mut(&id) else {
            return Ok(Err(io::ErrorKind::NotFound.into()));
        };
        entry.foreign_sessions.insert(me.session);
        entry.cookie.get_or_insert_with(|| cookie.as_bytes().to_owned());
        if entry.cgroup.is_none() && entry.record.forks == 0 {
            entry.cgroup = new_cgroup();
        }
        let child = match start(entry, command, fork) {
            Ok(child) => child,
            Err(error) => return Ok(Err(error)),
        };
        // It is ours and not reaped, so the pid is certainly its.
        let pid = child.id().unwrap_or(0);
        let entered = match (Row::read(pid), Pidfd::open(pid)) {
            (Ok(Some(row)), Ok(Some(pidfd))) => {
                let holdable = self.shared.surroundings.holdable;
                state.join(id, &row, me.key, process_flag::SPAWNED, pidfd, holdable);
                true
            }
            _ => false,
        };
        Ok(Ok((child, entered)))
    }

    /// Takes exactly this process out of its service. `dead`: because it was seen dead, and then a record of its end is left.
    /// Returns whether it left none.
    pub(crate) fn release(&self, key: ProcessKey, dead: bool) -> Result<bool, ProcfsError> {
        let mut state = self.state();
        if dead {
            scan::bury(&mut state, key, &self.shared.surroundings)?;
            return Ok(false);
        }
        let service = state.member(key).map(|member| member.process.service);
        let Some(entry) = service.and_then(|id| state.services.get_mut(&id)) else {
            return Ok(false);
        };
        entry.has_released = true;
        entry.unconfined = true;
        if let Some(cgroup) = &mut entry.cgroup {
            cgroup.freeze(false)?;
        }
        if state.member(key).map_or(Ok(false), |member| member.lives())? {
            scan::expel(&state, key.tgid)?;
        }
        state.released.insert(key);
        Ok(state.leave(key, None).is_some())
    }

    pub(crate) fn exits(&self) -> Vec<(ExitKey, Exit)> {
        self.state().exits()
    }

    /// Of the counters, those that have a meaning here.
    pub(crate) fn stats(&self) -> Stats {
        let tracked = self.state().services.values().map(|entry| entry.record.forks).sum();
        Stats {
            tracked,
            ..Stats::default()
        }
    }

    /// Every process that `/proc` shows.
    pub(crate) fn tasks(&self) -> Result<Vec<Task>, ProcfsError> {
        let namespace = pid_namespace();
        let level = u32::from(!stat::is_initial_pid_namespace());
        let rows = table::rows().map_err(unreadable)?;
        let task = |row: &Row| Task {
            start_boottime_ns: row.key.start_boottime_ns,
            tgid: row.key.tgid,
            pid: row.key.tgid,
            parent_tgid: row.parent,
            live_threads: if row.dead { 0 } else { row.threads.max(1) },
            dead: row.dead.into(),
            session: row.session,
            group: row.group,
            _pad: 0,
            pid_namespace: namespace,
            pid_namespace_level: level,
            comm: comm(&row.comm),
        };
        Ok(rows.iter().map(task).collect())
    }

    /// Takes in a running process; one that has gone is not taken in.
    pub(crate) fn adopt_root(&self, key: ProcessKey, service: u32) -> Result<(), ProcfsError> {
        let mut state = self.state();
        let Some(pidfd) = Pidfd::open(key.tgid)? else {
            return Ok(());
        };
        let row = Row::read(key.tgid).map_err(unreadable)?;
        let Some(row) = row.filter(|row| row.key == key && !pidfd.is_dead()) else {
            return Ok(());
        };
        if row.parent == self.shared.surroundings.me {
            // Whoever created it waits for its end.
            state.spawned.insert(key);
        }
        let parent = ProcessKey {
            tgid: row.parent,
            start_boottime_ns: 0,
        };
        let holdable = self.shared.surroundings.holdable;
        state.join(service, &row, parent, process_flag::ADOPTED, pidfd, holdable);
        Ok(())
    }

    /// One look. Returns how many joined a service.
    pub(crate) fn look(&self) -> Result<usize, ProcfsError> {
        scan::pass(&mut self.state(), &self.shared.surroundings)
    }

    /// Whether a pidfd that was opened for the member's pid is the member's, as far as the kernel can tell.
    pub(crate) fn agrees(&self, key: ProcessKey, pidfd: &Pidfd) -> bool {
        self.state().is_held_by(key, pidfd)
    }

    /// Whether a pidfd of the member is held, and shows that it lives.
    pub(crate) fn holds(&self, key: ProcessKey) -> bool {
        let state = self.state();
        let held = state.member(key).and_then(|member| member.handle.pidfd.as_ref());
        held.is_some_and(|pidfd| !pidfd.is_dead())
    }

    /// What speaks for and against the books of a service.
    pub(crate) fn sight(&self, id: u32) -> Result<Sight, ProcfsError> {
        let state = self.state();
        let entry = state.services.get(&id);
        let confinement = match entry.and_then(|entry| entry.cgroup.as_ref().map(|cgroup| (entry, cgroup))) {
            None => Confinement::None,
            Some((_, cgroup)) if cgroup.is_populated()? => Confinement::Populated,
            Some((entry, _)) if entry.unconfined || state.unknown_children => Confinement::Left,
            Some(_) => Confinement::Empty,
        };
        let surroundings = &self.shared.surroundings;
        // An empty cgroup says nothing of who left it by way of another pid namespace.
        let may_be_below = confinement != Confinement::Empty
            || surroundings.hides_any
            || namespaces::are_any_below().map_err(unreadable)?;
        let tells_orphans = scan::orphans_service(&state, surroundings).is_some();
        let blind_to = [
            (!tells_orphans, Blindness::SignsCleared),
            (!tells_orphans, Blindness::BetweenLooks),
            (may_be_below, Blindness::OtherPidNamespaces),
            (surroundings.hidden_users, Blindness::HiddenUsers),
            (!surroundings.traces, Blindness::ForeignEnvironments),
            (
                state.environments.elsewhere.values().any(|service| *service == id),
                Blindness::CookieElsewhere,
            ),
            (
                entry.is_some_and(|entry| entry.restless_since.is_some()),
                Blindness::NeverAtRest,
            ),
            (
                entry.is_some_and(|entry| entry.cgroup.is_some() && entry.unconfined),
                Blindness::LeftCgroup,
            ),
            (state.unknown_children, Blindness::UnknownChildren),
            (entry.is_some_and(|entry| entry.has_released), Blindness::Released),
        ];
        let blind_to = blind_to.into_iter().filter(|(is_blind, _)| *is_blind);
        Ok(Sight {
            confinement,
            blind_to: blind_to.map(|(_, blindness)| blindness).collect(),
        })
    }
}

impl Drop for Procfs {
    fn drop(&mut self) {
        for entry in self.state().services.values_mut() {
            discard(entry);
        }
    }
}

/// Removes the cgroup of a service that is forgotten.
fn discard(entry: &mut Entry) {
    // Its processes may have lived in one of a tracker before this one.
    clear_away();
    let Some(mut cgroup) = entry.cgroup.take() else {
        return;
    };
    if let Err(error) = cgroup.freeze(false).and_then(|()| cgroup.remove()) {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(
            error,
            "a cgroup is left: processes of the service that were not stopped are in it"
        );
    }
}

fn clear_away() {
    if let Err(error) = cgroup::clear_away() {
        tracing::debug!(
            error = &error as &dyn std::error::Error,
            "cgroups of earlier trackers may be left"
        );
    }
}

/// A cgroup for a service, with a number that no other service of this process has.
fn new_cgroup() -> Option<Cgroup> {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    clear_away();
    Cgroup::create(COUNTER.fetch_add(1, Ordering::Relaxed))
        .inspect_err(|error| tracing::info!(error = error as &dyn std::error::Error, "the service gets no cgroup"))
        .ok()
}

/// Starts the command in the service's cgroup, if it has one.
fn start(
    entry: &mut Entry,
    command: &mut Command,
    fork: &mut dyn FnMut(&mut Command) -> io::Result<Child>,
) -> io::Result<Child> {
    let Some(cgroup) = &entry.cgroup else {
        entry.unconfined = true;
        return fork(command);
    };
    let procs = match cgroup.procs() {
        Ok(procs) => procs,
        Err(error) => {
            tracing::info!(
                error = &error as &dyn std::error::Error,
                "the process cannot enter the service's cgroup"
            );
            entry.unconfined = true;
            return fork(command);
        }
    };
    let told = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let door = Door::open(command, procs.as_fd(), told.as_fd())?;
    let result = fork(command);
    drop(door);
    let moved = rustix::io::read(&told, &mut [0; 8]).is_ok();
    if result.is_ok() && !moved {
        // Not the caller's to enter, say; the service goes on without.
        tracing::info!("the process could not enter the service's cgroup");
        entry.unconfined = true;
        if entry.record.forks == 0 {
            discard(entry);
        }
    }
    result
}

/// Inode number of the caller's pid namespace.
pub(crate) fn pid_namespace() -> u32 {
    use std::os::unix::fs::MetadataExt as _;
    let namespace = std::fs::metadata("/proc/self/ns/pid");
    namespace.map_or(0, |namespace| u32::try_from(namespace.ino()).unwrap_or(0))
}
