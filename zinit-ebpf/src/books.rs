//! The maps, and the only functions that change them.
//!
//! Two rules make the live counter exact. A member is counted before its entry is inserted and uncounted after its
//! entry is deleted, so the counter never falls short of the entries. And of several attempts to insert or delete the
//! same process only the one whose map operation succeeds counts, so a program may run twice for one event.

use aya_ebpf::{
    Global,
    bindings::BPF_NOEXIST,
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
    helpers::{bpf_ktime_get_boot_ns, bpf_send_signal},
    macros::btf_map,
};
use core::arch::asm;
use zinit_ebpf::{
    Adoption, COMM_LEN, Control, Event, Exit, ExitKey, FILTER_ELEMENTS, Filter, Layout, Process, Service, ServiceName,
    Spawn, StateChange, Stats, Stops, event_kind, process_flag,
};

use crate::task::{Key, Signal, Task};

const EEXIST: i32 = -17;
const ENOENT: i32 = -2;
const SIGKILL: u32 = 9;
const NOEXIST: u64 = BPF_NOEXIST as u64;

#[btf_map(name = "processes")]
pub static PROCESSES: HashMap<u32, Process, 131_072> = HashMap::new();
#[btf_map(name = "services")]
pub static SERVICES: HashMap<u32, Service, 4096> = HashMap::new();
#[btf_map(name = "spawns")]
pub static SPAWNS: HashMap<u32, Spawn, 1024> = HashMap::new();
#[btf_map(name = "adoptions")]
pub static ADOPTIONS: HashMap<u32, Adoption, 1024> = HashMap::new();
#[btf_map(name = "exits")]
pub static EXITS: LruHashMap<ExitKey, Exit, 16_384> = LruHashMap::new();
#[btf_map(name = "events")]
pub static EVENTS: RingBuf<Event, 262_144> = RingBuf::new();
#[btf_map(name = "stats")]
pub static STATS: PerCpuArray<Stats, 1> = PerCpuArray::new();
#[btf_map(name = "control")]
pub static CONTROL: Array<Control, 1> = Array::new();
#[btf_map(name = "filter")]
pub static FILTER: Array<Filter, { FILTER_ELEMENTS as usize + 1 }> = Array::new();
#[btf_map(name = "stops")]
pub static STOPS: LruHashMap<ServiceName, Stops, 1024> = LruHashMap::new();
#[btf_map(name = "layout")]
pub static LAYOUT: Array<Layout, 1> = Array::new();
/// The `processes` of the layout before this one, while [`is_moving`]; its hooks keep it.
#[btf_map(name = "earlier")]
pub static EARLIER: HashMap<u32, Process, 1> = HashMap::new();

/// 1 in programs that take over the members of the layout before this one; else 0. As the verifier knows it, others do not pay for it.
#[unsafe(no_mangle)]
static MOVING: Global<u64> = Global::new(0);

/// The change of one field of [`Stats`].
macro_rules! count {
    ($field:ident) => {
        if let Some(stats) = $crate::books::STATS.get_ptr_mut(0) {
            // SAFETY: the element of this CPU, valid for the run of the program; a preempting program may run in
            // between, so the addition is atomic.
            unsafe { $crate::books::add(&raw mut (*stats).$field, 1) }
        }
    };
}
pub(crate) use count;

/// Adds to a counter in a map. The result is unused on purpose: fetching it needs kernel 5.12.
///
/// # Safety
///
/// `counter` points into a map value.
#[inline(always)]
pub unsafe fn add(counter: *mut u64, delta: u64) {
    // Rust has no atomic arithmetic for this target.
    // SAFETY: the caller's promise; map values are 8-byte aligned and so are their u64 fields.
    unsafe {
        asm!("lock *(u64 *)({counter} + 0) += {delta}", counter = in(reg) counter, delta = in(reg) delta);
    }
}

