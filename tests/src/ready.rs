//! Waiting, without polling, until an actor's process tree is complete.
//!
//! The protocol: the test creates a FIFO, keeps it open for reading and names it in `ZINIT_TEST_READY`. Once every process
//! of the tree exists and has its signal dispositions, the actor writes one message, at most `PIPE_BUF` bytes in one write:
//! the line `ready`, or `failed: REASON`, then lines `NAME=VALUE` with facts about the tree, then an empty line.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::stat::Mode;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;

/// A FIFO on which one actor says that its process tree is complete.
#[derive(Debug)]
pub struct Ready {
    path: PathBuf,
    fifo: File,
    // Owns the directory of the FIFO: dropping it removes both.
    _dir: TempDir,
}

impl Ready {
    /// The environment variable that names the FIFO.
    pub const ENV: &'static str = "ZINIT_TEST_READY";

    /// How long [`Ready::wait`] waits: far more than any actor needs on a slow machine.
    pub const DEADLINE: Duration = Duration::from_secs(100);

    /// Creates the FIFO in a temporary directory of its own, which goes away with this value.
    ///
    /// # Errors
    /// Fails if the directory or the FIFO cannot be created.
    pub fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("zinit-test-ready-").tempdir()?;
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).context("failed to create the readiness FIFO")?;
        // Open for writing as well, so that it never reads as closed before the actor has opened it.
        let fifo = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .with_context(|| format!("failed to open {}", path.display()))?;
        Ok(Self { path, fifo, _dir: dir })
    }

    /// Where the FIFO is: the value of [`Ready::ENV`] for commands that are not a [`Command`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names the FIFO in the environment of `command`.
    pub fn attach<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command.env(Self::ENV, &self.path)
    }

    /// Waits until the actor's tree is complete, and returns what it says about the tree.
    ///
    /// # Errors
    /// Fails after [`Ready::DEADLINE`], or as soon as the actor reports a failure.
    pub fn wait(&mut self) -> Result<Facts> {
        self.wait_for(Self::DEADLINE)
    }

    /// Like [`Ready::wait`], with a deadline of one's own.
    ///
    /// # Errors
    /// Fails after `deadline`, or as soon as the actor reports a failure.
    pub fn wait_for(&mut self, deadline: Duration) -> Result<Facts> {
        let started = Instant::now();
        let mut message = Vec::new();
        while !message.ends_with(b"\n\n") {
            let left = deadline.saturating_sub(started.elapsed());
            ensure!(!left.is_zero(), "the actor was not ready within {deadline:?}");
            let timeout = Timespec::try_from(left).context("failed to express the deadline")?;
            match poll(&mut [PollFd::new(&self.fifo, PollFlags::IN)], Some(&timeout)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error).context("failed to wait for the actor"),
            }
            let mut chunk = [0; libc::PIPE_BUF];
            let length = self
                .fifo
                .read(&mut chunk)
                .context("failed to read what the actor says")?;
            message.extend_from_slice(&chunk[..length]);
        }
        Facts::parse(&String::from_utf8_lossy(&message))
    }
}

/// What an actor says about its tree, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts(BTreeMap<String, String>);

impl Facts {
    fn parse(message: &str) -> Result<Self> {
        let mut lines = message.trim_end().lines();
        match lines.next() {
            Some("ready") => {}
            Some(other) => bail!("the actor says: {other}"),
            None => bail!("the actor sent an empty message"),
        }
        lines
            .map(|line| match line.split_once('=') {
                Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
                None => bail!("the actor says {line:?}, which is not NAME=VALUE"),
            })
            .collect::<Result<_>>()
            .map(Self)
    }

    /// The fact of that name, if the actor reported it.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The fact of that name as a number.
    ///
    /// # Errors
    /// Fails if the actor did not report it, or if it is not a number of that type.
    pub fn number<N>(&self, name: &str) -> Result<N>
    where
        N: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>,
    {
        let value = self
            .get(name)
            .with_context(|| format!("the actor reported no {name}"))?;
        value
            .parse()
            .with_context(|| format!("the actor reported {name}={value}"))
    }

    /// All facts, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_with_facts_is_understood() {
        let facts = Facts::parse("ready\nport=4711\npath=/tmp/a=b\n\n").unwrap();
        assert_eq!(facts.number::<u16>("port").unwrap(), 4711);
        assert_eq!(facts.get("path"), Some("/tmp/a=b"));
        assert!(facts.number::<u16>("path").is_err());
        assert!(facts.number::<u16>("pid").is_err());
    }

    #[test]
    fn a_failure_of_the_actor_is_passed_on() {
        let error = Facts::parse("failed: no cgroup\n\n").unwrap_err();
        assert!(error.to_string().contains("failed: no cgroup"));
    }

    #[test]
    fn waiting_ends_at_the_deadline() {
        let error = Ready::new().unwrap().wait_for(Duration::from_millis(20)).unwrap_err();
        assert!(error.to_string().contains("not ready within"));
    }

    #[test]
    fn waiting_ends_with_the_message() {
        let mut ready = Ready::new().unwrap();
        std::fs::write(ready.path(), "ready\n\n").unwrap();
        assert_eq!(ready.wait().unwrap(), Facts::default());
    }
}
