//! Very many members, and little to stop them with: few file descriptors, little memory.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use zinit_tests::{TestCgroup, sandbox::Sandbox, survivors, tool};

/// As many as the smallest default of `pid_max` allows beside everything else.
const MEMBERS: usize = 20_000;
const MEMORY: &str = "67108864";
const DESCRIPTORS: &str = "1024";

/// The hierarchy that limits memory: the file of the limit, and where cgroups are made.
fn memory_hierarchy() -> Option<(&'static str, &'static Path)> {
    let candidates = [
        ("memory.limit_in_bytes", "/sys/fs/cgroup/memory"),
        ("memory.max", "/sys/fs/cgroup"),
    ];
    candidates.into_iter().find_map(|(file, root)| {
        let root = Path::new(root);
        let offered = root.join("memory.limit_in_bytes").exists()
            || std::fs::read_to_string(root.join("cgroup.subtree_control")).is_ok_and(|list| list.contains("memory"));
        offered.then_some((file, root))
    })
}

/// Runs `stop` in a cgroup with little memory, with few descriptors; returns its report.
fn stop_with_little(sandbox: &Sandbox, service: &str, cgroup: &Path, limit: &str) -> Value {
    std::fs::create_dir(cgroup).unwrap();
    std::fs::write(cgroup.join(limit), MEMORY).unwrap();
    let report = tempfile::NamedTempFile::new().unwrap();
    let script = format!("echo $$ >\"$1/cgroup.procs\" && ulimit -n {DESCRIPTORS} && shift && exec \"$@\"");
    let output = Command::new("sh")
        .args(["-c", &script, "sh"])
        .arg(cgroup)
        .arg(tool())
        .arg("--pins")
        .arg(sandbox.pins())
        .args(["stop", service, "--grace", "60s", "--kill-timeout", "60s", "--report"])
        .arg(report.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {stderr}", output.status);
    serde_json::from_reader(report.reopen().unwrap()).unwrap()
}

#[tokio::test]
async fn twenty_thousand_members_are_stopped_with_few_descriptors_and_little_memory() {
    let Some((limit, root)) = memory_hierarchy() else {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI must have a cgroup hierarchy that limits memory"
        );
        println!("SKIPPED: this machine has no cgroup hierarchy that limits memory");
        return;
    };
    let cgroup = TestCgroup::at(root.join(format!("zinit-test-limits-{}", std::process::id())));
    let sandbox = Sandbox::with(|config| config.max_processes = Some(32_768));
    let mut played = sandbox.play("sessions", [MEMBERS.to_string()]);
    assert_eq!(sandbox.tracker.live(&played.service).unwrap(), MEMBERS as u64 + 1);
    let report = stop_with_little(&sandbox, "sessions", cgroup.path(), limit);
    assert_eq!(report["proven"], true, "{:?}", report["doubts"]);
    let processes = report["processes"].as_array().unwrap();
    assert_eq!(processes.len(), MEMBERS + 1);
    let asked = |process: &&Value| process["signals"][0]["signal"] == "SIGTERM";
    assert_eq!(processes.iter().filter(asked).count(), MEMBERS + 1, "nobody is skipped");
    assert_eq!(survivors(&played.marker), []);
    println!(
        "{} processes stopped in {} ms; memory used at most: {} KiB",
        processes.len(),
        report["elapsed_us"].as_u64().unwrap() / 1000,
        most_memory(cgroup.path()).unwrap_or(0) / 1024
    );
    played.child.wait().await.unwrap();
    sandbox.close();
}

fn most_memory(cgroup: &Path) -> Option<u64> {
    let read = |file: &str| {
        std::fs::read_to_string(PathBuf::from(cgroup).join(file))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    read("memory.max_usage_in_bytes").or_else(|| read("memory.peak"))
}
