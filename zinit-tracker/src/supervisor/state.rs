//! The words for what a service is and is wanted to be.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a service is. The words of [`Display`](fmt::Display) are what clients see.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Nothing has been done about it yet.
    #[default]
    Unknown,
    /// Waits for services that it depends on.
    Blocked,
    /// Its main process runs, and its test has not succeeded yet.
    Spawned,
    /// Its main process runs, and its test, if there is one, has succeeded.
    Running,
    /// Its main process ended with exit status 0.
    Success,
    /// Its main process ended otherwise, processes survived a stop, or it can never start; in words.
    Error(String),
    /// Its main process runs, and its test could not be executed.
    TestFailure,
    /// It could not be started, or was restarted too often.
    Failure,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "Unknown",
            Self::Blocked => "Blocked",
            Self::Spawned => "Spawned",
            Self::Running => "Running",
            Self::Success => "Success",
            Self::Error(what) => return write!(f, "Error({what})"),
            Self::TestFailure => "TestFailure",
            Self::Failure => "Failure",
        })
    }
}

/// What a service is wanted to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// Running, or a oneshot that has run.
    Up,
    /// Down.
    Down,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Up => "Up",
            Self::Down => "Down",
        })
    }
}
