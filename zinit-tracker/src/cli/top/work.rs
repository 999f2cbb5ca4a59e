//! What is done beside drawing, each on a thread of its own: reading keys, signals and the books, and what the user wants done.
//!
//! Whoever has something to say sends a message; the queue is short, so that none runs ahead of the screen.

use std::{
    collections::HashMap,
    iter,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Weak,
        mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ratatui::crossterm::event::{self, Event};
use signal_hook::iterator::Signals;
use tokio::{sync::oneshot, time::MissedTickBehavior};
use zinit_tracker::{
    Member, Service, ServiceId, ServiceInfo, StopPolicy, StopReport, Tracker, process::ProcessKey, stop::dry_run,
    tracker::Escape,
};

use super::{
    sample::{Load, Sampler, Snapshot, Wanted},
    told,
};
use crate::cli::{events, runtime, stop};

/// How many messages wait at most.
pub(super) const QUEUE: usize = 64;
/// After a look for escapes, which is at every process of the machine, comes so many times as long without one.
const REST_AFTER_LOOK: u32 = 120;
/// How often events are passed on to the screen.
const EVENTS_EVERY: Duration = Duration::from_millis(100);

/// What a thread has to say.
pub(super) enum Message {
    Input(Event),
    Signal(i32),
    Sampled(Snapshot),
    Loads(HashMap<ProcessKey, (char, Load)>),
    Escapes(ServiceId, Result<Vec<Escape>, String>),
    Previewed(Box<ServiceInfo>, Result<Vec<Member>, String>),
    Stopped(Result<Box<StopReport>, String>),
    Released(Result<Vec<Member>, String>),
    Events(Vec<String>),
    NoEvents(String),
    /// It cannot go on without this.
    Failed(anyhow::Error),
}

pub(super) type Out = SyncSender<Message>;

/// Starts a thread; one that panics is an error rather than a silence. Nobody waits for a message that nobody reads any more.
fn start(name: &'static str, out: &Out, work: impl FnOnce(&Out) + Send + 'static) -> anyhow::Result<JoinHandle<()>> {
    let out = out.clone();
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            if catch_unwind(AssertUnwindSafe(|| work(&out))).is_err() {
                drop(out.send(Message::Failed(anyhow::anyhow!("the thread {name} has panicked"))));
            }
        })
        .with_context(|| format!("failed to start the thread {name}"))
}

/// Reads keys, as long as this program runs.
pub(super) fn input(out: &Out) -> anyhow::Result<()> {
    start("input", out, |out| {
        loop {
            let message = match event::read() {
                Ok(event) => Message::Input(event),
                Err(error) => Message::Failed(anyhow::Error::from(error).context("failed to read the terminal")),
            };
            let failed = matches!(message, Message::Failed(_));
            if out.send(message).is_err() || failed {
                return;
            }
        }
    })?;
    Ok(())
}

