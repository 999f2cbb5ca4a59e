//! A tracker of a test's own: its own pins, its own programs, and nothing left behind.

use std::{
    collections::BTreeSet,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use aya::maps::MapData;
use tokio::process::Child;
use zinit_tracker::{
    Config, Level, Pins, Service, StopPolicy, StopReport, Tracker, Tracking, records::Stats, stop, stop::Doubt,
};

use crate::{Cleanup, Facts, Marker, Ready, actor, members, survivors, tool::tool};

/// Long enough for any machine: tests assert what happens, never how fast.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A directory for pins that no other test uses; it goes away with this value.
#[derive(Debug)]
pub struct PinDir(PathBuf);

impl PinDir {
    /// Names a directory that does not exist yet.
    #[must_use]
    pub fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        // In a pid namespace of its own another test may have the same pid.
        let random = RandomState::new().build_hasher().finish() as u32;
        let name = format!("zinit-test-{}-{number}-{random:08x}", std::process::id());
        Self(Path::new("/sys/fs/bpf").join(name))
    }

    /// Where the directory is, or will be.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Default for PinDir {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for PinDir {
    fn drop(&mut self) {
        if !self.0.exists() {
            return;
        }
        // A failed test leaves its pins; a test that passes asserts that there are none.
        for directory in ["v1/links", "v1/programs", "v1", "v2/links", "v2/programs", "v2", ""] {
            let directory = self.0.join(directory);
            if !directory.exists() {
                continue;
            }
            let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
            for entry in entries {
                if let Err(error) = std::fs::remove_file(entry.path()) {
                    eprintln!("failed to remove {}: {error}", entry.path().display());
                }
            }
            if let Err(error) = std::fs::remove_dir(&directory) {
                eprintln!("failed to remove {}: {error}", directory.display());
            }
        }
    }
}

/// A tracker with pins of its own, and one actor at a time to play a service.
#[derive(Debug)]
pub struct Sandbox {
    /// The tracker under test.
    pub tracker: Tracker,
    pins: PinDir,
}

/// A service that an actor plays.
#[derive(Debug)]
pub struct Played {
    _cleanup: Cleanup,
    /// The service.
    pub service: Service,
    /// Its main process.
    pub child: Child,
    /// What every process of it carries.
    pub marker: Marker,
    /// What the actor says about it.
    pub facts: Facts,
}

impl Sandbox {
    /// Loads the programs and pins them in a directory of this test.
    #[must_use]
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    /// As [`Sandbox::new`], with books for so many processes.
    #[must_use]
    pub fn with_capacity(max_processes: u32) -> Self {
        Self::with(|config| config.max_processes = Some(max_processes))
    }

    /// As [`Sandbox::new`], with a changed configuration.
    #[must_use]
    pub fn with(change: impl FnOnce(&mut Config)) -> Self {
        let pins = PinDir::new();
        let mut config = config(pins.path());
        change(&mut config);
        let tracker = Tracker::open(&config)
            .unwrap_or_else(|error| panic!("the tests need root and a kernel with BPF: {error} ({error:?})"));
        Self { tracker, pins }
    }

    /// As [`Sandbox::new`], where something may be pinned; what is to happen when the hooks are attached that take it over.
    #[must_use]
    pub fn taking_over(pins: PinDir, meanwhile: Option<fn()>) -> Self {
        let config = Config {
            replace_programs: true,
            meanwhile,
            ..config(pins.path())
        };
        let tracker = Tracker::open(&config).expect("what is pinned can be taken over");
        Self { tracker, pins }
    }

    /// A tracker at level `procfs`.
    #[must_use]
    pub fn procfs() -> Self {
        let sandbox = Self::with(|config| config.level = Level::Procfs);
        assert_eq!(sandbox.tracker.tracking(), Tracking::Procfs);
        sandbox
    }

    /// Where the maps are pinned.
    #[must_use]
    pub fn pins(&self) -> &Path {
        self.pins.path()
    }

    /// A map, as it is pinned.
    #[must_use]
    pub fn map(&self, name: &str) -> MapData {
        MapData::from_pin(self.pins().join("v2").join(name)).expect("the map is pinned")
    }

    /// A client that replaces the programs by those of a build from `sources`, if they are of another.
    #[must_use]
    pub fn successor(&self, sources: [u8; 32]) -> Tracker {
        let config = Config {
            replace_programs: true,
            sources,
            ..config(self.pins())
        };
        Tracker::open(&config).expect("what is pinned can be taken over")
    }

    /// A `zinit-tracker` command for these pins.
    #[must_use]
    pub fn tool(&self, args: &[&str]) -> Command {
        let mut command = Command::new(tool());
        command.arg("--pins").arg(self.pins()).args(args).stdin(Stdio::null());
        command
    }

    /// Another client of the same tracker.
    #[must_use]
    pub fn second_client(&self) -> Tracker {
        Tracker::open(&config(self.pins())).expect("what is pinned can be joined")
    }

