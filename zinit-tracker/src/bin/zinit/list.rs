//! `zinit list`: every service and its state.

use std::{collections::BTreeMap, process::ExitCode};

use clap::Args;
use serde_json::json;

use super::{Global, print, yaml};

/// List all services and their states
#[derive(Args, Default)]
#[command(after_help = "Example: zinit list --json\n\nExit status: 0, or 1 if the supervisor does not answer.")]
pub(super) struct Options {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let states: BTreeMap<String, String> = global.connect().await?.call("service_list", json!([])).await?;
    if options.json {
        print::print_json(&states)?;
    } else {
        print::print(&yaml::states(&states))?;
    }
    Ok(ExitCode::SUCCESS)
}
