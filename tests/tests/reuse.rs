//! Pids that come to mean another process: the stop must not hit the stranger.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    os::fd::{FromRawFd as _, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use rustix::process::{WaitIdOptions, WaitIdStatus};
use zinit_tests::{
    sandbox::{DEADLINE, Sandbox},
    survivors,
};
use zinit_tracker::{StopPolicy, records::event_kind, stop};

/// What a stranger ends with unless it is killed.
const UNHARMED: i32 = 7;

/// `struct clone_args` of clone3(2), as of Linux 5.5.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
}

/// Creates a process with exactly this pid, which lives for a few milliseconds. `None`: the pid is not free.
fn impostor(pid: u32) -> Option<OwnedFd> {
    with_pid(pid, || {
        let pause = libc::timespec {
            tv_sec: 0,
            tv_nsec: 5_000_000,
        };
        // SAFETY: a system call.
        unsafe { libc::nanosleep(&raw const pause, std::ptr::null_mut()) };
    })
}

/// Creates a process with exactly this pid, which has a child and ends with it.
fn impostor_with_child(pid: u32) -> Option<OwnedFd> {
    with_pid(pid, || {
        // SAFETY: a system call without arguments.
        let child = unsafe { libc::syscall(libc::SYS_fork) };
        if child == 0 {
            // SAFETY: system calls only. It ends with its parent, and after two minutes.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let rest = libc::timespec {
                tv_sec: 120,
                tv_nsec: 0,
            };
            // SAFETY: as above.
            unsafe { libc::nanosleep(&raw const rest, std::ptr::null_mut()) };
        } else {
            let child = i32::try_from(child).unwrap_or(-1);
            // SAFETY: as above; the status is not asked for.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        }
    })
}

/// Creates a process with exactly this pid, which does `main` and ends [`UNHARMED`]. `None`: the pid is not free.
///
/// `main` makes system calls only, as the child of a process with threads must.
fn with_pid(pid: u32, main: impl FnOnce()) -> Option<OwnedFd> {
    let wanted = i32::try_from(pid).unwrap();
    let mut pidfd: i32 = -1;
    let mut args = CloneArgs {
        flags: u64::from(libc::CLONE_PIDFD.unsigned_abs()),
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        set_tid: (&raw const wanted) as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: the arguments outlive the call; without CLONE_VM the child has memory of its own.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match result {
        0 => {
            main();
            // SAFETY: no destructor of the parent's runs.
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

/// Reaps a dead process that was given to this one; the main process is left to tokio.
fn reap_orphan(pid: u32, main: u32) {
    if pid != main {
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap());
        // ECHILD: it is not ours, or its parent was faster.
        match rustix::process::waitpid(pid, rustix::process::WaitOptions::NOHANG) {
            Ok(_) | Err(rustix::io::Errno::CHILD) => {}
            Err(error) => panic!("failed to reap a process: {error}"),
        }
    }
}

/// Waits for a stranger and asserts that nobody killed it.
fn assert_unharmed(pidfd: &OwnedFd) {
    use std::os::fd::AsFd as _;
    let id = rustix::process::WaitId::PidFd(pidfd.as_fd());
    let status: WaitIdStatus = rustix::process::waitid(id, WaitIdOptions::EXITED).unwrap().unwrap();
    assert_eq!(status.exit_status(), Some(UNHARMED), "a stranger was hit: {status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_with_a_members_pid_is_never_hit() {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    let sandbox = Sandbox::new();
    let mut strangers = 0;
    for _ in 0..5 {
        let mut played = sandbox.play("storm", ["100"]);
        let mut events = sandbox.tracker.events().unwrap();
        let done = AtomicBool::new(false);
        let main = played.child.id().unwrap();
        let policy = StopPolicy {
            grace: Duration::from_millis(200),
            kill_timeout: DEADLINE,
            ..StopPolicy::default()
        };
        std::thread::scope(|scope| {
            let forger = scope.spawn(|| {
                let mut impostors = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let Some(event) = events.take() else {
                        std::thread::yield_now();
                        continue;
                    };
                    if event.kind != event_kind::EXIT || impostors.len() >= 2000 {
                        continue;
                    }
                    // The pid is free as soon as the dead member is reaped: by its parent, or by this process, which the
                    // orphans are given to.
                    let deadline = Instant::now() + Duration::from_millis(2);
                    while Instant::now() < deadline {
                        reap_orphan(event.tgid, main);
                        if let Some(stranger) = impostor(event.tgid) {
                            impostors.push(stranger);
                            break;
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
            assert!(report.unwrap().proven);
            strangers += impostors.len();
            impostors.iter().for_each(assert_unharmed);
        });
        assert_eq!(survivors(&played.marker), []);
        played.child.wait().await.unwrap();
        sandbox.tracker.unregister(&played.service).unwrap();
    }
    println!("{strangers} strangers took a member's pid during a stop, none was hit");
    assert!(
        strangers >= 50,
        "too few pids were reused to show anything: {strangers}"
    );
    sandbox.close();
}

#[tokio::test]
async fn the_children_of_a_stranger_with_a_dead_members_pid_are_not_taken_for_members() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("rest", [""; 0]);
    let pid = played.child.id().unwrap();
    // The member dies unseen, and its entry stays.
    for link in std::fs::read_dir(sandbox.pins().join("v2/links")).unwrap() {
        std::fs::remove_file(link.unwrap().path()).unwrap();
    }
    while sandbox.tracker.live(&played.service).unwrap() > 0 && played.child.id().is_some() {
        played.child.kill().await.unwrap();
    }
    if sandbox.tracker.live(&played.service).unwrap() == 0 {
        println!("SKIPPED: the kernel detached the hooks after the member's death");
        return sandbox.close();
    }
    let stranger = impostor_with_child(pid).expect("the pid is free");
    let policy = StopPolicy {
        grace: Duration::ZERO,
        ..StopPolicy::default()
    };
    let report = stop(&sandbox.tracker, &played.service, &policy).await.unwrap();
    assert!(!report.proven);
    let ended = rustix::process::waitid(
        rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&stranger)),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
    );
    assert!(ended.unwrap().is_none(), "the stranger's child was hit: {report:#?}");
    rustix::process::pidfd_send_signal(&stranger, rustix::process::Signal::KILL).unwrap();
    rustix::process::waitid(
        rustix::process::WaitId::PidFd(std::os::fd::AsFd::as_fd(&stranger)),
        WaitIdOptions::EXITED,
    )
    .unwrap();
    sandbox.close();
}
