//! Escapes: members that a supervisor would lose which goes by session, process group, parents, cgroup or namespaces.
//!
//! Told from the difference between where the service began and where its members are now, so without the moment at which
//! they left.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
};

use serde::Serialize;
use zinit_ebpf::Task;

use super::{
    Link, Member, Service, ServiceInfo, Tracker, TrackerError,
    lineage::{Known, climb, known},
};
use crate::process::{ProcessKey, facts};

/// A member that has left something of its service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Escape {
    /// The member.
    #[serde(flatten)]
    pub member: Member,
    /// What it has left; never empty.
    pub left: Vec<Departure>,
    /// It, its creator, that one's creator and so on, as far as they are members or recorded.
    pub line: Vec<Link>,
}

/// What a member has left, and where it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum Departure {
    /// The session that the service began in; ids as the initial pid namespace has them, as in the books.
    Session {
        /// The service's.
        of_service: u32,
        /// The member's.
        now: u32,
    },
    /// The process group that the service began in.
    Group {
        /// The service's.
        of_service: u32,
        /// The member's.
        now: u32,
    },
    /// Its creator is dead, and it was given to a process that is no member.
    Parent {
        /// tgid of its creator.
        creator: u32,
        /// tgid of its parent.
        now: u32,
    },
    /// The main process's cgroup, in the version 2 hierarchy.
    Cgroup {
        /// The main process's.
        of_service: String,
        /// The member's.
        now: String,
    },
    /// A namespace of the main process.
    Namespace {
        /// As in `/proc/PID/ns`.
        namespace: String,
        /// Inode number of the main process's.
        of_service: u64,
        /// Inode number of the member's.
        now: u64,
    },
}

impl Departure {
    /// Every [`Departure::name`].
    pub const NAMES: [&str; 5] = ["session", "group", "parent", "cgroup", "namespace"];

    /// What was left, as JSON and metrics call it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Session { .. } => "session",
            Self::Group { .. } => "group",
            Self::Parent { .. } => "parent",
            Self::Cgroup { .. } => "cgroup",
            Self::Namespace { .. } => "namespace",
        }
    }
}

impl fmt::Display for Departure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Session { of_service, now } => write!(f, "session {of_service}, is in {now}"),
            Self::Group { of_service, now } => write!(f, "process group {of_service}, is in {now}"),
            Self::Parent { creator, now } => write!(f, "its creator {creator}, which is dead: its parent is {now}"),
            Self::Cgroup { of_service, now } => write!(f, "cgroup {of_service}, is in {now}"),
            Self::Namespace {
                namespace,
                of_service,
                now,
            } => write!(f, "{namespace} namespace {of_service}, is in {now}"),
        }
    }
}

/// Where a service began. What is not known any more, nobody is said to have left.
struct Home {
    main: Option<ProcessKey>,
    origin: Origin,
    /// Other processes that were started for the service and live, such as a supervisor's tests: theirs is another beginning.
    others: HashMap<ProcessKey, Origin>,
    /// Of the main process, while it lives.
    place: Option<Place>,
}

/// Where a process that was started for a service began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) session: Option<u32>,
    pub(super) group: Option<u32>,
}

impl Origin {
    pub(super) const UNKNOWN: Self = Self {
        session: None,
        group: None,
    };

    /// A supervisor has its services lead sessions of their own, `run` leaves them in the caller's.
    fn of(member: &Member, task: &Task) -> Self {
        let tgid = member.key.tgid;
        let began = |joined: u32, now: u32| Some(if now == tgid { tgid } else { joined });
        Self {
            session: began(member.session, task.session),
            group: began(member.group, task.group),
        }
    }

    /// Of a process that is dead, as far as those show it who were created in it.
    pub(super) fn of_dead(tgid: u32, members: &[Member]) -> Self {
        let led = |id: fn(&Member) -> u32| members.iter().any(|member| id(member) == tgid).then_some(tgid);
        Self {
            session: led(|member| member.session),
            group: led(|member| member.group),
        }
    }
}

/// What the books say at some moment, and who exists.
struct Look {
    members: Vec<Member>,
    known: Known,
    tasks: HashMap<ProcessKey, Task>,
}

/// What `/proc` says of where a process is.
struct Place {
    cgroup: Option<String>,
    namespaces: BTreeMap<String, u64>,
}

