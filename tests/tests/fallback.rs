//! Level `procfs` in the library: the ways out of `escapes.rs`, taken where BPF is not used. What this level can see is
//! stopped, each time with and without a cgroup of the service's own; what it cannot see is on the report's list.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeSet, os::unix::process::CommandExt as _, time::Duration};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use zinit_tests::{
    Cleanup, Marker, Ready, TestCgroup, actor, lock_is_free, members,
    orphans::GroupReaper,
    port_is_free,
    sandbox::{DEADLINE, Played, Sandbox},
    survivors,
};
use zinit_tracker::{
    Blindness, StopPolicy, StopReport, TrackerError, stop,
    stop::{Doubt, Fate},
};

fn patient() -> StopPolicy {
    StopPolicy {
        grace: DEADLINE,
        kill_timeout: DEADLINE,
        ..StopPolicy::default()
    }
}

fn impatient() -> StopPolicy {
    StopPolicy {
        grace: Duration::from_millis(300),
        ..patient()
    }
}

/// Whether the tracker finds a cgroup hierarchy to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cgroups {
    Usable,
    Unmounted,
}

impl Cgroups {
    /// Takes effect for this test's thread, and for the processes that it creates.
    fn set(self) {
        if self == Self::Usable {
            return;
        }
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            None::<&str>,
        )
        .unwrap();
        let mounts = std::fs::read_to_string("/proc/thread-self/mounts").unwrap();
        for line in mounts.lines() {
            let fields: Vec<_> = line.split(' ').collect();
            if fields[2] == "cgroup2" {
                umount2(fields[1], MntFlags::MNT_DETACH).unwrap();
            }
        }
    }
}

/// Every cgroup that trackers of this process have made for services.
fn service_cgroups() -> Vec<String> {
    let Some(cgroup) = TestCgroup::new("unused").unwrap() else {
        return Vec::new();
    };
    let prefix = format!("zinit-tracker-{}-", std::process::id());
    let entries = std::fs::read_dir(cgroup.path().parent().unwrap()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with(&prefix)).collect()
}

/// The cgroup that a tracker has made, if the process is in one.
fn service_cgroup_of(pid: u32) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let own = text
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap()
        .to_owned();
    own.contains("zinit-tracker-").then_some(own)
}

/// Plays the behaviour, compares the books with the oracle, and stops it.
async fn check(cgroups: Cgroups, behaviour: &str, args: &[&str], policy: &StopPolicy, least: usize) -> StopReport {
    cgroups.set();
    let sandbox = Sandbox::procfs();
    let mut played = sandbox.play(behaviour, args);
    sandbox.assert_map_matches_oracle(&played);
    let report = finish(&sandbox, &mut played, policy, least).await;
    assert!(cgroups == Cgroups::Usable || !report.proven, "{report:#?}");
    sandbox.close();
    report
}

async fn finish(sandbox: &Sandbox, played: &mut Played, policy: &StopPolicy, least: usize) -> StopReport {
    let report = sandbox.stop_at_level_procfs(played, policy).await;
    assert!(report.processes.len() >= least, "{report:#?}");
    report
}

/// What the report says was not seen, and that it claims no proof.
fn blind_to(report: &StopReport) -> &[Blindness] {
    assert!(!report.proven, "{report:#?}");
    match &report.doubts[..] {
        [Doubt::ProcfsTracking { blind_to }] => blind_to,
        _ => panic!("{report:#?}"),
    }
}

fn was_killed(report: &StopReport) -> bool {
    // Who is born into a service that is being killed is killed as soon as it is found, not by a round.
    let killed = report
        .processes
        .iter()
        .any(|process| process.fate == Some(Fate::Killed(9)));
    report.kill_rounds > 0 && killed
}

