//! What a process is: its unique name, a descriptor that cannot come to mean another process, and facts from `/proc`.
//!
//! Owns no state and decides nothing about services.

pub mod condition;
pub mod facts;
mod freezer;
mod join;
mod key;
mod launch;
mod matched;
mod pidfd;
mod readable;
pub mod rights;
pub mod stat;
pub(crate) mod table;
pub(crate) mod zombie;

pub use freezer::{CgroupVersion, Frozen};
pub(crate) use join::Door;
pub use key::ProcessKey;
pub(crate) use launch::Identity;
pub use launch::{Execution, Launch, LaunchError, Launched};
pub use matched::{Machine, Matched, matching};
pub use pidfd::{Death, Pidfd, PidfdError};
pub(crate) use readable::readable;
