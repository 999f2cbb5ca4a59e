//! What `/proc` tells of why a process does not end.
//!
//! Everything is read while the process may end: what cannot be read is absent, not an error. The meaning of it all is
//! [`stop`](mod@crate::stop)'s business.

use std::{io::Read as _, os::unix::fs::MetadataExt as _};

use procfs::{
    FromRead as _,
    process::{Process, Stat},
};

use super::{
    freezer::{Frozen, frozen_here},
    stat::StartClock,
};

/// How many other threads of a process are looked at.
const MOST_THREADS: usize = 8;
/// How many frames of a kernel stack are kept.
const MOST_FRAMES: usize = 8;
/// `PF_EXITING` of linux/sched.h: the thread is on its way out.
const PF_EXITING: u32 = 0x4;
/// SIGKILL in a signal set of `/proc/PID/status`.
const SIGKILL: u64 = 1 << (libc::SIGKILL - 1);

/// The condition of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Its main thread.
    pub main: Thread,
    /// How many other threads are left, read only if the main thread has exited.
    pub others: usize,
    /// The first few of those.
    pub threads: Vec<Thread>,
    /// Inode number of its user namespace, if it is not the caller's.
    pub other_user_namespace: Option<u64>,
}

/// The condition of a thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Its thread id in the caller's pid namespace; the main thread's is the pid.
    pub tid: u32,
    /// Its name.
    pub comm: String,
    /// The state letter of `/proc/PID/stat`.
    pub state: char,
    /// Whether it is on its way out.
    pub exiting: bool,
    /// Whether a SIGKILL has been sent that it has not acted on.
    pub kill_pending: bool,
    /// The kernel function in which it waits, where it is readable.
    pub wchan: Option<String>,
    /// Kernel functions that it is in, innermost first. Takes `CAP_SYS_ADMIN`; empty where it is not readable.
    pub stack: Vec<String>,
    /// The thread that traces it.
    pub tracer: Option<Related>,
    /// What freezes it.
    pub frozen: Option<Frozen>,
    /// The newest living child, if it is the thread's vfork that waits.
    pub newest_child: Option<Related>,
}

/// Another process that has to do with one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Related {
    /// Its pid in the caller's pid namespace; 0 if that does not show it. Of a tracer, the id of the thread that traces.
    pub pid: u32,
    /// Its name, if it was still there to tell.
    pub comm: Option<String>,
}

impl Thread {
    /// Whether it has exited, and only waits for being reaped.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }

    /// Whether it waits until a child that it created by vfork executes a program or exits.
    #[must_use]
    pub fn waits_for_vfork(&self) -> bool {
        self.state == 'D' && waits_in_fork(self.wchan.as_deref(), &self.stack)
    }
}

/// Reads the condition of exactly the process that has this pid and started then. `None`: it is gone or hidden.
///
/// The directory in `/proc` stays that of the process it was opened for, whatever becomes of the pid.
#[must_use]
pub(crate) fn condition(pid: u32, start_boottime_ns: u64, clock: StartClock) -> Option<Condition> {
    let process = Process::new(i32::try_from(pid).ok()?).ok()?;
    let is_it = || {
        clock
            .shows(process.stat().ok()?.starttime, start_boottime_ns)
            .then_some(())
    };
    is_it()?;
    let directory = Directory(&process);
    let main = directory.thread(pid)?;
    let (others, threads) = if main.is_dead() {
        directory.other_threads(pid)
    } else {
        (0, Vec::new())
    };
    let other_user_namespace = directory.other_user_namespace(pid);
    // If it ended meanwhile, what was read is half of what it was and half of nothing.
    is_it()?;
    Some(Condition {
        main,
        others,
        threads,
        other_user_namespace,
    })
}

/// The directory of a process in `/proc`.
struct Directory<'a>(&'a Process);

