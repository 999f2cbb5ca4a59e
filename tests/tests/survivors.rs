//! What cannot be killed: each cause is provoked for real, named by the tool and in the report, and lifted; then a second
//! stop succeeds. What looks as if it could not be killed and can is here, too.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs::File,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use zinit_tests::{
    Cleanup, Facts, Marker, Ready, actor,
    holds::{Freezer, HungMount, TracedUntil, Tracer, skipped},
    sandbox::{DEADLINE, PinDir, Played, Sandbox},
    survivors, tool,
};
use zinit_tracker::{
    Member, StopError, StopPolicy, StopReport, stop,
    stop::{Cause, Survivor},
};

/// A service that the tool runs, as people do.
struct Service {
    _cleanup: Cleanup,
    marker: Marker,
    pins: PinDir,
    facts: Facts,
    /// `zinit-tracker run`.
    run: Child,
    report: NamedTempFile,
    /// Its processes keep it open, so it is a file and no pipe.
    stderr: NamedTempFile,
}

impl Service {
    fn start(behaviour: &str, args: &[&str]) -> Self {
        Self::start_as(behaviour, args, |_| {})
    }

    /// Starts the tool with changes to its command.
    fn start_as(behaviour: &str, args: &[&str], change: impl FnOnce(&mut Command)) -> Self {
        let marker = Marker::new();
        let cleanup = Cleanup::new(&marker);
        let pins = PinDir::new();
        let (report, stderr) = (NamedTempFile::new().unwrap(), NamedTempFile::new().unwrap());
        let mut ready = Ready::new().unwrap();
        let played = actor(behaviour, args, &marker);
        let mut command = tool_with(pins.path(), &marker);
        command
            .args(["run", "--name", "held", "--grace", "0s", "--report"])
            .arg(report.path())
            .arg("--")
            .arg(played.get_program())
            .args(played.get_args())
            .stdout(Stdio::null())
            .stderr(File::create(stderr.path()).unwrap());
        ready.attach(&mut command);
        change(&mut command);
        let run = command.spawn().unwrap();
        let facts = ready.wait().unwrap();
        Self {
            _cleanup: cleanup,
            marker,
            pins,
            facts,
            run,
            report,
            stderr,
        }
    }

    fn pid(&self, fact: &str) -> u32 {
        self.facts.number(fact).unwrap()
    }

    fn tool(&self, args: &[&str]) -> Command {
        let mut command = tool_with(self.pins.path(), &self.marker);
        command.args(args);
        command
    }

    /// The service as the tool lists it.
    fn listed(&self) -> Value {
        let output = self.tool(&["ps", "held", "--json"]).output().unwrap();
        let services: Value = serde_json::from_slice(&output.stdout).unwrap();
        services[0].clone()
    }

    /// The kernel's counter of its members.
    fn live(&self) -> u64 {
        self.listed()["live"].as_u64().unwrap()
    }

    fn members(&self) -> Vec<Value> {
        self.listed()["processes"].as_array().unwrap().clone()
    }

    /// The first process that the main one has created.
    fn child(&self) -> u32 {
        number(&self.members()[1]["pid"])
    }

    /// Asserts that neither `run`, which is told to end, nor a stop beside it calls the service down, and that both name the
    /// same survivors. Returns these.
    fn survives(&mut self) -> Vec<Value> {
        self.survives_as(|_| {})
    }

    fn survives_as(&mut self, change: impl FnOnce(&mut Command)) -> Vec<Value> {
        // Our child, and not reaped, so the pid is certainly its.
        kill(Pid::from_raw(self.run.id().cast_signed()), Signal::SIGTERM).unwrap();
        // A stop that came first would be waited for by `run`, which would take twice as long.
        let started = Instant::now();
        while self.listed()["state"] != "killing" {
            assert!(started.elapsed() < DEADLINE, "the tool does not stop its service");
        }
        let mut command = self.tool(&["stop", "held", "--grace", "0s", "--report", "-"]);
        change(&mut command);
        let output = command.output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        let report = serde_json::from_slice(&output.stdout).unwrap();
        let survivors = self.named_survivors(&report, &stderr);

        let status = self.run.wait().unwrap();
        let stderr = std::fs::read_to_string(self.stderr.path()).unwrap();
        assert_eq!(status.code(), Some(125), "{stderr}");
        let report = serde_json::from_slice(&std::fs::read(self.report.path()).unwrap()).unwrap();
        assert_eq!(self.named_survivors(&report, &stderr), survivors);
        survivors
    }

