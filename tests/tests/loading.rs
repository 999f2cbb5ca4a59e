//! Loading the programs while something gets in the way.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicU32, Ordering};

use nix::{
    errno::Errno,
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
};
use zinit_tests::sandbox::Sandbox;

static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// Has a signal sent to this process every tenth of a millisecond, until dropped.
struct Nuisance;

impl Nuisance {
    fn begin() -> Self {
        let action = SigAction::new(SigHandler::Handler(count), SaFlags::SA_RESTART, SigSet::empty());
        // SAFETY: the handler only adds to an atomic number.
        unsafe { sigaction(Signal::SIGALRM, &action) }.unwrap();
        Self::every(100);
        Self
    }

    fn every(microseconds: libc::suseconds_t) {
        let time = libc::timeval {
            tv_sec: 0,
            tv_usec: microseconds,
        };
        let timer = libc::itimerval {
            it_interval: time,
            it_value: time,
        };
        // SAFETY: the timer is a live value, and the earlier one is not asked for.
        Errno::result(unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) }).unwrap();
    }
}

impl Drop for Nuisance {
    fn drop(&mut self) {
        Self::every(0);
    }
}

/// The verifier gives up with EAGAIN when it sees a signal; where children die by the thousand, there always is one.
#[test]
fn signals_do_not_keep_the_programs_from_being_loaded() {
    let nuisance = Nuisance::begin();
    for _ in 0..5 {
        // Level `ebpf`: it does not fall back.
        Sandbox::new().close();
    }
    drop(nuisance);
    assert!(HANDLED.load(Ordering::Relaxed) > 0);
    let mask = SigSet::thread_get_mask().unwrap();
    assert_eq!(mask.iter().count(), 0, "the thread's mask is as it was");
}
