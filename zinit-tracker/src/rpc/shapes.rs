//! The shapes of results that have fields, in the order in which zinit prints them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{supervisor, tracker::Tracking};

/// The result of `service_status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// The service.
    pub name: String,
    /// Its main process; 0: none.
    pub pid: u32,
    /// What it is.
    pub state: String,
    /// What it is wanted to be: `Up` or `Down`.
    pub target: String,
    /// The services that it depends on, and what they are.
    pub after: BTreeMap<String, String>,
    /// How well its descendants are known. zinit does not have this: it comes last.
    pub tracking: Tracking,
    /// Why not exactly; absent: exactly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback_reason: Option<String>,
}

/// The result of `service_stats`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceStats {
    /// The service.
    pub name: String,
    /// Its main process.
    pub pid: u32,
    /// Resident memory of the main process in bytes.
    pub memory_usage: u64,
    /// Processor time of the main process in percent of one processor.
    pub cpu_usage: f64,
    /// The other processes.
    pub children: Vec<Usage>,
}

/// What a process uses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Its pid.
    pub pid: u32,
    /// Resident memory in bytes.
    pub memory_usage: u64,
    /// Processor time in percent of one processor.
    pub cpu_usage: f64,
}

impl From<supervisor::Status> for ServiceStatus {
    fn from(status: supervisor::Status) -> Self {
        Self {
            name: status.name,
            pid: status.pid,
            state: status.state.to_string(),
            target: status.target.to_string(),
            after: states(status.after),
            tracking: status.tracking,
            fallback_reason: status.fallback_reason,
        }
    }
}

impl From<supervisor::Stats> for ServiceStats {
    fn from(stats: supervisor::Stats) -> Self {
        Self {
            name: stats.name,
            pid: stats.pid,
            memory_usage: stats.memory_usage,
            cpu_usage: stats.cpu_usage,
            children: stats.children.into_iter().map(Usage::from).collect(),
        }
    }
}

impl From<supervisor::Usage> for Usage {
    fn from(usage: supervisor::Usage) -> Self {
        Self {
            pid: usage.pid,
            memory_usage: usage.memory_usage,
            cpu_usage: usage.cpu_usage,
        }
    }
}

/// Services and what they are, in words.
pub(super) fn states(states: BTreeMap<String, supervisor::State>) -> BTreeMap<String, String> {
    states
        .into_iter()
        .map(|(name, state)| (name, state.to_string()))
        .collect()
}
