//! `zinit reload`: what has changed in the configuration directory takes effect.

use std::{collections::BTreeMap, process::ExitCode};

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Global, print};

/// Read all service files again: supervise new services, and take over what has changed
///
/// A changed definition holds from the next start of its service on; services that have no file any more stay as they are.
/// Fails if a file is no good.
#[derive(Args)]
#[command(after_help = "Example: zinit check /etc/zinit && zinit reload\n\n\
    Exit status: 0, or 1 if a file is no good or the supervisor does not answer.")]
pub(super) struct Options {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The result of `system_reload`.
#[derive(Debug, Deserialize, Serialize)]
struct Changes {
    added: Vec<String>,
    changed: Vec<String>,
    missing: Vec<String>,
    failed: BTreeMap<String, String>,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let changes: Changes = global.connect().await?.call("system_reload", json!([])).await?;
    if options.json {
        print::print_json(&changes)?;
    } else {
        print::print(&changes.text())?;
    }
    for reason in changes.failed.values() {
        print::note(reason);
    }
    Ok(if changes.failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Changes {
    fn text(&self) -> String {
        let lines = [
            ("added", &self.added),
            ("changed, from its next start on", &self.changed),
            ("without a file now, left as it is", &self.missing),
        ];
        let lines = lines
            .into_iter()
            .flat_map(|(what, names)| names.iter().map(move |name| format!("{name}: {what}\n")));
        lines.collect()
    }
}
