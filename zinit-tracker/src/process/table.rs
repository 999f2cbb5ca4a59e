//! `/proc` as a table of processes, and the few other files of a process that tell where it comes from.
//!
//! One read is one moment: two reads of a pid may meet two processes. Who needs both to be of one process keeps a pidfd
//! open over them and asks afterwards whether that is dead.

use std::{
    fs::{self, File},
    io::{self, Read as _},
};

use procfs::{FromRead as _, ProcError, process::Stat};

use super::{ProcessKey, stat::TICK_NS};

/// `PF_KTHREAD` of linux/sched.h.
const KERNEL_THREAD: u32 = 0x0020_0000;

/// What `/proc/PID/stat` says (proc_pid_stat(5)).
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// Its pid in the namespace of `/proc`, and its start to the tick of 10 ms, as `/proc` shows it.
    pub key: ProcessKey,
    pub parent: u32,
    pub session: u32,
    pub group: u32,
    /// Every thread has exited; only the wait status is left.
    pub dead: bool,
    pub kernel_thread: bool,
    pub threads: u32,
    /// Wait status of a dead process; 0 if the caller may not know it.
    pub status: u32,
    pub comm: String,
}

impl Row {
    /// The process that has this pid now; `None`: there is none, or `/proc` hides it.
    pub(crate) fn read(pid: u32) -> io::Result<Option<Self>> {
        let stat = match Stat::from_file(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat,
            Err(ProcError::NotFound(_) | ProcError::PermissionDenied(_)) => return Ok(None),
            Err(ProcError::Io(error, _)) => return absent(Err(error)),
            Err(error) => return Err(io::Error::other(error)),
        };
        let threads = u32::try_from(stat.num_threads).unwrap_or(0);
        Ok(Some(Self {
            key: ProcessKey {
                tgid: pid,
                start_boottime_ns: stat.starttime.saturating_mul(TICK_NS),
            },
            parent: u32::try_from(stat.ppid).unwrap_or(0),
            session: u32::try_from(stat.session).unwrap_or(0),
            group: u32::try_from(stat.pgrp).unwrap_or(0),
            // A leader that has exited is a zombie while its other threads live.
            dead: matches!(stat.state, 'Z' | 'X') && threads <= 1,
            kernel_thread: stat.flags & KERNEL_THREAD != 0,
            threads,
            status: stat.exit_code.unwrap_or(0).cast_unsigned(),
            comm: stat.comm,
        }))
    }
}

/// Every process that `/proc` shows, one after the other, so not of one moment.
pub(crate) fn rows() -> io::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        rows.extend(Row::read(pid)?);
    }
    Ok(rows)
}

/// The variables that the process was started with, each followed by a zero; `None`: it is gone, or not the caller's to
/// read. Empty while it executes a program or exits, and for a program that has overwritten them.
pub(crate) fn environment(pid: u32) -> io::Result<Option<Vec<u8>>> {
    const MOST_AT_ONCE: usize = 128 * 1024;
    let mut bytes = vec![0; MOST_AT_ONCE];
    let read = |bytes: &mut Vec<u8>| {
        let mut file = File::open(format!("/proc/{pid}/environ"))?;
        // One read as a rule: of a program that is replaced between two, the second finds nothing.
        let length = file.read(bytes)?;
        let whole = length < bytes.len();
        bytes.truncate(length);
        if !whole {
            file.read_to_end(bytes)?;
        }
        Ok(())
    };
    let result = read(&mut bytes);
    Ok(absent(result.map(Some))?.map(|()| bytes))
}

/// The cgroup of the process in the version 2 hierarchy, as seen from the caller's cgroup namespace.
pub(crate) fn cgroup(pid: u32) -> io::Result<Option<String>> {
    let text = absent(fs::read_to_string(format!("/proc/{pid}/cgroup")).map(Some))?;
    Ok(text.and_then(|text| cgroup_v2(&text).map(ToOwned::to_owned)))
}

fn cgroup_v2(text: &str) -> Option<&str> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(path.strip_suffix(" (deleted)").unwrap_or(path))
}

/// The pid that was given out last in the caller's pid namespace: it changes with every new process and thread.
pub(crate) fn last_pid() -> io::Result<u32> {
    let load = fs::read_to_string("/proc/loadavg")?;
    let last = load.split_whitespace().last().and_then(|pid| pid.parse().ok());
    last.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// The user that the process acts as; `None`: it is gone, or hidden.
pub(crate) fn user(pid: u32) -> Option<u32> {
    use std::os::unix::fs::MetadataExt as _;
    Some(fs::metadata(format!("/proc/{pid}")).ok()?.uid())
}

/// A process that is gone or hidden is no error; that the caller has run out of descriptors is one.
fn absent<T>(result: io::Result<Option<T>>) -> io::Result<Option<T>> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ESRCH | libc::EACCES | libc::EPERM)
            ) =>
        {
            Ok(None)
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_in_the_table_with_its_parent_and_session() {
        let me = Row::read(std::process::id()).unwrap().unwrap();
        assert_eq!(me.parent, std::os::unix::process::parent_id());
        assert!(!me.dead && !me.kernel_thread);
        assert!(rows().unwrap().iter().any(|row| row.key == me.key));
    }

    #[test]
    fn a_pid_that_nobody_has_is_no_error() {
        assert!(Row::read(u32::MAX).unwrap().is_none());
        assert_eq!(environment(u32::MAX).unwrap(), None);
        assert_eq!(cgroup(u32::MAX).unwrap(), None);
    }

    #[test]
    fn the_environment_is_read_whole() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .env_clear()
            .env("SMALL", "1")
            .env("LARGE", "x".repeat(100_000))
            .env("LARGE_TOO", "y".repeat(100_000))
            .spawn()
            .unwrap();
        let bytes = environment(child.id()).unwrap().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(bytes.split(|byte| *byte == 0).any(|entry| entry == b"SMALL=1"));
        assert!(bytes.len() > 200_000, "{}", bytes.len());
    }

    #[test]
    fn the_cgroup_of_version_two_is_found_beside_others() {
        let text = "8:pids:/a\n1:name=systemd:/b\n0::/c/d (deleted)\n";
        assert_eq!(cgroup_v2(text), Some("/c/d"));
        assert_eq!(cgroup_v2("8:pids:/a\n"), None);
    }
}
