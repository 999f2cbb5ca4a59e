//! What `doctor` says of the eight promises: tries them on a small service, and says what this machine adds to it.

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use serde::Serialize;
use tokio::process::Command;
use zinit_tracker::{
    Config, GateKind, Level, Pins, StopPolicy, StopReport, Tracker, Tracking, can_pin, records::program, stop,
};

use super::output;

/// A shell that leaves a daemon behind.
const SERVICE: &str = "(sleep 60 &); exit 0";

/// A promise, and whether it is kept here.
#[derive(Debug, Serialize)]
pub(super) struct Promise {
    promise: u32,
    title: &'static str,
    pub(super) holds: bool,
    detail: String,
}

impl Promise {
    pub(super) fn line(&self) -> String {
        let mark = if self.holds { "ok " } else { "NO " };
        format!("  {mark} {}. {:<32} {}\n", self.promise, self.title, self.detail)
    }
}

/// What was seen when a service was started and stopped.
pub(super) struct Trial {
    tracking: Tracking,
    report: StopReport,
    hooks: Vec<&'static str>,
    gate: Option<(GateKind, Duration)>,
}

/// Starts a service that leaves a daemon behind and stops it, in books of its own that go with it.
pub(super) async fn tried(level: Level) -> anyhow::Result<Trial> {
    let config = Config {
        pins: Pins::Private,
        level,
        ..Config::default()
    };
    let tracker = Tracker::open(&config)?;
    let service = tracker.register("doctor")?;
    let mut command = Command::new("sh");
    command.args(["-c", SERVICE]);
    let mut child = tracker.spawn(&service, &mut command)?;
    // The daemon is an orphan when its creators are gone.
    child.wait().await.context("failed to wait for a shell")?;
    let policy = StopPolicy {
        grace: Duration::ZERO,
        ..StopPolicy::default()
    };
    let report = stop(&tracker, &service, &policy).await?;
    let hooks = tracker.misses()?.into_iter().map(|(hook, _)| hook).collect();
    let trial = Trial {
        tracking: tracker.tracking(),
        report,
        hooks,
        gate: tracker.with_gate(|| ())?.map(|(kind, took, ())| (kind, took)),
    };
    tracker.unregister(&service)?;
    tracker.close()?;
    Ok(trial)
}

/// What the trial showed, promise by promise; `pins`: where maps would be pinned.
pub(super) fn promises(trial: &Trial, pins: &Path) -> Vec<Promise> {
    let exact = trial.tracking == Tracking::Ebpf;
    let found_daemon = !trial.report.processes.is_empty();
    let doubts: Vec<_> = trial.report.doubts.iter().map(ToString::to_string).collect();
    let promise = |promise, title, holds, detail: String| Promise {
        promise,
        title,
        holds,
        detail,
    };
    vec![
        promise(
            1,
            "nothing escapes",
            exact && found_daemon,
            attribution(trial, found_daemon),
        ),
        promise(
            2,
            "nothing else is touched",
            true,
            "signals go through pidfds whose process was matched".to_owned(),
        ),
        promise(
            3,
            "down means down",
            trial.report.proven,
            match trial.report.proven {
                true => format!(
                    "a daemon was stopped in {}: proven",
                    output::human(trial.report.elapsed)
                ),
                false => format!("a daemon was stopped, but that is not proven: {}", doubts.join("; ")),
            },
        ),
        promise(4, "never silently wrong", true, candour(exact).to_owned()),
        promise(
            5,
            "tracking outlives us",
            exact && can_pin(pins),
            persistence(exact, pins),
        ),
        promise(
            6,
            "the map is the truth",
            true,
            "no decision depends on an event".to_owned(),
        ),
        promise(7, "bystanders do not pay", true, price(trial)),
        promise(
            8,
            "everyone sees the tracking level",
            true,
            "in doctor and in every report".to_owned(),
        ),
    ]
}

fn attribution(trial: &Trial, found_daemon: bool) -> String {
    let creations = [program::FORK, program::WAKEUP_NEW];
    let hooks = trial.hooks.iter().filter(|hook| creations.contains(hook)).count();
    match (trial.tracking, found_daemon) {
        (Tracking::Procfs, _) => "level procfs can miss processes".to_owned(),
        (Tracking::Ebpf, false) => "a daemon was not found".to_owned(),
        (Tracking::Ebpf, true) => format!(
            "a daemon was found; {} each creation",
            output::counted(hooks, "hook sees", "hooks see")
        ),
    }
}

fn candour(exact: bool) -> &'static str {
    if exact {
        "lost operations and skipped hooks are counted, and make services unproven"
    } else {
        "each report says what this level cannot see"
    }
}

fn persistence(exact: bool, pins: &Path) -> String {
    match (exact, can_pin(pins)) {
        (false, _) => "the books of level procfs go with the process that keeps them".to_owned(),
        (true, true) => format!("the books can be pinned in {}", pins.display()),
        (true, false) => format!(
            "nothing can be pinned in {}, so the books go with `run`",
            pins.display()
        ),
    }
}

fn price(trial: &Trial) -> String {
    match trial.gate {
        None => "nothing runs in the kernel".to_owned(),
        Some((kind, took)) => format!(
            "a look at a counter per fork; the gate at {kind}, only while a stop needs it, closes in {}",
            output::human(took)
        ),
    }
}
