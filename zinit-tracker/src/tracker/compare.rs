//! What those would have found of a service who go by parents, process group, session or cgroup, against the members in the books.
//!
//! They look at `/proc`, so this does: one process after the other, each at its own moment. Only who was there from the beginning to the
//! end is compared.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt, io,
};

use serde::Serialize;

use super::{Departure, Member, Service, ServiceId, ServiceInfo, Tracker, TrackerError, escapes::Origin};
use crate::process::{
    ProcessKey,
    facts::{self, Cgroup},
    table::{self, Row},
};

/// A service's members, and what others would have found.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Members that were there all the time, oldest first.
    pub members: Vec<Member>,
    /// How many came or went meanwhile, and are left out.
    pub came_or_went: usize,
    /// What each way to look finds.
    pub methods: Vec<Finding>,
}

/// What one way to look for a service's processes finds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// By what it looks.
    #[serde(flatten)]
    pub method: Method,
    /// How many members it finds.
    pub found: usize,
    /// Members that it does not find.
    pub missed: Vec<Missed>,
    /// Whom it finds though they are no members of the service.
    pub strangers: Vec<Stranger>,
}

/// A way to look for a service's processes; pids and ids as the caller's pid namespace has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "method", rename_all = "kebab-case")]
pub enum Method {
    /// From the processes that were started for the service, or taken in, and live: their children, their children's and so on.
    Parents {
        /// Those processes.
        roots: Vec<u32>,
    },
    /// The process group of the main process.
    Group {
        /// Which; `None`: the main process is dead, and nothing shows which it was, or it is none of the caller's pid namespace.
        id: Option<u32>,
    },
    /// The session of the main process.
    Session {
        /// As for the group.
        id: Option<u32>,
    },
    /// The cgroup of the main process, and those below it unless it is the root.
    Cgroup {
        /// Version 2, or the hierarchies of version 1 (as `/proc/PID/cgroup` names them) in which that finds the same.
        hierarchies: Vec<String>,
        /// Which; `None`: the main process is dead.
        path: Option<String>,
    },
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DEAD: &str = "unknown, as the main process is dead";
        let id = |id: &Option<u32>| match id {
            Some(id) => id.to_string(),
            None => format!("{DEAD}, or has 0: another pid namespace's, or that of nobody since boot"),
        };
        match self {
            Self::Parents { roots } if roots.is_empty() => {
                f.write_str("parents: from nobody, as those that were started are dead")
            }
            Self::Parents { roots } => {
                let roots: Vec<_> = roots.iter().map(ToString::to_string).collect();
                write!(f, "parents: from {}", roots.join(", "))
            }
            Self::Group { id: group } => write!(f, "process group: {}", id(group)),
            Self::Session { id: session } => write!(f, "session: {}", id(session)),
            Self::Cgroup { path: None, .. } => write!(f, "cgroup: {DEAD}"),
            Self::Cgroup {
                hierarchies,
                path: Some(path),
            } => write!(f, "cgroup ({}): {path}", hierarchies.join("; ")),
        }
    }
}

/// A member that a way to look does not find.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Missed {
    /// The member.
    #[serde(flatten)]
    pub member: Member,
    /// Why not.
    pub why: Why,
}

/// Why a way to look does not find a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Why {
    /// It has left what is gone by; ids as the caller's pid namespace has them.
    Left(Departure),
    /// Another reason.
    Other(Reason),
}

