//! The protocol itself.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep_until};

use super::{
    policy::{StopPolicy, Target},
    proof::{Doubt, doubts},
    report::{Fate, SentSignal, StopReport, StoppedProcess, Survivor},
};
use crate::{
    kernel::Gate,
    process::{Pidfd, ProcessKey},
    tracker::{Ended, Member, RECHECK, Service, ServiceId, ServiceInfo, ServiceState, Tracker, TrackerError, Watch},
};

/// How often members are listed again within the grace period, to ask those that were born meanwhile.
const GRACE_RECHECK: Duration = Duration::from_millis(50);
/// How long a round of kills may take before the next one.
const KILL_RECHECK: Duration = Duration::from_millis(20);
/// After how many rounds that still find new members the gate is closed.
const ROUNDS_BEFORE_GATE: u32 = 3;

/// Why a service is not known to be down.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// Members are left at the deadline; the report names them.
    #[error("{} of service {:?} survived", count(.0.survivors.len()), .0.service)]
    Survivors(Box<StopReport>),
    /// The service contains the caller or one of its ancestors.
    #[error("refusing to stop service {service:?}: it contains {whom}")]
    ContainsCaller {
        /// The service.
        service: String,
        /// Who.
        whom: String,
    },
    /// The books could not be read, or a member not be signalled.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// The processes could not be watched.
    #[error("failed to watch processes")]
    Watch(#[from] std::io::Error),
}

/// A point in time; a duration that the clock cannot hold means one that nobody lives to see.
fn after(start: Instant, duration: Duration) -> Instant {
    const LONG: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);
    start.checked_add(duration).unwrap_or(start + LONG)
}

fn count(survivors: usize) -> String {
    match survivors {
        1 => "1 process".to_owned(),
        n => format!("{n} processes"),
    }
}

/// Exactly those whom a stop would signal now: the members of the service and of services nested in it.
///
/// # Errors
///
/// When the books cannot be read, or the service contains the caller.
pub fn dry_run(tracker: &Tracker, service: &Service) -> Result<Vec<Member>, StopError> {
    let members = tracker.members(&tracker.nested(service.id())?)?;
    guard_caller(tracker, service, &members)?;
    Ok(members)
}

/// Stops the service and those nested in it. Returns the moment that all is verified; waits on events, not on time.
///
/// Afterwards the service is still registered, and can be spawned into again.
///
/// # Errors
///
/// [`StopError::Survivors`] when a member outlives `policy.kill_timeout`; the service then stays in the killing state,
/// and a later stop goes on with it.
pub async fn stop(tracker: &Tracker, service: &Service, policy: &StopPolicy) -> Result<StopReport, StopError> {
    dry_run(tracker, service)?;
    let mut stop = Stop::begin(tracker, service, policy)?;
    stop.ask().await?;
    let deadline = after(Instant::now(), policy.kill_timeout);
    loop {
        stop.kill(deadline).await?;
        stop.verify(deadline).await?;
        if stop.is_empty()? || Instant::now() >= deadline {
            return stop.finish();
        }
    }
}

/// No stop signals the caller or its ancestors: the answer would never arrive, and PID 1 must not die.
fn guard_caller(tracker: &Tracker, service: &Service, members: &[Member]) -> Result<(), StopError> {
    let own = tracker.own_line()?;
    match members.iter().find(|member| own.contains(&member.key.tgid)) {
        None => Ok(()),
        Some(member) => Err(StopError::ContainsCaller {
            service: service.name().to_owned(),
            whom: format!(
                "pid {} ({}), which is this process or an ancestor of it",
                member.pid, member.comm
            ),
        }),
    }
}

/// A service of the family that is stopped: the one that was asked for, or one nested in it.
struct Kin {
    /// Its record when it was last seen: once it is empty, whoever registered it may unregister it.
    info: ServiceInfo,
    /// Exits that it had counted when the stop met it.
    exits_before: u64,
}

