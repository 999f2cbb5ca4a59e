//! `zinit-tracker events` and `history`: what they say against what the test itself caused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _},
    process::{Child, ChildStdout, Command, Output, Stdio},
    time::{Duration, Instant, SystemTime},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use zinit_tests::{Cleanup, Marker, actor, sandbox::Sandbox, tool};
use zinit_tracker::{EventsError, Service};

/// Long enough for an emulated machine.
const PATIENCE: Duration = Duration::from_secs(300);

fn output(sandbox: &Sandbox, args: &[&str]) -> Output {
    sandbox.tool(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A reader of events, which reads them by the time that this returns.
fn follow(sandbox: &Sandbox, args: &[&str]) -> (Child, BufReader<ChildStdout>) {
    let mut command = sandbox.tool(&["events", "--follow", "--json"]);
    let mut child = command.args(args).stdout(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    // Asking the tracker would take the lock for a moment, and the tool be the one that is refused.
    while !lock_is_held(sandbox) {
        assert_eq!(child.try_wait().unwrap(), None, "the reader has ended");
        assert!(Instant::now() < deadline, "nobody reads the events");
        std::thread::yield_now();
    }
    let stdout = BufReader::new(child.stdout.take().unwrap());
    (child, stdout)
}

/// Whether `/proc/locks` has an exclusive lock on the directory of the programs.
fn lock_is_held(sandbox: &Sandbox) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let inode = std::fs::metadata(sandbox.pins().join("v2/programs")).unwrap().ino();
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    locks
        .lines()
        .any(|line| line.contains("FLOCK") && line.contains(&format!(":{inode} ")))
}

fn end(child: &mut Child) {
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

fn parsed(lines: &str) -> Vec<Value> {
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Runs a script as a service to its end, the ends of its background processes included.
async fn script(sandbox: &Sandbox, name: &str, script: &str) -> Service {
    let service = sandbox.tracker.register(name).unwrap();
    let mut command = tokio::process::Command::new("sh");
    command.args(["-c", script]);
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
    sandbox.tracker.wait_empty(&service).await.unwrap();
    service
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_event_of_a_hundred_thousand_forks_is_delivered_or_counted_as_dropped() {
    const LOOPS: u64 = 8;
    const PROCESSES: u64 = 12_500;
    let created = 1 + LOOPS + LOOPS * PROCESSES;
    let sandbox = Sandbox::new();
    let (mut reader, mut stdout) = follow(&sandbox, &[]);
    let reading = std::thread::spawn(move || {
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        let mut line = String::new();
        while stdout.read_line(&mut line).unwrap() > 0 {
            let event: Value = serde_json::from_str(&line).unwrap();
            let count = event["count"].as_u64().unwrap_or(1);
            *counts.entry(event["kind"].as_str().unwrap().to_owned()).or_default() += count;
            line.clear();
        }
        counts
    });

    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let service = sandbox.tracker.register("loops").unwrap();
    let mut command = actor("fork-loops", [LOOPS.to_string(), PROCESSES.to_string()], &marker).into();
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
    sandbox.tracker.wait_empty(&service).await.unwrap();
    end(&mut reader);

    let counts = reading.join().unwrap();
    let of = |kind: &str| counts.get(kind).copied().unwrap_or(0);
    let info = sandbox.tracker.info(&service).unwrap();
    assert_eq!((info.forks, info.exits), (created, created));
    // A fork and an exit of each, the one execution, and that nobody is left.
    assert_eq!(
        of("fork") + of("exec") + of("exit") + of("empty") + of("dropped"),
        2 * created + 2,
        "{counts:?}"
    );
    assert!(of("fork") <= created && of("exit") <= created && of("exec") <= 1 && of("empty") <= 1);
    println!("{created} processes: {counts:?}");
    sandbox.close();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_sees_what_happens_to_the_services_that_it_asked_for_in_order() {
    let sandbox = Sandbox::new();
    let web = sandbox.tracker.register("web").unwrap();
    let (mut reader, mut stdout) = follow(&sandbox, &["--service", "web"]);
    // One reader at a time: a second one would take events from the first.
    assert!(matches!(sandbox.tracker.events(), Err(EventsError::Busy)));
    let second = output(&sandbox, &["events", "-f"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(
        text(&second.stderr).contains("another process reads the events"),
        "{second:?}"
    );

    script(&sandbox, "other", "exit 0").await;
    let mut child = sandbox
        .tracker
        .spawn(
            &web,
            tokio::process::Command::new("sh").args(["-c", "kill -USR1 $$; exit 3"]),
        )
        .unwrap();
    let pid = child.id().unwrap();
    child.wait().await.unwrap();
    sandbox.tracker.wait_empty(&web).await.unwrap();
    end(&mut reader);
    let mut lines = String::new();
    stdout.read_to_string(&mut lines).unwrap();
    let events = parsed(&lines);
    let kinds: Vec<_> = events.iter().map(|event| event["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["fork", "exec", "exit", "empty"], "{lines}");
    assert!(events.iter().all(|event| event["service"] == "test/web"), "{lines}");
    assert_eq!(events[0]["parent_tgid"], std::process::id());
    assert_eq!(events[1]["comm"], "sh");
    assert_eq!(events[2]["pid"], pid);
    assert_eq!(events[2]["fate"], json!({"killed": Signal::SIGUSR1 as i32}));
    let times: Vec<_> = events
        .iter()
        .map(|event| event["boottime_ns"].as_u64().unwrap())
        .collect();
    assert!(times.is_sorted(), "{lines}");
    let unknown = output(&sandbox, &["events", "--service", "none"]);
    assert_eq!(unknown.status.code(), Some(1));
    sandbox.close();
}

#[tokio::test]
async fn history_and_events_tell_how_each_process_ended() {
    let sandbox = Sandbox::new();
    let before = SystemTime::now();
    // Each says its pid and how it will end.
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ends");
    let one = |how: &str, expected: &str| {
        let path = file.display();
        format!("sh -c 'echo $$ {expected} >> {path}; {how}' & ")
    };
    let all: String = [0, 1, 7, 255]
        .iter()
        .map(|code| one(&format!("exit {code}"), &format!("exited {code}")))
        .chain(
            [9, 15, 6, 34]
                .iter()
                .map(|signal| one(&format!("kill -{signal} $$"), &format!("killed {signal}"))),
        )
        .collect();
    let service = script(&sandbox, "ends", &format!("{all} wait; exit 0")).await;

    let history: Value = serde_json::from_slice(&output(&sandbox, &["history", "ends", "--json"]).stdout).unwrap();
    let events = parsed(&text(&output(&sandbox, &["events", "--json", "--since", "1h"]).stdout));
    let expected = std::fs::read_to_string(&file).unwrap();
    assert_eq!(expected.lines().count(), 8);
    let processes = history["processes"].as_array().unwrap();
    assert_eq!((processes.len(), events.len()), (9, 9), "{history:#}");
    for line in expected.lines() {
        let words: Vec<_> = line.split(' ').collect();
        let (pid, value) = (words[0].parse::<u32>().unwrap(), words[2].parse::<i32>().unwrap());
        let fate = json!({ words[1]: value });
        let process = processes.iter().find(|process| process["pid"] == pid).unwrap();
        assert_eq!(process["fate"], fate, "{process:#}");
        assert_eq!(process["service"], "test/ends");
        let event = events.iter().find(|event| event["pid"] == pid).unwrap();
        assert_eq!((&event["kind"], &event["fate"]), (&json!("exit"), &fate), "{event:#}");
        let (ended, started) = (&process["ended_boottime_ns"], &process["start_boottime_ns"]);
        let lived = ended.as_u64().unwrap() - started.as_u64().unwrap();
        assert_eq!(process["lived_ns"], lived, "{process:#}");
        assert_eq!(&event["boottime_ns"], ended);
        // RFC 3339 in UTC sorts as time does; a second's room for a clock that is set while this runs.
        let shown = process["ended"].as_str().unwrap();
        let at = |time: SystemTime| {
            let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
            date(seconds)
        };
        assert!(*shown >= *at(before - Duration::from_secs(1)), "{shown}");
        assert!(*shown <= *at(SystemTime::now() + Duration::from_secs(2)), "{shown}");
    }
    assert_eq!(history["services"][0]["without_record"], 0, "{history:#}");
    assert_eq!(history["may_be_evicted"], false);

    let said = text(&output(&sandbox, &["history"]).stdout);
    println!("{said}");
    assert!(said.contains("  exited 7 ") && said.contains("  SIGABRT "), "{said}");
    // What is not registered any more is remembered all the same.
    sandbox.tracker.unregister(&service).unwrap();
    sandbox.tracker.register("keeps-the-books").unwrap();
    let said = text(&output(&sandbox, &["history"]).stdout);
    assert_eq!(said.matches("not registered any more").count(), 9, "{said}");
    sandbox.close();
}

/// The time as `date` has it.
fn date(seconds: u64) -> String {
    let date = Command::new("date")
        .args(["-u", "+%Y-%m-%dT%H:%M:%S", "-d"])
        .arg(format!("@{seconds}"))
        .output()
        .unwrap();
    text(&date.stdout).trim_end().to_owned()
}

#[tokio::test]
async fn a_stop_is_told_step_by_step_and_remembered_by_the_name_of_its_service() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("ignore-term", [""; 0]);
    let (mut reader, mut stdout) = follow(&sandbox, &[]);
    let policy = zinit_tracker::StopPolicy {
        grace: Duration::from_millis(50),
        ..zinit_tracker::StopPolicy::default()
    };
    let report = sandbox.stop(&mut played, &policy).await;
    end(&mut reader);
    let mut lines = String::new();
    stdout.read_to_string(&mut lines).unwrap();
    let events = parsed(&lines);
    let of_service = |event: &&Value| event["pid"].is_null();
    let steps: Vec<_> = events
        .iter()
        .filter(of_service)
        .map(|event| event["kind"].as_str().unwrap())
        .collect();
    assert_eq!(steps, ["stopping", "killing", "empty", "up"], "{lines}");

    let stops = || {
        let said = output(&sandbox, &["history", "--json"]);
        let history: Value = serde_json::from_slice(&said.stdout).unwrap();
        history["stops"].as_array().unwrap().clone()
    };
    let [of] = &stops()[..] else { panic!("{:#?}", stops()) };
    assert_eq!(of["service"], "test/ignore-term");
    let totals = ["count", "killed", "survived", "survivors", "unproven"].map(|name| of[name].as_u64().unwrap());
    assert_eq!(totals, [1, 1, 0, 0, 0], "{of:#}");
    let last = &of["last"];
    assert_eq!(last["processes"], report.processes.len());
    assert_eq!(
        (&last["proven"], &last["survivors"]),
        (&true.into(), &0.into()),
        "{last:#}"
    );
    assert_eq!(last["kill_rounds"], report.kill_rounds);
    assert_eq!(last["elapsed_us"], u64::try_from(report.elapsed.as_micros()).unwrap());
    assert!(
        last["killing_us"].as_u64().unwrap() <= last["elapsed_us"].as_u64().unwrap(),
        "{last:#}"
    );

    // Under another number, with nobody to stop.
    sandbox.tracker.unregister(&played.service).unwrap();
    assert_eq!(stops().len(), 1);
    let again = sandbox.tracker.register("ignore-term").unwrap();
    zinit_tracker::stop(&sandbox.tracker, &again, &policy).await.unwrap();
    let [of] = &stops()[..] else { panic!("{:#?}", stops()) };
    assert_eq!((&of["count"], &of["killed"]), (&2.into(), &1.into()), "{of:#}");
    assert_eq!(
        (&of["last"]["processes"], &of["last"]["killing_us"]),
        (&0.into(), &Value::Null),
        "{of:#}"
    );
    let said = text(&output(&sandbox, &["history", "ignore-term"]).stdout);
    let line = said.lines().last().unwrap();
    assert!(line.ends_with("proven        test/ignore-term"), "{said}");
    println!("{said}");
    sandbox.close();
}

#[tokio::test]
async fn history_says_how_many_records_are_missing() {
    const PROCESSES: u64 = 17_000;
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let service = sandbox.tracker.register("many").unwrap();
    let mut command = actor("fork-loops", ["1".to_owned(), PROCESSES.to_string()], &marker).into();
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
    sandbox.tracker.wait_empty(&service).await.unwrap();
    let said = output(&sandbox, &["history", "--json"]);
    let history: Value = serde_json::from_slice(&said.stdout).unwrap();
    let records = history["processes"].as_array().unwrap().len() as u64;
    let missing = history["services"][0]["without_record"].as_u64().unwrap();
    assert_eq!(history["services"][0]["exits"], PROCESSES + 2);
    assert_eq!(records + missing, PROCESSES + 2);
    assert!(missing > 0 && history["may_be_evicted"] == true, "{missing}");
    let said = text(&output(&sandbox, &["history"]).stderr);
    assert!(
        said.contains(&format!(
            "test/many: {missing} of {} deaths have no record",
            PROCESSES + 2
        )),
        "{said}"
    );
    println!("{said}");
    sandbox.close();
}

#[tokio::test]
async fn a_reader_whose_reader_has_gone_ends_quietly() {
    let sandbox = Sandbox::new();
    let mut command = sandbox.tool(&["events", "-f"]);
    let reader = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut reader = reader;
    // Nothing happens that it could write, and it ends all the same.
    drop(reader.stdout.take());
    let ended = reader.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), text(&ended.stderr)), (Some(0), String::new()));
    sandbox.close();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_ends_when_it_is_told_to_however_much_happens() {
    let sandbox = Sandbox::new();
    let (mut reader, mut stdout) = follow(&sandbox, &[]);
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let service = sandbox.tracker.register("endless").unwrap();
    let mut command = actor("fork-loops", ["2", "1000000"], &marker).into();
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    let mut line = String::new();
    for _ in 0..2000 {
        stdout.read_line(&mut line).unwrap();
    }
    let reading = std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
    end(&mut reader);
    assert!(sandbox.tracker.live(&service).unwrap() > 0, "the storm is over");
    reading.join().unwrap().unwrap();
    let policy = zinit_tracker::StopPolicy {
        grace: Duration::ZERO,
        ..zinit_tracker::StopPolicy::default()
    };
    assert!(
        zinit_tracker::stop(&sandbox.tracker, &service, &policy)
            .await
            .unwrap()
            .proven
    );
    child.wait().await.unwrap();
    sandbox.close();
}

#[test]
fn without_a_tracker_there_is_nothing_to_tell() {
    let pins = zinit_tests::sandbox::PinDir::new();
    let run = |args: &[&str]| {
        let mut command = Command::new(tool());
        command.arg("--pins").arg(pins.path()).args(args).output().unwrap()
    };
    for (args, status) in [
        (&["events"][..], 0),
        (&["history"], 0),
        (&["events", "-f"], 1),
        (&["history", "web"], 1),
        (&["events", "--service", "web"], 1),
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {output:?}");
        assert!(text(&output.stderr).lines().count() <= 1, "{output:?}");
    }
    assert!(!pins.path().exists());
}
