//! What a stop may do.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

/// Whom the stop signal goes to. SIGKILL, after the grace period, always goes to every member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Every member.
    #[default]
    All,
    /// The main process only, which is expected to end the others.
    Main,
}

/// How a service is stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopPolicy {
    /// The signal that asks members to end, once each; SIGCONT follows, so that stopped processes can act on it.
    pub signal: Signal,
    /// Whom it goes to.
    pub target: Target,
    /// How long members may take to end by themselves. 0: SIGKILL at once.
    pub grace: Duration,
    /// How long killed members may take to die before the stop gives up and names them.
    pub kill_timeout: Duration,
    /// Whether a gate is closed when a second round of kills still finds new members; tests go without.
    #[doc(hidden)]
    pub gate: bool,
}

impl Default for StopPolicy {
    fn default() -> Self {
        Self {
            signal: Signal::SIGTERM,
            target: Target::All,
            grace: Duration::from_secs(10),
            kill_timeout: Duration::from_secs(10),
            gate: true,
        }
    }
}
