//! The records. `repr(C)`, fixed width, no implicit padding; sizes and offsets are asserted below.

use core::mem::{offset_of, size_of};

/// Length of a command name, terminating zero included (`TASK_COMM_LEN`).
pub const COMM_LEN: usize = 16;
/// Longest service name in bytes; the array is padded with zeros.
pub const NAME_LEN: usize = 64;
/// Longest instance name in bytes; the array is padded with zeros.
pub const INSTANCE_LEN: usize = 32;

/// A live member of a service: value of `processes`, keyed by tgid.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Process {
    /// Id of the service that the process belongs to.
    pub service: u32,
    /// Bits of [`process_flag`].
    pub flags: u32,
    /// Start of the process: `group_leader->start_boottime`. With the tgid it names the process uniquely.
    pub start_boottime_ns: u64,
    /// Start of the process that created it; with `parent_tgid` its unique name.
    pub parent_start_boottime_ns: u64,
    /// When it joined the service: its creation, or its adoption.
    pub joined_boottime_ns: u64,
    /// The process that created it (with `CLONE_PARENT` not its parent by `getppid`).
    pub parent_tgid: u32,
    /// Its pid in the pid namespace of the service's registrant; 0 if that namespace does not show it.
    pub pid: u32,
    /// Session id when it joined.
    pub session: u32,
    /// Process group id when it joined.
    pub group: u32,
    /// Command name, updated at exec.
    pub comm: [u8; COMM_LEN],
}

/// Bits of [`Process::flags`].
pub mod process_flag {
    /// Created through the service's `spawn`: attributed before its first instruction.
    pub const SPAWNED: u32 = 1;
    /// Present before tracking began and taken in by `adopt`.
    pub const ADOPTED: u32 = 1 << 1;
    /// Has executed a program since it joined.
    pub const EXECED: u32 = 1 << 2;
}

/// A service: value of `services`, keyed by its id.
///
/// A member is counted in `live` before its entry appears in `processes` and until after that entry is gone, so `live`
/// is 0 only when the service is empty; a walk over `processes` has no such guarantee.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// Members now.
    pub live: u64,
    /// Members that ever joined.
    pub forks: u64,
    /// Members that died.
    pub exits: u64,
    /// Largest `live` seen.
    pub peak: u64,
    /// Failed operations that concern this service. Not 0: its books are no longer proof.
    pub lost: u64,
    /// Creations that no hook had seen when it was registered (`recursion_misses` of the creation programs).
    pub missed_before: u64,
    /// When it was registered.
    pub registered_boottime_ns: u64,
    /// While an adoption is under way, when it began: the `adopt` iterator takes in children of members that joined since
    /// then. Else 0.
    pub adopting_boottime_ns: u64,
    /// Start of the process that registered it; with `registrant_tgid` its unique name.
    pub registrant_start_boottime_ns: u64,
    /// Start of the main process: the first one spawned or adopted; 0 before.
    pub root_start_boottime_ns: u64,
    /// tgid of the main process; 0 before there is one.
    pub root_tgid: u32,
    /// The process that registered it.
    pub registrant_tgid: u32,
    /// One of [`service_state`].
    pub state: u32,
    /// Id of the service of which the registrant is a member; 0: none.
    pub parent: u32,
    /// Bits of [`service_flag`].
    pub flags: u32,
    /// Inode number of the registrant's pid namespace.
    pub pid_namespace: u32,
    /// Nesting level of that namespace; the initial one is 0.
    pub pid_namespace_level: u32,
    /// Always 0.
    pub _pad: u32,
    /// Who manages it, padded with zeros.
    pub instance: [u8; INSTANCE_LEN],
    /// Its name within the instance, padded with zeros.
    pub name: [u8; NAME_LEN],
}

/// Values of [`Service::state`].
pub mod service_state {
    /// Members may live and fork.
    pub const UP: u32 = 0;
    /// A stop is under way, within its grace period.
    pub const STOPPING: u32 = 1;
    /// A member that forks is killed.
    pub const KILLING: u32 = 2;
}

/// What the command `zinit_state` does to a service, as its arguments after the service's id.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateChange {
    /// The new [`Service::state`]; [`StateChange::KEEP`]: as it is.
    pub state: u64,
    /// Bits to set in [`Service::flags`].
    pub set_flags: u64,
    /// What to add to [`Service::lost`].
    pub lost: u64,
    /// 1: an adoption begins, 0: it has ended; [`StateChange::KEEP`]: neither.
    pub adopting: u64,
}

