//! A tree whose processes are each in a session of their own, killed and known to be gone.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::process::Child;
use zinit_tests::sandbox::DEADLINE;
use zinit_tracker::{Service, StopPolicy, Tracker, stop};

use crate::{
    figure::{Contestant, Row, Target, Unit, alternate},
    load::{Cgroup, Load, Open},
};

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let sizes = load.pick([100, 1000], [1000, 10_000]);
    sizes.into_iter().map(|size| of_size(load, size)).collect()
}

fn of_size(load: &Load, size: usize) -> Result<Row> {
    let what = format!("kill and verify {size} descendants in sessions of their own");
    let Some(cgroup) = Cgroup::new(&load.marker)? else {
        return Ok(Row::skipped(
            what,
            "there is no cgroup v2 with `cgroup.kill` (Linux 5.14)",
        ));
    };
    let open = Open::load(None)?;
    let contestants: Vec<Contestant<'_>> = vec![
        (
            "library".to_owned(),
            Box::new(|| {
                let (service, child) = load.tracked_sessions(&open.tracker, size)?;
                Ok(kill(load, &open.tracker, &service, child, size)?.as_nanos() as f64)
            }),
        ),
        (
            "cgroup.kill until populated 0".to_owned(),
            Box::new(|| {
                let mut child = load.sessions_in(cgroup.path(), size)?;
                let began = Instant::now();
                cgroup.kill()?;
                let took = began.elapsed();
                child.wait()?;
                load.reap()?;
                Ok(took.as_nanos() as f64)
            }),
        ),
    ];
    let mut series = alternate(load.pick(3, 7), contestants)?.into_iter();
    open.close()?;
    let (ours, theirs) = (series.next().context("ours")?, series.next().context("theirs")?);
    Ok(Row::ratio(what, Unit::Nanoseconds, ours, theirs).target(Target::Times(1.2)))
}

/// How long it takes to kill a tree of so many below the child, and to prove that.
pub(super) fn kill(
    load: &Load,
    tracker: &Tracker,
    service: &Service,
    mut child: Child,
    size: usize,
) -> Result<Duration> {
    let began = Instant::now();
    let report = load.runtime.block_on(stop(tracker, service, &at_once()))?;
    let took = began.elapsed();
    let killed = report.processes.len();
    ensure!(killed == size + 1, "{killed} of {} were killed", size + 1);
    load.runtime.block_on(child.wait())?;
    load.reap()?;
    tracker.unregister(service)?;
    Ok(took)
}

/// Kills without asking first.
pub(super) fn at_once() -> StopPolicy {
    StopPolicy {
        grace: Duration::ZERO,
        kill_timeout: DEADLINE,
        ..StopPolicy::default()
    }
}
