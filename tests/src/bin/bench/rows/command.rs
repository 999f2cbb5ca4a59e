//! One service stopped by the command of its supervisor, a whole process each time.

use anyhow::{Context as _, Result};

use crate::{
    figure::{Contestant, Row, Target, Unit, alternate},
    load::Load,
    peers::services::Supervisor,
};

const NOTE: &str = "Until the command has ended and the process of the service has, too.";
const SYSTEMD: &str = "not started by this program yet";

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let what = "stop of a service by a command";
    let (missing, there): (Vec<_>, Vec<_>) = Supervisor::OTHERS
        .into_iter()
        .partition(|supervisor| supervisor.missing(load).is_some());
    let mut contestants: Vec<Contestant<'_>> = Vec::new();
    for supervisor in [Supervisor::Ours].into_iter().chain(there) {
        let mut running = supervisor.start(load, 1)?;
        contestants.push((
            supervisor.name().to_owned(),
            Box::new(move || Ok(running.stop_and_start()?.as_nanos() as f64)),
        ));
    }
    let mut series = alternate(load.pick(3, 21), contestants)?.into_iter();
    let ours = series.next().context("ours")?;
    let mut rows: Vec<_> = series
        .map(|other| {
            let is_s6 = other.name == Supervisor::S6.name();
            let row = Row::ratio(what, Unit::Nanoseconds, ours.clone(), other).note(NOTE);
            if is_s6 { row.target(Target::Times(1.0)) } else { row }
        })
        .collect();
    let reason = |supervisor: Supervisor| supervisor.missing(load).unwrap_or_default();
    rows.extend(
        missing
            .into_iter()
            .map(|supervisor| Row::skipped(format!("{what}, {}", supervisor.name()), reason(supervisor))),
    );
    rows.push(Row::skipped(format!("{what}, systemd"), SYSTEMD).target(Target::Times(1.0)));
    Ok(rows)
}