/// As [`add`].
///
/// # Safety
///
/// As for [`add`].
#[inline(always)]
pub unsafe fn subtract(counter: *mut u64, delta: u64) {
    // SAFETY: the caller's promise.
    unsafe { add(counter, delta.wrapping_neg()) }
}

/// The counter of a tgid in `filter`.
#[inline(always)]
fn counter(tgid: u32) -> Option<*mut u32> {
    let element = FILTER.get_ptr_mut(tgid / 16 % FILTER_ELEMENTS)?;
    // SAFETY: a map value of 16 counters.
    Some(unsafe { element.cast::<u32>().add((tgid % 16) as usize) })
}

/// Whether a process with this tgid may be a member. Most are none: that they are not costs them one access to a counter that lies
/// beside those of other recent processes, not one to a bucket that nobody has touched for long.
#[inline(always)]
pub fn may_be_member(tgid: u32) -> bool {
    // SAFETY: a map value.
    counter(tgid).is_none_or(|counter| unsafe { core::ptr::read_volatile(counter) } != 0)
}

/// Changes the counter of a tgid by 1 or -1. As [`add`], with half the width.
#[inline(always)]
fn note_in_filter(tgid: u32, delta: i64) {
    if let Some(counter) = counter(tgid) {
        // SAFETY: `counter` points into a map value, and is aligned.
        unsafe {
            asm!("lock *(u32 *)({counter} + 0) += {delta}", counter = in(reg) counter, delta = in(reg) delta);
        }
    }
}

/// Copies out the entry of exactly this process; an entry of an earlier process with its tgid does not count.
#[inline(always)]
pub fn member(key: Key) -> Option<Process> {
    // Without the filter: those who ask know that there may be an entry, or were opened while other hooks are attached.
    // SAFETY: the reference is copied from before any map operation.
    let entry = unsafe { PROCESSES.get(key.tgid) }?;
    (entry.start_boottime_ns == key.start_boottime_ns).then_some(*entry)
}

/// The service of exactly this process, without copying its entry.
#[inline(always)]
pub fn service_of(key: Key) -> Option<u32> {
    if !may_be_member(key.tgid) {
        return None;
    }
    // SAFETY: read before any map operation.
    let entry = unsafe { PROCESSES.get(key.tgid) }?;
    (entry.start_boottime_ns == key.start_boottime_ns).then_some(entry.service)
}

/// Whether members of the layout before this one are being taken over: until the layout record is written.
#[inline(always)]
pub fn is_moving() -> bool {
    // SAFETY: a map value.
    MOVING.load() != 0
        && LAYOUT
            .get_ptr(0)
            .is_some_and(|layout| unsafe { core::ptr::read_volatile(&raw const (*layout).version) } == 0)
}

/// Copies out the entry that exactly this process has in the layout before this one, while its members are being taken over.
#[inline(always)]
pub fn earlier(key: Key) -> Option<Process> {
    if !is_moving() {
        return None;
    }
    let pointer = EARLIER.get_ptr(key.tgid)?;
    // SAFETY: a map value. Its element may come to be another member's meanwhile, when it has another start afterwards.
    let (entry, start) = unsafe {
        let entry = *pointer;
        (entry, core::ptr::read_volatile(&raw const (*pointer).start_boottime_ns))
    };
    (entry.start_boottime_ns == key.start_boottime_ns && start == key.start_boottime_ns).then_some(entry)
}

#[inline(always)]
fn emit(event: &Event) {
    if EVENTS.output(event, 0).is_err() {
        count!(event_drops);
    }
}

