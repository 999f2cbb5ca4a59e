//! What the books say, once an interval: services, the members of one, and what they use. Knows no terminal.
//!
//! A walk over the members is made only if their number has changed or they are shown, and `/proc` is read for as long as a
//! small part of the interval lasts: thousands of processes are looked at in turn, those on the screen first.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use zinit_tracker::{
    Config, Member, ServiceId, ServiceInfo, Tracker, TrackerError, Tracking,
    process::ProcessKey,
    stop::{Doubt, Evidence},
    tracker::CpuShares,
};

use crate::cli::tree::{self, Row};

/// Which part of an interval may be spent on reading `/proc`.
const SHARE_FOR_LOADS: u32 = 60;
/// However little time there is, so many processes are looked at each time: figures get old, but not without end.
const LEAST_LOOKS: usize = 32;
/// Over less than this a rate would be noise.
const SHORTEST: Duration = Duration::from_millis(200);

/// What the user looks at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Whose members.
    pub(super) service: Option<ServiceId>,
    /// Which of them are on the screen.
    pub(super) visible: Vec<ProcessKey>,
}

/// The books at some moment; `Err`: why there are none.
pub(super) type Snapshot = Result<Sample, String>;

#[derive(Debug)]
pub(super) struct Sample {
    /// For what the user wants done; gone when the books are.
    pub(super) tracker: Weak<Tracker>,
    pub(super) tracking: Tracking,
    pub(super) services: Vec<ServiceSample>,
    /// Of the service that is looked at; `None`: of none, or it has gone.
    pub(super) tree: Option<Tree>,
    /// How old what a process uses may be.
    pub(super) loads_age: Duration,
    /// Of how many members, of all services, it is not known.
    pub(super) unknown_loads: usize,
}

#[derive(Clone, Debug)]
pub(super) struct ServiceSample {
    pub(super) info: ServiceInfo,
    /// Processes created per second; `None`: it was looked at once only.
    pub(super) fork_rate: Option<f64>,
    pub(super) load: Load,
    pub(super) doubts: Vec<Doubt>,
}

/// What processes use.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Load {
    /// Per cent of one processor.
    pub(super) cpu: f64,
    /// Resident bytes; those that are shared count for each process.
    pub(super) memory: u64,
}

#[derive(Debug)]
pub(super) struct Tree {
    pub(super) service: ServiceId,
    /// Time since boot at which it was so.
    pub(super) at: Duration,
    pub(super) members: Vec<Member>,
    pub(super) rows: Vec<Row>,
    /// Of those that were looked at: state and load.
    pub(super) loads: HashMap<ProcessKey, (char, Load)>,
}

impl ServiceSample {
    /// `INSTANCE/NAME`.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.info.instance, self.info.name)
    }
}

/// What moves when the set of members does.
type Fingerprint = Vec<(ServiceId, u64, u64, u64)>;

#[derive(Clone, Copy, Debug)]
struct Forks {
    count: u64,
    at: Instant,
    rate: Option<f64>,
}

/// Reads the books again and again; opens and leaves them as they come and go.
pub(super) struct Sampler {
    config: Config,
    interval: Duration,
    tracker: Option<Arc<Tracker>>,
    forks: HashMap<ServiceId, Forks>,
    fingerprint: Fingerprint,
    members: Vec<Member>,
    loads: Loads,
}

impl Sampler {
    pub(super) fn new(config: Config, interval: Duration) -> Self {
        Self {
            config,
            interval,
            tracker: None,
            forks: HashMap::new(),
            fingerprint: Vec::new(),
            members: Vec::new(),
            loads: Loads::default(),
        }
    }

