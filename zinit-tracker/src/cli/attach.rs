//! `zinit-tracker attach`: a running process tree becomes a service.

use std::process::ExitCode;

use clap::Args;
use zinit_tracker::Tracker;

use super::{Global, close, output, parse};

/// Make a running process and its descendants a service.
///
/// The processes run on undisturbed. What they create from now on is tracked exactly; what had left their tree before
/// is unknown, so an adopted service is never proven. Processes that share a session or group with the members but do not
/// descend from them are listed as suspects.
#[derive(Args)]
#[command(after_help = "Example: zinit-tracker attach --name legacy 4711\n\n\
    Exit status: 0 if the process and its descendants are tracked now, 1 if not.")]
pub(super) struct Options {
    /// The process at the top of the tree
    #[arg(value_parser = parse::pid)]
    pid: u32,
    /// Name of the service
    #[arg(long)]
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let tracker = Tracker::open(&global.lasting_config()?)?;
    let result = attach(&tracker, options);
    // Does nothing if the service is there.
    close(tracker);
    result
}

fn attach(tracker: &Tracker, options: &Options) -> anyhow::Result<ExitCode> {
    let service = tracker.register(&options.name)?;
    let adoption = match tracker.adopt(&service, options.pid) {
        Ok(adoption) => adoption,
        Err(error) => {
            tracker.unregister(&service)?;
            return Err(error.into());
        }
    };
    if options.json {
        output::print_json(&adoption)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::print(&output::members(&adoption.members))?;
    if !adoption.settled {
        output::note("the tree changed all the time: it may have lost processes while it was taken in");
    }
    for suspect in &adoption.suspects {
        output::note(&format!(
            "suspect: pid {} ({}) shares a {} with the members but is not known to descend from them",
            suspect.pid,
            output::plain(&suspect.comm),
            suspect.shares
        ));
    }
    Ok(ExitCode::SUCCESS)
}
