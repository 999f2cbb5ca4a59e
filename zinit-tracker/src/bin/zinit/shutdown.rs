//! `zinit shutdown`: the end of the supervisor, and of the machine if it is PID 1.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Global;

/// Stop all services, dependants first, and power off (as PID 1 outside a container) or end
///
/// Returns when the services are down, and fails if processes are left in spite of everything.
#[derive(Args)]
#[command(after_help = "Example: zinit shutdown\n\n\
    Exit status: 0 if nothing is left, 1 if processes are left or it failed.")]
pub(super) struct Options {}

pub(super) async fn run(global: &Global, _: &Options) -> anyhow::Result<ExitCode> {
    global.ask("system_shutdown", json!([])).await
}
