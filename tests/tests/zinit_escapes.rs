//! Ways out of a service, each taken by a service of a real `zinit init`, defined in YAML and stopped by `zinit stop`: when
//! that returns it is proven, an independent scan of /proc finds nobody, and what the service held is free.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::Value;
use zinit_tests::{
    Cleanup, Facts, Marker, Ready, TestCgroup, actor_path, daemon::Daemon, lock_is_free, members, port_is_free, rounds,
    survivors,
};

/// How a service ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// When it is asked to: its grace period must never run out.
    Asked,
    /// It has to be killed, after a short grace period.
    Killed,
    /// It has to be killed, after a grace period in which it can do its worst on a busy machine too.
    KilledLate,
}

/// A service that an actor plays.
struct Escape {
    name: String,
    ending: Ending,
    /// Processes that its report has at least.
    least: usize,
    marker: Marker,
    ready: Ready,
    yaml: String,
    _cleanup: Cleanup,
}

impl Escape {
    /// The argument `MARKER` stands for the marker.
    fn new(behaviour: &str, args: &[&str], ending: Ending, least: usize) -> Self {
        let (marker, ready) = (Marker::new(), Ready::new().unwrap());
        let timeout = match ending {
            Ending::Asked => "60",
            Ending::Killed => "0.3",
            Ending::KilledLate => "3",
        };
        let args = args
            .iter()
            .map(|arg| if *arg == "MARKER" { marker.as_str() } else { *arg });
        let command: Vec<_> = [behaviour].into_iter().chain(args).collect();
        let yaml = format!(
            "exec: {} {}\nshutdown_timeout: {timeout}\nkill_after: 60\nrestart: {{policy: never}}\nenv:\n  {}: {marker}\n  {}: {}\n",
            actor_path().unwrap().display(),
            command.join(" "),
            Marker::ENV,
            Ready::ENV,
            ready.path().display(),
        );
        Self {
            name: behaviour.to_owned(),
            ending,
            least,
            _cleanup: Cleanup::new(&marker),
            marker,
            ready,
            yaml,
        }
    }

    fn oneshot(mut self) -> Self {
        self.yaml.push_str("oneshot: true\n");
        self
    }

    /// Stops it, and asserts that nothing is left the moment the command returns.
    fn stop(&self, daemon: &Daemon) -> Value {
        let report = daemon.json(&["stop", &self.name, "--json"]);
        let left = survivors(&self.marker);
        assert_eq!(left, [], "{}: {report:#}", self.name);
        assert_eq!(report["proven"], true, "{}: {report:#}", self.name);
        assert_eq!(report["tracking"], "ebpf", "{}: {report:#}", self.name);
        let processes = report["processes"].as_array().unwrap();
        assert!(processes.len() >= self.least, "{}: {report:#}", self.name);
        assert_eq!(
            was_killed(&report),
            self.ending != Ending::Asked,
            "{}: {report:#}",
            self.name
        );
        assert_eq!(daemon.pid(&self.name), 0);
        report
    }
}

/// Whether SIGKILL was needed: from the stop, or from the programs that kill whatever of a service forks on.
fn was_killed(report: &Value) -> bool {
    report["processes"].as_array().unwrap().iter().any(|process| {
        let mut signals = process["signals"].as_array().unwrap().iter();
        process["fate"]["killed"] == 9 || signals.any(|sent| sent["signal"] == "SIGKILL")
    })
}

/// A daemon with these services, all of whose processes are there, and what they say about themselves.
fn start(escapes: &mut [Escape]) -> (Daemon, Vec<Facts>) {
    let files: Vec<_> = escapes
        .iter()
        .map(|escape| (escape.name.as_str(), escape.yaml.as_str()))
        .collect();
    let daemon = Daemon::start(&files);
    let facts = escapes.iter_mut().map(|escape| {
        let ready = escape.ready.wait();
        ready.unwrap_or_else(|error| panic!("{}: {error:#}\n{}", escape.name, daemon.log()))
    });
    let facts = facts.collect();
    (daemon, facts)
}

