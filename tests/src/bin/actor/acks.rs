//! How the descendants of a process tell it that they are set up.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, IntoRawFd, RawFd};

use anyhow::{Context, Result};

/// A pipe that every descendant inherits, also across exec, and writes one value to when it is set up.
///
/// The descriptors are plain numbers because each process that inherits the value owns descriptors of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Acks {
    read: RawFd,
    write: RawFd,
}

impl Acks {
    pub(crate) fn new() -> Result<Self> {
        let (read, write) = nix::unistd::pipe().context("failed to create a pipe")?;
        Ok(Self {
            read: read.into_raw_fd(),
            write: write.into_raw_fd(),
        })
    }

    /// The descriptor to hand to a program that says [`ack_to`] itself.
    pub(crate) fn write_fd(self) -> RawFd {
        self.write
    }

    /// Says that this process is set up. To be called once in each descendant.
    pub(crate) fn done(self) -> Result<()> {
        self.done_with(0)
    }

    /// Says that this process is set up, and a number about it.
    pub(crate) fn done_with(self, value: i32) -> Result<()> {
        drop(take(self.read));
        ack_to(self.write, value)
    }

    /// Waits for `count` descendants, and returns what they said in the order in which they did.
    ///
    /// # Errors
    /// Fails if a descendant ended before it said anything, and no other is left that could.
    pub(crate) fn wait(self, count: usize) -> Result<Vec<i32>> {
        drop(take(self.write));
        let mut bytes = vec![0; count * size_of::<i32>()];
        take(self.read)
            .read_exact(&mut bytes)
            .context("a descendant ended before it was set up")?;
        let (values, _) = bytes.as_chunks();
        Ok(values.iter().copied().map(i32::from_ne_bytes).collect())
    }
}

/// Says, on an inherited descriptor, that this process is set up, and closes it.
pub(crate) fn ack_to(fd: RawFd, value: i32) -> Result<()> {
    take(fd)
        .write_all(&value.to_ne_bytes())
        .context("failed to say that the process is set up")
}

fn take(fd: RawFd) -> File {
    // SAFETY: each process uses its copy of the descriptor once and gives it up then, as `Acks` asks of its users.
    unsafe { File::from_raw_fd(fd) }
}
