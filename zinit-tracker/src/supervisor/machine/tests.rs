//! Sequences of events, chosen by hand and at random, against the invariants of `ARCHITECTURE.md`.

use proptest::{
    prelude::*,
    sample::{Index, select},
};

use super::*;
use crate::supervisor::RestartLimit;

const SECOND: Duration = Duration::from_secs(1);

fn definition() -> Definition {
    Definition::new(["service"])
}

/// A machine with a world around it that does what it asks for, and watches that it asks for nothing wrong.
#[derive(Debug)]
struct World {
    machine: Machine,
    now: Duration,
    spawning: bool,
    /// The main process exists and has yet to execute its program.
    executing: bool,
    main: bool,
    stopping: bool,
    timer: Option<Duration>,
    /// Something of the service may live beside the main process.
    dirty: bool,
    spawns: usize,
    stops: Vec<bool>,
    /// Somebody waits for the outcome of a stop.
    owed: bool,
    closed_at: Option<usize>,
}

impl World {
    fn new(definition: &Definition) -> Self {
        Self {
            machine: Machine::new(definition, false),
            now: SECOND,
            spawning: false,
            executing: false,
            main: false,
            stopping: false,
            timer: None,
            dirty: false,
            spawns: 0,
            stops: Vec::new(),
            owed: false,
            closed_at: None,
        }
    }

    fn met(definition: &Definition) -> Self {
        let mut world = Self::new(definition);
        world.step(Input::Dependencies(Dependencies::Met));
        world
    }

    fn step(&mut self, input: Input) {
        if input == Input::Close {
            self.closed_at.get_or_insert(self.spawns);
        }
        self.owed |= matches!(input, Input::Stop | Input::Restart);
        let effects = self.machine.step(input, self.now);
        self.carry_out(effects);
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Spawn => {
                    assert!(
                        !self.spawning && !self.executing && !self.main && !self.stopping,
                        "{self:#?}"
                    );
                    assert!(
                        !self.dirty,
                        "created before a stop proved that nothing is left: {self:#?}"
                    );
                    assert_eq!(self.machine.target(), Target::Up);
                    assert_eq!(self.closed_at, None, "created after the end of all starts");
                    self.spawning = true;
                    self.spawns += 1;
                }
                Effect::Stop { gently } => {
                    assert!(!self.stopping && !self.spawning, "{self:#?}");
                    self.stopping = true;
                    self.stops.push(gently);
                }
                Effect::Timer(after) => {
                    assert_eq!(self.timer, None, "{self:#?}");
                    self.timer = Some(after);
                }
                Effect::NoTimer => assert!(self.timer.take().is_some(), "{self:#?}"),
            }
        }
        assert!(
            !self.owed || self.stopping || self.spawning,
            "a stop that was asked for does not come: {self:#?}"
        );
        assert_eq!(
            self.machine.wants_test(),
            self.machine.wants_test() && self.main,
            "{self:#?}"
        );
    }

    fn created(&mut self) {
        self.spawning = false;
        self.executing = true;
        self.dirty = true;
        self.step(Input::Created);
    }

    fn executed(&mut self) {
        self.executing = false;
        self.main = true;
        self.step(Input::Spawned);
    }

    fn spawned(&mut self) {
        self.created();
        self.executed();
    }

    fn spawn_denied(&mut self) {
        self.spawning = false;
        self.dirty = true;
        self.step(Input::SpawnDenied("no more descriptors".to_owned()));
    }

    fn spawn_failed(&mut self) {
        self.spawning = false;
        self.executing = false;
        self.dirty = true;
        self.step(Input::SpawnFailed);
    }

    fn ended(&mut self, fate: Fate) {
        self.executing = false;
        self.main = false;
        self.step(Input::Ended(Some(fate)));
    }

    /// The main process ends by the stop, and the stop is through.
    fn stopped(&mut self) {
        if self.main || self.executing {
            self.ended(Fate::Killed(15));
        }
        self.stopping = false;
        self.owed = false;
        self.dirty = false;
        self.step(Input::Stopped);
    }

    fn survived(&mut self) {
        self.stopping = false;
        self.owed = false;
        self.step(Input::Survived("pid 7".to_owned()));
    }

    fn unstopped(&mut self) {
        self.stopping = false;
        self.owed = false;
        self.step(Input::Unstopped("locked".to_owned()));
    }

    fn timer_over(&mut self) {
        self.now += self.timer.take().expect("a timer runs");
        self.step(Input::TimerOver);
    }

    /// The supervisor is killed, and another goes on with what it saved and what is found. `created`: a main process that was
    /// being created exists, which nothing that was saved tells of.
    fn crash(self, definition: &Definition, created: bool) -> Self {
        let created = created && self.spawning;
        let remains = match self {
            _ if created || self.executing || self.main => Remains::Main,
            _ if self.spawning || self.spawns == 0 => Remains::Nothing,
            _ => Remains::Ended(Some(Fate::Exited(1))),
        };
        let snapshot = self.machine.snapshot();
        let snapshot = if created { snapshot.of_later_run() } else { snapshot };
        let (machine, effects) = Machine::resume(definition, Some(snapshot), remains, self.now);
        let mut world = Self {
            machine,
            spawning: false,
            executing: false,
            main: remains == Remains::Main,
            stopping: false,
            timer: None,
            dirty: self.dirty || created,
            owed: false,
            ..self
        };
        world.carry_out(effects);
        world
    }

    fn state(&self) -> String {
        self.machine.state().to_string()
    }

    /// Lets the world do what is under way, whatever comes of it, until nothing is.
    fn settle(&mut self) {
        for _ in 0..20 {
            if self.spawning {
                self.created();
            } else if self.stopping {
                self.stopped();
            } else if self.executing {
                self.executed();
            } else {
                return;
            }
        }
        panic!("it does not come to rest: {self:#?}");
    }
}

