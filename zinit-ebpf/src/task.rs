//! Reads `task_struct` and what hangs on it.
//!
//! Rust emits no CO-RE relocations, so the loader finds the offsets in the running kernel's BTF and hands them over as
//! read-only globals. They are frozen before verification: the verifier knows their values and checks every load
//! against the kernel's types. A wrong offset is refused at load time, and no `bpf_probe_read_kernel` is needed.

use aya_ebpf::{Global, helpers::bpf_get_current_task_btf};
use zinit_ebpf::COMM_LEN;

macro_rules! offsets {
    ($($name:ident),+ $(,)?) => {
        $(
            #[unsafe(no_mangle)]
            static $name: Global<u64> = Global::new(0);
        )+
    };
}

offsets!(
    TASK_PID,
    TASK_TGID,
    TASK_START_BOOTTIME,
    TASK_GROUP_LEADER,
    TASK_REAL_PARENT,
    TASK_SIGNAL,
    TASK_THREAD_PID,
    TASK_EXIT_CODE,
    TASK_EXIT_STATE,
    TASK_COMM,
    SIGNAL_LIVE,
    SIGNAL_NR_THREADS,
    SIGNAL_FLAGS,
    SIGNAL_GROUP_EXIT_CODE,
    SIGNAL_PIDS,
    PID_LEVEL,
    PID_NUMBERS,
    UPID_SIZE,
    UPID_NR,
    UPID_NS,
    NAMESPACE_INUM,
    // 1 where `struct pid` ends in a flexible array, so that levels above 0 can be read; 0 before 6.5.
    PID_NUMBERS_FLEXIBLE,
    // 1 where `bpf_get_current_task_btf` exists; 0 before 5.11.
    HAS_TASK_BTF,
);

/// How deep below the initial pid namespace a registrant may live; deeper ones see `pid` 0.
const MAX_LEVEL: u32 = 7;
const PIDTYPE_PGID: u64 = 2;
const PIDTYPE_SID: u64 = 3;
const SIGNAL_GROUP_EXIT: u32 = 4;

/// Loads a field through a BTF pointer.
///
/// # Safety
///
/// `base` is a BTF pointer that the verifier trusts, and `offset` the offset of a field of type `T` in its structure.
/// The verifier refuses the program otherwise; a pointer that is null or stale at run time reads as 0.
#[inline(always)]
unsafe fn load<T>(base: u64, offset: u64) -> T {
    // SAFETY: the caller's promise; the load stays volatile so that it is emitted as one instruction of this width.
    unsafe { core::ptr::read_volatile((base + offset) as *const T) }
}

/// A task that the kernel handed to the program.
#[derive(Clone, Copy)]
pub struct Task(u64);

/// A process by its unique name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Key {
    pub tgid: u32,
    pub start_boottime_ns: u64,
}

impl Task {
    /// # Safety
    ///
    /// `pointer` is a `struct task_struct *` from the program's context or `bpf_get_current_task_btf`, and not null.
    #[inline(always)]
    pub unsafe fn new(pointer: u64) -> Self {
        Self(pointer)
    }

    /// The nesting level of the pid namespace of the task that runs the program; 0 where the kernel cannot tell.
    #[inline(always)]
    pub fn current_level() -> u32 {
        Self::current().map_or(0, |task| task.pid().level())
    }

    /// The task that runs the program; `None` where the kernel does not give it out.
    #[inline(always)]
    pub fn current() -> Option<Self> {
        if HAS_TASK_BTF.load() == 0 {
            return None;
        }
        // SAFETY: the running task, never null.
        Some(unsafe { Self::new(bpf_get_current_task_btf() as u64) })
    }

    #[inline(always)]
    pub fn tid(self) -> u32 {
        // SAFETY: `self.0` is a task by construction.
        unsafe { load(self.0, TASK_PID.load()) }
    }

    #[inline(always)]
    pub fn tgid(self) -> u32 {
        // SAFETY: as above.
        unsafe { load(self.0, TASK_TGID.load()) }
    }

    /// Start of this thread.
    #[inline(always)]
    pub fn start_boottime_ns(self) -> u64 {
        // SAFETY: as above.
        unsafe { load(self.0, TASK_START_BOOTTIME.load()) }
    }

    #[inline(always)]
    fn leader(self) -> Self {
        // SAFETY: as above.
        Self(unsafe { load(self.0, TASK_GROUP_LEADER.load()) })
    }

    #[inline(always)]
    pub fn real_parent(self) -> Self {
        // SAFETY: as above.
        Self(unsafe { load(self.0, TASK_REAL_PARENT.load()) })
    }

    /// The unique name of the process that this thread belongs to.
    #[inline(always)]
    pub fn key(self) -> Key {
        Key {
            tgid: self.tgid(),
            start_boottime_ns: self.leader().start_boottime_ns(),
        }
    }

    /// What the threads of the process share.
    #[inline(always)]
    pub fn signal(self) -> Signal {
        // SAFETY: as above.
        Signal(unsafe { load(self.0, TASK_SIGNAL.load()) })
    }

    /// The numbers of the thread; all of them read as 0 once it was reaped.
    #[inline(always)]
    pub fn pid(self) -> Pid {
        // SAFETY: as above.
        Pid(unsafe { load(self.0, TASK_THREAD_PID.load()) })
    }

