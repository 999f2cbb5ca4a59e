//! How often supervisors wake up while nothing happens.

use std::{
    collections::BTreeMap,
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use crate::{
    figure::{Row, Series, Target, Unit},
    load::Load,
    peers::services::{Running, Supervisor},
};

/// How long what was under way may go on: threads for blocking calls end after ten seconds without work.
const SETTLES: Duration = Duration::from_secs(15);

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let (count, window) = load.pick((20, Duration::from_secs(5)), (100, Duration::from_secs(60)));
    let what = format!("wake-ups in {} s, {count} services", window.as_secs());
    let mut rows = Vec::new();
    let mut all = Vec::new();
    for supervisor in [Supervisor::Ours].into_iter().chain(Supervisor::OTHERS) {
        match supervisor.missing(load) {
            Some(reason) => rows.push(Row::skipped(format!("{what}, {}", supervisor.name()), reason)),
            None => all.push((supervisor, supervisor.start(load, count)?)),
        }
    }
    let began = Instant::now();
    thread::sleep(SETTLES.saturating_sub(began.elapsed()));
    let before = all.iter().map(|(_, it)| waits(load, it)).collect::<Result<Vec<_>>>()?;
    thread::sleep(window);
    let after = all.iter().map(|(_, it)| waits(load, it)).collect::<Result<Vec<_>>>()?;
    let mut series = all
        .iter()
        .zip(before.iter().zip(&after))
        .map(|((supervisor, _), (before, after))| {
            let woken = after
                .iter()
                .map(|(thread, count)| count - before.get(thread).unwrap_or(&0));
            Series::once(supervisor.name(), woken.sum::<u64>() as f64)
        });
    let ours = series.next().context("ours")?;
    rows.insert(0, Row::figure(&what, Unit::Number, ours).target(Target::Figure(0.0)));
    rows.extend(series.map(|other| Row::figure(&what, Unit::Number, other)));
    Ok(rows)
}

/// How often each thread of the supervisor has waited for something.
fn waits(load: &Load, running: &Running) -> Result<BTreeMap<(i32, i32), u64>> {
    let mut waits = BTreeMap::new();
    for pid in running.processes(&load.subject)? {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let path = thread?.path();
            // One that has ended in the meantime wakes up no more.
            let Ok(status) = fs::read_to_string(path.join("status")) else {
                continue;
            };
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            let count = line
                .and_then(|line| line.trim().parse().ok())
                .context("a thread has a count")?;
            let id = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            waits.insert((pid, id.context("a thread has an id")?), count);
        }
    }
    Ok(waits)
}
