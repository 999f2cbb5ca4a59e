//! The tool where BPF is refused: the level, the warning, the refusals, and what the reports of level `procfs` claim.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    os::{fd::OwnedFd, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Instant,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde_json::Value;
use tempfile::TempDir;
use zinit_tests::{
    Cleanup, Marker, TestCgroup, actor_path,
    sandbox::{DEADLINE, PinDir},
    survivors, tool,
};

const WARNING: &str = "exact tracking is not possible here";

/// Three ways out, one of them deaf to SIGTERM, and an orphan that shows no sign of where it came from.
const SCRIPT: &str = "setsid sleep 300 & (setsid sleep 301 &); (trap '' TERM; setsid sleep 302 &); \
                      (env -i M=$ZINIT_TEST_MARKER setsid sleep 303 &); exit 5";

/// Who runs the tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    /// root, with all that it takes.
    Able,
    /// root in a container, say: without CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN.
    Confined,
    /// Somebody without any right.
    Nobody,
}

/// The tool where everybody can execute it, and pins that nobody else uses.
struct Bench {
    _cleanup: Cleanup,
    pins: PinDir,
    marker: Marker,
    directory: TempDir,
}

impl Bench {
    fn new() -> Self {
        let marker = Marker::new();
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        for (from, name) in [(tool().to_owned(), "zinit-tracker"), (actor_path().unwrap(), "actor")] {
            std::fs::copy(from, directory.path().join(name)).unwrap();
        }
        Self {
            _cleanup: Cleanup::new(&marker),
            pins: PinDir::new(),
            marker,
            directory,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The tool, started by this caller; `before` is shell code that prepares its surroundings.
    fn command(&self, caller: Caller, before: &str, args: &[&str]) -> Command {
        let mut command = Command::new("sh");
        let rights: &[&str] = match caller {
            Caller::Able => &[],
            Caller::Confined => &["setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin"],
            Caller::Nobody => &["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"],
        };
        command
            .args(["-c", &format!("{before}\nexec \"$@\""), "sh"])
            .args(rights)
            .arg(self.path("zinit-tracker"))
            .args(args)
            .env("ZINIT_TRACKER_PINS", self.pins.path())
            .env(Marker::ENV, self.marker.as_str())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, caller: Caller, args: &[&str]) -> Output {
        self.command(caller, "", args).output().unwrap()
    }

    /// Runs the script at the level, and returns the report and what was said.
    fn stopped(&self, caller: Caller, before: &str, level: &str, script: &str) -> (Value, String) {
        let args = [
            "--tracking",
            level,
            "run",
            "--grace",
            "300ms",
            "--report",
            "-",
            "--",
            "sh",
            "-c",
            script,
        ];
        let output = self.command(caller, before, &args).output().unwrap();
        assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(survivors(&self.marker), [], "{report:#}");
        assert_eq!(report["survivors"].as_array().unwrap().len(), 0, "{report:#}");
        (report, stderr(&output))
    }

    /// Asserts the status, that stderr is one line, and that it has the text.
    fn fails(&self, command: &mut Command, status: i32, text: &str) {
        let output = command.output().unwrap();
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(status), "{command:?}: {said}");
        assert!(said.contains(text), "{command:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{command:?}: {said}");
        assert_eq!(survivors(&self.marker), []);
    }
}

/// The same command, whose mounts are its own.
fn in_a_mount_namespace(inner: &Command) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--"])
        .arg(inner.get_program())
        .args(inner.get_args());
    command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.stdin(Stdio::null());
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn blind_to(report: &Value) -> Vec<&str> {
    let doubts = report["doubts"].as_array().unwrap();
    let lists = doubts.iter().filter(|doubt| doubt["reason"] == "procfs-tracking");
    let kinds = lists.flat_map(|doubt| doubt["blind_to"].as_array().unwrap());
    kinds.map(|kind| kind.as_str().unwrap()).collect()
}

fn assert_no_cgroup_is_left(said: &str) {
    assert!(!said.contains("a cgroup is left"), "{said}");
}

#[test]
fn without_the_rights_for_bpf_auto_warns_once_and_stops_everything() {
    let bench = Bench::new();
    for (caller, missing) in [(Caller::Confined, "CAP_BPF"), (Caller::Nobody, "CAP_KILL")] {
        let (report, said) = bench.stopped(caller, "", "auto", SCRIPT);
        assert_eq!(said.matches(WARNING).count(), 1, "{said}");
        assert_eq!(report["tracking"], "procfs");
        assert!(
            report["fallback_reason"].as_str().unwrap().contains(missing),
            "{report:#}"
        );
        assert_eq!(report["processes"].as_array().unwrap().len(), 4, "{report:#}");
        assert_no_cgroup_is_left(&said);
    }
    assert!(!bench.pins.path().exists());
}

#[test]
fn in_a_rootless_container_the_kernel_refuses_what_the_capabilities_promise() {
    let bench = Bench::new();
    let rootless = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "unshare",
        "--map-root-user",
    ];
    let possible = Command::new(rootless[0])
        .args(&rootless[1..])
        .arg("true")
        .output()
        .unwrap();
    if !possible.status.success() {
        assert!(std::env::var_os("CI").is_none(), "CI must have user namespaces");
        println!("SKIPPED: no user namespaces for ordinary users: {}", stderr(&possible));
        return;
    }
    let output = Command::new(rootless[0])
        .args(&rootless[1..])
        .arg(bench.path("zinit-tracker"))
        .args(["run", "--grace", "300ms", "--report", "-", "--", "sh", "-c", SCRIPT])
        .env(Marker::ENV, bench.marker.as_str())
        // A directory that is asked for has to be usable; the usual one may be replaced.
        .env_remove("ZINIT_TRACKER_PINS")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    assert_eq!(stderr(&output).matches(WARNING).count(), 1, "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["tracking"], "procfs", "{report:#}");
    assert_eq!(report["processes"].as_array().unwrap().len(), 4, "{report:#}");
    assert_eq!(survivors(&bench.marker), []);
}

#[test]
fn with_the_rights_auto_is_exact_and_says_nothing() {
    let bench = Bench::new();
    let (report, said) = bench.stopped(Caller::Able, "", "auto", SCRIPT);
    assert_eq!(report["tracking"], "ebpf");
    assert_eq!(report["fallback_reason"], Value::Null);
    assert!(!said.contains(WARNING), "{said}");
}

#[test]
fn level_ebpf_refuses_to_start_on_less() {
    let bench = Bench::new();
    let witness = bench.path("witness");
    let script = format!("touch {}", witness.display());
    for (caller, missing) in [
        (Caller::Confined, "missing CAP_BPF"),
        (Caller::Nobody, "missing CAP_BPF"),
    ] {
        let args = ["--tracking", "ebpf", "run", "--", "sh", "-c", &script];
        bench.fails(&mut bench.command(caller, "", &args), 125, missing);
    }
    assert!(!witness.exists(), "the command was started");
}

#[test]
fn level_procfs_is_had_by_asking_for_it_and_warns_nobody() {
    let bench = Bench::new();
    for caller in [Caller::Able, Caller::Confined, Caller::Nobody] {
        let (report, said) = bench.stopped(caller, "", "procfs", SCRIPT);
        assert_eq!(report["tracking"], "procfs");
        assert_eq!(report["fallback_reason"], "it was asked for");
        assert!(!said.contains(WARNING), "{said}");
        assert!(said.contains("level procfs"), "{said}");
    }
    assert!(!bench.pins.path().exists());
}

/// A cgroup of the version 2 hierarchy, which the shell code makes and goes into.
fn cgroup(name: &str) -> TestCgroup {
    let cgroup = TestCgroup::new(&format!("zinit-test-{name}-{}", std::process::id())).unwrap();
    cgroup.expect("the tests need a writable cgroup v2 hierarchy")
}

#[test]
fn an_empty_cgroup_is_proof_and_without_one_the_report_lists_what_was_not_seen() {
    let bench = Bench::new();
    // Where no other test has a pid namespace below, and no other `run` the same pid in the same cgroup.
    let cgroup = cgroup("proof");
    let before = format!(
        "mkdir {0} && echo 0 >{0}/cgroup.procs || exit 9
         exec unshare --pid --fork --mount-proc -- sh -c '\"$@\"; exit $?' sh \"$@\"",
        cgroup.path().display()
    );
    let (report, said) = bench.stopped(Caller::Able, &before, "procfs", SCRIPT);
    assert_eq!(report["proven"], true, "{report:#}");
    assert!(said.trim_end().ends_with("proven"), "{said}");
    // Nobody may not make a cgroup.
    let (report, said) = bench.stopped(Caller::Nobody, "", "procfs", SCRIPT);
    assert_eq!(report["proven"], false, "{report:#}");
    assert!(blind_to(&report).contains(&"other-pid-namespaces"), "{report:#}");
    assert!(said.contains("not proven: level procfs cannot see"), "{said}");
}

/// A pid namespace with an init, which ends with the test.
struct Namespace {
    unshare: Child,
    init: u32,
}

impl Namespace {
    fn new() -> Self {
        let mut command = Command::new("unshare");
        command.args(["--pid", "--fork", "--kill-child", "--", "sleep", "300"]);
        let unshare = command.stdin(Stdio::null()).spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let started = Instant::now();
        let init = loop {
            assert!(started.elapsed() < DEADLINE, "unshare has no child");
            let children = std::fs::read_to_string(&children).unwrap();
            match children.split_whitespace().next() {
                Some(init) => break init.parse().unwrap(),
                None => std::thread::yield_now(),
            }
        };
        Self { unshare, init }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.unshare.kill().unwrap();
        self.unshare.wait().unwrap();
    }
}

#[test]
fn a_pid_namespace_in_which_an_orphan_would_stay_is_the_one_doubt_of_an_empty_cgroup() {
    let bench = Bench::new();
    let _namespace = Namespace::new();
    let (report, said) = bench.stopped(Caller::Able, "", "procfs", SCRIPT);
    assert_eq!(report["proven"], false, "{report:#}");
    assert_eq!(blind_to(&report), ["other-pid-namespaces"], "{report:#}");
    assert!(
        said.contains("not proven: level procfs cannot see children in pid namespaces"),
        "{said}"
    );
}

#[test]
fn who_leaves_the_cgroup_for_another_pid_namespace_between_two_looks_gets_away_but_not_unsaid() {
    let bench = Bench::new();
    let cgroup = cgroup("nsenter");
    let namespace = Namespace::new();
    let before = format!("mkdir {} || exit 9", cgroup.path().display());
    let script = format!(
        "sh -c 'echo 0 >{}/cgroup.procs; exec env -i nsenter -t {} -p setsid sh -c \"sleep 300 >/dev/null 2>&1 &\"'; exit 5",
        cgroup.path().display(),
        namespace.init
    );
    let (report, _) = bench.stopped(Caller::Able, &before, "procfs", &script);
    let left = std::fs::read_to_string(cgroup.path().join("cgroup.procs")).unwrap();
    println!("{} got away", left.lines().count());
    assert_eq!(report["proven"], false, "{report:#}");
    assert!(blind_to(&report).contains(&"other-pid-namespaces"), "{report:#}");
}

#[test]
fn a_daemon_without_a_trace_that_left_the_cgroup_is_stopped_and_nothing_is_claimed() {
    let cgroup = cgroup("vanish");
    let bench = Bench::new();
    let script = format!(
        "{} vanish-to {} {} & while [ ! -e {}/cgroup.procs ]; do sleep 0.01; done; sleep 0.2; exit 5",
        bench.path("actor").display(),
        cgroup.path().display(),
        bench.marker,
        cgroup.path().display()
    );
    let before = format!(
        "mkfifo {0}; (cat {0} >/dev/null &); export ZINIT_TEST_READY={0}",
        bench.path("ready").display()
    );
    let (report, _) = bench.stopped(Caller::Able, &before, "procfs", &script);
    assert_eq!(report["proven"], false, "{report:#}");
    assert!(blind_to(&report).contains(&"left-cgroup"), "{report:#}");
}

/// The process whose pid a shell has written to the file; ends it with the test.
struct Bystander(OwnedFd);

impl Bystander {
    fn of(path: &Path) -> Self {
        let pid = std::fs::read_to_string(path).unwrap();
        let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        Self(pidfd_open(pid, PidfdFlags::empty()).expect("the bystander is gone"))
    }

    fn lives(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).unwrap() == 0
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        // It may have been hit, which the test has reported by now.
        pidfd_send_signal(&self.0, Signal::KILL).ok();
    }
}

#[test]
fn children_that_run_had_before_and_their_orphans_live_on_and_nothing_is_claimed() {
    let bench = Bench::new();
    for caller in [Caller::Able, Caller::Nobody] {
        let directory = tempfile::tempdir_in(bench.directory.path()).unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let path = |name: &str| directory.path().join(name);
        // Its orphan is given to `run`, a subreaper by then; `run` has no other child when the shell becomes it.
        let helper = format!(
            "while [ ! -e {0}/begun ]; do sleep 0.01; done; (env -i sleep 300 & echo $! >{0}/orphan); exec sleep 301",
            directory.path().display()
        );
        let before = format!(
            "env -u {} sh -c '{helper}' >/dev/null 2>&1 & echo $! >{}",
            Marker::ENV,
            path("child").display()
        );
        let script = format!(
            "touch {0}/begun; while [ ! -s {0}/orphan ]; do sleep 0.01; done; sleep 0.5; exit 5",
            directory.path().display()
        );
        let (report, _) = bench.stopped(caller, &before, "procfs", &script);
        let bystanders = ["child", "orphan"].map(|name| Bystander::of(&path(name)));
        assert!(bystanders.iter().all(Bystander::lives), "{report:#}");
        assert_eq!(report["processes"].as_array().unwrap().len(), 0, "{report:#}");
        assert_eq!(report["proven"], false, "{report:#}");
        assert!(blind_to(&report).contains(&"unknown-children"), "{report:#}");
    }
}

#[test]
fn what_proc_hides_is_on_the_list() {
    let bench = Bench::new();
    let before = "mount --make-rprivate / && mount -t proc -o hidepid=2 proc /proc || exit 9";
    let args = [
        "--tracking",
        "procfs",
        "run",
        "--grace",
        "300ms",
        "--report",
        "-",
        "--",
        "sh",
        "-c",
        SCRIPT,
    ];
    let output = in_a_mount_namespace(&bench.command(Caller::Nobody, before, &args))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(blind_to(&report).contains(&"hidden-users"), "{report:#}");
    assert_eq!(survivors(&bench.marker), []);
}

#[test]
fn without_proc_there_is_no_level_and_one_line_says_what_to_do() {
    let bench = Bench::new();
    for level in ["auto", "ebpf", "procfs"] {
        let inner = bench.command(
            Caller::Able,
            "umount -l /proc",
            &["--tracking", level, "run", "--", "true"],
        );
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--"])
            .arg(inner.get_program())
            .args(inner.get_args());
        bench.fails(
            command.env("ZINIT_TRACKER_PINS", bench.pins.path()),
            125,
            "mount -t proc proc /proc",
        );
    }
}

#[test]
fn commands_that_need_shared_books_say_that_there_are_none_and_what_to_do() {
    let bench = Bench::new();
    for args in [
        &["ps"][..],
        &["tree"],
        &["events"],
        &["history"],
        &["stop", "x"],
        &["release", "1"],
        &["attach", "1", "--name", "x"],
        &["unload"],
    ] {
        let args = [&["--tracking", "procfs"], args].concat();
        bench.fails(
            &mut bench.command(Caller::Able, "", &args),
            1,
            "send that process SIGTERM",
        );
    }
}

#[test]
fn pins_of_another_layout_are_an_error_and_no_reason_to_fall_back() {
    let bench = Bench::new();
    std::fs::create_dir_all(bench.pins.path().join("v999")).unwrap();
    let args = ["--tracking", "auto", "run", "--", "true"];
    bench.fails(&mut bench.command(Caller::Able, "", &args), 125, "v999");
    std::fs::remove_dir(bench.pins.path().join("v999")).unwrap();
}

#[test]
fn doctor_says_which_level_run_gets_and_why() {
    let bench = Bench::new();
    for (caller, level, tracking, reason) in [
        (Caller::Able, "auto", Value::from("ebpf"), None),
        (Caller::Able, "procfs", Value::from("procfs"), Some("asked for")),
        (Caller::Confined, "auto", Value::from("procfs"), Some("CAP_BPF")),
        (Caller::Nobody, "auto", Value::from("procfs"), Some("CAP_KILL")),
        (Caller::Nobody, "ebpf", Value::Null, Some("CAP_KILL")),
    ] {
        let output = bench.run(caller, &["--tracking", level, "doctor", "--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["tracking"], tracking, "{caller:?} {level}: {report:#}");
        let said = report["reason"].as_str();
        assert_eq!(said.is_some(), reason.is_some(), "{report:#}");
        assert!(reason.is_none_or(|reason| said.unwrap().contains(reason)), "{report:#}");
        let output = bench.run(caller, &["--tracking", level, "doctor"]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            text.starts_with("tracking: ") && reason.is_none_or(|reason| text.contains(reason)),
            "{text}"
        );
    }
}

#[test]
fn a_command_that_cannot_be_started_has_the_usual_status() {
    let bench = Bench::new();
    for (program, status) in [("/nonexistent", 127), ("/etc/passwd", 126)] {
        let output = bench.run(Caller::Able, &["--tracking", "procfs", "run", "--", program]);
        assert_eq!(output.status.code(), Some(status), "{}", stderr(&output));
        assert_no_cgroup_is_left(&stderr(&output));
    }
}
