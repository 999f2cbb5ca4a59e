//! Another build of `zinit` takes the daemon's place in the same process: nothing of a service changes, nothing is lost, and a
//! stop is as exact as before.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use serde_json::{Value, json};
use zinit_tests::{
    daemon::{Daemon, wait_for, within},
    random::Random,
    rounds, survivors,
    tool::zinit,
};
use zinit_tracker::{Config, Level, Pins, Tracker};

/// The program under another name, which stands for another build: the kernel tells which name a process executes.
fn build(daemon: &Daemon, name: &str) -> PathBuf {
    let path = daemon.scratch().join(name);
    if fs::hard_link(zinit(), &path).is_err() {
        // On another file system.
        fs::copy(zinit(), &path).unwrap();
    }
    path
}

fn executes(daemon: &Daemon) -> PathBuf {
    fs::read_link(format!("/proc/{}/exe", daemon.process().as_raw_pid())).unwrap()
}

fn upgrade(daemon: &Daemon, binary: &Path) {
    let printed = daemon.prints(&["upgrade", "--binary", binary.to_str().unwrap()]);
    assert!(printed.starts_with("zinit "), "{printed}");
    assert_eq!(executes(daemon), binary, "{}", daemon.log());
}

fn statuses(daemon: &Daemon) -> Vec<Value> {
    let services = daemon.json(&["list", "--json"]);
    let names = services.as_object().unwrap().keys();
    names.map(|name| daemon.json(&["status", name, "--json"])).collect()
}

/// What `/proc/PID/…` says of a service's main process.
fn of_process(daemon: &Daemon, service: &str, file: &str, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{}/{file}", daemon.pid(service))).unwrap();
    let line = text.lines().find(|line| line.starts_with(field));
    line.unwrap_or_else(|| panic!("{field} is not in {text}")).to_owned()
}

