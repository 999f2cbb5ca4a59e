//! Whatever happens to the daemon, at moments that a seed chooses: every service is what it is wanted to be afterwards, nothing is
//! left of one whose stop was reported proven, and nobody else was touched.
//!
//! `ZINIT_TEST_ROUNDS=1000` runs so many seeds, from `ZINIT_TEST_SEED` on; a failure names its seed and what was done.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Mutex,
    thread,
    time::Duration,
};

use nix::sys::resource::{Resource, getrlimit};
use rustix::{
    process::{Resource as Limit, Rlimit, Signal},
    time::Timespec,
};
use serde_json::Value;
use zinit_tests::{
    Cleanup, Marker,
    daemon::{Daemon, wait_for, within},
    holds::skipped,
    members,
    memory::MemoryCgroup,
    random::Random,
    rounds, survivors,
    tool::zinit,
};
use zinit_tracker::{Config, Level, Pins, Tracker};

/// Operations on services in a run, each of which something may befall.
const STEPS: usize = 12;

/// What services do: each has a child in a session of its own.
const SERVICES: [(&str, &str); 4] = [
    ("plain", "setsid sleep 3601 & exec sleep 3600"),
    (
        "deaf",
        "trap '' TERM HUP INT; setsid sleep 3601 & while :; do sleep 3600; done",
    ),
    ("forks", "setsid sleep 3601 & while :; do /bin/true; done"),
    ("ends", "setsid sleep 3601 & sleep 0.3; exit 3"),
];

/// A process that notes every signal that it can catch.
const BYSTANDER: &str = "trap 'echo signalled >> \"$1\"' HUP INT QUIT USR1 USR2 TERM; \
    sleep 3602 & echo ready; while :; do wait; done";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Up,
    Down,
    /// The daemon died, or could not save what was wanted.
    Unknown,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Crash,
    Freeze,
    NoDescriptors,
    NoMemory,
    FullDisk,
    HangingDisk,
    Upgrade,
    /// Only where the clock is nobody else's.
    ClockJump,
}

const FAULTS: [Fault; 7] = [
    Fault::Crash,
    Fault::Freeze,
    Fault::NoDescriptors,
    Fault::NoMemory,
    Fault::FullDisk,
    Fault::HangingDisk,
    Fault::Upgrade,
];

/// A file system of 1 MiB below the directory that is given: one that can be made to hang where there are loop devices.
const DISK: &str = "mkfs.ext4 -q -m 0 -O ^has_journal \"$2\" 1M > \"$2.log\" \
    && mount -o loop \"$2\" \"$1\" && rmdir \"$1/lost+found\" \
    || mount -t tmpfs -o size=256k tmpfs \"$1\"; \
    chmod 700 \"$1\"; echo ready; exec sleep 3603";

/// Books for so few processes that not all of the services' fit at every moment.
const FEW: u32 = 9;

/// A process of the test's own, which ends with it.
struct Helper {
    child: Child,
    marker: Marker,
    _cleanup: Cleanup,
}

impl Helper {
    /// Returns when it has said that it is ready.
    fn start(mut command: Command) -> Self {
        let marker = Marker::new();
        let cleanup = Cleanup::new(&marker);
        command.env(Marker::ENV, marker.as_str()).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "ready\n");
        Self {
            child,
            marker,
            _cleanup: cleanup,
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // The marker finds what it has created; but only its parent can reap it.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("failed to end a helper: {error}");
        }
    }
}

struct Service {
    marker: Marker,
    _cleanup: Cleanup,
    wanted: Wanted,
}

/// A daemon with its services, whose disk is small, and somebody whom it all does not concern.
struct Laboratory {
    daemon: Daemon,
    services: BTreeMap<&'static str, Service>,
    /// In whose mount namespace the states are on a file system of their own.
    disk: Helper,
    bystander: Helper,
    full: bool,
    /// The books may have missed something, and say so.
    doubtful: bool,
    done: Mutex<Vec<String>>,
    /// Where the daemon and its services are; `None`: there is no memory controller.
    memory: Option<MemoryCgroup>,
}