    /// The survivors of a report, each with a line on stderr; nobody says that the service is down.
    fn named_survivors(&self, report: &Value, stderr: &str) -> Vec<Value> {
        assert_eq!(report["proven"], false, "{report:#}");
        let survivors = report["survivors"].as_array().unwrap().clone();
        assert!(!survivors.is_empty(), "{report:#}");
        for survivor in &survivors {
            let (pid, comm) = (number(&survivor["pid"]), survivor["comm"].as_str().unwrap());
            let line = stderr.lines().find(|line| {
                let mut words = line.split_whitespace();
                words.nth(1) == Some(&pid.to_string()) && line.contains("survives: ")
            });
            let line = line.unwrap_or_else(|| panic!("no line names {pid}: {stderr}"));
            assert!(line.contains(comm), "{line}");
            println!("{line}");
        }
        assert!(stderr.contains("is NOT down"), "{stderr}");
        survivors
    }

    /// Asserts that a stop brings the service down, proven, and that nothing of it is left.
    fn stops(mut self) {
        let output = self.tool(&["stop", "held", "--grace", "0s"]).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        assert!(stderr.trim_end().ends_with("proven"), "{stderr}");
        // It carries the marker and uses the pins as well.
        self.run.wait().unwrap();
        assert_eq!(survivors(&self.marker), []);
        assert!(!self.pins.path().exists(), "pins are left");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        for result in [self.run.kill(), self.run.wait().map(drop)] {
            if let Err(error) = result {
                eprintln!("failed to end the tool: {error}");
            }
        }
    }
}

fn tool_with(pins: &Path, marker: &Marker) -> Command {
    let mut command = Command::new(tool());
    command
        .env("ZINIT_TRACKER_PINS", pins)
        .env(Marker::ENV, marker.as_str())
        .stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn number(value: &Value) -> u32 {
    u32::try_from(value.as_u64().unwrap()).unwrap()
}

/// Asserts who a survivor is, and returns the cause.
fn identified<'a>(survivor: &'a Value, pid: u32, comm: &str, state: &str) -> &'a Value {
    assert_eq!(survivor["pid"], pid, "{survivor:#}");
    assert_eq!(survivor["comm"], comm, "{survivor:#}");
    assert_eq!(survivor["state"], state, "{survivor:#}");
    &survivor["cause"]
}

