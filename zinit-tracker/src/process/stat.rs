//! `/proc/PID/stat` (proc_pid_stat(5)).

use procfs::process::Process;

/// Length of a clock tick as `/proc` counts it (`USER_HZ`, 100 a second on every architecture that Linux runs BPF on).
pub(super) const TICK_NS: u64 = 10_000_000;

/// Translates between `/proc`'s start times and the kernel's exact ones.
///
/// `/proc` shows a start time in ticks, and newer kernels shift it by the reader's time namespace (time_namespaces(7)).
#[derive(Clone, Copy, Debug)]
pub struct StartClock {
    shift_ns: i64,
}

impl StartClock {
    /// Learns the shift from one process whose exact start is known: the caller itself.
    ///
    /// `None`: `/proc` does not show the caller.
    #[must_use]
    pub fn calibrate(pid: u32, start_boottime_ns: u64) -> Option<Self> {
        let shown = start_ticks(pid)?;
        [0, boottime_offset_ns().unwrap_or(0)]
            .into_iter()
            .map(|shift_ns| Self { shift_ns })
            .find(|clock| clock.ticks(start_boottime_ns) == shown)
    }

    fn ticks(self, start_boottime_ns: u64) -> u64 {
        start_boottime_ns.wrapping_add_signed(self.shift_ns) / TICK_NS
    }

    /// Whether this start time, in ticks of `/proc`, may be that one.
    pub(super) fn shows(self, ticks: u64, start_boottime_ns: u64) -> bool {
        ticks == self.ticks(start_boottime_ns)
    }

    /// Whether the process that has this pid now may be the one that started then, to the tick. `false`: it is another
    /// one, or there is none.
    ///
    /// # Errors
    ///
    /// When `/proc` cannot be read, say for want of a file descriptor; that says nothing about the process.
    pub fn matches(self, pid: u32, start_boottime_ns: u64) -> std::io::Result<bool> {
        match read_start_ticks(pid) {
            Ok(ticks) => Ok(self.shows(ticks, start_boottime_ns)),
            Err(procfs::ProcError::NotFound(_)) => Ok(false),
            Err(procfs::ProcError::Io(error, _)) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
            Err(procfs::ProcError::Io(error, _)) => Err(error),
            Err(error) => Err(std::io::Error::other(error)),
        }
    }
}

/// For processes that are known by what `/proc` shows: nothing is shifted.
impl Default for StartClock {
    fn default() -> Self {
        Self { shift_ns: 0 }
    }
}

/// `CLOCK_BOOTTIME` of the initial time namespace, in nanoseconds.
pub(crate) fn boottime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let shown = now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs();
    shown.wrapping_add_signed(-boottime_offset_ns().unwrap_or(0))
}

/// Whether the caller is in the pid namespace that the machine booted with (`PROC_PID_INIT_INO`).
pub(crate) fn is_initial_pid_namespace() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    const INITIAL: u64 = 0xefff_fffc;
    std::fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == INITIAL)
}

/// Whether `/proc` is mounted so that it may not show a process that exists (`hidepid`, `subset`; proc(5)).
pub(crate) fn proc_may_hide() -> bool {
    let Ok(mounts) = Process::myself().and_then(|process| process.mountinfo()) else {
        return true;
    };
    let restricts = |name: &str| matches!(name, "hidepid" | "subset");
    mounts
        .into_iter()
        .filter(|mount| mount.mount_point == std::path::Path::new("/proc") && mount.fs_type == "proc")
        .any(|mount| mount.super_options.keys().any(|name| restricts(name)))
}

/// How far the caller's time namespace shifts `CLOCK_BOOTTIME`; `None` before 5.5.
fn boottime_offset_ns() -> Option<i64> {
    let offsets = std::fs::read_to_string("/proc/self/timens_offsets").ok()?;
    offset_of_boottime(&offsets)
}

fn offset_of_boottime(offsets: &str) -> Option<i64> {
    let line = offsets.lines().find(|line| line.starts_with("boottime"))?;
    let mut fields = line.split_whitespace().skip(1);
    let seconds: i64 = fields.next()?.parse().ok()?;
    let nanoseconds: i64 = fields.next()?.parse().ok()?;
    Some(seconds * 1_000_000_000 + nanoseconds)
}

fn start_ticks(pid: u32) -> Option<u64> {
    read_start_ticks(pid).ok()
}

fn read_start_ticks(pid: u32) -> procfs::ProcResult<u64> {
    let pid = i32::try_from(pid).map_err(|_| procfs::ProcError::NotFound(None))?;
    Ok(Process::new(pid)?.stat()?.starttime)
}

/// Whether a process that was created to execute a program has done so; also where `/proc` does not say.
pub(super) fn has_executed(pid: u32) -> bool {
    /// `PF_FORKNOEXEC` of linux/sched.h: cleared by an execution before it closes any descriptor.
    const FORKED_ONLY: u32 = 0x40;
    let stat = i32::try_from(pid)
        .ok()
        .and_then(|pid| Process::new(pid).ok()?.stat().ok());
    stat.is_none_or(|stat| stat.flags & FORKED_ONLY == 0)
}

/// A process as `/proc` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its pid.
    pub pid: u32,
    /// Its session.
    pub session: u32,
    /// Its process group.
    pub group: u32,
    /// Command name.
    pub comm: String,
}

/// Every living process that `/proc` shows; those that end meanwhile are left out.
#[must_use]
pub fn all() -> Vec<Listed> {
    let Ok(processes) = procfs::process::all_processes() else {
        return Vec::new();
    };
    processes
        .filter_map(|process| process.ok()?.stat().ok())
        .filter(|stat| !matches!(stat.state, 'Z' | 'X'))
        .filter_map(|stat| {
            Some(Listed {
                pid: u32::try_from(stat.pid).ok()?,
                session: u32::try_from(stat.session).ok()?,
                group: u32::try_from(stat.pgrp).ok()?,
                comm: stat.comm,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_of_a_time_namespace_is_read() {
        let offsets = "monotonic           0         0\nboottime        86400  500000000\n";
        assert_eq!(offset_of_boottime(offsets), Some(86_400_500_000_000));
        assert_eq!(offset_of_boottime("boottime -5 0"), Some(-5_000_000_000));
        assert_eq!(offset_of_boottime(""), None);
    }

    #[test]
    fn a_shift_that_is_no_whole_tick_is_applied_before_rounding() {
        let clock = StartClock { shift_ns: 5_000_000 };
        assert_eq!(clock.ticks(14_999_999), 1);
        assert_eq!(clock.ticks(15_000_000), 2);
    }
}