impl Laboratory {
    /// With books for so many processes, or as many as the daemon takes.
    fn new(capacity: Option<u32>) -> Self {
        let daemon = Daemon::prepare(&[]);
        // Whoever opens the books first decides how large they are.
        let _books = capacity.map(|capacity| {
            let config = Config {
                pins: Pins::Shared(daemon.pins().to_owned()),
                max_processes: Some(capacity),
                level: Level::Ebpf,
                ..Config::default()
            };
            Tracker::open(&config).unwrap()
        });
        let mut services = BTreeMap::new();
        for (name, script) in SERVICES {
            let more = "shutdown_timeout: 0.2\nrestart: {delay: 0.02, max_delay: 0.1}\n";
            let (marker, _cleanup) = daemon.define(name, script, more);
            let service = Service {
                marker,
                _cleanup,
                wanted: Wanted::Up,
            };
            services.insert(name, service);
        }
        fs::create_dir(daemon.state_directory()).unwrap();
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-ec", DISK, "sh"])
            .arg(daemon.state_directory())
            .arg(daemon.scratch().join("disk"));
        let disk = Helper::start(command);
        let memory = MemoryCgroup::new().unwrap();
        if memory.is_none() {
            skipped("no memory controller can be written to, so nothing runs out of memory");
        }
        let mut command = Command::new("sh");
        command
            .args(["-c", BYSTANDER, "sh"])
            .arg(daemon.scratch().join("signals"));
        let mut laboratory = Self {
            bystander: Helper::start(command),
            daemon,
            services,
            disk,
            full: false,
            doubtful: capacity.is_some(),
            done: Mutex::default(),
            memory,
        };
        laboratory.run();
        laboratory
    }

    fn note(&self, what: impl fmt::Display) {
        self.done.lock().unwrap().push(what.to_string());
    }