#[test]
fn a_service_runs_and_is_restarted_only_after_a_proven_stop() {
    let mut world = World::met(&definition());
    assert_eq!(world.state(), "Unknown");
    world.step(Input::Start);
    assert_eq!(world.state(), "Blocked");
    world.spawned();
    assert_eq!(world.state(), "Running");
    world.ended(Fate::Exited(3));
    assert_eq!((world.state().as_str(), world.stopping), ("Error(exited 3)", true));
    world.stopped();
    assert_eq!((world.timer, world.spawns), (Some(2 * SECOND), 1));
    world.timer_over();
    assert_eq!(world.spawns, 2);
}

#[test]
fn a_test_makes_a_service_running() {
    let definition = Definition {
        test: Some(vec!["test".to_owned()]),
        ..definition()
    };
    let mut world = World::met(&definition);
    world.step(Input::Start);
    assert!(!world.machine.wants_test());
    world.spawned();
    assert_eq!(world.state(), "Spawned");
    assert!(world.machine.wants_test());
    world.step(Input::TestBroken);
    assert_eq!(world.state(), "TestFailure");
    assert!(world.machine.wants_test());
    world.step(Input::TestPassed);
    assert_eq!(world.state(), "Running");
    assert!(!world.machine.wants_test());
}

#[test]
fn a_oneshot_settles_and_runs_again_on_request_after_a_stop() {
    let definition = Definition {
        oneshot: true,
        ..definition()
    };
    let mut world = World::met(&definition);
    world.step(Input::Start);
    world.spawned();
    world.ended(Fate::Exited(0));
    assert_eq!(
        (world.state().as_str(), world.stopping, world.timer),
        ("Success", false, None)
    );
    world.step(Input::Start);
    assert!(world.stopping);
    world.stopped();
    assert_eq!(world.spawns, 2);
}

#[test]
fn what_cannot_be_started_fails_and_rests() {
    let mut world = World::met(&definition());
    world.step(Input::Start);
    world.spawn_failed();
    world.stopped();
    assert_eq!((world.state().as_str(), world.timer), ("Failure", None));
    world.step(Input::Start);
    assert_eq!(world.spawns, 2);
}

