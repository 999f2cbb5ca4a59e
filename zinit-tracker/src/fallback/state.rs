//! The books in memory: services, live members, exit records. Changes them, and looks at no process but to hold on to it.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    time::Instant,
};

use zinit_ebpf::{COMM_LEN, Exit, ExitKey, Process, Service, process_flag};

use super::{bystanders::Bystanders, cgroup::Cgroup, error::ProcfsError, reaper};
use crate::process::{Pidfd, ProcessKey, stat, table::Row};

/// As many exit records as the kernel's books keep.
const MOST_EXITS: usize = 16_384;

/// The status of a member that somebody reaped before it was seen dead. No wait status has this value.
pub(crate) const UNKNOWN_STATUS: u32 = u32::MAX;

/// Everything that is known. Behind one lock.
#[derive(Default)]
pub(super) struct State {
    pub services: BTreeMap<u32, Entry>,
    pub last_service: u32,
    /// Live members by pid.
    pub members: HashMap<u32, Member>,
    exits: VecDeque<(ExitKey, Exit)>,
    /// What environments have said.
    pub environments: Environments,
    /// Processes that were taken out of a service, and their children since.
    pub released: HashSet<ProcessKey>,
    /// Processes that had another parent than this process when they were last seen.
    pub elsewhere: HashSet<ProcessKey>,
    /// Processes that were given to this process since: it has to reap them.
    pub received: HashSet<ProcessKey>,
    /// Dead members that nobody has reaped: this process has to, once they are given to it.
    pub unreaped: HashMap<ProcessKey, Handle>,
    /// Processes that this process has created itself: whoever did so waits for their end.
    pub spawned: HashSet<ProcessKey>,
    /// Children that this process had before it began to track, and their descendants.
    pub bystanders: Bystanders,
    /// Children of this process are there that no sign attributes to a service.
    pub unknown_children: bool,
    /// Dead children of this process that no sign attributes to a service, in the last pass.
    pub unclaimed: HashSet<ProcessKey>,
    /// Some of them were new: orphans, it may be, of somebody who goes on creating them.
    pub died_unseen: bool,
    /// Pidfds that are held.
    held: usize,
}

/// What the environments of processes that are no members say.
#[derive(Default)]
pub(super) struct Environments {
    /// Carry no cookie of ours, now or ever.
    pub strangers: HashSet<ProcessKey>,
    /// Carry the cookie of this service, and are not where it alone can have put them.
    pub elsewhere: HashMap<ProcessKey, u32>,
}

/// A service, and what the kernel's books would not have to know of it.
pub(super) struct Entry {
    pub record: Service,
    /// `NAME=value` as its processes carry it, once one was spawned.
    pub cookie: Option<Vec<u8>>,
    /// Start of the first process that was given the cookie: nobody older has it from the service.
    pub cookie_since: u64,
    pub cgroup: Option<Cgroup>,
    /// Members may be or have been outside of the cgroup.
    pub unconfined: bool,
    /// Sessions that it was started in, not those that it has made.
    pub foreign_sessions: HashSet<u32>,
    /// A member was released: what signs say is ambiguous from then on.
    pub has_released: bool,
    /// The last pid of the machine when it was found empty, with nobody created meanwhile.
    pub empty_at: Option<u32>,
    /// When it was last found empty, if that was while processes were being created.
    pub restless_since: Option<Instant>,
}

/// What tells one process from a later one with its pid, even if both started in the same tick.
pub(super) struct Handle {
    /// Held as long as descriptors are plenty: then its identity is exact.
    pub pidfd: Option<Pidfd>,
    /// Tells its pidfds from those of others, where they have inodes.
    inode: Option<u64>,
}

/// A live member.
pub(super) struct Member {
    pub process: Process,
    pub handle: Handle,
    /// Its process group, if that is the service's own.
    pub own_group: Option<u32>,
}

impl Entry {
    pub(super) fn new(record: Service) -> Self {
        Self {
            record,
            cookie: None,
            cookie_since: u64::MAX,
            cgroup: None,
            unconfined: false,
            foreign_sessions: HashSet::new(),
            has_released: false,
            empty_at: None,
            restless_since: None,
        }
    }

    /// Whether the process may have the cookie from the service, and not the service from it. To the tick.
    pub(super) fn is_as_young(&self, row: &Row) -> bool {
        row.key.start_boottime_ns >= self.cookie_since
    }
}

