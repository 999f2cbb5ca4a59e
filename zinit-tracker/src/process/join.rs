//! Moving a new process into a cgroup before it executes its program.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
};

use rustix::fs::fstat;
use tokio::process::Command;

/// Lets the processes that a command starts move into a cgroup, until dropped.
///
/// `CLONE_INTO_CGROUP` (kernel 5.7) would do the same in one step but cannot be reached through `std`; the program runs only
/// after the move either way.
#[derive(Debug)]
pub(crate) struct Door(Arc<Passage>);

/// What the new process needs: numbers only, since the caller may close the descriptors before it drops the command.
#[derive(Debug)]
struct Passage {
    procs: AtomicI32,
    told: AtomicI32,
    /// Device and inode of each descriptor: other hooks may have put something else in its place.
    procs_file: (u64, u64),
    told_file: (u64, u64),
}

impl Door {
    /// `procs`: the cgroup's `cgroup.procs`, open for writing; `told`: an eventfd that becomes 1 when a process has moved.
    /// Both stay open until the door is dropped.
    pub(crate) fn open(command: &mut Command, procs: BorrowedFd<'_>, told: BorrowedFd<'_>) -> io::Result<Self> {
        let passage = Arc::new(Passage {
            procs: AtomicI32::new(procs.as_raw_fd()),
            told: AtomicI32::new(told.as_raw_fd()),
            procs_file: file_of(procs)?,
            told_file: file_of(told)?,
        });
        let door = Self(Arc::clone(&passage));
        let pass = move || {
            passage.pass();
            // A process that could not move is started all the same: the caller learns of it by the eventfd.
            Ok(())
        };
        // SAFETY: between fork and exec `pass` reads atomics and makes system calls, which are async-signal-safe; it neither
        // allocates nor takes a lock.
        unsafe { command.pre_exec(pass) };
        Ok(door)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.0.procs.store(-1, Ordering::Relaxed);
        self.0.told.store(-1, Ordering::Relaxed);
    }
}

impl Passage {
    fn pass(&self) {
        let moved = write(&self.procs, self.procs_file, b"0");
        if moved {
            write(&self.told, self.told_file, &1_u64.to_ne_bytes());
        }
    }
}

fn write(fd: &AtomicI32, file: (u64, u64), bytes: &[u8]) -> bool {
    let raw: RawFd = fd.load(Ordering::Relaxed);
    if raw < 0 {
        return false;
    }
    // SAFETY: the descriptor is open in the process that forked until the door is dropped, and fork has copied it; if a hook
    // has closed it since, the calls below fail with EBADF.
    let fd = unsafe { BorrowedFd::borrow_raw(raw) };
    file_of(fd).is_ok_and(|found| found == file) && rustix::io::write(fd, bytes).is_ok_and(|n| n == bytes.len())
}

fn file_of(fd: impl AsFd) -> io::Result<(u64, u64)> {
    let stat = fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}