#[test]
fn what_the_machine_has_nothing_for_now_is_started_later() {
    let definition = Definition {
        restart: RestartPolicy {
            when: RestartWhen::Never,
            max_delay: 8 * SECOND,
            ..definition().restart
        },
        ..definition()
    };
    let mut world = World::met(&definition);
    world.step(Input::Start);
    for delay in [2, 4, 8, 8] {
        world.spawn_denied();
        world.stopped();
        let state = world.state();
        assert_eq!(
            (state.as_str(), world.timer),
            ("Error(failed to start: no more descriptors)", Some(delay * SECOND))
        );
        world.timer_over();
    }
    world.spawned();
    assert_eq!((world.state().as_str(), world.spawns), ("Running", 5));
}

#[test]
fn what_was_denied_is_not_started_after_a_stop_or_the_end() {
    for input in [Input::Stop, Input::Close] {
        let mut world = World::met(&definition());
        world.step(Input::Start);
        world.step(input);
        world.spawn_denied();
        world.stopped();
        assert_eq!((world.timer, world.spawning, world.spawns), (None, false, 1));
    }
}

#[test]
fn a_stop_while_blocked_takes_the_wish_back() {
    let mut world = World::new(&definition());
    world.step(Input::Start);
    assert_eq!(world.state(), "Blocked");
    world.step(Input::Stop);
    world.stopped();
    world.step(Input::Dependencies(Dependencies::Met));
    assert_eq!((world.state().as_str(), world.spawns), ("Unknown", 0));
    assert!(world.machine.is_forgettable());
}

#[test]
fn a_stop_during_a_start_takes_effect_when_it_can() {
    let mut world = World::met(&definition());
    world.step(Input::Start);
    world.step(Input::Stop);
    assert!(!world.stopping);
    world.spawned();
    assert!(world.stopping);
    world.stopped();
    assert_eq!((world.state().as_str(), world.spawns), ("Error(killed by SIGTERM)", 1));
}

#[test]
fn a_process_that_does_not_get_to_its_program_is_stopped_at_once() {
    let mut world = World::met(&definition());
    world.step(Input::Start);
    world.created();
    assert_eq!((world.state().as_str(), world.stopping), ("Blocked", false));
    world.step(Input::Stop);
    assert_eq!(world.stops, [true]);
    world.survived();
    assert_eq!((world.state().as_str(), world.timer), ("Error(pid 7)", Some(RETRY)));
    world.timer_over();
    world.stopped();
    assert_eq!(world.state(), "Error(killed by SIGTERM)");
    assert!(world.machine.is_forgettable());
}

#[test]
fn what_cannot_be_executed_fails_and_is_not_restarted() {
    let mut world = World::met(&definition());
    world.step(Input::Start);
    world.created();
    world.spawn_failed();
    world.stopped();
    assert_eq!((world.state().as_str(), world.timer), ("Failure", None));
}

#[test]
fn a_start_after_a_stop_during_a_start_takes_both() {
    let mut world = World::met(&definition());
    for input in [Input::Start, Input::Stop, Input::Start] {
        world.step(input);
    }
    world.spawned();
    assert!(world.stopping);
    world.stopped();
    assert_eq!(world.spawns, 2);
}

#[test]
fn a_stop_in_the_restart_gap_cancels_the_restart() {
    let mut world = World::met(&definition());
    world.step(Input::Start);
    world.spawned();
    world.ended(Fate::Exited(0));
    world.stopped();
    world.step(Input::Stop);
    assert_eq!((world.timer, world.stopping), (None, true));
    world.stopped();
    assert!(world.machine.is_forgettable());
}

#[test]
fn a_start_during_a_stop_starts_when_it_is_proven() {
    let mut world = World::met(&definition());
    world.step(Input::Start);
    world.spawned();
    world.step(Input::Stop);
    world.step(Input::Stop);
    world.step(Input::Start);
    assert_eq!((world.spawns, world.stops.len()), (1, 1));
    assert!(!world.machine.is_forgettable());
    world.stopped();
    assert_eq!(world.spawns, 2);
}

