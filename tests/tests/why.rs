//! `zinit-tracker why`, `tree` and `escapes` on the services of a `zinit` daemon.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use serde_json::Value;
use zinit_tests::{
    Cleanup, Marker, actor,
    daemon::{Daemon, wait_for},
    members,
    sandbox::Sandbox,
};

/// A child that exits with 7 and leaves a grandchild in a session of its own; the main process stays.
const SERVICE: &str = "exec: sh -c 'sh -c \"setsid sleep 3601 & exit 7\"; exec sleep 3602'\nshutdown_timeout: 60";

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn json(daemon: &Daemon, arguments: &[&str]) -> Value {
    let output = daemon.tracker(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Pids of the service's processes by their command lines.
fn pid_of(daemon: &Daemon, command: &str) -> Option<i32> {
    let all = members(&daemon.marker);
    let found = all.iter().find(|member| {
        let line = std::fs::read(format!("/proc/{}/cmdline", member.pid)).unwrap_or_default();
        text(&line).replace('\0', " ").trim_end() == command
    });
    found.map(|member| member.pid)
}

#[test]
fn why_names_the_service_of_a_process_and_its_ancestors_dead_or_alive() {
    let daemon = Daemon::start(&[("web", SERVICE)]);
    wait_for("the orphan and the main process are there", || {
        ["sleep 3601", "sleep 3602"]
            .iter()
            .all(|command| pid_of(&daemon, command).is_some())
    });
    let orphan = pid_of(&daemon, "sleep 3601").unwrap().to_string();
    let main = daemon.pid("web");

    let why = json(&daemon, &["why", &orphan, "--json"]);
    assert_eq!(why["service"]["name"], "web", "{why:#}");
    let instance = why["service"]["instance"].as_str().unwrap();
    assert!(instance.starts_with("zinit"), "{why:#}");
    let line = why["line"].as_array().unwrap();
    assert_eq!(line[0]["pid"].to_string(), orphan, "{why:#}");
    assert_eq!((&line[0]["alive"], &line[0]["main"]), (&true.into(), &false.into()));
    let dead = line.iter().find(|link| link["alive"] == false).unwrap();
    assert_eq!(dead["fate"]["exited"], 7, "{why:#}");
    let last = line.last().unwrap();
    assert_eq!((&last["pid"], &last["main"]), (&main.into(), &true.into()), "{why:#}");
    let supervisor = daemon.process().as_raw_nonzero().get();
    assert_eq!(why["creator"]["alive"]["pid"], supervisor, "{why:#}");
    assert_eq!(why["creator"]["alive"]["comm"], "zinit", "{why:#}");

    let said = text(&daemon.tracker(&["why", &orphan]).stdout);
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines[0], format!("{orphan} belongs to {instance}/web"), "{said}");
    assert!(said.contains("dead: exited 7"), "{said}");
    assert!(said.contains("main process"), "{said}");
    assert!(lines.last().unwrap().ends_with("no member"), "{said}");
    println!("{said}");

    // `tree` shows the same processes, below the same service.
    let tree = text(&daemon.tracker(&["tree", "web"]).stdout);
    assert!(tree.starts_with(&format!("{instance}/web: up, 2 live")), "{tree}");
    for pid in [&orphan, &main.to_string()] {
        assert!(tree.contains(&format!("─ {pid} sleep")), "{tree}");
    }
    println!("{tree}");

    // What is dead belonged to it.
    daemon.does(&["stop", "web"]);
    let why = json(&daemon, &["why", &orphan, "--json"]);
    assert_eq!(why["service"]["name"], "web", "{why:#}");
    assert_eq!(why["line"][0]["fate"]["killed"], 15, "{why:#}");
    let said = text(&daemon.tracker(&["why", &orphan]).stdout);
    assert!(
        said.starts_with(&format!("{orphan} belonged to {instance}/web\n")),
        "{said}"
    );
    daemon.does(&["forget", "web"]);
    daemon.shutdown();
}

#[test]
fn why_says_in_one_line_that_a_process_is_nobodys() {
    let daemon = Daemon::start(&[("web", SERVICE)]);
    daemon.wait_for_state("web", "Running");
    let me = std::process::id().to_string();
    for (pid, words) in [
        (me.as_str(), "belongs to no service"),
        ("1", "belongs to no service"),
        ("0", "0"),
        ("x", "x"),
    ] {
        let output = daemon.tracker(&["why", pid]);
        let stderr = text(&output.stderr);
        assert!(!output.status.success(), "{pid}");
        assert_eq!(text(&output.stdout), "");
        assert!(stderr.contains(words), "{pid}: {stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
    daemon.shutdown();
}

#[tokio::test]
async fn why_says_that_it_has_no_record_of_an_ancestor_whose_record_has_made_room() {
    /// The kernel keeps the newest 16,384.
    const DEATHS: usize = 17_000;
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("double-fork", [""; 0]);
    let main = played.child.id().unwrap();
    let orphan = members(&played.marker)
        .iter()
        .map(|member| member.pid.cast_unsigned())
        .find(|pid| *pid != main)
        .unwrap()
        .to_string();
    let why = |arguments: &[&str]| {
        let arguments: Vec<_> = ["why", &orphan].iter().chain(arguments).copied().collect();
        let output = sandbox.tool(&arguments).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let line = |why: &Value| {
        let line = why["line"].as_array().unwrap().iter();
        line.map(|link| (link["pid"].to_string(), link["alive"] == true))
            .collect::<Vec<_>>()
    };
    wait_for("the one between them has ended", || {
        let why: Value = serde_json::from_str(&why(&["--json"])).unwrap();
        line(&why).iter().any(|(_, alive)| !alive)
    });
    let before: Value = serde_json::from_str(&why(&["--json"])).unwrap();
    let [(first, true), (between, false), (last, true)] = &line(&before)[..] else {
        panic!("{before:#}");
    };
    assert_eq!((first, last), (&orphan, &main.to_string()));

    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let other = sandbox.tracker.register("other").unwrap();
    let mut command = actor("fork-loops", ["1".to_owned(), DEATHS.to_string()], &marker).into();
    let mut child = sandbox.tracker.spawn(&other, &mut command).unwrap();
    assert!(child.wait().await.unwrap().success());
    sandbox.tracker.wait_empty(&other).await.unwrap();

    let after: Value = serde_json::from_str(&why(&["--json"])).unwrap();
    assert_eq!(line(&after), [(orphan.clone(), true)]);
    assert_eq!(after["creator"]["tgid"].to_string(), *between, "{after:#}");
    assert_eq!(after["creator"]["alive"], Value::Null, "{after:#}");
    let said = why(&[]);
    assert!(said.ends_with("dead, and no record of it\n"), "{said}");
    println!("{said}");
    sandbox.stop(&mut played, &zinit_tracker::StopPolicy::default()).await;
    sandbox.close();
}

#[test]
fn why_without_a_tracker_says_so() {
    let daemon = Daemon::prepare(&[]);
    let output = daemon.tracker(&["why", "1"]);
    assert_eq!(output.status.code(), Some(1));
    let stderr = text(&output.stderr);
    assert!(stderr.contains("nothing is tracked"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

/// A daemon, a child in a network namespace of its own, and one that stays.
const LEAVERS: &str = "exec: sh -c 'sh -c \"setsid sleep 3611 & exit 7\"; unshare --net sleep 3612 & sleep 3613 & exec sleep 3614'\nshutdown_timeout: 60";

#[test]
fn escapes_names_who_has_left_what_and_by_whom_it_was_created() {
    // A test, while it runs, has left nothing, though its session is another.
    let quiet = "exec: sleep 3615\ntest: sh -c 'sleep 3616; true'";
    let daemon = Daemon::start(&[("web", LEAVERS), ("quiet", quiet)]);
    wait_for("all are there", || {
        (3611..=3616).all(|seconds| pid_of(&daemon, &format!("sleep {seconds}")).is_some())
    });
    let main = daemon.pid("web");
    let orphan = pid_of(&daemon, "sleep 3611").unwrap();
    let unshared = pid_of(&daemon, "sleep 3612").unwrap();

    let listed = json(&daemon, &["escapes", "web", "--json"]);
    let escapes = listed[0]["escapes"].as_array().unwrap();
    let by_pid = |pid: i32| {
        let mut found = escapes.iter().filter(|escape| escape["pid"] == pid);
        found.next().unwrap_or_else(|| panic!("{pid} is not in {listed:#}"))
    };
    let left = |pid: i32| -> Vec<String> {
        let left = by_pid(pid)["left"].as_array().unwrap();
        let names = left.iter().map(|left| left["what"].as_str().unwrap().to_owned());
        names.collect()
    };
    assert_eq!(escapes.len(), 2, "{listed:#}");
    assert_eq!(left(orphan), ["session", "group", "parent"]);
    assert_eq!(left(unshared), ["namespace"]);
    let session = &by_pid(orphan)["left"][0];
    assert_eq!(
        (&session["of_service"], &session["now"]),
        (&main.into(), &orphan.into())
    );
    let parent = &by_pid(orphan)["left"][2];
    assert_eq!(parent["now"], daemon.process().as_raw_nonzero().get());
    let namespace = &by_pid(unshared)["left"][0];
    assert_eq!(namespace["namespace"], "net");
    let inode = |pid: i32| {
        let link = std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        format!(
            "net:[{}]",
            namespace[if pid == unshared { "now" } else { "of_service" }]
        ) == text(link.as_os_str().as_encoded_bytes())
    };
    assert!(inode(unshared) && inode(main.try_into().unwrap()), "{namespace:#}");
    // Who created the orphan is dead, and how it ended is known.
    assert_eq!(by_pid(orphan)["line"][1]["fate"]["exited"], 7, "{listed:#}");

    let said = text(&daemon.tracker(&["escapes"]).stdout);
    println!("{said}");
    assert!(said.contains("/quiet: 3 live, 0 have left something\n"), "{said}");
    assert!(said.contains("/web: 4 live, 2 have left something\n"), "{said}");
    assert!(
        said.contains(&format!("left session {main}, is in {orphan}\n")),
        "{said}"
    );
    assert!(said.contains(" sh, dead: exited 7\n"), "{said}");

    let missing = daemon.tracker(&["escapes", "none"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing.stderr).contains("none"), "{}", text(&missing.stderr));
    daemon.does(&["stop", "web"]);
    assert_eq!(
        json(&daemon, &["escapes", "web", "--json"])[0]["escapes"],
        Value::Array(Vec::new())
    );
}

/// `run` leaves its command in the session that it was called in.
#[test]
fn escapes_of_a_run_in_its_callers_session_names_only_who_has_left() {
    let daemon = Daemon::start(&[]);
    let mut command = std::process::Command::new(zinit_tests::tool());
    let script = "setsid sleep 3621 & sleep 3622 & exec sleep 3623";
    let mut run = command
        .args([
            "--pins",
            daemon.pins().to_str().unwrap(),
            "run",
            "--name",
            "shell",
            "--",
            "sh",
            "-c",
            script,
        ])
        .env(Marker::ENV, daemon.marker.as_str())
        .spawn()
        .unwrap();
    wait_for("all are there", || {
        (3621..=3623).all(|seconds| pid_of(&daemon, &format!("sleep {seconds}")).is_some())
    });
    let listed = json(&daemon, &["escapes", "shell", "--json"]);
    let escapes = listed[0]["escapes"].as_array().unwrap();
    assert_eq!(escapes.len(), 1, "{listed:#}");
    assert_eq!(escapes[0]["pid"], pid_of(&daemon, "sleep 3621").unwrap(), "{listed:#}");
    assert!(daemon.tracker(&["stop", "shell"]).status.success());
    run.wait().unwrap();
}
