//! `zinit log`: what services print.

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;
use clap::Args;
use serde_json::json;
use zinit_tracker::rpc::ServiceStatus;

use super::Global;

/// Print the newest lines of services, and then those that come
#[derive(Args)]
#[command(after_help = "Example: zinit log --snapshot web\n\n\
    Exit status: 0, or 1 if there is no such service or the connection broke.")]
pub(super) struct Options {
    /// Do not wait for more lines
    #[arg(short, long)]
    pub(super) snapshot: bool,
    /// Only lines of this service
    filter: Option<String>,
    /// The supervisor's Unix socket; `-s` is taken here
    // The option of all commands under the same id: it takes the value from here, and leaves us `-s`.
    #[arg(id = "socket", long = "socket", value_name = "PATH")]
    _socket: Option<PathBuf>,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let mut client = global.connect().await?;
    if let Some(name) = &options.filter {
        // No lines, and no service, are two things.
        let _: ServiceStatus = client.call("service_status", json!([name])).await?;
    }
    if options.snapshot {
        let lines: Vec<String> = client.call("stream_currentLogs", json!([options.filter])).await?;
        write(lines.iter())?;
        return Ok(ExitCode::SUCCESS);
    }
    let _: u64 = client
        .call("stream_subscribeLogs", json!([options.filter, true]))
        .await?;
    while let Some(line) = client.next_line().await? {
        if !write([line].iter())? {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes lines to stdout; false: nobody reads them any more.
fn write<'a>(lines: impl Iterator<Item = &'a String>) -> anyhow::Result<bool> {
    let mut stdout = io::stdout().lock();
    let mut written = Ok(());
    for line in lines {
        written = written.and_then(|()| writeln!(stdout, "{line}"));
    }
    match written.and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("failed to write to stdout"),
    }
}
