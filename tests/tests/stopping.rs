//! What a stop does and does not do: grace, order, refusals, releases, adoption, doubts.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use nix::sys::signal::Signal;
use zinit_tests::{
    Cleanup, Marker, Ready, actor, members,
    sandbox::{DEADLINE, Sandbox},
    survivors,
};
use zinit_tracker::{
    StopPolicy, TrackerError, stop,
    stop::{Doubt, Target, dry_run},
};

fn policy(grace: Duration) -> StopPolicy {
    StopPolicy {
        grace,
        kill_timeout: DEADLINE,
        ..StopPolicy::default()
    }
}

fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

#[tokio::test]
async fn a_service_that_takes_two_seconds_is_not_killed_within_its_grace_period() {
    let sandbox = Sandbox::new();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ended");
    let mut played = sandbox.play("slow-term", [file.to_str().unwrap(), "2000"]);
    let report = sandbox.stop(&mut played, &policy(DEADLINE)).await;
    let returned = monotonic_ns();
    assert_eq!(report.kill_rounds, 0);
    for process in &report.processes {
        let signals: Vec<_> = process.signals.iter().map(|sent| sent.signal).collect();
        assert_eq!(signals, [Signal::SIGTERM, Signal::SIGCONT], "each is asked once");
    }
    let ended: u64 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
    assert!(returned > ended, "stop returned before the service had ended");
    println!(
        "stop returned {:.3} ms after the service's end",
        (returned - ended) as f64 / 1e6
    );
    assert!(report.elapsed >= Duration::from_secs(2));
    sandbox.close();
}

#[tokio::test]
async fn two_hundred_unrelated_processes_of_the_same_kind_live_on() {
    let sandbox = Sandbox::new();
    let bystanders = Marker::new();
    let _cleanup = Cleanup::new(&bystanders);
    let mut children: Vec<_> = (0..200)
        .map(|_| actor::<&str>("rest", [], &bystanders).spawn().unwrap())
        .collect();
    let mut played = sandbox.play("child", [""; 0]);
    let before = members(&bystanders);
    assert_eq!(before.len(), 200);
    sandbox.stop(&mut played, &policy(DEADLINE)).await;
    assert_eq!(members(&bystanders), before);
    for child in &mut children {
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    sandbox.close();
}

#[tokio::test]
async fn a_dry_run_lists_exactly_the_members_and_signals_nobody() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("sessions", ["5"]);
    let listed = dry_run(&sandbox.tracker, &played.service).unwrap();
    assert_eq!(listed, sandbox.tracker.processes(&played.service).unwrap());
    sandbox.assert_map_matches_oracle(&played);
    sandbox.stop(&mut played, &policy(DEADLINE)).await;
    sandbox.close();
}

#[tokio::test]
async fn only_the_main_process_is_asked_when_the_policy_says_so() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("setsid", [""; 0]);
    let main = played.child.id().unwrap();
    let policy = StopPolicy {
        target: Target::Main,
        ..policy(Duration::from_millis(300))
    };
    let report = sandbox.stop(&mut played, &policy).await;
    for process in &report.processes {
        let asked = process.signals.iter().any(|sent| sent.signal == Signal::SIGTERM);
        assert_eq!(asked, process.pid == main, "{process:?}");
    }
    sandbox.close();
}

#[tokio::test]
async fn a_released_subtree_survives_the_stop() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("chain", ["4"]);
    let chain = sandbox.tracker.processes(&played.service).unwrap();
    let released = sandbox.tracker.release(chain[2].pid).unwrap();
    let gone: Vec<_> = released.iter().map(|member| member.pid).collect();
    assert!(gone.contains(&chain[2].pid));
    assert!(!gone.contains(&chain[0].pid) && !gone.contains(&chain[1].pid));
    let report = stop(&sandbox.tracker, &played.service, &policy(DEADLINE))
        .await
        .unwrap();
    assert!(report.proven);
    let mut left: Vec<_> = survivors(&played.marker)
        .iter()
        .map(|survivor| u32::try_from(survivor.pid).unwrap())
        .collect();
    left.sort_unstable();
    let mut expected = gone.clone();
    expected.sort_unstable();
    assert_eq!(left, expected);
    played.child.wait().await.unwrap();
    assert!(matches!(
        sandbox.tracker.release(chain[2].pid),
        Err(TrackerError::NotTracked(_))
    ));
    sandbox.close();
}

