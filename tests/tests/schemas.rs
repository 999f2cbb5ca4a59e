//! What commands print with `--json`, against the schemas in `zinit-tracker/schemas`.
//!
//! Each output of a real service is changed in every place as well: what a schema does not refuse, it does not describe.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeSet,
    error::Error,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use jsonschema::{Retrieve, Uri, Validator};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use zinit_tests::{
    Cleanup, Marker,
    daemon::{Daemon, wait_for},
    holds::{TracedUntil, Tracer},
    sandbox::{PinDir, Sandbox},
    tool,
};
use zinit_tracker::{
    Blindness, Config, Level, Pins, Tracker,
    process::{CgroupVersion, Frozen},
    stop::{Cause, Doubt, Held, Place},
    tracker::Departure,
};

/// Keys that may be absent.
const OPTIONAL: [&str; 3] = ["usage", "sign", "fallback_reason"];

/// Maps with names for keys, by their own name or that of the schema.
const MAPS: [&str; 3] = ["after", "failed", "zinit-list"];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../zinit-tracker/schemas")
}

fn read(name: &str) -> Value {
    let path = directory().join(format!("{name}.json"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Schemas refer to the one beside them that has what they have in common.
struct Beside;

impl Retrieve for Beside {
    fn retrieve(&self, uri: &Uri<String>) -> Result<Value, Box<dyn Error + Send + Sync>> {
        let name = uri.as_str().strip_prefix("json-schema:///");
        let name = name.and_then(|name| name.strip_suffix(".json"));
        Ok(read(name.ok_or_else(|| format!("{uri} is not beside"))?))
    }
}

fn validator_of(schema: &Value) -> Validator {
    let options = jsonschema::options().should_validate_formats(true);
    options.with_retriever(Beside).build(schema).unwrap()
}

fn faults(validator: &Validator, value: &Value) -> Vec<String> {
    let faults = validator.iter_errors(value);
    faults
        .map(|fault| format!("{}: {fault}", fault.instance_path()))
        .collect()
}

/// Asserts that the value is what the schema describes, and that it would not be with any part of it changed.
fn check(name: &str, value: &Value) {
    let validator = validator_of(&read(name));
    assert_eq!(faults(&validator, value), Vec::<String>::new(), "{name}: {value:#}");
    let mut changed = value.clone();
    let count = check_changed(name, &validator, &mut changed, "", name);
    assert_eq!(&changed, value);
    println!("{name}: {count} changes were refused");
}

/// Changes what is at the pointer, and all below it, one at a time; `key`: its name. Returns how many changes there were.
fn check_changed(name: &str, validator: &Validator, whole: &mut Value, pointer: &str, key: &str) -> usize {
    let refused = |whole: &Value, what: &str| {
        assert!(!validator.is_valid(whole), "{name}: {pointer} {what}: {whole:#}");
    };
    let replace = |whole: &mut Value, by: Value| std::mem::replace(whole.pointer_mut(pointer).unwrap(), by);
    let here = whole.pointer(pointer).unwrap().clone();
    // Nothing in the outputs is a list of lists of lists.
    replace(whole, json!([[[]]]));
    refused(whole, "is something else");
    replace(whole, here.clone());
    let mut count = 1;
    let below: Vec<String> = match &here {
        Value::Array(items) => (0..items.len()).map(|index| index.to_string()).collect(),
        Value::Object(fields) => fields.keys().cloned().collect(),
        _ => return count,
    };
    if let Value::Object(fields) = &here {
        let mut more = fields.clone();
        more.insert("unexpected".to_owned(), json!([]));
        replace(whole, Value::Object(more));
        refused(whole, "has a key more");
        count += 1;
        for absent in fields.keys().filter(|key| !OPTIONAL.contains(&key.as_str())) {
            if MAPS.contains(&key) {
                continue;
            }
            let mut less = fields.clone();
            less.remove(absent);
            replace(whole, Value::Object(less));
            refused(whole, &format!("has no {absent}"));
            count += 1;
        }
        replace(whole, here.clone());
    }
    for step in below {
        let escaped = step.replace('~', "~0").replace('/', "~1");
        count += check_changed(name, validator, whole, &format!("{pointer}/{escaped}"), &step);
    }
    count
}

fn parsed(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(bytes)))
}

/// What the command prints, which ends with one of these statuses.
fn printed(mut command: Command, statuses: &[i32]) -> Value {
    let output = command.output().unwrap();
    assert!(statuses.contains(&output.status.code().unwrap()), "{output:?}");
    parsed(&output.stdout)
}

#[test]
fn schemas_are_schemas() {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(directory()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let schema = read(&name);
        assert_eq!(
            schema["$schema"], "https://json-schema.org/draft/2020-12/schema",
            "{name}"
        );
        assert!(schema["title"].is_string(), "{name}");
        if let Err(fault) = jsonschema::draft202012::meta::validate(&schema) {
            panic!("{name}: {}: {fault}", fault.instance_path());
        }
        validator_of(&schema);
        names.insert(name);
    }
    assert!(names.contains("ps"), "{names:?}");
}

/// A service with a daemon, a child that is dead, and a name that takes escapes in JSON.
async fn play(sandbox: &Sandbox, marker: &Marker) -> tokio::process::Child {
    let service = sandbox.tracker.register("web").unwrap();
    let mut command = tokio::process::Command::new("bash");
    let script = "(exec -a x sh -c 'exit 7'); (setsid sleep 3701 &); unshare --uts sleep 3702 & exec sleep 3703";
    command.args(["-c", script]).env(Marker::ENV, marker.as_str());
    let child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    wait_for("all sleep", || {
        let members = sandbox.tracker.processes(&service).unwrap();
        members.len() == 3 && members.iter().all(|member| member.comm == "sleep")
    });
    child
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listings_are_what_their_schemas_say() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut child = play(&sandbox, &marker).await;
    let printed = |args: &[&str]| printed(sandbox.tool(args), &[0]);

    let pid = child.id().unwrap().to_string();
    check("ps", &printed(&["ps", "--json"]));
    let used = printed(&["ps", "--json", "--sort", "memory"]);
    assert!(used[0]["processes"][0]["usage"].is_object(), "{used:#}");
    check("ps", &used);
    check("tree", &printed(&["tree", "--json"]));
    let escapes = printed(&["escapes", "--json"]);
    let left: BTreeSet<&str> = escapes[0]["escapes"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|escape| escape["left"].as_array().unwrap())
        .map(|left| left["what"].as_str().unwrap())
        .collect();
    assert!(
        left.is_superset(&BTreeSet::from(["session", "parent", "namespace"])),
        "{escapes:#}"
    );
    check("escapes", &escapes);
    check("why", &printed(&["why", &pid, "--json"]));
    let history = printed(&["history", "--json"]);
    assert!(!history["processes"].as_array().unwrap().is_empty());
    check("history", &history);
    let dead = history["processes"][0]["pid"].to_string();
    check("why", &printed(&["why", &dead, "--json"]));
    let diff = printed(&["diff", "web", "--json"]);
    let missed = |method: &Value| !method["missed"].as_array().unwrap().is_empty();
    assert!(diff["methods"].as_array().unwrap().iter().any(missed), "{diff:#}");
    check("diff", &diff);
    for line in sandbox
        .tool(&["events", "--json"])
        .output()
        .unwrap()
        .stdout
        .split(|byte| *byte == b'\n')
    {
        if !line.is_empty() {
            check("events", &parsed(line));
        }
    }
    check("stop-dry-run", &printed(&["stop", "web", "--dry-run", "--json"]));
    let report = printed(&["stop", "web", "--json"]);
    assert_eq!(report["proven"], true, "{report:#}");
    assert_eq!(report["processes"].as_array().unwrap().len(), 3, "{report:#}");
    check("stop", &report);
    let history = printed(&["history", "--json"]);
    assert_eq!(history["stops"].as_array().unwrap().len(), 1, "{history:#}");
    check("history", &history);
    child.wait().await.unwrap();
    sandbox.close();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_are_what_their_schema_says() {
    let sandbox = Sandbox::new();
    let mut command = sandbox.tool(&["events", "--follow", "--json"]);
    let mut reader = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = reader.stdout.take().unwrap();
    let lines = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    wait_for("the events are read", || reads_events(&sandbox));
    // More than the ring has room for, while nobody reads it.
    signal(&reader, Signal::SIGSTOP);
    run(
        &sandbox,
        "storm",
        "i=0; while [ $i -lt 3000 ]; do (:); i=$((i+1)); done; sh -c 'kill -9 $$'; true",
    )
    .await;
    signal(&reader, Signal::SIGCONT);
    // It has caught up when it says so.
    run(&sandbox, "quiet", "sh -c 'exit 3'; true").await;
    let mut helper = Command::new("sleep").arg("3711").spawn().unwrap();
    let pid = helper.id().to_string();
    let adopted = printed(sandbox.tool(&["attach", "--name", "helper", &pid, "--json"]), &[0]);
    assert_eq!(adopted["members"].as_array().unwrap().len(), 1, "{adopted:#}");
    check("attach", &adopted);
    let released = printed(sandbox.tool(&["release", &pid, "--json"]), &[0]);
    assert_eq!(released.as_array().unwrap().len(), 1, "{released:#}");
    check("release", &released);
    helper.kill().unwrap();
    helper.wait().unwrap();
    let storm = sandbox.tracker.find("storm").unwrap().handle();
    zinit_tracker::stop(&sandbox.tracker, &storm, &zinit_tracker::StopPolicy::default())
        .await
        .unwrap();
    signal(&reader, Signal::SIGTERM);
    assert_eq!(reader.wait().unwrap().code(), Some(0));

    let text = lines.join().unwrap().unwrap();
    let validator = validator_of(&read("events"));
    let mut seen = BTreeSet::new();
    for line in text.lines().map(|line| parsed(line.as_bytes())) {
        assert_eq!(faults(&validator, &line), Vec::<String>::new(), "{line:#}");
        let what = (line["kind"].to_string(), line["fate"].is_object());
        if seen.insert(what) {
            check("events", &line);
        }
    }
    let kinds: BTreeSet<&str> = seen.iter().map(|(kind, _)| kind.trim_matches('"')).collect();
    let expected = [
        "adopt", "dropped", "empty", "exec", "exit", "fork", "release", "stopping", "up",
    ];
    assert_eq!(kinds, BTreeSet::from(expected));
    sandbox.close();
}

/// Whether `/proc/locks` has a lock on the directory of the programs.
fn reads_events(sandbox: &Sandbox) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let inode = fs::metadata(sandbox.pins().join("v2/programs")).unwrap().ino();
    let locks = fs::read_to_string("/proc/locks").unwrap();
    let ours = |line: &str| line.contains("FLOCK") && line.contains(&format!(":{inode} "));
    locks.lines().any(ours)
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
}

/// Runs a script as a service to its end.
async fn run(sandbox: &Sandbox, name: &str, script: &str) {
    let service = sandbox.tracker.register(name).unwrap();
    let mut command = tokio::process::Command::new("sh");
    let mut child = sandbox.tracker.spawn(&service, command.args(["-c", script])).unwrap();
    assert!(child.wait().await.unwrap().success());
    sandbox.tracker.wait_empty(&service).await.unwrap();
}

#[test]
fn reports_are_what_their_schemas_say() {
    let pins = PinDir::new();
    let command = |args: &[&str]| {
        let mut command = Command::new(tool());
        command.arg("--pins").arg(pins.path()).args(args).stdin(Stdio::null());
        command
    };
    // Deaf to SIGTERM, so that it takes kills.
    let script = "(trap '' TERM; setsid sleep 3721 &); exit 3";
    for level in ["ebpf", "procfs"] {
        let run = [
            "--tracking",
            level,
            "run",
            "--grace",
            "100ms",
            "--report",
            "-",
            "--",
            "sh",
            "-c",
            script,
        ];
        let report = printed(command(&run), &[3]);
        assert_eq!(report["tracking"], level, "{report:#}");
        assert!(report["kill_rounds"].as_u64().unwrap() > 0, "{report:#}");
        check("run", &report);
    }
    assert!(!pins.path().exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_of_a_survivor_is_what_its_schema_says() {
    let sandbox = Sandbox::new();
    let service = sandbox.tracker.register("held").unwrap();
    let mut command = tokio::process::Command::new("sleep");
    let mut child = sandbox.tracker.spawn(&service, command.arg("3741")).unwrap();
    let tracer = Tracer::seize(child.id().unwrap(), TracedUntil::LetGo);
    let stop = ["stop", "held", "--json", "--grace", "0s", "--kill-timeout", "100ms"];
    let report = printed(sandbox.tool(&stop), &[1]);
    assert_eq!(report["survivors"][0]["cause"]["kind"], "traced", "{report:#}");
    check("stop", &report);
    tracer.detach();
    child.wait().await.unwrap();
    check("stop", &printed(sandbox.tool(&["stop", "held", "--json"]), &[0]));
    sandbox.close();
}

#[test]
fn doctor_says_what_its_schema_says() {
    let pins = PinDir::new();
    let doctor = |args: &[&str]| {
        let mut command = Command::new(tool());
        command
            .arg("--pins")
            .arg(pins.path())
            .args(args)
            .args(["doctor", "--json"]);
        printed(command, &[0, 1])
    };
    let nothing = doctor(&[]);
    assert_eq!(nothing["loaded"], Value::Null);
    check("doctor", &nothing);
    check("doctor", &doctor(&["--tracking", "procfs"]));
    let config = Config {
        pins: Pins::Shared(pins.path().to_owned()),
        level: Level::Ebpf,
        ..Config::default()
    };
    let tracker = Tracker::open(&config).unwrap();
    let loaded = doctor(&[]);
    assert!(loaded["loaded"].is_object(), "{loaded:#}");
    check("doctor", &loaded);
    tracker.close().unwrap();
}

#[test]
fn the_supervisors_clients_print_what_their_schemas_say() {
    let daemon = Daemon::start(&[
        ("db", "exec: sleep 3731"),
        ("web", "exec: sh -c 'sleep 3732 & exec sleep 3733'\nafter: [db]"),
        ("bad", "exec: 'false'\noneshot: true"),
    ]);
    daemon.wait_for_state("web", "Running");
    daemon.wait_for_state("bad", "Error");
    check("zinit-list", &daemon.json(&["list", "--json"]));
    for service in ["db", "web", "bad"] {
        check("zinit-status", &daemon.json(&["status", service, "--json"]));
    }
    wait_for("the child is counted", || {
        let stats = daemon.json(&["stats", "web", "--json"]);
        !stats["children"].as_array().unwrap().is_empty()
    });
    check("zinit-stats", &daemon.json(&["stats", "web", "--json"]));
    check("zinit-stop", &daemon.json(&["stop", "web", "--json"]));
    daemon.write("new", "exec: sleep 3734");
    daemon.write("db", "exec: sleep 3735");
    fs::remove_file(daemon.config().join("bad.yaml")).unwrap();
    daemon.write("faulty", "exec: [");
    let reloaded = printed(daemon.command(&["reload", "--json"]), &[1]);
    for list in ["added", "changed", "missing"] {
        assert_eq!(reloaded[list].as_array().unwrap().len(), 1, "{reloaded:#}");
    }
    assert_eq!(reloaded["failed"].as_object().unwrap().len(), 1, "{reloaded:#}");
    check("zinit-reload", &reloaded);
}

/// Asserts that the alternatives which a definition tells apart by `tag` are these, and that each is as it says.
fn check_alternatives(definition: &str, alternatives: &Value, tag: &str, values: &[Value]) {
    let validator = validator_of(&json!({ "$ref": definition }));
    let mut seen = BTreeSet::new();
    for value in values {
        assert_eq!(
            faults(&validator, value),
            Vec::<String>::new(),
            "{definition}: {value:#}"
        );
        let mut changed = value.clone();
        check_changed(definition, &validator, &mut changed, "", "");
        seen.insert(value[tag].as_str().unwrap());
    }
    let described = alternatives.as_array().unwrap().iter();
    let described: BTreeSet<_> = described
        .map(|one| one["properties"][tag]["const"].as_str().unwrap())
        .collect();
    assert_eq!(described, seen, "{definition}");
}

/// Each kind of a doubt that a report can have. A new one does not compile until it is here.
fn doubts() -> Vec<Doubt> {
    let blind_to = [
        Blindness::SignsCleared,
        Blindness::BetweenLooks,
        Blindness::OtherPidNamespaces,
        Blindness::HiddenUsers,
        Blindness::ForeignEnvironments,
        Blindness::CookieElsewhere,
        Blindness::NeverAtRest,
        Blindness::LeftCgroup,
        Blindness::UnknownChildren,
        Blindness::Released,
    ];
    let all = vec![
        Doubt::LostOperations { count: 1 },
        Doubt::MissedCreations { count: 1 },
        Doubt::Adopted,
        Doubt::Unwatched,
        Doubt::DetachedHooks { hooks: vec!["hook"] },
        Doubt::ReplacedPins { pins: vec!["pin"] },
        Doubt::OutOfSight,
        Doubt::UnobservedDeaths { count: 1 },
        Doubt::ContradictoryBooks { count: 1 },
        Doubt::ProcfsTracking {
            blind_to: blind_to.to_vec(),
        },
    ];
    for doubt in &all {
        match doubt {
            Doubt::LostOperations { .. }
            | Doubt::MissedCreations { .. }
            | Doubt::Adopted
            | Doubt::Unwatched
            | Doubt::DetachedHooks { .. }
            | Doubt::ReplacedPins { .. }
            | Doubt::OutOfSight
            | Doubt::UnobservedDeaths { .. }
            | Doubt::ContradictoryBooks { .. }
            | Doubt::ProcfsTracking { .. } => {}
        }
    }
    all
}

/// Each kind of a cause, as for doubts.
fn causes() -> Vec<Cause> {
    let place = || Place {
        wchan: Some("here".to_owned()),
        stack: vec!["here".to_owned()],
    };
    let text = || "text".to_owned();
    let held = Held {
        tid: 1,
        comm: text(),
        state: 'D',
        cause: Cause::Uninterruptible(Place::default()),
    };
    let all = vec![
        Cause::Caller,
        Cause::NoRoom,
        Cause::LockedOut,
        Cause::OtherUserNamespace {
            namespace: 1,
            error: text(),
        },
        Cause::Refused { error: text() },
        Cause::Frozen(Frozen {
            version: CgroupVersion::V2,
            cgroups: vec![text()],
        }),
        Cause::Traced {
            tracer: 1,
            comm: Some(text()),
        },
        Cause::Traced { tracer: 0, comm: None },
        Cause::ZombieLeader {
            others: 1,
            threads: vec![held],
        },
        Cause::Vfork {
            child: None,
            comm: Some(text()),
        },
        Cause::Uninterruptible(place()),
        Cause::Exiting(place()),
        Cause::Pending(Place::default()),
        Cause::NotKilled(place()),
        Cause::OutOfSight,
        Cause::Hidden,
    ];
    for cause in &all {
        match cause {
            Cause::Caller
            | Cause::NoRoom
            | Cause::LockedOut
            | Cause::OtherUserNamespace { .. }
            | Cause::Refused { .. }
            | Cause::Frozen(_)
            | Cause::Traced { .. }
            | Cause::ZombieLeader { .. }
            | Cause::Vfork { .. }
            | Cause::Uninterruptible(_)
            | Cause::Exiting(_)
            | Cause::Pending(_)
            | Cause::NotKilled(_)
            | Cause::OutOfSight
            | Cause::Hidden => {}
        }
    }
    all
}

#[test]
fn what_seldom_happens_is_described_as_well() {
    let definitions = read("definitions");
    let of = |name: &str| definitions["$defs"][name]["oneOf"].clone();
    let named = |name: &str| format!("definitions.json#/$defs/{name}");
    let doubts: Vec<_> = doubts().iter().map(|doubt| json!(doubt)).collect();
    check_alternatives(&named("doubt"), &of("doubt"), "reason", &doubts);
    let causes: Vec<_> = causes().iter().map(|cause| json!(cause)).collect();
    check_alternatives(&named("cause"), &of("cause"), "kind", &causes);
    let (of_service, now) = ("/a".to_owned(), "/b".to_owned());
    let departures = [
        json!(Departure::Session { of_service: 1, now: 2 }),
        json!(Departure::Group { of_service: 1, now: 2 }),
        json!(Departure::Parent { creator: 1, now: 2 }),
        json!(Departure::Cgroup { of_service, now }),
        json!(Departure::Namespace {
            namespace: "net".to_owned(),
            of_service: 1,
            now: 2
        }),
    ];
    assert_eq!(departures.len(), Departure::NAMES.len());
    check_alternatives(&named("departure"), &of("departure"), "what", &departures);
}
