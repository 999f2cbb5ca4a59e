//! `zinit-tracker unload`: the pins go, if nothing is tracked.

use std::process::ExitCode;

use clap::Args;

use super::{Global, output};

/// Remove programs, maps and pins, if nothing is tracked.
///
/// Services without processes are forgotten. Fails, and changes nothing, if a service has processes or another process
/// uses the tracker.
#[derive(Args)]
#[command(after_help = "Example: zinit-tracker unload\n\n\
    Exit status: 0 if nothing is loaded any more, 1 if something is.")]
pub(super) struct Options {}

pub(super) fn run(global: &Global, _options: &Options) -> anyhow::Result<ExitCode> {
    match global.existing()? {
        Some(tracker) => tracker.unload()?,
        None => output::note(&format!("nothing is loaded in {}", global.pins.display())),
    }
    Ok(ExitCode::SUCCESS)
}
