//! `cargo xtask bench`: what the project promises of its speed and size, measured beside others that do the same.
//!
//! Measured by the program `bench` of `tests/`, which this builds, with all that it takes, as users would build it unless it is to be quick. Other supervisors
//! are installed where that leaves the system's own alone: in `target/bench`, or by Debian's packages where apt is there.

use crate::workspace::{call, cargo, output, root, target};
use anyhow::{Context as _, Result, bail, ensure};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Supervisors that Debian has. None of them starts anything by being installed.
const PACKAGES: [&str; 5] = ["dumb-init", "runit", "s6", "supervisor", "systemd"];

/// The zinit whose files and commands ours takes.
const ZINIT: &str = "0.3.9";

/// Measure speed and size, beside other supervisors
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Fewer rounds and smaller sizes: shows in three minutes that it works, and is nothing to judge by
    #[arg(long)]
    quick: bool,
    /// Write all that was measured to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Install no other supervisors: those that are missing are left out
    #[arg(long)]
    no_install: bool,
    /// What is measured, by the files of tests/src/bin/bench/rows; all if none is named
    #[arg(value_name = "ROW")]
    rows: Vec<String>,
}

impl Options {
    /// All rows, to see that they work. Other supervisors are those of Debian, as the rest takes minutes to build.
    pub(crate) fn quick() -> Self {
        Self {
            quick: true,
            json: None,
            no_install: false,
            rows: Vec::new(),
        }
    }
}

/// Builds, installs what is missing, and measures; the table goes to stdout.
///
/// # Errors
///
/// We are not root, there is no such row, something does not build, or a row could not be measured.
pub(crate) fn run(options: &Options) -> Result<()> {
    check(&options.rows)?;
    ensure!(
        rustix::process::geteuid().is_root(),
        "measuring loads BPF programs, which takes root: run `sudo -E env PATH=\"$PATH\" cargo xtask bench`"
    );
    let directory = target().join("bench");
    fs::create_dir_all(&directory).with_context(|| format!("failed to create {}", directory.display()))?;
    // A quick run takes the programs as the tests have them: to optimise them takes longer than to measure.
    let (profile, programs) = if options.quick {
        call(cargo().args(["build", "--workspace", "--bins", "--tests"]))?;
        ("dev", target().join("debug"))
    } else {
        // Together: alone, they would be built with other features of what they share, and all of that twice.
        let names = ["zinit-tracker", "zinit", "bench", "actor"];
        call(
            cargo()
                .args([
                    "build",
                    "--release",
                    "--package",
                    "zinit-tracker",
                    "--package",
                    "zinit-tests",
                ])
                .args(names.iter().flat_map(|name| ["--bin", name])),
        )?;
        ("release", target().join("release"))
    };
    // Without the C library's dynamic loader: the fewer pages it has, the less a fork costs beside what is measured.
    call(
        cargo()
            .args(["rustc", "--profile", profile, "--package", "zinit-subject"])
            .args(["--", "-Ctarget-feature=+crt-static", "-Crelocation-model=static"]),
    )?;
    let peers = directory.join(format!("zinit-{ZINIT}"));
    if !options.no_install {
        install_packages();
        if !options.quick {
            install_zinit(&peers);
        }
    }
    let mut bench = Command::new(programs.join("bench"));
    bench
        .arg("--subject")
        .arg(programs.join("subject"))
        .arg("--peers")
        .arg(&peers)
        .args(options.quick.then_some("--quick"))
        .args(&options.rows)
        .env("ZINIT_TEST_TOOL", programs.join("zinit-tracker"));
    if let Some(json) = &options.json {
        bench.arg("--json").arg(json);
    }
    call(&mut bench)
}

/// Refuses rows that there are not: building takes minutes.
fn check(wanted: &[String]) -> Result<()> {
    let known = rows()?;
    if let Some(unknown) = wanted.iter().find(|row| !known.contains(row)) {
        bail!("there is no row {unknown:?}, there is: {}", known.join(", "));
    }
    Ok(())
}

/// The names of the rows in order.
fn rows() -> Result<Vec<String>> {
    let directory = root().join("tests/src/bin/bench/rows");
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("failed to list {}", directory.display()))? {
        let path = entry?.path();
        names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
    }
    names.retain(|name| name != "mod");
    names.sort();
    Ok(names)
}

/// Installs those of Debian's packages that are missing. If that fails, their rows say that they are missing.
fn install_packages() {
    let missing: Vec<_> = PACKAGES.into_iter().filter(|package| !is_installed(package)).collect();
    if missing.is_empty() {
        return;
    }
    let mut install = Command::new("apt-get");
    install
        .args(["install", "--yes", "--no-install-recommends"])
        .args(&missing)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdout(std::io::stderr());
    if let Err(error) = call(&mut install) {
        eprintln!("WARNING: left out: {}: {error:#}", missing.join(", "));
    }
}

fn is_installed(package: &str) -> bool {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${db:Status-Abbrev}", package]);
    output(&mut query).is_ok_and(|status| status.starts_with("ii"))
}

/// Builds the other zinit, unless it is there.
fn install_zinit(directory: &Path) {
    if directory.join("bin/zinit").is_file() {
        return;
    }
    let mut install = cargo();
    install
        .args(["install", "zinit", "--version", ZINIT, "--locked", "--root"])
        .arg(directory);
    if env::var_os("CARGO_TARGET_DIR").is_none() {
        install.env("CARGO_TARGET_DIR", target().join("bench/build"));
    }
    if let Err(error) = call(&mut install) {
        eprintln!("WARNING: left out: zinit {ZINIT}: {error:#}");
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn an_unknown_row_is_refused_by_naming_those_that_there_are() {
        assert!(check(&["forks".to_owned(), "kill".to_owned()]).is_ok());
        let refused = check(&["fork".to_owned()]).unwrap_err().to_string();
        assert!(refused.contains("\"fork\""), "{refused}");
        assert!(refused.contains("command, forks, growth, hooks"), "{refused}");
    }
}
