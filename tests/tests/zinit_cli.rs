//! `zinit` as people and scripts use it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
};

use rustix::process::Signal;
use zinit_tests::{
    daemon::{Daemon, wait_for},
    survivors, zinit,
};

const SLEEP: &str = "exec: sleep 3600";

#[test]
fn services_of_the_directory_are_started_and_printed_as_zinit_prints_them() {
    let daemon = Daemon::start(&[
        ("db", SLEEP),
        ("migrate", "exec: 'true'\noneshot: true\nafter: [db]"),
        (
            "web",
            "exec: sh -c 'sleep 3601 & exec sleep 3602'\nafter: [db, migrate]",
        ),
    ]);
    daemon.wait_for_state("web", "Running");
    let list = "---\ndb: Running\nmigrate: Success\nweb: Running\n";
    assert_eq!(daemon.prints(&["list"]), list);
    assert_eq!(daemon.prints(&[]), list, "no command lists");
    let pid = daemon.pid("web");
    assert_eq!(
        daemon.prints(&["status", "web"]),
        format!(
            "---\nname: web\npid: {pid}\nstate: Running\ntarget: Up\nafter:\n  db: Running\n  migrate: Success\ntracking: ebpf\n"
        )
    );
    let db = daemon.pid("db");
    assert_eq!(
        daemon.prints(&["status", "db"]),
        format!("---\nname: db\npid: {db}\nstate: Running\ntarget: Up\nafter: {{}}\ntracking: ebpf\n")
    );
    wait_for("the child is counted", || {
        daemon.json(&["stats", "web", "--json"])["children"]
            .as_array()
            .unwrap()
            .len()
            == 1
    });
    let stats = daemon.prints(&["stats", "web"]);
    assert!(
        stats.starts_with(&format!("---\nname: web\npid: {pid}\nmemory_usage: ")),
        "{stats}"
    );
    let keys: Vec<_> = stats.lines().map(|line| line.split(':').next().unwrap()).collect();
    let expected = [
        "---",
        "name",
        "pid",
        "memory_usage",
        "cpu_usage",
        "children",
        "  - pid",
        "    memory_usage",
        "    cpu_usage",
    ];
    assert_eq!(keys, expected, "{stats}");
    daemon.shutdown();
}

#[test]
fn stop_leaves_nothing_and_reports_it() {
    let daemon = Daemon::start(&[(
        "web",
        "exec: sh -c 'setsid sleep 3601 & (setsid sleep 3602 &); exec sleep 3603'\nshutdown_timeout: 1",
    )]);
    daemon.wait_for_state("web", "Running");
    wait_for("all processes are there", || {
        daemon.json(&["stats", "web", "--json"])["children"]
            .as_array()
            .unwrap()
            .len()
            == 2
    });
    let report = daemon.json(&["stop", "web", "--json"]);
    assert_eq!(report["proven"], true, "{report:#}");
    assert_eq!(report["tracking"], "ebpf");
    assert_eq!(report["processes"].as_array().unwrap().len(), 3, "{report:#}");
    assert_eq!(daemon.pid("web"), 0);
    assert_eq!(daemon.json(&["status", "web", "--json"])["target"], "Down");
    daemon.does(&["stop", "web"]);
    daemon.does(&["start", "web"]);
    daemon.wait_for_state("web", "Running");
    daemon.does(&["start", "web"]);
    let pid = daemon.pid("web");
    daemon.does(&["restart", "web"]);
    daemon.wait_for_state("web", "Running");
    assert_ne!(daemon.pid("web"), pid);
    daemon.shutdown();
}

#[test]
fn services_come_and_go() {
    let daemon = Daemon::start(&[("web", SLEEP)]);
    daemon.write("late", SLEEP);
    assert_eq!(daemon.state("late"), "not supervised");
    daemon.does(&["monitor", "late"]);
    daemon.wait_for_state("late", "Running");
    assert!(daemon.refuses(&["monitor", "late"]).contains("already monitored"));
    assert!(daemon.refuses(&["forget", "late"]).contains("stop it first"));
    daemon.does(&["stop", "late"]);
    daemon.does(&["forget", "late"]);
    assert_eq!(daemon.state("late"), "not supervised");
    assert!(daemon.refuses(&["forget", "late"]).contains("unknown"));
    daemon.shutdown();
}

