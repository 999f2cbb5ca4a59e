//! One task a service: owns its state, does what the machine says, and tells the registry.

use std::{
    future::pending,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::future::join_all;
use nix::sys::signal::Signal;
use tokio::{
    sync::{mpsc, watch},
    task::{JoinError, JoinHandle},
    time::{Instant, sleep_until, timeout},
};

use super::{
    SupervisorError,
    children::OwnChild,
    command::{Context, SpawnError, Started, enter, enter_anew, in_turn, leave, spawn},
    definition::Definition,
    error,
    handle::{Reply, Stats},
    logs::{Capture, LogError, Stream},
    machine::{Dependencies, Effect, Input, Machine},
    main_process::{Inherited, MainProcess},
    meter::Meter,
    resume::Resumed,
    state::{State, Target},
    state_files::{Run, Saved},
    terminate::{PATIENCE, blocking, kill_wait_enhanced},
};
use crate::{
    process::{Execution, Launched},
    stop::{Fate, StopError, StopReport},
    tracker::{Service, TrackerError},
};

/// How long after a test that failed it is run again.
const TEST_AGAIN: Duration = Duration::from_secs(2);

/// How long whoever waits for an answer waits for what is saved.
const SAVE_PATIENCE: Duration = Duration::from_secs(2);

/// What a service is told.
#[derive(Debug)]
pub(super) enum Message {
    Start(Reply<()>),
    Stop(Reply<StopReport>),
    Restart(Reply<StopReport>),
    Kill(Signal, Reply<()>),
    Stats(Reply<Stats>),
    Forget(Reply<()>),
    /// Another definition, from the next start on.
    Redefine(Arc<Definition>),
    Dependencies(Dependencies),
    /// Nothing starts any more.
    Close,
}

/// What a service tells the registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Announcement {
    pub(super) state: State,
    pub(super) target: Target,
    /// The main process; 0: none.
    pub(super) pid: u32,
    /// Whether those who depend on it may start.
    pub(super) ready: bool,
}

/// What the registry gets from services.
#[derive(Debug)]
pub(super) enum News {
    Changed(String, Announcement),
    Forgotten(String, Reply<()>),
}

/// A service of which nothing is known yet.
pub(super) const UNKNOWN: Announcement = Announcement {
    state: State::Unknown,
    target: Target::Down,
    pid: 0,
    ready: false,
};

/// One service.
#[derive(Debug)]
pub(super) struct Task {
    name: String,
    context: Arc<Context>,
    definition: Arc<Definition>,
    /// Holds from the next start on.
    next_definition: Option<Arc<Definition>>,
    machine: Machine,
    mailbox: mpsc::UnboundedReceiver<Message>,
    news: mpsc::UnboundedSender<News>,
    announced: watch::Sender<Announcement>,
    /// As it is in the books, once it was entered there.
    service: Option<Service>,
    main: Option<MainProcess>,
    /// The main process in the books, and its pipes.
    run: Option<Run>,
    /// What is to be done first.
    resumed: Option<(Box<Resumed>, Vec<Effect>)>,
    /// What was saved last.
    saved: Option<Saved>,
    /// Nothing is saved any more: what the end does is not what anybody wanted of the service.
    closed: bool,
    /// Until the main process executes its program.
    execution: Option<Execution>,
    captures: Vec<Capture>,
    spawning: Option<JoinHandle<Result<Started, SpawnError>>>,
    stopping: Option<Job<Result<StopReport, StopError>>>,
    tester: Tester,
    timer: Option<Instant>,
    waiting: Vec<Reply<StopReport>>,
    meter: Arc<Mutex<Meter>>,
    forgotten: bool,
}

/// The test command.
#[derive(Debug)]
enum Tester {
    Idle,
    Until(Instant),
    Starting(JoinHandle<Result<Started, SpawnError>>),
    Executing(Box<(OwnChild, Execution)>),
    Running(OwnChild),
}

/// A job that ends with its service.
#[derive(Debug)]
struct Job<T>(JoinHandle<T>);

