//! One guest: boots a kernel and reads what its init says.

use super::{guest::with_libraries, report::Guest};
use anyhow::{Context as _, Result};
use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// How many processors a guest has.
pub(crate) const PROCESSORS: usize = 2;

/// How long a guest may take in all that runs each test once, in seconds.
pub(crate) const LIMIT_SECONDS: u32 = 1200;
/// What timeout(1) returns when the limit is reached.
const TIMED_OUT: i32 = 124;

/// What a guest is started with.
pub(crate) struct Machine<'a> {
    /// Where QEMU's packages are unpacked.
    pub(crate) tree: &'a Path,
    /// The kernel.
    pub(crate) image: &'a Path,
    /// Its first file system.
    pub(crate) initramfs: &'a Path,
    /// The end of its command line.
    pub(crate) arguments: &'a str,
    /// How long it may take.
    pub(crate) limit_seconds: u32,
    /// Where to write what the kernel says (`.console`) and what the tests say (`.tests`).
    pub(crate) log: &'a Path,
}

/// How a guest ended.
pub(crate) struct Ended {
    /// QEMU's exit status; 0 if the guest turned itself off.
    pub(crate) status: Option<i32>,
    /// From the start of QEMU.
    pub(crate) duration: Duration,
    /// What the kernel and PID 1 said.
    pub(crate) console: String,
}

impl Ended {
    /// Whether the guest was ended at its limit.
    pub(crate) fn timed_out(&self) -> bool {
        self.status == Some(TIMED_OUT)
    }
}

/// Boots the machine, runs its tests, and returns when it is off.
///
/// # Errors
///
/// As of [`watch`].
pub(crate) fn boot(machine: &Machine<'_>) -> Result<Guest> {
    let mut guest = Guest::default();
    let ended = watch(machine, |line, elapsed| guest.hear(line, elapsed))?;
    guest.timed_out = ended.timed_out();
    guest.console = ended.console;
    guest.duration = ended.duration;
    Ok(guest)
}

/// Boots the machine, passes on each line of its second serial port, and returns when it is off.
///
/// # Errors
///
/// QEMU cannot be started, or its output not be read. A guest that crashes or hangs is no error here.
pub(crate) fn watch(machine: &Machine<'_>, mut hear: impl FnMut(&str, Duration)) -> Result<Ended> {
    let console = machine.log.with_extension("console");
    let started = Instant::now();
    let mut qemu = command(machine, &console)?;
    let mut child = qemu.stdout(Stdio::piped()).spawn().context("failed to start QEMU")?;
    let tests = machine.log.with_extension("tests");
    let mut said = File::create(&tests).with_context(|| format!("failed to create {}", tests.display()))?;
    let mut lines = BufReader::new(child.stdout.take().context("QEMU has no output")?);
    loop {
        let mut line = Vec::new();
        if lines
            .read_until(b'\n', &mut line)
            .context("failed to read from the guest")?
            == 0
        {
            break;
        }
        said.write_all(&line)
            .with_context(|| format!("failed to write {}", tests.display()))?;
        let line = String::from_utf8_lossy(&line);
        hear(line.trim_end(), started.elapsed());
    }
    let status = child.wait().context("failed to wait for QEMU")?;
    let console = fs::read(&console).context("failed to read what the kernel said")?;
    Ok(Ended {
        status: status.code(),
        duration: started.elapsed(),
        console: String::from_utf8_lossy(&console).into_owned(),
    })
}

/// QEMU below timeout(1), which ends it even if we are killed.
fn command(machine: &Machine<'_>, console: &Path) -> Result<Command> {
    let share = machine.tree.join("usr/share");
    let mut command = Command::new("timeout");
    let qemu = with_libraries(machine.tree);
    command
        .args(["--foreground", "--kill-after=5", &machine.limit_seconds.to_string()])
        .arg(qemu.get_program())
        .args(qemu.get_args())
        .arg(machine.tree.join("usr/bin/qemu-system-x86_64"))
        .args([
            "-machine",
            "pc",
            "-accel",
            "tcg,thread=multi",
            // Fewer features to emulate than `max` has: a tenth to a seventh less work.
            "-cpu",
            "qemu64",
            "-smp",
            "2",
            "-m",
            "2048",
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-monitor",
            "none",
            "-no-reboot",
        ])
        .arg("-L")
        .arg(share.join("qemu"))
        .arg("-L")
        .arg(share.join("seabios"))
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .args(["-serial", "stdio"])
        .arg("-kernel")
        .arg(machine.image)
        .arg("-initrd")
        .arg(machine.initramfs)
        .arg("-append")
        // Mitigations cost an emulated processor a third of its time, and it has nothing to hide.
        .arg(format!(
            "console=ttyS0 oops=panic panic=-1 loglevel=5 mitigations=off {}",
            machine.arguments
        ))
        .stdin(Stdio::null());
    Ok(command)
}
