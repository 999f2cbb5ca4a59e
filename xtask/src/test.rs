//! `cargo xtask test`: every test, those that need a kernel included, and proof that they clean up.

use crate::{
    leftovers::{MARKER, Survey},
    workspace::{call, cargo, target},
};
use anyhow::{Context as _, Result, bail, ensure};
use std::{env, fs, num::NonZero, process, thread};

/// Run every test, in the running kernel, and verify that nothing of ours is left behind
#[derive(clap::Args, Default)]
pub(crate) struct Options {
    /// Passed on to `cargo test`: a filter, or options; behind a second `--`, those of the test binaries
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// How many tests of a binary run at a time.
const THREADS: &str = "RUST_TEST_THREADS";

fn threads() -> String {
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    (2 * processors).to_string()
}

/// Runs the tests, then looks for leftovers, also when tests have failed.
///
/// # Errors
///
/// We are not root, a test fails, or something is left.
pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the tests load BPF programs, which takes root: run `sudo -E env PATH=\"$PATH\" cargo xtask test`, or, for what \
         needs no kernel, `cargo test`"
    );
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("failed to read the kernel's release")?;
    println!("kernel {}: kernel tests are included", release.trim_end());
    let survey = Survey::begin()?;
    if !survey.sees_bpf() {
        let warning = "bpftool is not installed: maps, programs and links that are left will go unseen";
        ensure!(env::var_os("CI").is_none_or(|ci| ci != "true"), "{warning}");
        eprintln!("WARNING: {warning}; to see them: apt-get install -y bpftool");
    }
    let mut tests = cargo();
    if options.arguments.is_empty() {
        // With the tests: alone, the programs would be built with other features of what both use, and all of that twice.
        call(cargo().args(["build", "--workspace", "--bins", "--tests"]))?;
        tests.env("ZINIT_TEST_TOOL", target().join("debug/zinit-tracker"));
    }
    tests
        .args(["test", "--workspace", "--no-fail-fast"])
        .args(&options.arguments)
        // They wait for others more than they compute.
        .envs(env::var_os(THREADS).is_none().then(|| (THREADS, threads())))
        // Inherited by what the tests start, so that a process is found even if its test forgot to mark it.
        .env(MARKER, process::id().to_string());
    let tested = call(&mut tests);
    survey.unmount()?;
    let left = survey.finish()?;
    if left.is_empty() {
        let bpf = if survey.sees_bpf() {
            "maps, programs, links, "
        } else {
            ""
        };
        println!("nothing of ours is left: {bpf}pins, mounts, cgroups, processes");
        return tested;
    }
    for thing in &left {
        eprintln!("left: {thing}");
    }
    match tested {
        Ok(()) => bail!("the tests passed, and left {} things behind", left.len()),
        Err(error) => Err(error.context(format!("the tests failed, and left {} things behind", left.len()))),
    }
}
