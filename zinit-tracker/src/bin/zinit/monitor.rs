//! `zinit monitor`: takes a service under supervision.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Global;

/// Read NAME.yaml from the supervisor's configuration directory, and supervise the service
#[derive(Args)]
#[command(after_help = "Example: zinit monitor web\n\nExit status: 0 if the service is supervised now, 1 if not.")]
pub(super) struct Options {
    /// Name of the service
    name: String,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    global.ask("service_monitor", json!([options.name])).await
}
