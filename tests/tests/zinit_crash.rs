//! The daemon is killed, at any moment, and another follows it: services go on as the same processes, what happened meanwhile
//! is known, and a stop is as exact as before.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use serde_json::{Value, json};
use zinit_tests::{
    Cleanup, Marker,
    daemon::{Daemon, wait_for},
    oracle::start_time_ticks,
    random::Random,
    rounds, survivors,
};
use zinit_tracker::{Config, Level, Pins, Service, Tracker, TrackerError, tracker::COOKIE};

/// A service that notes each of its starts, and has a child in a session of its own.
const SERVICE: &str = "echo \"$$\" >> \"$1\"; setsid sleep 3601 & exec sleep 3600";

/// Kills the daemon and starts another.
fn crash(daemon: &mut Daemon) {
    kill(daemon);
    daemon.run();
}

fn kill(daemon: &mut Daemon) {
    daemon.signal(Signal::KILL);
    daemon.wait();
}

/// A file in which a service notes its starts.
fn starts(daemon: &Daemon, service: &str) -> PathBuf {
    daemon.scratch().join(format!("{service}.starts"))
}

/// How often it was started.
fn count(daemon: &Daemon, service: &str) -> usize {
    fs::read_to_string(starts(daemon, service))
        .unwrap_or_default()
        .lines()
        .count()
}

/// Defines a service that runs a shell script, which gets the file of its starts as `$1`.
fn define(daemon: &Daemon, service: &str, script: &str, more: &str) {
    let path = daemon.script(&format!("{service}.sh"), script);
    let text = format!("exec: {path} {}\n{more}", starts(daemon, service).display());
    daemon.write(service, &text);
}

/// Waits until the service has its child beside the main process.
fn wait_for_child(daemon: &Daemon, service: &str) {
    wait_for("its child is there", || {
        let stats = daemon.json(&["stats", service, "--json"]);
        stats["children"].as_array().unwrap().len() == 1
    });
}

fn state_file(daemon: &Daemon, service: &str) -> PathBuf {
    daemon
        .state_directory()
        .join("services")
        .join(format!("{service}.json"))
}

/// Waits until a process is dead: reaped, or a zombie of whoever does not reap it.
fn wait_until_dead(pid: u64) {
    wait_for(&format!("{pid} is dead"), || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ")
            .next()
            .is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
    });
}

fn end(pid: u64, signal: Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_send_signal(&pidfd, signal).unwrap();
}

#[test]
fn services_go_on_as_the_same_processes() {
    let mut daemon = Daemon::prepare(&[]);
    define(&daemon, "db", SERVICE, "");
    define(&daemon, "web", SERVICE, "test: \"true\"\nafter: [db]\n");
    define(&daemon, "once", "echo x >> \"$1\"", "oneshot: true\n");
    define(&daemon, "later", SERVICE, "after: [once]\n");
    define(&daemon, "down", SERVICE, "");
    define(&daemon, "gone", "exit 3", "restart: {policy: never}\n");
    define(&daemon, "blocked", SERVICE, "after: [nobody]\n");
    daemon.run();
    for service in ["db", "web", "later", "down"] {
        daemon.wait_for_state(service, "Running");
        wait_for_child(&daemon, service);
    }
    daemon.wait_for_state("once", "Success");
    daemon.wait_for_state("gone", "Error(exited 3)");
    daemon.does(&["stop", "down"]);
    let before = daemon.json(&["list", "--json"]);
    assert_eq!(before["blocked"], "Blocked", "{before}");
    let names: Vec<_> = before.as_object().unwrap().keys().cloned().collect();
    let statuses = |daemon: &Daemon| -> BTreeMap<String, Value> {
        let status = |name: &String| (name.clone(), daemon.json(&["status", name, "--json"]));
        names.iter().map(status).collect()
    };
    let (pids, processes) = (statuses(&daemon), survivors(&daemon.marker).len());
    for _ in 0..3 {
        crash(&mut daemon);
        assert_eq!(daemon.json(&["list", "--json"]), before, "{}", daemon.log());
        assert_eq!(statuses(&daemon), pids);
    }
    assert_eq!(survivors(&daemon.marker).len(), processes);
    // What is saved of one that has ended holds as long as its run is the last.
    assert!(
        !daemon.log().contains("was started after its state was last saved"),
        "{}",
        daemon.log()
    );
    for service in ["db", "web", "once", "later", "down"] {
        assert_eq!(count(&daemon, service), 1, "{service}: {}", daemon.log());
    }

    let report = daemon.json(&["stop", "web", "--json"]);
    assert_eq!(report["proven"], true, "{report:#}");
    assert_eq!(report["processes"].as_array().unwrap().len(), 2, "{report:#}");
    // What was stopped stays so, and what is started is another process.
    crash(&mut daemon);
    assert_eq!(daemon.json(&["status", "web", "--json"])["target"], "Down");
    daemon.does(&["start", "web"]);
    daemon.wait_for_state("web", "Running");
    assert_eq!(count(&daemon, "web"), 2);
    daemon.shutdown();
}

