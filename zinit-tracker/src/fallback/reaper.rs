//! Orphans: this process receives them as a subreaper (prctl(2), kernel 3.4), and has to reap them.

use std::{
    os::fd::AsFd as _,
    sync::{Mutex, PoisonError},
};

use rustix::{
    io::Errno,
    process::{WaitId, WaitIdOptions, WaitIdStatus, child_subreaper, getpid, set_child_subreaper, waitid},
};

use super::error::ProcfsError;
use crate::process::Pidfd;

/// How many trackers of this process need the flag, and whether it was set before the first one.
static SUBREAPERS: Mutex<(usize, bool)> = Mutex::new((0, false));

/// Makes this process a subreaper until the last one is dropped, unless it was one before.
#[derive(Debug)]
pub(super) struct Subreaper {
    was_one: bool,
}

impl Subreaper {
    pub(super) fn become_one() -> Result<Self, ProcfsError> {
        let mut subreapers = SUBREAPERS.lock().unwrap_or_else(PoisonError::into_inner);
        if subreapers.0 == 0 {
            subreapers.1 = child_subreaper()
                .map_err(|error| ProcfsError::Subreaper(error.into()))?
                .is_some();
            set_child_subreaper(Some(getpid())).map_err(|error| ProcfsError::Subreaper(error.into()))?;
        }
        subreapers.0 += 1;
        Ok(Self { was_one: subreapers.1 })
    }

    /// Whether it was one before any tracker made it one.
    pub(super) fn was_one(&self) -> bool {
        self.was_one
    }
}

impl Drop for Subreaper {
    fn drop(&mut self) {
        let mut subreapers = SUBREAPERS.lock().unwrap_or_else(PoisonError::into_inner);
        subreapers.0 -= 1;
        if subreapers.0 == 0
            && !subreapers.1
            && let Err(error) = set_child_subreaper(None)
        {
            tracing::warn!(%error, "this process stays a subreaper");
        }
    }
}

/// Reaps a dead child, which the pidfd names beyond doubt. Returns its wait status; `None`: somebody else has reaped it, or it
/// is not ours.
///
/// For children that were given to this process: one that it created itself is for whoever created it to wait for.
pub(super) fn reap(pidfd: &Pidfd) -> Option<u32> {
    match waitid(
        WaitId::PidFd(pidfd.as_fd()),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
    ) {
        Ok(Some(status)) => Some(wait_status(&status)),
        Ok(None) | Err(Errno::CHILD) => None,
        Err(error) => {
            tracing::debug!(%error, "failed to reap an orphan");
            None
        }
    }
}

/// What wait(2) would have said.
fn wait_status(status: &WaitIdStatus) -> u32 {
    const DUMPED: i32 = 0x80;
    let dumped = if status.dumped() { DUMPED } else { 0 };
    let exited = status.exit_status().map(|code| (code & 0xff) << 8);
    let killed = status.terminating_signal().map(|signal| signal | dumped);
    exited.or(killed).unwrap_or(0).cast_unsigned()
}
