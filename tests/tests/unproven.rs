//! Each reason to doubt the books: provoked for real, named in the report, and nothing survives all the same; who is no
//! part of the service is left alone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    process::{Child, Command, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use zinit_tests::{
    Cleanup, Marker, Ready, actor,
    sandbox::{DEADLINE, Sandbox},
    survivors,
};
use zinit_tracker::{
    Config, Service, StopPolicy, StopReport, TrackerError, stop,
    stop::Doubt,
    tracker::{COOKIE, Sign},
};

fn policy(grace: Duration) -> StopPolicy {
    StopPolicy {
        grace,
        kill_timeout: DEADLINE,
        ..StopPolicy::default()
    }
}

/// A command of the shell that carries the marker, and says `ready` when everything is set up.
fn script(text: &str, marker: &Marker) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", text])
        .env(Marker::ENV, marker.as_str())
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
}

fn wait_for_ready(output: impl std::io::Read) {
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
}

async fn async_ready(output: &mut (impl tokio::io::AsyncBufRead + Unpin)) {
    let mut line = String::new();
    tokio::io::AsyncBufReadExt::read_line(output, &mut line).await.unwrap();
    assert_eq!(line, "ready\n");
}

/// Stops the service, which must not be proven, and asserts that nothing is left of it.
async fn stop_doubted(sandbox: &Sandbox, service: &Service, marker: &Marker) -> StopReport {
    let report = stop(&sandbox.tracker, service, &policy(Duration::from_millis(300)))
        .await
        .unwrap();
    assert!(!report.proven, "{report:#?}");
    assert_eq!(survivors(marker), [], "{report:#?}");
    assert_eq!(sandbox.tracker.live(service).unwrap(), 0);
    report
}

/// By which signs processes were found.
fn signs(report: &StopReport) -> Vec<Sign> {
    report.processes.iter().filter_map(|process| process.sign).collect()
}

/// Plays the behaviour with books that are too small for it.
async fn check_small_books(capacity: u32, behaviour: &str, args: &[&str], sign: Sign) {
    let sandbox = Sandbox::with_capacity(capacity);
    let mut played = sandbox.play(behaviour, args);
    assert!(sandbox.tracker.info(&played.service).unwrap().lost > 0);
    let report = stop_doubted(&sandbox, &played.service, &played.marker).await;
    assert!(
        matches!(report.doubts[..], [Doubt::LostOperations { .. }]),
        "{report:#?}"
    );
    assert!(signs(&report).contains(&sign), "{report:#?}");
    played.child.wait().await.unwrap();
}

#[tokio::test]
async fn children_that_found_no_place_in_the_books_are_found_by_their_parent() {
    check_small_books(1, "sessions", &["20"], Sign::Parent).await;
}

#[tokio::test]
async fn a_child_without_environment_that_found_no_place_is_found_by_its_parent() {
    check_small_books(1, "clear-env", &["MARKER"], Sign::Parent).await;
}

#[tokio::test]
async fn a_daemon_that_found_no_place_is_found_by_its_cookie() {
    check_small_books(1, "double-fork", &[], Sign::Cookie).await;
}

#[tokio::test]
async fn the_descendants_of_what_found_no_place_are_found_with_it() {
    check_small_books(2, "pid-namespace", &[], Sign::Parent).await;
}

#[tokio::test]
async fn a_fork_storm_that_bursts_the_books_is_ended() {
    let sandbox = Sandbox::with_capacity(50);
    let mut played = sandbox.play("session-storm", ["200"]);
    let report = stop_doubted(&sandbox, &played.service, &played.marker).await;
    assert!(matches!(report.doubts[0], Doubt::LostOperations { .. }), "{report:#?}");
    played.child.wait().await.unwrap();
}

/// In a session that a member makes and leaves: a child without cookie, and with a parent outside.
const SESSION_WITHOUT_LEADER: &str =
    "setsid sh -c 'env -u COOKIE sh -c \"echo ready; exec sleep 300\" & exit' & wait; exec sleep 301";

#[tokio::test]
async fn what_is_left_of_a_members_session_is_found_by_that() {
    // Two places: the shell, and the one that leads the session; its child finds none.
    let sandbox = Sandbox::with_capacity(2);
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let service = sandbox.tracker.register("session").unwrap();
    let mut command = script(&SESSION_WITHOUT_LEADER.replace("COOKIE", COOKIE), &marker).into();
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    let mut output = tokio::io::BufReader::new(child.stdout.take().unwrap());
    async_ready(&mut output).await;
    let report = stop_doubted(&sandbox, &service, &marker).await;
    assert!(signs(&report).contains(&Sign::Session), "{report:#?}");
    child.wait().await.unwrap();
}

