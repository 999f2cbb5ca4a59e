//! A supervisor from the start of its program until the programs of all its services run.

use anyhow::{Context as _, Result};

use crate::{
    figure::{Contestant, Row, Target, Unit, alternate},
    load::Load,
    peers::services::Supervisor,
};

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let count = load.pick(50, 500);
    let what = format!("{count} services started");
    let mut contestants: Vec<Contestant<'_>> = Vec::new();
    let mut skipped = Vec::new();
    for supervisor in [Supervisor::Ours].into_iter().chain(Supervisor::OTHERS) {
        if let Some(reason) = supervisor.missing(load) {
            skipped.push(Row::skipped(format!("{what}, {}", supervisor.name()), reason));
            continue;
        }
        contestants.push((
            supervisor.name().to_owned(),
            Box::new(move || Ok(supervisor.start(load, count)?.took.as_nanos() as f64)),
        ));
    }
    let mut series = alternate(load.pick(1, 5), contestants)?.into_iter();
    let ours = series.next().context("ours")?;
    let mut rows: Vec<_> = series
        .map(|other| {
            let is_s6 = other.name == Supervisor::S6.name();
            let row = Row::ratio(&what, Unit::Nanoseconds, ours.clone(), other);
            if is_s6 { row.target(Target::Times(1.0)) } else { row }
        })
        .collect();
    rows.extend(skipped);
    let systemd = Row::skipped(format!("{what}, systemd"), "not started by this program yet");
    rows.push(systemd.target(Target::Times(1.0)));
    Ok(rows)
}
