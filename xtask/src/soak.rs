//! `cargo xtask soak`: the daemon works for hours, and must not grow.

use crate::workspace::{call, cargo, target};
use anyhow::{Result, ensure};
use std::process::Command;

/// Let a supervisor work for hours, and compare what it uses and what its books say at the end with the beginning
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How long; 0.1 is six minutes
    #[arg(long, value_name = "H", default_value_t = 1.0)]
    hours: f64,
}

/// Builds what is measured as users build it, and runs it.
///
/// # Errors
///
/// We are not root, the time is none, it does not build, something has grown, or the books were wrong.
pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the supervisor loads BPF programs, which takes root: run `sudo -E env PATH=\"$PATH\" cargo xtask soak`"
    );
    ensure!(
        options.hours.is_finite() && options.hours * 3600.0 >= 1.0,
        "--hours {} is less than a second",
        options.hours
    );
    call(cargo().args(["build", "--release", "--package", "zinit-tracker", "--bins"]))?;
    call(cargo().args(["build", "--release", "--package", "zinit-tests", "--bin", "soak"]))?;
    let programs = target().join("release");
    let mut soak = Command::new(programs.join("soak"));
    soak.arg(format!("{:.0}", options.hours * 3600.0))
        .env("ZINIT_TEST_TOOL", programs.join("zinit-tracker"));
    call(&mut soak)
}