#[tokio::test]
async fn what_had_left_the_tree_before_it_was_adopted_is_found_by_the_session() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut command = script("(sleep 300 &); echo ready; exec sleep 301", &marker);
    // SAFETY: one system call.
    unsafe { command.pre_exec(|| rustix::process::setsid().map(drop).map_err(Into::into)) };
    let mut root = command.spawn().unwrap();
    wait_for_ready(root.stdout.take().unwrap());
    let service = sandbox.tracker.register("adopted").unwrap();
    let adoption = sandbox.tracker.adopt(&service, root.id()).unwrap();
    assert_eq!(adoption.members.len(), 1);
    assert_eq!(adoption.suspects.len(), 1);
    let report = stop_doubted(&sandbox, &service, &marker).await;
    assert_eq!(report.doubts, [Doubt::Adopted]);
    assert_eq!(signs(&report), [Sign::Session]);
    root.wait().unwrap();
    sandbox.close();
}

#[tokio::test]
async fn what_was_created_while_the_hooks_were_detached_is_found() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("loop-on-term", ["0"]);
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    // A second member creates a process for every line that it gets.
    let mut command = script(
        "echo ready; while read line; do setsid sleep 300 & echo ready; done",
        &marker,
    );
    command.stdin(Stdio::piped());
    let mut child = sandbox.tracker.spawn(&played.service, &mut command.into()).unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut output = tokio::io::BufReader::new(child.stdout.take().unwrap());
    async_ready(&mut output).await;
    for hook in ["zinit_fork", "zinit_wakeup"] {
        let link = sandbox.pins().join("v2/links").join(hook);
        if link.exists() {
            std::fs::remove_file(link).unwrap();
        }
    }
    // The kernel detaches a hook a moment after its link is gone.
    loop {
        let before = sandbox.tracker.info(&played.service).unwrap().forks;
        tokio::io::AsyncWriteExt::write_all(&mut input, b"more\n")
            .await
            .unwrap();
        async_ready(&mut output).await;
        if sandbox.tracker.info(&played.service).unwrap().forks == before {
            break;
        }
    }
    // The next client finds the hooks detached and attaches them again.
    drop(sandbox.second_client());
    assert!(sandbox.tracker.info(&played.service).unwrap().unwatched);
    let report = stop_doubted(&sandbox, &played.service, &marker).await;
    assert_eq!(report.doubts, [Doubt::Unwatched]);
    assert_eq!(signs(&report), [Sign::Parent], "{report:#?}");
    played.child.wait().await.unwrap();
    child.wait().await.unwrap();
    sandbox.close();
}

#[tokio::test]
async fn a_hook_that_was_replaced_is_attached_again() {
    let sandbox = Sandbox::new();
    let other = Sandbox::new();
    let mut played = sandbox.play("sessions", ["3"]);
    std::fs::rename(
        other.pins().join("v2/links/zinit_fork"),
        sandbox.pins().join("v2/links/zinit_fork"),
    )
    .unwrap();
    let report = stop_doubted(&sandbox, &played.service, &played.marker).await;
    assert_eq!(report.doubts, [Doubt::Unwatched]);
    played.child.wait().await.unwrap();
    // The service is new, and so are its doubts.
    sandbox.tracker.unregister(&played.service).unwrap();
    let mut again = sandbox.play("sessions", ["3"]);
    sandbox.stop(&mut again, &policy(DEADLINE)).await;
    sandbox.close();
    other.close();
}

#[tokio::test]
async fn books_whose_pins_lead_elsewhere_are_doubted() {
    let sandbox = Sandbox::new();
    let other = Sandbox::new();
    let mut played = sandbox.play("sessions", ["3"]);
    let place = |sandbox: &Sandbox| sandbox.pins().join("v2/processes");
    let kept = sandbox.pins().join("v2/kept");
    std::fs::rename(place(&sandbox), &kept).unwrap();
    std::fs::rename(place(&other), place(&sandbox)).unwrap();
    let report = stop_doubted(&sandbox, &played.service, &played.marker).await;
    let expected = Doubt::ReplacedPins {
        pins: vec!["processes"],
    };
    assert_eq!(report.doubts, [expected]);
    played.child.wait().await.unwrap();
    std::fs::rename(place(&sandbox), place(&other)).unwrap();
    std::fs::rename(kept, place(&sandbox)).unwrap();
    sandbox.close();
    other.close();
}