    /// Reads the books now.
    pub(super) fn take(&mut self, wanted: &Wanted) -> Snapshot {
        let tracker = match &self.tracker {
            Some(tracker) => Arc::clone(tracker),
            None => match Tracker::open_existing(&self.config) {
                Ok(Some(tracker)) => Arc::clone(self.tracker.insert(Arc::new(tracker))),
                Ok(None) => return Err("no service is registered (`run`, `attach` and zinit register some)".to_owned()),
                Err(error) => return Err(told(error)),
            },
        };
        match self.read(&tracker, wanted) {
            Ok(sample) if sample.services.is_empty() => {
                // Nobody shall find the books in use because somebody looks at nothing.
                drop(tracker);
                self.leave();
                Err("no service is registered".to_owned())
            }
            Ok(sample) if self.are_gone(&sample) => {
                self.tracker = None;
                let directory = tracker.pin_directory().map(|pins| pins.display().to_string());
                Err(format!(
                    "the books are gone: somebody has removed the pins in {}; what they had is not tracked any more",
                    directory.unwrap_or_default()
                ))
            }
            Ok(sample) => Ok(sample),
            Err(error) => {
                self.tracker = None;
                Err(told(error))
            }
        }
    }

    /// What those on the screen use who have not been looked at yet.
    pub(super) fn look_at_new(&mut self, wanted: &Wanted) -> HashMap<ProcessKey, (char, Load)> {
        let Some(tracker) = &self.tracker else {
            return HashMap::new();
        };
        let visible: HashSet<_> = wanted.visible.iter().collect();
        let unknown = |member: &&Member| visible.contains(&member.key) && !self.loads.known.contains_key(&member.key);
        let members: Vec<_> = self.members.iter().filter(unknown).cloned().collect();
        for member in &members {
            // Books that cannot be read are found so by the next sample, which says it.
            if let Err(error) = self.loads.look_at(tracker, member) {
                tracing::debug!(error = &error as &dyn std::error::Error, "failed to look at a process");
            }
        }
        let known = |member: &Member| Some((member.key, *self.loads.known.get(&member.key)?));
        members.iter().filter_map(known).collect()
    }

    /// Removes the pins if nobody needs them. Whoever is still at work with them keeps them.
    pub(super) fn leave(&mut self) {
        match self.tracker.take().map(Arc::try_unwrap) {
            Some(Ok(tracker)) => crate::cli::close(tracker),
            Some(Err(used)) => self.tracker = Some(used),
            None => {}
        }
    }

    fn are_gone(&self, sample: &Sample) -> bool {
        let mut doubts = sample.services.iter().flat_map(|service| &service.doubts);
        doubts.any(|doubt| matches!(doubt, Doubt::ReplacedPins { .. }))
            && !matches!(Tracker::open_existing(&self.config), Ok(Some(_)))
    }

    fn read(&mut self, tracker: &Arc<Tracker>, wanted: &Wanted) -> Result<Sample, TrackerError> {
        let evidence = Evidence::gather(tracker)?;
        let infos = tracker.services()?;
        let fingerprint: Fingerprint = infos
            .iter()
            .map(|info| (info.id, info.live, info.forks, info.exits))
            .collect();
        // An execution changes a name and no number, so the members that are shown are always read.
        if wanted.service.is_some() || fingerprint != self.fingerprint {
            self.members = tracker.all_members()?;
            self.loads.forget_others(&self.members);
            self.fingerprint = fingerprint;
        }
        let budget = self.interval / SHARE_FOR_LOADS;
        self.loads.read(tracker, &self.members, &wanted.visible, budget)?;
        let now = Instant::now();
        self.forks.retain(|id, _| infos.iter().any(|info| info.id == *id));
        let loads = self.loads.by_service(&self.members);
        let services: Vec<_> = infos
            .into_iter()
            .map(|info| ServiceSample {
                fork_rate: self.fork_rate(&info, now),
                load: loads.get(&info.id).copied().unwrap_or_default(),
                doubts: evidence.against(tracker, &info),
                info,
            })
            .collect();
        let shown = wanted
            .service
            .filter(|id| services.iter().any(|service| service.info.id == *id));
        Ok(Sample {
            tracker: Arc::downgrade(tracker),
            tracking: tracker.tracking(),
            services,
            tree: shown.map(|service| self.tree(service)),
            loads_age: self.loads.age(),
            unknown_loads: self.members.len().saturating_sub(self.loads.known.len()),
        })
    }

