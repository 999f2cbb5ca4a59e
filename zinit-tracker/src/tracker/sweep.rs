//! Looking for a service's processes by other signs than the kernel's books, for when those may be incomplete.
//!
//! A sign is certain if nobody but a descendant can show it: a parent that is a member, a session that a member has made,
//! the cookie that the tracker puts into the environment. Who shows one is taken into the books, and is then handled like
//! any member. A group or a cgroup can be entered from outside, so those are only pointed out. Who calls decides when to look.

use std::collections::{HashMap, HashSet};

use serde::Serialize;
use zinit_ebpf::{Process, StateChange, Task};

use super::{
    Tracker, TrackerError,
    adopt::Suspect,
    member::Ended,
    service::{ServiceId, ServiceInfo},
    spawn::COOKIE,
};
use crate::process::{ProcessKey, facts};

/// Passes of the kernel over all processes, to take in what those that were found have created meanwhile.
const MAX_PASSES: usize = 8;
/// Requests that the kernel holds at a time (capacity of `adoptions`).
const MAX_REQUESTS: usize = 1024;

/// What shows that a process belongs to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sign {
    /// Its parent does.
    Parent,
    /// A member has made its session.
    Session,
    /// It carries the service's cookie in its environment.
    Cookie,
}

impl Sign {
    /// As it is shown.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Parent => "parent",
            Self::Session => "session",
            Self::Cookie => "cookie",
        }
    }
}

/// A process that is not in the books and shows a certain sign.
#[derive(Clone, Debug)]
pub(crate) struct Stray {
    pub(crate) key: ProcessKey,
    pub(crate) pid: u32,
    pub(crate) parent_tgid: u32,
    pub(crate) comm: String,
    pub(crate) sign: Sign,
    /// Whether it is in the books now.
    pub(crate) taken: bool,
}

/// Looks for strays of one service and those nested in it.
#[derive(Debug)]
pub(crate) struct Sweeper {
    /// The caller and its ancestors, whom no stop may concern.
    own: HashSet<u32>,
    /// cgroups that members were in and their registrant is not.
    cgroups: HashSet<String>,
    suspects: HashMap<ProcessKey, Suspect>,
    /// Strays by the sign that they have shown; it may be gone with the parent.
    found: HashMap<ProcessKey, Sign>,
    /// Another program's lock kept those that the last look found out of the books.
    locked_out: bool,
}

/// What the books say, as far as signs are judged by it.
struct Known {
    members: HashSet<ProcessKey>,
    /// Members of other services.
    others: HashSet<ProcessKey>,
    /// tgid → from when to when a member had it.
    lives: HashMap<u32, Vec<(u64, u64)>>,
    /// Cookie → since when anybody can carry it.
    cookies: HashMap<String, u64>,
    entries: usize,
}

impl Sweeper {
    pub(crate) fn new(own: HashSet<u32>) -> Self {
        Self {
            own,
            cgroups: HashSet::new(),
            suspects: HashMap::new(),
            found: HashMap::new(),
            locked_out: false,
        }
    }

    /// Whether those that the last look found are missing in the books because another program holds their lock.
    pub(crate) fn is_locked_out(&self) -> bool {
        self.locked_out
    }