#[test]
fn kill_sends_the_signal_that_is_named_and_sigterm_otherwise() {
    let script = "for signal in HUP TERM; do trap \"echo got $signal\" $signal; done; echo ready; \
        while :; do sleep 3600 & wait $!; kill $!; done";
    let daemon = Daemon::prepare(&[]);
    let path = daemon.script("service", script);
    daemon.write("web", &format!("exec: {path}"));
    let mut daemon = daemon;
    daemon.run();
    let prints = |text: &str| wait_for(text, || daemon.prints(&["log", "-s", "web"]).contains(text));
    prints("[+] web: ready");
    daemon.does(&["kill", "web", "sighup"]);
    prints("[+] web: got HUP");
    daemon.does(&["kill", "web"]);
    prints("[+] web: got TERM");
    assert!(daemon.refuses(&["kill", "web", "SIGNOPE"]).contains("SIGNOPE"));
    daemon.does(&["stop", "web"]);
    assert!(daemon.refuses(&["kill", "web", "SIGKILL"]).contains("is down"));
    daemon.shutdown();
}

#[test]
fn the_log_has_what_services_print_and_goes_on() {
    let daemon = Daemon::start(&[
        (
            "talker",
            "exec: sh -c 'echo out; echo err >&2; printf partial; exec sleep 3600'",
        ),
        ("other", "exec: sh -c 'echo other; exec sleep 3600'"),
        ("mute", "exec: sh -c 'echo nothing; exec sleep 3600'\nlog: null"),
    ]);
    for service in ["talker", "other", "mute"] {
        daemon.wait_for_state(service, "Running");
    }
    wait_for("the lines are there", || {
        let log = daemon.prints(&["log", "--snapshot"]);
        ["[+] talker: out\n", "[-] talker: err\n", "[+] other: other\n"]
            .iter()
            .all(|line| log.contains(line))
    });
    assert!(!daemon.prints(&["log", "-s"]).contains("nothing"));
    let filtered = daemon.prints(&["log", "-s", "talker"]);
    assert!(
        filtered.lines().all(|line| line[4..].starts_with("talker: ")),
        "{filtered}"
    );
    assert!(
        daemon.refuses(&["log", "-s", "talk"]).contains("unknown"),
        "a filter is a whole name"
    );

    let mut following = daemon
        .command(&["log", "other"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(following.stdout.take().unwrap()).lines();
    let mut next_is = |expected: &str| assert!(lines.any(|line| line.unwrap() == expected), "{expected}");
    next_is("[+] other: other");
    daemon.does(&["restart", "talker"]);
    daemon.does(&["restart", "other"]);
    next_is("[-] other: ------------ [start] ------------");
    next_is("[+] other: other");
    // The unfinished line came into the ring when the service was down.
    assert!(daemon.prints(&["log", "-s"]).contains("[+] talker: partial\n"));
    let mut daemon = daemon;
    daemon.does(&["shutdown"]);
    daemon.assert_ends_well();
    assert!(following.wait().unwrap().success(), "a follower ends with the daemon");
}

#[test]
fn environment_and_directory_are_those_of_the_file_and_the_ring_is_as_long_as_asked() {
    let mut daemon = Daemon::prepare(&[
        (
            "there",
            "exec: sh -c 'echo \"$COLOUR in $(pwd)\"; exec sleep 3600'\ndir: /usr\nenv:\n  COLOUR: blue",
        ),
        ("here", "exec: sh -c 'echo \"plain in $(pwd)\"; exec sleep 3600'"),
    ]);
    daemon.run();
    wait_for("both have said where they are", || {
        let log = daemon.prints(&["log", "-s"]);
        log.contains("[+] there: blue in /usr\n") && log.contains("[+] here: plain in /\n")
    });
    daemon.does(&["shutdown"]);
    daemon.assert_ends_well();

    let daemon = {
        let mut daemon = Daemon::prepare(&[("talker", "exec: sh -c 'seq 100; exec sleep 3600'")]);
        daemon.run_as(daemon.init(&["--buffer", "7"]));
        daemon
    };
    wait_for("the last line is there", || {
        daemon.prints(&["log", "-s"]).ends_with("[+] talker: 100\n")
    });
    let log = daemon.prints(&["log", "-s"]);
    assert_eq!(log.lines().count(), 7, "{log}");
    daemon.shutdown();
}

#[test]
fn reload_takes_over_what_has_changed_and_nothing_else() {
    let daemon = Daemon::start(&[("same", SLEEP), ("other", SLEEP), ("gone", SLEEP)]);
    for service in ["same", "other", "gone"] {
        daemon.wait_for_state(service, "Running");
    }
    let pids = ["same", "other", "gone"].map(|service| daemon.pid(service));
    daemon.does(&["reload"]);
    daemon.write("same", "# another text\nexec: \"sleep   3600\"\n");
    daemon.write("other", "exec: sh -c 'exec sleep 3700'");
    daemon.write("new", SLEEP);
    fs::remove_file(daemon.config().join("gone.yaml")).unwrap();
    assert_eq!(
        daemon.prints(&["reload"]),
        "new: added\nother: changed, from its next start on\ngone: without a file now, left as it is\n"
    );
    daemon.wait_for_state("new", "Running");
    assert_eq!(
        ["same", "other", "gone"].map(|service| daemon.pid(service)),
        pids,
        "nobody was restarted"
    );
    daemon.write("other", "exec: 'sleep");
    let output = daemon.zinit(&["reload"]);
    assert_eq!(output.status.code(), Some(1));
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert!(
        complaint.contains("other.yaml: line 1, column 7: unclosed quote"),
        "{complaint}"
    );
    daemon.does(&["restart", "other"]);
    daemon.wait_for_state("other", "Running");
    let command = fs::read(format!("/proc/{}/cmdline", daemon.pid("other"))).unwrap();
    assert_eq!(command, b"sleep\x003700\x00", "the last good definition holds");
    daemon.shutdown();
}

#[test]
fn a_reboot_of_a_container_ends_the_daemon() {
    let mut daemon = Daemon::start(&[("web", SLEEP)]);
    daemon.wait_for_state("web", "Running");
    daemon.does(&["reboot"]);
    daemon.assert_ends_well();
}

#[test]
fn sighup_is_a_reload() {
    let daemon = Daemon::start(&[]);
    daemon.write("new", SLEEP);
    daemon.signal(Signal::HUP);
    daemon.wait_for_state("new", "Running");
    daemon.shutdown();
}

#[test]
fn a_signal_ends_the_daemon_as_a_shutdown_does() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut daemon = Daemon::start(&[
            ("db", "exec: sh -c 'setsid sleep 3601 & exec sleep 3600'"),
            ("web", "exec: sleep 3600\nafter: [db]"),
        ]);
        daemon.wait_for_state("web", "Running");
        daemon.signal(signal);
        daemon.assert_ends_well();
    }
}

