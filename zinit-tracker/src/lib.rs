//! Stops services on Linux so that nothing of them is left, and proves it.
//!
//! eBPF programs on process creation and exit keep, in the kernel, a live map of every service's descendants, also of
//! those that call `setsid`, daemonise, change group or are reparented. [`Tracker`] registers services, starts
//! processes in them and lists who belongs to them; [`stop()`] signals exactly that set, and declares a service down
//! only when the kernel's own books are empty and every member has been observed dead.
//!
//! ```no_run
//! use zinit_tracker::{Config, StopPolicy, Tracker, stop};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let tracker = Tracker::open(&Config::default())?;
//! let web = tracker.register("web")?;
//! let child = tracker.spawn(&web, &mut tokio::process::Command::new("/usr/bin/web"))?;
//! let report = stop(&tracker, &web, &StopPolicy::default()).await?;
//! assert!(report.proven);
//! tracker.unregister(&web)?;
//! # Ok(())
//! # }
//! ```
//!
//! Linux 5.10 or later with BTF; root, or CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN and CAP_KILL. Where BPF cannot be had, the
//! same works by looking at `/proc`, as well as that goes ([`Level`]); [`Tracker::tracking`] and every report say so.

mod fallback;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod http;
mod kernel;
pub mod metrics;
pub mod process;
pub mod rpc;
pub mod stop;
pub mod supervisor;
pub mod tracker;
mod units;

pub use fallback::{Blindness, ProcfsError};
#[doc(hidden)]
pub use kernel::kernel_offsets;
pub use kernel::{
    BooksError, BtfError, Capability, EventStream, EventsError, GateKind, KernelError, LoadError, PinError, ProgramLog,
    ProgramRuns, Requirement, RequirementError, can_pin, requirements,
};
pub use stop::{StopError, StopPolicy, StopReport, stop};
pub use tracker::{Config, Level, Member, Pins, Service, ServiceId, ServiceInfo, Tracker, TrackerError, Tracking};
pub use zinit_ebpf as records;