    fn fork_rate(&mut self, info: &ServiceInfo, now: Instant) -> Option<f64> {
        let count = info.forks;
        let Some(before) = self.forks.get(&info.id).copied() else {
            let first = Forks {
                count,
                at: now,
                rate: None,
            };
            self.forks.insert(info.id, first);
            return None;
        };
        let elapsed = now.saturating_duration_since(before.at);
        if elapsed < SHORTEST {
            return before.rate;
        }
        let rate = Some(count.saturating_sub(before.count) as f64 / elapsed.as_secs_f64());
        self.forks.insert(info.id, Forks { count, at: now, rate });
        rate
    }

    fn tree(&self, service: ServiceId) -> Tree {
        let of_service = |member: &&Member| member.service == service;
        let members: Vec<_> = self.members.iter().filter(of_service).cloned().collect();
        Tree {
            service,
            at: Tracker::now(),
            rows: tree::rows(&members),
            loads: members
                .iter()
                .filter_map(|member| Some((member.key, *self.loads.known.get(&member.key)?)))
                .collect(),
            members,
        }
    }
}

/// What each member used when it was last looked at.
#[derive(Debug, Default)]
struct Loads {
    shares: CpuShares,
    known: HashMap<ProcessKey, (char, Load)>,
    /// Whose turn it is, among the members.
    next: usize,
    /// When the round began in which each is looked at once, and how long the last one took.
    began: Option<Instant>,
    took: Duration,
}

impl Loads {
    /// Looks at these and then at as many others as the time allows, at each at most once.
    fn read(
        &mut self,
        tracker: &Tracker,
        members: &[Member],
        visible: &[ProcessKey],
        budget: Duration,
    ) -> Result<(), TrackerError> {
        let visible: HashSet<_> = visible.iter().collect();
        if !visible.is_empty() {
            for member in members.iter().filter(|member| visible.contains(&member.key)) {
                self.look_at(tracker, member)?;
            }
        }
        let begin = Instant::now();
        let round = *self.began.get_or_insert(begin);
        for seen in 0..members.len() {
            if seen >= LEAST_LOOKS && begin.elapsed() >= budget {
                break;
            }
            if self.next >= members.len() {
                self.took = begin.saturating_duration_since(round);
                self.began = Some(begin);
                self.next = 0;
            }
            let member = &members[self.next];
            if !visible.contains(&member.key) {
                self.look_at(tracker, member)?;
            }
            self.next += 1;
        }
        Ok(())
    }

    fn look_at(&mut self, tracker: &Tracker, member: &Member) -> Result<(), TrackerError> {
        match tracker.load(member)? {
            Some(load) => {
                let cpu = self.shares.percent(member.key, load.cpu, Instant::now());
                let memory = load.memory;
                self.known.insert(member.key, (load.state, Load { cpu, memory }));
            }
            None => {
                self.known.remove(&member.key);
            }
        }
        Ok(())
    }

    fn forget_others(&mut self, members: &[Member]) {
        let there: HashSet<_> = members.iter().map(|member| member.key).collect();
        self.known.retain(|key, _| there.contains(key));
        self.shares.retain(|key| there.contains(key));
    }

    fn by_service(&self, members: &[Member]) -> HashMap<ServiceId, Load> {
        let mut sums: HashMap<ServiceId, Load> = HashMap::new();
        for member in members {
            if let Some((_, load)) = self.known.get(&member.key) {
                let sum = sums.entry(member.service).or_default();
                sum.cpu += load.cpu;
                sum.memory += load.memory;
            }
        }
        sums
    }

    /// How old what is known may be: a whole round, of which the one under way may be the longer.
    fn age(&self) -> Duration {
        self.began
            .map_or(Duration::ZERO, |began| self.took.max(began.elapsed()))
    }
}

/// An error and its causes on one line.
fn told(error: TrackerError) -> String {
    super::told(&error.into())
}
