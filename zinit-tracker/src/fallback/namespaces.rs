//! Pid namespaces below the caller's, where an orphan is given to somebody else than this process.
//!
//! A process that has the rights can make its children be born in such a namespace (setns(2), pid_namespaces(7)). There its
//! orphans go to the namespace's init. They are killed when that one dies, cannot leave but for a namespace still further down,
//! and every `/proc` above shows them. So if nobody is seen in a namespace below, nobody has got away by one, whatever there was
//! before. Namespaces that the service makes itself need no other answer: their init is an orphan of the service like any other.

use std::{fs, io};

use crate::process::table;

/// Whether a living process is, or for all that `/proc` shows may be, in a pid namespace below the caller's.
///
/// To be asked after a look that found no process of the service: one that was elsewhere by then had an init, which lives as long
/// as it does and is found now.
pub(super) fn are_any_below() -> io::Result<bool> {
    for row in table::rows()? {
        if row.dead || row.kernel_thread {
            continue;
        }
        match fs::read_to_string(format!("/proc/{}/status", row.key.tgid)) {
            Ok(status) if is_below(&status) => return Ok(true),
            Ok(_) => {}
            Err(error) if is_gone(&error) => {}
            // Hidden from one moment to the next.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(true),
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Whether the process that has this pid now is the init of a pid namespace below the caller's.
pub(super) fn is_init_below(pid: u32) -> io::Result<bool> {
    match fs::read_to_string(format!("/proc/{pid}/status")) {
        Ok(status) => Ok(is_below(&status) && pids(&status).and_then(Iterator::last) == Some("1")),
        Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::PermissionDenied => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the process with this `/proc/PID/status` has a pid in more than the namespace of `/proc` (kernel 4.1). Without
/// the line the kernel has no pid namespaces.
fn is_below(status: &str) -> bool {
    pids(status).is_some_and(|pids| pids.count() > 1)
}

/// Its pids, from the namespace of `/proc` down to its own.
fn pids(status: &str) -> Option<impl Iterator<Item = &str>> {
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    Some(line.split_whitespace())
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_a_second_pid_is_in_a_namespace_below() {
        assert!(is_below("Name:\tsleep\nNSpid:\t4711\t1\nNSpgid:\t4711\t1\n"));
        assert!(!is_below("Name:\tsleep\nNSpid:\t4711\nNSpgid:\t4711\n"));
        assert!(!is_below("Name:\tsleep\n"));
    }
}
