//! A supervisor from the start of its program until the programs of all its services run.

use anyhow::{Context as _, Result};

use crate::{
    figure::{Contestant, Row, Target, Unit, alternate_with_peers},
    load::Load,
    peers::{
        services::Supervisor,
        systemd::{SYSTEMD, Systemd},
    },
};

const NOTE: &str =
    "systemd from its execution as the first process of a container, with nothing but these services to start.";

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
    match Systemd::missing() {
        Some(reason) => skipped.push(Row::skipped(format!("{what}, {SYSTEMD}"), reason).target(Target::Times(1.0))),
        None => contestants.push((
            SYSTEMD.to_owned(),
            Box::new(|| Ok(Systemd::start(load, count, "", false)?.took.as_nanos() as f64)),
        )),
    }
    let mut measured = alternate_with_peers(load.pick(1, 5), contestants).into_iter();
    let ours = measured.next().context("ours")?.series()?;
    let mut rows: Vec<_> = measured
        .map(|other| {
            let has_target = [Supervisor::S6.name(), SYSTEMD].contains(&other.name.as_str());
            let row = other.beside(&what, Unit::Nanoseconds, &ours).note(NOTE);
            if has_target {
                row.target(Target::Times(1.0))
            } else {
                row
            }
        })
        .collect();
    rows.extend(skipped);
    Ok(rows)
}
