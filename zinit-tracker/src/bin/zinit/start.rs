//! `zinit start`: wants a service up.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Global;

/// Start a service; no effect if it is up
#[derive(Args)]
#[command(after_help = "Example: zinit start web\n\n\
    Exit status: 0 if the service is wanted up now, 1 if not; whether it is up, `zinit status` says.")]
pub(super) struct Options {
    /// Name of the service
    name: String,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    global.ask("service_start", json!([options.name])).await
}
