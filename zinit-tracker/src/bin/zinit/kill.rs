//! `zinit kill`: one signal.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Global;

/// Send one signal to the main process of a service
#[derive(Args)]
#[command(after_help = "Example: zinit kill web SIGHUP\n\nExit status: 0 if the signal was sent, 1 if not.")]
pub(super) struct Options {
    /// Name of the service
    name: String,
    /// Name or number of the signal
    #[arg(default_value = "SIGTERM")]
    signal: String,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    global.ask("service_kill", json!([options.name, options.signal])).await
}
