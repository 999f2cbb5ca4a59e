//! The programs: one function for each hook, each deciding only whom an event concerns.

use aya_ebpf::{
    EbpfContext as _,
    bindings::BPF_NOEXIST,
    helpers::{bpf_get_current_task_btf, bpf_ktime_get_boot_ns, bpf_seq_write},
    macros::{btf_tracepoint, lsm},
    programs::{BtfTracePointContext, LsmContext, RawTracePointContext},
};
use aya_log_ebpf::{debug, warn};
use core::ffi::c_void;
use zinit_ebpf::{NO_SERVICE, PROBE_ERRNO, Spawn, StateChange, event_kind, process_flag, service_state};

use crate::{
    books::{self, count},
    task::{Key, Task},
};

const EAGAIN: i32 = -11;

#[btf_tracepoint(function = "sched_process_fork")]
fn zinit_fork(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the tracepoint's arguments are the forking task and the new one, neither null.
    let (parent, child) = unsafe { (Task::new(ctx.arg(0)), Task::new(ctx.arg(1))) };
    let tgid = child.tgid();
    if tgid == parent.tgid() {
        return 0;
    }
    count!(seen);
    match created(parent, child) {
        Creation::Foreign => count!(ignored),
        Creation::Known => {}
        Creation::Joined(service) => debug!(&ctx, "fork: {} creates {} in service {}", parent.tgid(), tgid, service),
    }
    0
}

#[btf_tracepoint(function = "sched_wakeup_new")]
fn zinit_wakeup(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the argument is the new task, and the task that runs is its creator; neither is null.
    let (parent, child) = unsafe { (Task::new(bpf_get_current_task_btf() as u64), Task::new(ctx.arg(0))) };
    let tgid = child.tgid();
    if tgid == parent.tgid() {
        return 0;
    }
    if let Creation::Joined(service) = created(parent, child) {
        debug!(&ctx, "fork: {} creates {} in service {}", parent.tgid(), tgid, service);
    }
    0
}

/// Whom the creation of a process concerns.
enum Creation {
    /// No service.
    Foreign,
    /// A service that has it already, or whose books could not take it.
    Known,
    /// The service with this id, which has it now.
    Joined(u32),
}

/// A process was created by `parent`, which runs now. Called up to twice for each creation.
///
/// It logs nothing itself: the formatting would be a function of its own, which no program may call (`build-ebpf` says why).
#[inline(always)]
fn created(parent: Task, child: Task) -> Creation {
    // For bystanders nothing else is read.
    if !books::is_moving()
        && !books::may_be_member(parent.tgid())
        && !books::may_be_member(child.tgid())
        && !books::any_armed()
    {
        return Creation::Foreign;
    }
    let key = child.key();
    if books::service_of(key).is_some() {
        // The other hook was first.
        return Creation::Known;
    }
    let creator = parent.key();
    let (service, flags) = if let Some(service) = pending_spawn(parent) {
        (service, process_flag::SPAWNED)
    } else if let Some(service) = books::service_of(creator) {
        (service, 0)
    } else if let Some(creator) = books::earlier(creator) {
        // Not taken over yet.
        (creator.service, 0)
    } else {
        return Creation::Foreign;
    };
    let Some(state) = books::join(service, child, key, creator, flags, event_kind::FORK) else {
        return Creation::Known;
    };
    // A spawner is no member: it must not die for a service that is being killed.
    if state == service_state::KILLING && flags & process_flag::SPAWNED == 0 {
        books::kill_current();
    }
    Creation::Joined(service)
}

/// Takes the pending spawn of the thread, if it has one.
#[inline(always)]
fn pending_spawn(spawner: Task) -> Option<u32> {
    if !books::any_armed() {
        return None;
    }
    let tid = spawner.tid();
    // SAFETY: read before any map operation.
    let spawn = unsafe { books::SPAWNS.get(tid) }?;
    let service = spawn.service;
    let stale = spawn.armed_boottime_ns < spawner.start_boottime_ns();
    (books::disarm(tid) && !stale && service != NO_SERVICE).then_some(service)
}

#[btf_tracepoint(function = "sched_process_exec")]
fn zinit_exec(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the first argument is the task that executes, not null.
    books::executed(unsafe { Task::new(ctx.arg(0)) });
    0
}

#[btf_tracepoint(function = "sched_process_exit")]
fn zinit_exit(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the first argument is the exiting thread, not null.
    let task = unsafe { Task::new(ctx.arg(0)) };
    if books::any_armed() {
        books::disarm(task.tid());
    }
    if !books::may_be_member(task.tgid()) {
        return 0;
    }
    let signal = task.signal();
    if signal.live_threads() == 0 && books::died(task, task.key(), signal) {
        debug!(&ctx, "exit: {}", task.tgid());
    }
    0
}

