//! `zinit stop`: a service ends, verified.

use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use serde_json::{Value, json};
use zinit_tracker::rpc::ClientError;

use super::{Global, print};

/// Stop a service, and return when nothing of it is left; fails and names what survives otherwise
#[derive(Args)]
#[command(after_help = "Example: zinit stop web && echo nothing of it is left\n\n\
    Exit status: 0 if nothing of the service is left, 1 if processes survive or it failed.")]
pub(super) struct Options {
    /// Name of the service
    name: String,
    /// Print the report of the stop as JSON, also if processes survive
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let mut client = global.connect().await?;
    let (report, error) = match client.call("service_stop", json!([options.name, true])).await {
        Ok(report) => (report, None),
        Err(ClientError::Rpc(error)) => match error.data.as_ref().map(|data| data["report"].clone()) {
            Some(report) if report.is_object() => (report, Some(ClientError::Rpc(error))),
            _ => bail!(ClientError::Rpc(error)),
        },
        Err(error) => bail!(error),
    };
    if options.json {
        print::print_json::<Value>(&report)?;
    }
    match error {
        Some(error) => bail!(error),
        None => note_doubts(&options.name, &report),
    }
    Ok(ExitCode::SUCCESS)
}

/// Says so if it is not certain that nothing is left.
pub(super) fn note_doubts(service: &str, report: &Value) {
    if report["proven"] == false {
        let doubts = report["doubts"].as_array().into_iter().flatten();
        let reasons: Vec<_> = doubts.filter_map(|doubt| doubt["reason"].as_str()).collect();
        print::note(&format!(
            "service {service:?} is empty; not proven: {}",
            reasons.join(", ")
        ));
    }
}