    /// Looks once, and takes strays into the first service of the family. Returns those it found.
    ///
    /// If members were released, those who show signs may have been let go on purpose, and are only suspected.
    pub(crate) fn pass(&mut self, tracker: &Tracker, family: &[ServiceInfo]) -> Result<Vec<Stray>, TrackerError> {
        let Some(service) = family.first() else {
            return Ok(Vec::new());
        };
        self.locked_out = false;
        let before = tracker.books.processes()?;
        let all = tracker.books.tasks()?;
        // Whoever is among all and was created as a member is in the books by now, if they are right.
        let after = tracker.books.processes()?;
        let tasks: Vec<_> = all.into_iter().filter(|task| task.live_threads > 0).collect();
        let known = Known::new(family, &tasks, before, after, tracker.ended(&ids(family))?);
        self.note_cgroups(tracker, service, &known, &tasks);
        let candidates: Vec<_> = tasks.iter().filter(|task| self.is_candidate(task, &known)).collect();
        let orphanages = self.orphanages(service, &tasks);
        let (mut strays, forwarded) = known.strays(tracker, &candidates, &self.found, &orphanages);
        self.suspects.extend(forwarded);
        self.suspect(&known, &candidates, &strays);
        let let_go = |stray: &Stray| (stray.key, Suspect::new(stray.pid, &stray.comm, stray.sign.name()));
        if family.iter().any(|info| info.released) {
            self.suspects.extend(strays.iter().map(let_go));
            return Ok(Vec::new());
        }
        self.found.extend(strays.iter().map(|stray| (stray.key, stray.sign)));
        if !strays.is_empty() {
            let room = usize::try_from(tracker.capacity())
                .unwrap_or(usize::MAX)
                .saturating_sub(known.entries);
            let wanted = strays.iter().map(|stray| stray.key).take(room);
            match tracker.take_in(family, wanted) {
                Ok(true) => {}
                Ok(false) => {
                    self.suspects.extend(strays.iter().map(let_go));
                    return Ok(Vec::new());
                }
                // They stay strays, and the stop does not end before they do.
                Err(TrackerError::Locked) => self.locked_out = true,
                Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "failed to take in processes"),
            }
            for stray in &mut strays {
                stray.taken = tracker.is_recorded_alive(stray.key)?;
            }
        }
        Ok(strays)
    }

    /// The processes that orphans of the service are given to: init, and whichever of the caller's and the registrant's
    /// line is a subreaper.
    fn orphanages(&self, service: &ServiceInfo, tasks: &[Task]) -> HashSet<u32> {
        let parent = |tgid: &u32| {
            tasks
                .iter()
                .find(|task| task.tgid == *tgid)
                .map(|task| task.parent_tgid)
        };
        let line = std::iter::successors(Some(service.registrant.tgid), parent).take_while(|tgid| *tgid != 0);
        let init = tasks.iter().filter(|task| task.pid == 1).map(|task| task.tgid);
        line.chain(init).chain(self.own.iter().copied()).chain([1]).collect()
    }

    /// Living processes that show an uncertain sign.
    pub(crate) fn suspects(self, tracker: &Tracker) -> Result<Vec<Suspect>, TrackerError> {
        if self.suspects.is_empty() {
            return Ok(Vec::new());
        }
        let alive: HashSet<_> = tracker
            .books
            .tasks()?
            .iter()
            .filter(|task| task.live_threads > 0)
            .map(key)
            .collect();
        let living = self.suspects.into_iter().filter(|(key, _)| alive.contains(key));
        let mut suspects: Vec<_> = living.map(|(_, suspect)| suspect).collect();
        suspects.sort_by_key(|suspect| suspect.pid);
        Ok(suspects)
    }

    /// Whether a process may be a stray: nobody's member, no part of the system, none of the caller's line.
    fn is_candidate(&self, task: &Task, known: &Known) -> bool {
        let key = key(task);
        !known.members.contains(&key)
            && !known.others.contains(&key)
            && !self.own.contains(&task.tgid)
            && task.pid > 1
            && task.tgid > 2
    }

    /// Processes that share a group or a cgroup with members.
    fn suspect(&mut self, known: &Known, candidates: &[&Task], strays: &[Stray]) {
        let found: HashSet<_> = strays.iter().map(|stray| stray.key).collect();
        for task in candidates {
            if found.contains(&key(task)) {
                continue;
            }
            let shares = if known.had_made(task.group, task) {
                "group"
            } else if facts::cgroup(task.pid).is_some_and(|cgroup| self.cgroups.contains(&cgroup)) {
                "cgroup"
            } else {
                continue;
            };
            let suspect = Suspect::new(task.pid, &super::service::text(&task.comm), shares);
            self.suspects.insert(key(task), suspect);
        }
    }

    fn note_cgroups(&mut self, tracker: &Tracker, service: &ServiceInfo, known: &Known, tasks: &[Task]) {
        let common: HashSet<_> = [service.registrant, tracker.here.key]
            .into_iter()
            .filter_map(|wanted| tasks.iter().find(|task| key(task) == wanted))
            .filter_map(|task| facts::cgroup(task.pid))
            .chain(["/".to_owned()])
            .collect();
        let members = tasks.iter().filter(|task| known.members.contains(&key(task)));
        let cgroups = members.filter_map(|task| facts::cgroup(task.pid));
        self.cgroups.extend(cgroups.filter(|cgroup| !common.contains(cgroup)));
    }
}