#[btf_tracepoint(function = "sched_process_free")]
fn zinit_free(ctx: BtfTracePointContext) -> i32 {
    // SAFETY: the argument is the task that is freed, not null.
    let task = unsafe { Task::new(ctx.arg(0)) };
    if books::any_armed() {
        books::disarm(task.tid());
    }
    // Only for leaders; after an exec by another thread the old leader is freed while the process lives on, and then
    // its shared `signal` still has a live thread.
    if task.tid() != task.tgid() || !books::may_be_member(task.tgid()) {
        return 0;
    }
    let signal = task.signal();
    if signal.live_threads() == 0 && books::died(task, task.key(), signal) {
        count!(healed);
        warn!(&ctx, "exit of {} seen only when it was freed", task.tgid());
    }
    0
}

#[btf_tracepoint(function = "sys_enter")]
fn zinit_gate(ctx: BtfTracePointContext) -> i32 {
    if is_being_killed(ctx.tgid()) {
        books::kill_current();
    }
    0
}

/// Refuses members of killing services a child or a thread, and whoever asks to be refused.
#[lsm(hook = "task_alloc")]
fn zinit_deny(ctx: LsmContext) -> i32 {
    let earlier: i32 = ctx.arg(2);
    if earlier != 0 {
        return earlier;
    }
    if books::any_armed() && is_probing(ctx.pid()) {
        return -PROBE_ERRNO;
    }
    if is_being_killed(ctx.tgid()) { EAGAIN } else { 0 }
}

/// Whether the running process is a member of a service that is being killed.
#[inline(always)]
fn is_being_killed(tgid: u32) -> bool {
    // SAFETY: read before any map operation.
    let Some((service, start)) =
        (unsafe { books::PROCESSES.get(tgid) }).map(|entry| (entry.service, entry.start_boottime_ns))
    else {
        return false;
    };
    // Where the running task cannot be had (before 5.11) no exit is ever missed, so the entry is no earlier process's.
    if Task::current().is_some_and(|task| task.key().start_boottime_ns != start) {
        return false;
    }
    // SAFETY: as above.
    unsafe { books::SERVICES.get(service) }.is_some_and(|books| books.state == service_state::KILLING)
}

/// Whether the running thread finds out if a refusal takes effect.
#[inline(always)]
fn is_probing(tid: u32) -> bool {
    // SAFETY: read before any map operation.
    unsafe { books::SPAWNS.get(tid) }.is_some_and(|spawn| spawn.service == NO_SERVICE)
}

/// Arguments: service id, or 0 to withdraw. Returns 1 if a spawn was pending before, else 0; 2 on failure.
///
/// Run by the spawner in its own context, so the thread id is right in any pid namespace.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp")]
fn zinit_spawn(ctx: *mut c_void) -> u32 {
    let ctx = RawTracePointContext::new(ctx);
    let service: u64 = ctx.arg(0);
    let tid = ctx.pid();
    let pending = books::disarm(tid);
    if service != 0 {
        let spawn = Spawn {
            service: service as u32,
            _pad: 0,
            // SAFETY: a helper without arguments.
            armed_boottime_ns: unsafe { bpf_ktime_get_boot_ns() },
        };
        let Some(control) = books::CONTROL.get_ptr_mut(0) else {
            return 2;
        };
        // SAFETY: a map value. Counted before the insert, as members are.
        unsafe { books::add(&raw mut (*control).armed, 1) };
        if books::SPAWNS.insert(tid, spawn, u64::from(BPF_NOEXIST)).is_err() {
            // SAFETY: as above.
            unsafe { books::subtract(&raw mut (*control).armed, 1) };
            return 2;
        }
    }
    u32::from(pending)
}

/// Arguments: service id, then the fields of [`StateChange`]. Returns 1 if the service exists, else 0.
///
/// Only what is to change is written, so that counters which the hooks move at the same time stay exact.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp")]
fn zinit_state(ctx: *mut c_void) -> u32 {
    let ctx = RawTracePointContext::new(ctx);
    let service: u64 = ctx.arg(0);
    let change = StateChange {
        state: ctx.arg(1),
        set_flags: ctx.arg(2),
        lost: ctx.arg(3),
        adopting: ctx.arg(4),
    };
    u32::from(books::change(service as u32, change))
}

/// Arguments: tgid, start_boottime_ns, 1 if the process is dead. Returns 1 if it was a member, else 0.
#[unsafe(no_mangle)]
#[unsafe(link_section = "raw_tp")]
fn zinit_release(ctx: *mut c_void) -> u32 {
    let ctx = RawTracePointContext::new(ctx);
    let tgid: u64 = ctx.arg(0);
    let key = Key {
        tgid: tgid as u32,
        start_boottime_ns: ctx.arg(1),
    };
    let dead: u64 = ctx.arg(2);
    u32::from(books::release(key, dead != 0))
}

