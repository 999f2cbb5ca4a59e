//! The stop protocol: signal, wait, kill, verify, report.
//!
//! Reads and changes services through [`tracker`](crate::tracker) only. A service is down when the kernel's counter is 0
//! and every member that was alive or dying during the stop has been observed dead through its pidfd, or reaped: only
//! then are its ports, locks and mounts free. What cannot be brought down is an error that names the survivors.

mod policy;
mod proof;
mod protocol;
mod report;
mod signal;
mod survivor;
mod urgency;

pub use policy::{StopPolicy, Target};
pub use proof::{Doubt, Evidence};
pub use protocol::{StopError, dry_run, stop};
pub use report::{Fate, GateUse, SentSignal, StopReport, StoppedProcess};
pub use signal::signal_named;
pub use survivor::{Cause, Held, Place, Survivor};