/// Changes what commands may change of a service. Returns whether it exists.
#[inline(always)]
pub fn change(service: u32, change: StateChange) -> bool {
    let Some(books) = SERVICES.get_ptr_mut(service) else {
        return false;
    };
    let state = change.state as u32;
    // SAFETY: a map value. Of two who change it at the same moment, both may tell.
    if change.state != StateChange::KEEP && unsafe { core::ptr::read_volatile(&raw const (*books).state) } != state {
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(&raw mut (*books).state, state) };
        // SAFETY: a helper without arguments.
        emit_of_service(event_kind::STATE, service, unsafe { bpf_ktime_get_boot_ns() }, state);
    }
    if change.set_flags != 0 {
        // SAFETY: as above. Callers hold the lock of the pin directory, so no flag is lost.
        unsafe { (*books).flags |= change.set_flags as u32 };
    }
    if change.lost != 0 {
        // SAFETY: as above.
        unsafe { add(&raw mut (*books).lost, change.lost) };
    }
    if change.adopting != StateChange::KEEP {
        let since = match change.adopting {
            0 => 0,
            // SAFETY: a helper without arguments.
            _ => unsafe { bpf_ktime_get_boot_ns() },
        };
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(&raw mut (*books).adopting_boottime_ns, since) };
    }
    true
}

/// Notes that a member executed a program.
#[inline(always)]
pub fn executed(task: Task) {
    if !may_be_member(task.tgid()) {
        return;
    }
    let key = task.key();
    let Some(pointer) = PROCESSES.get_ptr_mut(key.tgid) else {
        return;
    };
    let comm = task.comm();
    // SAFETY: the entry stays valid for the run of the program; only the process's own exec writes these fields.
    let entry = unsafe { &mut *pointer };
    if entry.start_boottime_ns != key.start_boottime_ns {
        return;
    }
    entry.comm = comm;
    entry.flags |= process_flag::EXECED;
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    emit(&event_of(event_kind::EXEC, key, entry, now, 0));
}

/// Kills the process that runs the program, a member of a service that is being killed.
#[inline(always)]
pub fn kill_current() {
    // SAFETY: a helper without pointers.
    if unsafe { bpf_send_signal(SIGKILL) } == 0 {
        count!(kills);
    }
}

/// Enters `child`, whose name is `key`, into `service`; `creator` is the process that created it.
///
/// Returns the service's state if this call entered it.
#[inline(always)]
pub fn join(service: u32, child: Task, key: Key, creator: Key, flags: u32, kind: u32) -> Option<u32> {
    let Some(books) = SERVICES.get_ptr_mut(service) else {
        // A service is unregistered only when it is empty and nobody spawns into it.
        count!(insert_failures);
        return None;
    };
    let signal = child.signal();
    // SAFETY: `books` points to the service's map value, which outlives this run of the program.
    let (level, inum) = unsafe { ((*books).pid_namespace_level, (*books).pid_namespace) };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    let entry = Process {
        service,
        flags,
        start_boottime_ns: key.start_boottime_ns,
        parent_start_boottime_ns: creator.start_boottime_ns,
        joined_boottime_ns: now,
        parent_tgid: creator.tgid,
        pid: child.pid().in_namespace(level, inum),
        session: signal.session(),
        group: signal.group(),
        comm: child.comm(),
    };
    let state = enter(books, entry, key, kind, now)?;
    if flags & (process_flag::SPAWNED | process_flag::ADOPTED) != 0 {
        // SAFETY: as above.
        let root = unsafe {
            Key {
                tgid: (*books).root_tgid,
                start_boottime_ns: (*books).root_start_boottime_ns,
            }
        };
        if service_of(root).is_none() {
            // SAFETY: as above.
            unsafe {
                (*books).root_start_boottime_ns = key.start_boottime_ns;
                (*books).root_tgid = key.tgid;
            }
        }
    }
    Some(state)
}

/// Takes over what the layout before this one has about a member. Returns whether this call entered it.
#[inline(always)]
pub fn take_over(entry: Process, key: Key) -> bool {
    let Some(books) = SERVICES.get_ptr_mut(entry.service) else {
        // No service is registered meanwhile.
        count!(insert_failures);
        return false;
    };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    enter(books, entry, key, event_kind::ADOPT, now).is_some()
}

