//! One guest: boots a kernel and reads what its init says.

use super::{
    guest::with_libraries,
    report::{Group, Guest},
};
use anyhow::{Context as _, Result};
use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

/// How long a guest may take in all, in seconds.
const LIMIT_SECONDS: u32 = 600;
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
    /// Where to write what the kernel says (`.console`) and what the tests say (`.tests`).
    pub(crate) log: &'a Path,
}

/// Boots the machine and returns when it is off; `progress` is told of every group that has ended.
///
/// # Errors
///
/// QEMU cannot be started, or its output not be read. A guest that crashes or hangs is no error here.
pub(crate) fn boot(machine: &Machine<'_>, mut progress: impl FnMut(&Group)) -> Result<Guest> {
    let console = machine.log.with_extension("console");
    let started = Instant::now();
    let mut qemu = command(machine, &console)?;
    let mut child = qemu.stdout(Stdio::piped()).spawn().context("failed to start QEMU")?;
    let mut guest = Guest::default();
    let mut said = Vec::new();
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
        said.extend_from_slice(&line);
        let line = String::from_utf8_lossy(&line);
        if let Some(ended) = guest.hear(line.trim_end(), started.elapsed()) {
            progress(ended);
        }
    }
    let status = child.wait().context("failed to wait for QEMU")?;
    guest.timed_out = status.code() == Some(TIMED_OUT);
    let tests = machine.log.with_extension("tests");
    fs::write(&tests, said).with_context(|| format!("failed to write {}", tests.display()))?;
    let console = fs::read(&console).context("failed to read what the kernel said")?;
    guest.console = String::from_utf8_lossy(&console).into_owned();
    guest.duration = started.elapsed();
    Ok(guest)
}

/// QEMU below timeout(1), which ends it even if we are killed.
fn command(machine: &Machine<'_>, console: &Path) -> Result<Command> {
    let share = machine.tree.join("usr/share");
    let mut command = Command::new("timeout");
    let qemu = with_libraries(machine.tree);
    command
        .args(["--foreground", "--kill-after=5", &LIMIT_SECONDS.to_string()])
        .arg(qemu.get_program())
        .args(qemu.get_args())
        .arg(machine.tree.join("usr/bin/qemu-system-x86_64"))
        .args([
            "-machine",
            "pc",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
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
            "console=ttyS0 panic=-1 loglevel=5 mitigations=off {}",
            machine.arguments
        ))
        .stdin(Stdio::null());
    Ok(command)
}