struct Stop<'a> {
    tracker: &'a Tracker,
    service: &'a Service,
    policy: &'a StopPolicy,
    /// Outer services first. Grows only: a service that is gone may have left members that still close their files.
    family: Vec<Kin>,
    state: ServiceState,
    began: Instant,
    began_boottime: Duration,
    watch: Watch,
    seen: BTreeMap<ProcessKey, StoppedProcess>,
    /// Members that died before the stop began.
    ended_before: HashSet<ProcessKey>,
    /// Members whose exit record was found.
    recorded: HashSet<ProcessKey>,
    /// Members whose death needs no more observing: reaped, seen dead, or being watched.
    observed: HashSet<ProcessKey>,
    /// Exits that the family had counted when the exit records were last looked through.
    exits_read: Option<u64>,
    /// Exit records that appeared during the stop, and members buried without one.
    exits_found: u64,
    /// The caller and its ancestors, in case one of them becomes a member.
    own: HashSet<u32>,
    /// Why members could not be signalled.
    refused: HashMap<ProcessKey, String>,
    gate: Option<Gate>,
    gate_used: bool,
    rounds: u32,
}

impl<'a> Stop<'a> {
    fn begin(tracker: &'a Tracker, service: &'a Service, policy: &'a StopPolicy) -> Result<Self, StopError> {
        let mut this = Self {
            tracker,
            service,
            policy,
            family: vec![Kin::new(tracker.info(service)?)],
            state: ServiceState::Stopping,
            began: Instant::now(),
            began_boottime: Tracker::now(),
            watch: Watch::new()?,
            seen: BTreeMap::new(),
            ended_before: HashSet::new(),
            recorded: HashSet::new(),
            observed: HashSet::new(),
            exits_read: None,
            exits_found: 0,
            own: tracker.own_line()?,
            refused: HashMap::new(),
            gate: None,
            gate_used: false,
            rounds: 0,
        };
        this.meet_kin()?;
        // Records before counters: an exit in between is found to be new, but never missed.
        let ended = tracker.ended(&this.ids())?;
        this.ended_before = ended.into_iter().map(|ended| ended.key).collect();
        for kin in &mut this.family {
            kin.refresh(tracker)?;
            kin.exits_before = kin.info.exits;
        }
        this.assert_state()?;
        // Members that died just before the stop may still be closing their files.
        this.observe_exits()?;
        Ok(this)
    }

    fn ids(&self) -> Vec<ServiceId> {
        self.family.iter().map(|kin| kin.info.id).collect()
    }

    /// Takes services into the family that are nested in it and were not known. Returns whether there were any.
    fn meet_kin(&mut self) -> Result<bool, StopError> {
        let known = self.ids();
        let nested = self.tracker.nested(self.service.id())?;
        let mut met = false;
        for id in nested.into_iter().filter(|id| !known.contains(id)) {
            if let Some(info) = self.tracker.info_of(id)? {
                // It was registered during the stop, or its exits are counted when the stop begins.
                self.family.push(Kin::new(info));
                met = true;
            }
        }
        Ok(met)
    }

    /// Whether no service of the family has a member, and none was added to the family.
    fn is_empty(&mut self) -> Result<bool, StopError> {
        // Outer services first: once they are empty, nobody is left to spawn into the inner ones.
        for kin in &mut self.family {
            if kin.refresh(self.tracker)? > 0 {
                return Ok(false);
            }
        }
        Ok(!self.meet_kin()?)
    }

    /// Puts the family into the state that the stop has reached; another client's stop may be further.
    fn assert_state(&self) -> Result<(), StopError> {
        for kin in &self.family {
            if self.state == ServiceState::Killing || kin.info.state == ServiceState::Up {
                self.tracker.set_state(kin.info.id, self.state)?;
            }
        }
        Ok(())
    }

    /// The grace period: each member gets the stop signal once, until none is left or time is up.
    async fn ask(&mut self) -> Result<(), StopError> {
        let deadline = after(self.began, self.policy.grace);
        while !self.is_empty()? && Instant::now() < deadline {
            self.assert_state()?;
            let (members, _) = self.list()?;
            let main = self.family.first().and_then(|kin| kin.info.main);
            for (index, member) in members.iter().enumerate() {
                breathe(index).await;
                let asked = self.seen.get(&member.key).is_some_and(|seen| !seen.signals.is_empty());
                if asked || (self.policy.target == Target::Main && main != Some(member.key)) {
                    self.watch_member(member)?;
                } else {
                    // SIGCONT comes second: a stopped process finds the stop signal pending when it wakes.
                    self.signal(member, &[self.policy.signal, Signal::SIGCONT])?;
                }
            }
            self.observe_exits()?;
            self.forget_released(&members)?;
            self.pause(deadline.min(Instant::now() + GRACE_RECHECK)).await?;
        }
        Ok(())
    }