/// The tests of escapes.rs that this level covers, for one setting.
macro_rules! ways_out {
    ($cgroups:expr) => {
        use super::*;

        ways_out! { $cgroups, patient(), false,
            a_child: "child" [], at least 2;
            a_child_in_a_session_of_its_own: "setsid" [], at least 2;
            a_child_in_a_group_of_its_own: "setpgid" [], at least 2;
            a_daemon: "double-fork" [], at least 2;
            a_stopped_child: "stopped" [], at least 2;
            two_hundred_children_in_as_many_sessions: "sessions" ["200"], at least 201;
            a_chain_of_a_hundred_generations: "chain" ["100"], at least 100;
            a_fork_from_a_thread_whose_leader_has_exited: "thread-fork" [], at least 2;
            a_child_by_vfork: "vfork" [], at least 2;
            a_child_by_posix_spawn: "posix-spawn" [], at least 2;
            a_child_whose_parent_is_its_grandparent: "clone-parent" [], at least 2;
            a_nested_subreaper: "subreaper" [], at least 3;
            a_child_with_a_cleared_environment: "clear-env" ["MARKER"], at least 2;
            namespaces_of_all_kinds: "namespaces" [], at least 3;
        }

        ways_out! { $cgroups, impatient(), true,
            a_main_process_that_ignores_sigterm: "ignore-term" [], at least 1;
            grandchildren_in_sessions_that_ignore_sigterm: "ignore-term-grandchildren" [], at least 3;
            a_fork_on_sigterm: "fork-on-term" [], at least 2;
            a_nested_pid_namespace: "pid-namespace" [], at least 3;
        }

        #[tokio::test]
        async fn a_daemon_whose_main_process_is_gone() {
            check($cgroups, "double-fork-orphan", &[], &patient(), 1).await;
        }

        #[tokio::test]
        async fn a_chain_that_forks_itself_again_for_ever() {
            check_restless($cgroups, "refork-chain", &["8"]).await;
        }

        #[tokio::test]
        async fn a_fork_storm_of_two_hundred() {
            check_restless($cgroups, "storm", &["200"]).await;
        }

        #[tokio::test]
        async fn the_port_is_free_the_moment_stop_returns() {
            check_ports($cgroups).await;
        }

        #[tokio::test]
        async fn the_lock_is_free_the_moment_stop_returns() {
            check_locks($cgroups).await;
        }
    };
    ($cgroups:expr, $policy:expr, $killed:literal,
        $($name:ident: $behaviour:literal $args:expr, at least $least:literal;)+) => {
        $(
            #[tokio::test]
            async fn $name() {
                let report = check($cgroups, $behaviour, &$args, &$policy, $least).await;
                assert_eq!(was_killed(&report), $killed, "{report:#?}");
            }
        )+
    };
}

mod in_a_cgroup {
    ways_out!(Cgroups::Usable);
}

mod without_a_cgroup {
    ways_out!(Cgroups::Unmounted);
}

/// As `check`, for trees that never rest, of which no two lists need agree. Without a cgroup, which can be frozen, one that is
/// always a step ahead may get away, but not unsaid.
async fn check_restless(cgroups: Cgroups, behaviour: &str, args: &[&str]) {
    cgroups.set();
    let sandbox = Sandbox::procfs();
    let played = sandbox.play_as(behaviour, args, |command| {
        command.process_group(0);
    });
    let group = nix::unistd::Pid::from_raw(played.child.id().unwrap().try_into().unwrap());
    let reaper = GroupReaper::new(group);
    let report = stop(&sandbox.tracker, &played.service, &impatient()).await.unwrap();
    let left = survivors(&played.marker).len();
    println!(
        "{} processes seen, {} rounds, {left} left",
        report.processes.len(),
        report.kill_rounds
    );
    if left > 0 {
        assert_eq!(cgroups, Cgroups::Unmounted, "{report:#?}");
        assert!(blind_to(&report).contains(&Blindness::NeverAtRest), "{report:#?}");
    } else {
        assert!(report.kill_rounds > 0, "{report:#?}");
    }
    // It ends by itself.
    let ended = async {
        while !survivors(&played.marker).is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, ended).await.unwrap();
    drop(reaper);
    sandbox.close();
}