/// Reads signals, as long as this program runs.
pub(super) fn signals(out: &Out) -> anyhow::Result<()> {
    let wanted = [
        libc::SIGTERM,
        libc::SIGINT,
        libc::SIGHUP,
        libc::SIGQUIT,
        libc::SIGTSTP,
        libc::SIGCONT,
    ];
    let mut signals = Signals::new(wanted).context("failed to watch for signals")?;
    start("signals", out, move |out| {
        for signal in signals.forever() {
            if out.send(Message::Signal(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

/// A thread that works until it is told to end.
pub(super) struct Worker<T> {
    orders: Sender<Option<T>>,
    thread: JoinHandle<()>,
}

impl<T> Worker<T> {
    /// One that has ended has said why.
    pub(super) fn order(&self, order: T) {
        drop(self.orders.send(Some(order)));
    }

    /// Waits for its end. Nobody may be waiting for room in the queue of messages.
    pub(super) fn end(self) {
        drop(self.orders.send(None));
        drop(self.thread.join());
    }
}

/// Reads the books every interval, and at once when something else is wanted.
pub(super) fn sampler(out: &Out, mut sampler: Sampler, interval: Duration) -> anyhow::Result<Worker<Wanted>> {
    let (orders, ordered) = channel::<Option<Wanted>>();
    let thread = start("sampler", out, move |out| {
        let mut wanted = Wanted::default();
        let mut due = Instant::now();
        loop {
            if Instant::now() >= due {
                due = Instant::now() + interval;
                if out.send(Message::Sampled(sampler.take(&wanted))).is_err() {
                    break;
                }
            }
            match next(&ordered, due) {
                Next::End => break,
                Next::Due => {}
                Next::Order(new) => {
                    if new.service != wanted.service {
                        due = Instant::now();
                    }
                    wanted = new;
                    let loads = sampler.look_at_new(&wanted);
                    if !loads.is_empty() && out.send(Message::Loads(loads)).is_err() {
                        break;
                    }
                }
            }
        }
        sampler.leave();
    })?;
    Ok(Worker { orders, thread })
}

/// Whose escapes are looked for.
pub(super) type Sought = Option<(Weak<Tracker>, Service)>;

/// Looks for escapes again and again, the more rarely the longer it takes.
pub(super) fn scout(out: &Out, interval: Duration) -> anyhow::Result<Worker<Sought>> {
    let (orders, ordered) = channel::<Option<Sought>>();
    let thread = start("scout", out, move |out| {
        let mut sought: Sought = None;
        let mut due = Instant::now() + interval;
        loop {
            match next(&ordered, due) {
                Next::End => return,
                Next::Due => {}
                Next::Order(new) => sought = new,
            }
            let begin = Instant::now();
            if let Some((tracker, service)) = &sought
                && let Some(tracker) = tracker.upgrade()
            {
                let found = tracker.escapes(service).map_err(|error| told(&error.into()));
                drop(tracker);
                if out.send(Message::Escapes(service.id(), found)).is_err() {
                    return;
                }
            }
            due = Instant::now() + interval.max(begin.elapsed() * REST_AFTER_LOOK);
        }
    })?;
    Ok(Worker { orders, thread })
}

enum Next<T> {
    Order(T),
    Due,
    End,
}

/// The newest order, if there is one before it is time.
fn next<T>(orders: &Receiver<Option<T>>, due: Instant) -> Next<T> {
    let mut newest = match orders.recv_timeout(due.saturating_duration_since(Instant::now())) {
        Ok(Some(order)) => order,
        Ok(None) | Err(RecvTimeoutError::Disconnected) => return Next::End,
        Err(RecvTimeoutError::Timeout) => return Next::Due,
    };
    while let Ok(order) = orders.try_recv() {
        match order {
            Some(order) => newest = order,
            None => return Next::End,
        }
    }
    Next::Order(newest)
}

const GONE: &str = "the books are gone";

/// Does something once with the books.
fn once(
    name: &'static str,
    out: &Out,
    tracker: Weak<Tracker>,
    work: impl FnOnce(Result<Arc<Tracker>, String>) -> Message + Send + 'static,
) -> anyhow::Result<()> {
    start(name, out, move |out| {
        let message = work(tracker.upgrade().ok_or_else(|| GONE.to_owned()));
        drop(out.send(message));
    })?;
    Ok(())
}

pub(super) fn preview(out: &Out, tracker: Weak<Tracker>, info: ServiceInfo) -> anyhow::Result<()> {
    once("preview", out, tracker, |tracker| {
        let members =
            tracker.and_then(|tracker| dry_run(&tracker, &info.handle()).map_err(|error| told(&error.into())));
        Message::Previewed(Box::new(info), members)
    })
}

pub(super) fn stop_service(out: &Out, tracker: Weak<Tracker>, info: ServiceInfo) -> anyhow::Result<()> {
    once("stop", out, tracker, move |tracker| {
        let policy = StopPolicy::default();
        let report = tracker.and_then(|tracker| {
            let stopped = runtime().and_then(|runtime| runtime.block_on(stop::carry_out(&tracker, &info, &policy)));
            stopped.map(Box::new).map_err(|error| told(&error))
        });
        Message::Stopped(report)
    })
}

pub(super) fn release(out: &Out, tracker: Weak<Tracker>, member: Member) -> anyhow::Result<()> {
    once("release", out, tracker, |tracker| {
        let released = tracker.and_then(|tracker| tracker.release_member(member).map_err(|error| told(&error.into())));
        Message::Released(released)
    })
}

/// Is never sent: the end of the channel is the message.
enum Never {}

/// A thread that follows events, until it is dropped or ended.
pub(super) struct Follower {
    end: oneshot::Sender<Never>,
    thread: JoinHandle<()>,
}

impl Follower {
    /// Waits for its end. Nobody may be waiting for room in the queue of messages.
    pub(super) fn end(self) {
        drop(self.end);
        drop(self.thread.join());
    }

    /// Lets it end when it comes to that.
    pub(super) fn let_end(self) {
        drop(self.end);
    }
}

pub(super) fn follow(out: &Out, tracker: Weak<Tracker>, name: String) -> anyhow::Result<Follower> {
    let (end, ended) = oneshot::channel();
    let thread = start("events", out, move |out| {
        let followed = match tracker.upgrade() {
            Some(tracker) => runtime().and_then(|runtime| runtime.block_on(pass_on(out, &tracker, name, ended))),
            None => Err(anyhow::anyhow!(GONE)),
        };
        if let Err(error) = followed {
            drop(out.send(Message::NoEvents(told(&error))));
        }
    })?;
    Ok(Follower { end, thread })
}

async fn pass_on(
    out: &Out,
    tracker: &Tracker,
    name: String,
    mut ended: oneshot::Receiver<Never>,
) -> anyhow::Result<()> {
    let names = [name];
    let mut services = events::Services::new(tracker, &names)?;
    let mut losses = tracker.event_losses()?;
    let begin = u64::try_from(Tracker::now().as_nanos()).unwrap_or(u64::MAX);
    let mut stream = tracker.events()?;
    let mut tick = tokio::time::interval(EVENTS_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut lines = Vec::new();
    loop {
        tokio::select! {
            _ = &mut ended => return Ok(()),
            _ = tick.tick() => {
                let now = tracker.event_losses()?;
                lines.extend(events::lost(losses, now).map(|line| events::describe(&line)));
                losses = now;
                if !lines.is_empty() && out.send(Message::Events(std::mem::take(&mut lines))).is_err() {
                    return Ok(());
                }
            }
            event = stream.next() => {
                let rest = iter::from_fn(|| stream.take()).take(events::BATCH);
                for event in iter::once(event?).chain(rest).filter(|event| event.boottime_ns >= begin) {
                    lines.extend(events::of_event(&mut services, &event).map(|line| events::describe(&line)));
                }
            }
        }
    }
}