#[test]
fn services_outlive_a_daemon_that_is_killed_and_its_successor_stops_them() {
    let mut daemon = Daemon::start(&[("web", "exec: sh -c 'setsid sleep 3601 & exec sleep 3600'")]);
    daemon.wait_for_state("web", "Running");
    wait_for("both processes are there", || {
        daemon.json(&["stats", "web", "--json"])["children"]
            .as_array()
            .unwrap()
            .len()
            == 1
    });
    daemon.signal(Signal::KILL);
    daemon.wait();
    assert_eq!(survivors(&daemon.marker).len(), 2, "the services run on");
    assert!(daemon.socket().exists(), "nobody could remove the socket");
    daemon.run();
    daemon.wait_for_state("web", "Running");
    daemon.shutdown();
}

#[test]
fn a_service_that_prints_survives_the_death_of_the_daemon() {
    let mut daemon = Daemon::prepare(&[]);
    let path = daemon.script(
        "ticker",
        "i=0; while :; do i=$((i+1)); echo tick; echo $i > \"$1\"; sleep 0.01; done",
    );
    let counter = daemon.scratch().join("counter");
    daemon.write("ticker", &format!("exec: {path} {}", counter.display()));
    daemon.run();
    let ticks = || -> u64 {
        let text = fs::read_to_string(&counter).unwrap_or_default();
        text.trim().parse().unwrap_or_default()
    };
    wait_for("it ticks", || ticks() > 0);
    daemon.signal(Signal::KILL);
    daemon.wait();
    let before = ticks();
    wait_for("it ticks on", || ticks() > before + 20);
    daemon.run();
    daemon.wait_for_state("ticker", "Running");
    daemon.shutdown();
}