impl<T> Drop for Job<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What wakes the task.
enum Happened {
    Message(Message),
    Spawned(Result<Result<Started, SpawnError>, JoinError>),
    Launched(Launched),
    Stopped(Result<Result<StopReport, StopError>, JoinError>),
    MainEnded(Option<Fate>),
    TimeOver,
    Test(TestEvent),
}

enum TestEvent {
    Due,
    Started(Box<Result<Result<Started, SpawnError>, JoinError>>),
    Launched(Launched),
    Ended(Option<Fate>),
}

impl Tester {
    /// Cancel-safe.
    async fn next(&mut self) -> TestEvent {
        match self {
            Self::Idle => pending().await,
            Self::Until(time) => {
                sleep_until(*time).await;
                TestEvent::Due
            }
            Self::Starting(job) => TestEvent::Started(Box::new(job.await)),
            Self::Executing(test) => TestEvent::Launched(test.1.outcome().await),
            Self::Running(child) => TestEvent::Ended(child.ended().await),
        }
    }
}

async fn spawned(job: &mut Option<JoinHandle<Result<Started, SpawnError>>>) -> Happened {
    match job {
        Some(job) => Happened::Spawned(job.await),
        None => pending().await,
    }
}

async fn launched(execution: &mut Option<Execution>) -> Happened {
    match execution {
        Some(execution) => Happened::Launched(execution.outcome().await),
        None => pending().await,
    }
}

async fn stopped(job: &mut Option<Job<Result<StopReport, StopError>>>) -> Happened {
    match job {
        Some(job) => Happened::Stopped((&mut job.0).await),
        None => pending().await,
    }
}

async fn main_ended(main: &mut Option<MainProcess>) -> Happened {
    match main {
        Some(main) => Happened::MainEnded(main.ended().await),
        None => pending().await,
    }
}

async fn time_over(timer: Option<Instant>) -> Happened {
    match timer {
        Some(time) => {
            sleep_until(time).await;
            Happened::TimeOver
        }
        None => pending().await,
    }
}

/// What a task begins with.
#[derive(Debug)]
pub(super) enum Beginning {
    /// Nothing of the service runs.
    Empty,
    /// An earlier task or supervisor may have left processes of it.
    Occupied,
    /// An earlier supervisor was killed, and this goes on where that was.
    Resumed(Box<Resumed>),
}

/// Tells whoever asked, if they still wait.
pub(super) fn answer<T>(reply: Reply<T>, result: Result<T, SupervisorError>) {
    if reply.send(result).is_err() {
        tracing::debug!("whoever asked does not wait for the answer");
    }
}

impl Task {
    pub(super) fn new(
        name: String,
        context: Arc<Context>,
        definition: Arc<Definition>,
        beginning: Beginning,
        mailbox: mpsc::UnboundedReceiver<Message>,
        (announced, news): (watch::Sender<Announcement>, mpsc::UnboundedSender<News>),
    ) -> Self {
        let (machine, resumed) = match beginning {
            Beginning::Empty => (Machine::new(&definition, false), None),
            Beginning::Occupied => (Machine::new(&definition, true), None),
            Beginning::Resumed(mut resumed) => {
                let (snapshot, now) = (resumed.snapshot.take(), context.epoch.elapsed());
                let (machine, effects) = Machine::resume(&definition, snapshot, resumed.remains, now);
                (machine, Some((resumed, effects)))
            }
        };
        Self {
            machine,
            run: None,
            resumed,
            saved: None,
            closed: false,
            name,
            context,
            definition,
            next_definition: None,
            mailbox,
            news,
            announced,
            service: None,
            main: None,
            execution: None,
            captures: Vec::new(),
            spawning: None,
            stopping: None,
            tester: Tester::Idle,
            timer: None,
            waiting: Vec::new(),
            meter: Arc::default(),
            forgotten: false,
        }
    }