async fn check_ports(cgroups: Cgroups) {
    cgroups.set();
    let sandbox = Sandbox::procfs();
    for _ in 0..5 {
        let mut played = sandbox.play("tcp", ["0"]);
        let port = played.facts.number("port").unwrap();
        assert!(!port_is_free(port).unwrap());
        finish(&sandbox, &mut played, &patient(), 2).await;
        assert!(port_is_free(port).unwrap());
        sandbox.tracker.unregister(&played.service).unwrap();
    }
    sandbox.close();
}

async fn check_locks(cgroups: Cgroups) {
    cgroups.set();
    let sandbox = Sandbox::procfs();
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    for _ in 0..5 {
        let mut played = sandbox.play("flock", [path]);
        assert!(!lock_is_free(file.path()).unwrap());
        finish(&sandbox, &mut played, &patient(), 2).await;
        assert!(lock_is_free(file.path()).unwrap());
        sandbox.tracker.unregister(&played.service).unwrap();
    }
    sandbox.close();
}

#[tokio::test]
async fn a_child_that_moves_to_another_cgroup_is_stopped_and_voids_the_proof() {
    let cgroup = TestCgroup::new(&format!("zinit-test-procfs-{}", std::process::id())).unwrap();
    let cgroup = cgroup.expect("the tests need a writable cgroup v2 hierarchy");
    let path = cgroup.path().to_str().unwrap();
    let report = check(Cgroups::Usable, "cgroup-move", &[path], &patient(), 2).await;
    assert!(blind_to(&report).contains(&Blindness::LeftCgroup), "{report:#?}");
}

#[tokio::test]
async fn a_daemon_without_a_trace_is_found_in_the_cgroup() {
    check(Cgroups::Usable, "vanish", &["MARKER"], &patient(), 2).await;
}

#[tokio::test]
async fn a_daemon_without_a_trace_or_a_cgroup_may_get_away_and_the_report_says_so() {
    Cgroups::Unmounted.set();
    let sandbox = Sandbox::procfs();
    let mut played = sandbox.play("vanish", ["MARKER"]);
    let report = stop(&sandbox.tracker, &played.service, &patient()).await.unwrap();
    assert!(!report.proven);
    assert!(blind_to(&report).contains(&Blindness::SignsCleared), "{report:#?}");
    assert!(blind_to(&report).contains(&Blindness::BetweenLooks), "{report:#?}");
    println!("{} got away", survivors(&played.marker).len());
    played.child.wait().await.unwrap();
    sandbox.close();
}

#[tokio::test]
async fn each_service_has_a_cgroup_below_the_trackers_own_and_it_goes_with_the_service() {
    let sandbox = Sandbox::procfs();
    let mut played = sandbox.play("setsid", [""; 0]);
    let cgroup = service_cgroup_of(played.child.id().unwrap()).expect("the tests need a writable cgroup v2 hierarchy");
    let name = cgroup.rsplit('/').next().unwrap().to_owned();
    assert!(service_cgroups().contains(&name));
    finish(&sandbox, &mut played, &patient(), 2).await;
    // It can be started again, in the same cgroup.
    let mut command = actor::<&str>("rest", [], &played.marker);
    let mut ready = Ready::new().unwrap();
    ready.attach(&mut command);
    played.child = sandbox.tracker.spawn(&played.service, &mut command.into()).unwrap();
    ready.wait().unwrap();
    assert_eq!(service_cgroup_of(played.child.id().unwrap()).unwrap(), cgroup);
    finish(&sandbox, &mut played, &patient(), 1).await;
    sandbox.tracker.unregister(&played.service).unwrap();
    assert!(!service_cgroups().contains(&name));
    sandbox.close();
}