#[test]
fn what_ended_meanwhile_is_known_and_the_policy_applies() {
    let mut daemon = Daemon::prepare(&[]);
    let wait_and_exit = "echo $$ >> \"$1\"; while [ ! -e \"$1.end\" ]; do sleep 0.01; done; exit 7";
    define(&daemon, "never", wait_and_exit, "restart: {policy: never}\n");
    define(&daemon, "always", wait_and_exit, "restart: {delay: 0.01}\n");
    define(&daemon, "killed", SERVICE, "restart: {policy: never}\n");
    define(&daemon, "once", wait_and_exit, "oneshot: true\n");
    daemon.run();
    let services = ["never", "always", "killed", "once"];
    let pids = services.map(|service| {
        daemon.wait_for_state(service, "Running");
        wait_for("it has noted its start", || count(&daemon, service) == 1);
        daemon.pid(service)
    });
    kill(&mut daemon);
    for service in ["never", "always", "once"] {
        fs::write(starts(&daemon, service).with_extension("starts.end"), "").unwrap();
    }
    end(pids[2], Signal::KILL);
    pids.into_iter().for_each(wait_until_dead);
    fs::remove_file(starts(&daemon, "always").with_extension("starts.end")).unwrap();
    daemon.run();
    daemon.wait_for_state("never", "Error(exited 7)");
    daemon.wait_for_state("killed", "Error(killed by SIGKILL)");
    daemon.wait_for_state("once", "Error(exited 7)");
    daemon.wait_for_state("always", "Running");
    wait_for("it is started again", || count(&daemon, "always") == 2);
    // The child of the one that was killed went with it.
    assert_eq!(daemon.json(&["stop", "killed", "--json"])["processes"], json!([]));
    daemon.shutdown();
}

#[test]
fn ends_are_noticed_and_signals_delivered_though_the_process_is_no_child() {
    let mut daemon = Daemon::prepare(&[]);
    let script = "trap 'exit 5' USR1; echo $$ >> \"$1\"; while :; do sleep 0.01; done";
    define(&daemon, "never", script, "restart: {policy: never}\n");
    define(&daemon, "always", script, "restart: {delay: 0.01}\n");
    daemon.run();
    for service in ["never", "always"] {
        wait_for("it is ready for signals", || count(&daemon, service) == 1);
    }
    crash(&mut daemon);
    let pid = daemon.pid("always");
    assert_eq!(daemon.json(&["stats", "always", "--json"])["pid"], pid);
    daemon.does(&["kill", "never", "USR1"]);
    daemon.does(&["kill", "always", "USR1"]);
    daemon.wait_for_state("never", "Error(exited 5)");
    wait_for("it is started again", || count(&daemon, "always") == 2);
    daemon.wait_for_state("always", "Running");
    assert_ne!(daemon.pid("always"), pid);
    daemon.shutdown();
}

#[test]
fn a_definition_that_changed_meanwhile_is_said_and_waits_for_the_next_start() {
    let mut daemon = Daemon::prepare(&[]);
    for service in ["changed", "removed", "broken"] {
        define(&daemon, service, SERVICE, "");
    }
    daemon.run();
    for service in ["changed", "removed", "broken"] {
        wait_for("it has noted its start", || count(&daemon, service) == 1);
        daemon.wait_for_state(service, "Running");
    }
    let pid = daemon.pid("changed");
    kill(&mut daemon);
    daemon.write("changed", "exec: sleep 3603");
    fs::remove_file(daemon.config().join("removed.yaml")).unwrap();
    daemon.write("broken", "exec: [");
    daemon.write("new", "exec: sleep 3604");
    daemon.run();
    assert_eq!(daemon.pid("changed"), pid);
    for service in ["changed", "removed", "broken"] {
        assert_eq!(daemon.state(service), "Running");
    }
    assert_eq!(daemon.state("new"), "not supervised");
    let log = daemon.log();
    for said in [
        "the change holds from its next start on",
        "has no definition any more",
        "was not supervised before the crash",
    ] {
        assert!(log.contains(said), "{said}: {log}");
    }
    daemon.does(&["restart", "changed"]);
    daemon.wait_for_state("changed", "Running");
    let comm = fs::read_to_string(format!("/proc/{}/cmdline", daemon.pid("changed"))).unwrap();
    assert_eq!(comm, "sleep\x003603\0");
    daemon.does(&["monitor", "new"]);
    daemon.wait_for_state("new", "Running");
    daemon.shutdown();
}

