//! Supervisors that ours is compared with.

pub(crate) mod fifo;
pub(crate) mod services;
pub(crate) mod systemd;

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::load::Load;

/// What is known of a peer.
pub(crate) struct Version {
    pub(crate) name: &'static str,
    /// Its version, or why it is not there.
    pub(crate) found: Result<String, String>,
}

/// A program in PATH, or where only root's PATH leads.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let places = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    places.map(|place| place.join(name)).find(|path| path.is_file())
}

/// Of all that are compared with.
pub(crate) fn versions(load: &Load) -> Vec<Version> {
    let debian = ["s6", "runit", "dumb-init", "supervisor", "systemd"];
    let of_package = |name| Version {
        name,
        found: debian_version(name).ok_or_else(|| format!("Debian's package {name} is not installed")),
    };
    let mut versions: Vec<_> = debian.into_iter().map(of_package).collect();
    versions.push(Version {
        name: "zinit",
        found: zinit_version(&load.peers),
    });
    versions
}

fn debian_version(package: &str) -> Option<String> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${db:Status-Abbrev} ${Version}", package]);
    let output = query.output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.strip_prefix("ii").map(|version| version.trim().to_owned())
}

/// The zinit that is on crates.io.
fn zinit_version(peers: &Path) -> Result<String, String> {
    let program = peers.join("bin/zinit");
    let output = Command::new(&program).arg("--version").output();
    let output = output.map_err(|error| format!("it was not installed: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.trim().trim_start_matches("zinit ").to_owned())
}
