//! What the cases have in common: a supervisor in a cgroup of its own, which tells who belongs to its service.
//!
//! A marker in the environment would not do: PostgreSQL and nginx write their titles over it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::TempDir;
use zinit_tests::{
    TestCgroup,
    daemon::{Daemon, wait_for, within},
    holds::skipped,
    oracle::place,
};

use super::document::{Numbers, Section};

/// A `zinit` with one service of the guide.
#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) daemon: Daemon,
    members: Members,
    directory: TempDir,
    section: Section,
    service: &'static str,
}

/// The processes in a cgroup, which end with this value at the latest.
#[derive(Debug)]
struct Members(TestCgroup);

impl Members {
    fn new(name: &str) -> Self {
        let cgroup = TestCgroup::new(name).unwrap();
        let cgroup = cgroup.expect("the tests need a writable cgroup v2 hierarchy");
        fs::create_dir(cgroup.path()).unwrap();
        Self(cgroup)
    }

    fn pids(&self) -> BTreeSet<i32> {
        let pids = fs::read_to_string(self.0.path().join("cgroup.procs")).unwrap();
        pids.lines().map(|pid| pid.parse().unwrap()).collect()
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        if self.pids().is_empty() {
            return;
        }
        // Only after a failed test.
        if let Err(error) = fs::write(self.0.path().join("cgroup.kill"), "1") {
            eprintln!("failed to end what a test left: {error}");
        }
    }
}

/// The path of a program; else says which package it is in, and that the test is skipped.
pub(crate) fn program(paths: &str, package: &str) -> Option<PathBuf> {
    let found = paths.split(' ').map(PathBuf::from).find(|path| path.exists());
    if found.is_none() {
        skipped(&format!("{paths} is missing: install Debian's package {package}"));
    }
    found
}

