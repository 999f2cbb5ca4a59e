//! Ending whatever a test left, by exactly the processes that carry its marker.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::oracle::{Marker, Member, members, start_time_ticks, survivors};

/// Ends every process of a test when it is dropped, so that a failed test leaves nothing behind.
#[derive(Debug)]
pub struct Cleanup(Marker);

impl Cleanup {
    /// Will end every process that carries `marker`.
    pub fn new(marker: &Marker) -> Self {
        Self(marker.clone())
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        if let Err(error) = kill_all(&self.0, Duration::from_secs(30)) {
            eprintln!("failed to clean up after a test: {error:#}");
        }
    }
}

/// Sends SIGKILL to every process that carries `marker`, again and again until none is left.
///
/// Returns how many signals were sent.
///
/// # Errors
/// Fails if some are left at the deadline, and names them, or if a signal cannot be sent.
pub fn kill_all(marker: &Marker, deadline: Duration) -> Result<usize> {
    let started = Instant::now();
    let mut signals = 0;
    loop {
        for member in members(marker) {
            signals += usize::from(kill(&member)?);
        }
        // One scan tells that something is left; that nothing is takes a closer look.
        if members(marker).is_empty() && survivors(marker).is_empty() {
            return Ok(signals);
        }
        if started.elapsed() > deadline {
            bail!(
                "processes with marker {marker} outlived SIGKILL: {:?}",
                survivors(marker)
            );
        }
        // A killed process needs a moment to die, and nothing says when: it need not be a child of ours.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sends SIGKILL to one process, unless it has gone since it was seen.
///
/// # Errors
/// Fails if the process exists and cannot be signalled.
pub fn kill(member: &Member) -> io::Result<bool> {
    let pid = Pid::from_raw(member.pid).expect("a pid from /proc is positive");
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        // INVAL, or on newer kernels NOENT: the pid went to a thread in the meantime.
        Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    // The pidfd holds on to one process: if that has the start time of the member, it is the member.
    if start_time_ticks(member.pid) != Some(member.start_time_ticks) {
        return Ok(false);
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) => Ok(true),
        Err(Errno::SRCH) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
