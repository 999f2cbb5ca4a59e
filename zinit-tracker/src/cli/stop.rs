//! `zinit-tracker stop`: a service ends, verified.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Args;
use nix::sys::signal::Signal;
use zinit_tracker::{
    Config, Service, ServiceInfo, StopError, StopPolicy, StopReport, Tracker, TrackerError,
    stop::{Target, dry_run},
};

use super::{Global, close, output, parse};

/// Stop a service: signal, wait, kill, verify.
#[derive(Args)]
#[command(after_help = "\
Examples:
  zinit-tracker stop --dry-run web   who would be signalled
  zinit-tracker stop --grace 5s web

Exit status: 0 if the service is down, 1 if it is not or something failed, 3 if it is empty but that is not proven.")]
pub(super) struct Options {
    /// The service: NAME or INSTANCE/NAME
    name: String,
    /// How long members may take to end after the stop signal, before SIGKILL
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse::duration)]
    grace: Duration,
    /// How long killed members may take to die before they are named as survivors
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse::duration)]
    kill_timeout: Duration,
    /// Stop signal
    #[arg(long, default_value = "TERM", value_parser = parse::signal)]
    signal: Signal,
    /// Send the stop signal to the main process only; SIGKILL still goes to all
    #[arg(long)]
    main: bool,
    /// List who would be signalled, and signal nobody
    #[arg(long, conflicts_with = "report")]
    dry_run: bool,
    /// Write the report as JSON to FILE, or to stdout for -
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    report: Option<PathBuf>,
    /// Print JSON: the report, or with --dry-run the list
    #[arg(long)]
    json: bool,
}

/// Status when the service is empty without proof.
const NOT_PROVEN: u8 = 3;

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let tracker = global.existing_or_fail()?;
    let info = tracker.find(&options.name)?;
    let result = if options.dry_run {
        list(&tracker, &info, options)
    } else {
        stop(&tracker, &info, options).await
    };
    close(tracker);
    result
}

fn list(tracker: &Tracker, info: &ServiceInfo, options: &Options) -> anyhow::Result<ExitCode> {
    let members = dry_run(tracker, &info.handle())?;
    if options.json {
        output::print_json(&members)?;
    } else {
        output::print(&output::members(&members))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn stop(tracker: &Tracker, info: &ServiceInfo, options: &Options) -> anyhow::Result<ExitCode> {
    let report = match (&options.report, options.json) {
        (Some(path), _) => Some(output::ReportFile::open(path)?),
        (None, true) => Some(output::ReportFile::Stdout),
        (None, false) => None,
    };
    let policy = StopPolicy {
        signal: options.signal,
        target: if options.main { Target::Main } else { Target::All },
        grace: options.grace,
        kill_timeout: options.kill_timeout,
        ..StopPolicy::default()
    };
    let result = carry_out(tracker, info, &policy).await?;
    output::report(&result);
    if let Some(report) = report {
        report.write(&result)?;
    }
    Ok(status(&result))
}

/// Stops a service, and forgets it if nothing of it is left and no supervisor minds it.
pub(super) async fn carry_out(
    tracker: &Tracker,
    info: &ServiceInfo,
    policy: &StopPolicy,
) -> anyhow::Result<StopReport> {
    let service = info.handle();
    let report = match zinit_tracker::stop(tracker, &service, policy).await {
        Ok(report) => report,
        Err(StopError::Survivors(report)) => *report,
        Err(error) => return Err(error.into()),
    };
    // Services of a supervisor stay registered: it decides what becomes of them.
    if report.survivors.is_empty() && !has_supervisor(info) {
        forget(tracker, &service, &report)?;
    }
    Ok(report)
}

/// Unregisters a service that was stopped, and of which nothing is left.
pub(super) fn forget(tracker: &Tracker, service: &Service, report: &StopReport) -> anyhow::Result<()> {
    match tracker.unregister(service) {
        // Counters that another program has written may say so for ever.
        Err(error @ TrackerError::NotEmpty { .. }) if !report.proven => {
            tracing::warn!(%error, "it stays in the books");
            Ok(())
        }
        result => Ok(result?),
    }
}

/// Whether somebody else than this tool has registered the service.
pub(super) fn has_supervisor(info: &ServiceInfo) -> bool {
    info.instance != Config::default().instance
}

fn status(report: &StopReport) -> ExitCode {
    if !report.survivors.is_empty() {
        ExitCode::FAILURE
    } else if report.proven {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(NOT_PROVEN)
    }
}