#[test]
fn services_go_on_and_end_as_if_nothing_had_been() {
    let mut daemon = Daemon::prepare(&[
        (
            "web",
            "exec: sh -c 'setsid sleep 3601 & exec sleep 3600'\ntest: \"true\"\n",
        ),
        ("once", "exec: \"true\"\noneshot: true\n"),
        ("later", "exec: sleep 3600\nafter: [once]\n"),
        ("down", "exec: sleep 3600\n"),
        ("gone", "exec: sh -c 'exit 3'\nrestart: {policy: never}\n"),
        ("blocked", "exec: sleep 3600\nafter: [nobody]\n"),
    ]);
    daemon.run();
    for service in ["web", "later", "down"] {
        daemon.wait_for_state(service, "Running");
    }
    daemon.wait_for_state("gone", "Error(exited 3)");
    daemon.does(&["stop", "down"]);
    let (before, processes) = (statuses(&daemon), survivors(&daemon.marker).len());
    let limit = of_process(&daemon, "web", "limits", "Max open files");
    let pid = daemon.process();
    for round in 1..=3 {
        upgrade(&daemon, &build(&daemon, &format!("zinit-{round}")));
        assert_eq!(daemon.process(), pid);
        assert_eq!(statuses(&daemon), before, "{}", daemon.log());
        let info = daemon.call("system_info", &json!([]));
        assert_eq!(
            (&info["upgrades"], &info["pid"]),
            (&json!(round), &json!(pid.as_raw_pid()))
        );
    }
    assert_eq!(survivors(&daemon.marker).len(), processes);

    // What is started now is what would have been started before.
    daemon.does(&["restart", "later"]);
    daemon.wait_for_state("later", "Running");
    assert_eq!(of_process(&daemon, "later", "limits", "Max open files"), limit);
    for mask in ["SigBlk:", "SigIgn:"] {
        let field = of_process(&daemon, "later", "status", mask);
        assert_eq!(field, of_process(&daemon, "web", "status", mask));
    }
    assert!(of_process(&daemon, "later", "status", "SigBlk:").ends_with("0000000000000000"));
    let environment = fs::read_to_string(format!("/proc/{}/environ", daemon.pid("later"))).unwrap();
    assert!(!environment.contains("ZINIT_HANDOVER"), "{environment}");
    let descriptors = |service| {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", daemon.pid(service))).unwrap();
        let links = descriptors.map(|entry| fs::read_link(entry.unwrap().path()).unwrap());
        links
            .map(|link| link.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        descriptors("later").len(),
        descriptors("web").len(),
        "{:?}",
        descriptors("later")
    );

    let report = daemon.json(&["stop", "web", "--json"]);
    assert_eq!(report["proven"], true, "{report:#}");
    assert_eq!(report["processes"].as_array().unwrap().len(), 2, "{report:#}");
    daemon.shutdown();
}

#[test]
fn the_end_of_a_service_is_noticed_with_its_status() {
    let mut daemon = Daemon::prepare(&[]);
    let go = daemon.scratch().join("go");
    let wait = format!("while [ ! -e {} ]; do sleep 0.01; done; exit 7", go.display());
    daemon.write("ends", &format!("exec: sh -c '{wait}'\nrestart: {{policy: never}}\n"));
    daemon.write("stays", "exec: sleep 3600\n");
    daemon.run();
    daemon.wait_for_state("stays", "Running");
    upgrade(&daemon, &build(&daemon, "next"));
    let pid = daemon.pid("ends");
    fs::write(&go, "").unwrap();
    daemon.wait_for_state("ends", "Error(exited 7)");
    wait_for("it is reaped", || !Path::new(&format!("/proc/{pid}")).exists());
    daemon.does(&["kill", "stays", "SIGKILL"]);
    wait_for("it is started anew", || {
        daemon.pid("stays") != 0 && daemon.state("stays") == "Running"
    });
    daemon.shutdown();
}

#[test]
fn no_line_is_lost_or_comes_twice() {
    let mut daemon = Daemon::prepare(&[]);
    let stop = daemon.scratch().join("stop");
    let count = format!(
        "i=0; while [ ! -e {} ]; do i=$((i+1)); echo line $i; done; echo last $i; exec sleep 3600",
        stop.display()
    );
    let path = daemon.script("count.sh", &count);
    daemon.write("count", &format!("exec: {path}\n"));
    daemon.run_as(daemon.init(&["--buffer", "5000000"]));
    daemon.wait_for_state("count", "Running");
    for round in 1..=3 {
        upgrade(&daemon, &build(&daemon, &format!("zinit-{round}")));
    }
    fs::write(&stop, "").unwrap();
    let mut lines = String::new();
    wait_for("the last line is there", || {
        lines = daemon.prints(&["log", "--snapshot", "count"]);
        lines.contains("last ")
    });
    let numbers: Vec<u64> = lines
        .lines()
        .filter_map(|line| line.split_once("line ")?.1.parse().ok())
        .collect();
    assert!(!numbers.is_empty());
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    let last = lines
        .lines()
        .find_map(|line| Some(line.split_once("last ")?.1.to_owned()));
    assert_eq!(last.unwrap(), numbers.len().to_string());
    println!("{} lines over three upgrades: none lost", numbers.len());
    daemon.shutdown();
}

#[test]
fn no_fork_is_missed_under_load() {
    let mut daemon = Daemon::prepare(&[]);
    let stop = daemon.scratch().join("stop");
    // The shell forks for each of these, and writes down how many it has.
    let script = format!(
        "i=0; while [ ! -e {} ]; do ( : ); i=$((i+1)); done; echo forked $i; exec sleep 3600",
        stop.display()
    );
    let path = daemon.script("fork.sh", &script);
    daemon.write("forks", &format!("exec: {path}\n"));
    daemon.run();
    daemon.wait_for_state("forks", "Running");
    for round in 1..=3 {
        // The daemon's programs are another build's now, so that its successor replaces them.
        let other = Config {
            pins: Pins::Shared(daemon.pins().to_owned()),
            instance: "test".to_owned(),
            level: Level::Ebpf,
            replace_programs: true,
            sources: [round; 32],
            ..Config::default()
        };
        drop(Tracker::open(&other).unwrap());
        let hook = daemon.pins().join("v2/programs/zinit_fork");
        let before = fs::metadata(&hook).unwrap().ino();
        upgrade(&daemon, &build(&daemon, &format!("zinit-{round}")));
        assert_ne!(fs::metadata(&hook).unwrap().ino(), before, "{}", daemon.log());
    }
    fs::write(&stop, "").unwrap();
    let mut forked = None;
    wait_for("it has counted", || {
        let lines = daemon.prints(&["log", "--snapshot", "forks"]);
        forked = lines
            .lines()
            .find_map(|line| line.split_once("forked ")?.1.parse::<u64>().ok());
        forked.is_some()
    });
    let books: Value = serde_json::from_slice(&daemon.tracker(&["ps", "forks", "--json"]).stdout).unwrap();
    // The main process itself beside them.
    assert_eq!(books[0]["forks"], forked.unwrap() + 1, "{books:#}");
    println!("{} forks over three upgrades: none missed", forked.unwrap());
    daemon.shutdown();
}

#[test]
fn clients_that_come_meanwhile_wait() {
    let mut daemon = Daemon::prepare(&[("web", "exec: sleep 3600\n")]);
    daemon.run();
    daemon.wait_for_state("web", "Running");
    let binary = build(&daemon, "next");
    let mut upgrade = daemon.command(&["upgrade", "--binary", binary.to_str().unwrap()]);
    let mut upgrade = upgrade.stdout(Stdio::null()).spawn().unwrap();
    let mut asked = 0;
    loop {
        let ended = upgrade.try_wait().unwrap();
        let stderr = String::from_utf8(daemon.zinit(&["list"]).stderr).unwrap();
        // Who was let in and had not asked yet is sent away; nobody finds no daemon.
        assert!(!stderr.contains("failed to connect"), "{stderr}");
        asked += 1;
        if let Some(status) = ended {
            assert!(status.success());
            break;
        }
    }
    println!("{asked} clients meanwhile");
    assert_eq!(executes(&daemon), binary);
    daemon.shutdown();
}

#[test]
fn a_program_that_will_not_do_is_refused_and_everything_goes_on() {
    let mut daemon = Daemon::prepare(&[("web", "exec: sleep 3600\n")]);
    daemon.run();
    daemon.wait_for_state("web", "Running");
    let (before, program) = (statuses(&daemon), executes(&daemon));
    let other = daemon.script("other", "echo zinit 9 handover 9");
    let fails = daemon.script("fails", "echo zinit 9 handover 1; exit 1");
    let text = daemon.scratch().join("text");
    fs::write(&text, "not a program").unwrap();
    for (binary, reason) in [
        ("/bin/true", "no zinit that takes over"),
        ("/nonexistent/zinit", "No such file"),
        (daemon.scratch().to_str().unwrap(), "Permission denied"),
        (text.to_str().unwrap(), "Permission denied"),
        (&other, "other versions (handover 9)"),
        (&fails, "otherwise than with status 0"),
    ] {
        let line = daemon.refuses(&["upgrade", "--binary", binary]);
        assert!(line.contains(reason) && line.contains(binary), "{line}");
        assert_eq!(
            (statuses(&daemon), executes(&daemon)),
            (before.clone(), program.clone())
        );
    }
    // It passes its trial, and is no program after all when it counts.
    let flaky = daemon.scratch().join("flaky");
    let script = format!(
        "#!/bin/sh\nrm {}\nexec {} upgrade --check\n",
        flaky.display(),
        zinit().display()
    );
    fs::write(&flaky, script).unwrap();
    assert!(Command::new("chmod").arg("755").arg(&flaky).status().unwrap().success());
    let line = daemon.refuses(&["upgrade", "--binary", flaky.to_str().unwrap()]);
    assert!(line.contains("goes on as it was"), "{line}");
    assert!(daemon.log().contains("not upgraded"), "{}", daemon.log());
    assert_eq!((statuses(&daemon), executes(&daemon)), (before, program));
    daemon.signal(Signal::TERM);
    daemon.assert_ends_well();
}

#[test]
fn the_file_in_the_place_of_the_daemons_own_is_the_default() {
    let mut daemon = Daemon::prepare(&[("web", "exec: sleep 3600\n")]);
    let path = build(&daemon, "installed");
    let init = daemon.init(&[]);
    let mut command = Command::new(&path);
    command.args(init.get_args());
    for (name, value) in init.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    daemon.run_as(command);
    daemon.wait_for_state("web", "Running");
    let pid = daemon.pid("web");
    // As an installer does: a new file is renamed over the old one.
    let next = daemon.scratch().join("next");
    fs::copy(zinit(), &next).unwrap();
    fs::rename(&next, &path).unwrap();
    assert!(executes(&daemon).to_string_lossy().ends_with(" (deleted)"));
    let printed = daemon.prints(&["upgrade"]);
    assert!(printed.starts_with("zinit "), "{printed}");
    assert_eq!((executes(&daemon), daemon.pid("web")), (path, pid));
    daemon.shutdown();
}

#[test]
fn without_pinned_books_it_is_refused() {
    let mut daemon = Daemon::prepare(&[("web", "exec: sleep 3600\n")]);
    daemon.run_as(daemon.init(&["--tracking", "procfs"]));
    daemon.wait_for_state("web", "Running");
    let pid = daemon.pid("web");
    let line = daemon.refuses(&["upgrade"]);
    assert!(line.contains("the books are not pinned"), "{line}");
    assert_eq!((daemon.pid("web"), daemon.state("web")), (pid, "Running".to_owned()));
    daemon.shutdown();
}

#[test]
fn a_signal_that_comes_meanwhile_is_not_lost() {
    let Random(first) = Random::seeded(7);
    for seed in (first..).take(rounds(6) as usize) {
        let mut random = Random(seed);
        let mut daemon = Daemon::start(&[("web", "exec: sh -c 'setsid sleep 3601 & exec sleep 3600'\n")]);
        daemon.wait_for_state("web", "Running");
        let mut upgrade = daemon.command(&["upgrade"]);
        let mut upgrade = upgrade.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.below(80_000) as u64));
        daemon.signal(Signal::TERM);
        daemon.assert_ends_well();
        // Whether it succeeds depends on who was first.
        upgrade.wait().unwrap();
    }
}