#[tokio::test]
async fn one_command_value_can_be_started_for_one_service_after_another() {
    let sandbox = Sandbox::procfs();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut command = tokio::process::Command::from(actor::<&str>("rest", [], &marker));
    for name in ["first", "second"] {
        let service = sandbox.tracker.register(name).unwrap();
        let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
        assert_eq!(sandbox.tracker.live(&service).unwrap(), 1);
        stop(&sandbox.tracker, &service, &patient()).await.unwrap();
        child.wait().await.unwrap();
        sandbox.tracker.unregister(&service).unwrap();
    }
    sandbox.close();
}

#[tokio::test]
async fn bystanders_in_the_same_session_and_group_live_on() {
    let sandbox = Sandbox::procfs();
    let bystanders = Marker::new();
    let _cleanup = Cleanup::new(&bystanders);
    let mut children: Vec<_> = (0..50)
        .map(|_| actor::<&str>("setpgid", [], &bystanders).spawn().unwrap())
        .collect();
    let mut played = sandbox.play("setpgid", [""; 0]);
    while members(&bystanders).len() < 100 {
        tokio::task::yield_now().await;
    }
    let before = members(&bystanders);
    finish(&sandbox, &mut played, &patient(), 2).await;
    assert_eq!(members(&bystanders), before);
    for child in &mut children {
        assert!(child.try_wait().unwrap().is_none(), "nobody else reaps it");
        child.kill().unwrap();
        child.wait().unwrap();
    }
    sandbox.close();
}

/// As at(1) and service managers do with the environment of whoever asks them.
#[tokio::test]
async fn who_was_handed_the_cookie_is_no_member() {
    let sandbox = Sandbox::procfs();
    let mut played = sandbox.play("setsid", [""; 0]);
    let environment = std::fs::read(format!("/proc/{}/environ", played.child.id().unwrap())).unwrap();
    let environment = String::from_utf8(environment).unwrap();
    let cookie = environment
        .split('\0')
        .find_map(|entry| entry.strip_prefix("ZINIT_TRACKER_COOKIE="));
    let bystanders = Marker::new();
    let _cleanup = Cleanup::new(&bystanders);
    // The shell is what hands it on, and has none itself.
    let mut manager = std::process::Command::new("setsid")
        .args(["sh", "-c", "ZINIT_TRACKER_COOKIE=$0 sleep 300 & wait", cookie.unwrap()])
        .env(Marker::ENV, bystanders.as_str())
        .spawn()
        .unwrap();
    let is_handed_on = || {
        let mut members = members(&bystanders).into_iter();
        members.any(|member| {
            let environment = std::fs::read(format!("/proc/{}/environ", member.pid)).unwrap();
            String::from_utf8_lossy(&environment).contains(cookie.unwrap())
        })
    };
    while members(&bystanders).len() < 2 || !is_handed_on() {
        tokio::task::yield_now().await;
    }
    let before = members(&bystanders);
    finish(&sandbox, &mut played, &patient(), 2).await;
    assert_eq!(members(&bystanders), before);
    // First: this process is a subreaper until then, and would be given an orphan with the cookie.
    sandbox.close();
    zinit_tests::kill_all(&bystanders, DEADLINE).unwrap();
    manager.wait().unwrap();
}

#[tokio::test]
async fn two_services_do_not_take_each_others_processes() {
    let sandbox = Sandbox::procfs();
    let mut one = sandbox.play("double-fork", [""; 0]);
    let mut other = sandbox.play("sessions", ["3"]);
    sandbox.assert_map_matches_oracle(&one);
    sandbox.assert_map_matches_oracle(&other);
    finish(&sandbox, &mut one, &patient(), 2).await;
    sandbox.assert_map_matches_oracle(&other);
    finish(&sandbox, &mut other, &patient(), 4).await;
    sandbox.close();
}

