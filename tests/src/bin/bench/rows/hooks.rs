//! What the kernel itself measures of our programs (`kernel.bpf_stats_enabled`).

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use aya::sys::{Stats, enable_stats};
use zinit_tracker::Tracker;

use crate::{
    figure::{Row, Series, Target, Unit},
    load::{Load, Open, Pinned},
};

const NOTE: &str = "Includes what the kernel's own measuring costs, which reads the clock twice a run.";

/// The programs at what happens to processes.
const HOOKS: [&str; 5] = ["zinit_fork", "zinit_wakeup", "zinit_exec", "zinit_exit", "zinit_free"];

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let (rounds, forks) = load.pick((3, 1000), (15, 5000));
    let _measuring = enable_stats(Stats::RunTime).context("failed to have programs measured, which takes Linux 5.8")?;
    let _pinned = Pinned::to_one_cpu()?;
    let open = Open::load(None)?;
    let mut bystander = BTreeMap::new();
    let mut tracked = BTreeMap::new();
    for _ in 0..rounds {
        for behaviour in ["forks", "execs"] {
            let arguments = [behaviour, &forks.to_string()];
            let before = counts(&open.tracker)?;
            let output = load.command(&arguments).output()?;
            ensure!(output.status.success(), "the bystander failed: {}", output.status);
            note(&mut bystander, behaviour, &before, &counts(&open.tracker)?);
            let before = counts(&open.tracker)?;
            super::forks::run_tracked(load, &open.tracker, &arguments)?;
            note(&mut tracked, behaviour, &before, &counts(&open.tracker)?);
        }
    }
    open.close()?;

    let mut rows = Vec::new();
    for (who, means, targets) in [
        ("bystander", &bystander, [150.0; HOOKS.len()]),
        ("tracked", &tracked, [0.0, 0.0, 0.0, 400.0, 0.0]),
    ] {
        for (hook, target) in HOOKS.into_iter().zip(targets) {
            let values = means.get(hook).with_context(|| format!("{hook} did not run"))?;
            let series = Series {
                name: String::new(),
                values: values.clone(),
            };
            let mut row = Row::figure(format!("`{hook}`, {who}"), Unit::Nanoseconds, series).note(NOTE);
            row.target = (target > 0.0).then_some(Target::Figure(target));
            rows.push(row);
        }
    }
    let creations = tracked["zinit_fork"].iter().zip(&tracked["zinit_wakeup"]);
    let creations = Series {
        name: String::new(),
        values: creations.map(|(fork, wakeup)| fork + wakeup).collect(),
    };
    rows.push(
        Row::figure("both hooks at a fork, tracked", Unit::Nanoseconds, creations)
            .target(Target::Figure(700.0))
            .note(NOTE),
    );
    Ok(rows)
}

/// How long and how often each program ran.
type Counts = BTreeMap<&'static str, (f64, f64)>;

fn counts(tracker: &Tracker) -> Result<Counts> {
    let runs = tracker.program_runs()?.into_iter();
    Ok(runs
        .map(|run| (run.program, (run.run_time.as_nanos() as f64, run.runs as f64)))
        .collect())
}

/// Enters the mean time of each program between the two: exec's if programs were executed, else the others'.
fn note(means: &mut BTreeMap<&'static str, Vec<f64>>, behaviour: &str, before: &Counts, after: &Counts) {
    for hook in HOOKS {
        if (behaviour == "execs") != (hook == "zinit_exec") {
            continue;
        }
        let ((time, runs), (time_before, runs_before)) = (after[hook], before[hook]);
        if runs > runs_before {
            means
                .entry(hook)
                .or_default()
                .push((time - time_before) / (runs - runs_before));
        }
    }
}