#[tokio::test]
async fn a_service_of_another_pid_namespace_is_not_called_down() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("sessions", ["3"]);
    let output = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(zinit_tests::tool())
        .arg("--pins")
        .arg(sandbox.pins())
        .args([
            "stop",
            "sessions",
            "--grace",
            "0",
            "--report",
            "-",
            "--kill-timeout",
            "300ms",
        ])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    if stderr.contains("needs Linux 6.5") {
        println!("SKIPPED: this kernel cannot tell pids in nested namespaces");
        sandbox.stop(&mut played, &policy(DEADLINE)).await;
        return sandbox.close();
    }
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["doubts"][0]["reason"], "out-of-sight", "{report:#}");
    assert_eq!(report["survivors"].as_array().unwrap().len(), 4, "{report:#}");
    sandbox.stop(&mut played, &policy(DEADLINE)).await;
    sandbox.close();
}

/// A process that is stopped until it is told to go on.
struct Paused(Child);

impl Paused {
    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).unwrap())
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        // ESRCH: it has ended.
        match kill(self.pid(), Signal::SIGCONT) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(error) => eprintln!("failed to continue a process: {error}"),
        }
    }
}

#[tokio::test]
async fn deaths_that_left_no_record_and_were_not_listed_are_doubts() {
    // More members than there are exit records live and die while the process that stops the service is itself stopped.
    const DEATHS: &str = "20000";
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("loop-on-term", [DEATHS]);
    let marker = Marker::new();
    let mut command = Command::new(zinit_tests::tool());
    command
        .arg("--pins")
        .arg(sandbox.pins())
        .args(["stop", "loop-on-term", "--grace", "100s", "--report", "-"])
        .env(Marker::ENV, marker.as_str())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut stopper = Paused(command.spawn().unwrap());
    // As soon as the service has begun to fork it has been asked to end.
    while sandbox.tracker.info(&played.service).unwrap().forks < 10 {
        tokio::task::yield_now().await;
    }
    kill(stopper.pid(), Signal::SIGSTOP).unwrap();
    // An emulated machine takes minutes for so many.
    tokio::time::timeout(5 * DEADLINE, sandbox.tracker.wait_empty(&played.service))
        .await
        .unwrap()
        .unwrap();
    kill(stopper.pid(), Signal::SIGCONT).unwrap();
    let report: serde_json::Value = serde_json::from_reader(stopper.0.stdout.take().unwrap()).unwrap();
    assert_eq!(report["proven"], false);
    assert_eq!(report["doubts"][0]["reason"], "unobserved-deaths");
    assert_eq!(stopper.0.wait().unwrap().code(), Some(3));
    assert_eq!(survivors(&played.marker), []);
    played.child.wait().await.unwrap();
    sandbox.close();
}

#[tokio::test]
async fn who_is_no_part_of_a_doubted_service_lives_on() {
    let sandbox = Sandbox::with_capacity(3);
    let strangers = Marker::new();
    let _cleanup = Cleanup::new(&strangers);
    // One more of the same kind, with the cookie of a service that was; in its own session, group and cgroup.
    let mut alike = Command::new("sleep");
    alike
        .arg("300")
        .env(Marker::ENV, strangers.as_str())
        .env(COOKIE, "test/sessions/1");
    let mut alike = alike.spawn().unwrap();
    // A member of another service, and one that was released.
    let other = sandbox.tracker.register("other").unwrap();
    let mut ready = Ready::new().unwrap();
    let mut command = actor::<&str>("rest", [], &strangers);
    ready.attach(&mut command);
    let mut of_other = sandbox.tracker.spawn(&other, &mut command.into()).unwrap();
    ready.wait().unwrap();
    let mut played = sandbox.play("sessions", ["20"]);
    let before = survivors(&strangers).len();
    let report = stop_doubted(&sandbox, &played.service, &played.marker).await;
    assert!(report.processes.len() > 20, "{report:#?}");
    assert_eq!(survivors(&strangers).len(), before);
    played.child.wait().await.unwrap();
    zinit_tests::kill_all(&strangers, DEADLINE).unwrap();
    alike.wait().unwrap();
    of_other.wait().await.unwrap();
}

#[tokio::test]
async fn who_was_released_from_a_doubted_service_is_named_and_lives_on() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut ready = Ready::new().unwrap();
    let mut command = actor("chain", ["3"], &marker);
    ready.attach(&mut command);
    let mut root = command.spawn().unwrap();
    ready.wait().unwrap();
    let service = sandbox.tracker.register("released").unwrap();
    let adoption = sandbox.tracker.adopt(&service, root.id()).unwrap();
    let leaf = adoption.members.last().unwrap().pid;
    assert_eq!(sandbox.tracker.release(leaf).unwrap().len(), 1);
    let report = stop(&sandbox.tracker, &service, &policy(DEADLINE)).await.unwrap();
    assert_eq!(report.doubts, [Doubt::Adopted]);
    let left: Vec<_> = survivors(&marker).iter().map(|left| left.pid).collect();
    assert_eq!(left, [i32::try_from(leaf).unwrap()]);
    let suspects: Vec<_> = report
        .suspects
        .iter()
        .map(|suspect| (suspect.pid, suspect.shares))
        .collect();
    assert_eq!(suspects, [(leaf, "parent")]);
    root.wait().unwrap();
    sandbox.close();
}