/// Changes a state file, as somebody might who does not know what it does.
fn alter(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut state: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    change(&mut state);
    fs::write(path, state.to_string()).unwrap();
}

#[test]
fn without_a_good_state_file_the_books_say_what_runs() {
    let mut daemon = Daemon::prepare(&[]);
    let services = ["cut", "garbage", "future", "missing", "directory"];
    let script = "echo $$ >> \"$1\"; while [ ! -e \"$1.go\" ]; do sleep 0.01; done; \
        echo out; echo err >&2; exec sleep 3600";
    for service in services {
        define(&daemon, service, script, "");
    }
    daemon.run();
    let pids = services.map(|service| {
        wait_for("it has noted its start", || count(&daemon, service) == 1);
        daemon.wait_for_state(service, "Running");
        daemon.pid(service)
    });
    kill(&mut daemon);
    let file = |service| state_file(&daemon, service);
    let text = fs::read_to_string(file("cut")).unwrap();
    fs::write(file("cut"), &text[..text.len() / 2]).unwrap();
    fs::write(file("garbage"), [0xff; 300]).unwrap();
    alter(&file("future"), |state| state["version"] = json!(99));
    fs::remove_file(file("missing")).unwrap();
    fs::remove_file(file("directory")).unwrap();
    fs::create_dir(file("directory")).unwrap();
    daemon.run();
    for (service, pid) in services.into_iter().zip(pids) {
        assert_eq!(daemon.state(service), "Running", "{service}: {}", daemon.log());
        assert_eq!(daemon.pid(service), pid, "{service}: {}", daemon.log());
        assert_eq!(count(&daemon, service), 1, "{service}");
    }
    let log = daemon.log();
    for service in ["cut", "garbage", "future", "directory"] {
        let said = |line: &str| line.contains("its saved state is no good") && line.contains(service);
        assert!(log.lines().any(said), "{service}: {log}");
    }
    assert!(log.contains("it has version 99"), "{log}");
    // The directory as a whole.
    kill(&mut daemon);
    fs::remove_dir_all(daemon.state_directory()).unwrap();
    daemon.run();
    for (service, pid) in services.into_iter().zip(pids) {
        assert_eq!(daemon.pid(service), pid, "{service}: {}", daemon.log());
        fs::write(starts(&daemon, service).with_extension("starts.go"), "").unwrap();
        wait_for("what it prints is collected", || {
            let lines = daemon.prints(&["log", "-s", service]);
            lines.contains(&format!("[+] {service}: out")) && lines.contains(&format!("[-] {service}: err"))
        });
    }
    daemon.shutdown();
}

