//! `zinit man`: manual pages.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, CommandFactory as _};

use super::{
    Cli,
    manual::{self, Facts},
};

const FACTS: Facts<'static> = Facts {
    environment: &[(
        "RUST_LOG",
        "What is said on stderr, as directives of tracing-subscriber, such as zinit=debug. Overrides --debug.",
    )],
    files: &[
        (
            "/etc/zinit/NAME.yaml",
            "The definition of the service NAME, unless --config of zinit init names another directory.",
        ),
        (
            "/var/run/zinit.sock",
            "Where the supervisor answers, unless --socket says otherwise.",
        ),
        ("/var/run/zinit.sock.lock", "Keeps a second supervisor from that place."),
        (
            "/var/run/zinit.sock.state",
            "A directory: what the supervisor knows of its services, for one that follows it.",
        ),
        (
            "/sys/fs/bpf/zinit",
            "Programs and maps by which processes of services are known.",
        ),
    ],
    related: &["zinit-tracker"],
};

/// Write the manual: a page for this program, and one for each of its commands
#[derive(Args)]
#[command(after_help = "Example: zinit man /usr/local/share/man/man8\n\n\
    Exit status: 0, or 1 if a page could not be written.")]
pub(super) struct Options {
    /// The directory for the pages, NAME.8; it is made if it is not there
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

pub(super) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    manual::write(Cli::command(), &FACTS, &options.directory)?;
    Ok(ExitCode::SUCCESS)
}
