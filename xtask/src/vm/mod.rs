//! `cargo xtask vm`: the end-to-end tests on other kernels than the running one.
//!
//! Debian's cloud kernels in QEMU's software emulation, so that virtualisation is not needed; nothing is installed. Packages,
//! logs and test binaries are kept in `target/vm`.

mod apt;
mod cpio;
mod doctor;
mod groups;
mod guest;
mod kernels;
mod pid1;
mod qemu;
mod report;

use crate::workspace::target;
use anyhow::{Context as _, Result, bail, ensure};
use apt::Apt;
use groups::Call;
use guest::{Binaries, Calls};
use kernels::Boot;
use nix::sys::resource::{UsageWho, getrusage};
use qemu::Machine;
use report::{Figures, Group, Guest};
use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Instant,
};

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
    /// Boot guests whose PID 1 is zinit instead
    #[arg(long)]
    pid1: bool,
    /// How often a test repeats what may go wrong once in many times
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Passed on to the test binaries: a filter, or options
    #[arg(last = true)]
    arguments: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kernel: Vec::new(),
            preempt: None,
            pid1: false,
            rounds: 1,
            arguments: Vec::new(),
        }
    }
}

impl Options {
    /// Boot guests whose PID 1 is zinit.
    pub(crate) fn pid1() -> Self {
        Self {
            pid1: true,
            ..Self::default()
        }
    }
}

/// Fetches, builds, boots the guests, and prints the table.
///
/// # Errors
///
/// A test fails, a guest does, or too few kernels could be had.
pub(crate) fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    let directory = target().join("vm");
    let logs = directory.join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("failed to create {}", logs.display()))?;
    if options.pid1 {
        let apt = Apt::open(&directory)?;
        let tools = tools(&apt)?;
        return pid1::run(&apt, &tools, &directory, &options.kernel);
    }
    // One waits for the network, the other for processors.
    let (fetched, built) = thread::scope(|scope| {
        let building = scope.spawn(|| guest::build(&directory.join("build")));
        let fetched = fetch(&directory, options);
        (fetched, building.join().expect("building returns its errors"))
    });
    let ((tools, boots), binaries) = (fetched?, built?);
    let groups = binaries.group_names();
    for group in groups::stale(&groups) {
        println!("WARNING: the matrix has a place for the tests of {group}, and there are none");
    }
    let laboratory = Laboratory {
        tools,
        binaries: &binaries,
        calls: Calls {
            arguments: &options.arguments,
            rounds: options.rounds,
        },
        logs,
    };
    println!("ready after {:.0} s", started.elapsed().as_secs_f64());
    let assigned = groups::assign(&groups, &boots);
    let guests = laboratory.test_all(&boots, &assigned)?;
    let results: Vec<_> = boots.into_iter().zip(guests).collect();
    println!("{}", report::table(&results));
    println!(
        "all in {:.0} s, with {} s of processor time; logs are in {}",
        started.elapsed().as_secs_f64(),
        processor_seconds()?,
        laboratory.logs.display()
    );
    verdict(&results, options.kernel.is_empty())
}

/// The tree of packages that every guest is made of.
fn tools(apt: &Apt) -> Result<PathBuf> {
    let tools = apt.closure(&[&["qemu-system-x86"][..], &guest::PACKAGES].concat())?;
    apt.tree("tools", &tools, |_| Ok(()))
}

fn fetch(directory: &Path, options: &Options) -> Result<(PathBuf, Vec<Boot>)> {
    let apt = Apt::open(directory)?;
    let tools = tools(&apt)?;
    let boots = kernels::boots(&apt, &options.kernel, options.preempt.as_deref())?;
    ensure!(
        !boots.is_empty(),
        "no kernel matches; there are: {}",
        kernels::names().join("; ")
    );
    Ok((tools, boots))
}

/// What our ended children have used.
fn processor_seconds() -> Result<i64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("failed to read the use of processors")?;
    Ok(usage.user_time().tv_sec() + usage.system_time().tv_sec())
}

/// What all guests have in common.
struct Laboratory<'a> {
    tools: PathBuf,
    binaries: &'a Binaries,
    calls: Calls<'a>,
    logs: PathBuf,
}

