//! Members: listing, lineage, release, and the records of those that died.

use std::{
    collections::{HashMap, HashSet},
    sync::atomic::Ordering,
    time::Duration,
};

use serde::Serialize;
use zinit_ebpf::{Exit, ExitKey, Process, StateChange, process_flag, service_flag};

use super::{
    Existence, Tracker, TrackerError,
    service::{Service, ServiceId, text},
};
use crate::{fallback::UNKNOWN_STATUS, process::ProcessKey};

/// A live member of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Its unique name.
    #[serde(flatten)]
    pub key: ProcessKey,
    /// Its pid in the caller's pid namespace; 0 if that does not show it.
    pub pid: u32,
    /// The service it belongs to.
    pub service: ServiceId,
    /// The process that created it.
    pub parent: ProcessKey,
    /// Session id when it joined, in the initial pid namespace.
    pub session: u32,
    /// Process group id when it joined, in the initial pid namespace.
    pub group: u32,
    /// Command name.
    pub comm: String,
    /// Started by the tracker for the service.
    pub spawned: bool,
    /// Taken in while it ran.
    pub adopted: bool,
    /// Time since boot at which it joined.
    #[serde(rename = "joined_boottime_ns", serialize_with = "crate::units::nanoseconds")]
    pub joined: Duration,
}

/// A member that died, as the kernel recorded it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its unique name.
    pub key: ProcessKey,
    /// Its pid in the caller's pid namespace; 0 if that does not show it.
    pub pid: u32,
    /// The service it belonged to.
    pub service: ServiceId,
    /// The process that created it.
    pub parent: ProcessKey,
    /// Command name.
    pub comm: String,
    /// Wait status as in wait(2); `None`: somebody reaped it unseen (level `procfs` only).
    pub status: Option<u32>,
    /// Time since boot at which it died.
    pub ended: Duration,
}

