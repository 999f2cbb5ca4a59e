//! tmux: its server leaves the service that it is started from, with all that runs in it.

use std::process::{Command, Output};

use zinit_tests::{Marker, daemon::wait_for};

use super::{
    case::{Case, command_line, nobody_was_killed, program, set},
    document::Numbers,
};

const AGENT: &str = "/usr/local/bin/agent";

/// A service that starts a tmux server of this test's own.
fn case(file: usize) -> Option<Case> {
    program("/usr/bin/tmux", "tmux")?;
    let mut case = Case::prepare("tmux", "agent");
    if file < 2 {
        let agent = case.write_program(AGENT, &[]);
        case.define(file, &[(AGENT, &agent)]);
    } else {
        case.define(file, &[]);
    }
    let directory = case.path("");
    case.start(&[("TMUX_TMPDIR", &directory)]);
    Some(case)
}

/// Runs a command of the client.
fn tmux(case: &Case, arguments: &[&str]) -> Output {
    let mut command = Command::new("tmux");
    command
        .args(["-L", "agent", "-f", "/dev/null"])
        .args(arguments)
        .env("TMUX_TMPDIR", case.directory())
        .env_remove("TMUX")
        .env(Marker::ENV, case.daemon.marker.as_str());
    command.output().unwrap()
}

/// Waits for the server with the session's process; returns the pids of both.
fn wait_for_session(case: &Case) -> (i32, i32) {
    let only = |line: &'static str| case.with_command(|found| found.starts_with(line)).pop_first();
    case.wait_until_tracked(|present| present.len() == 3 && only("sleep 3711").is_some());
    (only("tmux ").unwrap(), only("sleep 3711").unwrap())
}

#[test]
fn a_tmux_server_is_named_and_stopped_with_the_service_that_it_left() {
    let Some(mut case) = case(0) else {
        return;
    };
    let main = case.main();
    let (server, job) = wait_for_session(&case);
    let departures = case.wait_for_departures(main);
    assert_eq!(departures.len(), 2, "{departures:?}");
    assert_eq!(departures[&server], set(&["session", "group", "parent"]));
    assert_eq!(departures[&job], set(&["session", "group"]));
    case.shows("zinit-tracker tree agent", Numbers::All);
    case.shows("zinit-tracker escapes agent", Numbers::Large);
    case.shows(&format!("zinit-tracker why {job}"), Numbers::Large);
    let report = case.stop();
    assert!(nobody_was_killed(&report), "{report:#}");
    assert!(!tmux(&case, &["list-sessions"]).status.success(), "the server answers");
    case.end();
}

#[test]
fn a_tmux_server_that_is_kept_runs_on_and_belongs_to_nobody() {
    let Some(case) = case(1) else {
        return;
    };
    let main = case.main();
    let (server, job) = wait_for_session(&case);
    let report = case.daemon.json(&["stop", "agent", "--json"]);
    assert_eq!(report["survivors"], serde_json::json!([]), "{report:#}");
    let stopped: Vec<_> = report["processes"]
        .as_array()
        .unwrap()
        .iter()
        .map(super::case::pid_of)
        .collect();
    assert_eq!(stopped, [main], "{report:#}");
    println!("proven: {}, doubts: {}", report["proven"], report["doubts"]);
    assert_eq!(Vec::from_iter(case.present()), [server, job]);
    assert!(case.tracked().is_empty());
    let sessions = tmux(&case, &["list-sessions"]);
    assert!(
        String::from_utf8_lossy(&sessions.stdout).starts_with("job:"),
        "{sessions:?}"
    );
    let why = case.daemon.tracker(&["why", &server.to_string()]);
    assert!(
        String::from_utf8_lossy(&why.stderr).contains("belongs to no service"),
        "{why:?}"
    );
    assert!(tmux(&case, &["kill-server"]).status.success());
    wait_for("tmux has ended", || case.present().is_empty());
    case.end_of_a_part();
}

#[test]
fn a_tmux_server_that_is_the_service_is_stopped_with_its_sessions() {
    let Some(case) = case(2) else {
        return;
    };
    let main = case.main();
    wait_for("the server answers", || {
        tmux(&case, &["new-session", "-d", "-s", "job", "sleep 3711"])
            .status
            .success()
    });
    let present = case.wait_until_tracked(|present| present.len() == 2);
    assert!(present.iter().any(|pid| command_line(*pid) == "sleep 3711"));
    assert_eq!(case.wait_for_departures(main).len(), 1);
    let report = case.stop();
    assert!(nobody_was_killed(&report), "{report:#}");
    case.end_of_a_part();
}
