//! The command that starts an actor.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::oracle::Marker;

/// Overrides where [`actor_path`] looks, for test binaries that were copied elsewhere (into a virtual machine, say).
pub const ACTOR_PATH_ENV: &str = "ZINIT_TEST_ACTOR";

/// Where the `actor` binary is: [`ACTOR_PATH_ENV`], or beside the running test binary, or one directory above it.
///
/// # Errors
/// Fails if it is in none of these places: integration tests of this package build it, other packages must ask for it.
pub fn actor_path() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(ACTOR_PATH_ENV) {
        return Ok(PathBuf::from(path));
    }
    let test = std::env::current_exe().context("failed to find the running test binary")?;
    for dir in test.ancestors().skip(1).take(2) {
        let candidate = dir.join("actor");
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!(
        "no `actor` beside {} or one directory above it; build it with `cargo build -p zinit-tests`",
        test.display()
    )
}

/// A command that runs `actor BEHAVIOUR ARGS` with the marker in its environment, ready to spawn.
///
/// # Panics
/// Panics if the actor binary cannot be found (see [`actor_path`]).
pub fn actor<S: AsRef<OsStr>>(behaviour: &str, args: impl IntoIterator<Item = S>, marker: &Marker) -> Command {
    let path = actor_path().expect("the actor binary is built along with the tests");
    actor_at(&path, behaviour, args, marker)
}

/// Like [`actor`], for an actor binary at a known path (`env!("CARGO_BIN_EXE_actor")`).
///
/// Standard input is /dev/null, and so is standard output, which a test that waits for EOF would otherwise share with every
/// process of the actor.
pub fn actor_at<S: AsRef<OsStr>>(
    path: &Path,
    behaviour: &str,
    args: impl IntoIterator<Item = S>,
    marker: &Marker,
) -> Command {
    let mut command = Command::new(path);
    command.arg(behaviour).args(args).env(Marker::ENV, marker.as_str());
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}
