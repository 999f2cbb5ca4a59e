//! The kernel's books: loads the eBPF programs, pins or joins them, reads and changes the maps.
//!
//! The only module that names aya. It knows maps and programs; what a service is allowed to do is decided in
//! [`tracker`](crate::tracker).

mod books;
mod btf;
mod events;
mod load;
mod log;
mod pins;
mod requirements;
mod sys;

pub use books::{BooksError, OpenError as KernelError};
pub(crate) use books::{Gate, Kernel};
pub use btf::BtfError;
pub use events::{EventStream, EventsError};
pub use load::LoadError;
pub(crate) use load::LoadOptions;
pub use log::ProgramLog;
pub use pins::PinError;
pub(crate) use requirements::check as check_requirements;
pub use requirements::{Capability, Requirement, RequirementError, requirements};
