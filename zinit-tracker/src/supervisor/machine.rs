//! The states of one service: pure, without clock, processes or messages.
//!
//! Each [`Input`] is something that happened; the answer is what has to be done about it. `ARCHITECTURE.md` has the table.

use std::{collections::VecDeque, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    definition::{Definition, RestartPolicy, RestartWhen},
    state::{State, Target},
};
use crate::stop::Fate;

/// How long after a stop that failed it is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// It is wanted up.
    Start,
    /// It is wanted down.
    Stop,
    /// It is wanted down, then up.
    Restart,
    /// Nothing starts any more.
    Close,
    /// Whether it may start now.
    Dependencies(Dependencies),
    /// The main process was created, and is to execute its program.
    Created,
    /// The main process executes its program.
    Spawned,
    /// The main process could not be created, or not execute its program.
    SpawnFailed,
    /// The main process could not be created for want of something that the machine may have again soon: what, in words.
    SpawnDenied(String),
    /// The test succeeded.
    TestPassed,
    /// The test could not be executed.
    TestBroken,
    /// The main process ended; `None`: nobody knows how.
    Ended(Option<Fate>),
    /// The stop protocol proved that nothing is left.
    Stopped,
    /// The stop protocol left survivors, named here.
    Survived(String),
    /// The stop protocol could not begin, for this reason.
    Unstopped(String),
    /// The time that was asked for is over.
    TimerOver,
}

/// Whether a service's dependencies let it start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Dependencies {
    /// They do.
    Met,
    /// Not yet.
    #[default]
    Unmet,
    /// They never will: the cycle, in words.
    Cycle(String),
}

/// What has to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Create the main process; answered with [`Input::Created`], [`Input::SpawnFailed`] or [`Input::SpawnDenied`], and the first with [`Input::Spawned`],
    /// [`Input::SpawnFailed`] or [`Input::Ended`], or not at all.
    Spawn,
    /// Run the stop protocol; answered with [`Input::Stopped`], [`Input::Survived`] or [`Input::Unstopped`].
    Stop {
        /// With the stop signal and a grace period first.
        gently: bool,
    },
    /// Answer with [`Input::TimerOver`] after this time.
    Timer(Duration),
    /// Do not any more.
    NoTimer,
}

/// What the machine of another supervisor needs to go on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Snapshot {
    target: Target,
    /// How the last main process ended.
    rest: State,
    /// What is known of the main process; `None`: it has yet to execute its program, or there is none.
    main: Option<Main>,
    doing: Doing,
}

impl Snapshot {
    /// Of a service that is to be started.
    pub(super) const WANTED: Self = Self {
        target: Target::Up,
        rest: State::Unknown,
        main: None,
        doing: Doing::Waiting,
    };

    /// What it says of a run that began after it was made: what was wanted.
    pub(super) fn of_later_run(self) -> Self {
        Self {
            main: None,
            doing: match self.target {
                Target::Up => Doing::Running,
                Target::Down => Doing::Stopping(Then::Rest),
            },
            ..self
        }
    }
}

/// A phase, as far as another supervisor can take it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Doing {
    Nothing,
    Waiting,
    Running,
    Settled,
    Stopping(Then),
}

/// What there is of a service that an earlier supervisor kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remains {
    /// No main process is known of, and the books do not have it.
    Nothing,
    /// The books have it without a member: a process that they missed may have been created for it, and live.
    Entry,
    /// The main process lives.
    Main,
    /// The main process has ended, `None`: nobody knows how; others may live.
    Ended(Option<Fate>),
}

/// What follows a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Then {
    Rest,
    Start,
    Delay,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Down,
    Waiting,
    Starting,
    /// The main process exists and has yet to execute its program.
    Executing,
    Up,
    Settled,
    Stopping(Then),
    Delayed,
    Stuck(Then, String),
}

/// What is known of a main process that lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Main {
    Untested,
    TestBroken,
    Ready,
}