impl Known {
    /// Members are those that the books had before and that live. Whoever they had before or after is no candidate.
    fn new(family: &[ServiceInfo], tasks: &[Task], before: Entries, after: Entries, ended: Vec<Ended>) -> Self {
        let ids = ids(family);
        let mut known = Self {
            members: HashSet::new(),
            others: HashSet::new(),
            lives: HashMap::new(),
            cookies: HashMap::new(),
            entries: after.len(),
        };
        for info in family {
            let since = u64::try_from(info.registered.as_nanos()).unwrap_or(u64::MAX);
            known.cookies.insert(info.cookie(), since);
        }
        let alive: HashSet<_> = tasks.iter().map(key).collect();
        for (tgid, entry) in before {
            let key = ProcessKey {
                tgid,
                start_boottime_ns: entry.start_boottime_ns,
            };
            // An entry that is left over lends its pid to nobody.
            if ids.contains(&ServiceId(entry.service)) && alive.contains(&key) {
                known.lived(key, u64::MAX);
                known.members.insert(key);
            } else {
                known.others.insert(key);
            }
        }
        let later = after.iter().map(|(tgid, entry)| ProcessKey {
            tgid: *tgid,
            start_boottime_ns: entry.start_boottime_ns,
        });
        known.others.extend(later);
        for ended in ended {
            known.lived(ended.key, u64::try_from(ended.ended.as_nanos()).unwrap_or(u64::MAX));
        }
        known
    }

    fn lived(&mut self, key: ProcessKey, until: u64) {
        let lives = self.lives.entry(key.tgid).or_default();
        lives.push((key.start_boottime_ns, until));
    }

    /// Those of the candidates that show a certain sign or have shown one, or descend from one that does; and those that
    /// carry the cookie and may have been given it by somebody else, since they are nobody's orphans.
    fn strays(
        &self,
        tracker: &Tracker,
        candidates: &[&Task],
        found: &HashMap<ProcessKey, Sign>,
        orphanages: &HashSet<u32>,
    ) -> (Vec<Stray>, HashMap<ProcessKey, Suspect>) {
        let before = |task: &&Task| Some((key(task), *found.get(&key(task))?));
        let mut signs: HashMap<_, _> = candidates.iter().filter_map(before).collect();
        let mut forwarded = HashMap::new();
        self.descend(candidates, &mut signs);
        let made = |task: &&&Task| task.session != task.tgid && self.had_made(task.session, task);
        // A session is one and the same for all who are in it at a time.
        let sessions: HashSet<_> = candidates.iter().filter(made).map(|task| task.session).collect();
        for task in candidates {
            if signs.contains_key(&key(task)) {
                continue;
            }
            if sessions.contains(&task.session) {
                signs.insert(key(task), Sign::Session);
            } else if self.carries_cookie(tracker, task) {
                if orphanages.contains(&task.parent_tgid) {
                    signs.insert(key(task), Sign::Cookie);
                } else {
                    let suspect = Suspect::new(task.pid, &super::service::text(&task.comm), Sign::Cookie.name());
                    forwarded.insert(key(task), suspect);
                }
            }
        }
        self.descend(candidates, &mut signs);
        forwarded.retain(|key, _| !signs.contains_key(key));
        let stray = |task: &&Task| {
            Some(Stray {
                key: key(task),
                pid: task.pid,
                parent_tgid: task.parent_tgid,
                comm: super::service::text(&task.comm),
                sign: *signs.get(&key(task))?,
                taken: false,
            })
        };
        (candidates.iter().filter_map(stray).collect(), forwarded)
    }