#[test]
fn a_forged_state_touches_nobody() {
    let mut daemon = Daemon::prepare(&[]);
    define(&daemon, "web", SERVICE, "restart: {policy: never}\n");
    daemon.run();
    wait_for("it has noted its start", || count(&daemon, "web") == 1);
    daemon.wait_for_state("web", "Running");
    let pid = daemon.pid("web");
    let mut bystander = Command::new("sleep").arg("3605").spawn().unwrap();
    let ticks = start_time_ticks(bystander.id().cast_signed()).unwrap();
    // Its pid with another start; the service itself under another one; both under numbers that the books do not have.
    for (service, start) in [(None, 1), (None, ticks * 10_000_000), (Some(4321), ticks * 10_000_000)] {
        kill(&mut daemon);
        alter(&state_file(&daemon, "web"), |state| {
            state["run"]["main"] = json!({"tgid": bystander.id(), "start_boottime_ns": start});
            if let Some(service) = service {
                state["run"]["service"] = json!(service);
            }
        });
        daemon.run();
        assert_eq!(daemon.pid("web"), pid, "{}", daemon.log());
        assert_eq!(daemon.state("web"), "Running");
    }
    daemon.does(&["stop", "web"]);
    // A service that the books do not have, with the bystander for its main process but for the start.
    kill(&mut daemon);
    let text = fs::read_to_string(state_file(&daemon, "web")).unwrap();
    fs::write(state_file(&daemon, "forged"), text).unwrap();
    alter(&state_file(&daemon, "forged"), |state| {
        state["snapshot"]["doing"] = json!("Running");
        state["snapshot"]["target"] = json!("Up");
        state["snapshot"]["main"] = json!("Ready");
        state["run"]["main"] = json!({"tgid": bystander.id(), "start_boottime_ns": ticks * 10_000_000 + 1});
    });
    daemon.run();
    daemon.wait_for_state("forged", "Error(nobody knows how it ended)");
    daemon.does(&["stop", "forged"]);
    assert_eq!(bystander.try_wait().unwrap(), None, "a bystander was ended");
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    daemon.shutdown();
}

#[test]
fn what_is_printed_while_nobody_reads_is_collected() {
    let mut daemon = Daemon::prepare(&[]);
    let script = "echo before; echo $$ >> \"$1\"; while [ ! -e \"$1.go\" ]; do sleep 0.01; done; \
        echo while away; echo aside >&2; echo done >> \"$1\"; exec sleep 3600";
    define(&daemon, "web", script, "");
    daemon.run();
    wait_for("it has printed", || {
        daemon.prints(&["log", "-s", "web"]).contains("before")
    });
    kill(&mut daemon);
    fs::write(starts(&daemon, "web").with_extension("starts.go"), "").unwrap();
    wait_for("it has printed more", || count(&daemon, "web") == 2);
    daemon.run();
    wait_for("that is there", || {
        let lines = daemon.prints(&["log", "-s", "web"]);
        lines.contains("[+] web: while away") && lines.contains("[-] web: aside")
    });
    daemon.shutdown();
}

#[test]
fn a_stop_that_was_under_way_is_carried_to_its_end() {
    let mut daemon = Daemon::prepare(&[]);
    let script = "trap 'echo asked >> \"$1\"' TERM; echo $$ >> \"$1\"; while :; do sleep 0.01; done";
    define(&daemon, "web", script, "shutdown_timeout: 1\n");
    daemon.run();
    wait_for("it is ready for signals", || count(&daemon, "web") == 1);
    let mut client = daemon.command(&["stop", "web"]);
    let mut client = client.stderr(Stdio::null()).spawn().unwrap();
    wait_for("it was asked to end", || count(&daemon, "web") == 2);
    crash(&mut daemon);
    client.wait().unwrap();
    wait_for("it is down", || daemon.pid("web") == 0);
    assert_eq!(daemon.json(&["status", "web", "--json"])["target"], "Down");
    daemon.does(&["stop", "web"]);
    assert_eq!(count(&daemon, "web"), 3, "asked once by each daemon, and started once");
    daemon.shutdown();
}

/// A daemon is killed between the creation of a process that found no room in the books and that process's end, which it would
/// have brought about.
#[tokio::test]
async fn a_process_that_the_books_missed_is_not_left_behind_by_a_crash() {
    let mut daemon = Daemon::prepare(&[("never", "exec: sleep 3600\ntest: \"false\"\n")]);
    define(&daemon, "web", SERVICE, "after: [never]\n");
    // Whoever opens the books first decides how large they are.
    let mut config = Config {
        pins: Pins::Shared(daemon.pins().to_owned()),
        max_processes: Some(4),
        level: Level::Ebpf,
        ..Config::default()
    };
    let first = Tracker::open(&config).unwrap();
    daemon.run();
    drop(first);
    daemon.does(&["stop", "never"]);
    daemon.does(&["stop", "web"]);
    let services: Value = serde_json::from_slice(&daemon.tracker(&["ps", "--json"]).stdout).unwrap();
    config.instance = services[0]["instance"].as_str().unwrap().to_owned();
    for (doing, target) in [
        ("Running", "Up"),
        ("Waiting", "Up"),
        ("Nothing", "Down"),
        ("Settled", "Down"),
    ] {
        kill(&mut daemon);
        alter(&state_file(&daemon, "web"), |state| {
            state["snapshot"]["doing"] = json!(doing);
            state["snapshot"]["target"] = json!(target);
            state["run"] = Value::Null;
        });
        let (missed, _cleanup) = leave_a_missed_process(&config).await;
        daemon.run();
        wait_for(&format!("{doing}: nothing is left"), || survivors(&missed).is_empty());
        let said = String::from_utf8(daemon.zinit(&["stop", "web"]).stderr).unwrap();
        assert!(said.contains("is empty; not proven: lost-operations"), "{said}");
    }
    assert_eq!(count(&daemon, "web"), 0, "it was started without what it needs");
    // Nothing tells of the service any more but the books: it is nobody's until the end.
    kill(&mut daemon);
    fs::remove_dir_all(daemon.state_directory()).unwrap();
    fs::remove_file(daemon.config().join("web.yaml")).unwrap();
    let (missed, _cleanup) = leave_a_missed_process(&config).await;
    daemon.run();
    daemon.does(&["shutdown"]);
    daemon.assert_ends_well();
    assert_eq!(survivors(&missed), [], "{}", daemon.log());
    let said = "service \"web\" is empty; not proven: 2 operations of the kernel's books failed";
    assert!(daemon.log().contains(said), "{}", daemon.log());
}

