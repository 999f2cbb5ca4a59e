//! `zinit-tracker diff`: what others would find of a service, against what an independent look into `/proc` says of the same processes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::process::CommandExt as _,
    process::{Command, Output, Stdio},
    sync::Once,
};

use serde_json::{Value, json};
use zinit_tests::{
    Cleanup, Marker, TestCgroup,
    daemon::wait_for,
    members,
    oracle::{Place, cgroup, place},
    sandbox::{Played, Sandbox},
    tool,
};
use zinit_tracker::StopPolicy;

fn output(sandbox: &Sandbox, args: &[&str]) -> Output {
    sandbox.tool(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What the tool says as JSON, and the pid that it had.
fn diff(sandbox: &Sandbox, service: &str) -> (Value, u64) {
    let mut command = sandbox.tool(&["diff", service, "--json"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = u64::from(child.id());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    (serde_json::from_slice(&output.stdout).unwrap(), pid)
}

/// Plays a behaviour whose main process leads a process group, as most supervisors have it, in the session of this test.
fn play(sandbox: &Sandbox, behaviour: &str, args: &[&str]) -> Played {
    static SESSION: Once = Once::new();
    SESSION.call_once(|| {
        // What the first process starts without a session has none, also in the initial pid namespace.
        if place(std::process::id().cast_signed()).unwrap().session == 0 {
            rustix::process::setsid().unwrap();
        }
    });
    sandbox.play_as(behaviour, args, |command| {
        command.process_group(0);
    })
}

async fn end(sandbox: Sandbox, mut played: Played) {
    let policy = StopPolicy {
        grace: std::time::Duration::from_millis(300),
        ..StopPolicy::default()
    };
    sandbox.stop(&mut played, &policy).await;
    sandbox.close();
}

fn finding<'v>(said: &'v Value, method: &str) -> &'v Value {
    let methods = said["methods"].as_array().unwrap();
    methods.iter().find(|finding| finding["method"] == method).unwrap()
}

fn pids(list: &Value) -> BTreeSet<i32> {
    let pids = list.as_array().unwrap().iter().map(|one| one["pid"].as_i64().unwrap());
    pids.map(|pid| i32::try_from(pid).unwrap()).collect()
}

/// The reasons of a finding, by the pids of those who are missed.
fn reasons(finding: &Value) -> BTreeMap<i32, Value> {
    let missed = finding["missed"].as_array().unwrap().iter();
    missed
        .map(|one| (i32::try_from(one["pid"].as_i64().unwrap()).unwrap(), one["why"].clone()))
        .collect()
}

/// The processes of a service, and where they stand.
fn places(played: &Played) -> BTreeMap<i32, Place> {
    let all = members(&played.marker);
    all.iter()
        .map(|member| (member.pid, place(member.pid).unwrap()))
        .collect()
}

/// Whom a walk finds that goes from parent to child.
fn descendants(places: &BTreeMap<i32, Place>, root: i32) -> BTreeSet<i32> {
    let mut found: BTreeSet<_> = [root].into();
    loop {
        let children = places.iter().filter(|(_, place)| found.contains(&place.parent));
        let more: BTreeSet<_> = children.map(|(pid, _)| *pid).chain(found.iter().copied()).collect();
        if more.len() == found.len() {
            return found;
        }
        found = more;
    }
}

#[tokio::test]
async fn each_way_to_look_finds_and_misses_whom_proc_says() {
    // With how many each way misses: parents, group, session.
    let behaviours: [(&str, &[&str], [usize; 3]); 12] = [
        ("rest", &[], [0, 0, 0]),
        ("child", &[], [0, 0, 0]),
        ("setsid", &[], [0, 1, 1]),
        ("setpgid", &[], [0, 1, 0]),
        ("double-fork", &[], [1, 1, 1]),
        ("sessions", &["40"], [0, 40, 40]),
        ("chain", &["30"], [0, 0, 0]),
        ("subreaper", &[], [0, 1, 1]),
        ("thread-fork", &[], [0, 0, 0]),
        ("vfork", &[], [0, 0, 0]),
        ("clone-parent", &[], [0, 0, 0]),
        ("clear-env", &["MARKER"], [0, 0, 0]),
    ];
    let me = std::process::id().cast_signed();
    for (behaviour, args, expected) in behaviours {
        let sandbox = Sandbox::new();
        let played = play(&sandbox, behaviour, args);
        let main = i32::try_from(played.child.id().unwrap()).unwrap();
        let places = places(&played);
        let (said, tool) = diff(&sandbox, behaviour);
        let home = places[&main];
        let all: BTreeSet<_> = places.keys().copied().collect();
        assert_eq!(pids(&said["members"]), all, "{behaviour}");
        assert_eq!(said["came_or_went"], 0, "{behaviour}");
        let with = |of: fn(&Place) -> i32| -> BTreeSet<i32> {
            let inside = places.iter().filter(|(_, place)| of(place) == of(&home));
            inside.map(|(pid, _)| *pid).collect()
        };
        let found = [
            descendants(&places, main),
            with(|place| place.group),
            with(|place| place.session),
        ];
        for ((method, found), expected) in ["parents", "group", "session"].into_iter().zip(found).zip(expected) {
            let finding = finding(&said, method);
            let missed: BTreeSet<_> = all.difference(&found).copied().collect();
            assert_eq!(
                missed.len(),
                expected,
                "{behaviour}: what the test takes for granted of {method}"
            );
            assert_eq!(pids(&finding["missed"]), missed, "{behaviour}: {method}: {finding:#}");
            assert_eq!(finding["found"], found.len(), "{behaviour}: {method}");
            let strangers = pids(&finding["strangers"]);
            assert!(strangers.is_disjoint(&all), "{behaviour}: {method}: {finding:#}");
            assert!(!strangers.contains(&i32::try_from(tool).unwrap()), "{finding:#}");
            // The group is the service's own. The session is that of this test.
            assert_eq!(strangers.contains(&me), method == "session", "{behaviour}: {finding:#}");
            assert!(method == "session" || strangers.is_empty(), "{behaviour}: {finding:#}");
            for (pid, why) in reasons(finding) {
                let now = places[&pid];
                let expected = match method {
                    "group" => json!({"what": "group", "of_service": home.group, "now": now.group}),
                    "session" => json!({"what": "session", "of_service": home.session, "now": now.session}),
                    _ => json!({
                        "what": "parent",
                        // The one in the middle, which led the session and the group.
                        "creator": now.session,
                        "creator_lives": false,
                        "now": now.parent,
                    }),
                };
                assert_eq!(why, expected, "{behaviour}: {method}: {pid}");
            }
        }
        end(sandbox, played).await;
    }
}

#[tokio::test]
async fn a_main_process_that_is_dead_leaves_little_to_go_by() {
    // A child in the group that it led, and a daemon that shows nothing of it.
    for (behaviour, args, group) in [
        ("spawn-and-exit", vec!["0"], Some(1)),
        ("double-fork-orphan", vec![], None),
    ] {
        let sandbox = Sandbox::new();
        let mut played = play(&sandbox, behaviour, &args);
        let main = played.child.id().unwrap();
        played.child.wait().await.unwrap();
        let (said, _) = diff(&sandbox, behaviour);
        let all: BTreeSet<_> = places(&played).into_keys().collect();
        assert_eq!((all.len(), pids(&said["members"])), (1, all.clone()), "{said:#}");
        let by_parents = finding(&said, "parents");
        assert_eq!((&by_parents["found"], &by_parents["roots"]), (&json!(0), &json!([])));
        let why = &reasons(by_parents)[all.first().unwrap()];
        assert_eq!((&why["what"], &why["creator_lives"]), (&json!("parent"), &json!(false)));
        let by_group = finding(&said, "group");
        assert_eq!(by_group["found"], group.unwrap_or(0), "{by_group:#}");
        assert_eq!(by_group["id"], json!(group.map(|_| main)));
        for method in ["session", "cgroup"] {
            let finding = finding(&said, method);
            assert_eq!(finding["found"], 0, "{finding:#}");
            assert_eq!(
                reasons(finding).into_values().collect::<Vec<_>>(),
                [json!({"what": "unknown"})]
            );
            assert_eq!(finding["strangers"], json!([]));
        }
        let said = text(&output(&sandbox, &["diff", behaviour]).stdout);
        println!("{said}");
        assert!(
            said.contains("parents: from nobody, as those that were started are dead: finds 0 of 1\n"),
            "{said}"
        );
        assert!(
            said.contains(
                "session: unknown, as the main process is dead, or has 0: another pid namespace's, or that of nobody since boot: \
                 finds 0 of 1\n"
            ),
            "{said}"
        );
        end(sandbox, played).await;
    }
}

#[tokio::test]
async fn who_is_in_another_cgroup_is_missed_and_who_is_in_one_below_is_found() {
    let name = format!("zinit-test-diff-{}", std::process::id());
    let home = TestCgroup::new(&name).unwrap();
    let home = home.expect("the tests need a writable cgroup v2 hierarchy");
    let below = TestCgroup::at(home.path().join("below"));
    let beside = TestCgroup::at(home.path().with_file_name(format!("{name}-beside")));
    std::fs::create_dir(home.path()).unwrap();
    for (there, missed) in [(&beside, 1), (&below, 0)] {
        let sandbox = Sandbox::new();
        let played = play(&sandbox, "cgroup-move", &[there.path().to_str().unwrap()]);
        let main = i32::try_from(played.child.id().unwrap()).unwrap();
        std::fs::write(home.path().join("cgroup.procs"), main.to_string()).unwrap();
        let (said, _) = diff(&sandbox, "cgroup-move");
        let finding = finding(&said, "cgroup");
        let of_main = cgroup(main).unwrap();
        assert_eq!(
            (&finding["path"], &finding["hierarchies"]),
            (&json!(of_main), &json!(["v2"]))
        );
        assert_eq!(finding["found"], 2 - missed, "{finding:#}");
        assert_eq!(finding["strangers"], json!([]));
        let why: Vec<_> = reasons(finding).into_iter().collect();
        assert_eq!(why.len(), missed, "{finding:#}");
        for (pid, why) in why {
            let now = cgroup(pid).unwrap();
            assert_ne!(now, of_main);
            assert_eq!(why, json!({"what": "cgroup", "of_service": of_main, "now": now}));
        }
        end(sandbox, played).await;
    }
}

#[tokio::test]
async fn who_was_let_go_is_found_by_others_and_is_no_member() {
    let sandbox = Sandbox::new();
    let played = play(&sandbox, "child", &[]);
    let main = i32::try_from(played.child.id().unwrap()).unwrap();
    let child = *places(&played).keys().find(|pid| **pid != main).unwrap();
    sandbox.tracker.release(child.cast_unsigned()).unwrap();
    let (said, _) = diff(&sandbox, "child");
    assert_eq!(pids(&said["members"]), [main].into());
    for method in ["parents", "group"] {
        let finding = finding(&said, method);
        assert_eq!((&finding["found"], pids(&finding["missed"])), (&json!(1), [].into()));
        assert_eq!(
            finding["strangers"],
            json!([{"pid": child, "ppid": main, "comm": "actor", "service": null}])
        );
    }
    let said = text(&output(&sandbox, &["diff", "child"]).stdout);
    println!("{said}");
    let expected = format!(
        "parents: from {main}: finds 1 of 1, and 1 that is not of the service\n  \
         {child:>7}  actor            not of the service: of no service, parent {main}\n"
    );
    assert!(said.contains(&expected), "{said}");
    // It is what others would have ended with the service, so the test has to.
    let policy = StopPolicy::default();
    let mut played = played;
    zinit_tracker::stop(&sandbox.tracker, &played.service, &policy)
        .await
        .unwrap();
    played.child.wait().await.unwrap();
    zinit_tests::kill_all(&played.marker, zinit_tests::sandbox::DEADLINE).unwrap();
    sandbox.close();
}

#[tokio::test]
async fn people_read_whom_others_miss_and_why() {
    let sandbox = Sandbox::new();
    let played = play(&sandbox, "double-fork", &[]);
    let main = i32::try_from(played.child.id().unwrap()).unwrap();
    let places = places(&played);
    let (daemon, place) = places.iter().find(|(pid, _)| **pid != main).unwrap();
    let said = text(&output(&sandbox, &["diff", "double-fork"]).stdout);
    println!("{said}");
    let home = places[&main];
    let line = format!("  {daemon:>7}  actor            MISSED: ");
    let (creator, parent, session) = (place.session, place.parent, home.session);
    let expected = format!(
        "test/double-fork: 2 processes in the kernel's books\n\
         parents: from {main}: finds 1 of 2\n\
         {line}its creator {creator} is dead, and its parent {parent} is no member\n\
         process group: {main}: finds 1 of 2\n\
         {line}left process group {main}, is in {creator}\n\
         session: {session}: finds 1 of 2, and "
    );
    assert!(said.starts_with(&expected), "{said}\n{expected}");
    end(sandbox, played).await;
}

#[tokio::test]
async fn a_service_that_is_never_at_rest_is_compared_all_the_same() {
    let sandbox = Sandbox::new();
    let played = play(&sandbox, "refork-chain", &[]);
    let (said, _) = diff(&sandbox, "refork-chain");
    let count = said["members"].as_array().unwrap().len();
    for finding in said["methods"].as_array().unwrap() {
        let missed = finding["missed"].as_array().unwrap().len();
        assert_eq!(finding["found"], count - missed, "{finding:#}");
    }
    // Nobody of the chain is taken for a stranger, though it came after the first look.
    for method in ["parents", "group"] {
        assert_eq!(finding(&said, method)["strangers"], json!([]), "{said:#}");
    }
    end(sandbox, played).await;
}

#[tokio::test]
async fn the_dead_are_not_found() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let service = sandbox.tracker.register("web").unwrap();
    let mut command = tokio::process::Command::new("sh");
    // What the shell has created, its successor does not reap.
    command
        .args(["-c", "true & exec sleep 3661"])
        .env(Marker::ENV, marker.as_str());
    let mut child = sandbox.tracker.spawn(&service, command.process_group(0)).unwrap();
    let main = child.id().unwrap();
    let children = format!("/proc/{main}/task/{main}/children");
    let is_dead = |pid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.contains(") Z ")
    };
    wait_for("a zombie is there", || {
        let executed = std::fs::read(format!("/proc/{main}/cmdline")).unwrap() == b"sleep\x003661\0";
        executed && is_dead(std::fs::read_to_string(&children).unwrap().trim())
    });
    let (said, _) = diff(&sandbox, "web");
    for method in ["parents", "group"] {
        let finding = finding(&said, method);
        assert_eq!(
            (&finding["found"], &finding["strangers"]),
            (&json!(1), &json!([])),
            "{said:#}"
        );
    }
    let report = zinit_tracker::stop(&sandbox.tracker, &service, &StopPolicy::default()).await;
    assert!(report.unwrap().proven);
    child.wait().await.unwrap();
    sandbox.close();
}

#[test]
fn without_such_a_service_there_is_nothing_to_compare() {
    let sandbox = Sandbox::new();
    let unknown = output(&sandbox, &["diff", "none"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(
        text(&unknown.stderr).contains("no service is named \"none\""),
        "{unknown:?}"
    );
    sandbox.close();
    let nothing = zinit_tests::sandbox::PinDir::new();
    let output = Command::new(tool())
        .arg("--pins")
        .arg(nothing.path())
        .args(["diff", "none"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("nothing is tracked"), "{output:?}");
}
