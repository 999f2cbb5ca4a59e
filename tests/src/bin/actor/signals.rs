//! Services that do with signals what a supervisor does not expect.

use std::convert::Infallible;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigHandler, SigSet, Signal, kill, signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{getpid, setsid};
use rustix::time::{ClockId, clock_gettime};

use crate::acks::Acks;
use crate::{life, process, ready};

/// Ignores a signal, in this process and those it creates.
pub(crate) fn ignore(ignored: Signal) -> Result<()> {
    // SAFETY: ignoring a signal installs no handler, and nothing relies on the one it replaces.
    unsafe { signal(ignored, SigHandler::SigIgn) }.with_context(|| format!("failed to ignore {ignored}"))?;
    Ok(())
}

/// Ignores every signal that can be ignored, but for the alarm that ends this process and the news of its children.
pub(crate) fn ignore_all() -> Result<()> {
    let needed = [Signal::SIGALRM, Signal::SIGCHLD, Signal::SIGKILL, Signal::SIGSTOP];
    Signal::iterator()
        .filter(|signal| !needed.contains(signal))
        .try_for_each(ignore)
}

/// Reports readiness and returns when SIGTERM has arrived.
pub(crate) fn wait_for_term() -> Result<()> {
    let term = SigSet::from(Signal::SIGTERM);
    term.thread_block().context("failed to block SIGTERM")?;
    ready::signal()?;
    term.wait().context("failed to wait for SIGTERM")?;
    Ok(())
}

/// Exits on SIGTERM with `status`.
pub(crate) fn exit_on_term(status: i32) -> Result<Infallible> {
    wait_for_term()?;
    life::exit_now(status)
}

/// Takes its time on SIGTERM: writes a file with the CLOCK_MONOTONIC time in nanoseconds when it is done, and exits.
pub(crate) fn slow_term(file: &str, millis: u64) -> Result<Infallible> {
    wait_for_term()?;
    std::thread::sleep(Duration::from_millis(millis));
    let now = Duration::try_from(clock_gettime(ClockId::Monotonic)).context("failed to read the clock")?;
    std::fs::write(file, now.as_nanos().to_string()).with_context(|| format!("failed to write {file}"))?;
    life::exit_now(0)
}

/// Forks on SIGTERM a child that leaves the session and ignores SIGTERM, and exits.
pub(crate) fn fork_on_term() -> Result<Infallible> {
    wait_for_term()?;
    process::fork(|| {
        setsid()?;
        ignore(Signal::SIGTERM)?;
        life::rest()
    })?;
    life::exit_now(0)
}

/// Ignores SIGTERM, as does a child.
pub(crate) fn ignore_term() -> Result<Infallible> {
    ignore(Signal::SIGTERM)?;
    let acks = Acks::new()?;
    process::fork(|| {
        acks.done()?;
        life::rest()
    })?;
    acks.wait(1)?;
    ready::signal()?;
    life::rest()
}

/// Has a child with three children that leave the session and ignore SIGTERM.
pub(crate) fn ignore_term_grandchildren() -> Result<Infallible> {
    const GRANDCHILDREN: usize = 3;
    let acks = Acks::new()?;
    process::fork(|| {
        for _ in 0..GRANDCHILDREN {
            process::fork(|| {
                setsid()?;
                ignore(Signal::SIGTERM)?;
                acks.done()?;
                life::rest()
            })?;
        }
        acks.done()?;
        life::rest()
    })?;
    acks.wait(GRANDCHILDREN + 1)?;
    ready::signal()?;
    life::rest()
}

/// Has a child that is stopped.
pub(crate) fn stopped() -> Result<Infallible> {
    let child = process::fork(|| {
        life::end_even_if_stopped().context("failed to set a timer")?;
        kill(getpid(), Signal::SIGSTOP)?;
        life::rest()
    })?;
    let status = waitpid(child, Some(WaitPidFlag::WUNTRACED))?;
    ensure!(
        matches!(status, WaitStatus::Stopped(..)),
        "the child did not stop: {status:?}"
    );
    ready::signal_with(&[("stopped_pid", &child)])?;
    life::rest()
}