    /// A command that is executed where the disk is.
    fn at_disk(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.disk.child.id()));
        command
    }

    /// Starts the daemon where its disk and its memory are.
    fn run(&mut self) {
        let mut command = within(self.at_disk(), &self.daemon.init(&[]));
        if let Some(memory) = &self.memory {
            let mut shell = Command::new("sh");
            let script = "echo 0 > \"$1\"; shift; exec \"$@\"";
            shell.args(["-ec", script, "sh"]).arg(memory.procs());
            command = within(shell, &command);
        }
        self.daemon.run_as(command);
    }

    /// The daemon has died, and with it what it could not save.
    fn run_again(&mut self) {
        self.run();
        if self.full {
            for service in self.services.values_mut() {
                service.wanted = Wanted::Unknown;
            }
        }
    }

    /// Leaves the daemon and its services hardly any memory for a while.
    fn without_memory(&mut self, duration: Duration) {
        let Some(memory) = &self.memory else { return };
        let kills = memory.kills().unwrap();
        memory.leave(u64::from(duration.subsec_micros()) * 8).unwrap();
        thread::sleep(duration * 5);
        memory.leave_all().unwrap();
        // Who is to be killed does not answer any more, even if it is not counted yet.
        let answers = self.daemon.zinit(&["list"]).status.success();
        if answers && memory.kills().unwrap() == kills {
            return;
        }
        self.note("somebody was killed for want of memory");
        if !answers {
            self.note("it was the daemon");
            let status = self.daemon.wait();
            assert_eq!(status.signal(), Some(9), "{status}: {}", self.daemon.log());
            self.run_again();
        }
        // Entries of the books are memory too.
        self.doubtful = true;
    }

    /// What is written waits for so long.
    fn hang_disk(&self, duration: Duration) {
        let freeze = |what: &str| {
            let mut command = self.at_disk();
            command.args(["fsfreeze", what]).arg(self.daemon.state_directory());
            command.stderr(Stdio::null()).status().unwrap().success()
        };
        if freeze("--freeze") {
            thread::sleep(duration);
            assert!(freeze("--unfreeze"), "the disk hangs");
            return;
        }
        // The file system in memory, which stands in where there are none, cannot hang.
        let loops = Path::new("/dev/loop-control").exists();
        assert!(!loops, "there are loop devices, and the disk does not hang");
        println!("SKIPPED: without loop devices no disk hangs");
    }

    /// Whether a report is right about how certain it is.
    fn check_proof(&self, report: &Value) {
        let doubts = report["doubts"].as_array().unwrap();
        assert_eq!(report["proven"], doubts.is_empty(), "{report:#}");
        assert!(self.doubtful || doubts.is_empty(), "{report:#}");
    }

    /// A file on the daemon's disk, as it can be reached from here.
    fn on_disk(&self, name: &str) -> PathBuf {
        let directory = self.daemon.state_directory();
        let inside = directory.strip_prefix("/").unwrap();
        Path::new("/proc")
            .join(self.disk.child.id().to_string())
            .join("root")
            .join(inside)
            .join(name)
    }

    /// Waits until what could not be saved meanwhile is.
    fn wait_until_saved(&self) {
        let mark = self.on_disk("supervisor.json");
        wait_for("the daemon saves everything again", || mark.exists());
    }

    fn fill_disk(&mut self, full: bool) {
        self.full = full;
        if !full {
            fs::remove_file(self.on_disk("filler")).unwrap();
            self.wait_until_saved();
            return;
        }
        let mut file = fs::File::create(self.on_disk("filler")).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
    }

    /// Starts a `zinit` command, lets something befall the daemon a moment later, and returns how the command ended.
    fn act(&mut self, arguments: &[&str], fault: Option<(Fault, Duration)>) -> Output {
        self.note(format_args!("{arguments:?}, meanwhile {fault:?}"));
        let mut command = self.daemon.command(arguments);
        let client = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        if let Some((fault, moment)) = fault {
            thread::sleep(moment);
            self.befall(fault, moment);
        }
        let output = client.wait_with_output().unwrap();
        if !output.status.success() {
            self.note(String::from_utf8_lossy(&output.stderr).trim_end());
        }
        output
    }

    fn befall(&mut self, fault: Fault, duration: Duration) {
        match fault {
            Fault::Crash => {
                self.daemon.signal(Signal::KILL);
                self.daemon.wait();
                self.run_again();
            }
            Fault::Freeze => {
                self.daemon.signal(Signal::STOP);
                thread::sleep(duration * 5);
                self.daemon.signal(Signal::CONT);
            }
            Fault::NoDescriptors => {
                let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
                self.limit_descriptors(3, hard);
                thread::sleep(duration * 5);
                self.limit_descriptors(hard, hard);
                if !self.full {
                    self.wait_until_saved();
                }
            }
            Fault::NoMemory => self.without_memory(duration),
            Fault::FullDisk => self.fill_disk(!self.full),
            Fault::HangingDisk => self.hang_disk(duration * 5),
            Fault::ClockJump => jump(duration),
            Fault::Upgrade => {
                let output = self.daemon.zinit(&["upgrade", "--binary", zinit().to_str().unwrap()]);
                let stderr = String::from_utf8_lossy(&output.stderr);
                // While states cannot be saved, it is refused.
                let goes_on = self.full && stderr.contains("goes on as it was");
                assert!(output.status.success() || goes_on, "{stderr}{}", self.daemon.log());
            }
        }
    }

    fn limit_descriptors(&self, soft: u64, hard: u64) {
        let limit = Rlimit {
            current: Some(soft),
            maximum: Some(hard),
        };
        rustix::process::prlimit(Some(self.daemon.process()), Limit::Nofile, limit).unwrap();
    }

    /// One operation, and perhaps one fault.
    fn step(&mut self, random: &mut Random, faults: &[Fault]) {
        let (name, _) = SERVICES[random.below(SERVICES.len())];
        let moment = Duration::from_micros(random.below(60_000) as u64);
        let fault = (random.below(3) > 0).then(|| (faults[random.below(faults.len())], moment));
        let operation = ["start", "stop", "stop", "restart", "kill"][random.below(5)];
        let output = match operation {
            "stop" => self.act(&["stop", name, "--json"], fault),
            "kill" => self.act(&["kill", name, "SIGKILL"], fault),
            operation => self.act(&[operation, name], fault),
        };
        let lost = self.full && matches!(fault, Some((Fault::Crash | Fault::NoMemory | Fault::Upgrade, _)));
        let service = self.services.get_mut(name).unwrap();
        match (operation, output.status.success()) {
            ("kill", _) => {}
            (_, false) => service.wanted = Wanted::Unknown,
            // Answered before the daemon died, and forgotten.
            _ if lost => service.wanted = Wanted::Unknown,
            ("stop", true) => {
                service.wanted = Wanted::Down;
                let report: Value = serde_json::from_slice(&output.stdout).unwrap();
                assert_eq!(survivors(&service.marker), [], "{name} is down: {report:#}");
                self.check_proof(&report);
            }
            _ => service.wanted = Wanted::Up,
        }
    }

    /// With nothing in its way, the daemon has everything as it is wanted.
    fn check(&mut self) {
        if self.full {
            self.fill_disk(false);
        }
        for (name, _) in SERVICES {
            if self.services[name].wanted == Wanted::Unknown {
                let output = self.act(&["start", name], None);
                assert!(output.status.success(), "{name}: {}", self.daemon.log());
                self.services.get_mut(name).unwrap().wanted = Wanted::Up;
            }
        }
        for (name, service) in &self.services {
            let status = self.daemon.json(&["status", name, "--json"]);
            match service.wanted {
                Wanted::Up => {
                    assert_eq!(status["target"], "Up", "{name}: {status}");
                    // While it is stopped before it is started anew, it looks as before.
                    wait_for(&format!("{name} runs"), || {
                        let main = self.daemon.pid(name);
                        self.daemon.state(name) == "Running"
                            && members(&service.marker)
                                .iter()
                                .any(|member| u64::try_from(member.pid) == Ok(main))
                    });
                }
                _ => {
                    assert_eq!(status["target"], "Down", "{name}: {status}");
                    assert_eq!(survivors(&service.marker), [], "{name} was stopped");
                }
            }
        }
        for (name, service) in &self.services {
            let output = self.daemon.zinit(&["stop", name, "--json"]);
            assert!(output.status.success(), "{name}: {output:?}");
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            self.check_proof(&report);
            assert_eq!(survivors(&service.marker), [], "{name}: {report:#}");
        }
        let signals = self.daemon.scratch().join("signals");
        assert!(!signals.exists(), "a bystander got a signal");
        assert_eq!(survivors(&self.bystander.marker).len(), 2, "a bystander was killed");
    }

    fn close(mut self) {
        self.daemon.does(&["shutdown"]);
        let status = self.daemon.wait();
        assert!(status.success(), "{status}: {}", self.daemon.log());
        assert!(!self.daemon.pins().exists(), "pins are left: {}", self.daemon.log());
        assert!(!self.daemon.log().contains("panicked"), "{}", self.daemon.log());
    }
}

