//! Services under a supervisor: every way of life and of stopping them, against real processes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use nix::sys::signal::Signal;
use tokio::task::JoinSet;
use zinit_tests::{
    Cleanup, Marker, TestCgroup, is_listened_on, members, port_is_free, sandbox::DEADLINE, supervised::Supervised,
    survivors,
};
use zinit_tracker::{
    StopReport,
    stop::Fate,
    supervisor::{
        Definition, KeepPattern, KillMode, Limit, LogMode, RestartLimit, RestartWhen, State, SupervisorError, Target,
    },
};

const SOON: Duration = Duration::from_millis(300);

fn sh(script: &str) -> Definition {
    Definition {
        shutdown_timeout: DEADLINE,
        kill_after: DEADLINE,
        ..Definition::new(["sh", "-c", script])
    }
}

/// A service that rests.
fn resting() -> Definition {
    sh("exec sleep 120")
}

fn after(mut definition: Definition, dependencies: &[&str]) -> Definition {
    definition.after = dependencies.iter().map(|name| (*name).to_owned()).collect();
    definition
}

fn was_killed(report: &StopReport) -> bool {
    // Behind a gate nobody needs to be sent a signal.
    let killed = |process: &zinit_tracker::stop::StoppedProcess| {
        process.fate == Some(Fate::Killed(9)) || process.signals.iter().any(|sent| sent.signal == Signal::SIGKILL)
    };
    report.kill_rounds > 0 && report.processes.iter().any(killed)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Waits until the file satisfies the condition.
async fn until_file(path: &Path, wanted: impl Fn(&str) -> bool) -> String {
    let waiting = async {
        loop {
            let text = read(path);
            if wanted(&text) {
                return text;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, waiting)
        .await
        .unwrap_or_else(|_| panic!("{} is not as it should be: {:?}", path.display(), read(path)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_comes_up_and_goes_down_and_the_answer_is_the_proof() {
    let supervised = Supervised::new().await;
    supervised.play("web", "rest", &[], |_| {}).await;
    let status = supervised.until_state("web", State::Running).await;
    assert_eq!(status.target, Target::Up);
    let pids: Vec<_> = members(&supervised.marker)
        .iter()
        .map(|member| member.pid.cast_unsigned())
        .collect();
    assert_eq!(pids, [status.pid]);
    let report = supervised.stop("web").await;
    supervised.assert_nothing_left();
    assert!(!was_killed(&report));
    let status = supervised.status("web").await;
    assert_eq!(
        (status.state.to_string().as_str(), status.target),
        ("Error(killed by SIGTERM)", Target::Down)
    );
    let report = supervised.close().await;
    assert_eq!((report.stopped, report.overdue), (vec!["web".to_owned()], Vec::new()));
}

/// Has an actor play a service, compares the books with the oracle, and stops it.
async fn check(behaviour: &str, args: &[&str], patience: Duration, restless: bool) -> StopReport {
    let supervised = Supervised::new().await;
    let definition = |definition: &mut Definition| {
        definition.shutdown_timeout = patience;
        definition.restart.when = RestartWhen::Never;
    };
    supervised.play("actor", behaviour, args, definition).await;
    if !restless {
        let info = supervised.sandbox.tracker.find("actor").unwrap();
        let oracle: BTreeSet<_> = members(&supervised.marker)
            .iter()
            .map(|member| (member.pid, member.start_time_ticks))
            .collect();
        assert_eq!(supervised.sandbox.in_map(&info.handle()), oracle);
    }
    let report = supervised.stop("actor").await;
    supervised.assert_nothing_left();
    supervised.close().await;
    report
}

/// One test for each behaviour that ends when it is asked to, and for each that has to be killed.
macro_rules! escapes {
    ($($name:ident: $behaviour:literal $args:expr, $ending:ident;)+) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                escapes!(@ $ending, $behaviour, $args);
            }
        )+
    };
    (@ asked, $behaviour:literal, $args:expr) => {
        assert!(!was_killed(&check($behaviour, &$args, DEADLINE, false).await));
    };
    (@ killed, $behaviour:literal, $args:expr) => {
        assert!(was_killed(&check($behaviour, &$args, SOON, false).await));
    };
    (@ restless, $behaviour:literal, $args:expr) => {
        assert!(was_killed(&check($behaviour, &$args, SOON, true).await));
    };
}

escapes! {
    a_child_is_stopped: "child" [], asked;
    a_child_in_a_session_of_its_own_is_stopped: "setsid" [], asked;
    a_child_in_a_group_of_its_own_is_stopped: "setpgid" [], asked;
    a_daemon_is_stopped: "double-fork" [], asked;
    a_stopped_child_is_stopped: "stopped" [], asked;
    two_hundred_children_in_as_many_sessions_are_stopped: "sessions" ["200"], asked;
    a_hundred_generations_are_stopped: "chain" ["100"], asked;
    a_fork_from_a_thread_is_stopped: "thread-fork" [], asked;
    a_child_by_vfork_is_stopped: "vfork" [], asked;
    a_child_by_posix_spawn_is_stopped: "posix-spawn" [], asked;
    a_child_by_clone_parent_is_stopped: "clone-parent" [], asked;
    a_nested_subreaper_is_stopped: "subreaper" [], asked;
    a_child_with_a_cleared_environment_is_stopped: "clear-env" ["MARKER"], asked;
    namespaces_are_stopped: "namespaces" [], asked;
    a_main_process_that_ignores_sigterm_is_killed: "ignore-term" [], killed;
    grandchildren_that_ignore_sigterm_are_killed: "ignore-term-grandchildren" [], killed;
    a_fork_on_sigterm_is_killed: "fork-on-term" [], killed;
    a_pid_namespace_is_killed: "pid-namespace" [], killed;
    a_chain_that_never_rests_is_killed: "refork-chain" [], restless;
    a_fork_storm_is_killed: "storm" ["500"], restless;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_in_another_cgroup_is_stopped() {
    let cgroup = TestCgroup::new(&format!("zinit-test-supervisor-{}", std::process::id())).unwrap();
    let Some(cgroup) = cgroup else {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI must have a writable cgroup v2 hierarchy"
        );
        println!("SKIPPED: this machine has no writable cgroup v2 hierarchy");
        return;
    };
    check("cgroup-move", &[cgroup.path().to_str().unwrap()], DEADLINE, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_has_its_whole_shutdown_timeout() {
    let supervised = Supervised::new().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ended");
    supervised
        .play("slow", "slow-term", &[file.to_str().unwrap(), "1500"], |_| {})
        .await;
    let report = supervised.stop("slow").await;
    assert!(!was_killed(&report), "{report:#?}");
    assert!(file.exists(), "it ended by itself");
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stop_signal_is_the_defined_one_and_may_go_to_the_main_process_only() {
    let supervised = Supervised::new().await;
    supervised
        .play("web", "setsid", &[], |definition| {
            definition.stop_signal = Signal::SIGINT;
            definition.kill_mode = KillMode::Main;
            definition.shutdown_timeout = SOON;
        })
        .await;
    let main = supervised.until_state("web", State::Running).await.pid;
    let report = supervised.stop("web").await;
    for process in &report.processes {
        let asked = process.signals.iter().any(|sent| sent.signal == Signal::SIGINT);
        assert_eq!(asked, process.pid == main, "{report:#?}");
    }
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_frees_the_port_before_the_service_starts_again() {
    let supervised = Supervised::new().await;
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let listening = async || {
        while !is_listened_on(port).unwrap() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    // Without whom to tell that it is ready: that was heard once, and the actor fails when nobody hears it.
    supervised
        .monitor("web", supervised.actor("tcp", &[&port.to_string()]))
        .await;
    let mut pid = supervised.until_state("web", State::Running).await.pid;
    for _ in 0..10 {
        tokio::time::timeout(DEADLINE, listening()).await.unwrap();
        let report = supervised.handle.restart("web").await.unwrap();
        assert!(report.proven, "{report:#?}");
        let status = supervised
            .until("web", |status| status.state == State::Running && status.pid != pid)
            .await;
        pid = status.pid;
    }
    tokio::time::timeout(DEADLINE, listening()).await.unwrap();
    assert_eq!(
        supervised.until_state("web", State::Running).await.pid,
        pid,
        "it was started once a restart"
    );
    supervised.stop("web").await;
    assert!(port_is_free(port).unwrap());
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_outlives_its_main_process_is_gone_before_the_restart() {
    let supervised = Supervised::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (daemon, log) = (dir.path().join("daemon"), dir.path().join("log"));
    let script = format!(
        r#"if [ -e {daemon} ]; then
            # Dead, but not reaped by whoever got it, is gone too.
            stat=$(cat /proc/$(cat {daemon})/stat 2>/dev/null)
            case $stat in ''|*") Z "*) echo gone >>{log};; *) echo alive >>{log};; esac
        fi
        (setsid sh -c 'echo $$ >{daemon}.new; mv {daemon}.new {daemon}; echo up >>{log}; exec sleep 120' &)
        while ! [ "$(tail -n 1 {log})" = up ]; do sleep 0.01; done
        exit 1"#,
        daemon = daemon.display(),
        log = log.display(),
    );
    let mut definition = sh(&script);
    definition.restart.delay = Duration::from_millis(10);
    definition.restart.max_delay = Duration::from_millis(10);
    supervised.monitor("web", definition).await;
    let text = until_file(&log, |text| text.lines().filter(|line| *line == "gone").count() >= 5).await;
    assert!(!text.contains("alive"), "{text}");
    supervised.stop("web").await;
    supervised.assert_nothing_left();
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_exits_is_restarted_after_two_seconds() {
    let supervised = Supervised::new().await;
    supervised.monitor("web", sh("exit 3")).await;
    let status = supervised
        .until("web", |status| status.state.to_string() == "Error(exited 3)")
        .await;
    assert_eq!(status.target, Target::Up);
    let starts = || {
        supervised
            .lines()
            .iter()
            .filter(|line| line.contains("[start]"))
            .count()
    };
    let began = std::time::Instant::now();
    let again = async {
        while starts() < 2 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, again).await.unwrap();
    println!(
        "restarted {:.2} s after the state was seen",
        began.elapsed().as_secs_f64()
    );
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_oneshot_keeps_what_it_started_until_it_is_stopped_or_run_again() {
    let supervised = Supervised::new().await;
    supervised
        .play("setup", "double-fork-orphan", &[], |definition| {
            definition.oneshot = true
        })
        .await;
    let status = supervised.until_state("setup", State::Success).await;
    assert_eq!((status.pid, status.target), (0, Target::Up));
    let first = members(&supervised.marker);
    assert_eq!(first.len(), 1, "the daemon lives");
    // The FIFO is gone by now, which the actor does not mind: it then fails, but only after it has its daemon.
    supervised.handle.start("setup").await.unwrap();
    supervised.until("setup", |status| status.state != State::Success).await;
    let second = members(&supervised.marker);
    assert!(
        first.is_disjoint(&second),
        "the first daemon was stopped before the second run"
    );
    supervised.stop("setup").await;
    supervised.assert_nothing_left();
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_command_decides_when_a_service_runs_and_belongs_to_it() {
    let supervised = Supervised::new().await;
    let dir = tempfile::tempdir().unwrap();
    let (tested, go) = (dir.path().join("tested"), dir.path().join("go"));
    let mut definition = resting();
    let test = format!("echo . >>{}; test -e {}", tested.display(), go.display());
    definition.test = Some(["sh", "-c", &test].map(str::to_owned).to_vec());
    supervised.monitor("web", definition).await;
    supervised.monitor("needs-web", after(resting(), &["web"])).await;
    until_file(&tested, |text| text.len() >= 4).await;
    assert_eq!(supervised.status("web").await.state, State::Spawned);
    assert_eq!(supervised.status("needs-web").await.state, State::Blocked);
    std::fs::write(&go, "").unwrap();
    supervised.until_state("web", State::Running).await;
    supervised.until_state("needs-web", State::Running).await;
    // A test that hangs goes with its service.
    let mut definition = resting();
    let hanging = dir.path().join("hanging");
    let test = format!("echo $$ >{}; exec setsid sleep 120", hanging.display());
    definition.test = Some(["sh", "-c", &test].map(str::to_owned).to_vec());
    supervised.monitor("hangs", definition).await;
    until_file(&hanging, |text| text.ends_with('\n')).await;
    let report = supervised.stop("hangs").await;
    assert!(report.processes.len() >= 2, "{report:#?}");
    supervised.close().await;
    assert!(!read(&tested).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_that_cannot_be_executed_shows_and_what_cannot_be_started_fails() {
    let supervised = Supervised::new().await;
    let mut definition = resting();
    definition.test = Some(vec!["/no/such/test".to_owned()]);
    supervised.monitor("untestable", definition).await;
    supervised.until_state("untestable", State::TestFailure).await;
    supervised
        .monitor("missing", Definition::new(["/no/such/program"]))
        .await;
    supervised.until_state("missing", State::Failure).await;
    let mut nobody = resting();
    nobody.user = Some("no such user".to_owned());
    supervised.monitor("nobody", nobody).await;
    supervised.until_state("nobody", State::Failure).await;
    let lines = supervised.lines();
    for reason in ["/no/such/program", "there is no user", "/no/such/test"] {
        assert!(
            lines.iter().any(|line| line.contains(reason)),
            "{reason} is not in {lines:#?}"
        );
    }
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_while_blocked_takes_the_wish_back() {
    let supervised = Supervised::new().await;
    supervised.monitor("web", after(resting(), &["database"])).await;
    let status = supervised.until_state("web", State::Blocked).await;
    assert_eq!(status.after["database"], State::Unknown);
    supervised.stop("web").await;
    supervised.monitor("database", resting()).await;
    supervised.until_state("database", State::Running).await;
    let status = supervised.status("web").await;
    assert_eq!(
        (status.state, status.target, status.pid),
        (State::Unknown, Target::Down, 0)
    );
    // And a start finds the dependency met.
    supervised.handle.start("web").await.unwrap();
    supervised.until_state("web", State::Running).await;
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dependency_on_an_unknown_service_blocks_until_that_is_monitored() {
    let supervised = Supervised::new().await;
    supervised.monitor("web", after(resting(), &["database"])).await;
    supervised.until_state("web", State::Blocked).await;
    let mut oneshot = sh("exit 0");
    oneshot.oneshot = true;
    supervised.monitor("database", oneshot).await;
    let status = supervised.until_state("web", State::Running).await;
    assert_eq!(status.after["database"], State::Success);
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_in_the_restart_gap_ends_it() {
    let supervised = Supervised::new().await;
    let mut definition = sh("echo run; exit 3");
    definition.restart.delay = DEADLINE;
    definition.restart.max_delay = DEADLINE;
    supervised.monitor("web", definition).await;
    supervised
        .until("web", |status| {
            matches!(status.state, State::Error(_)) && status.pid == 0
        })
        .await;
    supervised.stop("web").await;
    assert_eq!(supervised.status("web").await.target, Target::Down);
    supervised.handle.forget("web").await.unwrap();
    assert_eq!(
        supervised.lines().iter().filter(|line| line.ends_with("run")).count(),
        1
    );
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_during_a_start_is_answered_when_it_is_proven() {
    let supervised = Supervised::new().await;
    // A start that takes as long as somebody holds the lock of the books.
    let lock = std::fs::File::open(supervised.sandbox.pins()).unwrap();
    lock.lock().unwrap();
    supervised.monitor("web", sh("echo run; exec sleep 120")).await;
    supervised.until("web", |status| status.target == Target::Up).await;
    let handle = supervised.handle.clone();
    let stop = tokio::spawn(async move { handle.stop("web").await });
    supervised.until("web", |status| status.target == Target::Down).await;
    assert!(!stop.is_finished());
    let error = supervised.handle.forget("web").await.unwrap_err();
    assert!(matches!(error, SupervisorError::ServiceIsUp { .. }), "{error}");
    drop(lock);
    let report = stop.await.unwrap().unwrap();
    assert!(report.proven, "{report:#?}");
    supervised.assert_nothing_left();
    assert_eq!(supervised.status("web").await.pid, 0);
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_come_together_are_all_answered_and_the_last_wish_counts() {
    let supervised = Supervised::new().await;
    supervised.monitor("web", resting()).await;
    for round in 0..20 {
        let handle = &supervised.handle;
        // In the order in which they are polled; the service may be starting, up, or being stopped.
        let (first, second, started, third, restarted) = tokio::join!(
            handle.stop("web"),
            handle.stop("web"),
            handle.start("web"),
            handle.stop("web"),
            handle.restart("web"),
        );
        for report in [first.unwrap(), second.unwrap(), third.unwrap(), restarted.unwrap()] {
            assert!(report.proven, "{report:#?}");
        }
        started.unwrap();
        supervised.until("web", |status| status.target == Target::Up).await;
        if round % 2 == 0 {
            supervised.until_state("web", State::Running).await;
            assert_eq!(survivors(&supervised.marker).len(), 1);
        }
        let (started, stopped, forgotten) = tokio::join!(handle.start("web"), handle.stop("web"), handle.forget("web"));
        started.unwrap();
        assert!(stopped.unwrap().proven);
        supervised.assert_nothing_left();
        match forgotten {
            // It came while the stop was under way, or it came too late for that.
            Err(SupervisorError::ServiceIsUp { .. }) => handle.forget("web").await.unwrap(),
            forgotten => forgotten.unwrap(),
        }
        handle.monitor("web").await.unwrap();
    }
    supervised.stop("web").await;
    supervised.handle.forget("web").await.unwrap();
    let (stopped, forgotten) = tokio::join!(supervised.handle.stop("web"), supervised.handle.forget("web"));
    assert!(matches!(stopped, Err(SupervisorError::ServiceNotFound { .. })));
    assert!(matches!(forgotten, Err(SupervisorError::ServiceNotFound { .. })));
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_monitored_once_and_forgotten_when_it_is_down() {
    let supervised = Supervised::new().await;
    let handle = &supervised.handle;
    let error = handle.monitor("web").await.unwrap_err();
    assert!(matches!(error, SupervisorError::ServiceNotFound { .. }), "{error}");
    supervised.monitor("web", resting()).await;
    let error = handle.monitor("web").await.unwrap_err();
    assert!(
        matches!(error, SupervisorError::ServiceAlreadyMonitored { .. }),
        "{error}"
    );
    supervised.until_state("web", State::Running).await;
    let error = handle.forget("web").await.unwrap_err();
    assert!(matches!(error, SupervisorError::ServiceIsUp { .. }), "{error}");
    supervised.stop("web").await;
    handle.stop("web").await.expect("a second stop is no error");
    let error = handle.kill("web", Signal::SIGTERM).await.unwrap_err();
    assert!(matches!(error, SupervisorError::ServiceIsDown { .. }), "{error}");
    handle.forget("web").await.unwrap();
    assert!(handle.list().await.unwrap().is_empty());
    supervised.monitor("web", resting()).await;
    supervised.until_state("web", State::Running).await;
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_signals_the_main_process_only() {
    let supervised = Supervised::new().await;
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let script = format!(
        "sh -c 'trap \"echo child >>{log}\" USR1; echo up >>{log}; while :; do sleep 0.05; done' &
        trap 'echo main >>{log}' USR1; while :; do sleep 0.05; done",
        log = log.display()
    );
    supervised.monitor("web", sh(&script)).await;
    until_file(&log, |text| text.contains("up")).await;
    // Its child may be there before it is known to be.
    supervised.until_state("web", State::Running).await;
    supervised.handle.kill("web", Signal::SIGUSR1).await.unwrap();
    let text = until_file(&log, |text| text.contains("main")).await;
    assert!(!text.contains("child"), "{text}");
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stats_count_every_descendant() {
    let supervised = Supervised::new().await;
    supervised.play("web", "sessions", &["7"], |_| {}).await;
    let main = supervised.until_state("web", State::Running).await.pid;
    let stats = supervised.handle.stats("web").await.unwrap();
    assert_eq!((stats.pid, stats.children.len()), (main, 7), "{stats:#?}");
    assert!(
        stats.memory_usage > 0 && stats.children.iter().all(|child| child.memory_usage > 0),
        "{stats:#?}"
    );
    supervised.monitor("busy", sh("while :; do :; done")).await;
    supervised.until_state("busy", State::Running).await;
    let busy = async {
        while supervised.handle.stats("busy").await.unwrap().cpu_usage < 1.0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, busy).await.unwrap();
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cycle_is_reported_and_does_not_hang_the_shutdown() {
    let supervised = Supervised::new().await;
    supervised.monitor("a", after(resting(), &["b"])).await;
    supervised.monitor("on-the-way", after(resting(), &["a"])).await;
    supervised.until_state("a", State::Blocked).await;
    supervised.monitor("b", after(resting(), &["a"])).await;
    let cycle = |status: &zinit_tracker::supervisor::Status| status.state.to_string();
    let status = supervised.until("a", |status| cycle(status).contains("cycle")).await;
    assert_eq!(cycle(&status), "Error(dependency cycle: a → b → a)");
    supervised
        .until("on-the-way", |status| cycle(status).contains("cycle"))
        .await;
    // Once it is broken, the others start.
    supervised.stop("b").await;
    supervised.handle.forget("b").await.unwrap();
    supervised.until_state("a", State::Blocked).await;
    supervised.monitor("b", resting()).await;
    supervised.until_state("on-the-way", State::Running).await;
    // Whoever makes one that runs already only shows it at its next start, and goes down with the others.
    supervised.define("b", after(resting(), &["on-the-way"]));
    let reloaded = supervised.handle.reload().await.unwrap();
    assert_eq!(reloaded.changed, ["b"]);
    assert_eq!(supervised.status("b").await.state, State::Running);
    let report = supervised.close().await;
    assert_eq!((report.stopped.len(), report.overdue.len()), (3, 0), "{report:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_takes_in_what_is_new_and_holds_what_has_changed_for_the_next_start() {
    let supervised = Supervised::new().await;
    supervised.monitor("web", sh("echo one; exec sleep 120")).await;
    supervised.until_state("web", State::Running).await;
    supervised.monitor("gone", resting()).await;
    supervised.handle.delete("gone").await.unwrap();
    supervised.define("web", sh("echo two; exec sleep 120"));
    let file = serde_json::json!({ "exec": "exec sleep 120" });
    supervised.handle.create("new", file).await.unwrap();
    assert_eq!(
        supervised.handle.get("new").await.unwrap()["exec"],
        "sh -c exec sleep 120"
    );
    let reloaded = supervised.handle.reload().await.unwrap();
    assert_eq!(
        (reloaded.added, reloaded.changed, reloaded.missing),
        (vec!["new".to_owned()], vec!["web".to_owned()], vec!["gone".to_owned()])
    );
    supervised.until_state("new", State::Running).await;
    supervised.handle.restart("web").await.unwrap();
    let lines = || supervised.lines().join("\n");
    let printed = async {
        while !lines().contains("web: two") {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, printed).await.unwrap();
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_service_keeps_survives_its_stop() {
    let supervised = Supervised::new().await;
    let kept = Marker::new();
    let _cleanup = Cleanup::new(&kept);
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let script = format!(
        "(setsid env {}={kept} sh -c 'sleep 119 & echo up >>{log}; exec sleep 121' &); sleep 118 & echo up >>{log}; exec sleep 120",
        Marker::ENV,
        log = log.display()
    );
    let mut definition = sh(&script);
    definition.exec = ["sh", "-c", &script].map(str::to_owned).to_vec();
    definition.keep = vec![KeepPattern::new("sle*p").unwrap()];
    supervised.monitor("tmux", definition).await;
    until_file(&log, |text| text.lines().count() == 2).await;
    // Every process is a `sleep` by now, or soon; the main process is never kept.
    let main = supervised.until_state("tmux", State::Running).await.pid;
    let all_sleep = async {
        loop {
            let info = supervised.sandbox.tracker.find("tmux").unwrap();
            let members = supervised.sandbox.tracker.processes(&info.handle()).unwrap();
            if members.len() == 4 && members.iter().all(|member| member.comm == "sleep") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, all_sleep).await.unwrap();
    let report = supervised.stop("tmux").await;
    let stopped: Vec<_> = report.processes.iter().map(|process| process.pid).collect();
    assert_eq!(stopped, [main]);
    assert_eq!(survivors(&kept).len(), 2, "they were kept");
    assert_eq!(survivors(&supervised.marker).len(), 1, "and so was this one");
    for marker in [&kept, &supervised.marker] {
        zinit_tests::kill_all(marker, DEADLINE).unwrap();
    }
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_runs_as_the_user_with_the_limits_that_are_defined() {
    let supervised = Supervised::new().await;
    let user = nix::unistd::User::from_name("daemon")
        .unwrap()
        .expect("every system has it");
    let script = "echo uid $(id -u); echo gid $(id -g); echo groups $(id -G); echo user $USER; echo files $(ulimit -n) \
        $(ulimit -Hn); echo session $$ $(cut -d' ' -f6 /proc/self/stat); pwd; echo $OWN";
    let mut definition = sh(script);
    definition.oneshot = true;
    definition.user = Some("daemon".to_owned());
    definition.dir = "/usr".into();
    definition.env.insert("OWN".to_owned(), "variable".to_owned());
    definition.limits = vec![Limit {
        resource: nix::sys::resource::Resource::RLIMIT_NOFILE,
        soft: 77,
        hard: 99,
    }];
    supervised.monitor("user", definition.clone()).await;
    definition.user = None;
    definition.group = Some("4321".to_owned());
    supervised.monitor("group", definition).await;
    supervised.until_state("user", State::Success).await;
    supervised.until_state("group", State::Success).await;
    supervised.stop("user").await;
    supervised.stop("group").await;
    let lines = supervised.lines();
    let has = |line: &str| assert!(lines.iter().any(|found| found == line), "{line:?} is not in {lines:#?}");
    has(&format!("[+] user: uid {}", user.uid));
    has(&format!("[+] user: gid {}", user.gid));
    has(&format!("[+] user: groups {}", user.gid));
    has("[+] user: user daemon");
    has("[+] user: files 77 99");
    has("[+] user: /usr");
    has("[+] user: variable");
    has("[+] group: uid 0");
    has("[+] group: gid 4321");
    has("[+] group: groups 4321");
    let session = lines
        .iter()
        .find_map(|line| line.strip_prefix("[+] user: session "))
        .unwrap();
    let (pid, session) = session.split_once(' ').unwrap();
    assert_eq!(pid, session, "it leads a session of its own");
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn output_goes_where_it_should() {
    let supervised = Supervised::new().await;
    let mut quiet = sh("echo quiet; echo loud >&2");
    quiet.oneshot = true;
    let mut loud = quiet.clone();
    quiet.log = LogMode::None;
    loud.log = LogMode::Ring;
    supervised.monitor("quiet", quiet).await;
    supervised.monitor("loud", loud).await;
    for name in ["quiet", "loud"] {
        supervised.until_state(name, State::Success).await;
        supervised.stop(name).await;
    }
    let mut lines = supervised.lines();
    lines.retain(|line| !line.contains("[start]"));
    lines.sort();
    assert_eq!(lines, ["[+] loud: quiet", "[-] loud: loud"]);
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn too_many_restarts_are_a_failure_until_someone_starts_it() {
    let supervised = Supervised::new().await;
    let mut definition = sh("echo run; exit 1");
    definition.restart.delay = Duration::from_millis(1);
    definition.restart.max_delay = Duration::from_millis(5);
    definition.restart.limit = Some(RestartLimit {
        restarts: 3,
        window: DEADLINE,
    });
    supervised.monitor("web", definition).await;
    supervised.until_state("web", State::Failure).await;
    let runs = || {
        supervised
            .lines()
            .iter()
            .filter(|line| line.ends_with("web: run"))
            .count()
    };
    // A line can come a moment after the end of who has printed it.
    let reached = async |count| {
        let reached = async {
            while runs() < count {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(DEADLINE, reached).await.unwrap();
        assert_eq!(runs(), count);
    };
    reached(4).await;
    supervised.handle.start("web").await.unwrap();
    reached(8).await;
    supervised.until_state("web", State::Failure).await;
    supervised.close().await;
}

/// A cgroup v1 freezer, thawed and removed when it is dropped.
struct Freezer(std::path::PathBuf);

impl Freezer {
    /// `None` where the machine has no writable v1 freezer; says so.
    fn new(test: &str) -> Option<Self> {
        let path = format!("/sys/fs/cgroup/freezer/zinit-test-{test}-{}", std::process::id());
        if std::fs::create_dir(&path).is_err() {
            assert!(
                std::env::var_os("CI").is_none(),
                "CI must have a writable cgroup v1 freezer"
            );
            println!("SKIPPED: this machine has no writable cgroup v1 freezer");
            return None;
        }
        Some(Self(path.into()))
    }

    fn freeze(&self, pid: u32) {
        std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
        self.set("FROZEN");
    }

    fn set(&self, state: &str) {
        std::fs::write(self.0.join("freezer.state"), state).unwrap();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.set("THAWED");
        while let Err(error) = std::fs::remove_dir(&self.0) {
            // Dead members leave their cgroup a moment later.
            assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy, "{error}");
            std::thread::yield_now();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn survivors_are_named_in_the_answer_and_in_the_state_and_nothing_is_restarted_over_them() {
    let Some(freezer) = Freezer::new("survivors") else {
        return;
    };
    let supervised = Supervised::new().await;
    supervised
        .play("web", "child", &[], |definition| {
            definition.shutdown_timeout = Duration::ZERO;
            definition.kill_after = Duration::from_millis(500);
        })
        .await;
    let main = supervised.until_state("web", State::Running).await.pid;
    let info = supervised.sandbox.tracker.find("web").unwrap();
    let members = supervised.sandbox.tracker.processes(&info.handle()).unwrap();
    let frozen = members.iter().find(|member| member.pid != main).unwrap().pid;
    freezer.freeze(frozen);
    let error = supervised.handle.restart("web").await.unwrap_err();
    let SupervisorError::Survivors(report) = &error else {
        panic!("{error}");
    };
    assert_eq!(
        report.survivors.iter().map(|survivor| survivor.pid).collect::<Vec<_>>(),
        [frozen]
    );
    assert!(error.to_string().contains(&frozen.to_string()), "{error}");
    let status = supervised.status("web").await;
    assert!(
        status.state.to_string().contains(&format!("pid {frozen} ")),
        "{status:?}"
    );
    assert_eq!((status.pid, status.target), (0, Target::Up));
    assert_eq!(survivors(&supervised.marker).len(), 1, "nothing was started");
    let error = supervised.handle.forget("web").await.unwrap_err();
    assert!(matches!(error, SupervisorError::ServiceIsUp { .. }));
    freezer.set("THAWED");
    supervised.stop("web").await;
    supervised.assert_nothing_left();
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_goes_on_without_a_service_that_takes_too_long_and_names_who_is_left() {
    let Some(freezer) = Freezer::new("overdue") else {
        return;
    };
    let supervised = Supervised::new().await;
    supervised.monitor("base", resting()).await;
    supervised
        .play("web", "rest", &[], |definition| {
            definition.after = vec!["base".to_owned()];
            definition.shutdown_timeout = Duration::ZERO;
        })
        .await;
    let frozen = supervised.until_state("web", State::Running).await.pid;
    freezer.freeze(frozen);
    let report = tokio::time::timeout(DEADLINE, supervised.handle.shutdown())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (report.stopped, report.overdue),
        (vec!["base".to_owned()], vec!["web".to_owned()])
    );
    let left: Vec<_> = report.survivors["web"].iter().map(|survivor| survivor.pid).collect();
    assert_eq!(left, [frozen]);
    freezer.set("THAWED");
    let service = supervised.sandbox.tracker.find("web").unwrap().handle();
    tokio::time::timeout(DEADLINE, supervised.sandbox.tracker.wait_empty(&service))
        .await
        .unwrap()
        .unwrap();
    supervised.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_refuses_starts_and_gives_waiting_ones_up() {
    let supervised = Supervised::new().await;
    let dir = tempfile::tempdir().unwrap();
    let go = dir.path().join("go");
    let slow = format!(
        "trap 'while ! [ -e {} ]; do sleep 0.01; done; exit 0' TERM; while :; do sleep 0.01; done",
        go.display()
    );
    supervised.monitor("slow", sh(&slow)).await;
    supervised.until_state("slow", State::Running).await;
    supervised
        .monitor("needs-unknown", after(resting(), &["unknown"]))
        .await;
    supervised.monitor("idle", resting()).await;
    supervised.stop("idle").await;
    supervised.define("unknown", resting());
    let handle = supervised.handle.clone();
    let shutdown = tokio::spawn(async move { handle.shutdown().await });
    let refused = async {
        while !matches!(
            supervised.handle.start("idle").await,
            Err(SupervisorError::ShuttingDown { .. })
        ) {
            supervised.stop("idle").await;
        }
    };
    tokio::time::timeout(DEADLINE, refused).await.unwrap();
    let error = supervised.handle.monitor("unknown").await.unwrap_err();
    assert!(matches!(error, SupervisorError::ShuttingDown { .. }), "{error}");
    assert_eq!(supervised.status("needs-unknown").await.pid, 0);
    std::fs::write(&go, "").unwrap();
    // The second one to ask gets the same report.
    let report = supervised.close().await;
    let first = shutdown.await.unwrap().unwrap();
    assert_eq!(report.stopped, first.stopped);
    assert_eq!((report.stopped.len(), report.overdue.len()), (3, 0), "{report:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_ends_although_somebody_holds_the_lock_of_the_books() {
    let supervised = Supervised::new().await;
    supervised.play("web", "setsid", &[], |_| {}).await;
    supervised.until_state("web", State::Running).await;
    let mut starting = resting();
    starting.shutdown_timeout = SOON;
    supervised.define("starting", starting);
    let lock = std::fs::File::open(supervised.sandbox.pins()).unwrap();
    lock.lock().unwrap();
    supervised.handle.monitor("starting").await.unwrap();
    let report = supervised.shut_down(2 * DEADLINE).await;
    assert_eq!(report.stopped, ["web"]);
    drop(lock);
    // The start gets the lock at last, enters its service, and is told that it may not create a process.
    let entered = async {
        while supervised.sandbox.tracker.find("starting").is_err() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, entered).await.unwrap();
    supervised.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_kills_what_nobody_supervises_any_more() {
    let supervised = Supervised::new().await;
    let stray = supervised.sandbox.tracker.register("stray").unwrap();
    let mut command = tokio::process::Command::new("sleep");
    command.arg("120").env(Marker::ENV, supervised.marker.as_str());
    let mut child = supervised.sandbox.tracker.spawn(&stray, &mut command).unwrap();
    let report = supervised.close().await;
    assert_eq!(report.overdue, ["stray"]);
    child.wait().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_kills_what_is_nested_in_a_service_that_is_empty() {
    let supervised = Supervised::new().await;
    let outer = supervised.sandbox.tracker.register("outer").unwrap();
    let mut command = tokio::process::Command::new(zinit_tests::tool());
    command
        .arg("--pins")
        .arg(supervised.sandbox.pins())
        .args(["run", "--name", "inner", "--", "sleep", "120"])
        .env(Marker::ENV, supervised.marker.as_str());
    let mut child = supervised.sandbox.tracker.spawn(&outer, &mut command).unwrap();
    let inner_lives = async {
        loop {
            match supervised.sandbox.tracker.find("tool/inner") {
                Ok(info) if info.live > 0 => return,
                _ => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    };
    tokio::time::timeout(DEADLINE, inner_lives).await.unwrap();
    child.kill().await.unwrap();
    assert_eq!(supervised.sandbox.tracker.live(&outer).unwrap(), 0);
    let report = supervised.close().await;
    assert_eq!(report.overdue, ["outer"]);
    assert!(report.is_complete(), "{report:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_supervisor_left_is_stopped_before_the_start() {
    let (supervised, mut child) = Supervised::following("web", resting(), |sandbox, marker| {
        let left = sandbox.tracker.register("web").unwrap();
        let mut command = tokio::process::Command::new("sleep");
        command.arg("120").env(Marker::ENV, marker.as_str());
        sandbox.tracker.spawn(&left, &mut command).unwrap()
    })
    .await;
    let status = supervised.until_state("web", State::Running).await;
    assert!(child.try_wait().unwrap().is_some(), "it was stopped first");
    let pids: Vec<_> = survivors(&supervised.marker)
        .iter()
        .map(|survivor| survivor.pid.cast_unsigned())
        .collect();
    assert_eq!(pids, [status.pid]);
    supervised.close().await;
}

/// Its last lines and the end of its output come together, in whichever order.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_stops_are_all_answered() {
    const SERVICES: usize = 8;
    const STOPS: usize = 125;
    let supervised = Arc::new(Supervised::new().await);
    let mut running = JoinSet::new();
    for index in 0..SERVICES {
        let supervised = Arc::clone(&supervised);
        running.spawn(async move {
            let name = format!("web{index}");
            supervised.monitor(&name, sh("echo up; exec sleep 120")).await;
            for _ in 0..STOPS {
                supervised.until_state(&name, State::Running).await;
                supervised.stop(&name).await;
                supervised.handle.start(&name).await.unwrap();
            }
        });
    }
    while let Some(ended) = running.join_next().await {
        ended.unwrap();
    }
    Arc::into_inner(supervised).unwrap().close().await;
}