#[tokio::test]
async fn an_adopted_tree_is_stopped_and_never_called_proven() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut ready = Ready::new().unwrap();
    let mut command = actor("chain", ["10"], &marker);
    ready.attach(&mut command);
    let mut child = command.spawn().unwrap();
    ready.wait().unwrap();
    let service = sandbox.tracker.register("adopted").unwrap();
    let adoption = sandbox.tracker.adopt(&service, child.id()).unwrap();
    assert!(adoption.settled);
    let mut adopted: Vec<_> = adoption.members.iter().map(|member| member.pid).collect();
    adopted.sort_unstable();
    let mut expected: Vec<_> = members(&marker)
        .iter()
        .map(|member| u32::try_from(member.pid).unwrap())
        .collect();
    expected.sort_unstable();
    assert_eq!(adopted, expected);
    let report = stop(&sandbox.tracker, &service, &policy(DEADLINE)).await.unwrap();
    assert!(!report.proven);
    assert_eq!(report.doubts, [Doubt::Adopted]);
    assert_eq!(survivors(&marker), []);
    child.wait().unwrap();
    sandbox.close();
}

#[tokio::test]
async fn an_adoption_loses_nobody_while_the_tree_grows() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut ready = Ready::new().unwrap();
    let mut command = actor("storm", ["100"], &marker);
    ready.attach(&mut command);
    let mut child = command.spawn().unwrap();
    ready.wait().unwrap();
    let service = sandbox.tracker.register("storm").unwrap();
    sandbox.tracker.adopt(&service, child.id()).unwrap();
    let report = stop(&sandbox.tracker, &service, &policy(Duration::ZERO)).await.unwrap();
    assert!(report.processes.len() >= 10, "{report:#?}");
    child.wait().unwrap();
    // What was reparented before the adoption cannot be known; the rest must be gone.
    let known: Vec<_> = report.processes.iter().map(|process| process.pid).collect();
    for survivor in survivors(&marker) {
        assert!(!known.contains(&u32::try_from(survivor.pid).unwrap()), "{survivor:?}");
    }
    sandbox.close();
}

#[test]
fn pids_that_no_service_may_have_are_refused() {
    let sandbox = Sandbox::new();
    let service = sandbox.tracker.register("refusals").unwrap();
    let me = std::process::id();
    let parent = std::os::unix::process::parent_id();
    for pid in [0, 1, 2, me, parent] {
        let refused = sandbox.tracker.adopt(&service, pid);
        assert!(
            matches!(refused, Err(TrackerError::Refused { .. })),
            "{pid}: {refused:?}"
        );
    }
    // Larger than any pid can be.
    let nobody = sandbox.tracker.adopt(&service, 5_000_000);
    assert!(
        matches!(nobody, Err(TrackerError::NoSuchProcess(5_000_000))),
        "{nobody:?}"
    );
    assert_eq!(sandbox.tracker.live(&service).unwrap(), 0);
    sandbox.close();
}

#[tokio::test]
async fn a_process_belongs_to_one_service() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("child", [""; 0]);
    let other = sandbox.tracker.register("other").unwrap();
    let taken = sandbox.tracker.adopt(&other, played.child.id().unwrap());
    assert!(matches!(taken, Err(TrackerError::AlreadyTracked { .. })), "{taken:?}");
    sandbox.stop(&mut played, &policy(DEADLINE)).await;
    sandbox.close();
}

#[tokio::test]
async fn names_and_members_are_guarded() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("child", [""; 0]);
    assert!(matches!(
        sandbox.tracker.register("child"),
        Err(TrackerError::NameInUse(_))
    ));
    assert!(matches!(
        sandbox.tracker.unregister(&played.service),
        Err(TrackerError::NotEmpty { .. })
    ));
    assert!(matches!(
        sandbox.tracker.find("nobody"),
        Err(TrackerError::UnknownService(_))
    ));
    sandbox.stop(&mut played, &policy(DEADLINE)).await;
    sandbox.tracker.unregister(&played.service).unwrap();
    assert!(matches!(
        sandbox.tracker.info(&played.service),
        Err(TrackerError::NotRegistered(_))
    ));
    sandbox.close();
}