impl StateChange {
    /// Leaves a field as it is.
    pub const KEEP: u64 = u64::MAX;
    /// Changes nothing.
    pub const NONE: Self = Self {
        state: Self::KEEP,
        set_flags: 0,
        lost: 0,
        adopting: Self::KEEP,
    };
}

/// Bits of [`Service::flags`].
pub mod service_flag {
    /// Members were adopted: what left their tree before that is unknown.
    pub const ADOPTED: u32 = 1;
    /// Members were released: what else shows signs of the service may have been let go on purpose.
    pub const RELEASED: u32 = 1 << 1;
    /// Hooks were found detached while it was registered, and attached again: what happened in between is unknown.
    pub const UNWATCHED: u32 = 1 << 2;
}

/// The id that no service has. As that of a pending spawn it asks the gate at `task_alloc` to refuse the thread's next
/// task, which tells user space whether that gate takes effect.
pub const NO_SERVICE: u32 = u32::MAX;

/// What such a refusal gives as error, positive: `EUSERS`, which clone(2) gives for nothing else. `EAGAIN`, the error for
/// members, has many reasons.
pub const PROBE_ERRNO: i32 = 87;

/// A pending spawn: value of `spawns`, keyed by the thread id of the spawner.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spawn {
    /// The service that the next process created by the thread joins.
    pub service: u32,
    /// Always 0.
    pub _pad: u32,
    /// When it was requested: a thread that started later has merely inherited the thread id.
    pub armed_boottime_ns: u64,
}

/// A requested adoption: value of `adoptions`, keyed by tgid.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Adoption {
    /// The service that the process joins.
    pub service: u32,
    /// Always 0.
    pub _pad: u32,
    /// Start of the process that is meant.
    pub start_boottime_ns: u64,
}

/// Key of `exits`: one process, uniquely named.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ExitKey {
    /// Start of the process.
    pub start_boottime_ns: u64,
    /// Its tgid.
    pub tgid: u32,
    /// Always 0.
    pub _pad: u32,
}

/// A member that died: value of `exits`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exit {
    /// The service it belonged to.
    pub service: u32,
    /// The process that created it.
    pub parent_tgid: u32,
    /// Start of that process.
    pub parent_start_boottime_ns: u64,
    /// When it died.
    pub exit_boottime_ns: u64,
    /// Wait status as in wait(2): exit code in bits 8 to 15, or signal in bits 0 to 6.
    pub status: u32,
    /// Its pid in the pid namespace of the service's registrant; 0 if that namespace does not show it.
    pub pid: u32,
    /// Bits of [`process_flag`].
    pub flags: u32,
    /// Always 0.
    pub _pad: u32,
    /// Command name.
    pub comm: [u8; COMM_LEN],
}

/// A record of the ring buffer `events`. Hints: a full buffer drops them, and counts the drop.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// One of [`event_kind`].
    pub kind: u32,
    /// The service concerned.
    pub service: u32,
    /// When.
    pub boottime_ns: u64,
    /// Start of the process; 0 for a service event.
    pub start_boottime_ns: u64,
    /// The process; 0 for a service event.
    pub tgid: u32,
    /// Its pid in the pid namespace of the service's registrant; 0 if that namespace does not show it.
    pub pid: u32,
    /// The process that created it.
    pub parent_tgid: u32,
    /// Wait status for an exit, the state for a change of that, else 0.
    pub status: u32,
    /// Command name.
    pub comm: [u8; COMM_LEN],
}

/// Values of [`Event::kind`].
pub mod event_kind {
    /// A process joined by being created.
    pub const FORK: u32 = 1;
    /// A member executed a program.
    pub const EXEC: u32 = 2;
    /// A member died.
    pub const EXIT: u32 = 3;
    /// A service has no member any more.
    pub const EMPTY: u32 = 4;
    /// A process joined by being adopted.
    pub const ADOPT: u32 = 5;
    /// A process was taken out of its service.
    pub const RELEASE: u32 = 6;
    /// A service is in another state than before, which is in `status`: one of [`service_state`](super::service_state). No process.
    pub const STATE: u32 = 7;
}

