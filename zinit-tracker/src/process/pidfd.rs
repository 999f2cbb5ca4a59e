//! Process file descriptors (`pidfd_open(2)`, kernel 5.3).

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::sys::signal::Signal;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{fstat, fstatfs},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal},
};
use tokio::io::{Interest, unix::AsyncFd};

/// `PID_FS_MAGIC` of linux/magic.h.
const PIDFS_MAGIC: i64 = 0x5049_4446;

/// Why an operation on a pidfd failed; a process that is gone is not an error.
#[derive(Debug, thiserror::Error)]
pub enum PidfdError {
    /// The kernel refused a descriptor.
    #[error("failed to open a pidfd for pid {pid}")]
    Open {
        /// The process.
        pid: u32,
        /// What the kernel answered.
        source: Errno,
    },
    /// `/proc` could not tell whose pid it is.
    #[error("failed to read the start time of pid {pid}")]
    Match {
        /// The process.
        pid: u32,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The kernel refused to deliver the signal.
    #[error("failed to send {signal} to pid {pid}")]
    Signal {
        /// The process.
        pid: u32,
        /// The signal.
        signal: Signal,
        /// What the kernel answered.
        source: Errno,
    },
}

impl PidfdError {
    /// Whether the caller has no file descriptor left, so that a later attempt can succeed.
    #[must_use]
    pub fn is_exhaustion(&self) -> bool {
        let errno = match self {
            Self::Open { source, .. } | Self::Signal { source, .. } => Some(*source),
            Self::Match { source, .. } => Errno::from_io_error(source),
        };
        matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
    }
}

/// One process for as long as the descriptor is open, whatever becomes of its pid.
#[derive(Debug)]
pub struct Pidfd {
    fd: OwnedFd,
    pid: u32,
}

impl Pidfd {
    /// Opens the process that has this pid, in the caller's pid namespace, at this moment. `None`: there is none.
    pub fn open(pid: u32) -> Result<Option<Self>, PidfdError> {
        let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(fd) => Ok(Some(Self { fd, pid })),
            // EINVAL, or on newer kernels ENOENT: the pid is that of a thread which is not a leader, so the process that had
            // it is gone.
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => Ok(None),
            Err(source) => Err(PidfdError::Open { pid, source }),
        }
    }

    /// A number that no other process has until the next boot: the inode that pidfds have on pidfs (kernel 6.9). `None` on
    /// older kernels, where all pidfds share one.
    pub(crate) fn inode(&self) -> Option<u64> {
        let on_pidfs = fstatfs(&self.fd).is_ok_and(|found| found.f_type == PIDFS_MAGIC);
        on_pidfs.then(|| fstat(&self.fd).ok().map(|stat| stat.st_ino)).flatten()
    }

    /// Sends a signal. Returns whether the process was there to receive it.
    pub(super) fn signal(&self, signal: Signal) -> Result<bool, PidfdError> {
        let raw = rustix::process::Signal::from_named_raw(signal as i32).ok_or(PidfdError::Signal {
            pid: self.pid,
            signal,
            source: Errno::INVAL,
        })?;
        match pidfd_send_signal(&self.fd, raw) {
            Ok(()) => Ok(true),
            Err(Errno::SRCH) => Ok(false),
            Err(source) => Err(PidfdError::Signal {
                pid: self.pid,
                signal,
                source,
            }),
        }
    }

    /// Whether every thread of the process has exited, so that its files, locks and sockets are closed.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        // An interrupted poll says nothing: the caller asks again.
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready == 1)
    }
}

/// Tells when a process is dead, as [`Pidfd::is_dead`] has it.
#[derive(Debug)]
pub struct Death(AsyncFd<OwnedFd>);

impl Death {
    pub(super) fn new(pidfd: BorrowedFd<'_>) -> io::Result<Self> {
        let pidfd = pidfd.try_clone_to_owned()?;
        // SAFETY: an owned descriptor stays open, and the same, until it is dropped.
        unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }
            .map(Self)
            .map_err(Into::into)
    }

    /// Waits for it. Cancel-safe.
    ///
    /// # Errors
    ///
    /// The runtime ends.
    pub async fn happened(&self) -> io::Result<()> {
        self.0.readable().await.map(drop)
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
