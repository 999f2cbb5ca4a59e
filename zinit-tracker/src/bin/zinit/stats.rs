//! `zinit stats`: what a service uses.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;
use zinit_tracker::rpc::ServiceStats;

use super::{Global, print, yaml};

/// Show what the processes of a service use: memory in bytes, processor time in percent of one processor
#[derive(Args)]
#[command(after_help = "Example: zinit stats web --json\n\n\
    Exit status: 0, or 1 if the service is not running or the supervisor does not answer.")]
pub(super) struct Options {
    /// Name of the service
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let mut client = global.connect().await?;
    let stats: ServiceStats = client.call("service_stats", json!([options.name])).await?;
    if options.json {
        print::print_json(&stats)?;
    } else {
        print::print(&yaml::stats(&stats))?;
    }
    Ok(ExitCode::SUCCESS)
}
