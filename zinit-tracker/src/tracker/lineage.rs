//! Lineage: which service a process belongs or belonged to, and through whom.
//!
//! Goes through members and the records of those that died. It does not look for processes by other signs: what the books
//! do not have has no lineage.

use std::{collections::HashMap, time::Duration};

use serde::Serialize;

use super::{Ended, Member, ServiceId, ServiceInfo, Tracker, TrackerError};
use crate::{process::ProcessKey, stop::Fate};

/// Which service a process belongs or belonged to, and through whom.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lineage {
    /// The number of the service.
    pub service_id: ServiceId,
    /// The service; `None`: it is not registered any more.
    pub service: Option<ServiceInfo>,
    /// The process, its creator, that one's creator and so on, as far as they are members or recorded.
    pub line: Vec<Link>,
    /// Who created the last of them: no member, such as the supervisor, or one whose record has made room for others'.
    pub creator: Creator,
    /// Whether the pid has gone to another process since, which belongs to no service.
    pub pid_reused: bool,
}

/// A process in a lineage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Link {
    /// Its unique name.
    #[serde(flatten)]
    pub key: ProcessKey,
    /// Its pid in the caller's pid namespace; 0 if that does not show it.
    pub pid: u32,
    /// Command name.
    pub comm: String,
    /// The service that it belongs or belonged to: another than the first one's if services are nested.
    pub service: ServiceId,
    /// Whether it is the main process: the first that was spawned or adopted.
    pub main: bool,
    /// Whether it lives.
    pub alive: bool,
    /// How it ended; `None`: it lives, or nobody saw it.
    pub fate: Option<Fate>,
    /// Time since boot at which it died.
    #[serde(rename = "ended_boottime_ns", serialize_with = "optional_nanoseconds")]
    pub ended: Option<Duration>,
}

/// Who created the last process of a lineage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Creator {
    /// Its unique name.
    #[serde(flatten)]
    pub key: ProcessKey,
    /// Its pid in the caller's pid namespace and its command name; `None`: it is dead, or that does not show it.
    pub alive: Option<Alive>,
}

/// A living process that is no member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Alive {
    /// Its pid in the caller's pid namespace.
    pub pid: u32,
    /// Command name.
    pub comm: String,
}

fn optional_nanoseconds<S: serde::Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => crate::units::nanoseconds(duration, serializer),
        None => serializer.serialize_none(),
    }
}

/// What the books have of every process: its link, and its creator.
pub(super) type Known = HashMap<ProcessKey, (Link, ProcessKey)>;

impl Tracker {
    /// Which service the process with this pid belongs to, and through whom; if none does, the one that had the pid last
    /// and belonged to one.
    ///
    /// The kernel keeps the records of the newest 16,384 dead members: a line may end at an older one.
    ///
    /// # Errors
    ///
    /// [`TrackerError::NoLineage`], or when a map cannot be read.
    pub fn lineage(&self, pid: u32) -> Result<Lineage, TrackerError> {
        let services = self.services()?;
        // The living first: one that dies in between is among the dead then.
        let members = self.all_members()?;
        let ended = self.all_ended()?;
        let of_pid = members.iter().find(|member| member.pid == pid).map(|member| member.key);
        let last = || ended.iter().rev().find(|ended| ended.pid == pid).map(|ended| ended.key);
        let start = match pid {
            0 => None,
            _ => of_pid.or_else(last),
        };
        let start = start.ok_or(TrackerError::NoLineage(pid))?;
        let known = known(&services, &members, &ended);
        let (line, creator) = climb(&known, start);
        let service_id = line.first().map_or(ServiceId(0), |link| link.service);
        Ok(Lineage {
            service_id,
            service: services.into_iter().find(|info| info.id == service_id),
            pid_reused: of_pid.is_none() && self.is_taken(pid)?,
            creator: self.creator(creator)?,
            line,
        })
    }

    /// Whether a process that has not been reaped, and is no member, has the pid.
    fn is_taken(&self, pid: u32) -> Result<bool, TrackerError> {
        let tasks = self.books.tasks()?;
        Ok(tasks.iter().any(|task| task.pid == pid && task.live_threads > 0))
    }

    fn creator(&self, key: ProcessKey) -> Result<Creator, TrackerError> {
        let tasks = self.books.tasks()?;
        let task = tasks.iter().find(|task| {
            task.tgid == key.tgid && task.start_boottime_ns == key.start_boottime_ns && task.live_threads > 0
        });
        // It can die while it is read; then nobody knows its name any more.
        let alive = task.and_then(|task| {
            let comm = std::fs::read_to_string(format!("/proc/{}/comm", task.pid)).ok()?;
            let (pid, comm) = (task.pid, comm.trim_end_matches('\n').to_owned());
            Some(Alive { pid, comm })
        });
        Ok(Creator { key, alive })
    }
}

/// One that is a member and has a record is dying, and counts as a member.
pub(super) fn known(services: &[ServiceInfo], members: &[Member], ended: &[Ended]) -> Known {
    let is_main = |key| services.iter().any(|info| info.main == Some(key));
    let dead = ended.iter().map(|ended| {
        let link = Link {
            key: ended.key,
            pid: ended.pid,
            comm: ended.comm.clone(),
            service: ended.service,
            main: is_main(ended.key),
            alive: false,
            fate: ended.status.map(Fate::of_wait_status),
            ended: Some(ended.ended),
        };
        (ended.key, (link, ended.parent))
    });
    let living = members.iter().map(|member| {
        let link = Link {
            key: member.key,
            pid: member.pid,
            comm: member.comm.clone(),
            service: member.service,
            main: is_main(member.key),
            alive: true,
            fate: None,
            ended: None,
        };
        (member.key, (link, member.parent))
    });
    dead.chain(living).collect()
}

/// From the process up to the last one that is known, and who created that.
pub(super) fn climb(known: &Known, start: ProcessKey) -> (Vec<Link>, ProcessKey) {
    let (mut line, mut next) = (Vec::new(), start);
    // A creator started before its child: the line has no circle, unless the books are broken.
    while let Some((link, creator)) = known.get(&next).filter(|_| line.len() < known.len()) {
        line.push(link.clone());
        next = *creator;
    }
    (line, next)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(tgid: u32) -> ProcessKey {
        ProcessKey {
            tgid,
            start_boottime_ns: u64::from(tgid),
        }
    }

    fn link(tgid: u32) -> Link {
        Link {
            key: key(tgid),
            pid: tgid,
            comm: String::new(),
            service: ServiceId(1),
            main: false,
            alive: true,
            fate: None,
            ended: None,
        }
    }

    #[test]
    fn a_line_ends_where_nobody_is_known() {
        let known: Known = [(3, 2), (2, 1), (5, 4)]
            .map(|(child, parent)| (key(child), (link(child), key(parent))))
            .into();
        let (line, creator) = climb(&known, key(3));
        assert_eq!(line.iter().map(|link| link.pid).collect::<Vec<_>>(), [3, 2]);
        assert_eq!(creator, key(1));
    }

    #[test]
    fn a_circle_has_an_end() {
        let known: Known = [(1, 2), (2, 1)]
            .map(|(child, parent)| (key(child), (link(child), key(parent))))
            .into();
        assert_eq!(climb(&known, key(1)).0.len(), 2);
    }
}
