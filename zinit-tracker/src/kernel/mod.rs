//! The kernel's books: loads the eBPF programs, pins or joins them, reads and changes the maps.
//!
//! The only module that names aya. It knows maps and programs; what a service is allowed to do is decided in
//! [`tracker`](crate::tracker).

mod books;
mod btf;
mod events;
mod filter;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod gate;
mod hooks;
mod load;
mod log;
mod moving;
mod pins;
mod requirements;
mod runs;
mod sys;

pub(crate) use books::Kernel;
pub use books::{BooksError, OpenError as KernelError};
pub use btf::BtfError;
pub use events::{EventStream, EventsError};
pub(crate) use gate::Gate;
pub use gate::GateKind;
pub(crate) use load::LoadOptions;
pub use load::{LoadError, kernel_offsets};
pub use log::ProgramLog;
pub(crate) use pins::Guard;
pub use pins::{PinError, can_pin};
pub use requirements::{Capability, Requirement, RequirementError, requirements};
pub(crate) use requirements::{check as check_requirements, check_to_read as check_requirements_to_read};
pub use runs::ProgramRuns;
