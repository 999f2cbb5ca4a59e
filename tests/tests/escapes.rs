//! Ways out of a service, each taken by a real process tree. None leads anywhere: the stop is proven, and an independent
//! scan of /proc finds nobody.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{process::Command, time::Duration};

use nix::sys::signal::Signal;
use zinit_tests::{
    TestCgroup, kernel_is_at_least, lock_is_free, port_is_free, rounds,
    sandbox::{Played, Sandbox},
};
use zinit_tracker::{StopPolicy, StopReport, stop::Fate};

/// For trees that end when they are asked to: the grace period must never run out.
fn patient() -> StopPolicy {
    StopPolicy {
        grace: Duration::from_secs(60),
        kill_timeout: Duration::from_secs(60),
        ..StopPolicy::default()
    }
}

/// For trees that do not.
fn impatient() -> StopPolicy {
    StopPolicy {
        grace: Duration::from_millis(300),
        ..patient()
    }
}

/// Plays the behaviour, compares the map with the oracle, and stops it.
async fn check(behaviour: &str, args: &[&str], policy: &StopPolicy, least: usize) -> StopReport {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play(behaviour, args);
    sandbox.assert_map_matches_oracle(&played);
    let report = finish(&sandbox, &mut played, policy, least).await;
    sandbox.close();
    report
}

async fn finish(sandbox: &Sandbox, played: &mut Played, policy: &StopPolicy, least: usize) -> StopReport {
    let report = sandbox.stop(played, policy).await;
    assert!(report.processes.len() >= least, "{report:#?}");
    report
}

/// Whether SIGKILL was needed: from the stop, or from the programs that kill whatever of a service forks on.
fn was_killed(report: &StopReport) -> bool {
    let killed = Some(Fate::Killed(Signal::SIGKILL as i32));
    report.kill_rounds > 0
        && report
            .processes
            .iter()
            .any(|process| process.fate == killed || process.signals.iter().any(|sent| sent.signal == Signal::SIGKILL))
}

/// One test for each behaviour that ends when it is asked to.
macro_rules! ends_when_asked {
    ($($name:ident: $behaviour:literal $args:expr, at least $least:literal;)+) => {
        $(
            #[tokio::test]
            async fn $name() {
                let report = check($behaviour, &$args, &patient(), $least).await;
                assert!(!was_killed(&report), "{report:#?}");
            }
        )+
    };
}

/// One test for each behaviour that has to be killed.
macro_rules! has_to_be_killed {
    ($($name:ident: $behaviour:literal $args:expr, at least $least:literal;)+) => {
        $(
            #[tokio::test]
            async fn $name() {
                let report = check($behaviour, &$args, &impatient(), $least).await;
                assert!(was_killed(&report), "{report:#?}");
            }
        )+
    };
}

ends_when_asked! {
    a_child: "child" [], at least 2;
    a_child_in_a_session_of_its_own: "setsid" [], at least 2;
    a_child_in_a_group_of_its_own: "setpgid" [], at least 2;
    a_daemon: "double-fork" [], at least 2;
    a_daemon_whose_main_process_is_gone: "double-fork-orphan" [], at least 1;
    a_stopped_child: "stopped" [], at least 2;
    two_hundred_children_in_as_many_sessions: "sessions" ["200"], at least 201;
    a_chain_of_a_hundred_generations: "chain" ["100"], at least 100;
    a_fork_from_a_thread_whose_leader_has_exited: "thread-fork" [], at least 2;
    a_child_by_vfork: "vfork" [], at least 2;
    a_child_by_posix_spawn: "posix-spawn" [], at least 2;
    a_child_whose_parent_is_its_grandparent: "clone-parent" [], at least 2;
    a_nested_subreaper: "subreaper" [], at least 3;
    a_child_with_a_cleared_environment: "clear-env" ["MARKER"], at least 2;
    a_child_in_user_mount_uts_and_ipc_namespaces_of_its_own: "namespaces" [], at least 3;
    a_child_in_a_time_namespace_with_another_clock: "time-namespace" [], at least 2;
}

