//! `zinit-tracker doctor`: what this machine offers, and how the tracker fares.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use zinit_tracker::{Level, Tracker, Tracking, requirements};

use super::{
    Global, Wanted, output,
    promises::{Promise, promises, tried},
};

/// The requirement of every level, as the library names it.
const PROC: &str = "/proc";

/// Show how well descendants can be tracked here, and how a loaded tracker fares.
///
/// Tries it: loads the programs for a moment, for itself alone, and stops a small service. Nothing is left of that.
#[derive(Args)]
#[command(after_help = "Example: zinit-tracker doctor\n\n\
    Exit status: 0 if every requirement is met and services are tracked exactly, else 1.")]
pub(super) struct Options {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    /// The level that `run` gets here; none if it refuses to start.
    tracking: Option<Tracking>,
    /// Why it is not the exact one.
    reason: Option<String>,
    requirements: Vec<Line>,
    /// None if no service could be tried.
    promises: Vec<Promise>,
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

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let requirements: Vec<_> = requirements()
        .into_iter()
        .map(|requirement| Line {
            name: requirement.name,
            met: requirement.outcome.is_ok(),
            detail: requirement.outcome.unwrap_or_else(|error| error.to_string()),
        })
        .collect();
    let met = requirements.iter().all(|line| line.met);
    let (mut tracking, mut reason) = level(global, &requirements);
    let mut promised = Vec::new();
    if let Some(level) = tracking {
        match trial(global, level).await {
            Ok((seen, promises, why)) => {
                tracking = Some(seen);
                reason = reason.or(why);
                promised = promises;
            }
            Err(error) => {
                tracking = None;
                reason = Some(format!("{error:#}"));
            }
        }
    }
    let exact = tracking == Some(Tracking::Ebpf);
    let tracker = if exact { global.existing()? } else { None };
    let loaded = tracker.as_ref().map(loaded).transpose()?;
    if let Some(tracker) = tracker {
        super::close(tracker);
    }
    let report = Report {
        tracking,
        reason,
        requirements,
        promises: promised,
        loaded,
    };
    if options.json {
        output::print_json(&report)?;
    } else {
        output::print(&text(&report, global))?;
    }
    Ok(if met && exact {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Tries the level that is expected here, and where the kernel refuses the programs, the other one if that may be used.
async fn trial(global: &Global, expected: Tracking) -> anyhow::Result<(Tracking, Vec<Promise>, Option<String>)> {
    let level = match expected {
        Tracking::Ebpf => Level::Ebpf,
        Tracking::Procfs => Level::Procfs,
    };
    match tried(level).await {
        Ok(trial) => Ok((expected, promises(&trial, &global.pins), None)),
        Err(error) if expected == Tracking::Ebpf && global.tracking == Wanted::Auto => {
            let trial = tried(Level::Procfs).await?;
            Ok((
                Tracking::Procfs,
                promises(&trial, &global.pins),
                Some(format!("{error:#}")),
            ))
        }
        Err(error) => Err(error),
    }
}

/// The level that `run` gets here, and why not the exact one.
fn level(global: &Global, requirements: &[Line]) -> (Option<Tracking>, Option<String>) {
    let unmet = requirements.iter().find(|line| !line.met);
    let reason = unmet.map(|line| line.detail.clone());
    // What no level can do without.
    let no_proc = requirements.iter().any(|line| line.name == PROC && !line.met);
    match (global.tracking, &reason) {
        _ if no_proc => (None, reason),
        (Wanted::Procfs, _) => (Some(Tracking::Procfs), Some("it was asked for".to_owned())),
        (_, None) => (Some(Tracking::Ebpf), None),
        (Wanted::Auto, Some(_)) => (Some(Tracking::Procfs), reason),
        (Wanted::Ebpf, Some(_)) => (None, reason),
    }
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
    let reason = report.reason.as_deref().unwrap_or_default();
    let mut text = match report.tracking {
        Some(Tracking::Ebpf) => "tracking: ebpf (exact)\n".to_owned(),
        Some(Tracking::Procfs) => format!("tracking: procfs (processes can be missed): {reason}\n"),
        None => format!("tracking: none: {reason}\n"),
    };
    for line in &report.requirements {
        let mark = if line.met { "ok " } else { "NO " };
        text.push_str(&format!("  {mark} {:<13} {}\n", line.name, line.detail));
    }
    if !report.promises.is_empty() {
        text.push_str("promises:\n");
    }
    report
        .promises
        .iter()
        .for_each(|promise| text.push_str(&promise.line()));
    if report.tracking != Some(Tracking::Ebpf) {
        return text;
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