    /// Runs until nobody can send a message any more.
    pub(super) async fn run(mut self) {
        if let Some((resumed, effects)) = self.resumed.take() {
            self.resume(*resumed);
            self.carry_out(effects);
        }
        loop {
            let happened = tokio::select! {
                message = self.mailbox.recv() => match message {
                    Some(message) => Happened::Message(message),
                    None => return,
                },
                spawned = spawned(&mut self.spawning) => spawned,
                launched = launched(&mut self.execution) => launched,
                stopped = stopped(&mut self.stopping) => stopped,
                // How the execution went is known when it has ended, at the latest, and comes first.
                ended = main_ended(&mut self.main), if self.execution.is_none() => ended,
                over = time_over(self.timer) => over,
                test = self.tester.next() => Happened::Test(test),
            };
            match happened {
                Happened::Message(message) => self.message(message).await,
                Happened::Spawned(result) => self.spawned(result),
                Happened::Launched(outcome) => self.launched(outcome),
                Happened::Stopped(result) => self.stopped(result).await,
                Happened::MainEnded(fate) => self.main_ended(fate),
                Happened::TimeOver => {
                    self.timer = None;
                    self.step(Input::TimerOver);
                }
                Happened::Test(event) => self.test(event),
            }
        }
    }

    /// Takes up what there is of a service that an earlier supervisor kept.
    fn resume(&mut self, resumed: Resumed) {
        let name: Arc<str> = self.name.as_str().into();
        for (stream, pipe) in resumed.run.iter().flat_map(|run| &run.pipes) {
            match self.context.logs.recapture(&name, *stream, *pipe, &resumed.members) {
                Ok(capture) => self.captures.push(capture),
                // It went with the last process that had it.
                Err(error @ LogError::NoPipe { .. }) => tracing::debug!(service = self.name, %error),
                Err(error) => tracing::warn!(
                    service = self.name,
                    reason = chain(&error),
                    "some of its output is lost"
                ),
            }
        }
        self.run = resumed.run;
        self.service = resumed.service;
        let Some((pid, key, process)) = resumed.main else {
            return;
        };
        match Inherited::new(&self.context, pid, key, process) {
            Ok(main) => {
                tracing::info!(service = self.name, pid, "runs since before, and is supervised again");
                self.main = Some(MainProcess::Inherited(main));
            }
            Err(error) => {
                tracing::error!(service = self.name, pid, %error, "the end of its main process will not be seen")
            }
        }
    }

    async fn message(&mut self, message: Message) {
        let gone = || SupervisorError::ServiceNotFound {
            service: self.name.clone(),
        };
        if self.forgotten {
            // Sent before the registry knew.
            match message {
                Message::Start(reply) | Message::Kill(_, reply) | Message::Forget(reply) => answer(reply, Err(gone())),
                Message::Stop(reply) | Message::Restart(reply) => answer(reply, Err(gone())),
                Message::Stats(reply) => answer(reply, Err(gone())),
                Message::Redefine(_) | Message::Dependencies(_) | Message::Close => {}
            }
            return;
        }
        match message {
            Message::Start(reply) => {
                self.step(Input::Start);
                self.state_saved().await;
                answer(reply, Ok(()));
            }
            Message::Stop(reply) => {
                self.waiting.push(reply);
                self.step(Input::Stop);
            }
            Message::Restart(reply) => {
                self.waiting.push(reply);
                self.step(Input::Restart);
            }
            Message::Kill(signal, reply) => answer(reply, self.kill(signal)),
            Message::Stats(reply) => self.stats(reply),
            Message::Forget(reply) => self.forget(reply).await,
            Message::Redefine(definition) => self.next_definition = Some(definition),
            Message::Dependencies(dependencies) => self.step(Input::Dependencies(dependencies)),
            Message::Close => {
                self.closed = true;
                self.step(Input::Close);
            }
        }
    }