/// Enters a process into its service. Returns the service's state if this call entered it.
#[inline(always)]
fn enter(books: *mut Service, entry: Process, key: Key, kind: u32, now: u64) -> Option<u32> {
    // SAFETY: callers pass the service's map value, which outlives this run of the program.
    unsafe { add(&raw mut (*books).live, 1) };
    note_in_filter(key.tgid, 1);
    let mut result = PROCESSES.insert(key.tgid, entry, NOEXIST);
    if result == Err(EEXIST) {
        if service_of(key).is_some() {
            // The other creation hook was first.
            note_in_filter(key.tgid, -1);
            // SAFETY: as above.
            unsafe { subtract(&raw mut (*books).live, 1) };
            return None;
        }
        // An earlier process with this tgid, whose exit was missed and whose `sched_process_free` is still to come.
        count!(stale_replaced);
        forget(key.tgid, now);
        result = PROCESSES.insert(key.tgid, entry, NOEXIST);
    }
    if result.is_err() {
        note_in_filter(key.tgid, -1);
        // SAFETY: as above.
        unsafe { subtract(&raw mut (*books).live, 1) };
        // SAFETY: as above.
        unsafe { add(&raw mut (*books).lost, 1) };
        count!(insert_failures);
        return None;
    }
    // SAFETY: as above.
    unsafe { add(&raw mut (*books).forks, 1) };
    count!(tracked);
    // SAFETY: as above. `peak` is only a figure to show: a race may leave it a little low.
    unsafe {
        let live = core::ptr::read_volatile(&raw const (*books).live);
        if live > (*books).peak {
            (*books).peak = live;
        }
    }
    emit(&event_of(kind, key, &entry, now, 0));
    // SAFETY: as above.
    Some(unsafe { core::ptr::read_volatile(&raw const (*books).state) })
}

/// Deletes the entry. Returns the service's books if it was there and nobody else deleted it.
#[inline(always)]
fn delete(service: u32, tgid: u32) -> Option<*mut Service> {
    let result = PROCESSES.remove(tgid);
    if result == Err(ENOENT) {
        return None;
    }
    if result.is_ok() {
        note_in_filter(tgid, -1);
    }
    let books = SERVICES.get_ptr_mut(service)?;
    if result.is_err() {
        count!(delete_failures);
        // SAFETY: a map value.
        unsafe { add(&raw mut (*books).lost, 1) };
        return None;
    }
    Some(books)
}

/// 0, which the compiler does not know: it would fill a record with zeros by calling a function, and no program may call one
/// (`build-ebpf` says why).
#[inline(always)]
fn zero() -> u64 {
    let zero;
    // SAFETY: sets a register.
    unsafe { asm!("{zero} = 0", zero = out(reg) zero, options(pure, nomem, nostack)) };
    zero
}

/// Uncounts a member, as the last step of its removal: whoever sees `live` at 0 finds everything else done.
#[inline(always)]
fn uncount(books: *mut Service, service: u32, now: u64) {
    // SAFETY: callers pass a map value.
    unsafe { subtract(&raw mut (*books).live, 1) };
    // SAFETY: as above.
    if unsafe { core::ptr::read_volatile(&raw const (*books).live) } == 0 {
        emit_of_service(event_kind::EMPTY, service, now, zero() as u32);
    }
}

/// Emits what concerns no process.
#[inline(always)]
fn emit_of_service(kind: u32, service: u32, now: u64, status: u32) {
    let none = zero();
    let mut comm = [0; COMM_LEN];
    comm[..8].copy_from_slice(&none.to_ne_bytes());
    comm[8..].copy_from_slice(&none.to_ne_bytes());
    emit(&Event {
        kind,
        service,
        boottime_ns: now,
        start_boottime_ns: none,
        tgid: none as u32,
        pid: none as u32,
        parent_tgid: none as u32,
        status,
        comm,
    });
}

