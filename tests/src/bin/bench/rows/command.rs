//! One service stopped by the command of its supervisor, a whole process each time.

use anyhow::{Context as _, Result};

use crate::{
    figure::{Contestant, Row, Target, Unit, alternate_with_peers},
    load::Load,
    peers::{
        services::Supervisor,
        systemd::{SYSTEMD, Systemd},
    },
};

const NOTE: &str = "Until the command has ended and the process of the service has, too.";

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
    if Systemd::missing().is_none() {
        let systemd = Systemd::start(load, 1, "", false)?;
        contestants.push((
            SYSTEMD.to_owned(),
            Box::new(move || {
                let took = systemd.stop()?;
                systemd.start_again()?;
                Ok(took.as_nanos() as f64)
            }),
        ));
    }
    let mut measured = alternate_with_peers(load.pick(3, 21), contestants).into_iter();
    let ours = measured.next().context("ours")?.series()?;
    let mut rows: Vec<_> = measured
        .map(|other| {
            let has_target = [Supervisor::S6.name(), SYSTEMD].contains(&other.name.as_str());
            let row = other.beside(what, Unit::Nanoseconds, &ours).note(NOTE);
            if has_target {
                row.target(Target::Times(1.0))
            } else {
                row
            }
        })
        .collect();
    let reason = |supervisor: Supervisor| supervisor.missing(load).unwrap_or_default();
    rows.extend(
        missing
            .into_iter()
            .map(|supervisor| Row::skipped(format!("{what}, {}", supervisor.name()), reason(supervisor))),
    );
    if let Some(reason) = Systemd::missing() {
        rows.push(Row::skipped(format!("{what}, {SYSTEMD}"), reason).target(Target::Times(1.0)));
    }
    Ok(rows)
}