/// The context of an `iter/task` program: `meta`, then `task`, both pointers.
#[inline(always)]
pub fn iterated(ctx: *mut c_void) -> Option<(u64, Task)> {
    let ctx = ctx.cast::<u64>();
    // SAFETY: the context has two pointers.
    let (meta, task) = unsafe { (core::ptr::read_volatile(ctx), core::ptr::read_volatile(ctx.add(1))) };
    if task == 0 {
        return None;
    }
    // SAFETY: checked for null; the iterator holds a reference.
    Some((meta, unsafe { Task::new(task) }))
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
fn zinit_tasks(ctx: *mut c_void) -> i32 {
    let Some((meta, task)) = iterated(ctx) else {
        return 0;
    };
    if task.tid() != task.tgid() {
        return 0;
    }
    // One whose exit no hook saw, and which nobody has reaped yet: whoever lists shall not take it for a living member.
    // Dead, not dying: the exit hook of one that is dying may be yet to come, and so may its exit status.
    let (key, signal, numbers) = (task.key(), task.signal(), task.pid());
    let dead = task.is_dead(signal);
    if dead && books::died(task, key, signal) {
        count!(healed);
    }
    let level = numbers.level();
    let (_, pid_namespace) = numbers.number_at(level);
    let (pid, _) = numbers.number_at(Task::current_level());
    let record = zinit_ebpf::Task {
        start_boottime_ns: key.start_boottime_ns,
        tgid: key.tgid,
        pid,
        parent_tgid: task.real_parent().tgid(),
        session: signal.session(),
        group: signal.group(),
        live_threads: signal.live_threads(),
        pid_namespace,
        pid_namespace_level: level,
        dead: u32::from(dead),
        _pad: 0,
        comm: task.comm(),
    };
    write(meta, &record);
    0
}

/// Gives a record to the reader. If its buffer is full, the kernel runs the program again for the same task.
#[inline(always)]
fn write<T>(meta: u64, record: &T) {
    // SAFETY: `meta` starts with the `struct seq_file *`, which outlives this run of the program.
    let seq = unsafe { core::ptr::read_volatile(meta as *const u64) };
    // SAFETY: a record is plain initialised memory of that size.
    unsafe {
        bpf_seq_write(
            seq as *mut _,
            core::ptr::from_ref(record).cast_mut().cast(),
            size_of::<T>() as u32,
        )
    };
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
fn zinit_adopt(ctx: *mut c_void) -> i32 {
    let Some((meta, task)) = iterated(ctx) else {
        return 0;
    };
    if task.tid() != task.tgid() {
        return 0;
    }
    let signal = task.signal();
    if signal.live_threads() == 0 {
        return 0;
    }
    let key = task.key();
    if books::service_of(key).is_some() {
        return 0;
    }
    let entered = if let Some(entry) = books::earlier(key) {
        books::take_over(entry, key)
    } else {
        let parent = task.real_parent().key();
        let Some(service) = requested(key).or_else(|| adopting(parent)) else {
            return 0;
        };
        books::join(service, task, key, parent, process_flag::ADOPTED, event_kind::ADOPT).is_some()
    };
    if entered {
        // One byte for each: the reader repeats the pass until nothing is written.
        write(meta, &1_u8);
    }
    // The process may have died since `live_threads` was read, before it had an entry that its exit could delete. An
    // exit that begins after the insert finds the entry.
    if signal.live_threads() == 0 {
        books::died(task, key, signal);
    }
    0
}

/// The service that asked for exactly this process.
#[inline(always)]
fn requested(key: Key) -> Option<u32> {
    // SAFETY: read before any map operation.
    let adoption = unsafe { books::ADOPTIONS.get(key.tgid) }?;
    (adoption.start_boottime_ns == key.start_boottime_ns).then_some(adoption.service)
}

/// The service of the parent, if that joined in an adoption which is under way.
///
/// Members that joined earlier do not count: their children are members already, or were released.
#[inline(always)]
fn adopting(parent: Key) -> Option<u32> {
    // SAFETY: read before any map operation.
    let entry = unsafe { books::PROCESSES.get(parent.tgid) }?;
    let (service, start, joined) = (entry.service, entry.start_boottime_ns, entry.joined_boottime_ns);
    if start != parent.start_boottime_ns {
        return None;
    }
    // SAFETY: as above.
    let since = unsafe { books::SERVICES.get(service) }?.adopting_boottime_ns;
    (since != 0 && joined >= since).then_some(service)
}