/// Why a way to look does not find a member that has not left what is gone by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "what", rename_all = "kebab-case")]
pub enum Reason {
    /// Its parent is no member.
    Parent {
        /// Its creator, by the pid in the initial pid namespace if it is dead.
        creator: u32,
        /// Whether that lives.
        creator_lives: bool,
        /// Its parent.
        now: u32,
    },
    /// It descends from a member that is missed.
    Below {
        /// That member.
        pid: u32,
    },
    /// Nobody knows any more what to go by.
    Unknown,
    /// `/proc` does not show it to the caller.
    Hidden,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Left(departure) => write!(f, "left {departure}"),
            Self::Other(reason) => reason.fmt(f),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Parent { creator, now, .. } if creator == now => write!(f, "its parent {now} is no member"),
            Self::Parent {
                creator,
                creator_lives,
                now,
            } => {
                let lives = if *creator_lives { "lives" } else { "is dead" };
                write!(f, "its creator {creator} {lives}, and its parent {now} is no member")
            }
            Self::Below { pid } => write!(f, "descends from {pid}, which is missed"),
            Self::Unknown => f.write_str("nobody knows what to look for"),
            Self::Hidden => f.write_str("/proc does not show it"),
        }
    }
}

/// A process that a way to look finds and that is no member of the service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Stranger {
    /// Its pid in the caller's pid namespace.
    pub pid: u32,
    /// Its parent's.
    pub ppid: u32,
    /// Command name.
    pub comm: String,
    /// The service that it belongs to, as `INSTANCE/NAME`; `None`: none.
    pub service: Option<String>,
}

/// What was seen.
struct World {
    main: Option<ProcessKey>,
    /// What the main process led if it is dead, as far as its members show that.
    led: Origin,
    members: Vec<Member>,
    /// Their pids.
    stays: HashSet<u32>,
    /// Members that live, of whatever service, by pid.
    services: HashMap<u32, ServiceId>,
    names: HashMap<ServiceId, String>,
    /// Pids of members, and of those that came or went.
    own: HashSet<u32>,
    /// Living processes by pid, as `/proc` shows them, without the caller if that is no member.
    rows: BTreeMap<u32, Row>,
    /// Of those.
    cgroups: HashMap<u32, Vec<Cgroup>>,
    /// The pids of all who live.
    living: HashMap<ProcessKey, u32>,
}

impl Tracker {
    /// Compares the members of the service with what those would find who look at parents, process group, session or cgroup.
    ///
    /// # Errors
    ///
    /// [`TrackerError::NotRegistered`], or when the books or `/proc` cannot be read.
    pub fn compare(&self, service: &Service) -> Result<Comparison, TrackerError> {
        let info = self.info(service)?;
        let (world, came_or_went) = self.look_around(&info)?;
        let mut methods = vec![
            world.by_parents(),
            world.by_id(|row| row.group, world.led.group, |id| Method::Group { id }),
            world.by_id(|row| row.session, world.led.session, |id| Method::Session { id }),
        ];
        methods.extend(world.by_cgroups());
        Ok(Comparison {
            came_or_went,
            methods,
            members: world.members,
        })
    }

    fn look_around(&self, info: &ServiceInfo) -> Result<(World, usize), TrackerError> {
        let failed = |source: io::Error| TrackerError::Watch(source);
        let before = self.all_members()?;
        let rows = table::rows().map_err(failed)?;
        let cgroups = rows
            .iter()
            .filter_map(|row| Some((row.key.tgid, facts::cgroups(row.key.tgid)?)));
        let cgroups = cgroups.collect();
        let after = self.all_members()?;
        // Who is seen before and after that lived then, so is in it, or no member.
        let still: HashSet<_> = table::rows().map_err(failed)?.iter().map(|row| row.key).collect();

        let keys = |all: &[Member]| -> HashSet<_> {
            let own = all.iter().filter(|member| member.service == info.id);
            own.map(|member| member.key).collect()
        };
        let (first, last) = (keys(&before), keys(&after));
        let own = before.iter().chain(&after).filter(|member| member.service == info.id);
        let own: HashSet<_> = own.map(|member| member.pid).collect();
        // Who is a member before and after has had its pid all the time.
        let members: Vec<_> = after
            .iter()
            .filter(|member| first.contains(&member.key) && last.contains(&member.key))
            .cloned()
            .collect();
        let me = std::process::id();
        let there = |row: &Row| !row.dead && !row.kernel_thread && still.contains(&row.key);
        let rows = rows
            .into_iter()
            .filter(|row| there(row) && (row.key.tgid != me || own.contains(&me)));
        let led = match info.main {
            // The books have ids as the initial pid namespace has them.
            Some(main) if self.here.level == 0 => Origin::of_dead(main.tgid, &members),
            _ => Origin::UNKNOWN,
        };
        let world = World {
            main: info.main,
            led,
            services: after.iter().map(|member| (member.pid, member.service)).collect(),
            names: self
                .services()?
                .into_iter()
                .map(|info| (info.id, format!("{}/{}", info.instance, info.name)))
                .collect(),
            rows: rows.map(|row| (row.key.tgid, row)).collect(),
            own,
            cgroups,
            living: self.living()?,
            stays: members.iter().map(|member| member.pid).collect(),
            members,
        };
        Ok((world, first.symmetric_difference(&last).count()))
    }

