//! What is done to the daemon, and what it is wanted to have done.

use std::{collections::BTreeMap, fs, process::Stdio, thread, time::Duration};

use serde_json::{Value, json};
use zinit_tests::{
    Cleanup, Marker,
    daemon::{Daemon, wait_for},
    members,
    random::Random,
    survivors,
};
use zinit_tracker::{Config, Level, Pins, Tracker};

/// What services do. All but the last are at rest once they run.
const SERVICES: [(&str, &str, &str); 8] = [
    ("rests", "exec sleep 3600", ""),
    ("session", "setsid sleep 3601 & exec sleep 3600", ""),
    (
        "daemon",
        "setsid sh -c 'sleep 3601 & sleep 3602 &' & exec sleep 3600",
        "",
    ),
    ("deaf", "trap '' TERM HUP INT; setsid sleep 3601 & sleep 3600", ""),
    ("prints", "seq 200; exec sleep 3600", ""),
    ("tested", "exec sleep 3600", "test: \"true\"\n"),
    ("ends", "setsid sleep 3601 & sleep 0.2; exit 3", ""),
    (
        "forks",
        "setsid sleep 3601 & while :; do /bin/true; sleep 0.01; done",
        "",
    ),
];

/// Services that never rest: they are started anew, or create processes, all the time.
const RESTLESS: [&str; 2] = ["ends", "forks"];

/// A service that creates a known number of processes.
const COUNTS: &str = "counts";
const COUNTED: u64 = 200;

struct Service {
    marker: Marker,
    _cleanup: Cleanup,
    wanted: bool,
}

fn order(daemon: &Daemon, method: &str, service: &str) {
    assert_eq!(
        daemon.call(method, &json!([service])),
        Value::Null,
        "{method} {service}"
    );
}

/// A daemon, its services, and a look into its books.
pub(crate) struct Workshop {
    pub(crate) daemon: Daemon,
    tracker: Tracker,
    services: BTreeMap<&'static str, Service>,
    operations: u64,
    comparisons: u64,
    proven: u64,
    /// Forks that the books have of registrations that are no more.
    past_forks: u64,
    seen: BTreeMap<String, (u32, u64)>,
}

impl Workshop {
    pub(crate) fn open() -> Self {
        let mut daemon = Daemon::prepare(&[]);
        let mut services = BTreeMap::new();
        for (name, script, more) in SERVICES {
            let more = format!("shutdown_timeout: 0.1\nrestart: {{delay: 0.05, max_delay: 0.5}}\n{more}");
            let (marker, _cleanup) = daemon.define(name, script, &more);
            let service = Service {
                marker,
                _cleanup,
                wanted: true,
            };
            services.insert(name, service);
        }
        let script = format!(
            "i=0; while [ $i -lt {COUNTED} ]; do /bin/true; i=$((i + 1)); done; echo > \"$1\"; exec sleep 3600"
        );
        let path = daemon.script("counts.sh", &script);
        let file = daemon.scratch().join("counted");
        daemon.write(
            COUNTS,
            &format!("exec: {path} {}\nshutdown_timeout: 0.1\n", file.display()),
        );
        daemon.run();
        let config = Config {
            pins: Pins::Shared(daemon.pins().to_owned()),
            level: Level::Ebpf,
            ..Config::default()
        };
        Self {
            tracker: Tracker::open(&config).unwrap(),
            daemon,
            services,
            operations: 0,
            comparisons: 0,
            proven: 0,
            past_forks: 0,
            seen: BTreeMap::new(),
        }
    }

    pub(crate) const fn operations(&self) -> u64 {
        self.operations
    }

    /// Processes that were created in services, as far as the books said so when they were looked at.
    pub(crate) fn forks(&self) -> u64 {
        self.past_forks + self.seen.values().map(|(_, forks)| forks).sum::<u64>()
    }

    pub(crate) fn live(&self) -> u64 {
        self.tracker.services().unwrap().iter().map(|info| info.live).sum()
    }

