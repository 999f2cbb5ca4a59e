//! What a supervisor does before another program takes its place in the same process.

use std::{ffi::OsStr, io, path::Path, process::Stdio, sync::Arc, time::Duration};

use nix::sys::resource::{Resource, setrlimit};
use tokio::{
    io::AsyncReadExt as _,
    process::{ChildStdout, Command},
    time::timeout,
};

use super::{children::OwnChild, command::Context, registry::Asked, terminate::PATIENCE};
use crate::stop::Fate;

/// How long a program may take to say what it is.
const TRIAL: Duration = Duration::from_secs(10);

/// What it may say, in bytes.
const ANSWER: u64 = 4096;

/// Why a program was not tried with success.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    /// It cannot be executed.
    #[error("failed to execute it")]
    Execute(#[source] io::Error),
    /// It does not come to an end.
    #[error("it did not end within {} s", TRIAL.as_secs())]
    Hangs,
    /// It ended otherwise than with status 0.
    #[error("it ended otherwise than with status 0")]
    Failed,
}

/// A supervisor's preparations for its own end in favour of a successor.
#[derive(Clone, Debug)]
pub struct Handover {
    pub(super) context: Arc<Context>,
    pub(super) asked: Asked,
}

impl Handover {
    /// Runs a program as a child of the supervisor, and returns the first 4 KiB that it prints.
    ///
    /// # Errors
    ///
    /// It cannot be executed, fails, or does not end within 10 s, and is killed then.
    pub async fn try_program<S: AsRef<OsStr>>(&self, path: &Path, arguments: &[S]) -> Result<String, TrialError> {
        let mut command = Command::new(path);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let children = self.context.children.clone();
        let create = move || {
            children.create(|fork| {
                let mut child = fork(&mut command)?;
                let stdout = child.stdout.take();
                Ok((child, stdout))
            })
        };
        let trial = async {
            let created = tokio::task::spawn_blocking(create).await;
            let (mut child, stdout) = created
                .unwrap_or_else(|error| Err(io::Error::other(error)))
                .map_err(TrialError::Execute)?;
            let answer = read(stdout).await;
            end(&mut child).await?;
            Ok(answer)
        };
        timeout(TRIAL, trial).await.unwrap_or(Err(TrialError::Hangs))
    }

    /// Whether somebody has asked for the end, so that a successor must not begin.
    #[must_use]
    pub fn is_too_late(&self) -> bool {
        self.asked.get().is_some()
    }

    /// Why a successor would not find everything; `None`: it would.
    #[must_use]
    pub fn obstacle(&self) -> Option<&'static str> {
        if self.is_too_late() {
            return Some("the supervisor is shutting down");
        }
        if self.context.tracker.pin_directory().is_none() {
            return Some(
                "the books are not pinned, so processes that have left their parents would be lost: stop the services first",
            );
        }
        if self.context.state.is_none() {
            return Some("states are not saved, so services would be started anew: the supervisor's messages say why");
        }
        None
    }

    /// Waits until the states of all services are saved, for 15 s at most: the successor goes on with what is saved. Returns whether they
    /// are.
    pub async fn settle(&self) -> bool {
        match &self.context.state {
            Some(state) => timeout(PATIENCE, state.settled()).await.unwrap_or(false),
            None => false,
        }
    }

    /// Executes the successor: `execute` returns only if that fails. Meanwhile no child is created, which would inherit what is
    /// meant for the successor, and the limit of open files is the one that services get, for the successor to find it.
    ///
    /// Returns that error, or that a child is being created for longer than a second.
    pub fn execute(&self, execute: impl FnOnce() -> io::Error) -> io::Error {
        let (soft, hard) = self.context.descriptors;
        let done = self.context.children.meanwhile_none(|| {
            limit_descriptors(soft, hard);
            let error = execute();
            limit_descriptors(hard, hard);
            error
        });
        done.unwrap_or_else(|| io::Error::other("a process is being created, and that hangs"))
    }
}

fn limit_descriptors(soft: u64, hard: u64) {
    if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, soft, hard) {
        tracing::warn!(%error, soft, "failed to change the limit of open files");
    }
}

async fn read(stdout: Option<ChildStdout>) -> String {
    let mut answer = Vec::new();
    if let Some(stdout) = stdout
        && let Err(error) = stdout.take(ANSWER).read_to_end(&mut answer).await
    {
        tracing::debug!(%error, "failed to read what a program says");
    }
    String::from_utf8_lossy(&answer).into_owned()
}

async fn end(child: &mut OwnChild) -> Result<(), TrialError> {
    match child.ended().await {
        Some(Fate::Exited(0)) => Ok(()),
        _ => Err(TrialError::Failed),
    }
}