has_to_be_killed! {
    a_main_process_that_ignores_sigterm: "ignore-term" [], at least 1;
    grandchildren_in_sessions_that_ignore_sigterm: "ignore-term-grandchildren" [], at least 3;
    a_nested_pid_namespace: "pid-namespace" [], at least 3;
}

#[tokio::test]
async fn a_fork_on_sigterm() {
    // Long enough for the main process to act on the signal, on a busy machine too.
    let policy = StopPolicy {
        grace: Duration::from_secs(3),
        ..patient()
    };
    let report = check("fork-on-term", &[], &policy, 2).await;
    assert!(was_killed(&report), "{report:#?}");
}

/// As `check`, for trees that never rest, of which no two lists need agree.
async fn check_restless(behaviour: &str, args: &[&str], least: usize) -> StopReport {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play(behaviour, args);
    let report = finish(&sandbox, &mut played, &impatient(), least).await;
    sandbox.close();
    report
}

#[tokio::test]
async fn a_chain_that_forks_itself_again_for_ever() {
    let report = check_restless("refork-chain", &[], 10).await;
    assert!(was_killed(&report), "{report:#?}");
    println!(
        "{} processes, {} rounds, gate: {:?}",
        report.processes.len(),
        report.kill_rounds,
        report.gate
    );
}

#[tokio::test]
async fn a_fork_storm_of_five_hundred() {
    let report = check_restless("storm", &["500"], 100).await;
    assert!(was_killed(&report), "{report:#?}");
    println!(
        "{} processes, {} rounds, gate: {:?}",
        report.processes.len(),
        report.kill_rounds,
        report.gate
    );
}

#[tokio::test]
async fn a_child_that_moves_to_another_cgroup() {
    let name = format!("zinit-test-{}", std::process::id());
    let cgroup = TestCgroup::new(&name).unwrap();
    let cgroup = cgroup.expect("the tests need a writable cgroup v2 hierarchy");
    let path = cgroup.path().to_str().unwrap();
    let report = check("cgroup-move", &[path], &patient(), 2).await;
    assert!(!was_killed(&report), "{report:#?}");
}

/// Runs these tests again where the tracker, the test and the services are in a pid namespace of their own.
#[test]
fn all_of_this_in_a_nested_pid_namespace() {
    let mut suite = Command::new("unshare");
    suite
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        // The first process of the namespace has to reap orphans, as this shell does while it waits.
        .args(["sh", "-c", "\"$0\" \"$@\"; exit $?"])
        .arg(std::env::current_exe().unwrap())
        .args(["--skip", "all_of_this_in", "--skip", "a_hundred_times"])
        .env("ZINIT_TEST_ACTOR", zinit_tests::actor_path().unwrap());
    let output = suite.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    if said.contains("needs Linux 6.5") {
        assert!(!kernel_is_at_least(6, 5), "{said}");
        println!("SKIPPED: this kernel cannot tell pids in nested namespaces");
        return;
    }
    assert!(output.status.success(), "{said}");
    let result = said.lines().find(|line| line.starts_with("test result: ok")).unwrap();
    assert!(!result.contains(" 0 passed"), "{result}");
    println!("in a nested pid namespace: {result}");
}

#[tokio::test]
async fn the_port_is_free_the_moment_stop_returns_a_hundred_times() {
    let sandbox = Sandbox::new();
    for _ in 0..rounds(100) {
        let mut played = sandbox.play("tcp", ["0"]);
        let port = played.facts.number("port").unwrap();
        assert!(!port_is_free(port).unwrap());
        finish(&sandbox, &mut played, &patient(), 2).await;
        assert!(port_is_free(port).unwrap());
        sandbox.tracker.unregister(&played.service).unwrap();
    }
    sandbox.close();
}

#[tokio::test]
async fn the_lock_is_free_the_moment_stop_returns_a_hundred_times() {
    let sandbox = Sandbox::new();
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    for _ in 0..rounds(100) {
        let mut played = sandbox.play("flock", [path]);
        assert!(!lock_is_free(file.path()).unwrap());
        finish(&sandbox, &mut played, &patient(), 2).await;
        assert!(lock_is_free(file.path()).unwrap());
        sandbox.tracker.unregister(&played.service).unwrap();
    }
    sandbox.close();
}