#[tokio::test]
async fn a_command_that_cannot_start_leaves_no_member_and_no_pending_spawn() {
    let sandbox = Sandbox::new();
    let service = sandbox.tracker.register("missing").unwrap();
    let mut missing = tokio::process::Command::new("/nonexistent/program");
    let error = sandbox.tracker.spawn(&service, &mut missing).unwrap_err();
    assert!(matches!(error, TrackerError::Command { .. }), "{error}");
    sandbox.tracker.wait_empty(&service).await.unwrap();
    // The next process of this thread belongs to nobody.
    let mut child = Command::new("true").stdin(Stdio::null()).spawn().unwrap();
    child.wait().unwrap();
    let forks = sandbox.tracker.info(&service).unwrap().forks;
    assert!(forks <= 1, "only the attempt itself may have joined: {forks}");
    sandbox.close();
}

#[tokio::test]
async fn wait_empty_returns_when_the_last_descendant_ends() {
    let sandbox = Sandbox::new();
    let service = sandbox.tracker.register("waiting").unwrap();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut command = tokio::process::Command::new("sh");
    command
        .args(["-c", "(setsid sleep 0.3 &) ; exit 4"])
        .env(Marker::ENV, marker.as_str());
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    tokio::time::timeout(DEADLINE, sandbox.tracker.wait_empty(&service))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(survivors(&marker), []);
    assert_eq!(child.wait().await.unwrap().code(), Some(4));
    sandbox.close();
}

#[tokio::test]
async fn a_service_can_be_stopped_by_another_client() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("double-fork", [""; 0]);
    let other = sandbox.second_client();
    let found = other.find("double-fork").unwrap();
    let report = stop(&other, &found.handle(), &policy(DEADLINE)).await.unwrap();
    assert!(report.proven);
    assert_eq!(survivors(&played.marker), []);
    played.child.wait().await.unwrap();
    assert!(!other.close().unwrap(), "the first client uses the tracker");
    sandbox.close();
}

#[tokio::test]
async fn two_stops_at_once_both_end_proven() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("ignore-term-grandchildren", [""; 0]);
    let other = sandbox.second_client();
    let policy = policy(Duration::from_millis(200));
    let (one, two) = tokio::join!(
        stop(&sandbox.tracker, &played.service, &policy),
        stop(&other, &played.service, &policy)
    );
    assert!(one.unwrap().proven && two.unwrap().proven);
    assert_eq!(survivors(&played.marker), []);
    played.child.wait().await.unwrap();
    drop(other);
    sandbox.close();
}

#[tokio::test]
async fn a_stopped_service_can_run_again() {
    let sandbox = Sandbox::new();
    for _ in 0..3 {
        let mut played = sandbox.play("ignore-term", [""; 0]);
        sandbox.stop(&mut played, &policy(Duration::ZERO)).await;
        sandbox.tracker.unregister(&played.service).unwrap();
    }
    sandbox.close();
}

#[tokio::test]
async fn full_books_refuse_a_spawn_and_make_a_service_unproven() {
    // One place: the main process takes it, its child finds none.
    let sandbox = Sandbox::with_capacity(1);
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let service = sandbox.tracker.register("full").unwrap();
    let mut ready = Ready::new().unwrap();
    let mut command = actor::<&str>("child", [], &marker);
    ready.attach(&mut command);
    let mut child = sandbox.tracker.spawn(&service, &mut command.into()).unwrap();
    ready.wait().unwrap();
    let info = sandbox.tracker.info(&service).unwrap();
    assert_eq!(info.live, 1);
    assert!(info.lost >= 1, "{info:?}");
    let other = sandbox.tracker.register("other").unwrap();
    let refused = sandbox
        .tracker
        .spawn(&other, &mut actor::<&str>("rest", [], &marker).into());
    assert!(matches!(refused, Err(TrackerError::Untracked { .. })), "{refused:?}");
    let report = stop(&sandbox.tracker, &service, &policy(DEADLINE)).await.unwrap();
    assert!(!report.proven);
    assert!(
        matches!(report.doubts[..], [Doubt::LostOperations { .. }]),
        "{report:#?}"
    );
    child.wait().await.unwrap();
}

