//! The protocol itself.

use std::{
    collections::{BTreeMap, HashSet},
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
    process::{Pidfd, ProcessKey, stat},
    tracker::{Member, RECHECK, Service, ServiceId, ServiceState, Tracker, TrackerError, Watch},
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
    #[error("failed to watch processes: {0}")]
    Watch(#[from] std::io::Error),
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
    loop {
        let deadline = stop.kill().await?;
        stop.verify(deadline).await?;
        if stop.is_empty()? || Instant::now() >= deadline {
            break;
        }
    }
    stop.finish()
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

struct Stop<'a> {
    tracker: &'a Tracker,
    service: &'a Service,
    policy: &'a StopPolicy,
    /// The service and those nested in it, outer ones first.
    family: Vec<ServiceId>,
    began: Instant,
    began_boottime: Duration,
    watch: Watch,
    seen: BTreeMap<ProcessKey, StoppedProcess>,
    /// Members whose death needs no more observing: reaped, seen dead, or being watched.
    observed: HashSet<ProcessKey>,
    /// Members that had died when the stop began.
    ended_before: HashSet<ProcessKey>,
    /// Exits that the services had counted when their exit records were last looked through.
    exits_read: Option<u64>,
    exits_before: u64,
    /// Exit records that appeared during the stop, and members buried without one.
    exits_found: u64,
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
            family: tracker.nested(service.id())?,
            began: Instant::now(),
            began_boottime: Tracker::now(),
            watch: Watch::new()?,
            seen: BTreeMap::new(),
            observed: HashSet::new(),
            ended_before: HashSet::new(),
            exits_read: None,
            exits_before: 0,
            exits_found: 0,
            gate: None,
            gate_used: false,
            rounds: 0,
        };
        // Records before counter: an exit in between is found to be new, but never missed.
        let ended = tracker.ended(&this.family)?;
        this.ended_before = ended.into_iter().map(|ended| ended.key).collect();
        this.exits_before = this.exits()?;
        // Members that died just before the stop may still be closing their files.
        this.observe_exits()?;
        this.set_state(ServiceState::Stopping)?;
        Ok(this)
    }

    fn set_state(&self, state: ServiceState) -> Result<(), StopError> {
        for service in &self.family {
            self.tracker.set_state(*service, state)?;
        }
        Ok(())
    }

    /// The grace period: each member gets the stop signal once, until none is left or time is up.
    async fn ask(&mut self) -> Result<(), StopError> {
        let deadline = self.began + self.policy.grace;
        while !self.is_empty()? && Instant::now() < deadline {
            for member in self.list()? {
                let asked = self.seen.get(&member.key).is_some_and(|seen| !seen.signals.is_empty());
                let meant = self.policy.target == Target::All || self.is_main(&member)?;
                if asked || !meant {
                    self.watch_member(&member)?;
                    continue;
                }
                // SIGCONT comes second: a stopped process finds the stop signal pending when it wakes.
                self.signal(&member, &[self.policy.signal, Signal::SIGCONT])?;
            }
            self.observe_exits()?;
            self.pause(deadline.min(Instant::now() + GRACE_RECHECK)).await?;
        }
        Ok(())
    }

    fn is_main(&self, member: &Member) -> Result<bool, StopError> {
        Ok(self.tracker.info(self.service)?.main == Some(member.key))
    }

    /// SIGKILL to every member, round after round, until the counter is 0 or time is up. Returns the deadline.
    async fn kill(&mut self) -> Result<Instant, StopError> {
        let deadline = Instant::now() + self.policy.kill_timeout;
        if self.is_empty()? {
            return Ok(deadline);
        }
        self.set_state(ServiceState::Killing)?;
        while !self.is_empty()? && Instant::now() < deadline {
            self.rounds += 1;
            let mut found_new = false;
            for member in self.list()? {
                let killed = |signals: &[SentSignal]| signals.iter().any(|sent| sent.signal == Signal::SIGKILL);
                if self.seen.get(&member.key).is_some_and(|seen| killed(&seen.signals)) {
                    self.watch_member(&member)?;
                    continue;
                }
                found_new = true;
                self.signal(&member, &[Signal::SIGKILL])?;
            }
            if found_new && self.rounds >= ROUNDS_BEFORE_GATE && self.gate.is_none() {
                self.gate = Some(self.tracker.attach_gate()?);
                self.gate_used = true;
            }
            self.observe_exits()?;
            self.pause(deadline.min(Instant::now() + KILL_RECHECK)).await?;
        }
        Ok(deadline)
    }

    /// Waits until every member that died has been observed dead.
    async fn verify(&mut self, deadline: Instant) -> Result<(), StopError> {
        loop {
            let complete = self.observe_exits()?;
            self.bury_dead()?;
            if complete && self.watch.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline || !self.is_empty()? {
                return Ok(());
            }
            self.wait(deadline.min(Instant::now() + KILL_RECHECK)).await?;
        }
    }

    /// Whether no service of the family has a member, and none has been added to the family.
    fn is_empty(&mut self) -> Result<bool, StopError> {
        // Outer services first: once they are empty, nobody is left to spawn into the inner ones.
        for id in &self.family {
            if self.info(*id)?.is_some_and(|info| info.live > 0) {
                return Ok(false);
            }
        }
        let family = self.tracker.nested(self.service.id())?;
        let grown = family.len() > self.family.len();
        if grown {
            self.family = family;
        }
        Ok(!grown)
    }

    fn info(&self, id: ServiceId) -> Result<Option<crate::tracker::ServiceInfo>, StopError> {
        Ok(self.tracker.info_of(id)?)
    }

    /// Exits that the family has counted.
    fn exits(&self) -> Result<u64, StopError> {
        let mut sum = 0;
        for id in &self.family {
            sum += self.info(*id)?.map_or(0, |info| info.exits);
        }
        Ok(sum)
    }

    /// The members now; each is entered in the report.
    fn list(&mut self) -> Result<Vec<Member>, StopError> {
        let members = self.tracker.members(&self.family)?;
        for member in &members {
            self.seen.entry(member.key).or_insert_with(|| StoppedProcess {
                key: member.key,
                pid: member.pid,
                parent_tgid: member.parent.tgid,
                comm: member.comm.clone(),
                signals: Vec::new(),
                fate: None,
                ended_after: None,
            });
        }
        Ok(members)
    }

    /// Sends the signals through the member's matched pidfd; does nothing if the member is dead.
    fn signal(&mut self, member: &Member, signals: &[Signal]) -> Result<(), StopError> {
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
            let after = self.began.elapsed();
            if pidfd.signal(*signal).map_err(TrackerError::from)? {
                sent.push(SentSignal { signal: *signal, after });
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

    /// Running out of descriptors is no failure while some are open: their processes die, and the next round goes on.
    fn open(&self, member: &Member) -> Result<Option<Pidfd>, StopError> {
        match self.tracker.open_member(member) {
            Err(TrackerError::Pidfd(error)) if error.is_exhaustion() && !self.watch.is_empty() => Ok(None),
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

    /// Waits until all watched processes are dead, the family is empty, or it is time to list again.
    async fn pause(&mut self, until: Instant) -> Result<(), StopError> {
        if self.watch.is_empty() {
            sleep_until(until.min(Instant::now() + RECHECK)).await;
            return Ok(());
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
        let counted = self.exits()?;
        if self.exits_read == Some(counted) {
            return Ok(true);
        }
        let mut complete = true;
        for ended in self.tracker.ended(&self.family)? {
            if let Some(seen) = self.seen.get_mut(&ended.key) {
                seen.comm.clone_from(&ended.comm);
            }
            if !self.ended_before.contains(&ended.key) {
                let seen = self.seen.entry(ended.key).or_insert_with(|| StoppedProcess {
                    key: ended.key,
                    pid: ended.pid,
                    parent_tgid: ended.parent.tgid,
                    comm: ended.comm.clone(),
                    signals: Vec::new(),
                    fate: None,
                    ended_after: None,
                });
                if seen.fate.is_none() {
                    seen.fate = Some(Fate::of_wait_status(ended.status));
                    seen.ended_after = Some(ended.ended.saturating_sub(self.began_boottime));
                    self.exits_found += 1;
                }
            }
            if self.observed.contains(&ended.key) {
                continue;
            }
            match self.tracker.open_matching(ended.pid, ended.key)? {
                Some(pidfd) if !pidfd.is_dead() => {
                    if self.watch.has_room() {
                        self.keep(ended.key, pidfd)?;
                    } else {
                        complete = false;
                    }
                }
                Some(_) | None => {
                    self.observed.insert(ended.key);
                }
            }
        }
        if complete {
            self.exits_read = Some(counted);
        }
        Ok(complete)
    }

    fn finish(mut self) -> Result<StopReport, StopError> {
        drop(self.gate.take());
        self.observe_exits()?;
        self.bury_dead()?;
        let empty = self.is_empty()?;
        let survivors = self.survivors()?;
        let mut doubted = Vec::new();
        for id in &self.family {
            if let Some(info) = self.info(*id)? {
                for doubt in doubts(&info, self.tracker.loss()?) {
                    if !doubted.contains(&doubt) {
                        doubted.push(doubt);
                    }
                }
            }
        }
        let unobserved = (self.exits()? - self.exits_before).saturating_sub(self.exits_found);
        if unobserved > 0 {
            doubted.push(Doubt::UnobservedDeaths { count: unobserved });
        }
        let info = self.tracker.info(self.service)?;
        let report = StopReport {
            service: info.name,
            instance: info.instance,
            tracking: self.tracker.tracking(),
            proven: empty && survivors.is_empty() && doubted.is_empty(),
            doubts: doubted,
            elapsed: self.began.elapsed(),
            kill_rounds: self.rounds,
            gate: self.gate_used,
            processes: self.seen.into_values().collect(),
            survivors,
        };
        if !empty || !report.survivors.is_empty() {
            return Err(StopError::Survivors(Box::new(report)));
        }
        for id in self.family {
            if id != self.service.id() {
                // Its supervisor was a member and is dead.
                self.tracker.unregister_id(id)?;
            }
        }
        self.tracker.set_state(self.service.id(), ServiceState::Up)?;
        Ok(report)
    }

    /// Members that are left, and dead ones that still hold resources.
    fn survivors(&mut self) -> Result<Vec<Survivor>, StopError> {
        let members = self.list()?;
        let mut left: BTreeMap<_, _> = members
            .into_iter()
            .map(|member| (member.key, (member.pid, member.comm)))
            .collect();
        for key in self.watch.keys() {
            if let Some(seen) = self.seen.get(&key) {
                left.entry(key).or_insert((seen.pid, seen.comm.clone()));
            }
        }
        Ok(left
            .into_iter()
            .map(|(key, (pid, comm))| Survivor::new(key, pid, comm, stat::condition(pid)))
            .collect())
    }
}
