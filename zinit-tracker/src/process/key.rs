//! The unique name of a process.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// A process by the two numbers that together are never used twice between two boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessKey {
    /// Thread group id in the initial pid namespace: what `getpid()` returns there.
    pub tgid: u32,
    /// When it started, in nanoseconds of `CLOCK_BOOTTIME` in the initial time namespace.
    pub start_boottime_ns: u64,
}

impl ProcessKey {
    /// Time since boot at which the process started.
    #[must_use]
    pub fn started(self) -> Duration {
        Duration::from_nanos(self.start_boottime_ns)
    }
}

impl fmt::Display for ProcessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.tgid, self.start_boottime_ns)
    }
}
