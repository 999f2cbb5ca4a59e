//! What a process is: its unique name, a descriptor that cannot come to mean another process, and facts from `/proc`.
//!
//! Owns no state and decides nothing about services.

mod key;
mod pidfd;
mod readable;
pub mod stat;

pub use key::ProcessKey;
pub use pidfd::{Pidfd, PidfdError};
pub(crate) use readable::readable;