#[tokio::test]
async fn a_service_that_contains_the_caller_is_not_stopped() {
    // The tool, run as a member of the service, tries to stop it.
    let sandbox = Sandbox::new();
    let service = sandbox.tracker.register("own").unwrap();
    let mut command = tokio::process::Command::new(zinit_tests::tool());
    command
        .arg("--pins")
        .arg(sandbox.pins())
        .args(["stop", "own"])
        .stderr(Stdio::piped());
    let child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("refusing to stop"), "{stderr}");
    sandbox.tracker.wait_empty(&service).await.unwrap();
    sandbox.close();
}

#[tokio::test]
async fn a_run_within_a_service_is_stopped_with_it() {
    // The inner `run` registers a service of its own; SIGKILL gives it no chance to stop that.
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut ready = Ready::new().unwrap();
    let mut inner = actor::<&str>("ignore-term-grandchildren", [], &marker);
    ready.attach(&mut inner);
    let service = sandbox.tracker.register("outer").unwrap();
    let mut command = tokio::process::Command::new(zinit_tests::tool());
    command
        .arg("--pins")
        .arg(sandbox.pins())
        .args(["run", "--name", "inner", "--"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    ready.wait().unwrap();
    assert!(!survivors(&marker).is_empty());
    let report = stop(&sandbox.tracker, &service, &policy(Duration::ZERO)).await.unwrap();
    assert!(report.proven, "{report:#?}");
    assert_eq!(survivors(&marker), []);
    child.wait().await.unwrap();
    assert!(matches!(
        sandbox.tracker.find("tool/inner"),
        Err(TrackerError::UnknownService(_))
    ));
    sandbox.close();
}

#[tokio::test]
async fn events_tell_of_fork_exec_exit_and_empty() {
    use zinit_tracker::records::event_kind::{EMPTY, EXEC, EXIT, FORK};
    let sandbox = Sandbox::new();
    let mut events = sandbox.tracker.events().unwrap();
    assert!(sandbox.tracker.events().is_err(), "one reader at a time");
    let service = sandbox.tracker.register("eventful").unwrap();
    let mut command = tokio::process::Command::new("true");
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    let pid = child.id().unwrap();
    child.wait().await.unwrap();
    let mut kinds = Vec::new();
    while kinds.last() != Some(&EMPTY) {
        let event = tokio::time::timeout(DEADLINE, events.next()).await.unwrap().unwrap();
        assert!(event.kind == EMPTY || event.tgid == pid, "{event:?}");
        kinds.push(event.kind);
    }
    assert_eq!(kinds, [FORK, EXEC, EXIT, EMPTY]);
    sandbox.close();
}

#[tokio::test]
async fn a_process_that_is_released_during_the_stop_is_not_waited_for() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("ignore-term", [""; 0]);
    let kept = sandbox.tracker.processes(&played.service).unwrap()[1].pid;
    let other = sandbox.second_client();
    let grace = policy(DEADLINE);
    let stopping = stop(&sandbox.tracker, &played.service, &grace);
    let releasing = async {
        // Asked, so watched; the main process ignores SIGTERM as well and has to be released too.
        while other.info(&played.service).unwrap().state == zinit_tracker::tracker::ServiceState::Up {
            tokio::task::yield_now().await;
        }
        other.release(played.child.id().unwrap()).unwrap()
    };
    let waiting = other.wait_empty(&played.service);
    let (report, released, waited) = tokio::join!(stopping, releasing, waiting);
    waited.unwrap();
    let report = report.unwrap();
    assert!(report.proven, "{report:#?}");
    assert_eq!(report.kill_rounds, 0);
    assert!(released.iter().any(|member| member.pid == kept));
    assert_eq!(survivors(&played.marker).len(), 2);
    zinit_tests::kill_all(&played.marker, DEADLINE).unwrap();
    played.child.wait().await.unwrap();
    drop(other);
    sandbox.close();
}

#[tokio::test]
async fn the_main_process_is_the_one_that_was_spawned_last() {
    let sandbox = Sandbox::new();
    let service = sandbox.tracker.register("respawned").unwrap();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut pids = Vec::new();
    for _ in 0..2 {
        let mut command = actor::<&str>("rest", [], &marker).into();
        let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
        let main = sandbox.tracker.info(&service).unwrap().main.unwrap();
        assert_eq!(Some(main.tgid), child.id());
        pids.push(main.tgid);
        child.kill().await.unwrap();
        sandbox.tracker.wait_empty(&service).await.unwrap();
    }
    assert_ne!(pids[0], pids[1]);
    sandbox.close();
}

#[tokio::test]
async fn an_adoption_does_not_take_back_what_was_released() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut children = Vec::new();
    for _ in 0..2 {
        let mut ready = Ready::new().unwrap();
        let mut command = actor("chain", ["3"], &marker);
        ready.attach(&mut command);
        children.push(command.spawn().unwrap());
        ready.wait().unwrap();
    }
    let service = sandbox.tracker.register("twice").unwrap();
    let first = sandbox.tracker.adopt(&service, children[0].id()).unwrap();
    let leaf = first.members.last().unwrap().pid;
    assert_eq!(sandbox.tracker.release(leaf).unwrap().len(), 1);
    let both = sandbox.tracker.adopt(&service, children[1].id()).unwrap();
    assert_eq!(both.members.len(), 7);
    assert!(both.members.iter().all(|member| member.pid != leaf));
    stop(&sandbox.tracker, &service, &policy(DEADLINE)).await.unwrap();
    let left: Vec<_> = survivors(&marker).iter().map(|left| left.pid).collect();
    assert_eq!(left, [i32::try_from(leaf).unwrap()]);
    for mut child in children {
        child.wait().unwrap();
    }
    sandbox.close();
}

