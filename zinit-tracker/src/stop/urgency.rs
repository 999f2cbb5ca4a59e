//! Running ahead of everybody else for a moment.
//!
//! The scheduler runs the newborn first: beside two hundred processes that fork for ever, a thread of ordinary priority has
//! waited seconds for its turn, with the gate that would have ended it half closed.

use rustix::process::{getpriority_process, setpriority_process};

/// Nice values go from here to 19; 0 is the usual one.
const FIRST: i32 = -20;

/// Does the work at the highest ordinary priority, if this thread may have it, which then is as before. Not for work that
/// creates processes, which would inherit it.
pub(super) fn urgently<R>(work: impl FnOnce() -> R) -> R {
    // Of processes, the kernel takes 0 for the calling thread.
    let before = getpriority_process(None).ok();
    let Some(before) = before.filter(|_| setpriority_process(None, FIRST).is_ok()) else {
        return work();
    };
    let _restored = Restored(before);
    work()
}

/// Also if the work panics.
struct Restored(i32);

impl Drop for Restored {
    fn drop(&mut self) {
        if let Err(error) = setpriority_process(None, self.0) {
            tracing::warn!(%error, "the priority of a thread stays raised");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_priority_is_as_before() {
        let before = getpriority_process(None).unwrap();
        urgently(|| ());
        assert_eq!(getpriority_process(None).unwrap(), before);
        let panicked = std::panic::catch_unwind(|| urgently(|| panic!("on purpose")));
        assert!(panicked.is_err());
        assert_eq!(getpriority_process(None).unwrap(), before);
    }
}