    /// Marks children of members and of those that are marked.
    fn descend(&self, candidates: &[&Task], signs: &mut HashMap<ProcessKey, Sign>) {
        let keys: HashMap<_, _> = candidates.iter().map(|task| (task.tgid, key(task))).collect();
        let members: HashSet<_> = self.members.iter().map(|key| key.tgid).collect();
        loop {
            let before = signs.len();
            for task in candidates {
                let marked = |key| signs.contains_key(key);
                if members.contains(&task.parent_tgid) || keys.get(&task.parent_tgid).is_some_and(marked) {
                    signs.entry(key(task)).or_insert(Sign::Parent);
                }
            }
            if signs.len() == before {
                return;
            }
        }
    }

    /// Whether the session or group with this id that the process is in was made by a member.
    ///
    /// Its id is a pid that cannot be given away while the session or group lasts. So if the process started in it, or in
    /// its session, while a member had that pid, it is the member's.
    fn had_made(&self, id: u32, task: &Task) -> bool {
        let lives = self.lives.get(&id).into_iter().flatten();
        lives
            .into_iter()
            .any(|(from, until)| (from..=until).contains(&&task.start_boottime_ns))
    }

    fn carries_cookie(&self, tracker: &Tracker, task: &Task) -> bool {
        let Some(cookie) = facts::environment(task.pid, COOKIE) else {
            return false;
        };
        let since = self.cookies.get(&cookie);
        since.is_some_and(|since| task.start_boottime_ns >= *since)
            // It was this process's environment, and not that of one that has got its pid.
            && tracker.clock.matches(task.pid, task.start_boottime_ns).unwrap_or(false)
    }
}

impl Tracker {
    /// Takes running processes and what they create meanwhile into the first service of the family, whatever its state. Does not wait
    /// for the lock of the books. Returns `false`, and takes in nobody, if members of the family were released in the meantime.
    fn take_in(&self, family: &[ServiceInfo], keys: impl Iterator<Item = ProcessKey>) -> Result<bool, TrackerError> {
        let Some(service) = family.first() else {
            return Ok(false);
        };
        // Whoever waited would leave those alone meanwhile that are in the books.
        let _guard = self.books.try_exclusive_unless_gone()?;
        for info in family {
            if self.info_of(info.id)?.is_none_or(|info| info.released) {
                return Ok(false);
            }
        }
        let adopting = |adopting| StateChange {
            adopting,
            ..StateChange::NONE
        };
        self.books.withdraw_adoptions()?;
        self.books.change(service.id.0, adopting(1))?;
        let adopted = self.adopt_exactly(service.id, keys);
        // In any case: what is left of a request would take in others' children.
        let withdrawn = self.books.withdraw_adoptions();
        self.books.change(service.id.0, adopting(0))?;
        withdrawn?;
        adopted.map(|()| true)
    }

    fn adopt_exactly(&self, service: ServiceId, keys: impl Iterator<Item = ProcessKey>) -> Result<(), TrackerError> {
        for key in keys.take(MAX_REQUESTS) {
            self.books.request_adoption(key, service.0)?;
        }
        let mut passes = 0;
        while passes < MAX_PASSES && self.books.adopt()? > 0 {
            passes += 1;
        }
        Ok(())
    }
}

/// Members by tgid, as the books list them.
type Entries = Vec<(u32, Process)>;

fn ids(family: &[ServiceInfo]) -> Vec<ServiceId> {
    family.iter().map(|info| info.id).collect()
}

fn key(task: &Task) -> ProcessKey {
    ProcessKey {
        tgid: task.tgid,
        start_boottime_ns: task.start_boottime_ns,
    }
}
