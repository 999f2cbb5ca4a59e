//! Dead children that nobody has waited for (waitid(2)).

use std::{io, mem::MaybeUninit};

/// A dead child of this process, which stays as it is. `None`: there is none now.
pub(crate) fn peek() -> io::Result<Option<u32>> {
    wait(libc::P_ALL, 0, libc::WNOWAIT)
}

/// Takes away a dead child. Returns whether it was there.
pub(crate) fn reap(pid: u32) -> io::Result<bool> {
    Ok(wait(libc::P_PID, pid, 0)?.is_some())
}

fn wait(kind: libc::idtype_t, pid: u32, options: libc::c_int) -> io::Result<Option<u32>> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = options | libc::WEXITED | libc::WNOHANG;
    // SAFETY: the kernel writes a siginfo_t, or nothing, to where one has room.
    let result = unsafe { libc::waitid(kind, pid, info.as_mut_ptr(), options) };
    if result < 0 {
        let error = io::Error::last_os_error();
        // There is no such child, or none at all.
        return if error.raw_os_error() == Some(libc::ECHILD) {
            Ok(None)
        } else {
            Err(error)
        };
    }
    // SAFETY: all zeroes is a valid siginfo_t, and so is what the kernel writes.
    let info = unsafe { info.assume_init() };
    // SAFETY: waitid fills in si_pid, and leaves it 0 if no child is dead.
    let pid = unsafe { info.si_pid() };
    Ok(u32::try_from(pid).ok().filter(|pid| *pid != 0))
}