impl Member {
    pub(super) fn key(&self) -> ProcessKey {
        ProcessKey {
            tgid: self.process.pid,
            start_boottime_ns: self.process.start_boottime_ns,
        }
    }

    /// Whether it certainly lives at this moment.
    pub(super) fn lives(&self) -> Result<bool, ProcfsError> {
        if let Some(pidfd) = &self.handle.pidfd {
            return Ok(!pidfd.is_dead());
        }
        let key = self.key();
        let row = Row::read(key.tgid).map_err(super::error::unreadable)?;
        Ok(row.is_some_and(|row| row.key == key && !row.dead))
    }
}

impl Handle {
    /// Whether a descriptor is one of this process, as far as its number tells.
    pub(super) fn is_alike(&self, pidfd: &Pidfd) -> bool {
        match (self.inode, pidfd.inode()) {
            (Some(mine), Some(other)) => mine == other,
            _ => true,
        }
    }

    /// Reaps the process, which has or had this pid.
    pub(super) fn reap(&self, pid: u32) -> Result<Option<u32>, ProcfsError> {
        if let Some(pidfd) = &self.pidfd {
            return Ok(reaper::reap(pidfd));
        }
        let pidfd = Pidfd::open(pid)?;
        Ok(pidfd
            .filter(|pidfd| self.is_alike(pidfd))
            .and_then(|pidfd| reaper::reap(&pidfd)))
    }
}

impl State {
    /// Nothing is known yet but who is to be left alone.
    pub(super) fn beside(bystanders: Bystanders) -> Self {
        Self {
            bystanders,
            ..Self::default()
        }
    }

    /// Enters a live process. `pidfd` is its, beyond doubt.
    pub(super) fn join(
        &mut self,
        service: u32,
        row: &Row,
        parent: ProcessKey,
        flags: u32,
        pidfd: Pidfd,
        holdable: usize,
    ) {
        if !self.services.contains_key(&service) {
            return;
        }
        self.make_way(row.key);
        let Some(entry) = self.services.get_mut(&service) else {
            return;
        };
        let record = &mut entry.record;
        record.live += 1;
        record.forks += 1;
        record.peak = record.peak.max(record.live);
        if record.root_tgid == 0 {
            record.root_tgid = row.key.tgid;
            record.root_start_boottime_ns = row.key.start_boottime_ns;
        }
        entry.empty_at = None;
        entry.restless_since = None;
        if flags & process_flag::SPAWNED != 0 {
            entry.cookie_since = entry.cookie_since.min(row.key.start_boottime_ns);
        }
        let inode = pidfd.inode();
        let pidfd = (self.held < holdable).then_some(pidfd);
        self.held += usize::from(pidfd.is_some());
        // Whoever knows members better than by their parents need not remember those.
        self.elsewhere.remove(&row.key);
        self.received.remove(&row.key);
        self.bystanders.forget(row.key);
        self.environments.elsewhere.remove(&row.key);
        let process = Process {
            service,
            flags,
            start_boottime_ns: row.key.start_boottime_ns,
            parent_start_boottime_ns: parent.start_boottime_ns,
            joined_boottime_ns: stat::boottime_ns(),
            parent_tgid: parent.tgid,
            pid: row.key.tgid,
            session: row.session,
            group: row.group,
            comm: comm(&row.comm),
        };
        let member = Member {
            process,
            handle: Handle { pidfd, inode },
            own_group: None,
        };
        if flags & process_flag::SPAWNED != 0 {
            self.spawned.insert(row.key);
        }
        self.members.insert(row.key.tgid, member);
    }

    /// Takes out the member that is entered under the pid of a process that is about to be: it would be counted for ever.
    fn make_way(&mut self, key: ProcessKey) {
        let Some(before) = self.members.get(&key.tgid).map(Member::key) else {
            return;
        };
        // Two processes do not have one pid at a time, so another one is dead, and was reaped unseen.
        self.leave(before, (before != key).then_some(UNKNOWN_STATUS));
    }

    /// The member with exactly this name.
    pub(super) fn member(&self, key: ProcessKey) -> Option<&Member> {
        self.members.get(&key.tgid).filter(|member| member.key() == key)
    }

