//! What the end-to-end tests stand on: services that try to get away, and an oracle that finds whatever is left of them.
//!
//! - [`actor_command`] builds the command line of the `actor` binary, which plays the services;
//! - [`ready`] waits until an actor's process tree is complete;
//! - [`oracle`] finds the processes of a test by scanning /proc;
//! - [`cleanup`] ends them, whatever the test did;
//! - [`resources`] asks whether what they held is free again;
//! - [`holds`] keeps processes from ending;
//! - [`namespaces`] has a first process of its own in namespaces;
//! - [`orphans`] reaps them where they are many;
//! - [`openmetrics`] reads metrics by the letter of their specification;
//! - [`random`] repeats what was random;
//! - [`terminal`] shows what users see;
//! - [`sandbox`] has a tracker of a test's own to set them against, [`supervised`] a supervisor, [`daemon`] a supervisor as
//!   users have it, and [`tool`](mod@tool) the programs.
//!
//! Only the last four use zinit-tracker: a test compares two independent answers.

pub mod actor_command;
pub mod cleanup;
pub mod daemon;
pub mod earlier;
pub mod holds;
pub mod memory;
pub mod namespaces;
pub mod openmetrics;
pub mod oracle;
pub mod orphans;
pub mod random;
pub mod ready;
pub mod resources;
pub mod rights;
pub mod sandbox;
pub mod supervised;
pub mod terminal;
pub mod tool;

/// How often a test repeats what may go wrong once in many times: `ZINIT_TEST_ROUNDS`, or this number.
///
/// # Panics
///
/// When the variable is no number.
#[must_use]
pub fn rounds(default: u32) -> u32 {
    match std::env::var("ZINIT_TEST_ROUNDS") {
        Ok(rounds) => rounds.parse().expect("ZINIT_TEST_ROUNDS is a number"),
        Err(_) => default,
    }
}

/// Whether the running kernel is of this version or later.
///
/// # Panics
///
/// When its release does not start with two numbers.
#[must_use]
pub fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse::<u32>().expect("a version has numbers"));
    (
        numbers.next().expect("a major number"),
        numbers.next().expect("a minor number"),
    ) >= (major, minor)
}

pub use actor_command::{actor, actor_at, actor_path};
pub use cleanup::{Cleanup, kill_all};
pub use oracle::{Marker, Member, Survivor, members, survivors};
pub use ready::{Facts, Ready};
pub use resources::{TestCgroup, is_listened_on, lock_is_free, port_is_free};
pub use tool::{tool, zinit};
