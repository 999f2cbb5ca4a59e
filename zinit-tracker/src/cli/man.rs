//! `zinit-tracker man`: manual pages.

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, CommandFactory as _};

use super::{
    Cli,
    manual::{self, Facts},
};

const FACTS: Facts<'static> = Facts {
    environment: &[
        (
            "CLICOLOR_FORCE",
            "If it is set and not 0, listings have colours also where stdout is no terminal. --color overrides it.",
        ),
        (
            "NO_COLOR",
            "If it is set and not empty, nothing has colours, whatever CLICOLOR_FORCE says. --color overrides it.",
        ),
        (
            "PAGER",
            "What listings go through that are longer than the terminal: a command of sh(1). Unset: less(1). Empty or cat: nothing. \
             LESS, LV and LESSSECURE are set to FRX, -c and 1 for it, unless they are set.",
        ),
        (
            "RUST_LOG",
            "What is said on stderr, as directives of tracing-subscriber, such as zinit_tracker=debug. Overrides --verbose.",
        ),
    ],
    files: &[
        (
            "/sys/fs/bpf/zinit",
            "Programs and maps, unless --pins says otherwise. They are gone when no service is left.",
        ),
        (
            "/sys/kernel/btf/vmlinux",
            "The kernel's types, which the programs need.",
        ),
    ],
    related: &["zinit"],
};

/// Write the manual: a page for this program, and one for each of its commands
#[derive(Args)]
#[command(after_help = "Example: zinit-tracker man /usr/local/share/man/man8\n\n\
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