#[test]
fn a_stop_during_the_stop_after_a_crash_prevents_the_restart() {
    let mut world = World::met(&definition());
    world.step(Input::Start);
    world.spawned();
    world.ended(Fate::Killed(11));
    world.step(Input::Stop);
    world.stopped();
    assert_eq!(
        (world.timer, world.state().as_str()),
        (None, "Error(killed by SIGSEGV)")
    );
}

#[test]
fn survivors_show_and_are_tried_again_without_grace() {
    let mut world = World::met(&definition());
    world.step(Input::Start);
    world.spawned();
    world.step(Input::Restart);
    world.survived();
    assert_eq!((world.state().as_str(), world.timer), ("Error(pid 7)", Some(RETRY)));
    world.timer_over();
    assert_eq!((world.stops.as_slice(), world.spawns), ([true, false].as_slice(), 1));
    world.stopped();
    assert_eq!(world.spawns, 2);
}

#[test]
fn a_stop_that_could_not_begin_is_tried_again_with_its_grace_period() {
    let mut world = World::met(&definition());
    world.step(Input::Start);
    world.spawned();
    world.step(Input::Stop);
    world.unstopped();
    assert_eq!((world.state().as_str(), world.timer), ("Error(locked)", Some(RETRY)));
    world.timer_over();
    world.unstopped();
    world.step(Input::Stop);
    world.survived();
    world.timer_over();
    assert_eq!(world.stops, [true, true, true, false]);
}

#[test]
fn a_cycle_shows_until_it_is_broken() {
    let mut world = World::new(&definition());
    world.step(Input::Start);
    world.step(Input::Dependencies(Dependencies::Cycle("a → b → a".to_owned())));
    assert_eq!(world.state(), "Error(dependency cycle: a → b → a)");
    world.step(Input::Dependencies(Dependencies::Unmet));
    assert_eq!(world.state(), "Blocked");
    world.step(Input::Dependencies(Dependencies::Met));
    assert_eq!(world.spawns, 1);
}

#[test]
fn delays_double_up_to_the_most_and_begin_anew_after_a_long_life() {
    let mut definition = definition();
    definition.restart.delay = SECOND;
    definition.restart.max_delay = 5 * SECOND;
    let mut world = World::met(&definition);
    world.step(Input::Start);
    let mut delays = Vec::new();
    for lived in [0, 0, 0, 0, 6, 0] {
        world.spawned();
        world.now += lived * SECOND;
        world.ended(Fate::Exited(1));
        world.stopped();
        delays.push(world.timer.expect("it is restarted").as_secs());
        world.timer_over();
    }
    assert_eq!(delays, [1, 2, 4, 5, 1, 2]);
}

#[test]
fn too_many_restarts_within_the_window_are_a_failure() {
    let mut definition = definition();
    definition.restart.limit = Some(RestartLimit {
        restarts: 2,
        window: 10 * SECOND,
    });
    let mut world = World::met(&definition);
    world.step(Input::Start);
    for _ in 0..2 {
        world.spawned();
        world.ended(Fate::Exited(1));
        world.stopped();
        world.timer_over();
    }
    world.spawned();
    world.ended(Fate::Exited(1));
    world.stopped();
    assert_eq!((world.state().as_str(), world.timer), ("Failure", None));
    world.step(Input::Start);
    world.spawned();
    world.ended(Fate::Exited(1));
    world.stopped();
    assert_eq!(world.timer, Some(2 * SECOND), "a start on request counts anew");
}

#[test]
fn the_policy_decides_about_a_restart() {
    for (when, fate, restarted) in [
        (RestartWhen::Always, Fate::Exited(0), true),
        (RestartWhen::OnFailure, Fate::Exited(0), false),
        (RestartWhen::OnFailure, Fate::Exited(1), true),
        (RestartWhen::OnFailure, Fate::Killed(9), true),
        (RestartWhen::Never, Fate::Exited(1), false),
    ] {
        let mut definition = definition();
        definition.restart.when = when;
        let mut world = World::met(&definition);
        world.step(Input::Start);
        world.spawned();
        world.ended(fate);
        world.stopped();
        assert_eq!(world.timer.is_some(), restarted, "{when:?} {fate:?}");
    }
}

