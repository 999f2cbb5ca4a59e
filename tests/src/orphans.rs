//! Reaping what would go to pid 1.
//!
//! Tens of thousands of dead processes that pid 1 is slow to reap use up the machine's pids, and each makes the next look at
//! pid 1's children slower, under a lock that every fork and exit needs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid},
    unistd::Pid,
};
use tokio::signal::unix::{SignalKind, signal};

/// From now on orphans are given to this process, and every child of it is reaped as soon as it is dead: whoever waits for
/// one may be told that there is none.
///
/// # Panics
///
/// When the kernel refuses.
pub fn reap_all() {
    nix::sys::prctl::set_child_subreaper(true).expect("a process may become a subreaper");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be built");
    std::thread::spawn(move || {
        go_first();
        runtime.block_on(async {
            let mut deaths = signal(SignalKind::child()).expect("a signal can be waited for");
            loop {
                while reaped_one() {}
                deaths.recv().await;
            }
        });
    });
}

/// Reaps the children in a process group, as soon as they are dead, until this is dropped.
#[derive(Debug)]
pub struct GroupReaper {
    enough: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl GroupReaper {
    /// Begins.
    #[must_use]
    pub fn new(group: Pid) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&enough);
        let thread = std::thread::spawn(move || {
            go_first();
            loop {
                match waitid(Id::PGid(group), WaitPidFlag::WEXITED) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(Errno::ECHILD) if until.load(Ordering::Relaxed) => break,
                    // The next orphan may be given to this process in a moment, and nothing announces it.
                    Err(Errno::ECHILD) => std::thread::sleep(Duration::from_millis(1)),
                    Err(error) => panic!("failed to wait for the group {group}: {error}"),
                }
            }
        });
        Self {
            enough,
            thread: Some(thread),
        }
    }
}

impl Drop for GroupReaper {
    fn drop(&mut self) {
        self.enough.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("a reaper has panicked");
        }
    }
}

/// A scheduler that runs the newborn first leaves others next to nothing of a machine on which many are born.
fn go_first() {
    // SAFETY: 0 means the calling thread.
    let raised = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    assert_eq!(raised, 0, "root may raise a priority");
}

fn reaped_one() -> bool {
    match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
        Ok(status) => status != WaitStatus::StillAlive,
        Err(Errno::EINTR) => true,
        Err(Errno::ECHILD) => false,
        Err(error) => panic!("failed to reap: {error}"),
    }
}
