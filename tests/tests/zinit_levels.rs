//! `zinit` at each tracking level: which one it is can be seen, and at level `procfs` it stops services all the same and
//! says what it cannot prove.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use serde_json::{Value, json};
use zinit_tests::{
    daemon::{Daemon, wait_for, within},
    survivors,
};

const WARNING: &str = "exact tracking is not possible here";

/// Two ways out, one of them deaf to SIGTERM.
const WEB: &str = "exec: sh -c \"(setsid sleep 3601 &); (trap '' TERM; setsid sleep 3602 &); exec sleep 3603\"\n\
                   shutdown_timeout: 0.5\nkill_after: 60";

/// The command that starts the daemon, without the capabilities that BPF takes.
fn confined(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.arg("--bounding-set=-bpf,-perfmon,-sys_admin");
    within(command, &daemon.init(arguments))
}

fn children(daemon: &Daemon, service: &str) -> usize {
    let stats = daemon.json(&["stats", service, "--json"]);
    stats["children"].as_array().unwrap().len()
}

/// Everything that a daemon at level `procfs` is for; the reason that it gives for the level.
fn live_through(mut daemon: Daemon) -> String {
    for service in ["web", "db", "once"] {
        daemon.wait_for_state(service, if service == "once" { "Success" } else { "Running" });
    }
    let status = daemon.json(&["status", "web", "--json"]);
    assert_eq!(status["tracking"], "procfs", "{status:#}");
    let reason = status["fallback_reason"].as_str().unwrap().to_owned();
    let printed = daemon.prints(&["status", "web"]);
    assert!(printed.contains("\ntracking: procfs\nfallback_reason: "), "{printed}");
    assert_eq!(daemon.call("service_status", &json!(["db"]))["tracking"], "procfs");

    wait_for("all processes are seen", || children(&daemon, "web") == 2);
    let report = stop(&daemon, "web");
    assert_eq!(report["tracking"], "procfs", "{report:#}");
    assert_eq!(report["fallback_reason"].as_str(), Some(reason.as_str()), "{report:#}");
    let doubts: Vec<_> = report["doubts"].as_array().unwrap().iter().collect();
    let unsure = doubts.iter().any(|doubt| doubt["reason"] == "procfs-tracking");
    assert_eq!(report["proven"] == false, unsure, "{report:#}");
    println!(
        "level procfs, proven: {}, doubts: {}",
        report["proven"], report["doubts"]
    );
    assert_eq!(report["processes"].as_array().unwrap().len(), 3, "{report:#}");

    // Of the others nobody was touched.
    assert_eq!(daemon.state("db"), "Running");
    daemon.does(&["start", "web"]);
    daemon.wait_for_state("web", "Running");
    wait_for("all processes are seen", || children(&daemon, "web") == 2);
    daemon.does(&["shutdown"]);
    let ended = daemon.wait();
    assert!(ended.success(), "{ended}: {}", daemon.log());
    assert_eq!(survivors(&daemon.marker), [], "{}", daemon.log());
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    reason
}

/// Stops a service; whether it is proven, the report says, and stderr if not.
fn stop(daemon: &Daemon, service: &str) -> Value {
    let output = daemon.zinit(&["stop", service, "--json"]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["survivors"], json!([]), "{report:#}");
    assert_eq!(
        stderr.contains("not proven: procfs-tracking"),
        report["proven"] == false,
        "{stderr}"
    );
    report
}

fn files() -> [(&'static str, &'static str); 3] {
    [
        ("web", WEB),
        ("db", "exec: sleep 3604"),
        ("once", "exec: 'true'\noneshot: true"),
    ]
}

#[test]
fn without_the_rights_for_bpf_auto_warns_once_and_services_are_stopped_all_the_same() {
    let mut daemon = Daemon::prepare(&files());
    daemon.run_as(confined(&daemon, &[]));
    assert_eq!(daemon.log().matches(WARNING).count(), 1, "{}", daemon.log());
    let reason = live_through(daemon);
    assert!(reason.contains("CAP_BPF"), "{reason}");
}

#[test]
fn level_procfs_can_be_asked_for() {
    let mut daemon = Daemon::prepare(&files());
    daemon.run_as(daemon.init(&["--tracking", "procfs"]));
    assert!(!daemon.log().contains(WARNING), "{}", daemon.log());
    assert_eq!(live_through(daemon), "it was asked for");
}

#[test]
fn level_ebpf_is_had_or_refused() {
    let mut daemon = Daemon::prepare(&[("db", "exec: sleep 3604")]);
    let output = confined(&daemon, &["--tracking", "ebpf"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("CAP_BPF"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(!daemon.socket().exists(), "the socket is left");

    daemon.run_as(daemon.init(&["--tracking", "ebpf"]));
    daemon.wait_for_state("db", "Running");
    let status = daemon.json(&["status", "db", "--json"]);
    assert_eq!(status["tracking"], "ebpf");
    assert_eq!(status.get("fallback_reason"), None, "{status:#}");
    daemon.shutdown();
}
