//! `zinit check`: whether service files are good, without a supervisor.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use zinit_tracker::supervisor::config::ServiceDirectory;

use super::print;

/// Check service files: every fault with its file, line and column, and dependencies
///
/// Fails if there is a fault; that a dependency has no file is none.
#[derive(Args)]
#[command(after_help = "Example: zinit check /etc/zinit\n\nExit status: 0 if there is no fault, 1 if there is.")]
pub(super) struct Options {
    /// Directory of the service files
    #[arg(value_name = "DIR", default_value = "/etc/zinit/")]
    directory: PathBuf,
}

pub(super) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let findings = ServiceDirectory::open(&options.directory)?.check()?;
    for note in &findings.notes {
        print::note(&format!("note: {note}"));
    }
    for fault in &findings.faults {
        print::note(fault);
    }
    if !findings.faults.is_empty() {
        return Ok(ExitCode::FAILURE);
    }
    let count = findings.services.len();
    let services = if count == 1 { "service" } else { "services" };
    print::print(&format!("{count} {services}, no faults\n"))?;
    Ok(ExitCode::SUCCESS)
}