/// What can happen at random; what cannot happen now is left out.
#[derive(Clone, Debug)]
enum Event {
    Client(Input),
    World(Index),
    Pass(Duration),
}

fn event() -> impl Strategy<Value = Event> {
    let client = select(vec![
        Input::Start,
        Input::Start,
        Input::Stop,
        Input::Restart,
        Input::Close,
        Input::Dependencies(Dependencies::Met),
        Input::Dependencies(Dependencies::Met),
        Input::Dependencies(Dependencies::Unmet),
        Input::Dependencies(Dependencies::Cycle("a → a".to_owned())),
    ]);
    prop_oneof![
        4 => client.prop_map(Event::Client),
        8 => any::<Index>().prop_map(Event::World),
        1 => (0..20_000u64).prop_map(|millis| Event::Pass(Duration::from_millis(millis))),
    ]
}

fn any_definition() -> impl Strategy<Value = Definition> {
    let when = select(vec![RestartWhen::Always, RestartWhen::OnFailure, RestartWhen::Never]);
    (
        any::<bool>(),
        any::<bool>(),
        when,
        proptest::option::of(0..4u32),
        1..4u32,
    )
        .prop_map(|(oneshot, tested, when, limit, growth)| Definition {
            oneshot,
            test: tested.then(|| vec!["test".to_owned()]),
            restart: RestartPolicy {
                when,
                delay: SECOND,
                max_delay: growth * SECOND,
                limit: limit.map(|restarts| RestartLimit {
                    restarts,
                    window: 10 * SECOND,
                }),
            },
            ..definition()
        })
}

impl World {
    /// One of the things that the world can do now.
    fn happen(&mut self, which: &Index) {
        let mut possible: Vec<fn(&mut Self)> = Vec::new();
        if self.spawning {
            possible.push(Self::created);
            possible.push(Self::spawn_failed);
            possible.push(Self::spawn_denied);
        }
        if self.executing {
            possible.push(Self::executed);
            possible.push(Self::spawn_failed);
            possible.push(|world| world.ended(Fate::Killed(9)));
        }
        if self.main && !self.spawning {
            possible.push(|world| world.ended(Fate::Exited(0)));
            possible.push(|world| world.ended(Fate::Exited(1)));
            possible.push(|world| world.ended(Fate::Killed(9)));
            possible.push(|world| world.step(Input::TestPassed));
            possible.push(|world| world.step(Input::TestBroken));
        }
        if self.stopping {
            possible.push(Self::stopped);
            possible.push(Self::survived);
            possible.push(Self::unstopped);
        }
        if self.timer.is_some() {
            possible.push(Self::timer_over);
        }
        if !possible.is_empty() {
            which.get(&possible)(self);
        }
    }

    fn check(&self) {
        let state = self.machine.state();
        let active = matches!(state, State::Spawned | State::Running | State::TestFailure);
        let stuck = matches!(self.machine.phase, Phase::Stuck(..));
        assert_eq!(
            active,
            self.main && !stuck,
            "{state} with a living main process? {self:#?}"
        );
        if self.machine.is_forgettable() {
            let under_way = self.spawning || self.executing || self.stopping || self.timer.is_some();
            assert!(!self.main && !self.dirty && !under_way);
        }
        if self.machine.phase == Phase::Delayed {
            assert!(self.timer.is_some() && !self.dirty);
        }
        let executing = self.machine.phase == Phase::Executing;
        assert!(!executing || self.executing, "{self:#?}");
        let under_way = self.spawning || executing || self.stopping || self.machine.phase == Phase::Delayed;
        assert_eq!(self.machine.is_at_rest(), !under_way, "{self:#?}");
    }
}