/// Starts all, stops one after the other, and shuts down.
fn check(mut escapes: Vec<Escape>) {
    let (daemon, _) = start(&mut escapes);
    for escape in &escapes {
        let there = members(&escape.marker).len();
        let report = escape.stop(&daemon);
        println!(
            "{}: {there} processes seen, {} stopped",
            escape.name,
            report["processes"].as_array().unwrap().len()
        );
    }
    daemon.shutdown();
}

#[test]
fn the_cases_of_the_plan_are_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ended");
    check(vec![
        Escape::new("rest", &[], Ending::Asked, 1),
        Escape::new("child", &[], Ending::Asked, 2),
        Escape::new("slow-term", &[file.to_str().unwrap(), "700"], Ending::Asked, 1),
        Escape::new("sessions", &["200"], Ending::Asked, 201),
        Escape::new("setpgid", &[], Ending::Asked, 2),
        Escape::new("ignore-term", &[], Ending::Killed, 1),
    ]);
    assert!(file.exists(), "the one that takes its time ended by itself");
}

#[test]
fn other_sessions_parents_and_ways_to_create_a_process_lead_nowhere() {
    check(vec![
        Escape::new("setsid", &[], Ending::Asked, 2),
        Escape::new("double-fork", &[], Ending::Asked, 2),
        Escape::new("stopped", &[], Ending::Asked, 2),
        Escape::new("chain", &["100"], Ending::Asked, 100),
        Escape::new("subreaper", &[], Ending::Asked, 3),
        Escape::new("thread-fork", &[], Ending::Asked, 2),
        Escape::new("vfork", &[], Ending::Asked, 2),
        Escape::new("posix-spawn", &[], Ending::Asked, 2),
        Escape::new("clone-parent", &[], Ending::Asked, 2),
        // The main process has exited: of a service that may, the rest lives on until it is stopped.
        Escape::new("double-fork-orphan", &[], Ending::Asked, 1).oneshot(),
    ]);
}

#[test]
fn other_surroundings_lead_nowhere() {
    let cgroup = TestCgroup::new(&format!("zinit-test-daemon-{}", std::process::id())).unwrap();
    let mut escapes = vec![
        Escape::new("clear-env", &["MARKER"], Ending::Asked, 2),
        Escape::new("namespaces", &[], Ending::Asked, 3),
        Escape::new("time-namespace", &[], Ending::Asked, 2),
        Escape::new("pid-namespace", &[], Ending::Killed, 3),
    ];
    match &cgroup {
        Some(cgroup) => {
            let path = cgroup.path().to_str().unwrap();
            escapes.push(Escape::new("cgroup-move", &[path], Ending::Asked, 2));
        }
        None => {
            let ci = std::env::var_os("CI").is_some();
            assert!(!ci, "CI must have a writable cgroup v2 hierarchy");
            println!("SKIPPED cgroup-move: this machine has no writable cgroup v2 hierarchy");
        }
    }
    check(escapes);
}

#[test]
fn deafness_and_forks_in_answer_to_sigterm_lead_nowhere() {
    check(vec![
        Escape::new("ignore-term-grandchildren", &[], Ending::Killed, 3),
        Escape::new("fork-on-term", &[], Ending::KilledLate, 2),
    ]);
}

#[test]
fn a_service_that_never_rests_is_stopped() {
    // Each alone: their processes take all the processors there are.
    check(vec![Escape::new("refork-chain", &[], Ending::Killed, 10)]);
    check(vec![Escape::new("storm", &["500"], Ending::Killed, 100)]);
}

#[test]
fn port_and_lock_are_free_the_moment_zinit_stop_returns() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("lock");
    for _ in 0..rounds(5) {
        let mut escapes = [
            Escape::new("tcp", &["0"], Ending::Asked, 2),
            Escape::new("flock", &[file.to_str().unwrap()], Ending::Asked, 2),
        ];
        let (daemon, facts) = start(&mut escapes);
        let port = facts[0].number("port").unwrap();
        assert!(!port_is_free(port).unwrap());
        assert!(!lock_is_free(&file).unwrap());
        daemon.does(&["stop", "tcp"]);
        assert!(port_is_free(port).unwrap());
        daemon.does(&["stop", "flock"]);
        assert!(lock_is_free(&file).unwrap());
        for escape in &escapes {
            assert_eq!(survivors(&escape.marker), []);
        }
        daemon.shutdown();
    }
}
