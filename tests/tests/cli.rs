//! The tool as people and scripts use it: exit statuses, reports, listings, and what it says to bad input.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::CommandExt as _,
    process::{Command, Output, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use zinit_tests::{Cleanup, Marker, Ready, actor, kernel_is_at_least, sandbox::PinDir, survivors, tool};

/// Gives the signals that a terminal sends their default effect.
fn heed_signals() -> std::io::Result<()> {
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
        // SAFETY: the default installs no handler.
        unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl) }?;
    }
    Ok(())
}

/// A pin directory, and commands of the tool that use it.
struct Bench {
    _cleanup: Cleanup,
    pins: PinDir,
    marker: Marker,
}

impl Bench {
    fn new() -> Self {
        let marker = Marker::new();
        let cleanup = Cleanup::new(&marker);
        Self {
            _cleanup: cleanup,
            pins: PinDir::new(),
            marker,
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(tool());
        command
            .args(args)
            .env("ZINIT_TRACKER_PINS", self.pins.path())
            .env(Marker::ENV, self.marker.as_str())
            .stdin(Stdio::null());
        // Whoever runs the tests in the background may have them ignored, and then the tool would do the same.
        // SAFETY: system calls only.
        unsafe { command.pre_exec(heed_signals) };
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Asserts the status, that stderr has the text, and that a failure is one line.
    fn fails(&self, args: &[&str], status: i32, text: &str) {
        let output = self.run(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {stderr}");
        assert!(stderr.contains(text), "{args:?}: {stderr}");
        if status != 2 {
            assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        }
        self.assert_nothing_left();
    }

    fn assert_nothing_left(&self) {
        assert!(!self.pins.path().exists(), "pins are left");
        assert_eq!(survivors(&self.marker), []);
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(args);
        assert!(
            output.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn run_ends_with_the_status_of_the_command() {
    let bench = Bench::new();
    for (script, status) in [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -TERM $$", 128 + 15),
        ("kill -KILL $$", 128 + 9),
    ] {
        let output = bench.run(&["run", "--", "sh", "-c", script]);
        assert_eq!(output.status.code(), Some(status), "{script}: {}", stderr(&output));
        assert!(stderr(&output).trim_end().ends_with("proven"), "{}", stderr(&output));
    }
    bench.assert_nothing_left();
}

#[test]
fn run_stops_what_the_command_leaves_behind() {
    let bench = Bench::new();
    let script = "setsid sleep 300 & (setsid sleep 301 &) ; (trap '' TERM; setsid sleep 302 &) ; exit 5";
    let output = bench.run(&["run", "--grace", "300ms", "--report", "-", "--", "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["proven"], true, "{report:#}");
    assert_eq!(report["tracking"], "ebpf");
    let processes = report["processes"].as_array().unwrap();
    assert_eq!(processes.len(), 3, "{report:#}");
    let killed = |process: &&Value| process["fate"]["killed"] == 9;
    assert_eq!(processes.iter().filter(killed).count(), 1, "{report:#}");
    bench.assert_nothing_left();
}

#[test]
fn run_passes_stdin_and_stdout_through() {
    let bench = Bench::new();
    let mut child = bench
        .command(&["run", "--", "tr", "a-z", "A-Z"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"HELLO\n");
    assert_eq!(output.status.code(), Some(0));
    bench.assert_nothing_left();
}

/// Starts `run` with a script that prints a line when it is ready, and returns after that line.
fn started(bench: &Bench, args: &[&str], script: &str) -> std::process::Child {
    let mut all = vec!["run"];
    all.extend(args);
    all.extend(["--", "sh", "-c", script]);
    let mut child = bench
        .command(&all)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    // Kept open, or the script would be killed by SIGPIPE.
    std::mem::forget(stdout);
    child
}

fn send(child: &std::process::Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
}

#[test]
fn a_signal_to_run_stops_the_service_with_that_signal() {
    let bench = Bench::new();
    for (signal, name, status) in [
        (Signal::SIGTERM, "TERM", 41),
        (Signal::SIGINT, "INT", 42),
        (Signal::SIGHUP, "HUP", 43),
    ] {
        let script = format!("trap 'exit {status}' {name}; setsid sleep 300 & echo ready; while :; do sleep 0.1; done");
        let child = started(&bench, &["--grace", "5s"], &script);
        send(&child, signal);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
        assert!(stderr(&output).trim_end().ends_with("proven"), "{}", stderr(&output));
    }
    bench.assert_nothing_left();
}

#[test]
fn a_second_signal_ends_the_grace_period() {
    let bench = Bench::new();
    // The trap tells that the first signal has arrived.
    let script = "trap 'echo asked >&2' TERM; echo ready; while :; do sleep 0.1; done";
    let mut child = started(&bench, &["--grace", "10m"], script);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    send(&child, Signal::SIGTERM);
    assert!(lines.any(|line| line.unwrap() == "asked"));
    send(&child, Signal::SIGTERM);
    let rest: Vec<_> = lines.map(Result::unwrap).collect();
    assert!(
        rest.iter().any(|line| line.contains("killing what is left")),
        "{rest:#?}"
    );
    assert!(rest.last().unwrap().ends_with("proven"), "{rest:#?}");
    assert_eq!(child.wait().unwrap().code(), Some(128 + 9));
    bench.assert_nothing_left();
}

#[test]
fn usr1_goes_to_the_command() {
    let bench = Bench::new();
    let child = started(
        &bench,
        &[],
        "trap 'exit 9' USR1; echo ready; while :; do sleep 0.1; done",
    );
    send(&child, Signal::SIGUSR1);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(9), "{}", stderr(&output));
    bench.assert_nothing_left();
}

#[test]
fn what_a_killed_run_leaves_can_be_listed_and_stopped() {
    let bench = Bench::new();
    let mut child = started(
        &bench,
        &["--name", "orphaned"],
        "setsid sleep 300 & echo ready; exec sleep 300",
    );
    send(&child, Signal::SIGKILL);
    child.wait().unwrap();
    // The names change while programs are executed.
    let at_rest = |listed: &Value| {
        let mut processes = listed[0]["processes"].as_array().unwrap().iter();
        processes.all(|process| process["comm"] == "sleep")
    };
    let mut listed = bench.json(&["ps", "--json"]);
    while !at_rest(&listed) {
        listed = bench.json(&["ps", "--json"]);
    }
    assert_eq!(listed[0]["name"], "orphaned");
    assert!(listed[0]["live"].as_u64().unwrap() >= 2, "{listed:#}");
    assert_eq!(listed, bench.json(&["tree", "orphaned", "--json"]));
    let plan = bench.json(&["stop", "orphaned", "--dry-run", "--json"]);
    assert_eq!(
        plan.as_array().unwrap().len(),
        listed[0]["processes"].as_array().unwrap().len()
    );
    bench.fails_while_loaded(&["run", "--name", "orphaned", "--", "true"], 125, "is in use");
    bench.fails_while_loaded(&["unload"], 1, "stop it first");
    let report = bench.json(&["stop", "orphaned", "--json", "--grace", "2s"]);
    assert_eq!(report["proven"], true, "{report:#}");
    bench.assert_nothing_left();
}

impl Bench {
    /// As [`Bench::fails`], while a service is there.
    fn fails_while_loaded(&self, args: &[&str], status: i32, text: &str) {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(text), "{args:?}: {}", stderr(&output));
        assert_eq!(stderr(&output).lines().count(), 1, "{args:?}: {}", stderr(&output));
    }
}

#[test]
fn attach_release_and_stop_work_together() {
    let bench = Bench::new();
    let mut ready = Ready::new().unwrap();
    let mut command = actor("chain", ["5"], &bench.marker);
    ready.attach(&mut command);
    let mut child = command.spawn().unwrap();
    ready.wait().unwrap();
    let pid = child.id().to_string();
    let adoption = bench.json(&["attach", &pid, "--name", "old", "--json"]);
    let members = adoption["members"].as_array().unwrap();
    assert_eq!(members.len(), survivors(&bench.marker).len(), "{adoption:#}");
    bench.fails_while_loaded(
        &["attach", &pid, "--name", "again"],
        1,
        "already belongs to service \"old\"",
    );
    let last = members.last().unwrap()["pid"].to_string();
    let released = bench.json(&["release", &last, "--json"]);
    assert_eq!(released.as_array().unwrap().len(), 1, "{released:#}");
    bench.fails_while_loaded(&["release", &last], 1, "belongs to no service");
    let output = bench.run(&["stop", "old", "--report", "-"]);
    // Empty, and not proven: nobody knows what left the tree before it was adopted.
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["doubts"][0]["reason"], "adopted", "{report:#}");
    child.wait().unwrap();
    let left: Vec<_> = survivors(&bench.marker)
        .iter()
        .map(|left| left.pid.to_string())
        .collect();
    assert_eq!(left, [last]);
    assert!(!bench.pins.path().exists(), "pins are left");
}

#[test]
fn bad_input_gets_one_clear_line_and_leaves_nothing() {
    let bench = Bench::new();
    let me = std::process::id().to_string();
    let file = tempfile::NamedTempFile::new().unwrap();
    let not_executable = file.path().to_str().unwrap();
    for (args, status, text) in [
        (&["run", "--", "/nonexistent/program"][..], 127, "failed to start"),
        (&["run", "--", "no-such-program-anywhere"], 127, "failed to start"),
        (&["run", "--", not_executable], 126, "failed to start"),
        (&["run", "--", "/"], 126, "failed to start"),
        (
            &["run", "--report", "/nonexistent/report", "--", "true"],
            125,
            "failed to create the report",
        ),
        (&["run", "--name", "a/b", "--", "true"], 125, "cannot be a name"),
        (&["run", "--name", "", "--", "true"], 125, "cannot be a name"),
        (&["attach", "0", "--name", "x"], 1, "refusing pid 0"),
        (&["attach", "1", "--name", "x"], 1, "refusing pid 1"),
        (&["attach", "2", "--name", "x"], 1, "refusing pid 2"),
        (&["attach", &me, "--name", "x"], 1, "ancestor"),
        (&["attach", "4194305", "--name", "x"], 1, "no process has pid"),
        (&["stop", "nobody"], 1, "nothing is tracked"),
        (&["ps", "nobody"], 1, "nothing is tracked"),
        (&["release", "1"], 1, "nothing is tracked"),
        (&["run"], 2, "CMD"),
        (&["run", "--grace", "10", "--", "true"], 2, "500ms"),
        (&["run", "--signal", "NOPE", "--", "true"], 2, "unknown signal"),
        (&["attach", "-5", "--name", "x"], 2, "unexpected argument"),
        (&["attach", "abc", "--name", "x"], 2, "no pid"),
        (&["frobnicate"], 2, "unrecognized subcommand"),
    ] {
        bench.fails(args, status, text);
    }
}

#[test]
fn an_unknown_service_is_named_while_others_run() {
    let bench = Bench::new();
    let mut child = started(&bench, &["--name", "there"], "echo ready; exec sleep 300");
    bench.fails_while_loaded(&["stop", "nobody"], 1, "no service is named \"nobody\"");
    send(&child, Signal::SIGTERM);
    child.wait().unwrap();
    bench.assert_nothing_left();
}

#[test]
fn pins_of_another_layout_are_refused() {
    let bench = Bench::new();
    let other = bench.pins.path().join("v999");
    std::fs::create_dir_all(&other).unwrap();
    bench.fails_while_loaded(&["run", "--", "true"], 125, "layout v999");
    bench.fails_while_loaded(&["ps"], 1, "layout v999");
    std::fs::remove_dir(other).unwrap();
    std::fs::remove_dir(bench.pins.path()).unwrap();
}

#[test]
fn a_directory_that_is_no_bpf_file_system_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let pins = dir.path().join("pins");
    let output = Command::new(tool())
        .args(["--pins", pins.to_str().unwrap(), "run", "--", "true"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        stderr(&output).contains("not on a bpf file system"),
        "{}",
        stderr(&output)
    );
    assert!(!pins.exists());
}

#[test]
fn missing_rights_are_named() {
    let bench = Bench::new();
    let output = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(tool())
        .args(["--tracking", "ebpf", "run", "--", "true"])
        .env("ZINIT_TRACKER_PINS", bench.pins.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
    assert!(stderr(&output).contains("CAP_BPF"), "{}", stderr(&output));
    bench.assert_nothing_left();
}

#[test]
fn without_a_bpf_file_system_run_works_unpinned_and_says_so() {
    // In a mount namespace where nothing can be mounted at the usual place: /sys is an empty read-only file system.
    let bench = Bench::new();
    let script = format!(
        "mount -t tmpfs tmpfs /mnt && mkdir -p /mnt/kernel/btf /mnt/devices && cp /sys/kernel/btf/vmlinux /mnt/kernel/btf/ && \
         mount --bind /sys/devices /mnt/devices && \
         mount --rbind /mnt /sys && mount -o remount,ro,bind /sys && exec {} run -- sh -c 'setsid sleep 300 & exit 7'",
        tool().display()
    );
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .env(Marker::ENV, bench.marker.as_str())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(7), "{}", stderr(&output));
    assert!(stderr(&output).contains("running unpinned"), "{}", stderr(&output));
    assert!(stderr(&output).trim_end().ends_with("proven"), "{}", stderr(&output));
    bench.assert_nothing_left();
}

#[test]
fn doctor_reports_requirements_and_counters() {
    let bench = Bench::new();
    let report = bench.json(&["doctor", "--json"]);
    assert_eq!(report["tracking"], "ebpf");
    assert_eq!(report["loaded"], Value::Null);
    let mut child = started(&bench, &[], "echo ready; exec sleep 300");
    let report = bench.json(&["doctor", "--json"]);
    assert_eq!(report["loaded"]["services"], 1, "{report:#}");
    assert_eq!(report["loaded"]["counters"]["insert_failures"], 0);
    send(&child, Signal::SIGTERM);
    child.wait().unwrap();
    assert!(bench.run(&["doctor"]).status.success());
    bench.assert_nothing_left();
}

#[test]
fn every_subcommand_explains_itself() {
    let bench = Bench::new();
    for command in [
        "run",
        "ps",
        "tree",
        "why",
        "escapes",
        "events",
        "history",
        "attach",
        "stop",
        "release",
        "doctor",
        "unload",
        "completions",
    ] {
        let output = bench.run(&[command, "--help"]);
        assert!(output.status.success());
        let help = String::from_utf8_lossy(&output.stdout);
        let (_, examples) = help.split_once("Example").unwrap_or_default();
        let example = format!(" zinit-tracker {command}");
        assert!(examples.contains(&example), "{command}: {help}");
        for text in ["Usage:", "Exit status: "] {
            assert!(help.contains(text), "{command}, {text}: {help}");
        }
    }
    for shell in ["bash", "zsh", "fish"] {
        let output = bench.run(&["completions", shell]);
        assert!(
            output.status.success() && String::from_utf8_lossy(&output.stdout).contains("unload"),
            "{shell}"
        );
    }
    let output = bench.run(&["unload"]);
    assert!(output.status.success() && stderr(&output).contains("nothing is loaded"));
}

#[test]
fn bpftool_prints_the_maps_by_field_name_and_lists_the_programs() {
    if Command::new("bpftool").arg("version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "CI must have bpftool");
        println!("SKIPPED: bpftool is not installed");
        return;
    }
    let bench = Bench::new();
    let mut child = started(&bench, &["--name", "seen"], "echo ready; exec sleep 300");
    let dump = |map: &str| {
        let path = bench.pins.path().join("v2").join(map);
        let output = Command::new("bpftool")
            .args(["-j", "map", "dump", "pinned"])
            .arg(path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let process = &dump("processes")[0]["formatted"]["value"];
    for field in [
        "service",
        "flags",
        "start_boottime_ns",
        "parent_start_boottime_ns",
        "joined_boottime_ns",
        "parent_tgid",
        "pid",
        "session",
        "group",
        "comm",
    ] {
        assert!(!process[field].is_null(), "{field}: {process:#}");
    }
    let service = &dump("services")[0]["formatted"]["value"];
    assert_eq!(service["live"], 1, "{service:#}");
    for field in [
        "forks",
        "exits",
        "peak",
        "lost",
        "root_tgid",
        "state",
        "parent",
        "instance",
        "name",
    ] {
        assert!(!service[field].is_null(), "{field}: {service:#}");
    }
    let list = |kind: &str| {
        let output = Command::new("bpftool").args(["-j", kind, "list"]).output().unwrap();
        serde_json::from_slice::<Vec<Value>>(&output.stdout).unwrap()
    };
    let programs = list("prog");
    let links = list("link");
    let mut hooks = vec!["zinit_fork", "zinit_exec", "zinit_exit", "zinit_free"];
    if kernel_is_at_least(5, 11) {
        hooks.push("zinit_wakeup");
    }
    for name in hooks {
        let ids: Vec<_> = programs.iter().filter(|program| program["name"] == name).collect();
        assert!(!ids.is_empty(), "{name}");
        let linked = |link: &Value| ids.iter().any(|program| link["prog_id"] == program["id"]);
        assert!(links.iter().any(linked), "{name} has no link");
    }
    send(&child, Signal::SIGTERM);
    child.wait().unwrap();
    bench.assert_nothing_left();
}

#[test]
fn run_works_in_a_nested_pid_namespace() {
    let bench = Bench::new();
    let script = "setsid sleep 300 & (setsid sleep 301 &) ; exit 6";
    let output = bench_in_pid_namespace(&bench, script);
    assert_eq!(output.status.code(), Some(6), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    // Stable releases before 6.5 may have what exact tracking takes here, and may not; then it must be said.
    if !kernel_is_at_least(6, 5) && report["tracking"] == "procfs" {
        assert!(stderr(&output).contains("needs Linux 6.5"), "{}", stderr(&output));
        assert_eq!(report["survivors"], serde_json::json!([]), "{report:#}");
        bench.assert_nothing_left();
        return;
    }
    assert_eq!(report["proven"], true, "{report:#}");
    let processes = report["processes"].as_array().unwrap();
    assert_eq!(processes.len(), 2, "{report:#}");
    for process in processes {
        assert!(process["pid"].as_u64().unwrap() < 100, "not translated: {report:#}");
        assert_eq!(process["fate"]["killed"], 15, "{report:#}");
    }
    bench.assert_nothing_left();
}

/// Runs the script with `run` in a pid namespace of its own, where pids are small.
fn bench_in_pid_namespace(bench: &Bench, script: &str) -> Output {
    Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .arg(tool())
        .args(["run", "--report", "-", "--", "sh", "-c", script])
        .env("ZINIT_TRACKER_PINS", bench.pins.path())
        .env(Marker::ENV, bench.marker.as_str())
        .output()
        .unwrap()
}

#[test]
fn the_programs_say_what_they_do_when_asked_twice_for_more() {
    let bench = Bench::new();
    let output = bench.run(&["-vv", "run", "--", "true"]);
    assert!(output.status.success());
    assert!(stderr(&output).contains("creates"), "{}", stderr(&output));
    let quiet = bench.run(&["run", "--", "true"]);
    assert_eq!(stderr(&quiet).lines().count(), 1, "{}", stderr(&quiet));
    bench.assert_nothing_left();
}

#[test]
fn run_works_in_a_time_namespace_that_shifts_the_clock() {
    let bench = Bench::new();
    let output = Command::new("unshare")
        .args(["--time", "--boottime", "86400", "--fork"])
        .arg(tool())
        .args(["run", "--", "sh", "-c", "setsid sleep 300 & exit 8"])
        .env("ZINIT_TRACKER_PINS", bench.pins.path())
        .env(Marker::ENV, bench.marker.as_str())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(8), "{}", stderr(&output));
    assert!(stderr(&output).trim_end().ends_with("proven"), "{}", stderr(&output));
    bench.assert_nothing_left();
}

#[test]
fn pins_of_a_loader_that_died_half_way_are_replaced() {
    let bench = Bench::new();
    // Pins without the layout record, which is written last.
    std::fs::create_dir_all(bench.pins.path().join("v2/links")).unwrap();
    let output = bench.run(&["run", "--", "true"]);
    assert!(output.status.success(), "{}", stderr(&output));
    bench.assert_nothing_left();
}

#[test]
fn twenty_runs_at_once_share_one_tracker_and_leave_nothing() {
    let bench = Bench::new();
    let mut children: Vec<_> = (0..20)
        .map(|number| {
            bench
                .command(&["run", "--grace", "5s", "--", "sh", "-c", "setsid sleep 300 & exit $0"])
                .arg(number.to_string())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for (number, child) in children.drain(..).enumerate() {
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), i32::try_from(number).ok(), "{}", stderr(&output));
        assert!(stderr(&output).trim_end().ends_with("proven"), "{}", stderr(&output));
    }
    bench.assert_nothing_left();
}

#[test]
fn a_stop_of_a_service_in_run_leaves_both_with_their_status() {
    let bench = Bench::new();
    for _ in 0..10 {
        let script = "trap 'exit 6' TERM; echo ready; sleep 300 & wait";
        let child = started(&bench, &["--name", "both"], script);
        let stop = bench.run(&["stop", "both"]);
        assert_eq!(stop.status.code(), Some(0), "{}", stderr(&stop));
        let run = child.wait_with_output().unwrap();
        assert_eq!(run.status.code(), Some(6), "{}", stderr(&run));
    }
    bench.assert_nothing_left();
}

#[test]
fn a_grace_period_longer_than_the_clock_can_hold_works() {
    let bench = Bench::new();
    let output = bench.run(&[
        "run",
        "--grace",
        "500000000000years",
        "--",
        "sh",
        "-c",
        "sleep 300 & exit 3",
    ]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    bench.assert_nothing_left();
}

#[test]
fn a_report_that_cannot_be_written_loses_nothing() {
    let bench = Bench::new();
    let full = bench.run(&["run", "--report", "/dev/full", "--", "sh", "-c", "sleep 300 & exit 3"]);
    assert_eq!(full.status.code(), Some(125), "{}", stderr(&full));
    assert!(
        stderr(&full).contains("failed to write the report /dev/full"),
        "{}",
        stderr(&full)
    );
    bench.assert_nothing_left();
    // A reader that has gone.
    let mut child = bench
        .command(&["run", "--report", "-", "--", "sh", "-c", "sleep 300 & exit 3"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(3));
    bench.assert_nothing_left();
}

#[test]
fn a_run_that_cannot_start_leaves_reports_as_they_were() {
    let bench = Bench::new();
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    std::fs::write(&old, "kept").unwrap();
    for path in [&old, &new] {
        bench.fails(
            &["run", "--report", path.to_str().unwrap(), "--", "/nonexistent"],
            127,
            "failed to start",
        );
    }
    assert_eq!(std::fs::read_to_string(&old).unwrap(), "kept");
    assert!(!new.exists());
    let output = bench.run(&["run", "--report", old.to_str().unwrap(), "--", "true"]);
    assert!(output.status.success());
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&old).unwrap()).unwrap();
    assert_eq!(report["proven"], true);
}

/// A `run` whose service is empty because its command was released; the command ends when its stdin is closed.
fn with_released_command(bench: &Bench) -> (std::process::Child, std::process::ChildStdin) {
    let mut child = bench
        .command(&[
            "run",
            "--name",
            "empty",
            "--",
            "sh",
            "-c",
            "echo ready; read line; exit 9",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "ready\n");
    let main = bench.json(&["ps", "empty", "--json"])[0]["processes"][0]["pid"].to_string();
    bench.json(&["release", &main, "--json"]);
    let stdin = child.stdin.take().unwrap();
    (child, stdin)
}

#[test]
fn unload_and_a_second_run_respect_a_service_that_is_empty_for_now() {
    let bench = Bench::new();
    let (child, stdin) = with_released_command(&bench);
    bench.fails_while_loaded(&["unload"], 1, "another process uses the tracker");
    bench.fails_while_loaded(&["run", "--name", "empty", "--", "true"], 125, "is in use");
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(9), "{}", stderr(&output));
    bench.assert_nothing_left();
}

#[test]
fn half_made_pins_are_removed_by_whoever_looks() {
    let bench = Bench::new();
    for command in [&["ps"][..], &["doctor"], &["unload"]] {
        std::fs::create_dir_all(bench.pins.path().join("v2/links")).unwrap();
        assert!(bench.run(command).status.success(), "{command:?}");
        bench.assert_nothing_left();
    }
}

#[test]
fn few_file_descriptors_are_enough_for_many_processes() {
    let bench = Bench::new();
    let script = format!(
        "ulimit -n 48; exec {} run --grace 300ms -- sh -c \
         'i=0; while [ $i -lt 100 ]; do (trap \"\" TERM; exec setsid sleep 300) & i=$((i+1)); done; exit 4'",
        tool().display()
    );
    let output = Command::new("sh")
        .args(["-c", &script])
        .env("ZINIT_TRACKER_PINS", bench.pins.path())
        .env(Marker::ENV, bench.marker.as_str())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(4), "{}", stderr(&output));
    assert!(stderr(&output).trim_end().ends_with("proven"), "{}", stderr(&output));
    bench.assert_nothing_left();
}

#[test]
fn a_signal_that_was_ignored_at_the_start_stays_ignored() {
    let bench = Bench::new();
    let script = format!(
        "trap '' HUP; exec {} run -- sh -c 'echo ready; read line; exit 5'",
        tool().display()
    );
    let mut child = Command::new("sh")
        .args(["-c", &script])
        .env("ZINIT_TRACKER_PINS", bench.pins.path())
        .env(Marker::ENV, bench.marker.as_str())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    send(&child, Signal::SIGHUP);
    drop(child.stdin.take());
    assert_eq!(child.wait().unwrap().code(), Some(5));
    bench.assert_nothing_left();
}

#[test]
fn names_that_command_a_terminal_are_shown_plain() {
    let bench = Bench::new();
    let dir = tempfile::tempdir().unwrap();
    let evil = dir.path().join("\u{1b}[2J\nproven");
    std::fs::copy(zinit_tests::actor_path().unwrap(), &evil).unwrap();
    let script = format!("'{}' rest & echo ready; exec sleep 300", evil.to_str().unwrap());
    let child = started(&bench, &["--name", "evil"], &script);
    for command in ["ps", "tree"] {
        // The name comes with the exec, which may be a moment later.
        let shown = loop {
            let output = bench.run(&[command, "evil"]);
            let shown = String::from_utf8(output.stdout).unwrap();
            if shown.contains("[2J") {
                break shown;
            }
        };
        assert!(!shown.contains('\u{1b}'), "{shown:?}");
        assert!(shown.contains("\\u{1b}[2J\\nproven"), "{shown:?}");
    }
    send(&child, Signal::SIGTERM);
    let output = child.wait_with_output().unwrap();
    assert!(!stderr(&output).contains('\u{1b}'), "{}", stderr(&output));
    bench.assert_nothing_left();
}

/// Starts `run` in the foreground of a terminal of its own.
fn in_terminal(bench: &Bench, script: &str) -> (std::process::Child, std::fs::File) {
    let pty = nix::pty::openpty(None, None).unwrap();
    let terminal = std::fs::File::from(pty.slave);
    let mut command = bench.command(&["run", "--grace", "10m", "--", "sh", "-c", script]);
    command
        .stdin(terminal.try_clone().unwrap())
        .stdout(terminal)
        .stderr(Stdio::piped());
    // SAFETY: two system calls.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        })
    };
    let child = command.spawn().unwrap();
    drop(command);
    let mut master = std::fs::File::from(pty.master);
    expect(&mut master, "ready");
    (child, master)
}

/// Reads from the terminal until the text has come.
fn expect(master: &mut std::fs::File, text: &str) {
    use std::io::Read as _;
    let mut shown = Vec::new();
    let mut byte = [0];
    while !shown.ends_with(text.as_bytes()) {
        master.read_exact(&mut byte).unwrap();
        shown.push(byte[0]);
    }
}

#[test]
fn ctrl_c_reaches_the_command_once_and_a_second_one_kills() {
    let bench = Bench::new();
    let (mut child, mut master) = in_terminal(&bench, "trap 'exit 4' INT; echo ready; while :; do sleep 0.1; done");
    master.write_all(b"\x03").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(4));
    // The command says so when it is interrupted; the grace period of ten minutes is ended by the second Ctrl-C.
    let script = "trap 'echo interrupted' INT; trap '' TERM; echo ready; while :; do sleep 0.1; done";
    let (mut child, mut master) = in_terminal(&bench, script);
    master.write_all(b"\x03").unwrap();
    expect(&mut master, "interrupted");
    // As a person does: signals that come faster than they are taken are one.
    let status = loop {
        master.write_all(b"\x03").unwrap();
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(128 + 9));
    bench.assert_nothing_left();
}

#[test]
fn a_stop_of_an_outer_run_finds_inner_runs_that_come_and_go() {
    let bench = Bench::new();
    // One inner service after the other; each leaves a daemon that is deaf to SIGTERM, and has had deaths of its own.
    let inner = format!(
        "{} run --grace 100ms -- sh -c 'true; true; (trap \"\" TERM; exec setsid sleep 300) & sleep 0.05'",
        tool().display()
    );
    let script = format!("trap '' TERM; echo ready; while :; do {inner} 2>/dev/null; done");
    for _ in 0..5 {
        let child = started(&bench, &["--name", "outer", "--grace", "200ms"], &script);
        let output = bench.run(&["stop", "outer", "--grace", "200ms"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(stderr(&output).trim_end().ends_with("proven"), "{}", stderr(&output));
        // The outer run itself carries the marker until it has ended.
        child.wait_with_output().unwrap();
        assert_eq!(survivors(&bench.marker), []);
    }
    bench.assert_nothing_left();
}

#[test]
fn run_stops_processes_that_proc_hides() {
    // The service's child belongs to another user, and this program may not look at other users' processes.
    let bench = Bench::new();
    let script = format!(
        "mount -t proc -o hidepid=2 proc /proc && exec setpriv --inh-caps=-sys_ptrace --bounding-set=-sys_ptrace {} \
         run --report - -- sh -c 'setpriv --reuid=65534 --clear-groups setsid sleep 300 & sleep 0.2; exit 6'",
        tool().display()
    );
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .env("ZINIT_TRACKER_PINS", bench.pins.path())
        .env(Marker::ENV, bench.marker.as_str())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(6), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["proven"], true, "{report:#}");
    assert_eq!(report["processes"][0]["fate"]["killed"], 15, "{report:#}");
    bench.assert_nothing_left();
}

#[test]
fn doctor_tries_what_it_promises() {
    let bench = Bench::new();
    let report = bench.json(&["doctor", "--json"]);
    assert_eq!(report["tracking"], "ebpf", "{report:#}");
    let promises = report["promises"].as_array().unwrap();
    assert_eq!(promises.len(), 8, "{report:#}");
    assert!(promises.iter().all(|promise| promise["holds"] == true), "{report:#}");
    bench.assert_nothing_left();
}

#[test]
fn doctor_says_what_cannot_be_promised_without_bpf() {
    let bench = Bench::new();
    let output = Command::new("setpriv")
        .args(["--inh-caps=-bpf,-sys_admin", "--bounding-set=-bpf,-sys_admin"])
        .arg(tool())
        .args(["doctor", "--json"])
        .env("ZINIT_TRACKER_PINS", bench.pins.path())
        .env(Marker::ENV, bench.marker.as_str())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["tracking"], "procfs", "{report:#}");
    assert!(report["reason"].as_str().unwrap().contains("CAP_BPF"), "{report:#}");
    let holds: Vec<_> = (0..8).map(|index| &report["promises"][index]["holds"]).collect();
    assert_eq!(
        (holds[0], holds[1], holds[4]),
        (&false.into(), &true.into(), &false.into()),
        "{report:#}"
    );
    bench.assert_nothing_left();
}