#[tokio::test]
async fn dead_orphans_are_reaped_while_the_service_runs() {
    let sandbox = Sandbox::procfs();
    let mut played = sandbox.play("double-fork", [""; 0]);
    let daemon = sandbox.tracker.processes(&played.service).unwrap();
    let daemon = daemon.iter().find(|member| !member.spawned).unwrap().pid;
    assert_eq!(
        parent_of(daemon),
        Some(std::process::id()),
        "this process is a subreaper"
    );
    kill_process(daemon);
    // Nobody asks the tracker anything: the thread that looks now and then does it.
    let started = std::time::Instant::now();
    while parent_of(daemon) == Some(std::process::id()) {
        assert!(started.elapsed() < DEADLINE, "the orphan is not reaped");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    finish(&sandbox, &mut played, &patient(), 1).await;
    sandbox.close();
}

/// For processes of this test that are certainly there: children of this process, or of others that do not reap.
fn kill_process(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL).unwrap();
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

#[tokio::test]
async fn a_released_subtree_survives_the_stop_and_so_do_its_children() {
    let sandbox = Sandbox::procfs();
    let mut played = sandbox.play("chain", ["4"]);
    let chain = sandbox.tracker.processes(&played.service).unwrap();
    let gone: BTreeSet<_> = sandbox
        .tracker
        .release(chain[2].pid)
        .unwrap()
        .iter()
        .map(|member| member.pid)
        .collect();
    assert!(gone.contains(&chain[2].pid) && !gone.contains(&chain[0].pid));
    let report = stop(&sandbox.tracker, &played.service, &patient()).await.unwrap();
    assert!(blind_to(&report).contains(&Blindness::Released), "{report:#?}");
    let left = survivors(&played.marker);
    let left: BTreeSet<_> = left
        .iter()
        .map(|survivor| u32::try_from(survivor.pid).unwrap())
        .collect();
    assert_eq!(left, gone);
    assert_eq!(
        service_cgroup_of(chain[2].pid),
        None,
        "it has left the service's cgroup"
    );
    played.child.wait().await.unwrap();
    sandbox.close();
}

#[tokio::test]
async fn an_adopted_tree_is_stopped_and_has_two_doubts() {
    let sandbox = Sandbox::procfs();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut ready = Ready::new().unwrap();
    let mut command = actor("sessions", ["10"], &marker);
    ready.attach(&mut command);
    let mut child = command.spawn().unwrap();
    ready.wait().unwrap();
    let service = sandbox.tracker.register("adopted").unwrap();
    let adoption = sandbox.tracker.adopt(&service, child.id()).unwrap();
    assert!(adoption.settled);
    assert_eq!(adoption.members.len(), members(&marker).len());
    for pid in [0, 1, std::process::id(), std::os::unix::process::parent_id()] {
        let refused = sandbox.tracker.adopt(&service, pid);
        assert!(
            matches!(refused, Err(TrackerError::Refused { .. })),
            "{pid}: {refused:?}"
        );
    }
    let report = stop(&sandbox.tracker, &service, &patient()).await.unwrap();
    assert!(report.doubts.contains(&Doubt::Adopted), "{report:#?}");
    assert!(
        matches!(report.doubts[..], [_, Doubt::ProcfsTracking { .. }]),
        "{report:#?}"
    );
    assert_eq!(survivors(&marker), []);
    child.wait().unwrap();
    sandbox.close();
}

#[tokio::test]
async fn waiting_for_an_empty_service_ends_with_its_last_process() {
    let sandbox = Sandbox::procfs();
    let mut played = sandbox.play("spawn-and-exit", ["3"]);
    let wait = sandbox.tracker.wait_empty(&played.service);
    let kill = async {
        for member in sandbox.tracker.processes(&played.service).unwrap() {
            kill_process(member.pid);
        }
    };
    let both = async { tokio::join!(wait, kill) };
    tokio::time::timeout(DEADLINE, both).await.unwrap().0.unwrap();
    assert_eq!(survivors(&played.marker), []);
    assert_eq!(played.child.wait().await.unwrap().code(), Some(3));
    sandbox.close();
}

#[tokio::test]
async fn events_are_not_to_be_had() {
    let sandbox = Sandbox::procfs();
    let error = sandbox.tracker.events().unwrap_err().to_string();
    assert!(error.contains("level procfs"), "{error}");
    sandbox.close();
}