impl Tracker {
    /// The members that have left the session, process group, parents, cgroup or a namespace of their service, oldest first.
    ///
    /// Cgroup and namespaces are compared with the main process's, and only while that lives and `/proc` shows it.
    ///
    /// # Errors
    ///
    /// [`TrackerError::NotRegistered`], or when the books cannot be read.
    pub fn escapes(&self, service: &Service) -> Result<Vec<Escape>, TrackerError> {
        let info = self.info(service)?;
        self.escapes_of(&info, &self.look()?)
    }

    /// As [`Tracker::escapes`], of every service, with one look at the books for all of them.
    ///
    /// # Errors
    ///
    /// When the books cannot be read.
    pub fn all_escapes(&self) -> Result<Vec<(ServiceInfo, Vec<Escape>)>, TrackerError> {
        let look = self.look()?;
        let mut escapes = Vec::new();
        for info in self.services()? {
            let of_service = self.escapes_of(&info, &look)?;
            escapes.push((info, of_service));
        }
        Ok(escapes)
    }

    fn look(&self) -> Result<Look, TrackerError> {
        // The living first: one that dies in between is among the dead then.
        let members = self.all_members()?;
        let known = known(&self.services()?, &members, &self.all_ended()?);
        let tasks = self.books.tasks()?;
        Ok(Look {
            members,
            known,
            tasks: tasks.into_iter().map(|task| (key_of(&task), task)).collect(),
        })
    }

    fn escapes_of(&self, info: &ServiceInfo, look: &Look) -> Result<Vec<Escape>, TrackerError> {
        let of_service = |member: &&Member| member.service == info.id;
        let members: Vec<_> = look.members.iter().filter(of_service).cloned().collect();
        let tasks = &look.tasks;
        let home = self.home(info, &members, tasks)?;
        let own: HashSet<_> = members.iter().map(|member| member.key.tgid).collect();
        let mut escapes = Vec::new();
        for member in members {
            let Some(task) = tasks.get(&member.key) else {
                continue;
            };
            let (line, _) = climb(&look.known, member.key);
            let mut left = departures(&home, home.origin_of(&line), &own, &member, task);
            if Some(member.key) != home.main
                && let Some(of_main) = &home.place
                && let Some(place) = self.place(&member)?
            {
                left.extend(place.departures(of_main));
            }
            if !left.is_empty() {
                escapes.push(Escape { member, left, line });
            }
        }
        Ok(escapes)
    }

    fn home(
        &self,
        info: &ServiceInfo,
        members: &[Member],
        tasks: &HashMap<ProcessKey, Task>,
    ) -> Result<Home, TrackerError> {
        let main = members.iter().find(|member| Some(member.key) == info.main);
        let origin_of = |member: &Member| tasks.get(&member.key).map(|task| Origin::of(member, task));
        let dead = || {
            info.main
                .map_or(Origin::UNKNOWN, |key| Origin::of_dead(key.tgid, members))
        };
        let others = members
            .iter()
            .filter(|member| member.spawned && Some(member.key) != info.main);
        Ok(Home {
            main: info.main,
            origin: main.and_then(origin_of).unwrap_or_else(dead),
            others: others
                .filter_map(|member| Some((member.key, origin_of(member)?)))
                .collect(),
            place: match main {
                Some(main) => self.place(main)?,
                None => None,
            },
        })
    }

    /// Where the member is; `None`: it is dead, or `/proc` does not show it.
    fn place(&self, member: &Member) -> Result<Option<Place>, TrackerError> {
        let namespaces = facts::namespaces(member.pid);
        let cgroup = facts::cgroup(member.pid);
        // While it lives, nobody else has its pid.
        let place = namespaces.map(|namespaces| Place { cgroup, namespaces });
        Ok(if self.is_member(member)? { place } else { None })
    }
}

fn key_of(task: &Task) -> ProcessKey {
    ProcessKey {
        tgid: task.tgid,
        start_boottime_ns: task.start_boottime_ns,
    }
}

impl Home {
    /// Where the process began that this line of ancestors goes back to.
    fn origin_of(&self, line: &[Link]) -> Origin {
        let other = line.iter().rev().find_map(|link| self.others.get(&link.key));
        *other.unwrap_or(&self.origin)
    }
}