    /// Lets the machine take in what happened, does what it asks for, and announces what is new.
    fn step(&mut self, input: Input) {
        let effects = self.machine.step(input, self.context.epoch.elapsed());
        self.carry_out(effects);
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Spawn => self.spawn(),
                Effect::Stop { gently } => self.stop(gently),
                Effect::Timer(after) => self.timer = Instant::now().checked_add(after),
                Effect::NoTimer => self.timer = None,
            }
        }
        self.keep_testing();
        self.save();
        self.announce();
    }

    /// Gives what is new to be saved.
    fn save(&mut self) {
        let Some(state) = self.context.state.as_ref().filter(|_| !self.closed) else {
            return;
        };
        let snapshot = self.machine.snapshot();
        let is_new = self.saved.as_ref().is_none_or(|saved| {
            saved.snapshot != snapshot || saved.run != self.run || saved.definition != *self.definition
        });
        if is_new {
            let saved = Saved {
                definition: Definition::clone(&self.definition),
                snapshot,
                run: self.run.clone(),
            };
            state.save(&self.name, Some(saved.clone()));
            self.saved = Some(saved);
        }
    }

    /// Waits until what was given to be saved is: whoever is answered can count on it. A disk that hangs is not waited for.
    async fn state_saved(&self) {
        if let Some(state) = &self.context.state
            && timeout(SAVE_PATIENCE, state.settled()).await.is_err()
        {
            tracing::warn!(
                service = self.name,
                "its state is not saved yet: the disk does not answer"
            );
        }
    }

    fn announce(&mut self) {
        let state = self.machine.state();
        let announcement = Announcement {
            ready: match state {
                State::Running => !self.definition.oneshot,
                State::Success => self.definition.oneshot,
                _ => false,
            },
            state,
            target: self.machine.target(),
            pid: self.main.as_ref().and_then(MainProcess::pid).unwrap_or(0),
        };
        if announcement == *self.announced.borrow() {
            return;
        }
        tracing::info!(service = self.name, state = %announcement.state, target = %announcement.target, pid = announcement.pid);
        self.announced.send_replace(announcement.clone());
        self.tell(News::Changed(self.name.clone(), announcement));
    }

    fn tell(&self, news: News) {
        if self.news.send(news).is_err() {
            tracing::debug!(service = self.name, "the supervisor ends");
        }
    }

    fn spawn(&mut self) {
        if let Some(definition) = self.next_definition.take() {
            self.machine.redefine(&definition);
            self.definition = definition;
        }
        let (context, definition, name) = self.for_job();
        let known = self.service.take();
        self.spawning = Some(in_turn(&context, move |context| {
            let service = enter_anew(&context.tracker, &name, known)?;
            context.logs.mark_start(&name);
            spawn(context, service, &definition, &definition.exec)
        }));
    }

    fn for_job(&self) -> (Arc<Context>, Arc<Definition>, String) {
        (
            Arc::clone(&self.context),
            Arc::clone(&self.definition),
            self.name.clone(),
        )
    }

    fn spawned(&mut self, result: Result<Result<Started, SpawnError>, JoinError>) {
        self.spawning = None;
        match self.started(result) {
            Ok(started) => {
                self.run = started.run();
                self.service = Some(started.service);
                self.main = Some(MainProcess::Own(started.child));
                self.execution = Some(started.execution);
                self.captures = started.captures;
                self.step(Input::Created);
            }
            Err(Some(passing)) => self.step(Input::SpawnDenied(passing)),
            Err(None) => self.step(Input::SpawnFailed),
        }
    }

    fn launched(&mut self, outcome: Launched) {
        self.execution = None;
        match outcome {
            Launched::Executed => self.step(Input::Spawned),
            Launched::Failed(error) => {
                self.not_started(&chain(&error));
                if let Some(main) = self.main.take() {
                    see_off(main);
                }
                self.step(Input::SpawnFailed);
            }
            // Its end says how.
            Launched::Died => {}
        }
    }

    /// The process that was started; says why if none was, and returns the reason if it may pass.
    fn started(&self, result: Result<Result<Started, SpawnError>, JoinError>) -> Result<Started, Option<String>> {
        let (reason, passing) = match result {
            Ok(Ok(started)) => return Ok(started),
            Ok(Err(error)) => (chain(&error), error::may_pass(&error)),
            Err(error) => (error.to_string(), false),
        };
        self.not_started(&reason);
        Err(passing.then_some(reason))
    }

    fn not_started(&self, reason: &str) {
        tracing::error!(service = self.name, reason, "failed to start");
        let line = format!("zinit: failed to start: {reason}");
        self.context.logs.line(&self.name, Stream::Err, line.as_bytes());
    }

    fn stop(&mut self, gently: bool) {
        let (context, definition, name) = self.for_job();
        let main = self.main.as_ref().and_then(MainProcess::pid);
        let known = self.service.clone();
        // A test that is being started joins the service before the stop begins, or not at all.
        let test = match std::mem::replace(&mut self.tester, Tester::Idle) {
            Tester::Starting(job) => Some(job),
            Tester::Executing(test) => {
                see_off(MainProcess::Own(test.0));
                None
            }
            Tester::Running(child) => {
                see_off(MainProcess::Own(child));
                None
            }
            Tester::Idle | Tester::Until(_) => None,
        };
        self.stopping = Some(Job(tokio::spawn(async move {
            if let Some(Ok(Ok(started))) = match test {
                Some(job) => Some(job.await),
                None => None,
            } {
                see_off(MainProcess::Own(started.child));
            }
            kill_wait_enhanced(&context, (name, known), definition, main, gently).await
        })));
    }

    async fn stopped(&mut self, result: Result<Result<StopReport, StopError>, JoinError>) {
        self.stopping = None;
        match result {
            Ok(Ok(report)) => {
                self.see_main_off().await;
                let captures = std::mem::take(&mut self.captures);
                join_all(captures.iter().map(Capture::settle)).await;
                if !report.proven {
                    let doubts: Vec<_> = report.doubts.iter().map(ToString::to_string).collect();
                    tracing::warn!(service = self.name, doubts = doubts.join("; "), "down, but not proven");
                }
                self.step(Input::Stopped);
                self.state_saved().await;
                self.answer_all(|| Ok(report.clone()));
            }
            Ok(Err(StopError::Survivors(report))) => {
                let who = error::survivors(&report.survivors);
                tracing::error!(service = self.name, "not down: {who}");
                self.step(Input::Survived(who));
                self.answer_all(|| Err(SupervisorError::Survivors(report.clone())));
            }
            Ok(Err(error)) => {
                let reason = chain(&error);
                tracing::error!(service = self.name, reason, "failed to stop");
                let state = format!("failed to stop: {reason}");
                self.step(match error {
                    StopError::Tracker(TrackerError::Locked) => Input::Unstopped(state),
                    _ => Input::Survived(state),
                });
                let source = Arc::new(error);
                let service = self.name.clone();
                self.answer_all(|| {
                    Err(SupervisorError::Stop {
                        service: service.clone(),
                        source: Arc::clone(&source),
                    })
                });
            }
            Err(error) => {
                tracing::error!(service = self.name, %error, "a stop broke off");
                self.step(Input::Survived("a stop broke off".to_owned()));
                // Those who wait get the outcome of the next.
            }
        }
    }

    fn answer_all(&mut self, result: impl Fn() -> Result<StopReport, SupervisorError>) {
        for reply in std::mem::take(&mut self.waiting) {
            answer(reply, result());
        }
    }

    /// After a stop the main process is dead, unless somebody has released it.
    async fn see_main_off(&mut self) {
        self.execution = None;
        let Some(mut main) = self.main.take() else {
            return;
        };
        match main.has_ended().await {
            Some(fate) => self.step(Input::Ended(fate)),
            None => {
                tracing::warn!(
                    service = self.name,
                    pid = main.pid(),
                    "was released from the service and runs on"
                );
                see_off(main);
                self.step(Input::Ended(None));
            }
        }
    }

    fn main_ended(&mut self, fate: Option<Fate>) {
        self.main = None;
        let how = fate.map_or_else(|| "nobody knows how".to_owned(), |fate| fate.to_string());
        tracing::info!(service = self.name, how, "the main process has ended");
        self.step(Input::Ended(fate));
    }

    /// Runs the test while the machine wants it.
    fn keep_testing(&mut self) {
        let wanted = self.machine.wants_test();
        match self.tester {
            Tester::Idle if wanted => self.run_test(),
            Tester::Until(_) if !wanted => self.tester = Tester::Idle,
            _ => {}
        }
    }

    fn run_test(&mut self) {
        let (context, definition, name) = self.for_job();
        let known = self.service.clone();
        self.tester = Tester::Starting(in_turn(&context, move |context| {
            let service = enter(&context.tracker, &name, known)?;
            let test = definition.test.as_deref().unwrap_or_default();
            spawn(context, service, &definition, test)
        }));
    }

    fn test(&mut self, event: TestEvent) {
        let again = Tester::Until(Instant::now() + TEST_AGAIN);
        match event {
            TestEvent::Due => self.run_test(),
            TestEvent::Started(result) => match self.started(*result) {
                Ok(started) => self.tester = Tester::Executing(Box::new((started.child, started.execution))),
                Err(Some(_)) => self.tester = again,
                Err(None) => {
                    self.tester = again;
                    self.step(Input::TestBroken);
                }
            },
            TestEvent::Launched(outcome) => {
                let Tester::Executing(test) = std::mem::replace(&mut self.tester, again) else {
                    return;
                };
                match outcome {
                    Launched::Executed | Launched::Died => self.tester = Tester::Running(test.0),
                    Launched::Failed(error) => {
                        self.not_started(&chain(&error));
                        see_off(MainProcess::Own(test.0));
                        self.step(Input::TestBroken);
                    }
                }
            }
            TestEvent::Ended(Some(Fate::Exited(0))) => {
                self.tester = Tester::Idle;
                self.step(Input::TestPassed);
            }
            TestEvent::Ended(fate) => {
                tracing::debug!(service = self.name, ?fate, "the test failed");
                self.tester = again;
                self.keep_testing();
            }
        }
    }

    fn kill(&self, signal: Signal) -> Result<(), SupervisorError> {
        let down = || SupervisorError::ServiceIsDown {
            service: self.name.clone(),
        };
        let failed = |source| SupervisorError::Signal {
            service: self.name.clone(),
            source,
        };
        let main = self.main.as_ref().ok_or_else(down)?;
        if main.signal(signal).map_err(failed)? {
            Ok(())
        } else {
            Err(down())
        }
    }

    fn stats(&self, reply: Reply<Stats>) {
        let name = self.name.clone();
        let Some(main) = self.main.as_ref().and_then(MainProcess::pid) else {
            return answer(reply, Err(SupervisorError::ServiceIsDown { service: name }));
        };
        let (context, meter, known) = (Arc::clone(&self.context), Arc::clone(&self.meter), self.service.clone());
        tokio::task::spawn_blocking(move || {
            let mut meter = meter.lock().unwrap_or_else(PoisonError::into_inner);
            let stats = enter(&context.tracker, &name, known)
                .and_then(|service| meter.measure(&context.tracker, &service, main))
                .map_err(|source| SupervisorError::Tracker {
                    service: name,
                    source: Box::new(source),
                });
            answer(reply, stats);
        });
    }

    async fn forget(&mut self, reply: Reply<()>) {
        let service = self.name.clone();
        if !self.machine.is_forgettable() {
            return answer(reply, Err(SupervisorError::ServiceIsUp { service }));
        }
        let (name, known) = (service.clone(), self.service.take());
        let leaving = blocking(&self.context, move |context| leave(&context.tracker, &name, known));
        let left = timeout(PATIENCE, leaving).await;
        if let Err(source) = left.unwrap_or(Err(TrackerError::Locked)) {
            let source = Box::new(source);
            return answer(reply, Err(SupervisorError::Tracker { service, source }));
        }
        self.forgotten = true;
        if let Some(state) = &self.context.state {
            state.save(&self.name, None);
        }
        self.state_saved().await;
        self.tell(News::Forgotten(service, reply));
    }
}

/// Waits for a process whose end matters to nobody.
fn see_off(mut child: MainProcess) {
    tokio::spawn(async move {
        child.ended().await;
    });
}

/// An error and what caused it, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let causes: Vec<_> = causes.map(ToString::to_string).collect();
    causes.join(": ")
}