impl Case {
    /// A supervisor that is not started yet, for the service of a section of the guide.
    pub(crate) fn prepare(heading: &str, service: &'static str) -> Self {
        let daemon = Daemon::prepare(&[]);
        let directory = TempDir::new().unwrap();
        // Services run as other users.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self {
            members: Members::new(daemon.marker.as_str()),
            daemon,
            directory,
            section: Section::read(heading),
            service,
        }
    }

    /// A directory that every user may enter.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A path in that directory.
    pub(crate) fn path(&self, name: &str) -> String {
        self.directory().join(name).to_str().unwrap().to_owned()
    }

    /// Writes the service file that the guide shows for the first, second, … time (from 0), with these words replaced.
    pub(crate) fn define(&self, nth: usize, replaced: &[(&str, &str)]) {
        let path = format!("/etc/zinit/{}.yaml", self.service);
        self.daemon.write(self.service, &self.file(&path, nth, replaced));
    }

    /// Writes the program that the guide shows, and returns its path.
    pub(crate) fn write_program(&self, path: &str, replaced: &[(&str, &str)]) -> String {
        let name = Path::new(path).file_name().unwrap().to_str().unwrap();
        let own = self.path(name);
        fs::write(&own, self.file(path, 0, replaced)).unwrap();
        fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).unwrap();
        own
    }

    fn file(&self, path: &str, nth: usize, replaced: &[(&str, &str)]) -> String {
        let mut text = self.section.file(path, nth);
        for (from, to) in replaced {
            assert!(text.contains(from), "the guide's {path} has no {from:?}:\n{text}");
            text = text.replace(from, to);
        }
        text
    }

    /// Starts the supervisor, with these variables in its environment and that of its service.
    pub(crate) fn start(&mut self, environment: &[(&str, &str)]) {
        let mut join = Command::new("sh");
        join.args(["-ec", "echo 0 >\"$0/cgroup.procs\"; exec \"$@\""]);
        join.arg(self.members.0.path());
        let mut init = self.daemon.init(&[]);
        init.envs(environment.iter().copied());
        self.daemon.run_as(within(join, &init));
    }

    /// Takes over a service file that was written anew, and starts the service.
    pub(crate) fn start_anew(&self) {
        assert!(self.daemon.zinit(&["reload"]).status.success());
        self.daemon.does(&["start", self.service]);
    }

    /// The pid of the main process, once the service is running.
    pub(crate) fn main(&self) -> i32 {
        self.daemon.wait_for_state(self.service, "Running");
        self.daemon.pid(self.service).try_into().unwrap()
    }

    /// The service's processes as the kernel has them in the cgroup.
    pub(crate) fn present(&self) -> BTreeSet<i32> {
        let mut pids = self.members.pids();
        pids.remove(&self.daemon.process().as_raw_nonzero().get());
        pids
    }

    /// The service's processes with such a command line, its words separated by blanks.
    pub(crate) fn with_command(&self, is_it: impl Fn(&str) -> bool) -> BTreeSet<i32> {
        let mut pids = self.present();
        pids.retain(|pid| is_it(&command_line(*pid)));
        pids
    }

    /// The service's processes as the tool has them from the books.
    pub(crate) fn tracked(&self) -> BTreeSet<i32> {
        let listed = self.json(&["ps", self.service, "--json"]);
        let processes = listed[0]["processes"].as_array().unwrap();
        processes.iter().map(pid_of).collect()
    }

    /// Waits until as many processes as wanted are there, and those in the books are those in the cgroup.
    pub(crate) fn wait_until_tracked(&self, wanted: impl Fn(&BTreeSet<i32>) -> bool) -> BTreeSet<i32> {
        let mut present = BTreeSet::new();
        let mut tracked = BTreeSet::new();
        wait_for("the processes are there, and tracked", || {
            let before = self.present();
            tracked = self.tracked();
            present = self.present();
            // At rest, and with none that is dying: the books take those for dead before the cgroup does.
            before == present && present == tracked && wanted(&present)
        });
        present
    }

    /// What `zinit-tracker escapes` says: who has left what.
    pub(crate) fn escapes(&self) -> BTreeMap<i32, BTreeSet<String>> {
        let escapes = self.listed_escapes();
        escapes.iter().map(|escape| (pid_of(escape), left_by(escape))).collect()
    }

    /// The escapes as JSON has them.
    pub(crate) fn listed_escapes(&self) -> Vec<Value> {
        let listed = self.json(&["escapes", self.service, "--json"]);
        listed[0]["escapes"].as_array().unwrap().clone()
    }

    /// Who has left what of the living main process's, by `/proc`.
    pub(crate) fn departures(&self, main: i32) -> BTreeMap<i32, BTreeSet<String>> {
        let present = self.present();
        let mut departures = BTreeMap::new();
        for pid in present.iter().copied().filter(|pid| *pid != main) {
            let (Some(home), Some(now)) = (place(main), place(pid)) else {
                continue;
            };
            let mut left = BTreeSet::new();
            for (what, has_left) in [
                ("session", home.session != now.session),
                ("group", home.group != now.group),
                ("parent", !present.contains(&now.parent)),
            ] {
                if has_left {
                    left.insert(what.to_owned());
                }
            }
            for namespace in ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"] {
                let of = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).ok();
                if of(main) != of(pid) {
                    left.insert(format!("{namespace} namespace"));
                }
            }
            if !left.is_empty() {
                departures.insert(pid, left);
            }
        }
        departures
    }

    /// Waits until `escapes` says what `/proc` shows; returns that.
    pub(crate) fn wait_for_departures(&self, main: i32) -> BTreeMap<i32, BTreeSet<String>> {
        let (mut found, mut expected) = (BTreeMap::new(), BTreeMap::new());
        let mut agreed = || {
            let before = self.departures(main);
            found = self.escapes();
            expected = self.departures(main);
            // Some programs keep creating processes.
            before == expected && found == expected
        };
        wait_for("`escapes` says what /proc shows", &mut agreed);
        found
    }

    /// Has the guide's next transcript compared with what its command prints.
    pub(crate) fn shows(&mut self, command: &str, numbers: Numbers) {
        let words: Vec<_> = command.split(' ').collect();
        let output = match words[0] {
            "zinit" => self.daemon.zinit(&words[1..]),
            _ => self.daemon.tracker(&words[1..]),
        };
        let printed = printed(&output);
        println!("# {command}\n{printed}");
        assert!(output.status.success(), "{command}: {printed}");
        self.section.compare(command, &printed, numbers);
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.daemon.tracker(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", printed(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Stops the service, and asserts that this is proven and that the cgroup is empty; returns the report.
    pub(crate) fn stop(&self) -> Value {
        let report = self.daemon.json(&["stop", self.service, "--json"]);
        self.assert_stopped(&report);
        report
    }

    /// Asserts that the stop is proven, by the report, and that the cgroup is empty.
    pub(crate) fn assert_stopped(&self, report: &Value) {
        assert_eq!(report["proven"], true, "{report:#}");
        assert_eq!(report["survivors"], Value::Array(Vec::new()), "{report:#}");
        let deaths = report["processes"].as_array().unwrap();
        let killed = deaths.iter().filter(|death| death["fate"]["killed"] == 9).count();
        println!(
            "{}: {} processes ended in {} µs, {killed} of them by SIGKILL",
            self.service,
            deaths.len(),
            report["elapsed_us"]
        );
        assert_eq!(self.present(), BTreeSet::new(), "{report:#}");
    }

    /// What the service has printed, as `zinit log` has it.
    pub(crate) fn printed(&self) -> String {
        self.daemon.prints(&["log", "--snapshot", self.service])
    }

    /// Ends the supervisor, and asserts that nothing is left, and that every transcript of the section was compared.
    pub(crate) fn end(self) {
        self.section.assert_all_compared();
        self.end_of_a_part();
    }

    /// Ends the supervisor, and asserts that nothing is left.
    pub(crate) fn end_of_a_part(mut self) {
        self.daemon.does(&["shutdown"]);
        self.daemon.assert_ends_well();
        assert_eq!(self.members.pids(), BTreeSet::new());
    }
}

/// What a process's command line is now, its words separated by blanks.
pub(crate) fn command_line(pid: i32) -> String {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).replace('\0', " ").trim_end().to_owned()
}

/// What an escape has left, as JSON has it.
fn left_by(escape: &Value) -> BTreeSet<String> {
    let left = escape["left"].as_array().unwrap();
    let names = left.iter().map(|left| match left["what"].as_str().unwrap() {
        "namespace" => format!("{} namespace", left["namespace"].as_str().unwrap()),
        what => what.to_owned(),
    });
    names.collect()
}

/// The pid of a process as JSON has it.
pub(crate) fn pid_of(process: &Value) -> i32 {
    process["pid"].as_i64().unwrap().try_into().unwrap()
}

/// Whether everyone that the report names was left to end by itself or by the stop signal.
pub(crate) fn nobody_was_killed(report: &Value) -> bool {
    let deaths = report["processes"].as_array().unwrap();
    let sent_kill = |death: &Value| {
        let signals = death["signals"].as_array().unwrap();
        signals.iter().any(|sent| sent["signal"] == "SIGKILL")
    };
    report["kill_rounds"] == 0 && !deaths.iter().any(sent_kill)
}

/// These words as a set.
pub(crate) fn set(words: &[&str]) -> BTreeSet<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn printed(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}