/// Waits until the thread is in that state.
fn await_state(pid: u32, state: char) {
    let started = Instant::now();
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        if fields.starts_with(state) {
            return;
        }
        assert!(started.elapsed() < DEADLINE, "not in state {state}: {stat}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn frozen_by(freezer: &Freezer, version: u8) -> Value {
    json!({"kind": "frozen", "version": version, "cgroups": [freezer.directory()]})
}

fn traced_by(tracer: &Tracer) -> Value {
    json!({"kind": "traced", "tracer": tracer.pid(), "comm": Tracer::COMM})
}

const NO_V1: &str = "this machine has no writable cgroup v1 freezer";

#[test]
fn a_process_in_a_frozen_cgroup_v1_survives_until_it_is_thawed() {
    let mut service = Service::start("child", &[]);
    let child = service.child();
    let Some(freezer) = Freezer::v1() else {
        return skipped(NO_V1);
    };
    freezer.add(child);
    freezer.freeze();
    let survivors = service.survives();
    assert_eq!(survivors.len(), 1, "{survivors:#?}");
    assert_eq!(identified(&survivors[0], child, "actor", "D"), &frozen_by(&freezer, 1));
    assert_eq!(service.live(), 1, "the books have it as well");
    freezer.thaw();
    service.stops();
}

#[test]
fn a_tracee_that_its_tracer_stops_at_its_exit_survives_until_it_is_detached() {
    let mut service = Service::start("child", &[]);
    let child = service.child();
    let tracer = Tracer::seize(child, TracedUntil::LetGo);
    let survivors = service.survives();
    assert_eq!(survivors.len(), 1, "{survivors:#?}");
    assert_eq!(identified(&survivors[0], child, "actor", "t"), &traced_by(&tracer));
    assert_eq!(service.live(), 1);
    tracer.detach();
    service.stops();
}

#[test]
fn a_process_that_waits_for_a_server_is_uninterruptible_until_that_answers() {
    let Some(mount) = HungMount::new() else {
        return skipped("this kernel has no FUSE");
    };
    let mut service = Service::start("stat", &[&mount.file()]);
    // Declared after the service, so that it goes first, and what hangs can be cleaned up.
    let mut mount = mount;
    mount.wait_for_victim();
    let hung = service.pid("hung");
    let survivors = service.survives();
    assert_eq!(survivors.len(), 1, "{survivors:#?}");
    let cause = identified(&survivors[0], hung, "hung", "D");
    assert_eq!(cause["kind"], "uninterruptible", "{cause:#}");
    assert_eq!(cause["wchan"], "request_wait_answer", "{cause:#}");
    let stack = cause["stack"].as_array().unwrap();
    assert!(stack.contains(&json!("request_wait_answer")), "{cause:#}");
    assert_eq!(service.live(), 1);
    drop(mount);
    service.stops();
}

#[test]
fn a_zombie_leader_is_named_with_the_thread_that_its_tracer_holds() {
    let mut service = Service::start("thread", &[]);
    let (main, thread) = (number(&service.members()[0]["pid"]), service.pid("thread"));
    let tracer = Tracer::seize(thread, TracedUntil::LetGo);
    let survivors = service.survives();
    assert_eq!(survivors.len(), 1, "{survivors:#?}");
    let cause = identified(&survivors[0], main, "actor", "Z");
    let held = json!({"tid": thread, "comm": "second", "state": "t", "cause": traced_by(&tracer)});
    assert_eq!(cause, &json!({"kind": "zombie-leader", "others": 1, "threads": [held]}));
    assert_eq!(service.live(), 1);
    tracer.detach();
    service.stops();
}

#[test]
fn a_zombie_leader_is_named_with_the_thread_that_a_cgroup_freezes() {
    let mut service = Service::start("thread", &[]);
    let (main, thread) = (number(&service.members()[0]["pid"]), service.pid("thread"));
    let Some(freezer) = Freezer::v1() else {
        return skipped(NO_V1);
    };
    freezer.add_thread(thread);
    freezer.freeze();
    let survivors = service.survives();
    assert_eq!(survivors.len(), 1, "{survivors:#?}");
    let cause = identified(&survivors[0], main, "actor", "Z");
    let held = json!({"tid": thread, "comm": "second", "state": "D", "cause": frozen_by(&freezer, 1)});
    assert_eq!(cause, &json!({"kind": "zombie-leader", "others": 1, "threads": [held]}));
    freezer.thaw();
    service.stops();
}

#[test]
fn a_zombie_leader_is_named_with_the_thread_that_its_tracer_does_not_reap() {
    // The books have it dead, which its last thread is; but it is not reaped, and nobody can tell by its pidfd.
    let mut service = Service::start("thread", &[]);
    let (main, thread) = (number(&service.members()[0]["pid"]), service.pid("thread"));
    let tracer = Tracer::seize(thread, TracedUntil::Reaped);
    let survivors = service.survives();
    assert_eq!(survivors.len(), 1, "{survivors:#?}");
    let cause = identified(&survivors[0], main, "actor", "Z");
    let held = json!({"tid": thread, "comm": "second", "state": "Z", "cause": traced_by(&tracer)});
    assert_eq!(cause, &json!({"kind": "zombie-leader", "others": 1, "threads": [held]}));
    tracer.detach();
    service.stops();
}

#[test]
fn the_first_process_of_a_pid_namespace_dies_after_one_that_is_held() {
    let mut service = Service::start("pid-namespace", &[]);
    let members = service.members();
    let (init, child) = (number(&members[1]["pid"]), number(&members[2]["pid"]));
    let Some(freezer) = Freezer::v1() else {
        return skipped(NO_V1);
    };
    freezer.add(child);
    freezer.freeze();
    let survivors = service.survives();
    assert_eq!(survivors.len(), 2, "{survivors:#?}");
    let cause = identified(&survivors[0], init, "actor", "S");
    assert_eq!(cause["kind"], "exiting", "{cause:#}");
    let stack = cause["stack"].as_array().unwrap();
    assert!(stack.contains(&json!("zap_pid_ns_processes")), "{cause:#}");
    assert_eq!(identified(&survivors[1], child, "actor", "D"), &frozen_by(&freezer, 1));
    freezer.thaw();
    service.stops();
}

#[test]
fn a_process_that_waits_for_its_vfork_in_a_frozen_cgroup_v1_survives_until_it_is_thawed() {
    let mut service = Service::start("vfork-wait", &[]);
    let waiting = service.pid("waiting");
    await_state(waiting, 'D');
    let Some(freezer) = Freezer::v1() else {
        return skipped(NO_V1);
    };
    freezer.add(waiting);
    freezer.freeze();
    let survivors = service.survives();
    assert_eq!(survivors.len(), 1, "{survivors:#?}");
    assert_eq!(
        identified(&survivors[0], waiting, "waiting", "D"),
        &frozen_by(&freezer, 1)
    );
    freezer.thaw();
    service.stops();
}

/// Long enough for whatever can be killed to die, and not for ever.
fn impatient() -> StopPolicy {
    StopPolicy {
        grace: Duration::ZERO,
        kill_timeout: Duration::from_secs(2),
        ..StopPolicy::default()
    }
}

fn patient() -> StopPolicy {
    StopPolicy {
        kill_timeout: DEADLINE,
        ..impatient()
    }
}

fn member(sandbox: &Sandbox, played: &Played, pid: u32) -> Member {
    let members = sandbox.tracker.processes(&played.service).unwrap();
    members.into_iter().find(|member| member.pid == pid).unwrap()
}

/// Stops the service and asserts that it is not called down.
async fn not_down(sandbox: &Sandbox, played: &Played) -> StopReport {
    let error = stop(&sandbox.tracker, &played.service, &impatient()).await.unwrap_err();
    let StopError::Survivors(report) = error else {
        panic!("{error}");
    };
    assert!(!report.proven);
    assert!(sandbox.tracker.live(&played.service).unwrap() > 0);
    *report
}

#[tokio::test]
async fn a_wait_for_a_vfork_is_named_and_ends_with_sigkill_though_the_child_survives() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("vfork-wait", [""; 0]);
    let waiting: u32 = played.facts.number("waiting").unwrap();
    let child: u32 = played.facts.number("child").unwrap();
    await_state(waiting, 'D');
    let named = Survivor::examine(&sandbox.tracker, &member(&sandbox, &played, waiting));
    assert_eq!(
        (named.pid, named.comm.as_str(), named.state),
        (waiting, "waiting", Some('D'))
    );
    let cause = Cause::Vfork {
        child: Some(child),
        comm: Some("vforked".to_owned()),
    };
    assert_eq!(named.cause, cause);
    println!("{}", named.cause);

    let Some(freezer) = Freezer::v1() else {
        return skipped(NO_V1);
    };
    freezer.add(child);
    freezer.freeze();
    let report = not_down(&sandbox, &played).await;
    let left: Vec<_> = report.survivors.iter().map(|survivor| survivor.pid).collect();
    assert_eq!(left, [child], "{report:#?}");
    assert!(matches!(report.survivors[0].cause, Cause::Frozen(_)), "{report:#?}");
    freezer.thaw();
    sandbox.stop(&mut played, &patient()).await;
    sandbox.close();
}

