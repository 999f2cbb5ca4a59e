//! `zinit-tracker doctor`: what this machine offers, and how the tracker fares.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use zinit_tracker::{Tracker, Tracking, requirements};

use super::{Global, output};

/// Show whether exact tracking works here, and how a loaded tracker fares.
///
/// Exit status: 0 if every requirement is met, else 1. Loads nothing.
#[derive(Args)]
pub(super) struct Options {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    /// What services get here; none if a requirement is not met.
    tracking: Option<Tracking>,
    requirements: Vec<Line>,
    loaded: Option<Loaded>,
}

#[derive(Serialize)]
struct Line {
    name: &'static str,
    met: bool,
    detail: String,
}

#[derive(Serialize)]
struct Loaded {
    pins: Option<std::path::PathBuf>,
    layout: u32,
    capacity: u32,
    services: usize,
    processes: u64,
    missed_events: Vec<(&'static str, u64)>,
    counters: Counters,
}

/// The programs' counters, since they were loaded.
#[derive(Serialize)]
struct Counters {
    creations_seen: u64,
    processes_tracked: u64,
    insert_failures: u64,
    delete_failures: u64,
    exit_failures: u64,
    stale_replaced: u64,
    deaths_healed: u64,
    event_drops: u64,
    kills: u64,
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let requirements: Vec<_> = requirements()
        .into_iter()
        .map(|requirement| Line {
            name: requirement.name,
            met: requirement.outcome.is_ok(),
            detail: requirement.outcome.unwrap_or_else(|error| error.to_string()),
        })
        .collect();
    let met = requirements.iter().all(|line| line.met);
    let tracker = if met { global.existing()? } else { None };
    let loaded = tracker.as_ref().map(loaded).transpose()?;
    if let Some(tracker) = tracker {
        super::close(tracker);
    }
    let report = Report {
        tracking: met.then_some(Tracking::Ebpf),
        requirements,
        loaded,
    };
    if options.json {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report, global))?;
    }
    Ok(if met { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn loaded(tracker: &Tracker) -> anyhow::Result<Loaded> {
    let services = tracker.services()?;
    let stats = tracker.stats()?;
    Ok(Loaded {
        pins: tracker.pin_directory().map(Into::into),
        layout: zinit_tracker::records::LAYOUT_VERSION,
        capacity: tracker.capacity(),
        services: services.len(),
        processes: services.iter().map(|info| info.live).sum(),
        missed_events: tracker.misses()?,
        counters: Counters {
            creations_seen: stats.seen,
            processes_tracked: stats.tracked,
            insert_failures: stats.insert_failures,
            delete_failures: stats.delete_failures,
            exit_failures: stats.exit_failures,
            stale_replaced: stats.stale_replaced,
            deaths_healed: stats.healed,
            event_drops: stats.event_drops,
            kills: stats.kills,
        },
    })
}

fn text(report: &Report, global: &Global) -> String {
    let mut text = match report.tracking {
        Some(Tracking::Ebpf) => "tracking: ebpf (exact)\n".to_owned(),
        None => "tracking: none, a requirement is not met\n".to_owned(),
    };
    for line in &report.requirements {
        let mark = if line.met { "ok " } else { "NO " };
        text.push_str(&format!("  {mark} {:<13} {}\n", line.name, line.detail));
    }
    let Some(loaded) = &report.loaded else {
        text.push_str(&format!(
            "loaded: no (nothing is pinned in {})\n",
            global.pins.display()
        ));
        return text;
    };
    text.push_str(&format!(
        "loaded: layout {} in {}; {} and {} of at most {}\n",
        loaded.layout,
        global.pins.display(),
        output::counted(loaded.services, "service", "services"),
        output::counted(
            usize::try_from(loaded.processes).unwrap_or(usize::MAX),
            "process",
            "processes"
        ),
        loaded.capacity
    ));
    for (program, count) in &loaded.missed_events {
        text.push_str(&format!("  {program:<13} skipped {count} events\n"));
    }
    let counters = &loaded.counters;
    text.push_str(&format!(
        "  {} creations seen, {} processes tracked, {} failed operations, {} deaths healed, {} events dropped\n",
        counters.creations_seen,
        counters.processes_tracked,
        counters.insert_failures + counters.delete_failures + counters.exit_failures,
        counters.deaths_healed,
        counters.event_drops
    ));
    text
}