/// Counters since the maps were created, one copy a CPU: the value of `stats`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Process creations seen, tracked or not.
    pub seen: u64,
    /// Processes that joined a service.
    pub tracked: u64,
    /// Creations by processes that belong to no service.
    pub ignored: u64,
    /// Inserts into `processes` that failed.
    pub insert_failures: u64,
    /// Deletes from `processes` that failed.
    pub delete_failures: u64,
    /// Exits that could not be recorded in `exits`.
    pub exit_failures: u64,
    /// Entries of an earlier process with the same tgid that were replaced.
    pub stale_replaced: u64,
    /// Deaths that only `sched_process_free` saw.
    pub healed: u64,
    /// Events that found the ring buffer full.
    pub event_drops: u64,
    /// Members that were killed because they forked or entered a system call while their service was killing.
    pub kills: u64,
}

/// Switches of the programs: the value of `control`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// Pending spawns; 0 spares every fork a lookup in `spawns`.
    pub armed: u64,
}

/// How many members have a tgid that leads here: an element of `filter`, which spares those that are none a lookup in `processes`.
///
/// A tgid's counter is number `tgid % 16` of element `tgid / 16 % `[`FILTER_ELEMENTS`]. It is raised before a member's entry
/// appears, and lowered after that is gone: where it is 0 there is no member. The element behind the last one says who has kept
/// the counters since the maps were made: the SHA-256 of the sources of that build. Where another build worked on these maps that may
/// not have kept them, every counter was raised by [`FILTER_UNKNOWN`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Members for each tgid that leads here.
    pub members: [u32; 16],
}

/// Elements of `filter` that count.
pub const FILTER_ELEMENTS: u32 = 4096;

/// What a counter of [`Filter`] is raised by that may have missed members.
pub const FILTER_UNKNOWN: u32 = 1 << 30;

/// Which service: key of `stops`. Its id would not do, as a service that is started again has another.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceName {
    /// As [`Service::instance`].
    pub instance: [u8; INSTANCE_LEN],
    /// As [`Service::name`].
    pub name: [u8; NAME_LEN],
}

/// The stops of a service that came to an end, since the maps were made or, of those that are stopped seldom, since the last was
/// forgotten to make room: value of `stops`. Written by whoever stops, in user space: of two stops of one service that end at the same
/// moment one may be left out.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stops {
    /// How many.
    pub count: u64,
    /// Those in which members had to be killed.
    pub killed: u64,
    /// Those that left survivors.
    pub survived: u64,
    /// How many survivors they left.
    pub survivors: u64,
    /// Those that left nobody, without proof of it.
    pub unproven: u64,
    /// How long they took, from the request to the end of verification, together.
    pub elapsed_ns: u64,
    /// Those that took no longer than the bound of [`STOP_BOUNDS_NS`] and longer than the one before; the last: longer than all of them.
    pub took: [u64; STOP_BOUNDS_NS.len() + 1],
    /// When the last was requested.
    pub last_boottime_ns: u64,
    /// How long it took.
    pub last_elapsed_ns: u64,
    /// From the end of its grace period; 0 if nobody had to be killed.
    pub last_killing_ns: u64,
    /// The id that the service had.
    pub last_service: u32,
    /// Members that were alive during it.
    pub last_processes: u32,
    /// Those that it left.
    pub last_survivors: u32,
    /// How often members were listed and killed.
    pub last_kill_rounds: u32,
    /// Bits of [`stop_flag`].
    pub last_flags: u32,
    /// What spoke against its books, bits of [`stop_doubt`].
    pub last_doubts: u32,
}

/// Bounds between stops by how long they took.
pub const STOP_BOUNDS_NS: [u64; 15] = [
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
    30_000_000_000,
    60_000_000_000,
];

/// Bits of [`Stops::last_flags`].
pub mod stop_flag {
    /// It is proven that nothing is left.
    pub const PROVEN: u32 = 1;
    /// A gate kept members from forking.
    pub const GATE: u32 = 1 << 1;
}