#[test]
fn more_descriptors_than_services_may_have_are_handed_over() {
    let names: Vec<_> = (0..40).map(|number| format!("s{number}")).collect();
    let mut daemon = Daemon::prepare(&[]);
    for name in &names {
        daemon.write(name, "exec: sleep 3600\n");
    }
    let mut command = Command::new("prlimit");
    command.arg("--nofile=64:4096");
    let command = within(command, &daemon.init(&[]));
    daemon.run_as(command);
    for name in &names {
        daemon.wait_for_state(name, "Running");
    }
    let before = statuses(&daemon);
    let descriptors = fs::read_dir(format!("/proc/{}/fd", daemon.process().as_raw_pid()))
        .unwrap()
        .count();
    assert!(descriptors > 64, "{descriptors}");
    for round in 1..=2 {
        upgrade(&daemon, &build(&daemon, &format!("zinit-{round}")));
        assert_eq!(statuses(&daemon), before, "{}", daemon.log());
    }
    daemon.does(&["restart", "s0"]);
    daemon.wait_for_state("s0", "Running");
    let limit = of_process(&daemon, "s0", "limits", "Max open files");
    assert_eq!(limit.split_whitespace().nth(3), Some("64"), "{limit}");
    daemon.shutdown();
}

#[test]
fn a_program_that_does_not_understand_the_command_line_is_refused() {
    let mut daemon = Daemon::prepare(&[("web", "exec: sleep 3600\n")]);
    daemon.run();
    daemon.wait_for_state("web", "Running");
    // It takes over, but from a supervisor that was started otherwise.
    let script = format!(
        "[ \"$1 $2\" = \"upgrade --check\" ] && exec {} upgrade --check -- zinit init --of-another-build",
        zinit().display()
    );
    let other = daemon.script("other", &script);
    let line = daemon.refuses(&["upgrade", "--binary", &other]);
    assert!(line.contains("otherwise than with status 0"), "{line}");
    let own = daemon.zinit(&["upgrade", "--check", "--", "zinit", "init", "--container"]);
    assert!(own.status.success());
    assert_eq!(daemon.state("web"), "Running");
    daemon.shutdown();
}
