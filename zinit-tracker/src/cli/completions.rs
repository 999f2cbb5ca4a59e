//! `zinit-tracker completions`: for shells.

use std::process::ExitCode;

use clap::{Args, CommandFactory as _};
use clap_complete::{Shell, generate};

use super::{Cli, output};

/// Print what a shell needs to complete the commands and options of this program
#[derive(Args)]
#[command(
    after_help = "Example: zinit-tracker completions bash > /usr/share/bash-completion/completions/zinit-tracker\n\n\
    Exit status: 0, or 1 if stdout could not be written to."
)]
pub(super) struct Options {
    /// The shell
    shell: Shell,
}

pub(super) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    generate(options.shell, &mut Cli::command(), env!("CARGO_BIN_NAME"), &mut script);
    output::print(&String::from_utf8(script)?)?;
    Ok(ExitCode::SUCCESS)
}
