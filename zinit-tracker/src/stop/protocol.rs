//! The protocol itself: who is signalled and when.

mod consistency;
mod deaths;
mod family;
mod outcome;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep_until};

use self::family::Kin;
use super::{
    policy::{StopPolicy, Target},
    proof::Evidence,
    report::{GateUse, SentSignal, StopReport, StoppedProcess},
    survivor::Refusal,
    urgency::urgently,
};
use crate::{
    kernel::Gate,
    process::{Matched, ProcessKey},
    tracker::{
        Existence, Member, RECHECK, Service, ServiceState, Stray, Sweeper, Tracker, TrackerError, Tracking, Watch,
        Watched,
    },
};

/// How often members are counted within the grace period, to ask those that were born meanwhile.
const GRACE_RECHECK: Duration = Duration::from_millis(50);
/// How seldom they are listed if none was born: it costs as much as there are processes and services, for each service that
/// is being stopped.
const GRACE_RELIST: Duration = Duration::from_secs(2);
/// For how long what was found to speak against the books as a whole is taken to be all that does while nobody relies on it: to look
/// takes dozens of system calls, and what proves the stop is always looked at anew.
const EVIDENCE_LASTS: Duration = GRACE_RECHECK;
/// How long a round of kills may take before the next one.
const KILL_RECHECK: Duration = Duration::from_millis(20);

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
    tracker.mend_hooks().await?;
    let mut stop = Stop::begin(tracker, service, policy)?;
    stop.ask().await?;
    let deadline = after(Instant::now(), policy.kill_timeout);
    loop {
        stop.kill(deadline).await?;
        stop.verify(deadline).await?;
        stop.evidence = None;
        if stop.is_done()? || Instant::now() >= deadline {
            return stop.finish().await;
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
    /// Members whose exit the family has counted during the stop and that are known to be the ones.
    accounted: HashSet<ProcessKey>,
    /// Whether something spoke against the books when that was last asked.
    doubted: bool,
    /// What is known of the books as a whole, and since when.
    evidence: Option<(Instant, Evidence)>,
    /// Members that had joined when counters and entries were last found to agree.
    agreed: Option<u64>,
    /// Since when members are counted that have no entry, with the joins and exits that were counted then.
    without_entry: Option<(Instant, u64, u64)>,
    /// By how many entries the books contradict themselves. If by any, counters prove nothing.
    contradictions: u64,
    /// Whether verification ended with a process dying that may have been a member.
    unexplained: bool,
    /// The caller and its ancestors, in case one of them becomes a member.
    own: HashSet<u32>,
    /// Why members could not be signalled.
    refused: HashMap<ProcessKey, Refusal>,
    /// Members that had joined when the stop began, or at the last round of kills.
    forks_seen: u64,
    gate: Option<Gate>,
    gate_used: Option<GateUse>,
    rounds: u32,
    /// When killing began.
    killing: Option<Instant>,
    sweeper: Sweeper,
    /// Those that the last sweep found and could not take into the books.
    strays: Vec<Stray>,
}

impl<'a> Stop<'a> {
    fn begin(tracker: &'a Tracker, service: &'a Service, policy: &'a StopPolicy) -> Result<Self, StopError> {
        let own = tracker.own_line()?;
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
            accounted: HashSet::new(),
            doubted: false,
            evidence: None,
            agreed: None,
            without_entry: None,
            contradictions: 0,
            unexplained: false,
            sweeper: Sweeper::new(own.clone()),
            own,
            refused: HashMap::new(),
            forks_seen: 0,
            gate: None,
            gate_used: None,
            rounds: 0,
            killing: None,
            strays: Vec::new(),
        };
        this.meet_kin()?;
        // Records before counters: an exit in between is found to be new, but never missed.
        let ended = tracker.ended(&this.ids())?;
        this.ended_before = ended.into_iter().map(|ended| ended.key).collect();
        for kin in &mut this.family {
            kin.refresh(tracker)?;
            kin.exits_before = kin.info.exits;
        }
        this.forks_seen = this.forks();
        this.assert_state()?;
        // Members that died just before the stop may still be closing their files.
        this.observe_exits()?;
        Ok(this)
    }

    /// Whether nobody is left: no member, and no stray if the books are in doubt.
    fn is_done(&mut self) -> Result<bool, StopError> {
        let empty = self.is_empty()?;
        Ok(!self.sweep()? && empty)
    }

    /// If anything speaks against the books, looks for those who are missing there and takes them in. Returns whether there
    /// were any.
    fn sweep(&mut self) -> Result<bool, StopError> {
        // Books of level procfs are nothing but a sweep, and have just been looked at.
        self.doubted = self.tracker.tracking() != Tracking::Procfs && self.is_doubted()?;
        if !self.doubted {
            return Ok(false);
        }
        for kin in &mut self.family {
            kin.refresh(self.tracker)?;
        }
        let family: Vec<_> = self.family.iter().map(|kin| kin.info.clone()).collect();
        let found = self.sweeper.pass(self.tracker, &family)?;
        for stray in &found {
            self.seen
                .entry(stray.key)
                .or_insert_with(|| StoppedProcess::stray(stray));
        }
        let any = !found.is_empty();
        self.strays = found.into_iter().filter(|stray| !stray.taken).collect();
        Ok(any)
    }

    /// Whether anything speaks against the books, as far as is known.
    fn is_doubted(&mut self) -> Result<bool, StopError> {
        let evidence = match self.evidence.take() {
            Some((since, evidence)) if since.elapsed() < EVIDENCE_LASTS => (since, evidence),
            _ => (Instant::now(), Evidence::gather(self.tracker)?),
        };
        let doubted = self.contradictions > 0 || !self.doubts_by(&evidence.1).is_empty();
        self.evidence = Some(evidence);
        Ok(doubted)
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
        let mut recheck = GRACE_RECHECK;
        while !self.is_done()? && Instant::now() < deadline {
            self.assert_state()?;
            let members = self.list()?;
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
            self.look_for_entries(&members);
            let grown = self.pause_unless_grown(deadline.min(Instant::now() + recheck)).await?;
            // Whom the books do not have they do not count.
            recheck = match grown || self.doubted {
                true => GRACE_RECHECK,
                false => (2 * recheck).min(GRACE_RELIST),
            };
        }
        Ok(())
    }

    /// As [`Stop::pause`], but for no longer than nobody is born. Returns whether somebody was.
    async fn pause_unless_grown(&mut self, until: Instant) -> Result<bool, StopError> {
        let forks = self.forks();
        loop {
            self.pause(until.min(Instant::now() + GRACE_RECHECK)).await?;
            let mut live = 0;
            for kin in &mut self.family {
                live += kin.refresh(self.tracker)?;
            }
            let grown = self.forks() > forks;
            if grown || live == 0 || self.watch.is_empty() || Instant::now() >= until {
                return Ok(grown);
            }
        }
    }

    /// SIGKILL to every member, round after round, until the counter is 0 or time is up.
    async fn kill(&mut self, deadline: Instant) -> Result<(), StopError> {
        self.state = ServiceState::Killing;
        // Who forks for ever may leave this thread next to nothing of the machine until the gate is closed.
        while let Some(members) = urgently(|| self.begin_round(deadline))? {
            for (index, member) in members.iter().enumerate() {
                breathe(index).await;
                let killed = |seen: &StoppedProcess| seen.signals.iter().any(|sent| sent.signal == Signal::SIGKILL);
                if self.seen.get(&member.key).is_some_and(killed) {
                    self.watch_member(member)?;
                } else {
                    self.signal(member, &[Signal::SIGKILL])?;
                }
            }
            self.observe_exits()?;
            self.forget_released(&members)?;
            self.pause(deadline.min(Instant::now() + KILL_RECHECK)).await?;
        }
        Ok(())
    }

    /// Whom a round of kills is for, behind a gate if one is needed; `None`: nobody is left, or no time.
    fn begin_round(&mut self, deadline: Instant) -> Result<Option<Vec<Member>>, StopError> {
        // One round at least: without time to wait for it, it is sent all the same.
        if self.is_done()? || (self.rounds > 0 && Instant::now() >= deadline) {
            return Ok(None);
        }
        let began = *self.killing.get_or_insert_with(Instant::now);
        self.assert_state()?;
        self.rounds += 1;
        let members = self.list()?;
        for kin in &mut self.family {
            kin.refresh(self.tracker)?;
        }
        self.look_for_entries(&members);
        // Who forks now may fork faster than it can be killed, and leave the stop no time to do it.
        if self.forks() > self.forks_seen {
            self.close_gate(began);
        }
        self.forks_seen = self.forks();
        Ok(Some(members))
    }

    /// Without a gate the rounds go on, and those who outrun them are survivors.
    fn close_gate(&mut self, began: Instant) {
        if self.gate.is_some() || !self.policy.gate {
            return;
        }
        match self.tracker.close_gate() {
            // There is none at level procfs.
            Ok(None) => {}
            Ok(Some(gate)) => {
                self.gate_used.get_or_insert(GateUse {
                    kind: gate.kind,
                    closed_after: began.elapsed(),
                    took: gate.took,
                });
                self.gate = Some(gate);
            }
            Err(error) => tracing::warn!(%error, "failed to close the gate"),
        }
    }

    /// The members now; each is entered in the report.
    fn list(&mut self) -> Result<Vec<Member>, StopError> {
        let members = self.tracker.members(&self.ids())?;
        for member in &members {
            self.seen
                .entry(member.key)
                .or_insert_with(|| StoppedProcess::new(member.key, member.pid, member.parent, &member.comm));
        }
        Ok(members)
    }

    /// Sends the signals through the member's matched pidfd; does nothing if the member is dead or was released.
    fn signal(&mut self, member: &Member, signals: &[Signal]) -> Result<(), StopError> {
        if self.own.contains(&member.key.tgid) {
            self.refused.insert(member.key, Refusal::Caller);
            return Ok(());
        }
        let opened = match self.watch.contains(member.key) {
            true => None,
            false => match self.open(member)? {
                Some(matched) => Some(matched),
                None => return Ok(()),
            },
        };
        let Some(matched) = opened.as_ref().or_else(|| self.watch.member(member.key)) else {
            return Ok(());
        };
        let mut sent = Vec::with_capacity(signals.len());
        for signal in signals {
            if !self.tracker.is_member(member)? {
                break;
            }
            let after = self.began.elapsed();
            match matched.signal(*signal) {
                Ok(true) => {
                    sent.push(SentSignal { signal: *signal, after });
                    self.refused.remove(&member.key);
                }
                Ok(false) => {}
                // The others are to be signalled all the same.
                Err(error) => {
                    self.refused.insert(member.key, Refusal::Kernel(error));
                }
            }
        }
        if let Some(seen) = self.seen.get_mut(&member.key) {
            seen.signals.extend(sent);
        }
        if let Some(matched) = opened {
            self.keep(member.key, Watched::Member(matched))?;
        }
        Ok(())
    }

    fn watch_member(&mut self, member: &Member) -> Result<(), StopError> {
        if !self.watch.has_room() || self.watch.contains(member.key) {
            return Ok(());
        }
        if let Some(matched) = self.open(member)? {
            self.keep(member.key, Watched::Member(matched))?;
        }
        Ok(())
    }

    /// Running out of descriptors is no failure: those that are open close as their processes die, and the next round
    /// goes on until the deadline.
    fn open(&self, member: &Member) -> Result<Option<Matched>, StopError> {
        match self.tracker.open_member(member) {
            Err(TrackerError::Pidfd(error)) if error.is_exhaustion() => Ok(None),
            result => Ok(result?),
        }
    }

    fn keep(&mut self, key: ProcessKey, process: Watched) -> Result<(), StopError> {
        if self.watch.has_room() {
            self.watch.add(key, process)?;
            self.observed.insert(key);
        }
        Ok(())
    }

    /// Watches those no more that left the books alive.
    fn forget_released(&mut self, members: &[Member]) -> Result<(), StopError> {
        let members: HashSet<_> = members.iter().map(|member| member.key).collect();
        let gone = |key: &ProcessKey| {
            !members.contains(key) && !self.recorded.contains(key) && self.watch.member(*key).is_some()
        };
        let candidates: Vec<_> = self.watch.keys().filter(gone).collect();
        if candidates.is_empty() {
            return Ok(());
        }
        let there = self.tracker.existing()?;
        for key in candidates {
            // One that is dying has merely lost its record, and may hold something yet.
            if there.get(&key) != Some(&Existence::Alive) || self.tracker.is_recorded_alive(key)? {
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
}

/// Lets other tasks run now and then while many members are gone through.
async fn breathe(index: usize) {
    if index % 64 == 63 {
        tokio::task::yield_now().await;
    }
}