/// One service.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    rules: Rules,
    phase: Phase,
    target: Target,
    main: Option<Main>,
    /// What it is when nothing lives: how the last main process ended.
    rest: State,
    dependencies: Dependencies,
    /// Nothing starts any more.
    closed: bool,
    /// Asked for while the main process was being created.
    after_spawn: Option<Then>,
    /// Whether the members have yet to get the stop signal, when a stop is tried again.
    unasked: bool,
    /// When the main process was created.
    started: Duration,
    /// How long the last main process lived.
    lived: Duration,
    /// Before the next restart.
    delay: Duration,
    /// When restarts were decided on, as far back as the limit reaches.
    restarts: VecDeque<Duration>,
}

/// What the machine needs of a definition.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rules {
    oneshot: bool,
    tested: bool,
    restart: RestartPolicy,
}

impl Rules {
    fn of(definition: &Definition) -> Self {
        Self {
            oneshot: definition.oneshot,
            tested: definition.test.is_some(),
            restart: definition.restart.clone(),
        }
    }
}

impl Machine {
    /// A service that nothing was done about; `occupied`: processes of an earlier supervisor may live.
    pub(super) fn new(definition: &Definition, occupied: bool) -> Self {
        let rules = Rules::of(definition);
        Self {
            phase: if occupied { Phase::Settled } else { Phase::Down },
            target: Target::Down,
            main: None,
            rest: State::Unknown,
            dependencies: Dependencies::Unmet,
            closed: false,
            after_spawn: None,
            unasked: false,
            started: Duration::ZERO,
            lived: Duration::ZERO,
            delay: rules.restart.delay,
            restarts: VecDeque::new(),
            rules,
        }
    }

    /// Goes on where an earlier supervisor's machine was when that supervisor died, with what was found of the service.
    ///
    /// Without a snapshot, the service is taken for one that was wanted up. What is found counts more than what was
    /// noted: it may have changed since.
    pub(super) fn resume(
        definition: &Definition,
        snapshot: Option<Snapshot>,
        remains: Remains,
        now: Duration,
    ) -> (Self, Vec<Effect>) {
        let mut machine = Self::new(definition, false);
        let untested = if machine.rules.tested {
            Main::Untested
        } else {
            Main::Ready
        };
        let snapshot = snapshot.unwrap_or(Snapshot {
            target: Target::Up,
            rest: State::Unknown,
            main: Some(untested),
            doing: Doing::Running,
        });
        machine.target = snapshot.target;
        machine.rest = snapshot.rest;
        machine.started = now;
        if remains == Remains::Main {
            machine.main = Some(snapshot.main.unwrap_or(untested));
        }
        let effects = match (snapshot.doing, remains) {
            (Doing::Stopping(then), _) => {
                if let (Remains::Ended(fate), Some(_)) = (remains, snapshot.main) {
                    machine.rest = rest_after(fate);
                }
                machine.stopping(then, true)
            }
            (_, Remains::Main) => {
                machine.phase = Phase::Up;
                Vec::new()
            }
            // Only a stop looks for it, and a start would forget that there is something to look for.
            (Doing::Running | Doing::Waiting, Remains::Entry) => machine.stopping(Then::Start, true),
            (Doing::Settled | Doing::Nothing, Remains::Entry) => machine.stopping(Then::Rest, true),
            (Doing::Running, Remains::Ended(fate)) => {
                machine.phase = Phase::Up;
                machine.ended(fate, now)
            }
            (Doing::Running | Doing::Waiting, _) => machine.wait_or_spawn(),
            (Doing::Settled, _) => {
                machine.phase = Phase::Settled;
                Vec::new()
            }
            (Doing::Nothing, _) => Vec::new(),
        };
        (machine, effects)
    }