    /// Whether the process has ended altogether, for its leader: what makes a pidfd readable (`exit_notify` has passed the
    /// leader, and no other thread is left).
    #[inline(always)]
    pub fn is_dead(self, signal: Signal) -> bool {
        // SAFETY: `self.0` is a task by construction.
        let exit_state: u32 = unsafe { load(self.0, TASK_EXIT_STATE.load()) };
        exit_state != 0 && signal.threads() <= 1
    }

    /// Wait status of a dead process.
    #[inline(always)]
    pub fn wait_status(self, signal: Signal) -> u32 {
        // SAFETY: as above.
        signal
            .group_exit_code()
            .unwrap_or_else(|| unsafe { load(self.leader().0, TASK_EXIT_CODE.load()) })
    }

    #[inline(always)]
    pub fn comm(self) -> [u8; COMM_LEN] {
        let offset = TASK_COMM.load();
        // SAFETY: `comm` has 16 bytes.
        let low: u64 = unsafe { load(self.0, offset) };
        // SAFETY: as above.
        let high: u64 = unsafe { load(self.0, offset + 8) };
        let mut comm = [0; COMM_LEN];
        comm[..8].copy_from_slice(&low.to_ne_bytes());
        comm[8..].copy_from_slice(&high.to_ne_bytes());
        comm
    }
}

/// What the threads of a process share (`struct signal_struct`). It outlives its tasks, also after reaping.
///
/// Programs ask for it once: the verifier looks at each load of a pointer for milliseconds (from 6.2 on it searches all of the
/// kernel's BTF for what the pointer may be trusted with), on every path that leads there.
#[derive(Clone, Copy)]
pub struct Signal(u64);

impl Signal {
    /// Threads of the process that have not begun to exit; 0: the process is dead.
    #[inline(always)]
    pub fn live_threads(self) -> u32 {
        // SAFETY: `self.0` is a signal structure by construction.
        unsafe { load(self.0, SIGNAL_LIVE.load()) }
    }

    #[inline(always)]
    fn threads(self) -> u32 {
        // SAFETY: as above.
        unsafe { load(self.0, SIGNAL_NR_THREADS.load()) }
    }

    /// The status with which all threads were told to exit, if they were.
    #[inline(always)]
    fn group_exit_code(self) -> Option<u32> {
        // SAFETY: as above.
        let flags: u32 = unsafe { load(self.0, SIGNAL_FLAGS.load()) };
        // SAFETY: as above.
        (flags & SIGNAL_GROUP_EXIT != 0).then(|| unsafe { load(self.0, SIGNAL_GROUP_EXIT_CODE.load()) })
    }

    #[inline(always)]
    fn related_pid(self, kind: u64) -> u32 {
        // SAFETY: `pids` has four elements.
        let pid: u64 = unsafe { load(self.0, SIGNAL_PIDS.load() + 8 * kind) };
        // SAFETY: every `struct pid` has a number at level 0.
        unsafe { load(pid, PID_NUMBERS.load() + UPID_NR.load()) }
    }

    #[inline(always)]
    pub fn session(self) -> u32 {
        self.related_pid(PIDTYPE_SID)
    }

    #[inline(always)]
    pub fn group(self) -> u32 {
        self.related_pid(PIDTYPE_PGID)
    }
}

/// The numbers of a thread (`struct pid`), or a null pointer. Asked for once, for the reason given at [`Signal`].
#[derive(Clone, Copy)]
pub struct Pid(u64);

impl Pid {
    /// The nesting level of the thread's own pid namespace.
    #[inline(always)]
    pub fn level(self) -> u32 {
        // SAFETY: `self.0` is a `struct pid` by construction, or null, which reads as 0.
        unsafe { load(self.0, PID_LEVEL.load()) }
    }

    /// The thread's number at `level` and the inode number of the pid namespace there.
    #[inline(always)]
    fn number(self, level: u32) -> (u32, u32) {
        let upid = PID_NUMBERS.load() + u64::from(level) * UPID_SIZE.load();
        // SAFETY: callers ask for levels up to that of the task only, and above 0 only where the array is flexible.
        let number: u32 = unsafe { load(self.0, upid + UPID_NR.load()) };
        // SAFETY: as above.
        let namespace: u64 = unsafe { load(self.0, upid + UPID_NS.load()) };
        // SAFETY: a pid holds a reference to its namespaces.
        let inum: u32 = unsafe { load(namespace, NAMESPACE_INUM.load()) };
        (number, inum)
    }

    /// The thread's number and namespace at a level that is known only at run time.
    ///
    /// The verifier takes constant offsets only, hence the comparison with each level.
    #[inline(always)]
    pub fn number_at(self, level: u32) -> (u32, u32) {
        if level == 0 {
            return self.number(0);
        }
        if PID_NUMBERS_FLEXIBLE.load() == 0 || level > self.level() {
            return (0, 0);
        }
        match level {
            1 => self.number(1),
            2 => self.number(2),
            3 => self.number(3),
            4 => self.number(4),
            5 => self.number(5),
            6 => self.number(6),
            MAX_LEVEL => self.number(7),
            _ => (0, 0),
        }
    }

    /// The process's pid as the given pid namespace shows it; 0 if it does not.
    #[inline(always)]
    pub fn in_namespace(self, level: u32, inum: u32) -> u32 {
        let (number, found) = self.number_at(level);
        if found == inum { number } else { 0 }
    }
}
