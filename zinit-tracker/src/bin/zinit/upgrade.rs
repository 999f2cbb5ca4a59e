//! `zinit upgrade`: another build takes the supervisor's place.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, bail};
use clap::{Args, Parser as _};
use serde::Deserialize;
use serde_json::json;

use super::{Cli, Global, handover, print};

/// Let another build of zinit take the supervisor's place, in the same process: services go on as they are
///
/// The supervisor tries the program, saves what is not saved, and executes it. Services keep their processes, states and
/// output; clients that connect meanwhile wait. If the eBPF programs of the two differ, the new ones are attached before the old
/// ones go. If it cannot be done, everything goes on as before.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    install zinit /usr/sbin/zinit && zinit upgrade\n  \
    zinit upgrade --binary /opt/zinit-next/zinit\n\n\
    Exit status: 0 once the other build answers, 1 if the supervisor goes on as it was or does not answer.")]
pub(super) struct Options {
    /// The program; otherwise what is now where the supervisor's program was when it began
    #[arg(short, long, value_name = "PATH", conflicts_with = "check")]
    binary: Option<PathBuf>,
    /// Print what this program calls itself and which handovers it understands, as a supervisor asks before; fail if it does not
    /// understand the supervisor's command line
    #[arg(long)]
    check: bool,
    /// The supervisor's command line
    #[arg(last = true, requires = "check", value_name = "ARGUMENT")]
    command_line: Vec<OsString>,
}

/// Of this supervisor, as a successor is asked about it. Nothing if PID 1 was given words that are not for it.
pub(super) fn command_line() -> Vec<OsString> {
    let arguments: Vec<_> = std::env::args_os().collect();
    match Cli::try_parse_from(&arguments) {
        Ok(_) => std::iter::once("--".into()).chain(arguments).collect(),
        Err(_) => Vec::new(),
    }
}

/// The result of `system_info`.
#[derive(Debug, Deserialize)]
struct Info {
    upgrades: u32,
}

/// What `--check` prints.
pub(super) fn greeting() -> String {
    format!("zinit {} handover {}", env!("CARGO_PKG_VERSION"), handover::VERSION)
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    if options.check {
        if !options.command_line.is_empty() {
            Cli::try_parse_from(&options.command_line).context("the supervisor's command line is not understood")?;
        }
        print::print(&format!("{}\n", greeting()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let binary = options.binary.as_ref().map(|path| {
        std::path::absolute(path).with_context(|| format!("failed to find out where {} is", path.display()))
    });
    let binary = binary.transpose()?;
    let mut client = global.connect().await?;
    let before: Info = client.call("system_info", json!([])).await?;
    let version: String = client.call("system_upgrade", json!([binary])).await?;
    drop(client);
    // Whoever serves the socket next answers this.
    let after: Info = global.connect().await?.call("system_info", json!([])).await?;
    if after.upgrades <= before.upgrades {
        bail!("the supervisor goes on as it was, although {version} would do: its messages say why");
    }
    print::print(&format!("{version}\n"))?;
    Ok(ExitCode::SUCCESS)
}