    /// What the machine of another supervisor needs to go on from here.
    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot {
            target: self.target,
            rest: self.rest.clone(),
            main: self.main,
            doing: match self.phase {
                Phase::Down => Doing::Nothing,
                Phase::Waiting => Doing::Waiting,
                Phase::Starting => self.after_spawn.map_or(Doing::Running, Doing::Stopping),
                Phase::Executing | Phase::Up => Doing::Running,
                Phase::Settled => Doing::Settled,
                Phase::Stopping(then) | Phase::Stuck(then, _) => Doing::Stopping(then),
                Phase::Delayed => Doing::Stopping(Then::Delay),
            },
        }
    }

    /// Takes over another definition.
    pub(super) fn redefine(&mut self, definition: &Definition) {
        self.rules = Rules::of(definition);
        self.delay = self.rules.restart.delay;
    }

    /// What clients see.
    pub(super) fn state(&self) -> State {
        match (&self.phase, self.main) {
            (Phase::Stuck(_, reason), _) => State::Error(reason.clone()),
            (_, Some(Main::Untested)) => State::Spawned,
            (_, Some(Main::TestBroken)) => State::TestFailure,
            (_, Some(Main::Ready)) => State::Running,
            (Phase::Waiting, None) => match &self.dependencies {
                Dependencies::Cycle(cycle) => State::Error(format!("dependency cycle: {cycle}")),
                Dependencies::Met | Dependencies::Unmet => State::Blocked,
            },
            (Phase::Starting | Phase::Executing, None) => State::Blocked,
            (Phase::Down | Phase::Up | Phase::Settled | Phase::Stopping(_) | Phase::Delayed, None) => self.rest.clone(),
        }
    }

    /// What it is wanted to be.
    pub(super) fn target(&self) -> Target {
        self.target
    }

    /// Whether the test is to be run, again and again.
    pub(super) fn wants_test(&self) -> bool {
        self.phase == Phase::Up && matches!(self.main, Some(Main::Untested | Main::TestBroken))
    }

    /// Whether supervision may be dropped.
    pub(super) fn is_forgettable(&self) -> bool {
        self.phase == Phase::Down && self.target == Target::Down
    }

    /// Whether nothing is under way: all that remains is to wait for a request, a dependency or an end.
    #[cfg(test)]
    fn is_at_rest(&self) -> bool {
        matches!(
            self.phase,
            Phase::Down | Phase::Waiting | Phase::Up | Phase::Settled | Phase::Stuck(..)
        )
    }

    /// Takes in what happened at `now`, a time of a clock that never goes back.
    pub(super) fn step(&mut self, input: Input, now: Duration) -> Vec<Effect> {
        match input {
            Input::Start => self.start(),
            Input::Stop => {
                self.target = Target::Down;
                self.stop_then(Then::Rest)
            }
            Input::Restart => self.restart(),
            Input::Close => self.close(),
            Input::Dependencies(dependencies) => {
                self.dependencies = dependencies;
                if self.phase == Phase::Waiting {
                    self.wait_or_spawn()
                } else {
                    Vec::new()
                }
            }
            Input::Created => self.created(now),
            Input::Spawned => self.spawned(now),
            Input::SpawnFailed => {
                self.rest = State::Failure;
                self.not_spawned(Then::Rest)
            }
            Input::SpawnDenied(reason) => {
                self.rest = State::Error(format!("failed to start: {reason}"));
                self.lived = Duration::ZERO;
                // Nothing ran: the policy's `when` and its limit are about services that end.
                self.not_spawned(if self.closed { Then::Rest } else { Then::Delay })
            }
            Input::TestPassed => self.tested(Main::Ready),
            Input::TestBroken => self.tested(Main::TestBroken),
            Input::Ended(fate) => self.ended(fate, now),
            Input::Stopped => self.stopped(),
            Input::Survived(survivors) => self.stuck(survivors, false),
            Input::Unstopped(reason) => self.stuck(reason, true),
            Input::TimerOver => self.timer_over(),
        }
    }

    fn start(&mut self) -> Vec<Effect> {
        if self.closed {
            return Vec::new();
        }
        self.target = Target::Up;
        match &mut self.phase {
            Phase::Down => {
                self.restarts.clear();
                self.delay = self.rules.restart.delay;
                self.wait_or_spawn()
            }
            Phase::Settled => self.stopping(Then::Start, true),
            Phase::Stopping(then) | Phase::Stuck(then, _) => {
                if *then == Then::Rest {
                    // As from Down: what it was restarted before does not count against whoever starts it.
                    self.restarts.clear();
                    self.delay = self.rules.restart.delay;
                    *then = Then::Start;
                }
                Vec::new()
            }
            Phase::Starting => {
                // Whoever asked for a stop is told when it was down.
                if self.after_spawn.is_some() {
                    self.after_spawn = Some(Then::Start);
                }
                Vec::new()
            }
            Phase::Waiting | Phase::Executing | Phase::Up | Phase::Delayed => Vec::new(),
        }
    }

    fn restart(&mut self) -> Vec<Effect> {
        self.restarts.clear();
        self.delay = self.rules.restart.delay;
        if self.closed {
            self.target = Target::Down;
            self.stop_then(Then::Rest)
        } else {
            self.target = Target::Up;
            self.stop_then(Then::Start)
        }
    }

    /// Stops whatever there is, or lets the stop that is under way go on to another end.
    fn stop_then(&mut self, then: Then) -> Vec<Effect> {
        match &mut self.phase {
            Phase::Starting => {
                self.after_spawn = Some(then);
                Vec::new()
            }
            Phase::Stopping(next) => {
                *next = then;
                Vec::new()
            }
            Phase::Stuck(..) => {
                let mut effects = self.stopping(then, self.unasked);
                effects.insert(0, Effect::NoTimer);
                effects
            }
            Phase::Delayed => {
                let mut effects = self.stopping(then, true);
                effects.insert(0, Effect::NoTimer);
                effects
            }
            Phase::Down | Phase::Waiting | Phase::Executing | Phase::Up | Phase::Settled => self.stopping(then, true),
        }
    }

    fn stopping(&mut self, then: Then, gently: bool) -> Vec<Effect> {
        self.phase = Phase::Stopping(then);
        vec![Effect::Stop { gently }]
    }

    fn close(&mut self) -> Vec<Effect> {
        self.closed = true;
        match &mut self.phase {
            Phase::Waiting => {
                self.phase = Phase::Down;
                Vec::new()
            }
            Phase::Delayed => {
                self.phase = Phase::Down;
                vec![Effect::NoTimer]
            }
            Phase::Stopping(then) | Phase::Stuck(then, _) => {
                *then = Then::Rest;
                Vec::new()
            }
            Phase::Starting => {
                if self.after_spawn.is_some() {
                    self.after_spawn = Some(Then::Rest);
                }
                Vec::new()
            }
            Phase::Down | Phase::Executing | Phase::Up | Phase::Settled => Vec::new(),
        }
    }

    /// From a phase in which nothing lives.
    fn wait_or_spawn(&mut self) -> Vec<Effect> {
        if self.closed {
            self.phase = Phase::Down;
            return Vec::new();
        }
        if self.dependencies == Dependencies::Met {
            self.phase = Phase::Starting;
            vec![Effect::Spawn]
        } else {
            self.phase = Phase::Waiting;
            Vec::new()
        }
    }

    fn created(&mut self, now: Duration) -> Vec<Effect> {
        self.started = now;
        match self.after_spawn.take() {
            Some(then) => self.stopping(then, true),
            None => {
                self.phase = Phase::Executing;
                Vec::new()
            }
        }
    }

    /// A stop may be under way, or have left it.
    fn spawned(&mut self, now: Duration) -> Vec<Effect> {
        self.started = now;
        self.main = Some(if self.rules.tested { Main::Untested } else { Main::Ready });
        if self.phase == Phase::Executing {
            self.phase = Phase::Up;
        }
        Vec::new()
    }

    fn not_spawned(&mut self, then: Then) -> Vec<Effect> {
        match self.phase {
            Phase::Starting | Phase::Executing => {
                let then = self.after_spawn.take().unwrap_or(then);
                // The child that failed may still be exiting.
                self.stopping(then, true)
            }
            Phase::Down
            | Phase::Waiting
            | Phase::Up
            | Phase::Settled
            | Phase::Stopping(_)
            | Phase::Delayed
            | Phase::Stuck(..) => Vec::new(),
        }
    }

    fn tested(&mut self, main: Main) -> Vec<Effect> {
        if self.wants_test() {
            self.main = Some(main);
        }
        Vec::new()
    }

    fn ended(&mut self, fate: Option<Fate>, now: Duration) -> Vec<Effect> {
        self.main = None;
        self.lived = now.saturating_sub(self.started);
        self.rest = rest_after(fate);
        if !matches!(self.phase, Phase::Executing | Phase::Up) {
            return Vec::new();
        }
        if self.rules.oneshot {
            self.phase = Phase::Settled;
            return Vec::new();
        }
        let then = self.after_end(now);
        self.stopping(then, true)
    }

    /// What follows once everything that the main process left is stopped.
    fn after_end(&mut self, now: Duration) -> Then {
        let again = match self.rules.restart.when {
            RestartWhen::Always => true,
            RestartWhen::OnFailure => self.rest != State::Success,
            RestartWhen::Never => false,
        };
        if !again || self.closed {
            return Then::Rest;
        }
        let policy = &self.rules.restart;
        if let Some(limit) = policy.limit {
            while self
                .restarts
                .front()
                .is_some_and(|then| now.saturating_sub(*then) > limit.window)
            {
                self.restarts.pop_front();
            }
            if self.restarts.len() >= usize::try_from(limit.restarts).unwrap_or(usize::MAX) {
                self.rest = State::Failure;
                return Then::Rest;
            }
            self.restarts.push_back(now);
        }
        Then::Delay
    }

    /// How long to wait before this restart; the next may have to wait longer.
    fn next_delay(&mut self) -> Duration {
        let policy = &self.rules.restart;
        if self.lived > policy.max_delay {
            self.delay = policy.delay;
        }
        let delay = self.delay;
        self.delay = delay.saturating_mul(2).min(policy.max_delay).max(policy.delay);
        delay
    }

    fn stopped(&mut self) -> Vec<Effect> {
        let Phase::Stopping(then) = self.phase else {
            return Vec::new();
        };
        match then {
            Then::Start if !self.closed => self.wait_or_spawn(),
            Then::Delay if !self.closed => {
                self.phase = Phase::Delayed;
                vec![Effect::Timer(self.next_delay())]
            }
            Then::Rest | Then::Start | Then::Delay => {
                self.phase = Phase::Down;
                Vec::new()
            }
        }
    }

    fn stuck(&mut self, reason: String, unasked: bool) -> Vec<Effect> {
        let Phase::Stopping(then) = self.phase else {
            return Vec::new();
        };
        self.phase = Phase::Stuck(then, reason);
        self.unasked = unasked;
        vec![Effect::Timer(RETRY)]
    }

    fn timer_over(&mut self) -> Vec<Effect> {
        match self.phase {
            Phase::Delayed => self.wait_or_spawn(),
            Phase::Stuck(then, ref _reason) => self.stopping(then, self.unasked),
            Phase::Down
            | Phase::Waiting
            | Phase::Starting
            | Phase::Executing
            | Phase::Up
            | Phase::Settled
            | Phase::Stopping(_) => Vec::new(),
        }
    }
}

/// What a service is whose main process ended so.
fn rest_after(fate: Option<Fate>) -> State {
    match fate {
        Some(Fate::Exited(0)) => State::Success,
        Some(Fate::Exited(code)) => State::Error(format!("exited {code}")),
        Some(killed @ Fate::Killed(_)) => State::Error(format!("killed by {killed}")),
        None => State::Error("nobody knows how it ended".to_owned()),
    }
}

#[cfg(test)]
mod tests;