#[tokio::test]
async fn a_process_in_a_frozen_cgroup_v2_is_named_and_can_be_killed_all_the_same() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("child", [""; 0]);
    let child = sandbox.tracker.processes(&played.service).unwrap()[1].clone();
    let Some(freezer) = Freezer::v2() else {
        return skipped("this machine has no writable cgroup v2 hierarchy");
    };
    freezer.add(child.pid);
    freezer.freeze();
    let events = Path::new(freezer.directory()).join("cgroup.events");
    let started = Instant::now();
    while !std::fs::read_to_string(&events).unwrap().contains("frozen 1") {
        assert!(started.elapsed() < DEADLINE);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let named = Survivor::examine(&sandbox.tracker, &child);
    assert_eq!(
        (named.pid, named.comm.as_str(), named.state),
        (child.pid, "actor", Some('S'))
    );
    assert_eq!(serde_json::to_value(&named.cause).unwrap(), frozen_by(&freezer, 2));
    // Nothing is thawed.
    sandbox.stop(&mut played, &patient()).await;
    sandbox.close();
}

#[tokio::test]
async fn those_that_were_dying_when_a_stop_began_are_waited_for_and_named() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("thread", [""; 0]);
    let main = sandbox.tracker.processes(&played.service).unwrap()[0].pid;
    let tracer = Tracer::seize(played.facts.number("thread").unwrap(), TracedUntil::Reaped);
    // For the second stop its death is history, but not over.
    for _ in 0..2 {
        let error = stop(&sandbox.tracker, &played.service, &impatient()).await.unwrap_err();
        let StopError::Survivors(report) = error else {
            panic!("{error}");
        };
        assert!(!report.proven);
        let [survivor] = &report.survivors[..] else {
            panic!("{report:#?}");
        };
        assert_eq!(
            (survivor.pid, survivor.comm.as_str(), survivor.state),
            (main, "actor", Some('Z'))
        );
        assert!(matches!(survivor.cause, Cause::ZombieLeader { .. }), "{survivor:#?}");
    }
    tracer.detach();
    sandbox.stop(&mut played, &patient()).await;
    sandbox.close();
}