/// Bits of [`Stops::last_doubts`], by the reasons that reports name.
pub mod stop_doubt {
    /// `lost-operations`
    pub const LOST_OPERATIONS: u32 = 1;
    /// `missed-creations`
    pub const MISSED_CREATIONS: u32 = 1 << 1;
    /// `adopted`
    pub const ADOPTED: u32 = 1 << 2;
    /// `unwatched`
    pub const UNWATCHED: u32 = 1 << 3;
    /// `detached-hooks`
    pub const DETACHED_HOOKS: u32 = 1 << 4;
    /// `replaced-pins`
    pub const REPLACED_PINS: u32 = 1 << 5;
    /// `out-of-sight`
    pub const OUT_OF_SIGHT: u32 = 1 << 6;
    /// `unobserved-deaths`
    pub const UNOBSERVED_DEATHS: u32 = 1 << 7;
    /// `contradictory-books`
    pub const CONTRADICTORY_BOOKS: u32 = 1 << 8;
}

/// What the maps were made for: the value of `layout`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// [`LAYOUT_VERSION`](crate::LAYOUT_VERSION) of the tracker that made them; 0 while they are being made.
    pub version: u32,
    /// The id that the next service gets.
    pub next_service: u32,
    /// Capacity of `processes`.
    pub max_processes: u32,
    /// Creations that no hook of an earlier build saw, before it was replaced.
    pub missed_earlier: u32,
    /// SHA-256 of the sources that the programs were built from.
    pub sources: [u8; 32],
}

/// A process as the `zinit_tasks` iterator prints it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Task {
    /// Start of the process.
    pub start_boottime_ns: u64,
    /// Its tgid in the initial pid namespace.
    pub tgid: u32,
    /// Its pid in the reader's pid namespace.
    pub pid: u32,
    /// tgid of its parent (`real_parent`).
    pub parent_tgid: u32,
    /// Session id; 0 once the process is being reaped.
    pub session: u32,
    /// Process group id; 0 once the process is being reaped.
    pub group: u32,
    /// Threads that have not exited; 0 for a process that is dead and not yet reaped.
    pub live_threads: u32,
    /// Inode number of the process's own pid namespace.
    pub pid_namespace: u32,
    /// Nesting level of that namespace.
    pub pid_namespace_level: u32,
    /// 1 if every thread has ended and closed its files, as a readable pidfd says; else 0.
    pub dead: u32,
    /// Always 0.
    pub _pad: u32,
    /// Command name.
    pub comm: [u8; COMM_LEN],
}

const _: () = {
    assert!(size_of::<Process>() == 64);
    assert!(offset_of!(Process, start_boottime_ns) == 8);
    assert!(offset_of!(Process, parent_tgid) == 32);
    assert!(offset_of!(Process, comm) == 48);
    assert!(size_of::<Service>() == 208);
    assert!(offset_of!(Service, lost) == 32);
    assert!(offset_of!(Service, root_tgid) == 80);
    assert!(offset_of!(Service, instance) == 112);
    assert!(offset_of!(Service, name) == 144);
    assert!(size_of::<Spawn>() == 16);
    assert!(size_of::<Adoption>() == 16);
    assert!(size_of::<ExitKey>() == 16);
    assert!(size_of::<Exit>() == 56);
    assert!(offset_of!(Exit, status) == 24);
    assert!(offset_of!(Exit, comm) == 40);
    assert!(size_of::<Event>() == 56);
    assert!(offset_of!(Event, comm) == 40);
    assert!(size_of::<Stats>() == 80);
    assert!(size_of::<Control>() == 8);
    assert!(size_of::<Filter>() == 64);
    assert!(size_of::<ServiceName>() == 96);
    assert!(size_of::<Stops>() == 224);
    assert!(offset_of!(Stops, took) == 48);
    assert!(offset_of!(Stops, last_boottime_ns) == 176);
    assert!(offset_of!(Stops, last_service) == 200);
    assert!(size_of::<Layout>() == 48);
    assert!(size_of::<Task>() == 64);
    assert!(offset_of!(Task, comm) == 48);
};

#[cfg(feature = "user")]
macro_rules! plain {
    ($($record:ty),+ $(,)?) => {
        $(
            // SAFETY: `repr(C)`, integers and arrays of integers only, and the asserts above leave no implicit padding.
            unsafe impl aya::Pod for $record {}
        )+
    };
}

#[cfg(feature = "user")]
plain!(
    Process,
    Service,
    Spawn,
    Adoption,
    ExitKey,
    Exit,
    Event,
    Stats,
    Control,
    Filter,
    ServiceName,
    Stops,
    Layout,
    Task,
);
