//! `cargo xtask lint`: what the code must pass before anything runs.

use crate::workspace::{call, cargo};
use anyhow::Result;

/// Check formatting, lints and documentation
#[derive(clap::Args)]
pub(crate) struct Options {}

/// Checks all of the workspace; warnings are errors.
///
/// # Errors
///
/// The first check that does not pass.
pub(crate) fn run(_: &Options) -> Result<()> {
    call(cargo().args(["fmt", "--all", "--check"]))?;
    call(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    call(
        cargo()
            .args(["doc", "--workspace", "--no-deps"])
            .env("RUSTDOCFLAGS", "-Dwarnings"),
    )
}
