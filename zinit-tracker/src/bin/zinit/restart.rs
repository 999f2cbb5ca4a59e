//! `zinit restart`: a service goes down, verified, and comes up again.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{Global, stop::note_doubts};

/// Stop a service until nothing of it is left, then start it
#[derive(Args)]
#[command(after_help = "Example: zinit restart web\n\n\
    Exit status: 0 if nothing of the last run is left and the service is wanted up, 1 if processes survive or it failed.")]
pub(super) struct Options {
    /// Name of the service
    name: String,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let report = global
        .connect()
        .await?
        .call("service_restart", json!([options.name, true]))
        .await?;
    note_doubts(&options.name, &report);
    Ok(ExitCode::SUCCESS)
}