    /// Asks for one thing, after a while.
    pub(crate) fn work(&mut self, random: &mut Random) {
        thread::sleep(Duration::from_millis(random.below(100) as u64));
        self.operations += 1;
        let (name, ..) = SERVICES[random.below(SERVICES.len())];
        let params = json!([name]);
        let service = self.services.get_mut(name).unwrap();
        match random.below(12) {
            0..3 => {
                order(&self.daemon, "service_start", name);
                service.wanted = true;
            }
            3..5 => {
                order(&self.daemon, "service_stop", name);
                service.wanted = false;
                assert_eq!(survivors(&service.marker), [], "{name} was stopped");
            }
            5 => {
                // As users do it, with a process of their own.
                let output = self.daemon.zinit(&["stop", name, "--json"]);
                assert!(output.status.success(), "{output:?}");
                let report: Value = serde_json::from_slice(&output.stdout).unwrap();
                assert_eq!(report["proven"], true, "{report:#}");
                assert_eq!(survivors(&service.marker), [], "{report:#}");
                service.wanted = false;
                self.proven += 1;
            }
            6 => {
                order(&self.daemon, "service_stop", name);
                order(&self.daemon, "service_forget", name);
                order(&self.daemon, "service_monitor", name);
                service.wanted = true;
            }
            7 => {
                // It may be down, and then this is refused.
                let answer = self.daemon.connect().call("service_kill", &json!([name, "SIGKILL"]));
                assert_eq!(answer["id"], 1, "{answer}");
            }
            8 => {
                // Which it has none of while it is down.
                let answer = self.daemon.connect().call("service_stats", &params);
                let is_down = answer["error"]["code"] == -32003;
                assert!(answer["result"]["name"] == name || is_down, "{answer}");
            }
            9 => {
                // A client that goes away before it was answered.
                self.daemon.connect().request(1, "service_status", &params);
            }
            10 => {
                let list = self.daemon.call("service_list", &json!([]));
                assert_eq!(list.as_object().unwrap().len(), self.services.len() + 1, "{list}");
            }
            _ => {
                let mut command = self.daemon.command(&["log", "-s", name]);
                assert!(command.stdout(Stdio::null()).status().unwrap().success());
            }
        }
    }

    /// Lets everything come to rest that does, and compares the books with `/proc`, and a count of forks with a known one.
    pub(crate) fn compare(&mut self) {
        self.comparisons += 1;
        for (name, service) in &self.services {
            let books = || {
                self.tracker
                    .services()
                    .unwrap()
                    .into_iter()
                    .find(|info| info.name == *name)
            };
            if RESTLESS.contains(name) {
                let info = books();
                assert!(info.is_none_or(|info| info.lost == 0), "{name} has lost something");
                continue;
            }
            wait_for(&format!("the books are right about {name}"), || {
                let state = self.daemon.state(name);
                let found = members(&service.marker).len() as u64;
                let info = books();
                let live = info.as_ref().map_or(0, |info| info.live);
                let adds_up = info.is_none_or(|info| info.forks - info.exits == info.live && info.lost == 0);
                (state == "Running") == service.wanted && (found > 0) == service.wanted && found == live && adds_up
            });
        }
        self.count();
        for info in self.tracker.services().unwrap() {
            let before = self.seen.insert(info.name, (info.id.number(), info.forks));
            if let Some((id, forks)) = before
                && id != info.id.number()
            {
                self.past_forks += forks;
            }
        }
    }

    fn count(&self) {
        let file = self.daemon.scratch().join("counted");
        order(&self.daemon, "service_stop", COUNTS);
        if file.exists() {
            fs::remove_file(&file).unwrap();
        }
        let info = || {
            let services = self.tracker.services().unwrap();
            services.into_iter().find(|info| info.name == COUNTS)
        };
        let before = info();
        order(&self.daemon, "service_start", COUNTS);
        wait_for("it has created its processes", || file.exists());
        let after = info().unwrap();
        let begin = before
            .filter(|before| before.id == after.id)
            .map_or(0, |before| before.forks);
        // And the main process.
        assert_eq!(after.forks - begin, COUNTED + 1, "{after:?}");
        assert_eq!((after.live, after.lost), (1, 0), "{after:?}");
    }

    pub(crate) fn close(self) -> String {
        let stats = self.tracker.stats().unwrap();
        let done = format!(
            "{} operations, {} stops of them by a client of its own and all proven, {} comparisons, {stats:?}",
            self.operations, self.proven, self.comparisons
        );
        let Self {
            daemon,
            tracker,
            services,
            ..
        } = self;
        // Whoever has the books open keeps the daemon from removing them.
        drop(tracker);
        daemon.shutdown();
        for (name, service) in &services {
            assert_eq!(survivors(&service.marker), [], "{name} is left");
        }
        done
    }
}