    /// SIGKILL to every member, round after round, until the counter is 0 or time is up.
    async fn kill(&mut self, deadline: Instant) -> Result<(), StopError> {
        self.state = ServiceState::Killing;
        while !self.is_empty()? && Instant::now() < deadline {
            self.assert_state()?;
            self.rounds += 1;
            let (members, found_new) = self.list()?;
            for (index, member) in members.iter().enumerate() {
                breathe(index).await;
                let killed = |seen: &StoppedProcess| seen.signals.iter().any(|sent| sent.signal == Signal::SIGKILL);
                if self.seen.get(&member.key).is_some_and(killed) {
                    self.watch_member(member)?;
                } else {
                    self.signal(member, &[Signal::SIGKILL])?;
                }
            }
            if found_new && self.rounds >= ROUNDS_BEFORE_GATE && self.gate.is_none() {
                // Without it the rounds go on, and those who outrun them are survivors.
                match self.tracker.attach_gate() {
                    Ok(gate) => self.gate = Some(gate),
                    Err(error) => tracing::warn!(%error, "failed to close the gate"),
                }
                self.gate_used |= self.gate.is_some();
            }
            self.observe_exits()?;
            self.forget_released(&members)?;
            self.pause(deadline.min(Instant::now() + KILL_RECHECK)).await?;
        }
        Ok(())
    }

    /// Waits until every member that died has been observed dead.
    async fn verify(&mut self, deadline: Instant) -> Result<(), StopError> {
        loop {
            let complete = self.observe_exits()?;
            self.bury_dead()?;
            self.forget_released(&[])?;
            if complete && self.watch.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline || !self.is_empty()? {
                return Ok(());
            }
            self.wait(deadline.min(Instant::now() + KILL_RECHECK)).await?;
        }
    }

    /// Exits that the family has counted during the stop.
    fn exits(&self) -> u64 {
        let counted = |kin: &Kin| kin.info.exits.saturating_sub(kin.exits_before);
        self.family.iter().map(counted).sum()
    }

    /// The members now, and whether any was not known; each is entered in the report.
    fn list(&mut self) -> Result<(Vec<Member>, bool), StopError> {
        let members = self.tracker.members(&self.ids())?;
        let known = self.seen.len();
        for member in &members {
            self.seen
                .entry(member.key)
                .or_insert_with(|| StoppedProcess::new(member.key, member.pid, member.parent, &member.comm));
        }
        Ok((members, self.seen.len() > known))
    }

    /// Sends the signals through the member's matched pidfd; does nothing if the member is dead or was released.
    fn signal(&mut self, member: &Member, signals: &[Signal]) -> Result<(), StopError> {
        if self.own.contains(&member.key.tgid) {
            let cause = "it is the process that stops the service, or an ancestor of it".to_owned();
            self.refused.insert(member.key, cause);
            return Ok(());
        }
        let opened = match self.watch.get(member.key) {
            Some(_) => None,
            None => match self.open(member)? {
                Some(pidfd) => Some(pidfd),
                None => return Ok(()),
            },
        };
        let Some(pidfd) = opened.as_ref().or_else(|| self.watch.get(member.key)) else {
            return Ok(());
        };
        let mut sent = Vec::with_capacity(signals.len());
        for signal in signals {
            if !self.tracker.is_member(member)? {
                break;
            }
            let after = self.began.elapsed();
            match pidfd.signal(*signal) {
                Ok(true) => sent.push(SentSignal { signal: *signal, after }),
                Ok(false) => {}
                // The others are to be signalled all the same.
                Err(error) => {
                    self.refused.insert(member.key, error.to_string());
                }
            }
        }
        if let Some(seen) = self.seen.get_mut(&member.key) {
            seen.signals.extend(sent);
        }
        if let Some(pidfd) = opened {
            self.keep(member.key, pidfd)?;
        }
        Ok(())
    }