#[tokio::test]
async fn who_shares_only_a_group_with_a_doubted_service_is_named_and_lives_on() {
    let sandbox = Sandbox::new();
    let strangers = Marker::new();
    let _cleanup = Cleanup::new(&strangers);
    let mut played = sandbox.play("setpgid", [""; 0]);
    let members = sandbox.tracker.processes(&played.service).unwrap();
    let group = i32::try_from(members[1].pid).unwrap();
    let mut stranger = Command::new("sleep");
    stranger
        .arg("300")
        .env(Marker::ENV, strangers.as_str())
        .process_group(group);
    let mut stranger = stranger.spawn().unwrap();
    std::fs::remove_file(sandbox.pins().join("v2/links/zinit_exec")).unwrap();
    let report = stop_doubted(&sandbox, &played.service, &played.marker).await;
    let suspects: Vec<_> = report
        .suspects
        .iter()
        .map(|suspect| (suspect.pid, suspect.shares))
        .collect();
    assert_eq!(suspects, [(stranger.id(), "group")]);
    assert_eq!(survivors(&strangers).len(), 1);
    played.child.wait().await.unwrap();
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    sandbox.close();
}

#[tokio::test]
async fn who_was_handed_the_cookie_by_a_stranger_is_named_and_lives_on() {
    let sandbox = Sandbox::new();
    let strangers = Marker::new();
    let _cleanup = Cleanup::new(&strangers);
    let mut played = sandbox.play("sessions", ["3"]);
    let cookie = sandbox.tracker.info(&played.service).unwrap().cookie();
    // As a job scheduler does, which starts jobs with the environment of whoever asked for them.
    let text = format!("env {COOKIE}=\"$1\" sleep 300 & echo ready; wait");
    let mut scheduler = {
        let mut command = script(&text, &strangers);
        command.args(["sh", &cookie]);
        command.spawn().unwrap()
    };
    wait_for_ready(scheduler.stdout.take().unwrap());
    std::fs::remove_file(sandbox.pins().join("v2/links/zinit_exec")).unwrap();
    let report = stop_doubted(&sandbox, &played.service, &played.marker).await;
    assert_eq!(report.suspects.len(), 1, "{report:#?}");
    assert_eq!(report.suspects[0].shares, "cookie");
    assert_eq!(survivors(&strangers).len(), 2);
    played.child.wait().await.unwrap();
    zinit_tests::kill_all(&strangers, DEADLINE).unwrap();
    scheduler.wait().unwrap();
    sandbox.close();
}

#[tokio::test]
async fn a_service_whose_pins_were_removed_is_stopped_all_the_same() {
    let sandbox = Sandbox::with_capacity(3);
    let mut played = sandbox.play("sessions", ["10"]);
    for directory in ["v2/links", "v2/programs", "v2", ""] {
        let directory = sandbox.pins().join(directory);
        for entry in std::fs::read_dir(&directory).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
        std::fs::remove_dir(&directory).unwrap();
    }
    let report = stop_doubted(&sandbox, &played.service, &played.marker).await;
    assert!(
        report
            .doubts
            .iter()
            .any(|doubt| matches!(doubt, Doubt::DetachedHooks { .. })),
        "{report:#?}"
    );
    played.child.wait().await.unwrap();
}

#[tokio::test]
async fn what_the_books_missed_of_a_killed_run_does_not_outlive_the_next_of_its_name() {
    let sandbox = Sandbox::with(|config| {
        config.max_processes = Some(1);
        config.instance = Config::default().instance;
    });
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut member = Command::new("sleep").arg("300").spawn().unwrap();
    // Its registrant is dead afterwards, as a killed `run` is.
    let attached = sandbox
        .tool(&["attach", "--name", "web", &member.id().to_string()])
        .output()
        .unwrap();
    assert!(attached.status.success(), "{attached:?}");
    let service = sandbox.tracker.find("web").unwrap().handle();
    let refused = sandbox.tracker.spawn(&service, &mut Command::new("true").into());
    assert!(matches!(refused, Err(TrackerError::Untracked { .. })), "{refused:?}");
    member.kill().unwrap();
    member.wait().unwrap();
    let mut creator = script("setsid sleep 300 >/dev/null 2>&1 &", &marker);
    creator.env(COOKIE, sandbox.tracker.info(&service).unwrap().cookie());
    assert!(creator.status().unwrap().success());
    assert_eq!(survivors(&marker).len(), 1);
    let output = sandbox.tool(&["run", "--name", "web", "--", "true"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(survivors(&marker), [], "{output:?}");
}
