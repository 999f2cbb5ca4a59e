//! How processes of any supervisor tell that they run, and that they have ended.

use std::{
    fs::File,
    os::{fd::AsFd as _, unix::fs::OpenOptionsExt as _},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::stat::Mode;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Long enough for any supervisor.
const DEADLINE: Duration = Duration::from_secs(60);

/// A FIFO that each process writes a byte to once it runs, and has open until it ends.
pub(crate) struct Fifo {
    path: PathBuf,
    file: File,
}

impl Fifo {
    /// What names it to the processes.
    pub(crate) const ENV: &str = "ZINIT_BENCH_FIFO";

    /// A new one in this directory.
    pub(crate) fn new_in(directory: &Path) -> Result<Self> {
        let path = directory.join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).context("failed to create a FIFO")?;
        let mut options = File::options();
        let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
        Ok(Self { path, file })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until so many processes more have said that they run; `check` says now and then whether there is reason to go on.
    pub(crate) fn wait_for(&self, count: usize, mut check: impl FnMut() -> Result<()>) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        let mut bytes = vec![0; count];
        let mut found = 0;
        while found < count {
            check()?;
            ensure!(Instant::now() < deadline, "{found} of {count} have started");
            let timeout = Timespec::try_from(Duration::from_millis(100))?;
            poll(
                &mut [PollFd::from_borrowed_fd(self.file.as_fd(), PollFlags::IN)],
                Some(&timeout),
            )?;
            match rustix::io::read(&self.file, &mut bytes[found..]) {
                // Nobody has it open at the moment, which no poll waits for.
                Ok(0) => thread::sleep(Duration::from_micros(100)),
                Ok(length) => found += length,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("failed to read the FIFO"),
            }
        }
        Ok(())
    }

    /// Waits until the last process has ended that had it open.
    pub(crate) fn wait_until_closed(&self) -> Result<()> {
        let timeout = Timespec::try_from(DEADLINE)?;
        let mut polled = [PollFd::from_borrowed_fd(self.file.as_fd(), PollFlags::empty())];
        poll(&mut polled, Some(&timeout))?;
        ensure!(
            polled[0].revents().contains(PollFlags::HUP),
            "a process is there after the stop"
        );
        Ok(())
    }
}
