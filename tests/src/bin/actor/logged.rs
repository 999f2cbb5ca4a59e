//! A random process tree that writes down itself who created whom, and how those ended that did.
//!
//! Every creator appends a line `fork CREATOR CHILD` to a file, every process that exits `exit PID STATUS`, each in one write. As in
//! [`crate::tree`], all hold the write end of one pipe until they rest or have exited, so that its end of file says that the
//! log is complete.

use std::{
    convert::Infallible,
    fs::{File, OpenOptions},
    io::{Read as _, Write as _},
    os::fd::{FromRawFd as _, IntoRawFd as _, RawFd},
};

use anyhow::{Context as _, Result};
use nix::{
    errno::Errno,
    unistd::{getpid, setsid},
};
use zinit_tests::random::Random;

use crate::{
    life,
    process::{self, Environment, Program},
    ready,
};

/// Grows a tree of `max` processes that logs to `file`, and rests.
pub(crate) fn root(seed: u64, max: usize, file: &str) -> Result<Infallible> {
    let (read, write) = nix::unistd::pipe().context("failed to create a pipe")?;
    let report = write.into_raw_fd();
    let budget = max.saturating_sub(1);
    Node { seed, budget, report }.grow(file, &mut Random(seed), true)?;
    close(report);
    let left = File::from(read).read(&mut [0]).context("failed to wait for the tree")?;
    anyhow::ensure!(left == 0, "a process wrote what nobody asked for");
    ready::signal()?;
    life::rest();
}

/// A process that has yet to grow.
#[derive(Clone, Copy)]
pub(crate) struct Node {
    /// Of its generator.
    pub(crate) seed: u64,
    /// How many processes it brings into the world, with its descendants.
    pub(crate) budget: usize,
    /// The write end of the pipe.
    pub(crate) report: RawFd,
}

impl Node {
    /// Grows, and exits or rests.
    pub(crate) fn live(self, file: &str) -> Result<Infallible> {
        let mut random = Random(self.seed);
        if random.below(6) == 0 {
            match setsid() {
                // Whoever leads a process group cannot leave its session.
                Ok(_) | Err(Errno::EPERM) => {}
                Err(error) => return Err(error).context("failed to leave the session"),
            }
        }
        self.grow(file, &mut random, false)?;
        if random.below(3) == 0 {
            let status = i32::try_from(random.below(200)).context("a status fits")?;
            log(file, &format!("exit {} {status}\n", getpid()))?;
            life::exit_now(status);
        }
        close(self.report);
        life::rest();
    }

    fn grow(mut self, file: &str, random: &mut Random, is_root: bool) -> Result<()> {
        while self.budget > 0 {
            let share = 1 + match random.below(3) {
                0 => 0,
                1 => random.below(self.budget.min(5)),
                _ => random.below(self.budget),
            };
            self.budget -= share;
            let node = Self {
                seed: random.number(),
                budget: share - 1,
                report: self.report,
            };
            let child = node.create(file, random.below(7), is_root)?;
            log(file, &format!("fork {} {child}\n", getpid()))?;
        }
        Ok(())
    }

    fn create(self, file: &str, way: usize, is_root: bool) -> Result<nix::unistd::Pid> {
        let live = || self.live(file);
        let program = || {
            let numbers = [self.seed.to_string(), self.budget.to_string(), self.report.to_string()];
            let args = ["logged-node".to_owned(), file.to_owned()].into_iter().chain(numbers);
            Program::actor(&args.collect::<Vec<_>>(), Environment::Inherited)
        };
        Ok(match way {
            0 => process::clone3(live)?,
            // The root's would be a child of the test.
            1 if !is_root => process::clone(libc::CLONE_PARENT, live)?,
            2 => program()?.vfork()?,
            3 => program()?.posix_spawn()?,
            4 => {
                let file = file.to_owned();
                std::thread::spawn(move || process::fork(|| self.live(&file)))
                    .join()
                    .expect("a panic ends the process")?
            }
            _ => process::fork(live)?,
        })
    }
}

fn log(file: &str, line: &str) -> Result<()> {
    let mut file = OpenOptions::new()
        .append(true)
        .open(file)
        .context("failed to open the log")?;
    file.write_all(line.as_bytes()).context("failed to log")
}

fn close(fd: RawFd) {
    // SAFETY: this process owns its copy of the descriptor and uses it no more: it is at rest.
    drop(unsafe { File::from_raw_fd(fd) });
}