#[tokio::test]
async fn a_survivor_whose_exit_record_is_gone_is_a_doubt() {
    // More deaths than there are exit records, of another service.
    const DEATHS: &str = "17500";
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("thread", [""; 0]);
    let tracer = Tracer::seize(played.facts.number("thread").unwrap(), TracedUntil::Reaped);
    let error = stop(&sandbox.tracker, &played.service, &impatient()).await.unwrap_err();
    assert!(matches!(error, StopError::Survivors(_)), "{error}");
    let other = sandbox.tracker.register("other").unwrap();
    let mut command = actor("fork-loops", ["1", DEATHS], &played.marker).into();
    let mut forking = sandbox.tracker.spawn(&other, &mut command).unwrap();
    assert!(forking.wait().await.unwrap().success());
    match stop(&sandbox.tracker, &played.service, &impatient()).await {
        Ok(report) => assert!(!report.proven, "{report:#?}"),
        Err(StopError::Survivors(report)) => assert!(!report.proven, "{report:#?}"),
        Err(error) => panic!("{error}"),
    }
    tracer.detach();
    sandbox.tracker.wait_empty(&played.service).await.unwrap();
    played.child.wait().await.unwrap();
    sandbox.close();
}

/// The calling thread without CAP_KILL for as long as this lives. Capabilities are a thread's own.
struct WithoutCapKill(CapabilitySets);

impl WithoutCapKill {
    fn new() -> Self {
        let before = capabilities(None).unwrap();
        let without = CapabilitySets {
            effective: before.effective - CapabilitySet::KILL,
            ..before
        };
        set_capabilities(None, without).unwrap();
        Self(before)
    }
}

impl Drop for WithoutCapKill {
    fn drop(&mut self) {
        // Cleaning up takes it.
        set_capabilities(None, self.0).expect("what is permitted can be made effective");
    }
}

