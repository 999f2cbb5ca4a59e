//! What a stop did.

use std::{fmt, time::Duration};

use nix::sys::signal::Signal;
use serde::{Serialize, Serializer};

use super::{proof::Doubt, survivor::Survivor};
use crate::{
    kernel::GateKind,
    process::ProcessKey,
    tracker::{Sign, Stray, Suspect, Tracking},
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
    /// Why they are not known exactly; `None`: they are.
    pub fallback_reason: Option<String>,
    /// Whether it is certain that nothing of the service is left.
    pub proven: bool,
    /// Why it is not, if it is not and nobody survives.
    pub doubts: Vec<Doubt>,
    /// From the request to the end of verification.
    #[serde(rename = "elapsed_us", serialize_with = "crate::units::microseconds")]
    pub elapsed: Duration,
    /// From the end of the grace period to the end of verification; `None`: nobody had to be killed.
    #[serde(rename = "killing_us", serialize_with = "optional_microseconds")]
    pub killing: Option<Duration>,
    /// How often members were listed and killed; 0 if all ended within the grace period.
    pub kill_rounds: u32,
    /// The gate that kept members from forking, if one was needed.
    pub gate: Option<GateUse>,
    /// Every member that was alive during the stop, oldest first.
    pub processes: Vec<StoppedProcess>,
    /// Members that are not dead, or whose end could not be observed in time.
    pub survivors: Vec<Survivor>,
    /// Living processes that show signs of the service which others can show as well, or which were let go on purpose. They
    /// were not signalled. Looked for only if there are doubts.
    pub suspects: Vec<Suspect>,
}

/// A gate that a stop has closed.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct GateUse {
    /// How it works.
    pub kind: GateKind,
    /// From the end of the grace period until it was closed.
    #[serde(rename = "closed_after_us", serialize_with = "crate::units::microseconds")]
    pub closed_after: Duration,
    /// How long closing it took.
    #[serde(rename = "took_us", serialize_with = "crate::units::microseconds")]
    pub took: Duration,
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
    /// What showed that it belongs to the service, if the kernel's books did not have it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sign: Option<Sign>,
    /// The signals that it was sent, in order.
    pub signals: Vec<SentSignal>,
    /// How it ended; `None`: it did not, the kernel's record of it is gone, or at level `procfs` nobody saw how.
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
            sign: None,
            signals: Vec::new(),
            fate: None,
            ended_after: None,
        }
    }

    pub(super) fn stray(stray: &Stray) -> Self {
        let parent = ProcessKey {
            tgid: stray.parent_tgid,
            start_boottime_ns: 0,
        };
        Self {
            sign: Some(stray.sign),
            ..Self::new(stray.key, stray.pid, parent, &stray.comm)
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