#[test]
fn what_the_books_missed_is_looked_for_by_a_stop_before_anything_else() {
    let resume = |snapshot| {
        let (machine, effects) = Machine::resume(&definition(), snapshot, Remains::Entry, Duration::ZERO);
        assert_eq!(effects, [Effect::Stop { gently: true }]);
        machine.phase
    };
    let of = |doing| Snapshot {
        doing,
        ..Snapshot::WANTED
    };
    assert_eq!(resume(None), Phase::Stopping(Then::Start));
    for doing in [Doing::Running, Doing::Waiting, Doing::Stopping(Then::Start)] {
        assert_eq!(resume(Some(of(doing))), Phase::Stopping(Then::Start));
    }
    for doing in [Doing::Nothing, Doing::Settled, Doing::Stopping(Then::Rest)] {
        assert_eq!(resume(Some(of(doing))), Phase::Stopping(Then::Rest));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_sequence_of_events_breaks_the_invariants(
        definition in any_definition(),
        occupied in any::<bool>(),
        events in proptest::collection::vec(event(), 0..60),
    ) {
        let mut world = World::new(&definition);
        if occupied {
            world.machine = Machine::new(&definition, true);
            world.dirty = true;
        }
        for event in &events {
            match event {
                Event::Client(input) => world.step(input.clone()),
                Event::World(which) => world.happen(which),
                Event::Pass(time) => world.now += *time,
            }
            world.check();
        }
        // Whatever happened, a stop brings it down, and a stop is answered.
        world.step(Input::Stop);
        prop_assert!(world.stopping || world.spawning);
        world.settle();
        prop_assert!(world.machine.is_forgettable(), "{world:#?}");
        prop_assert_eq!(world.timer, None);
        // And unless starts are over, a start brings it up.
        let before = world.spawns;
        world.step(Input::Dependencies(Dependencies::Met));
        world.step(Input::Start);
        world.settle();
        prop_assert_eq!(world.spawns > before, world.closed_at.is_none());
    }

    #[test]
    fn no_crash_breaks_the_invariants_or_forgets_a_wish(
        definition in any_definition(),
        before in proptest::collection::vec(event(), 0..30),
        created in any::<bool>(),
        after in proptest::collection::vec(event(), 0..30),
    ) {
        let mut world = World::new(&definition);
        for event in &before {
            match event {
                // The end of a supervisor is no wish about a service, and is not saved.
                Event::Client(Input::Close) => {}
                Event::Client(input) => world.step(input.clone()),
                Event::World(which) => world.happen(which),
                Event::Pass(time) => world.now += *time,
            }
        }
        let (target, state, at_rest) = (world.machine.target(), world.machine.state(), world.machine.is_at_rest());
        let blocked = world.machine.phase == Phase::Waiting;
        let stuck = matches!(world.machine.phase, Phase::Stuck(..));
        let mut world = world.crash(&definition, created);
        world.check();
        prop_assert_eq!(world.machine.target(), target);
        if at_rest && !blocked && !stuck {
            prop_assert_eq!(world.machine.state(), state);
        }
        for event in &after {
            match event {
                Event::Client(input) => world.step(input.clone()),
                Event::World(which) => world.happen(which),
                Event::Pass(time) => world.now += *time,
            }
            world.check();
        }
        world.step(Input::Stop);
        world.settle();
        prop_assert!(world.machine.is_forgettable(), "{world:#?}");
    }

    #[test]
    fn the_last_wish_counts(wishes in proptest::collection::vec(select(vec![Input::Start, Input::Stop, Input::Restart]), 1..6), early in 0..3usize) {
        let mut world = World::met(&definition());
        for (index, wish) in wishes.iter().enumerate() {
            world.step(wish.clone());
            if index == early {
                world.settle();
            }
        }
        world.settle();
        let up = wishes.last() != Some(&Input::Stop);
        prop_assert_eq!(world.main, up);
        prop_assert_eq!(world.machine.target() == Target::Up, up);
    }
}
