//! `cargo xtask vm`: the end-to-end tests on other kernels than the running one.
//!
//! Debian's cloud kernels in QEMU's software emulation, so that virtualisation is not needed; nothing is installed. Packages,
//! logs and test binaries are kept in `target/vm`.

mod apt;
mod cpio;
mod guest;
mod kernels;
mod qemu;
mod report;

use crate::workspace::target;
use anyhow::{Context as _, Result, bail, ensure};
use apt::Apt;
use kernels::Boot;
use qemu::Machine;
use report::{Group, Guest};
use std::{fs, path::Path, time::Instant};

/// With fewer kernels than these the matrix shows nothing.
const LEAST_KERNELS: usize = 4;

/// Run the end-to-end tests in virtual machines, on Linux 5.10 to 7.x
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only kernels whose line in the table contains this, like 6.12 or lockdown; may be repeated
    #[arg(long, value_name = "PATTERN")]
    kernel: Vec<String>,
    /// Boot each kernel once, with this preemption (none, voluntary, lazy or full)
    #[arg(long, value_name = "MODE")]
    preempt: Option<String>,
    /// Passed on to the test binaries: a filter, or options
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// Fetches, builds, boots one guest after another, and prints the table.
///
/// # Errors
///
/// A test fails, a guest does, or too few kernels could be had.
pub(crate) fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    let directory = target().join("vm");
    let logs = directory.join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("failed to create {}", logs.display()))?;
    let apt = Apt::open(&directory)?;
    let tools = apt.closure(&[&["qemu-system-x86"][..], &guest::PACKAGES].concat())?;
    let tools = apt.tree("tools", &tools, |_| Ok(()))?;
    let boots = kernels::boots(&apt, &options.kernel, options.preempt.as_deref())?;
    ensure!(!boots.is_empty(), "no kernel matches");
    let binaries = guest::build(&directory.join("build"))?;
    let initramfs = directory.join("initramfs");
    println!("ready after {:.0} s", started.elapsed().as_secs_f64());
    let mut results = Vec::new();
    for boot in boots {
        let guest = match &boot.image {
            Ok(image) => {
                guest::pack(
                    &initramfs,
                    &tools,
                    &binaries,
                    boot.arguments.is_empty(),
                    &options.arguments,
                )?;
                Some(tested(&boot, image, &tools, &initramfs, &logs)?)
            }
            Err(error) => {
                println!("== {}: SKIPPED: {error:#}", boot.label());
                None
            }
        };
        results.push((boot, guest));
    }
    println!("\n{}", report::table(&results));
    println!(
        "all in {:.0} s; logs are in {}",
        started.elapsed().as_secs_f64(),
        logs.display()
    );
    verdict(&results, options.kernel.is_empty())
}

/// Runs the tests on one kernel, and prints what comes of it.
fn tested(boot: &Boot, image: &Path, tools: &Path, initramfs: &Path, logs: &Path) -> Result<Guest> {
    println!("== {}", boot.label());
    let log = logs.join(boot.label().replace([' ', '='], "-").replace('.', "_"));
    let machine = Machine {
        tree: tools,
        image,
        initramfs,
        arguments: &boot.arguments,
        log: &log,
    };
    let guest = qemu::boot(&machine, show)?;
    let faults = guest.faults(boot);
    for fault in &faults {
        println!("   FAULT: {fault}");
    }
    if !guest.finished {
        println!("   the last words of its kernel:\n{}", last(&guest.console, 30));
    }
    Ok(guest)
}

/// Prints the result of a group: figures, and all of its output if it failed.
fn show(group: &Group) {
    let seconds = group
        .figures()
        .map_or(String::new(), |figures| format!(" in {}", figures.seconds));
    println!("   {}: {}{seconds}", group.name, group.outcome());
    for reason in group.skipped() {
        println!("      skipped: {reason}");
    }
    if group.failed() {
        println!("{}", group.output.join("\n"));
    }
}

fn last(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Fails if a guest has, and, for the whole matrix, if too few kernels ran or no test was run.
fn verdict(results: &[(Boot, Option<Guest>)], whole: bool) -> Result<()> {
    let failed: Vec<_> = results
        .iter()
        .filter(|(boot, guest)| guest.as_ref().is_some_and(|guest| !guest.faults(boot).is_empty()))
        .map(|(boot, _)| boot.label())
        .collect();
    for (boot, _) in results.iter().filter(|(_, guest)| guest.is_none()) {
        println!("WARNING: {} was SKIPPED: nothing is known about it", boot.label());
    }
    let ran = results
        .iter()
        .filter_map(|(boot, guest)| guest.as_ref().map(|_| &boot.version));
    let mut ran: Vec<_> = ran.collect();
    ran.dedup();
    let least = if whole { LEAST_KERNELS } else { 1 };
    ensure!(ran.len() >= least, "{} kernels ran, fewer than {least}", ran.len());
    let passed = |guest: &Guest| {
        guest
            .groups
            .iter()
            .filter_map(Group::figures)
            .map(|figures| figures.passed)
            .sum::<u32>()
    };
    let idle = results
        .iter()
        .filter_map(|(_, guest)| guest.as_ref())
        .all(|guest| passed(guest) == 0);
    if !failed.is_empty() {
        bail!("not right: {}", failed.join("; "));
    }
    ensure!(!idle, "no test was run");
    Ok(())
}