/// Puts the service `web` into the books of a daemon that is not there, with a living process that found no room in them.
async fn leave_a_missed_process(config: &Config) -> (Marker, Cleanup) {
    let tracker = Tracker::open(config).unwrap();
    let web = format!("{}/web", config.instance);
    if let Ok(info) = tracker.find(&web) {
        tracker.unregister(&info.handle()).unwrap();
    }
    let others = tracker.register("others").unwrap();
    let members: Vec<_> = (0..4).map(|_| sleeper(&tracker, &others).unwrap()).collect();
    let web = tracker.register("web").unwrap();
    let refused = sleeper(&tracker, &web);
    assert!(matches!(refused, Err(TrackerError::Untracked { .. })), "{refused:?}");
    let cookie = tracker.info(&web).unwrap().cookie();
    for mut member in members {
        member.kill().await.unwrap();
    }
    tracker.unregister(&others).unwrap();
    let missed = Marker::new();
    let cleanup = Cleanup::new(&missed);
    let mut creator = Command::new("sh");
    creator
        .args(["-c", "setsid sleep 3603 >/dev/null 2>&1 &"])
        .env(COOKIE, cookie)
        .env(Marker::ENV, missed.as_str());
    assert!(creator.status().unwrap().success());
    assert_eq!(survivors(&missed).len(), 1);
    (missed, cleanup)
}

fn sleeper(tracker: &Tracker, service: &Service) -> Result<tokio::process::Child, TrackerError> {
    let mut command = Command::new("sleep");
    command.arg("3604");
    tracker.spawn(service, &mut command.into())
}

#[test]
fn a_service_whose_books_are_gone_is_adopted_and_not_started_twice() {
    let mut daemon = Daemon::prepare(&[]);
    define(&daemon, "web", SERVICE, "");
    daemon.run();
    daemon.wait_for_state("web", "Running");
    wait_for_child(&daemon, "web");
    let pid = daemon.pid("web");
    kill(&mut daemon);
    remove_pins(daemon.pins());
    daemon.run();
    assert_eq!(daemon.pid("web"), pid, "{}", daemon.log());
    assert!(
        daemon.log().contains("is not in the books, and was adopted"),
        "{}",
        daemon.log()
    );
    let output = daemon.zinit(&["stop", "web", "--json"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("is empty; not proven: adopted"), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["proven"], false, "{report:#}");
    assert_eq!(report["processes"].as_array().unwrap().len(), 2, "{report:#}");
    assert_eq!(count(&daemon, "web"), 1);
    daemon.shutdown();
}

#[test]
fn at_level_procfs_a_service_is_adopted_too() {
    let mut daemon = Daemon::prepare(&[]);
    define(&daemon, "web", SERVICE, "");
    let procfs = |daemon: &Daemon| daemon.init(&["--tracking", "procfs"]);
    daemon.run_as(procfs(&daemon));
    daemon.wait_for_state("web", "Running");
    wait_for_child(&daemon, "web");
    let pid = daemon.pid("web");
    kill(&mut daemon);
    daemon.run_as(procfs(&daemon));
    assert_eq!(daemon.pid("web"), pid, "{}", daemon.log());
    let output = daemon.zinit(&["stop", "web", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["processes"].as_array().unwrap().len(), 2, "{report:#}");
    assert_eq!(count(&daemon, "web"), 1);
    daemon.shutdown();
}

fn remove_pins(directory: &Path) {
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            remove_pins(&entry.path());
        } else {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    fs::remove_dir(directory).unwrap();
}

#[test]
fn states_are_nobody_elses_and_a_directory_that_is_not_ours_alone_is_refused() {
    let mut daemon = Daemon::start(&[("web", "exec: sleep 3600")]);
    daemon.wait_for_state("web", "Running");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&daemon.state_directory()), 0o700);
    wait_for("the state is saved", || state_file(&daemon, "web").exists());
    assert_eq!(mode(&state_file(&daemon, "web")), 0o600);
    kill(&mut daemon);
    fs::set_permissions(daemon.state_directory(), fs::Permissions::from_mode(0o755)).unwrap();
    // What it says cannot be trusted, so services are stopped and started anew.
    daemon.run();
    daemon.wait_for_state("web", "Running");
    assert!(daemon.log().contains("states are not saved"), "{}", daemon.log());
    fs::remove_dir_all(daemon.state_directory()).unwrap();
    daemon.shutdown();
}

