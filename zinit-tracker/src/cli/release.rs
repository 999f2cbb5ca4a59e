//! `zinit-tracker release`: a subtree leaves its service on purpose.

use std::process::ExitCode;

use clap::Args;

use super::{Global, close, output, parse};

/// Take a process and its descendants out of their service.
///
/// They run on, and a stop of the service leaves them alone: for a tmux server, say, that was started from one.
#[derive(Args)]
#[command(after_help = "Example: zinit-tracker release 4711\n\n\
    Exit status: 0 if the process is out of its service, 1 if not.")]
pub(super) struct Options {
    /// The process at the top of the subtree
    #[arg(value_parser = parse::pid)]
    pid: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let tracker = global.existing_or_fail()?;
    let result = tracker.release(options.pid);
    close(tracker);
    let released = result?;
    if options.json {
        output::print_json(&released)?;
    } else {
        output::print(&output::members(&released))?;
    }
    Ok(ExitCode::SUCCESS)
}
