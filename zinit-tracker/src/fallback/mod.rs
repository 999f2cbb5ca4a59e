//! The books without BPF: level `procfs`, as good as `/proc`, a subreaper and a cgroup can make them.
//!
//! Offers what the kernel's books offer, with the same records, in the memory of this process: nobody can join them, and
//! they end with it. Members are found by looking, so a process can be missed, and what cannot be seen is listed
//! ([`Blindness`]) rather than denied. Never is a process taken for a member without a sign that only descent leaves, and
//! none is signalled but through a pidfd that is certainly its.
//!
//! Decides nothing about services or proof; that is for [`tracker`](crate::tracker) and [`stop`](mod@crate::stop).

mod books;
mod bystanders;
mod cgroup;
mod error;
mod namespaces;
mod reaper;
mod scan;
mod sight;
mod signs;
mod state;
mod watcher;

pub(crate) use books::{Procfs, pid_namespace};
pub use error::ProcfsError;
pub use sight::Blindness;
pub(crate) use sight::{Confinement, Sight};
pub(crate) use state::UNKNOWN_STATUS;
