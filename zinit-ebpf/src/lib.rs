//! Records and names that the eBPF programs share with user space.
//!
//! These are the keys and values of the pinned maps, which are a public interface: whoever reads the maps with
//! `bpftool` or a library of their own sees exactly these fields. Every change of a size, an offset or a meaning raises
//! [`LAYOUT_VERSION`].
//!
//! Units and clocks: fields ending in `_ns` are nanoseconds of `CLOCK_BOOTTIME` (time since boot, suspend included) as
//! the initial time namespace counts it. Process ids are those of the initial pid namespace, unless the field says
//! otherwise. There is no padding that is not a named, zeroed field.
//!
//! This crate holds no logic for user space; the programs are in the binary target of the same package.

#![no_std]

#[cfg(feature = "user")]
mod object;
mod record;

#[cfg(feature = "user")]
pub use object::{OBJECT, SOURCES};
pub use record::*;

/// The version of the pinned layout: names, sizes, offsets and meanings of maps and records.
pub const LAYOUT_VERSION: u32 = 2;

/// The version before it, whose members can be taken over while they run. Its records of members, services and exits have the same
/// shapes.
pub const EARLIER_LAYOUT_VERSION: u32 = 1;

/// Names of the maps, as pinned and as `bpftool` lists them.
pub mod map {
    /// tgid → [`Process`](super::Process): the live members of every service.
    pub const PROCESSES: &str = "processes";
    /// Service id → [`Service`](super::Service).
    pub const SERVICES: &str = "services";
    /// Thread id of a spawner → [`Spawn`](super::Spawn).
    pub const SPAWNS: &str = "spawns";
    /// tgid → [`Adoption`](super::Adoption): roots that the `adopt` iterator takes in.
    pub const ADOPTIONS: &str = "adoptions";
    /// [`ExitKey`](super::ExitKey) → [`Exit`](super::Exit): history, oldest evicted first.
    pub const EXITS: &str = "exits";
    /// Ring buffer of [`Event`](super::Event).
    pub const EVENTS: &str = "events";
    /// Per-CPU [`Stats`](super::Stats), one element.
    pub const STATS: &str = "stats";
    /// [`Control`](super::Control), one element, written by the programs only.
    pub const CONTROL: &str = "control";
    /// [`Filter`](super::Filter): which tgids may be those of members.
    pub const FILTER: &str = "filter";
    /// [`ServiceName`](super::ServiceName) → [`Stops`](super::Stops), written by user space only; oldest evicted first.
    pub const STOPS: &str = "stops";
    /// [`Layout`](super::Layout), one element, written by user space only.
    pub const LAYOUT: &str = "layout";
    /// Not pinned: the [`PROCESSES`] of the layout before this one while its members are taken over, else without an entry.
    pub const EARLIER: &str = "earlier";

    /// Every map that is pinned, in the order in which they are.
    pub const ALL: [&str; 11] = [
        PROCESSES, SERVICES, SPAWNS, ADOPTIONS, EXITS, EVENTS, STATS, CONTROL, FILTER, STOPS, LAYOUT,
    ];
}

/// Names of the programs. The kernel keeps 15 characters; all of them fit.
pub mod program {
    /// `tp_btf/sched_process_fork`: a process is created.
    pub const FORK: &str = "zinit_fork";
    /// `tp_btf/sched_wakeup_new`: the same, where the first can be missed (7.0 and later).
    pub const WAKEUP_NEW: &str = "zinit_wakeup";
    /// `tp_btf/sched_process_exec`.
    pub const EXEC: &str = "zinit_exec";
    /// `tp_btf/sched_process_exit`: the last thread of a process exits.
    pub const EXIT: &str = "zinit_exit";
    /// `tp_btf/sched_process_free`: heals a missed exit.
    pub const FREE: &str = "zinit_free";
    /// `tp_btf/sys_enter`, attached only while a stop needs it: kills members of killing services.
    pub const GATE: &str = "zinit_gate";
    /// `lsm/task_alloc`, attached likewise where BPF LSM is active: refuses them children.
    pub const DENY: &str = "zinit_deny";
    /// `raw_tp`, run by a spawner in its own context: the next process of this thread joins a service.
    pub const SPAWN: &str = "zinit_spawn";
    /// `raw_tp`, run on request: sets a service's state.
    pub const STATE: &str = "zinit_state";
    /// `raw_tp`, run on request: takes one exact process out of its service.
    pub const RELEASE: &str = "zinit_release";
    /// `iter/task`: lists every process that the reader's pid namespace shows.
    pub const TASKS: &str = "zinit_tasks";
    /// `iter/task`: takes requested roots and their children into their services.
    pub const ADOPT: &str = "zinit_adopt";
    /// `iter/task`: prints the members of every service as a table.
    pub const TEXT: &str = "zinit_text";
}

/// Name of the file beside the maps that prints the members of every service as a table, to whoever reads it. It is the link of
/// [`program::TEXT`]. bpffs allows no dot in it.
pub const TEXT_FILE: &str = "processes_text";