    /// Starts an actor as a service, and returns when its processes are all there. The argument `MARKER` stands for the
    /// marker.
    pub fn play<S: AsRef<str>>(&self, behaviour: &str, args: impl IntoIterator<Item = S>) -> Played {
        self.play_as(behaviour, args, |_| {})
    }

    /// As [`play`](Self::play), with the actor's command changed by `prepare`.
    pub fn play_as<S: AsRef<str>>(
        &self,
        behaviour: &str,
        args: impl IntoIterator<Item = S>,
        prepare: impl FnOnce(&mut Command),
    ) -> Played {
        let marker = Marker::new();
        let cleanup = Cleanup::new(&marker);
        let mut ready = Ready::new().expect("a FIFO can be made");
        let args = args.into_iter().map(|arg| match arg.as_ref() {
            "MARKER" => marker.to_string(),
            arg => arg.to_owned(),
        });
        let mut command = actor(behaviour, args, &marker);
        ready.attach(&mut command);
        prepare(&mut command);
        let service = self.tracker.register(behaviour).expect("the name is free");
        let child = self
            .tracker
            .spawn(&service, &mut command.into())
            .expect("the actor starts");
        let facts = ready.wait().expect("the actor gets ready");
        Played {
            _cleanup: cleanup,
            service,
            child,
            marker,
            facts,
        }
    }

    /// The service's members by pid and start time in clock ticks, as the kernel map has them.
    #[must_use]
    pub fn in_map(&self, service: &Service) -> BTreeSet<(i32, u64)> {
        let members = self.tracker.processes(service).expect("the map can be read");
        members
            .iter()
            .map(|member| {
                let pid = i32::try_from(member.pid).expect("a pid fits");
                (pid, member.key.start_boottime_ns / 10_000_000)
            })
            .collect()
    }

    /// Asserts that the map has exactly the processes that carry the marker.
    pub fn assert_map_matches_oracle(&self, played: &Played) {
        let oracle: BTreeSet<_> = members(&played.marker)
            .iter()
            .map(|member| (member.pid, member.start_time_ticks))
            .collect();
        assert_eq!(
            self.in_map(&played.service),
            oracle,
            "the map (left) is not what /proc says (right)"
        );
        assert_eq!(
            self.tracker.live(&played.service).expect("it is registered"),
            oracle.len() as u64
        );
    }

    /// Stops the service and asserts that the stop is proven and nothing is left.
    pub async fn stop(&self, played: &mut Played, policy: &StopPolicy) -> StopReport {
        let report = self.stop_anyway(played, policy).await;
        assert!(report.proven, "{report:#?}");
        assert_eq!(report.doubts, []);
        report
    }

    /// Stops a service of level `procfs` and asserts that nothing is left, and that the report lists what it cannot see, unless
    /// a cgroup proves that there is nothing to see.
    pub async fn stop_at_level_procfs(&self, played: &mut Played, policy: &StopPolicy) -> StopReport {
        let report = self.stop_anyway(played, policy).await;
        assert_eq!(report.tracking, Tracking::Procfs);
        assert!(report.fallback_reason.is_some());
        match &report.doubts[..] {
            [] => assert!(report.proven, "{report:#?}"),
            [Doubt::ProcfsTracking { blind_to }] => {
                assert!(!report.proven && !blind_to.is_empty(), "{report:#?}");
            }
            _ => panic!("{report:#?}"),
        }
        report
    }

    /// Stops the service and asserts that nothing is left.
    async fn stop_anyway(&self, played: &mut Played, policy: &StopPolicy) -> StopReport {
        let report = tokio::time::timeout(DEADLINE, stop(&self.tracker, &played.service, policy))
            .await
            .expect("the stop ends")
            .expect("nobody survives");
        assert_eq!(survivors(&played.marker), [], "{report:#?}");
        let info = self.tracker.info(&played.service).expect("it is registered");
        assert_eq!((info.live, info.lost), (0, 0));
        assert_eq!(self.in_map(&played.service), BTreeSet::new());
        played.child.wait().await.expect("the main process is our child");
        report
    }

    /// Asserts that no operation failed, unregisters everything and asserts that the pins are gone.
    pub fn close(self) {
        let stats = self.tracker.stats().expect("the counters can be read");
        assert_eq!(failures(&stats), 0, "{stats:#?}");
        for info in self.tracker.services().expect("the services can be read") {
            self.tracker.unregister(&info.handle()).expect("it is empty");
        }
        assert!(
            self.tracker.close().expect("the pins can be removed"),
            "somebody else uses them"
        );
        assert!(!self.pins.path().exists(), "the pin directory is left");
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

fn config(pins: &Path) -> Config {
    Config {
        pins: Pins::Shared(pins.to_owned()),
        instance: "test".to_owned(),
        max_processes: Some(8192),
        level: Level::Ebpf,
        ..Config::default()
    }
}

/// Failed operations of the programs.
#[must_use]
pub fn failures(stats: &Stats) -> u64 {
    stats.insert_failures + stats.delete_failures + stats.exit_failures
}