impl Laboratory<'_> {
    /// Runs on each boot the groups that are assigned to it; none for a boot without a kernel.
    fn test_all(&self, boots: &[Boot], assigned: &[Vec<Call<'_>>]) -> Result<Vec<Option<Guest>>> {
        let next = AtomicUsize::new(0);
        let work = || -> Result<Vec<(usize, Guest)>> {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(boot) = boots.get(index) else {
                    return Ok(done);
                };
                match &boot.image {
                    Ok(image) => done.push((index, self.test(boot, image, &assigned[index])?)),
                    Err(error) => println!("== {}: SKIPPED: {error:#}\n", boot.label()),
                }
            }
        };
        let mut guests: Vec<_> = boots.iter().map(|_| None).collect();
        thread::scope(|scope| {
            let workers: Vec<_> = (0..guests_at_once()).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                let done = worker.join().expect("a worker returns its errors");
                for (index, guest) in done? {
                    guests[index] = Some(guest);
                }
            }
            Ok(guests)
        })
    }

    /// Runs the groups on one kernel, and prints what comes of it.
    fn test(&self, boot: &Boot, image: &Path, groups: &[Call<'_>]) -> Result<Guest> {
        let log = self.logs.join(boot.label().replace([' ', '='], "-").replace('.', "_"));
        let initramfs = log.with_extension("initramfs");
        guest::pack(&initramfs, &self.tools, self.binaries, groups, self.calls)?;
        let guest = qemu::boot(&Machine {
            tree: &self.tools,
            image,
            initramfs: &initramfs,
            arguments: &boot.arguments,
            limit_seconds: qemu::LIMIT_SECONDS.saturating_mul(self.calls.rounds),
            log: &log,
        })?;
        fs::remove_file(&initramfs).with_context(|| format!("failed to remove {}", initramfs.display()))?;
        println!("{}", story(boot, &guest));
        Ok(guest)
    }
}

/// As many guests as get two processors each; every guest has two, because one shows no races.
fn guests_at_once() -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    (processors / qemu::PROCESSORS).max(1)
}

/// What came of one boot: figures and faults, and all output of the groups that failed.
fn story(boot: &Boot, guest: &Guest) -> String {
    let mut story = format!("== {}\n", boot.label());
    let mut line = |text: &str| writeln!(story, "{text}").expect("a string takes everything");
    for group in &guest.groups {
        let took = group
            .figures()
            .map_or(String::new(), |Figures { seconds, .. }| format!(" in {seconds}"));
        line(&format!("   {}: {}{took}", group.name, group.outcome()));
        for reason in group.skipped() {
            line(&format!("      skipped: {reason}"));
        }
        if group.failed() {
            line(&group.output.join("\n"));
        }
    }
    for promise in report::promises(guest).lines() {
        line(&format!("   {promise}"));
    }
    for fault in guest.faults(boot) {
        line(&format!("   FAULT: {fault}"));
    }
    if !guest.finished {
        line(&format!(
            "   the last words of its kernel:\n{}",
            last(&guest.console, 30)
        ));
    }
    story
}

fn last(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Says how many tests ran. Fails if a guest has, and, for the whole matrix, if too few kernels ran or no test was run.
fn verdict(results: &[(Boot, Option<Guest>)], whole: bool) -> Result<()> {
    for (boot, _) in results.iter().filter(|(_, guest)| guest.is_none()) {
        println!("WARNING: {} was SKIPPED: nothing is known about it", boot.label());
    }
    let ran: Vec<_> = results
        .iter()
        .filter_map(|(boot, guest)| guest.as_ref().map(|guest| (boot, guest)))
        .collect();
    let mut kernels: Vec<_> = ran.iter().map(|(boot, _)| &boot.version).collect();
    kernels.dedup();
    let figures = ran
        .iter()
        .flat_map(|(_, guest)| &guest.groups)
        .filter_map(Group::figures);
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for group in figures {
        passed += group.passed;
        failed += group.failed;
        skipped += group.skipped;
    }
    println!(
        "kernel matrix: {passed} tests passed, {failed} failed, {skipped} skipped, in {} boots of {} kernels",
        ran.len(),
        kernels.len()
    );
    let least = if whole { LEAST_KERNELS } else { 1 };
    ensure!(
        kernels.len() >= least,
        "{} kernels ran, fewer than {least}",
        kernels.len()
    );
    let wrong = ran.iter().filter(|(boot, guest)| !guest.faults(boot).is_empty());
    let wrong: Vec<_> = wrong.map(|(boot, _)| boot.label()).collect();
    if !wrong.is_empty() {
        bail!("not right: {}", wrong.join("; "));
    }
    ensure!(passed > 0, "no test was run");
    Ok(())
}