/// What was done goes to stderr with the panic.
impl Drop for Laboratory {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.done.lock().unwrap().join("\n"));
        }
    }
}

#[test]
fn who_found_no_room_in_the_books_is_started_when_there_is_some() {
    let mut daemon = Daemon::prepare(&[]);
    let first = Tracker::open(&Config {
        pins: Pins::Shared(daemon.pins().to_owned()),
        max_processes: Some(2),
        level: Level::Ebpf,
        ..Config::default()
    })
    .unwrap();
    let (_, _cleanup) = daemon.define("large", "setsid sleep 3601 & exec sleep 3600", "");
    daemon.run();
    drop(first);
    daemon.wait_for_state("large", "Running");
    wait_for("the books are full", || {
        daemon.json(&["stats", "large", "--json"])["children"]
            .as_array()
            .is_some_and(|children| children.len() == 1)
    });
    daemon.write("late", "exec: sleep 3600\nrestart: {delay: 0.02, max_delay: 0.1}\n");
    daemon.does(&["monitor", "late"]);
    wait_for("it is refused", || {
        daemon.state("late").contains("could not be tracked")
    });
    let status = daemon.json(&["status", "late", "--json"]);
    assert_eq!(status["target"], "Up", "{status:#}");
    daemon.does(&["stop", "large"]);
    daemon.wait_for_state("late", "Running");
    // What failed before it ran is not held against it.
    daemon.does(&["stop", "late"]);
    daemon.shutdown();
}

#[test]
fn services_outlive_whatever_befalls_the_daemon() {
    let Random(first) = Random::seeded(1);
    for seed in (first..).take(rounds(4) as usize) {
        eprintln!("seed {seed}");
        let mut random = Random(seed);
        let capacity = (random.below(4) == 0).then_some(FEW);
        run_through(Laboratory::new(capacity), &mut random, &FAULTS);
    }
}

#[test]
fn a_clock_that_jumps_changes_nothing() {
    if std::env::var_os("ZINIT_TEST_CLOCK").is_none() {
        println!(
            "SKIPPED: the clock is the whole machine's: ZINIT_TEST_CLOCK says that nobody else needs it, as in a guest"
        );
        return;
    }
    let mut random = Random::seeded(1);
    run_through(
        Laboratory::new(None),
        &mut random,
        &[Fault::Crash, Fault::ClockJump, Fault::ClockJump],
    );
}

fn run_through(mut laboratory: Laboratory, random: &mut Random, faults: &[Fault]) {
    for _ in 0..STEPS {
        laboratory.step(random, faults);
    }
    laboratory.check();
    laboratory.close();
}

/// Sets the clock of the day forward or back by up to ten years.
fn jump(by: Duration) {
    let micros = i64::from(by.subsec_micros());
    let seconds = micros * 5_000 * if micros % 2 == 0 { 1 } else { -1 };
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let then = Timespec {
        tv_sec: now.tv_sec + seconds,
        ..now
    };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, then).unwrap();
}