    /// Who lives, by the pid in the caller's pid namespace.
    fn living(&self) -> Result<HashMap<ProcessKey, u32>, TrackerError> {
        let tasks = self.books.tasks()?;
        let living = tasks.iter().filter(|task| task.live_threads > 0);
        let key = |task: &zinit_ebpf::Task| ProcessKey {
            tgid: task.tgid,
            start_boottime_ns: task.start_boottime_ns,
        };
        Ok(living.map(|task| (key(task), task.pid)).collect())
    }
}

impl World {
    /// The main process, if it lives and `/proc` shows it.
    fn main(&self) -> Option<&Row> {
        let main = self.members.iter().find(|member| Some(member.key) == self.main)?;
        self.rows.get(&main.pid)
    }

    /// What a way to look finds that finds these pids.
    fn finding(&self, method: Method, found: &BTreeSet<u32>, why: impl Fn(&Member, &Row) -> Why) -> Finding {
        let missed = self.members.iter().filter(|member| !found.contains(&member.pid));
        let missed: Vec<_> = missed
            .map(|member| Missed {
                member: member.clone(),
                why: match self.rows.get(&member.pid) {
                    Some(row) => why(member, row),
                    None => Why::Other(Reason::Hidden),
                },
            })
            .collect();
        let strangers = found.iter().filter(|pid| !self.own.contains(pid));
        Finding {
            method,
            found: self.members.len() - missed.len(),
            missed,
            strangers: strangers.filter_map(|pid| self.stranger(*pid)).collect(),
        }
    }

    fn stranger(&self, pid: u32) -> Option<Stranger> {
        let row = self.rows.get(&pid)?;
        let service = self.services.get(&pid);
        Some(Stranger {
            pid,
            ppid: row.parent,
            comm: row.comm.clone(),
            service: service.and_then(|id| self.names.get(id).cloned()),
        })
    }

    fn by_parents(&self) -> Finding {
        let is_root = |member: &&Member| member.spawned || member.adopted || Some(member.key) == self.main;
        let roots = self.members.iter().filter(is_root).map(|member| member.pid);
        let roots: Vec<_> = roots.filter(|pid| self.rows.contains_key(pid)).collect();
        let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
        for (pid, row) in &self.rows {
            children.entry(row.parent).or_default().push(*pid);
        }
        let mut found = BTreeSet::new();
        let mut open = roots.clone();
        while let Some(pid) = open.pop() {
            if found.insert(pid) {
                open.extend(children.get(&pid).into_iter().flatten());
            }
        }
        self.finding(Method::Parents { roots }, &found, |member, row| {
            self.why_no_descendant(member, row)
        })
    }

    /// Goes up from the member to where the line of parents leaves the service.
    fn why_no_descendant(&self, member: &Member, row: &Row) -> Why {
        let (mut top, mut parent) = (member.pid, row.parent);
        // Each read at its own moment, so that the line might be a circle.
        for _ in 0..self.members.len() {
            let above = self.rows.get(&parent).filter(|_| self.stays.contains(&parent));
            let Some(above) = above else {
                break;
            };
            (top, parent) = (parent, above.parent);
        }
        if top != member.pid {
            return Why::Other(Reason::Below { pid: top });
        }
        let creator = self.living.get(&member.parent);
        Why::Other(Reason::Parent {
            creator: creator.copied().unwrap_or(member.parent.tgid),
            creator_lives: creator.is_some(),
            now: parent,
        })
    }