/// What the kernel's lists of tasks and members show.
fn departures(home: &Home, origin: Origin, own: &HashSet<u32>, member: &Member, task: &Task) -> Vec<Departure> {
    let mut left = Vec::new();
    let differs = |of_service: Option<u32>, now: u32| of_service.filter(|home| now != 0 && *home != now);
    if let Some(of_service) = differs(origin.session, task.session) {
        let now = task.session;
        left.push(Departure::Session { of_service, now });
    }
    if let Some(of_service) = differs(origin.group, task.group) {
        let now = task.group;
        left.push(Departure::Group { of_service, now });
    }
    let (creator, now) = (member.parent.tgid, task.parent_tgid);
    let started_from_outside = member.spawned || member.adopted || Some(member.key) == home.main;
    if !started_from_outside && now != creator && !own.contains(&now) {
        left.push(Departure::Parent { creator, now });
    }
    left
}

impl Place {
    fn departures(self, of_main: &Self) -> Vec<Departure> {
        let mut left = Vec::new();
        if let (Some(of_service), Some(now)) = (&of_main.cgroup, self.cgroup)
            && *of_service != now
        {
            let of_service = of_service.clone();
            left.push(Departure::Cgroup { of_service, now });
        }
        for (namespace, now) in self.namespaces {
            let of_main = of_main.namespaces.get(&namespace).copied();
            if let Some(of_service) = of_main.filter(|of_service| *of_service != now) {
                left.push(Departure::Namespace {
                    namespace,
                    of_service,
                    now,
                });
            }
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::tracker::ServiceId;

    fn key(tgid: u32) -> ProcessKey {
        ProcessKey {
            tgid,
            start_boottime_ns: 1,
        }
    }

    /// What a member of a service with the main process 10 and the member 11 has left, given its creator and where it is now.
    fn left(creator: u32, parent_tgid: u32, session: u32, group: u32) -> Vec<Departure> {
        let home = Home {
            main: Some(key(10)),
            origin: Origin {
                session: Some(10),
                group: Some(10),
            },
            others: HashMap::new(),
            place: None,
        };
        let member = Member {
            key: key(12),
            pid: 12,
            service: ServiceId(1),
            parent: key(creator),
            session: 10,
            group: 10,
            comm: String::new(),
            spawned: false,
            adopted: false,
            joined: Duration::ZERO,
        };
        let task = Task {
            start_boottime_ns: 1,
            tgid: 12,
            pid: 12,
            parent_tgid,
            session,
            group,
            live_threads: 1,
            pid_namespace: 1,
            pid_namespace_level: 0,
            dead: 0,
            _pad: 0,
            comm: [0; 16],
        };
        departures(&home, home.origin, &HashSet::from([10, 11, 12]), &member, &task)
    }

    #[test]
    fn who_stays_has_left_nothing() {
        assert_eq!(left(10, 10, 10, 10), []);
        // Its creator is dead, and a nested subreaper of the service has taken it.
        assert_eq!(left(9, 11, 10, 10), []);
    }

    #[test]
    fn a_daemon_has_left_three_things() {
        let expected = [
            Departure::Session { of_service: 10, now: 9 },
            Departure::Group { of_service: 10, now: 9 },
            Departure::Parent { creator: 9, now: 1 },
        ];
        assert_eq!(left(9, 1, 9, 9), expected);
    }

    #[test]
    fn who_is_being_reaped_is_nowhere() {
        assert_eq!(left(10, 10, 0, 0), []);
    }

    #[test]
    fn places_are_compared_by_what_both_have() {
        let place = |cgroup: Option<&str>, namespaces: &[(&str, u64)]| Place {
            cgroup: cgroup.map(ToOwned::to_owned),
            namespaces: namespaces
                .iter()
                .map(|(name, inode)| ((*name).to_owned(), *inode))
                .collect(),
        };
        let main = place(Some("/a"), &[("net", 1), ("mnt", 2)]);
        assert_eq!(place(None, &[("net", 1), ("time", 9)]).departures(&main), []);
        let left = place(Some("/b"), &[("net", 1), ("mnt", 3)]).departures(&main);
        let shown: Vec<_> = left.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["cgroup /a, is in /b", "mnt namespace 2, is in 3"]);
    }
}