#[tokio::test]
async fn a_hook_whose_link_is_gone_is_attached_again_and_makes_a_service_unproven() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("child", [""; 0]);
    let link = sandbox.pins().join("v2/links/zinit_exec");
    std::fs::remove_file(&link).unwrap();
    let report = stop(&sandbox.tracker, &played.service, &policy(DEADLINE))
        .await
        .unwrap();
    assert!(!report.proven);
    assert_eq!(report.doubts, [Doubt::Unwatched]);
    assert!(link.exists());
    assert_eq!(survivors(&played.marker), []);
    played.child.wait().await.unwrap();
    sandbox.close();
}

#[tokio::test]
async fn a_thousand_sessions_are_stopped_and_a_released_one_lives_on() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("sessions", ["1000"]);
    sandbox.assert_map_matches_oracle(&played);
    let some = sandbox.tracker.processes(&played.service).unwrap()[500].pid;
    assert_eq!(sandbox.tracker.release(some).unwrap().len(), 1);
    let report = stop(&sandbox.tracker, &played.service, &policy(DEADLINE))
        .await
        .unwrap();
    assert!(report.proven && report.processes.len() >= 1000, "{report:#?}");
    println!("1,000 processes stopped in {:?}", report.elapsed);
    assert_eq!(survivors(&played.marker).len(), 1);
    zinit_tests::kill_all(&played.marker, DEADLINE).unwrap();
    played.child.wait().await.unwrap();
    sandbox.close();
}

#[tokio::test]
async fn what_a_nested_service_cannot_prove_the_outer_one_cannot_either() {
    // Books for six: the tool, the actor and four of its children; the others are lost to the inner service.
    let sandbox = Sandbox::with_capacity(6);
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut ready = Ready::new().unwrap();
    let mut inner = actor("sessions", ["10"], &marker);
    ready.attach(&mut inner);
    let service = sandbox.tracker.register("outer").unwrap();
    let mut command = tokio::process::Command::new(zinit_tests::tool());
    command
        .arg("--pins")
        .arg(sandbox.pins())
        .args(["run", "--name", "inner", "--grace", "200ms", "--"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .stderr(Stdio::null());
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    ready.wait().unwrap();
    let tool = i32::try_from(child.id().unwrap()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(tool), Signal::SIGTERM).unwrap();
    child.wait().await.unwrap();
    assert!(matches!(
        sandbox.tracker.find("tool/inner"),
        Err(TrackerError::UnknownService(_))
    ));
    let info_lost = sandbox.tracker.info(&service).unwrap().lost;
    let report = stop(&sandbox.tracker, &service, &policy(DEADLINE)).await.unwrap();
    assert!(!report.proven);
    assert!(
        matches!(report.doubts[..], [Doubt::LostOperations { .. }]),
        "{report:#?}"
    );
    assert!(info_lost > 0, "the books were large enough, so this shows nothing");
    assert_eq!(
        survivors(&marker),
        [],
        "what the books did not have is found by other signs"
    );
}