impl Directory<'_> {
    /// A file of a thread's directory, whatever bytes it has.
    fn read(&self, tid: u32, file: &str) -> Option<String> {
        let mut bytes = Vec::new();
        let mut file = self.0.open_relative(format!("task/{tid}/{file}")).ok()?;
        file.read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn thread(&self, tid: u32) -> Option<Thread> {
        let stat = Stat::from_read(self.read(tid, "stat")?.as_bytes()).ok()?;
        let status = self.read(tid, "status").unwrap_or_default();
        let wchan = self.read(tid, "wchan").filter(|name| !name.is_empty() && name != "0");
        let stack = self.read(tid, "stack").map_or_else(Vec::new, |text| frames(&text));
        let newest_child = match waits_in_fork(wchan.as_deref(), &stack) {
            true => self.newest_child(tid),
            false => None,
        };
        Some(Thread {
            tid,
            comm: stat.comm,
            state: stat.state,
            exiting: stat.flags & PF_EXITING != 0,
            kill_pending: has_pending_kill(&status),
            wchan,
            stack,
            tracer: self.tracer(tid, &status),
            frozen: self.read(tid, "cgroup").and_then(|cgroups| frozen_here(&cgroups)),
            newest_child,
        })
    }

    /// How many threads there are beside the main one, and the first few of them.
    fn other_threads(&self, pid: u32) -> (usize, Vec<Thread>) {
        let Ok(tasks) = self.0.tasks() else {
            return (0, Vec::new());
        };
        let tids = tasks.filter_map(|task| u32::try_from(task.ok()?.tid).ok());
        let tids: Vec<_> = tids.filter(|tid| *tid != pid).collect();
        let threads = tids.iter().filter_map(|tid| self.thread(*tid)).take(MOST_THREADS);
        (tids.len(), threads.collect())
    }

    /// Who traces the thread. A tracer detaches when it ends, so one that still traces is the one whose name was read.
    fn tracer(&self, tid: u32, status: &str) -> Option<Related> {
        let pid = tracer_pid(status).filter(|pid| *pid != 0)?;
        let comm = comm(pid);
        let still = tracer_pid(&self.read(tid, "status")?) == Some(pid);
        still.then_some(Related { pid, comm })
    }

    /// The child of a thread that was created last, among those that live; `CONFIG_PROC_CHILDREN` must be there.
    ///
    /// A thread that waits for its vfork creates no other.
    fn newest_child(&self, tid: u32) -> Option<Related> {
        let children = self.read(tid, "children")?;
        let children = children.split_whitespace().filter_map(|pid| {
            let stat = Process::new(pid.parse().ok()?).ok()?.stat().ok()?;
            (stat.ppid == self.0.pid() && !matches!(stat.state, 'Z' | 'X')).then_some(stat)
        });
        // Of children that started in the same tick the kernel lists the newest last, and so does this take it.
        let newest = children.max_by_key(|stat| stat.starttime)?;
        Some(Related {
            pid: u32::try_from(newest.pid).ok()?,
            comm: Some(newest.comm),
        })
    }

    /// The process's user namespace, if it is not the caller's.
    fn other_user_namespace(&self, pid: u32) -> Option<u64> {
        let inode = |path: &str| std::fs::metadata(path).ok().map(|namespace| namespace.ino());
        let own = inode("/proc/self/ns/user")?;
        // Not through the directory: such a link is followed by path only. The start time is compared afterwards.
        inode(&format!("/proc/{pid}/ns/user")).filter(|namespace| *namespace != own)
    }
}

fn comm(pid: u32) -> Option<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_owned())
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.strip_prefix(':')?.trim())
}

fn tracer_pid(status: &str) -> Option<u32> {
    field(status, "TracerPid")?.parse().ok()
}

/// Whether SIGKILL is pending for the thread. Only its own set counts: the process's keeps what was acted on.
fn has_pending_kill(status: &str) -> bool {
    let pending = field(status, "SigPnd").and_then(|set| u64::from_str_radix(set, 16).ok());
    pending.is_some_and(|set| set & SIGKILL != 0)
}

/// The names of the functions on a kernel stack (proc_pid_stack(5)), innermost first.
fn frames(stack: &str) -> Vec<String> {
    let name = |line: &str| {
        let symbol = line.split_whitespace().nth(1)?;
        Some(symbol.split('+').next()?.to_owned())
    };
    stack.lines().filter_map(name).take(MOST_FRAMES).collect()
}

/// Whether a thread with this stack waits in the function that creates processes, under the names it has had since 5.10.
fn waits_in_fork(wchan: Option<&str>, stack: &[String]) -> bool {
    let innermost = stack.first().map(String::as_str);
    wchan
        .into_iter()
        .chain(innermost)
        .any(|function| matches!(function, "kernel_clone" | "wait_for_vfork_done" | "_do_fork"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tTracerPid:\nState:\tS (sleeping)\nTracerPid:\t4711\nSigPnd:\t0000000000000100\n";

    #[test]
    fn tracer_and_pending_kill_are_read_from_status() {
        assert_eq!(tracer_pid(STATUS), Some(4711));
        assert!(has_pending_kill(STATUS));
        assert!(!has_pending_kill(
            "SigPnd:\t0000000000004000\nShdPnd:\t0000000000000100\n"
        ));
        assert!(!has_pending_kill(""));
    }

    #[test]
    fn a_stack_is_read_as_names() {
        let stack = "[<0>] request_wait_answer+0x8e/0x220 [fuse]\n[<0>] fuse_lookup+0x1/0x2\n";
        assert_eq!(frames(stack), ["request_wait_answer", "fuse_lookup"]);
        assert!(frames("").is_empty());
    }

    #[test]
    fn a_wait_for_a_vfork_is_told_by_either_source() {
        let stack = |name: &str| vec![name.to_owned()];
        assert!(waits_in_fork(Some("kernel_clone"), &[]));
        assert!(waits_in_fork(None, &stack("wait_for_vfork_done")));
        assert!(!waits_in_fork(Some("__refrigerator"), &stack("__refrigerator")));
        assert!(!waits_in_fork(None, &[]));
    }

    #[test]
    fn a_process_that_started_at_another_time_has_no_condition() {
        let pid = std::process::id();
        let ticks = Process::myself().unwrap().stat().unwrap().starttime;
        let start = ticks * 10_000_000;
        let clock = StartClock::calibrate(pid, start).unwrap();
        assert_eq!(condition(pid, start, clock).unwrap().main.tid, pid);
        assert_eq!(condition(pid, start + 10_000_000, clock), None);
        assert_eq!(condition(0, start, clock), None);
    }
}