#[test]
fn check_tells_what_is_wrong_without_a_daemon() {
    let daemon = Daemon::prepare(&[("good", SLEEP), ("after", "exec: sleep 1\nafter: [good]")]);
    let config = daemon.config();
    let check = |directory: &str| Command::new(zinit()).args(["check", directory]).output().unwrap();
    let config = config.to_str().unwrap();
    let output = check(config);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "2 services, no faults\n");
    assert!(output.status.success());
    daemon.write("bad", "exec: sleep 1\nonshot: true\nsignal: {stop: SIGTREM}");
    daemon.write("cycle", "exec: sleep 1\nafter: [cycle]");
    let output = check(config);
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("bad.yaml: line 3, column 16: signal.stop: \"SIGTREM\" is no signal: did you mean SIGTERM?"),
        "{stderr}"
    );
    assert!(stderr.contains("cycle → cycle"), "{stderr}");
    let output = check("/nonexistent");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent is no directory"));
}

#[test]
fn clients_without_a_daemon_say_so_in_one_line() {
    let daemon = Daemon::prepare(&[]);
    for arguments in [
        &["list"][..],
        &[],
        &["status", "web"],
        &["start", "web"],
        &["stop", "web"],
        &["restart", "web"],
        &["monitor", "web"],
        &["forget", "web"],
        &["kill", "web"],
        &["log"],
        &["stats", "web"],
        &["reload"],
        &["shutdown"],
        &["reboot"],
        &["proxy", "-a", "127.0.0.1:0"],
    ] {
        let line = daemon.refuses(arguments);
        assert!(line.contains("is `zinit init` running"), "{line}");
    }
}

#[test]
fn every_command_explains_itself() {
    for command in [
        "init",
        "list",
        "status",
        "start",
        "stop",
        "restart",
        "monitor",
        "forget",
        "kill",
        "log",
        "stats",
        "shutdown",
        "reboot",
        "proxy",
        "reload",
        "check",
        "completions",
    ] {
        let output = Command::new(zinit()).args([command, "--help"]).output().unwrap();
        assert!(output.status.success(), "{command}");
        let help = String::from_utf8_lossy(&output.stdout);
        let example = format!("zinit {command}");
        for text in ["Usage: zinit", "Example: ", &example, "Exit status: 0"] {
            assert!(help.contains(text), "{command}, {text}: {help}");
        }
    }
    for argument in ["-h", "-V", "--help", "--version"] {
        assert!(
            Command::new(zinit()).arg(argument).output().unwrap().status.success(),
            "{argument}"
        );
    }
}

#[test]
fn shells_get_completions_that_they_understand() {
    for shell in ["bash", "zsh", "fish"] {
        let output = Command::new(zinit()).args(["completions", shell]).output().unwrap();
        assert!(output.status.success(), "{shell}");
        let script = String::from_utf8(output.stdout).unwrap();
        for word in ["zinit", "restart", "snapshot", "kill"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
        if shell == "bash" {
            let checked = Command::new("bash").args(["-n", "-c", &script]).status().unwrap();
            assert!(checked.success());
        }
    }
    let refused = Command::new(zinit()).args(["completions", "cmd.exe"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
}
