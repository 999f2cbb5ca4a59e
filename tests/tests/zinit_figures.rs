//! What the supervisor costs and how fast it is, through the command line. Printed, not asserted: the machine is busy.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    os::fd::AsFd as _,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use zinit_tests::{daemon::Daemon, rounds};

const SERVICES: usize = 100;

/// When the process ends, seen through a pidfd by a thread that does nothing else.
fn end_of(pid: u64) -> thread::JoinHandle<Instant> {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    thread::spawn(move || {
        let mut watched = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        while poll(&mut watched, None).unwrap() == 0 {}
        Instant::now()
    })
}

fn median(mut times: Vec<Duration>) -> (Duration, Duration, Duration) {
    times.sort();
    (times[0], times[times.len() / 2], times[times.len() - 1])
}

#[test]
fn how_soon_after_the_end_of_the_process_zinit_stop_returns() {
    let mut daemon = Daemon::prepare(&[]);
    let ended = daemon.scratch().join("ended");
    // The last thing that it does is to note the time.
    let script = daemon.script(
        "notes-its-end",
        &format!(
            "trap 'echo $EPOCHREALTIME > {}; exit 0' TERM\nmkfifo $0.$$; echo ready; while :; do read -r line <> $0.$$; done",
            ended.display()
        ),
    );
    daemon.write("web", &format!("exec: bash {script}"));
    daemon.run();
    let mut times = Vec::new();
    for round in 1..=rounds(20) {
        let ready = usize::try_from(round).unwrap();
        zinit_tests::daemon::wait_for("it handles the signal", || {
            daemon.prints(&["log", "-s", "web"]).matches("[+] web: ready").count() == ready
        });
        daemon.does(&["stop", "web"]);
        let returned = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let noted: f64 = fs::read_to_string(&ended).unwrap().trim_end().parse().unwrap();
        times.push(returned.saturating_sub(Duration::from_secs_f64(noted)));
        daemon.does(&["start", "web"]);
    }
    let (least, median, most) = median(times);
    println!("`zinit stop` returns after the process's last act: {least:?} … median {median:?} … {most:?}");
    daemon.shutdown();
}

#[test]
fn how_exactly_a_shutdown_timeout_of_three_seconds_is_kept() {
    let daemon = Daemon::prepare(&[]);
    let deaf = daemon.script("deaf", "trap '' TERM\necho ready\nwhile :; do sleep 3600; done");
    daemon.write("deaf", &format!("exec: {deaf}\nshutdown_timeout: 3"));
    let mut daemon = daemon;
    daemon.run();
    let mut times = Vec::new();
    for round in 1..=rounds(3) {
        let ready = usize::try_from(round).unwrap();
        zinit_tests::daemon::wait_for("it is deaf", || {
            daemon.prints(&["log", "-s", "deaf"]).matches("[+] deaf: ready").count() == ready
        });
        let pid = daemon.pid("deaf");
        let started = Instant::now();
        let end = end_of(pid);
        daemon.does(&["stop", "deaf"]);
        let returned = started.elapsed();
        let ended = end.join().unwrap().saturating_duration_since(started);
        println!("shutdown_timeout: 3: ended after {ended:?}, `zinit stop` returned after {returned:?}");
        times.push(returned);
        daemon.does(&["start", "deaf"]);
    }
    daemon.shutdown();
}

#[test]
fn how_much_memory_the_daemon_has_with_a_hundred_services() {
    let names: Vec<_> = (0..SERVICES).map(|number| format!("service-{number}")).collect();
    let files: Vec<_> = names.iter().map(|name| (name.as_str(), "exec: sleep 3600")).collect();
    let daemon = Daemon::start(&files);
    for name in &names {
        daemon.wait_for_state(name, "Running");
    }
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.process().as_raw_nonzero())).unwrap();
    let figures = status.lines().filter(|line| {
        ["VmRSS", "VmHWM", "RssAnon", "RssFile", "Threads"]
            .iter()
            .any(|name| line.starts_with(name))
    });
    for figure in figures {
        println!("with {SERVICES} services: {figure}");
    }
    let started = Instant::now();
    daemon.does(&["shutdown"]);
    println!("`zinit shutdown` of {SERVICES} services: {:?}", started.elapsed());
    let mut daemon = daemon;
    daemon.assert_ends_well();
}
