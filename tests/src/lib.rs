//! What the end-to-end tests stand on: services that try to get away, and an oracle that finds whatever is left of them.
//!
//! - [`actor_command`] builds the command line of the `actor` binary, which plays the services;
//! - [`ready`] waits until an actor's process tree is complete;
//! - [`oracle`] finds the processes of a test by scanning /proc;
//! - [`cleanup`] ends them, whatever the test did;
//! - [`resources`] asks whether what they held is free again;
//! - [`sandbox`] has a tracker of a test's own to set them against, and [`tool`](mod@tool) the command-line tool.
//!
//! Only the last two use zinit-tracker: a test compares two independent answers.

pub mod actor_command;
pub mod cleanup;
pub mod oracle;
pub mod ready;
pub mod resources;
pub mod sandbox;
pub mod tool;

pub use actor_command::{actor, actor_at, actor_path};
pub use cleanup::{Cleanup, kill_all};
pub use oracle::{Marker, Member, Survivor, members, survivors};
pub use ready::{Facts, Ready};
pub use resources::{TestCgroup, lock_is_free, port_is_free};
pub use tool::tool;