    /// Takes a member out: it is dead, with this status, or released (`None`). Returns what it was held by, if it was there.
    pub(super) fn leave(&mut self, key: ProcessKey, death: Option<u32>) -> Option<Handle> {
        self.member(key)?;
        let member = self.members.remove(&key.tgid)?;
        self.held -= usize::from(member.handle.pidfd.is_some());
        if let Some(entry) = self.services.get_mut(&member.process.service) {
            entry.record.live -= 1;
            entry.record.exits += u64::from(death.is_some());
        }
        if let Some(status) = death {
            if self.exits.len() == MOST_EXITS {
                self.exits.pop_front();
            }
            self.exits.push_back(record_of(&member.process, status));
        }
        Some(member.handle)
    }

    pub(super) fn exits(&self) -> Vec<(ExitKey, Exit)> {
        self.exits.iter().copied().collect()
    }

    /// Whether a pidfd that was just opened for the member's pid is the member's, as far as the kernel can tell. One of a member
    /// that is dead need not be.
    pub(super) fn is_held_by(&self, key: ProcessKey, pidfd: &Pidfd) -> bool {
        let Some(member) = self.member(key) else {
            return true;
        };
        match &member.handle.pidfd {
            // It lives now, so it had the pid all the time.
            Some(held) => !held.is_dead(),
            None => member.handle.is_alike(pidfd),
        }
    }
}

fn record_of(process: &Process, status: u32) -> (ExitKey, Exit) {
    let key = ExitKey {
        start_boottime_ns: process.start_boottime_ns,
        tgid: process.pid,
        _pad: 0,
    };
    let exit = Exit {
        service: process.service,
        parent_tgid: process.parent_tgid,
        parent_start_boottime_ns: process.parent_start_boottime_ns,
        exit_boottime_ns: stat::boottime_ns(),
        status,
        pid: process.pid,
        flags: process.flags,
        _pad: 0,
        comm: process.comm,
    };
    (key, exit)
}

/// A command name as the records hold it.
pub(super) fn comm(name: &str) -> [u8; COMM_LEN] {
    let mut comm = [0; COMM_LEN];
    let length = name.len().min(COMM_LEN - 1);
    comm[..length].copy_from_slice(&name.as_bytes()[..length]);
    comm
}

#[cfg(test)]
mod tests {
    use zinit_ebpf::{INSTANCE_LEN, NAME_LEN};

    use super::*;

    const BLANK: Service = Service {
        live: 0,
        forks: 0,
        exits: 0,
        peak: 0,
        lost: 0,
        missed_before: 0,
        registered_boottime_ns: 0,
        adopting_boottime_ns: 0,
        registrant_start_boottime_ns: 0,
        root_start_boottime_ns: 0,
        root_tgid: 0,
        registrant_tgid: 0,
        state: 0,
        parent: 0,
        flags: 0,
        pid_namespace: 0,
        pid_namespace_level: 0,
        _pad: 0,
        instance: [0; INSTANCE_LEN],
        name: [0; NAME_LEN],
    };

    /// This process, as it would be in the table with this start time.
    fn me(start_boottime_ns: u64) -> (Row, Pidfd) {
        let mut row = Row::read(std::process::id()).unwrap().unwrap();
        row.key.start_boottime_ns = start_boottime_ns;
        (row, Pidfd::open(std::process::id()).unwrap().unwrap())
    }

    fn join(state: &mut State, service: u32, start_boottime_ns: u64) -> ProcessKey {
        let (row, pidfd) = me(start_boottime_ns);
        state.join(service, &row, row.key, 0, pidfd, 16);
        row.key
    }

    #[test]
    fn who_gets_the_pid_of_a_member_that_died_unseen_takes_its_place() {
        let mut state = State::default();
        for id in [1, 2] {
            state.services.insert(id, Entry::new(BLANK));
        }
        let stale = join(&mut state, 1, 10);
        let key = join(&mut state, 2, 20);
        assert!(state.member(stale).is_none() && state.member(key).is_some());
        let counts = |state: &State, id| (state.services[&id].record.live, state.services[&id].record.exits);
        assert_eq!(
            (counts(&state, 1), counts(&state, 2), state.held),
            ((0, 1), (1, 0), 1),
            "the first is down"
        );
        assert_eq!(state.exits()[0].1.status, UNKNOWN_STATUS);
        // Who changes services has not died.
        join(&mut state, 1, 20);
        assert_eq!((counts(&state, 1), counts(&state, 2), state.held), ((1, 1), (0, 0), 1));
        state.leave(key, Some(0));
        assert_eq!((counts(&state, 1), state.held), ((0, 2), 0));
    }
}
