//! One well-behaved process, stopped through the library.

use std::{
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::Pid,
};
use zinit_tests::{Marker, Ready};
use zinit_tracker::{StopPolicy, stop};

use crate::{
    figure::{Contestant, Row, Target, Unit, alternate},
    load::{Load, Open},
    peers,
};

const PROOF: &str = "`kill` and `waitpid` know one process and prove nothing of its descendants.";

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let rounds = load.pick(10, 200);
    let open = Open::load(None)?;
    let dumb_init = peers::find("dumb-init");
    let mut contestants: Vec<Contestant<'_>> = vec![
        (
            "library".to_owned(),
            Box::new(|| {
                let service = open.tracker.register("one")?;
                let took = load.runtime.block_on(async {
                    let (mut command, mut ready) = (load.command(&["rest"]), Ready::new()?);
                    ready.attach(&mut command);
                    let mut child = open.tracker.spawn(&service, &mut command.into())?;
                    ready.wait()?;
                    let began = Instant::now();
                    let report = stop(&open.tracker, &service, &StopPolicy::default()).await?;
                    let took = began.elapsed();
                    ensure!(report.proven, "the stop proves nothing: {:?}", report.doubts);
                    child.wait().await?;
                    Ok(took)
                })?;
                open.tracker.unregister(&service)?;
                Ok(took.as_nanos() as f64)
            }),
        ),
        (
            "kill + waitpid".to_owned(),
            Box::new(|| end_by_signal(load.command(&["rest"]))),
        ),
    ];
    if let Some(dumb_init) = &dumb_init {
        contestants.push((
            "dumb-init, SIGTERM + waitpid".to_owned(),
            Box::new(move || {
                let mut command = Command::new(dumb_init);
                command.arg(&load.subject).arg("rest");
                command.env(Marker::ENV, load.marker.as_str()).stdin(Stdio::null());
                end_by_signal(command)
            }),
        ));
    }
    let mut series = alternate(rounds, contestants)?.into_iter();
    let (ours, bare) = (series.next().context("ours")?, series.next().context("theirs")?);
    open.close()?;
    let what = "stop of one process";
    let mut rows = vec![
        Row::ratio(what, Unit::Nanoseconds, ours.clone(), bare)
            .target(Target::Times(1.5))
            .note(PROOF),
    ];
    rows.push(match series.next() {
        Some(dumb_init) => Row::ratio(what, Unit::Nanoseconds, ours, dumb_init),
        None => Row::skipped(format!("{what}, dumb-init"), "dumb-init is not installed"),
    });
    Ok(rows)
}

/// Starts the command, and measures how long SIGTERM takes to end it.
fn end_by_signal(mut command: Command) -> Result<f64> {
    let mut ready = Ready::new()?;
    let child = ready.attach(&mut command).spawn()?;
    // A signal that comes earlier may find nobody to be passed on to.
    ready.wait()?;
    // Nobody else waits for it, so that the pid stays its.
    let pid = Pid::from_raw(child.id().try_into()?);
    let began = Instant::now();
    kill(pid, Signal::SIGTERM)?;
    waitpid(pid, None)?;
    Ok(began.elapsed().as_nanos() as f64)
}