    fn watch_member(&mut self, member: &Member) -> Result<(), StopError> {
        if !self.watch.has_room() || self.watch.contains(member.key) {
            return Ok(());
        }
        if let Some(pidfd) = self.open(member)? {
            self.keep(member.key, pidfd)?;
        }
        Ok(())
    }

    /// Running out of descriptors is no failure: those that are open close as their processes die, and the next round
    /// goes on until the deadline.
    fn open(&self, member: &Member) -> Result<Option<Pidfd>, StopError> {
        match self.tracker.open_member(member) {
            Err(TrackerError::Pidfd(error)) if error.is_exhaustion() => Ok(None),
            result => Ok(result?),
        }
    }

    fn keep(&mut self, key: ProcessKey, pidfd: Pidfd) -> Result<(), StopError> {
        if self.watch.has_room() {
            self.watch.add(key, pidfd)?;
            self.observed.insert(key);
        }
        Ok(())
    }

    /// Watches those no more that left the books alive. One that is dying right now is found again by its exit record.
    fn forget_released(&mut self, members: &[Member]) -> Result<(), StopError> {
        let members: HashSet<_> = members.iter().map(|member| member.key).collect();
        let gone = |key: &ProcessKey| !members.contains(key) && !self.recorded.contains(key);
        let candidates: Vec<_> = self.watch.keys().filter(gone).collect();
        for key in candidates {
            if self.tracker.is_recorded_alive(key)? {
                continue;
            }
            self.watch.remove(key);
            self.observed.remove(&key);
            self.exits_read = None;
        }
        Ok(())
    }

