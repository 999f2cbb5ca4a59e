//! What people see of every listing, to the letter: real processes, with pids, times and the like replaced by what they are.
//!
//! The texts are in `tests/golden`. `ZINIT_TEST_GOLDEN=write` writes them anew.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use nix::{
    sys::{
        prctl::set_child_subreaper,
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use regex::{Captures, Regex};
use serde_json::Value;
use zinit_tests::{
    Cleanup, Marker,
    daemon::{Daemon, wait_for, within},
    sandbox::PinDir,
    tool,
};

/// How this program is called in the texts, which is a test by another name each time that it is built.
const SELF: &str = "golden";

/// The variable that has the texts written.
const REWRITE: &str = "ZINIT_TEST_GOLDEN";

/// Pins of a test's own, and what stands for the pids of its processes.
struct Bench {
    pins: PinDir,
    marker: Marker,
    names: BTreeMap<u64, String>,
    _cleanup: Cleanup,
}

impl Bench {
    fn new() -> Self {
        // Orphans get a parent that is the same on every machine.
        set_child_subreaper(true).unwrap();
        fs::write("/proc/self/comm", SELF).unwrap();
        let marker = Marker::new();
        Self {
            pins: PinDir::new(),
            _cleanup: Cleanup::new(&marker),
            marker,
            names: BTreeMap::from([(std::process::id().into(), "TEST".to_owned())]),
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(tool());
        command
            .arg("--pins")
            .arg(self.pins.path())
            .args(args)
            .env(Marker::ENV, self.marker.as_str())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.run(args);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn name(&mut self, pid: u32, name: &str) {
        self.names.insert(pid.into(), name.to_owned());
    }

    /// Starts `run` in a session of its own, with this service.
    fn start(&mut self, script: &str) -> Child {
        let run = self.command(&["run", "--name", "web", "--", "sh", "-c", script]);
        let mut command = within(Command::new("setsid"), &run);
        let child = command.stderr(Stdio::null()).spawn().unwrap();
        self.name(child.id(), "RUN");
        child
    }

    /// Names who is and was of services: P1, P2 and so on, oldest first.
    fn name_members(&mut self) {
        let services = self.json(&["ps", "--json"]);
        let living = services.as_array().unwrap().iter();
        let living = living.flat_map(|service| service["processes"].as_array().unwrap().clone());
        let history = self.json(&["history", "--json"]);
        let dead = history["processes"].as_array().unwrap().iter().cloned();
        let started = |process: &Value| {
            let field = |name: &str| process[name].as_u64().unwrap();
            (field("start_boottime_ns"), field("tgid"))
        };
        let all: BTreeSet<_> = living.chain(dead).map(|process| started(&process)).collect();
        for (index, (_, pid)) in all.into_iter().enumerate() {
            self.names.insert(pid, format!("P{}", index + 1));
        }
    }

    /// What the tool prints, against the text of this name.
    fn check(&self, name: &str, args: &[&str]) {
        self.check_as(name, args, |text| text);
    }

    fn check_as(&self, name: &str, args: &[&str], change: impl Fn(String) -> String) {
        let output = self.run(args);
        let command = self.replaced(&format!("zinit-tracker {}", args.join(" ")));
        let printed = |bytes: &[u8]| change(self.replaced(std::str::from_utf8(bytes).unwrap()));
        compare(
            name,
            &command,
            &output,
            &printed(&output.stdout),
            &printed(&output.stderr),
        );
    }

    /// The text without what differs between two runs of a test.
    fn replaced(&self, text: &str) -> String {
        let text = text.replace(self.pins.path().to_str().unwrap(), "PINS");
        let text = Regex::new("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{12}Z")
            .unwrap()
            .replace_all(&text, "YYYY-MM-DDThh:mm:ss.mmmZ")
            .into_owned();
        let text = replace(&text, r"[0-9]+\.[0-9]+ m?s\b", |_| Some("TIME".to_owned()));
        let text = Regex::new(r"[0-9]\.[0-9] MiB")
            .unwrap()
            .replace_all(&text, "N.N MiB")
            .into_owned();
        // Nodes of a graph have the time of their start in their names.
        let text = Regex::new("@[0-9]+").unwrap().replace_all(&text, "@START").into_owned();
        replace(&text, r"[0-9]+\b", |number| {
            self.names.get(&number.parse().ok()?).cloned()
        })
    }
}

/// Replaces what the pattern finds, in a column so that it ends where it ended.
fn replace(text: &str, pattern: &str, by: impl Fn(&str) -> Option<String>) -> String {
    let pattern = Regex::new(&format!(r"(?<spaces> *)\b(?<value>{pattern})")).unwrap();
    let one = |captures: &Captures<'_>| {
        let whole = captures.get(0).unwrap();
        let Some(by) = by(&captures["value"]) else {
            return whole.as_str().to_owned();
        };
        let before = text[..whole.start()].chars().next_back();
        let spaces = captures["spaces"].len();
        // A sentence begins with it.
        let in_prose = text[whole.end()..].starts_with(" belong");
        let in_column = match before {
            None | Some('\n') => !in_prose,
            Some(before) => spaces > 1 || spaces == 1 && before.is_ascii_digit(),
        };
        if in_column {
            format!("{by:>width$}", width = whole.as_str().chars().count())
        } else {
            format!("{}{by}", &captures["spaces"])
        }
    };
    pattern.replace_all(text, one).into_owned()
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// Compares what a command has printed with the text of this name, or writes that.
fn compare(name: &str, command: &str, output: &Output, stdout: &str, stderr: &str) {
    let mut text = format!("$ {command}\n{stdout}");
    if !stderr.is_empty() {
        text.push_str(&format!("(on stderr)\n{stderr}"));
    }
    if let Some(status @ 1..) = output.status.code() {
        text.push_str(&format!("(exit status {status})\n"));
    }
    let path = directory().join(format!("{name}.txt"));
    if std::env::var_os(REWRITE).is_some_and(|value| value == "write") {
        fs::write(&path, text).unwrap();
        return;
    }
    let golden = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(
        text == golden,
        "{name} is\n{text}\nand not\n{golden}\n{REWRITE}=write writes it anew, if it is meant to be so"
    );
}

fn end(mut run: Child) {
    kill(Pid::from_raw(run.id().cast_signed()), Signal::SIGTERM).unwrap();
    run.wait().unwrap();
}

/// The cgroup of a test is the machine's affair, and so is who else is in it.
fn without_neighbours(text: String) -> String {
    let mut lines: Vec<String> = Vec::new();
    let cgroup = Regex::new(r"^cgroup \(.*\): .*: (finds [0-9]+ of [0-9]+).*").unwrap();
    for line in text.lines() {
        if let Some(found) = cgroup.captures(line) {
            lines.push(format!("cgroup (HIERARCHY): PATH: {}", &found[1]));
            break;
        }
        if !line.contains("came or went meanwhile") {
            lines.push(line.to_owned());
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// How long ago something was, in the column of ages.
fn without_ages(text: String) -> String {
    replace(&text, r"(?:[0-9]+m)?[0-9]+s\b", |_| Some("AGE".to_owned()))
}

#[test]
fn listings_of_a_service() {
    let mut bench = Bench::new();
    let nothing = ["ps", "tree", "escapes", "events", "history"];
    for listing in nothing {
        bench.check(&format!("nothing-{listing}"), &[listing]);
    }
    let script = "sh -c 'exit 7'; (setsid sleep 3901 &); sh -c 'kill -9 $$'; sleep 3902 & exec sleep 3903";
    let run = bench.start(script);
    wait_for("all sleep", || {
        let output = bench.run(&["ps", "--json"]);
        let services: Value = serde_json::from_slice(&output.stdout).unwrap();
        let processes = services[0]["processes"].as_array().cloned().unwrap_or_default();
        processes.len() == 3 && processes.iter().all(|process| process["comm"] == "sleep")
    });
    bench.name_members();
    let pid = |name: &str| {
        let number = bench.names.iter().find(|(_, known)| *known == name).unwrap().0;
        number.to_string()
    };
    bench.check("ps", &["ps"]);
    let columns = "pid,ppid,service,session,group,user,age,cpu,memory,state,command";
    let sorted = ["ps", "web", "--sort", "age", "--columns", columns];
    bench.check_as("ps-columns", &sorted, without_ages);
    bench.check("tree", &["tree"]);
    bench.check("tree-dot", &["tree", "web", "--dot"]);
    bench.check("escapes", &["escapes"]);
    bench.check("why-main", &["why", &pid("P1")]);
    // The daemon, whose creator is dead.
    let daemon = bench.json(&["escapes", "--json"])[0]["escapes"][0]["pid"].to_string();
    bench.check("why-daemon", &["why", &daemon]);
    bench.check("why-dead", &["why", &pid("P2")]);
    bench.check("why-stranger", &["why", &pid("TEST")]);
    bench.check_as("diff", &["diff", "web"], without_neighbours);
    bench.check("events", &["events"]);
    bench.check("history", &["history"]);
    bench.check("stop-dry-run", &["stop", "web", "--dry-run"]);
    bench.check("stop-unknown", &["stop", "wbe"]);
    end(run);
    assert!(!bench.pins.path().exists());
}

/// Whether a process gets SIGCONT before it is gone is a race.
fn without_sigcont(text: String) -> String {
    text.replace("  SIGCONT after TIME", "")
}

#[test]
fn services_that_end_and_processes_that_come_and_go() {
    let mut bench = Bench::new();
    let mut outsider = within(Command::new("setsid"), Command::new("sleep").arg("3911"));
    let mut outsider = outsider.env(Marker::ENV, bench.marker.as_str()).spawn().unwrap();
    wait_for("it sleeps", || {
        let comm = fs::read_to_string(format!("/proc/{}/comm", outsider.id()));
        comm.is_ok_and(|comm| comm == "sleep\n")
    });
    bench.name(outsider.id(), "P1");
    let pid = outsider.id().to_string();
    bench.check("attach", &["attach", &pid, "--name", "legacy"]);
    bench.check("release", &["release", &pid]);
    bench.check("attach-again", &["attach", &pid, "--name", "again"]);
    // Its service has had nobody else, and others are not known.
    bench.check_as("stop", &["stop", "again"], without_sigcont);
    outsider.wait().unwrap();
    bench.check("unload", &["unload"]);
    bench.check("unload-nothing", &["unload"]);
    assert!(!bench.pins.path().exists());
}

#[test]
fn the_report_of_a_run() {
    let bench = Bench::new();
    let script = "(trap '' TERM; exec sleep 3921) & until grep -q sleep /proc/$!/comm; do :; done; exit 3";
    let args = ["run", "--name", "web", "--grace", "100ms", "--", "sh", "-c", script];
    let output = bench.run(&args);
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    // The only number of five places or so in it.
    let pid = Regex::new("^zinit-tracker: +([0-9]+) ")
        .unwrap()
        .captures(&stderr)
        .unwrap()[1]
        .to_owned();
    let stderr = stderr.replace(&pid, &format!("{:>width$}", "P", width = pid.len()));
    let stderr = bench.replaced(&stderr);
    let rounds = Regex::new("[0-9]+ kill rounds?(, with the gate at [a-z_]+)?").unwrap();
    let stderr = rounds.replace_all(&stderr, "KILL ROUNDS").into_owned();
    compare(
        "run",
        "zinit-tracker run --name web --grace 100ms -- sh -c …",
        &output,
        "",
        &stderr,
    );
}

#[test]
fn events_as_they_happen() {
    use std::os::unix::fs::MetadataExt as _;
    let mut bench = Bench::new();
    // Keeps the tracker loaded.
    let keeper = bench.start("exec sleep 3931");
    wait_for("it sleeps", || {
        let tree = String::from_utf8(bench.run(&["tree"]).stdout).unwrap();
        tree.ends_with(" sleep\n")
    });
    bench.name_members();
    let mut reader = bench
        .command(&["events", "--follow"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    wait_for("the events are read", || {
        let inode = fs::metadata(bench.pins.path().join("v2/programs")).unwrap().ino();
        let locks = fs::read_to_string("/proc/locks").unwrap();
        let ours = |line: &str| line.contains("FLOCK") && line.contains(&format!(":{inode} "));
        locks.lines().any(ours)
    });
    let ran = bench.run(&[
        "run",
        "--name",
        "job",
        "--",
        "sh",
        "-c",
        "sh -c 'exit 7'; sh -c 'kill -9 $$'; true",
    ]);
    assert!(ran.status.success(), "{ran:?}");
    kill(Pid::from_raw(reader.id().cast_signed()), Signal::SIGTERM).unwrap();
    let mut stdout = String::new();
    reader.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    let status = reader.wait().unwrap();
    bench.name_members();
    // Who has created the first is not in the books.
    let creator = Regex::new(r"(?m)^(.*tool/job  by )([0-9]+)$")
        .unwrap()
        .captures(&stdout)
        .unwrap()[2]
        .to_owned();
    bench.name(creator.parse().unwrap(), "RUN");
    let output = Output {
        status,
        stdout: Vec::new(),
        stderr: Vec::new(),
    };
    compare(
        "events-follow",
        "zinit-tracker events --follow",
        &output,
        &bench.replaced(&stdout),
        "",
    );
    end(keeper);
}

/// What is found on a machine is not the same on each; what is asked is.
fn without_findings(text: String) -> String {
    let requirement = Regex::new(r"(?m)^(  (?:ok |NO ) [A-Za-z/][A-Za-z0-9/() ]{12}) .*$").unwrap();
    let promise = Regex::new(r"(?m)^(  (?:ok |NO ) [0-9]\. .{32}) .*$").unwrap();
    let text = requirement.replace_all(&text, "$1 FOUND").into_owned();
    promise.replace_all(&text, "$1 SEEN").into_owned()
}

#[test]
fn the_doctor() {
    let bench = Bench::new();
    bench.check_as("doctor", &["doctor"], without_findings);
}

#[test]
fn what_the_supervisors_clients_print() {
    let daemon = Daemon::start(&[
        ("db", "exec: sleep 3941"),
        ("web", "exec: sh -c 'sleep 3942 & exec sleep 3943'\nafter: [db]"),
        ("bad", "exec: sh -c 'exit 7'\noneshot: true"),
    ]);
    daemon.wait_for_state("web", "Running");
    daemon.wait_for_state("bad", "Error");
    wait_for("the child is counted", || {
        let stats = daemon.json(&["stats", "web", "--json"]);
        !stats["children"].as_array().unwrap().is_empty()
    });
    let check = |name: &str, args: &[&str]| {
        let output = daemon.zinit(args);
        let changed = |bytes: &[u8]| {
            let text = String::from_utf8(bytes.to_vec()).unwrap();
            let text = text.replace(daemon.config().to_str().unwrap(), "CONFIG");
            let field = Regex::new("(pid|memory_usage|cpu_usage): [0-9.]+").unwrap();
            let text = field.replace_all(&text, "$1: NUMBER").into_owned();
            Regex::new(r"Pid\([0-9]+\)")
                .unwrap()
                .replace_all(&text, "Pid(PID)")
                .into_owned()
        };
        let command = format!("zinit {}", args.join(" "));
        compare(
            name,
            &command,
            &output,
            &changed(&output.stdout),
            &changed(&output.stderr),
        );
    };
    check("zinit-list", &["list"]);
    check("zinit-status", &["status", "web"]);
    check("zinit-status-bad", &["status", "bad"]);
    check("zinit-stats", &["stats", "web"]);
    check("zinit-stop", &["stop", "web"]);
    check("zinit-status-unknown", &["status", "nobody"]);
    daemon.write("new", "exec: sleep 3944");
    daemon.write("db", "exec: sleep 3945");
    daemon.write("faulty", "exec: [");
    fs::remove_file(daemon.config().join("bad.yaml")).unwrap();
    check("zinit-reload", &["reload"]);
}

#[test]
fn every_text_is_of_a_test() {
    let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden.rs")).unwrap();
    for entry in fs::read_dir(directory()).unwrap() {
        let name = entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned();
        let known = name.starts_with("nothing-") || source.contains(&format!("\"{name}\""));
        assert!(known, "nobody compares {name}");
    }
}

#[test]
fn numbers_are_replaced_in_columns_and_in_prose() {
    let replaced = |text: &str| replace(text, r"[0-9]+\b", |number| (number.len() > 2).then(|| "P1".to_owned()));
    for (before, after) in [
        ("  14598  sleep", "     P1  sleep"),
        ("1234567 1234567  sh", "     P1      P1  sh"),
        ("    123    1234  sh", "     P1      P1  sh"),
        ("left session 12345, is in 123", "left session P1, is in P1"),
        ("├─ 123456 sleep", "├─ P1 sleep"),
        ("1234567 belongs to a", "P1 belongs to a"),
        ("fork      32399  sh  by 1234", "fork         P1  sh  by P1"),
    ] {
        assert_eq!(replaced(before), after);
    }
}
