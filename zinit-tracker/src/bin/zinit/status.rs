//! `zinit status`: one service in detail.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;
use zinit_tracker::rpc::ServiceStatus;

use super::{Global, print, yaml};

/// Show a service: main process, state, target, and the states of those it depends on
#[derive(Args)]
#[command(after_help = "Example: zinit status web\n\n\
    Exit status: 0, or 1 if there is no such service or the supervisor does not answer.")]
pub(super) struct Options {
    /// Name of the service
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let mut client = global.connect().await?;
    let status: ServiceStatus = client.call("service_status", json!([options.name])).await?;
    if options.json {
        print::print_json(&status)?;
    } else {
        print::print(&yaml::status(&status))?;
    }
    Ok(ExitCode::SUCCESS)
}