    /// Waits until all watched processes are dead, the family is empty, or it is time to list again.
    async fn pause(&mut self, until: Instant) -> Result<(), StopError> {
        if self.watch.is_empty() {
            return self.wait(until).await;
        }
        while !self.watch.is_empty() && Instant::now() < until {
            self.wait(until).await?;
            if self.is_empty()? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Waits until a watched process is dead, or the time.
    async fn wait(&mut self, until: Instant) -> Result<(), StopError> {
        if self.watch.is_empty() {
            sleep_until(until.min(Instant::now() + RECHECK)).await;
            return Ok(());
        }
        tokio::select! {
            dead = self.watch.next_dead() => self.bury(&dead?),
            () = sleep_until(until) => Ok(()),
        }
    }

    fn bury_dead(&mut self) -> Result<(), StopError> {
        let dead = self.watch.take_dead()?;
        self.bury(&dead)
    }

    /// Members that are dead leave the books even if the kernel missed their exit.
    fn bury(&mut self, dead: &[ProcessKey]) -> Result<(), StopError> {
        for key in dead {
            if self.tracker.bury(*key)? {
                self.exits_found += 1;
            }
        }
        Ok(())
    }

    /// Looks through the exit records and watches those dead members that still close their files.
    ///
    /// Returns whether all have been observed or are being watched.
    fn observe_exits(&mut self) -> Result<bool, StopError> {
        for kin in &mut self.family {
            kin.refresh(self.tracker)?;
        }
        let counted = self.exits();
        if self.exits_read == Some(counted) {
            return Ok(true);
        }
        let mut complete = true;
        for ended in self.tracker.ended(&self.ids())? {
            self.recorded.insert(ended.key);
            if !self.ended_before.contains(&ended.key) {
                self.enter_death(&ended);
            }
            if self.observed.contains(&ended.key) {
                continue;
            }
            let opened = match self.tracker.open_matching(ended.pid, ended.key) {
                Err(TrackerError::Pidfd(error)) if error.is_exhaustion() => {
                    complete = false;
                    continue;
                }
                result => result?,
            };
            match opened {
                Some(pidfd) if !pidfd.is_dead() => {
                    complete &= self.watch.has_room();
                    self.keep(ended.key, pidfd)?;
                }
                Some(_) | None => {
                    self.observed.insert(ended.key);
                }
            }
        }
        // A death may be counted a moment before its record is there.
        if complete && self.exits_found >= counted {
            self.exits_read = Some(counted);
        }
        Ok(complete)
    }

    /// Notes how a member ended that was alive when the stop began.
    fn enter_death(&mut self, ended: &Ended) {
        let seen = self
            .seen
            .entry(ended.key)
            .or_insert_with(|| StoppedProcess::new(ended.key, ended.pid, ended.parent, &ended.comm));
        seen.comm.clone_from(&ended.comm);
        if seen.fate.is_none() {
            seen.fate = Some(Fate::of_wait_status(ended.status));
            seen.ended_after = Some(ended.ended.saturating_sub(self.began_boottime));
            self.exits_found += 1;
        }
    }

    fn finish(mut self) -> Result<StopReport, StopError> {
        drop(self.gate.take());
        let complete = self.observe_exits()?;
        self.bury_dead()?;
        let empty = self.is_empty()?;
        let survivors = self.survivors()?;
        let doubts = self.doubts(complete)?;
        let Some(kin) = self.family.first() else {
            return Err(TrackerError::NotRegistered(self.service.name().to_owned()).into());
        };
        let report = StopReport {
            service: kin.info.name.clone(),
            instance: kin.info.instance.clone(),
            tracking: self.tracker.tracking(),
            proven: empty && survivors.is_empty() && doubts.is_empty(),
            doubts,
            elapsed: self.began.elapsed(),
            kill_rounds: self.rounds,
            gate: self.gate_used,
            processes: self.seen.into_values().collect(),
            survivors,
        };
        if !empty || !report.survivors.is_empty() {
            return Err(StopError::Survivors(Box::new(report)));
        }
        for kin in self.family.iter().skip(1).rev() {
            // Its registrant was a member and is dead.
            self.tracker.unregister_id(kin.info.id)?;
        }
        self.tracker.set_state(self.service.id(), ServiceState::Up)?;
        Ok(report)
    }

    fn doubts(&self, complete: bool) -> Result<Vec<Doubt>, StopError> {
        let missed = self.tracker.missed_creations()?;
        let detached = self.tracker.detached_hooks();
        let mut doubted = Vec::new();
        for kin in &self.family {
            let out_of_sight = self.tracker.is_out_of_sight(&kin.info);
            for doubt in doubts(&kin.info, missed, &detached, out_of_sight) {
                if !doubted.contains(&doubt) {
                    doubted.push(doubt);
                }
            }
        }
        let unobserved = self.exits().saturating_sub(self.exits_found);
        if unobserved > 0 || !complete {
            doubted.push(Doubt::UnobservedDeaths { count: unobserved });
        }
        Ok(doubted)
    }

    /// Members that are left, and dead ones that still hold resources.
    fn survivors(&mut self) -> Result<Vec<Survivor>, StopError> {
        let (members, _) = self.list()?;
        self.forget_released(&members)?;
        let mut left: BTreeMap<_, _> = members
            .into_iter()
            .map(|member| (member.key, (member.pid, member.comm)))
            .collect();
        for key in self.watch.keys() {
            if let Some(seen) = self.seen.get(&key) {
                left.entry(key).or_insert((seen.pid, seen.comm.clone()));
            }
        }
        let survivor = |(key, (pid, comm))| {
            let condition = self.tracker.condition(pid, key);
            Survivor::new(key, pid, comm, condition, self.refused.get(&key))
        };
        Ok(left.into_iter().map(survivor).collect())
    }
}

impl Kin {
    fn new(info: ServiceInfo) -> Self {
        Self { info, exits_before: 0 }
    }

    /// Reads the record again and returns how many members there are; one that is gone has none.
    fn refresh(&mut self, tracker: &Tracker) -> Result<u64, StopError> {
        match tracker.info_of(self.info.id)? {
            Some(info) => {
                self.info = info;
                Ok(self.info.live)
            }
            None => Ok(0),
        }
    }
}

/// Lets other tasks run now and then while many members are gone through.
async fn breathe(index: usize) {
    if index % 64 == 63 {
        tokio::task::yield_now().await;
    }
}
