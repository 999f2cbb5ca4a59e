//! `zinit forget`: lets a service go.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Global;

/// Drop a service that is down from supervision
#[derive(Args)]
#[command(after_help = "Example: zinit stop web && zinit forget web\n\n\
    Exit status: 0 if the service is not supervised any more, 1 if it is.")]
pub(super) struct Options {
    /// Name of the service
    name: String,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    global.ask("service_forget", json!([options.name])).await
}
