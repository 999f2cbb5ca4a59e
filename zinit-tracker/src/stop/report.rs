//! What a stop did.

use std::{fmt, time::Duration};

use nix::sys::signal::Signal;
use serde::{Serialize, Serializer};

use super::proof::Doubt;
use crate::{
    process::{ProcessKey, stat::Condition},
    tracker::Tracking,
};

/// The outcome of a stop.
#[derive(Clone, Debug, Serialize)]
pub struct StopReport {
    /// The service's name.
    pub service: String,
    /// Who manages it.
    pub instance: String,
    /// How well its descendants are known.
    pub tracking: Tracking,
    /// Whether it is certain that nothing of the service is left.
    pub proven: bool,
    /// Why it is not, if it is not and nobody survives.
    pub doubts: Vec<Doubt>,
    /// From the request to the end of verification.
    #[serde(rename = "elapsed_us", serialize_with = "crate::units::microseconds")]
    pub elapsed: Duration,
    /// How often members were listed and killed; 0 if all ended within the grace period.
    pub kill_rounds: u32,
    /// Whether the system-call gate was needed.
    pub gate: bool,
    /// Every member that was alive during the stop, oldest first.
    pub processes: Vec<StoppedProcess>,
    /// Members that are not dead, or whose end could not be observed in time.
    pub survivors: Vec<Survivor>,
}

/// A member that was alive when the stop began or was created during it.
#[derive(Clone, Debug, Serialize)]
pub struct StoppedProcess {
    /// Its unique name.
    #[serde(flatten)]
    pub key: ProcessKey,
    /// Its pid in the caller's pid namespace; 0 if that does not show it.
    pub pid: u32,
    /// tgid of the process that created it.
    pub parent_tgid: u32,
    /// Command name.
    pub comm: String,
    /// The signals that it was sent, in order.
    pub signals: Vec<SentSignal>,
    /// How it ended; `None`: it did not, or the kernel's record of it is gone.
    pub fate: Option<Fate>,
    /// From the request to its end.
    #[serde(rename = "ended_after_us", serialize_with = "optional_microseconds")]
    pub ended_after: Option<Duration>,
}

impl StoppedProcess {
    pub(super) fn new(key: ProcessKey, pid: u32, parent: ProcessKey, comm: &str) -> Self {
        Self {
            key,
            pid,
            parent_tgid: parent.tgid,
            comm: comm.to_owned(),
            signals: Vec::new(),
            fate: None,
            ended_after: None,
        }
    }
}

/// A signal that was sent to a process.
#[derive(Clone, Debug, Serialize)]
pub struct SentSignal {
    /// Which.
    #[serde(serialize_with = "signal_name")]
    pub signal: Signal,
    /// From the request to the sending.
    #[serde(rename = "after_us", serialize_with = "crate::units::microseconds")]
    pub after: Duration,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fate {
    /// It exited with this code.
    Exited(i32),
    /// A signal with this number killed it.
    Killed(i32),
}

impl Fate {
    /// Reads a wait status (wait(2)).
    #[must_use]
    pub fn of_wait_status(status: u32) -> Self {
        let status = status.cast_signed();
        match status & 0x7f {
            0 => Self::Exited((status >> 8) & 0xff),
            signal => Self::Killed(signal),
        }
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exited {code}"),
            Self::Killed(number) => match Signal::try_from(*number) {
                Ok(signal) => write!(f, "{signal}"),
                Err(_) => write!(f, "signal {number}"),
            },
        }
    }
}

/// A process that is still there.
#[derive(Clone, Debug, Serialize)]
pub struct Survivor {
    /// Its unique name.
    #[serde(flatten)]
    pub key: ProcessKey,
    /// Its pid in the caller's pid namespace; 0 if that does not show it.
    pub pid: u32,
    /// Command name.
    pub comm: String,
    /// The state letter of `/proc/PID/stat`; `None`: `/proc` does not show it.
    pub state: Option<char>,
    /// What it waits for or who holds it, in words.
    pub cause: String,
}

impl Survivor {
    pub(super) fn new(
        key: ProcessKey,
        pid: u32,
        comm: String,
        condition: Option<Condition>,
        refused: Option<&String>,
    ) -> Self {
        Self {
            key,
            pid,
            comm,
            state: condition.as_ref().map(|condition| condition.state),
            cause: refused.cloned().unwrap_or_else(|| cause(condition)),
        }
    }
}

fn cause(condition: Option<Condition>) -> String {
    let Some(Condition { state, wchan, tracer }) = condition else {
        return "/proc does not show it".to_owned();
    };
    let place = wchan.map_or_else(String::new, |function| format!(" in {function}"));
    match state {
        't' => format!("traced by pid {tracer}"),
        'D' => format!("uninterruptible{place}"),
        'Z' => "its main thread is a zombie, another thread lives".to_owned(),
        _ if tracer != 0 => format!("traced by pid {tracer}"),
        state => format!("in state {state}{place}"),
    }
}

fn optional_microseconds<S: Serializer>(duration: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => crate::units::microseconds(duration, serializer),
        None => serializer.serialize_none(),
    }
}

fn signal_name<S: Serializer>(signal: &Signal, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(signal.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_statuses_are_read_as_wait_does() {
        for (status, fate) in [
            (0, Fate::Exited(0)),
            (7 << 8, Fate::Exited(7)),
            (15, Fate::Killed(15)),
            (11 | 0x80, Fate::Killed(11)),
        ] {
            assert_eq!(Fate::of_wait_status(status), fate);
        }
    }
}