#[tokio::test]
async fn a_process_in_another_user_namespace_survives_a_caller_without_rights_there() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("user-namespace", [""; 0]);
    let foreign: u32 = played.facts.number("foreign").unwrap();
    let link = std::fs::read_link(format!("/proc/{foreign}/ns/user")).unwrap();
    let unprivileged = WithoutCapKill::new();
    let report = not_down(&sandbox, &played).await;
    let [survivor] = &report.survivors[..] else {
        panic!("{report:#?}");
    };
    assert_eq!(
        (survivor.pid, survivor.comm.as_str(), survivor.state),
        (foreign, "foreign", Some('S'))
    );
    let Cause::OtherUserNamespace { namespace, error } = &survivor.cause else {
        panic!("{survivor:#?}");
    };
    assert_eq!(format!("user:[{namespace}]"), link.to_str().unwrap());
    assert!(error.contains("Operation not permitted"), "{error}");
    println!("{}", survivor.cause);
    drop(unprivileged);
    sandbox.stop(&mut played, &patient()).await;
    sandbox.close();
}

/// Has the kernel answer EPERM to every pidfd_send_signal of the command, as a container's seccomp profile may.
fn forbid_signals(command: &mut Command) {
    // SAFETY: between fork and exec only prctl is called, with a program on the stack; nothing is allocated.
    unsafe { command.pre_exec(install_filter) };
}

fn install_filter() -> std::io::Result<()> {
    let call = u32::try_from(libc::SYS_pidfd_send_signal).expect("calls have small numbers");
    let instruction = |code, jt, jf, k| libc::sock_filter {
        code: u16::try_from(code).expect("codes are small"),
        jt,
        jf,
        k,
    };
    let mut filter = [
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call),
        instruction(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned(),
        ),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program is alive during the call, and the kernel copies it.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    nix::errno::Errno::result(result)?;
    Ok(())
}

#[test]
fn the_tool_says_who_could_not_be_signalled_and_who_of_them_is_in_another_user_namespace() {
    // Root may signal anybody, so it takes a filter to refuse the tool.
    let mut service = Service::start_as("user-namespace", &[], forbid_signals);
    let (main, foreign) = (number(&service.members()[0]["pid"]), service.pid("foreign"));
    let survivors = service.survives_as(forbid_signals);
    assert_eq!(survivors.len(), 2, "{survivors:#?}");
    let cause = identified(&survivors[0], main, "actor", "S");
    assert_eq!(cause["kind"], "refused", "{cause:#}");
    let cause = identified(&survivors[1], foreign, "foreign", "S");
    assert_eq!(cause["kind"], "other-user-namespace", "{cause:#}");
    assert!(
        cause["error"].as_str().unwrap().contains("Operation not permitted"),
        "{cause:#}"
    );
    assert_eq!(service.live(), 2);
    service.stops();
}

#[test]
fn the_tool_does_not_begin_a_stop_that_it_has_no_rights_for() {
    let service = Service::start("child", &[]);
    let fails = |change: fn(&mut Command)| {
        let mut command = service.tool(&["stop", "held"]);
        change(&mut command);
        let output: Output = command.output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert_eq!(service.live(), 2);
        print!("{stderr}");
        stderr
    };
    // In a user namespace of its own it has every capability, and none that counts.
    fails(|command| {
        let enter = || Ok(unshare(CloneFlags::CLONE_NEWUSER)?);
        // SAFETY: between fork and exec only unshare is called; nothing is allocated.
        unsafe { command.pre_exec(enter) };
    });
    let stderr = fails(|command| {
        let drop_kill = || {
            const CAP_KILL: libc::c_ulong = 5;
            // SAFETY: takes numbers only.
            let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_KILL) };
            nix::errno::Errno::result(result)?;
            Ok(())
        };
        // SAFETY: between fork and exec only prctl is called; nothing is allocated.
        unsafe { command.pre_exec(drop_kill) };
    });
    assert!(stderr.contains("CAP_KILL"), "{stderr}");
    service.stops();
}