    /// By a number that the main process has, or had.
    fn by_id(&self, of: fn(&Row) -> u32, led: Option<u32>, method: fn(Option<u32>) -> Method) -> Finding {
        // 0 is whatever the caller's pid namespace does not show.
        let id = self.main().map(of).or(led).filter(|id| *id != 0);
        let inside = self.rows.iter().filter(|(_, row)| Some(of(row)) == id);
        let found = inside.map(|(pid, _)| *pid).collect();
        self.finding(method(id), &found, |_, row| match (method(id), id) {
            (_, None) => Why::Other(Reason::Unknown),
            (Method::Session { .. }, Some(of_service)) => Why::Left(Departure::Session {
                of_service,
                now: of(row),
            }),
            (_, Some(of_service)) => Why::Left(Departure::Group {
                of_service,
                now: of(row),
            }),
        })
    }

    /// By the main process's cgroup of version 2; where that is not used, by those of version 1 too, one finding for all hierarchies
    /// in which it is the same.
    fn by_cgroups(&self) -> Vec<Finding> {
        let homes = self.main().and_then(|main| self.cgroups.get(&main.key.tgid));
        let Some(homes) = homes else {
            let method = Method::Cgroup {
                hierarchies: Vec::new(),
                path: None,
            };
            return vec![self.finding(method, &BTreeSet::new(), |_, _| Why::Other(Reason::Unknown))];
        };
        let mut findings: Vec<Finding> = Vec::new();
        for home in in_use(homes) {
            let finding = self.by_cgroup(home);
            let same = findings.iter_mut().find(|earlier| is_same(earlier, &finding));
            match (same.map(|same| &mut same.method), &finding.method) {
                (Some(Method::Cgroup { hierarchies, .. }), Method::Cgroup { hierarchies: more, .. }) => {
                    hierarchies.extend(more.iter().cloned());
                }
                _ => findings.push(finding),
            }
        }
        findings
    }

    fn by_cgroup(&self, home: &Cgroup) -> Finding {
        let now = |pid: u32| {
            let all = self.cgroups.get(&pid)?;
            all.iter().find(|cgroup| cgroup.hierarchy == home.hierarchy)
        };
        let inside = self
            .rows
            .keys()
            .filter(|pid| now(**pid).is_some_and(|now| now.is_within(home)));
        let found = inside.copied().collect();
        let method = Method::Cgroup {
            hierarchies: vec![home.hierarchy.clone()],
            path: Some(home.path.clone()),
        };
        self.finding(method, &found, |member, _| match now(member.pid) {
            Some(now) => Why::Left(Departure::Cgroup {
                of_service: home.path.clone(),
                now: now.path.clone(),
            }),
            None => Why::Other(Reason::Hidden),
        })
    }
}

/// The hierarchies by which somebody might go: version 2, and if the process is in its root, those of version 1 in which it is not.
fn in_use(homes: &[Cgroup]) -> Vec<&Cgroup> {
    let second = homes.iter().filter(|cgroup| cgroup.is_v2());
    if second.clone().any(|cgroup| !cgroup.is_root()) {
        return second.collect();
    }
    let first = homes.iter().filter(|cgroup| !cgroup.is_v2() && !cgroup.is_root());
    let used: Vec<_> = second.chain(first).collect();
    if used.is_empty() { homes.iter().collect() } else { used }
}

/// Whether two hierarchies of version 1 show the same.
fn is_same(a: &Finding, b: &Finding) -> bool {
    let path = |finding: &Finding| match &finding.method {
        Method::Cgroup { path, .. } => path.clone(),
        _ => None,
    };
    path(a) == path(b) && a.missed == b.missed && a.strangers == b.strangers
}
