//! `zinit-tracker unload`: the pins go, if nothing is tracked.

use std::process::ExitCode;

use anyhow::bail;
use clap::Args;

use super::{Global, output};

/// Remove programs, maps and pins, if nothing is tracked.
///
/// Services without processes are forgotten. Fails if a service has processes, or if another process uses the tracker.
#[derive(Args)]
pub(super) struct Options {}

pub(super) fn run(global: &Global, _options: &Options) -> anyhow::Result<ExitCode> {
    let Some(tracker) = global.existing()? else {
        output::note(&format!("nothing is loaded in {}", global.pins.display()));
        return Ok(ExitCode::SUCCESS);
    };
    for info in tracker.services()? {
        if info.live > 0 {
            bail!(
                "service {}/{} has {} processes: stop it first",
                info.instance,
                info.name,
                info.live
            );
        }
    }
    for info in tracker.services()? {
        tracker.unregister(&info.handle())?;
    }
    if tracker.close()? {
        Ok(ExitCode::SUCCESS)
    } else {
        bail!("another process uses the tracker: stop that first")
    }
}