impl Tracker {
    /// The live members of the service, oldest first.
    ///
    /// A member that is there throughout the call is in the list; one that comes or goes meanwhile may be.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn processes(&self, service: &Service) -> Result<Vec<Member>, TrackerError> {
        self.members(&[service.id])
    }

    /// The live members of the services, oldest first.
    pub(crate) fn members(&self, services: &[ServiceId]) -> Result<Vec<Member>, TrackerError> {
        self.members_where(|service| services.contains(&service))
    }

    /// The live members of all services, oldest first, as [`Tracker::processes`] has those of one.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn all_members(&self) -> Result<Vec<Member>, TrackerError> {
        self.members_where(|_| true)
    }

    fn members_where(&self, wanted: impl Fn(ServiceId) -> bool) -> Result<Vec<Member>, TrackerError> {
        self.find_missed_exits()?;
        let entries = self.books.processes()?;
        let mut members: Vec<_> = entries
            .iter()
            .filter(|(_, entry)| wanted(ServiceId(entry.service)))
            .map(|(tgid, entry)| Member::new(*tgid, entry))
            .collect();
        if self.here.level != 0 {
            self.translate(members.iter_mut().map(|member| (member.key, &mut member.pid)))?;
        }
        members.sort_by_key(|member| (member.joined, member.key));
        Ok(members)
    }

    /// Entries of these services, for whom their counters may have nobody, and those that belong to no service: no service is
    /// unregistered before its entries are gone.
    pub(crate) fn entries_against(&self, services: &[ServiceId]) -> Result<Vec<ProcessKey>, TrackerError> {
        let entries = self.books.processes()?;
        let registered: HashSet<_> = self.books.services()?.into_iter().map(|(id, _)| id).collect();
        let against = entries
            .into_iter()
            .filter(|(_, entry)| services.contains(&ServiceId(entry.service)) || !registered.contains(&entry.service));
        let mut keys = Vec::new();
        for (tgid, entry) in against {
            // It may have gone, and its service after it, while they were read.
            let same = |now: Process| (now.service, now.start_boottime_ns) == (entry.service, entry.start_boottime_ns);
            if self.books.process(tgid)?.is_some_and(same) {
                keys.push(Member::new(tgid, &entry).key);
            }
        }
        Ok(keys)
    }

    /// If the kernel has skipped exits since this was last done, lets it look through all processes for them.
    fn find_missed_exits(&self) -> Result<(), TrackerError> {
        let missed = self.books.missed_exits()?;
        if self.exits_looked_for.load(Ordering::Relaxed) == missed {
            return Ok(());
        }
        // The walk finds those that are dead. One that is dying yet is looked for again.
        let dying = self.existing()?.into_values().any(|found| found == Existence::Dying);
        if !dying {
            self.exits_looked_for.store(missed, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The members of the services that died, oldest first; the kernel keeps the newest 16,384 machine-wide.
    pub(crate) fn ended(&self, services: &[ServiceId]) -> Result<Vec<Ended>, TrackerError> {
        self.ended_where(|service| services.contains(&service))
    }

    /// As [`Tracker::ended`], of all services, those that are not registered any more included.
    pub(super) fn all_ended(&self) -> Result<Vec<Ended>, TrackerError> {
        self.ended_where(|_| true)
    }

    fn ended_where(&self, wanted: impl Fn(ServiceId) -> bool) -> Result<Vec<Ended>, TrackerError> {
        let records = self.books.exits()?;
        let mut ended: Vec<_> = records
            .iter()
            .filter(|(_, exit)| wanted(ServiceId(exit.service)))
            .map(|(key, exit)| Ended::new(key, exit))
            .collect();
        if self.here.level != 0 {
            self.translate(ended.iter_mut().map(|ended| (ended.key, &mut ended.pid)))?;
        }
        ended.sort_by_key(|ended| (ended.ended, ended.key));
        Ok(ended)
    }

    /// Replaces the registrant's view of pids by the caller's, where the caller is in a nested pid namespace.
    fn translate<'a>(&self, pids: impl Iterator<Item = (ProcessKey, &'a mut u32)>) -> Result<(), TrackerError> {
        let tasks = self.books.tasks()?;
        let seen: HashMap<_, _> = tasks
            .iter()
            .map(|task| ((task.tgid, task.start_boottime_ns), task.pid))
            .collect();
        for (key, pid) in pids {
            *pid = seen.get(&(key.tgid, key.start_boottime_ns)).copied().unwrap_or(0);
        }
        Ok(())
    }

    /// Takes a member and its descendants out of their service: a stop leaves them alone from now on.
    ///
    /// Returns those that were taken out. What they create while this runs is taken out too.
    ///
    /// # Errors
    ///
    /// When no member has the pid.
    pub fn release(&self, pid: u32) -> Result<Vec<Member>, TrackerError> {
        let _guard = self.books.exclusive()?;
        let ids: Vec<_> = self.services()?.iter().map(|info| info.id).collect();
        let root = self
            .members(&ids)?
            .into_iter()
            .find(|member| member.pid == pid)
            .ok_or(TrackerError::NotTracked(pid))?;
        self.release_from(root)
    }

    /// As [`Tracker::release`], of exactly this member; one that is dead has descendants all the same.
    ///
    /// # Errors
    ///
    /// When the books cannot be read or changed.
    pub fn release_member(&self, member: Member) -> Result<Vec<Member>, TrackerError> {
        let _guard = self.books.exclusive()?;
        self.release_from(member)
    }

    /// The caller holds the books exclusively.
    fn release_from(&self, root: Member) -> Result<Vec<Member>, TrackerError> {
        let service = [root.service];
        let released_some = StateChange {
            set_flags: service_flag::RELEASED.into(),
            ..StateChange::NONE
        };
        self.books.change(root.service.0, released_some)?;
        let mut family = HashSet::from([root.key]);
        let mut released = Vec::new();
        loop {
            // A descendant whose creator died is reached through the creator's exit record.
            let ended = self.ended(&service)?;
            let members = self.members(&service)?;
            let links = ended.iter().map(|ended| (ended.key, ended.parent));
            let links = links.chain(members.iter().map(|member| (member.key, member.parent)));
            let mut children: HashMap<ProcessKey, Vec<ProcessKey>> = HashMap::new();
            for (key, parent) in links {
                children.entry(parent).or_default().push(key);
            }
            let mut open: Vec<_> = family.iter().copied().collect();
            while let Some(parent) = open.pop() {
                let born = children.get(&parent).into_iter().flatten();
                open.extend(born.filter(|child| family.insert(**child)));
            }
            let mut found = false;
            for member in members.into_iter().filter(|member| family.contains(&member.key)) {
                if self.books.release(member.key, false)? {
                    found = true;
                    released.push(member);
                }
            }
            // A pass that finds nobody: every child of a released process that was tracked has been released.
            if !found {
                return Ok(released);
            }
        }
    }
}

impl Member {
    pub(super) fn new(tgid: u32, entry: &Process) -> Self {
        Self {
            key: ProcessKey {
                tgid,
                start_boottime_ns: entry.start_boottime_ns,
            },
            pid: tgid,
            service: ServiceId(entry.service),
            parent: ProcessKey {
                tgid: entry.parent_tgid,
                start_boottime_ns: entry.parent_start_boottime_ns,
            },
            session: entry.session,
            group: entry.group,
            comm: text(&entry.comm),
            spawned: entry.flags & process_flag::SPAWNED != 0,
            adopted: entry.flags & process_flag::ADOPTED != 0,
            joined: Duration::from_nanos(entry.joined_boottime_ns),
        }
    }
}

impl Ended {
    pub(super) fn new(key: &ExitKey, exit: &Exit) -> Self {
        Self {
            key: ProcessKey {
                tgid: key.tgid,
                start_boottime_ns: key.start_boottime_ns,
            },
            pid: key.tgid,
            service: ServiceId(exit.service),
            parent: ProcessKey {
                tgid: exit.parent_tgid,
                start_boottime_ns: exit.parent_start_boottime_ns,
            },
            comm: text(&exit.comm),
            status: (exit.status != UNKNOWN_STATUS).then_some(exit.status),
            ended: Duration::from_nanos(exit.exit_boottime_ns),
        }
    }
}