#[test]
fn a_process_that_a_killed_daemon_was_creating_holds_up_its_successor_for_no_longer_than_it_is_there() {
    let mut daemon = Daemon::prepare(&[("web", "exec: sleep 3600\n")]);
    let mut dead = Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    // What such a process has of the dead one: its lock and its socket.
    let mut path = daemon.socket().as_os_str().to_owned();
    path.push(".lock");
    let mut lock = fs::File::create(&path).unwrap();
    lock.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
    writeln!(lock, "{}", dead.id()).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let listener = UnixListener::bind(daemon.socket()).unwrap();
    daemon.spawn(daemon.init(&[]));
    // It looks whether somebody answers.
    listener.accept().unwrap();
    drop((listener, lock));
    wait_for("the daemon answers", || daemon.zinit(&["list"]).status.success());
    daemon.wait_for_state("web", "Running");
    daemon.shutdown();
}

#[test]
fn nothing_is_lost_or_started_twice_by_daemons_that_are_killed_at_any_moment() {
    let mut daemon = Daemon::prepare(&[]);
    let services = ["one", "two", "three", "once"];
    for service in &services[..3] {
        define(&daemon, service, SERVICE, "");
    }
    define(&daemon, "once", "echo x >> \"$1\"", "oneshot: true\nafter: [one]\n");
    // A shell that counts what it creates.
    let script =
        "echo $$ >> \"$1\"; while [ ! -e \"$1.end\" ]; do /bin/true; echo x >> \"$1.forks\"; done; exec sleep 3600";
    define(&daemon, "forker", script, "");
    let mut random = Random::seeded(0x5eed);
    println!("seed {}", random.0);
    for _ in 0..rounds(20) {
        daemon.spawn(daemon.init(&[]));
        std::thread::sleep(Duration::from_micros(random.below(500_000) as u64));
        kill(&mut daemon);
    }
    daemon.run();
    daemon.wait_for_state("once", "Success");
    for service in ["one", "two", "three", "forker"] {
        daemon.wait_for_state(service, "Running");
    }
    for service in services.into_iter().chain(["forker"]) {
        wait_for("it has noted its start", || count(&daemon, service) > 0);
        assert_eq!(count(&daemon, service), 1, "{service}: {}", daemon.log());
    }
    fs::write(starts(&daemon, "forker").with_extension("starts.end"), "").unwrap();
    let comm = format!("/proc/{}/comm", daemon.pid("forker"));
    wait_for("it has ended its loop", || {
        fs::read_to_string(&comm).unwrap() == "sleep\n"
    });
    let forks = fs::read_to_string(starts(&daemon, "forker").with_extension("starts.forks"))
        .unwrap()
        .lines()
        .count();
    let books: Value = serde_json::from_slice(&daemon.tracker(&["ps", "forker", "--json"]).stdout).unwrap();
    println!("{forks} forks");
    assert_eq!(books[0]["forks"], forks + 1, "{books:#}");
    assert_eq!(books[0]["exits"], forks, "{books:#}");
    let tracked = daemon.json(&["stats", "one", "--json"])["children"]
        .as_array()
        .unwrap()
        .len();
    assert_eq!(tracked, 1);
    daemon.shutdown();
}