/// Removes whatever entry a tgid has: its process is gone, since the kernel gave the tgid to another one.
#[inline(always)]
fn forget(tgid: u32, now: u64) {
    // SAFETY: copied from before any map operation.
    let Some(service) = (unsafe { PROCESSES.get(tgid) }).map(|entry| entry.service) else {
        return;
    };
    let Some(books) = delete(service, tgid) else {
        return;
    };
    // SAFETY: a map value.
    unsafe { add(&raw mut (*books).exits, 1) };
    uncount(books, service, now);
}

/// Takes exactly this process out of its service alive, or buries one that user space has seen dead.
#[inline(always)]
pub fn release(key: Key, died: bool) -> bool {
    let Some(entry) = member(key) else {
        return false;
    };
    let Some(books) = delete(entry.service, key.tgid) else {
        return false;
    };
    if died {
        // SAFETY: a map value.
        unsafe { add(&raw mut (*books).exits, 1) };
    }
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    let kind = if died { event_kind::EXIT } else { event_kind::RELEASE };
    emit(&event_of(kind, key, &entry, now, 0));
    uncount(books, entry.service, now);
    true
}

/// Records the death of `task`'s process, whose last thread exits or is gone, and whose name and shared state the caller has read.
///
/// `exits` is raised before the exit record appears and `live` lowered after: a reader who takes the records first and
/// then `exits` misses none that are counted, and one who sees `live` at 0 finds every record.
#[inline(always)]
pub fn died(task: Task, key: Key, signal: Signal) -> bool {
    let Some(entry) = member(key) else {
        return false;
    };
    let Some(books) = delete(entry.service, key.tgid) else {
        return false;
    };
    // SAFETY: a map value.
    unsafe { add(&raw mut (*books).exits, 1) };
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    let status = task.wait_status(signal);
    let exit = Exit {
        service: entry.service,
        parent_tgid: entry.parent_tgid,
        parent_start_boottime_ns: entry.parent_start_boottime_ns,
        exit_boottime_ns: now,
        status,
        pid: entry.pid,
        flags: entry.flags,
        _pad: 0,
        comm: entry.comm,
    };
    let exit_key = ExitKey {
        start_boottime_ns: key.start_boottime_ns,
        tgid: key.tgid,
        _pad: 0,
    };
    if EXITS.insert(exit_key, exit, 0).is_err() {
        count!(exit_failures);
        // SAFETY: a map value.
        unsafe { add(&raw mut (*books).lost, 1) };
    }
    emit(&event_of(event_kind::EXIT, key, &entry, now, status));
    uncount(books, entry.service, now);
    true
}

#[inline(always)]
fn event_of(kind: u32, key: Key, entry: &Process, now: u64, status: u32) -> Event {
    Event {
        kind,
        service: entry.service,
        boottime_ns: now,
        start_boottime_ns: key.start_boottime_ns,
        tgid: key.tgid,
        pid: entry.pid,
        parent_tgid: entry.parent_tgid,
        status,
        comm: entry.comm,
    }
}

/// Removes the pending spawn of a thread; whoever removes it, counts.
#[inline(always)]
pub fn disarm(tid: u32) -> bool {
    match SPAWNS.remove(tid) {
        Ok(()) => {}
        Err(ENOENT) => return false,
        Err(_) => {
            // The request stays pending, which the spawner sees when it withdraws it.
            count!(delete_failures);
            return false;
        }
    }
    if let Some(control) = CONTROL.get_ptr_mut(0) {
        // SAFETY: a map value.
        unsafe { subtract(&raw mut (*control).armed, 1) };
    }
    true
}

/// Whether any spawn is pending.
#[inline(always)]
pub fn any_armed() -> bool {
    // SAFETY: a map value.
    CONTROL
        .get_ptr(0)
        .is_some_and(|control| unsafe { core::ptr::read_volatile(&raw const (*control).armed) } != 0)
}
