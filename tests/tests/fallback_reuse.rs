//! Pids that come to mean another process at level `procfs`, within the same clock tick if need be: neither is the stranger hit,
//! nor is somebody else's child reaped. A file of its own: it reaps what no other test may lose.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    os::fd::{AsFd as _, FromRawFd as _, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use rustix::process::{WaitIdOptions, WaitIdStatus, WaitOptions};
use zinit_tests::{
    sandbox::{DEADLINE, Sandbox},
    survivors,
};
use zinit_tracker::{StopPolicy, stop};

/// What a stranger ends with unless it is killed.
const UNHARMED: i32 = 7;

/// Creates a process with exactly this pid, which lives for a few milliseconds. `None`: the pid is not free.
fn impostor(pid: i32) -> Option<OwnedFd> {
    let mut pidfd: i32 = -1;
    // SAFETY: all zeros is a valid clone_args: no flags, the caller's stack, nothing to fill in.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from(libc::CLONE_PIDFD.unsigned_abs());
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    args.set_tid = (&raw const pid) as u64;
    args.set_tid_size = 1;
    // SAFETY: the arguments outlive the call; without CLONE_VM the child has memory of its own.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match result {
        0 => {
            let pause = libc::timespec {
                tv_sec: 0,
                tv_nsec: 5_000_000,
            };
            // SAFETY: system calls only, as the child of a process with threads must.
            unsafe { libc::nanosleep(&raw const pause, std::ptr::null_mut()) };
            // SAFETY: as above; no destructor of the parent's runs.
            unsafe { libc::_exit(UNHARMED) }
        }
        // SAFETY: the kernel has stored a descriptor that nobody else owns.
        child if child > 0 => Some(unsafe { OwnedFd::from_raw_fd(pidfd) }),
        _ => {
            let error = std::io::Error::last_os_error();
            assert_eq!(error.raw_os_error(), Some(libc::EEXIST), "{error}");
            None
        }
    }
}

/// Dead actors that were given to this process, other than the main one.
fn dead_orphans(main: u32) -> Vec<i32> {
    let me = std::process::id().to_string();
    let pids = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| u32::try_from(*pid) != Ok(main))
        .filter(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.contains(&format!("(actor) Z {me} "))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_with_a_members_pid_is_neither_hit_nor_reaped() {
    let sandbox = Sandbox::procfs();
    let mut strangers = 0;
    for _ in 0..5 {
        let mut played = sandbox.play("storm", ["60"]);
        let main = played.child.id().unwrap();
        let done = AtomicBool::new(false);
        let policy = StopPolicy {
            grace: Duration::from_millis(200),
            kill_timeout: DEADLINE,
            ..StopPolicy::default()
        };
        std::thread::scope(|scope| {
            let forger = scope.spawn(|| {
                let mut impostors = Vec::new();
                while !done.load(Ordering::Relaxed) && impostors.len() < 2000 {
                    for pid in dead_orphans(main) {
                        // ECHILD: the tracker was faster.
                        match rustix::process::waitpid(rustix::process::Pid::from_raw(pid), WaitOptions::NOHANG) {
                            Ok(_) | Err(rustix::io::Errno::CHILD) => impostors.extend(impostor(pid)),
                            Err(error) => panic!("failed to reap a process: {error}"),
                        }
                    }
                }
                impostors
            });
            let report = tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(stop(&sandbox.tracker, &played.service, &policy))
            });
            done.store(true, Ordering::Relaxed);
            let impostors = forger.join().unwrap();
            report.unwrap();
            strangers += impostors.len();
            for pidfd in &impostors {
                let id = rustix::process::WaitId::PidFd(pidfd.as_fd());
                let status: WaitIdStatus = rustix::process::waitid(id, WaitIdOptions::EXITED).unwrap().unwrap();
                assert_eq!(status.exit_status(), Some(UNHARMED), "a stranger was hit: {status:?}");
            }
        });
        assert_eq!(survivors(&played.marker), []);
        played.child.wait().await.unwrap();
        sandbox.tracker.unregister(&played.service).unwrap();
    }
    println!("{strangers} strangers took a member's pid during a stop, none was hit");
    assert!(
        strangers >= 10,
        "too few pids were reused to show anything: {strangers}"
    );
    sandbox.close();
}
