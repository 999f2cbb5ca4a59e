//! `zinit-tracker ps` and `tree`: columns, order, and the graph of a service's whole life.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    process::{Command, Stdio},
};

use serde_json::Value;
use zinit_tests::{Cleanup, Marker, members, sandbox::Sandbox, tool};
use zinit_tracker::{StopPolicy, stop};

/// Runs the tool and returns its stdout.
fn tracker(sandbox: &Sandbox, args: &[&str]) -> String {
    let mut command = Command::new(tool());
    let output = command.arg("--pins").arg(sandbox.pins()).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// A service whose children have executed what they are, as `/proc` says.
fn play(sandbox: &Sandbox, marker: &Marker, script: &str, commands: &[&str]) -> tokio::process::Child {
    let service = sandbox.tracker.register("web").unwrap();
    let mut command = tokio::process::Command::new("sh");
    command.args(["-c", script]).env(Marker::ENV, marker.as_str());
    let child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    let running = || -> BTreeSet<String> {
        let all = members(marker);
        let line = |pid| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let lines = all.iter().map(|member| line(member.pid));
        lines
            .map(|line| String::from_utf8_lossy(&line).replace('\0', " ").trim_end().to_owned())
            .collect()
    };
    zinit_tests::daemon::wait_for("all are there", || {
        let running = running();
        commands.iter().all(|command| running.contains(*command))
    });
    child
}

async fn end(sandbox: Sandbox, mut child: tokio::process::Child) {
    let service = sandbox.tracker.find("web").unwrap().handle();
    assert!(
        stop(&sandbox.tracker, &service, &StopPolicy::default())
            .await
            .unwrap()
            .proven
    );
    child.wait().await.unwrap();
    sandbox.close();
}

/// A field of `/proc/PID/status`.
fn status(pid: &str, field: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':').trim().to_owned()
}

#[tokio::test]
async fn ps_shows_and_sorts_the_columns_that_it_is_asked_for() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    // 64 MiB in a shell's variable, another user, and the main process.
    let script = "sleep 3632 & setpriv --reuid 65534 sleep 3633 & \
                  (x=$(head -c 67108864 /dev/zero | tr '\\0' a); sleep 3631; true) & exec sleep 3634";
    let child = play(
        &sandbox,
        &marker,
        script,
        &["sleep 3631", "sleep 3632", "sleep 3633", "sleep 3634"],
    );

    let columns = "pid,ppid,service,user,age,cpu,memory,state,command";
    let said = tracker(&sandbox, &["ps", "--columns", columns, "--sort", "memory"]);
    println!("{said}");
    let lines: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        lines[0],
        [
            "PID", "PPID", "SERVICE", "USER", "AGE", "CPU", "MEMORY", "STATE", "COMMAND"
        ]
    );
    assert_eq!(lines.len() - 1, members(&marker).len(), "{said}");
    let resident = |pid: &str| {
        let text = status(pid, "VmRSS");
        text.trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    assert_eq!(lines[1][10], "sh", "{said}");
    assert!(resident(lines[1][0]) > 65_536, "{said}");
    for line in &lines[1..] {
        assert_eq!(line[2], "test/web");
        // Any user's number or name, by what /proc says.
        let uid = status(line[0], "Uid").split_whitespace().nth(1).unwrap().to_owned();
        let name = Command::new("id").args(["-nu", &uid]).output().unwrap();
        assert_eq!(line[3], String::from_utf8_lossy(&name.stdout).trim_end(), "{said}");
        assert_eq!(line[9], &status(line[0], "State")[..1], "{said}");
    }

    let by = |column: &str| -> Vec<Value> {
        let listed: Value = serde_json::from_str(&tracker(&sandbox, &["ps", "--json", "--sort", column])).unwrap();
        listed[0]["processes"].as_array().unwrap().clone()
    };
    let values = |column: &str, pointer: &str| -> Vec<u64> {
        let sorted = by(column);
        let values = sorted
            .iter()
            .map(|process| process.pointer(pointer).unwrap().as_u64().unwrap());
        values.collect()
    };
    assert!(values("pid", "/pid").is_sorted());
    assert!(values("age", "/start_boottime_ns").is_sorted());
    assert!(values("memory", "/usage/memory_bytes").is_sorted_by(|a, b| a >= b));
    assert!(values("cpu", "/usage/cpu_ns").is_sorted_by(|a, b| a >= b));
    let names = by("command");
    assert!(names.is_sorted_by_key(|process| process["comm"].as_str().unwrap().to_owned()));
    // Nobody pays for what was not asked for.
    assert!(by("pid").iter().all(|process| process.get("usage").is_none()));
    end(sandbox, child).await;
}

#[tokio::test]
async fn the_graph_of_a_service_has_its_dead_dashed() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let script = "sh -c 'setsid sleep 3641 & exit 7'; exec sleep 3642";
    let child = play(&sandbox, &marker, script, &["sleep 3641", "sleep 3642"]);
    let main = child.id().unwrap();
    let alive: BTreeSet<u32> = members(&marker)
        .iter()
        .map(|member| u32::try_from(member.pid).unwrap())
        .collect();
    let graph = tracker(&sandbox, &["tree", "web", "--dot"]);
    println!("{graph}");
    assert!(graph.starts_with("digraph ") && graph.ends_with("}\n"), "{graph}");
    assert!(graph.contains("label=\"test/web\";"), "{graph}");
    // A node: "PID@START" [label="PID COMMAND…"(, style=dashed)]; an edge: "PID@START" -> "PID@START".
    let mut nodes = BTreeMap::new();
    let mut edges = Vec::new();
    for line in graph.lines().map(str::trim).filter(|line| line.starts_with('"')) {
        let pid = |word: &str| -> u32 { word[1..word.find('@').unwrap()].parse().unwrap() };
        match line.split_once(" -> ") {
            Some((creator, child)) => edges.push((pid(creator), pid(child))),
            None => {
                nodes.insert(pid(line), line);
            }
        }
    }
    assert_eq!((nodes.len(), edges.len()), (3, 2), "{graph}");
    let dead = *nodes.keys().find(|pid| !alive.contains(pid)).unwrap();
    assert!(
        nodes[&dead].ends_with(&format!("[label=\"{dead} sh\\nexited 7\", style=dashed];")),
        "{graph}"
    );
    let orphan = *alive.iter().find(|pid| **pid != main).unwrap();
    for pid in [main, orphan] {
        assert!(nodes[&pid].ends_with(&format!("[label=\"{pid} sleep\"];")), "{graph}");
    }
    assert!(
        edges.contains(&(main, dead)) && edges.contains(&(dead, orphan)),
        "{graph}"
    );

    match Command::new("dot")
        .arg("-Tplain")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
    {
        Ok(mut dot) => {
            dot.stdin.take().unwrap().write_all(graph.as_bytes()).unwrap();
            let drawn = dot.wait_with_output().unwrap();
            assert!(drawn.status.success());
            let drawn = String::from_utf8_lossy(&drawn.stdout).into_owned();
            assert_eq!(
                drawn.lines().filter(|line| line.starts_with("node ")).count(),
                3,
                "{drawn}"
            );
        }
        Err(error) => println!("SKIPPED: dot reads the graph: {error}"),
    }
    end(sandbox, child).await;
}
