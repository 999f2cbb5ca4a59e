//! The table of members beside the maps, which any reader of files can read.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::MetadataExt as _,
    process::Stdio,
};

use zinit_tests::{Cleanup, Marker, members, sandbox::Sandbox};
use zinit_tracker::{StopPolicy, records::TEXT_FILE, stop};

/// The lines below the header, in columns.
fn table(sandbox: &Sandbox) -> Vec<Vec<String>> {
    let text = fs::read_to_string(sandbox.pins().join("v2").join(TEXT_FILE)).unwrap();
    let mut lines = text
        .lines()
        .map(|line| line.split_whitespace().map(ToOwned::to_owned).collect());
    let header: Vec<String> = lines.next().unwrap();
    assert_eq!(header.join(" "), "PID PPID SESSION GROUP AGE_S JOINED COMMAND SERVICE");
    lines.collect()
}

#[tokio::test]
async fn it_has_a_line_for_each_member_and_for_nobody_else() {
    let sandbox = Sandbox::new();
    assert_eq!(table(&sandbox), Vec::<Vec<String>>::new());
    let mode = fs::metadata(sandbox.pins().join("v2").join(TEXT_FILE)).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);

    let mut played = sandbox.play("double-fork", [""; 0]);
    let mut expected = Vec::new();
    for member in sandbox.tracker.processes(&played.service).unwrap() {
        let info = fs::read_to_string(format!("/proc/{}/stat", member.pid)).unwrap();
        let fields: Vec<_> = info.rsplit(')').next().unwrap().split_whitespace().collect();
        let tgid = member.key.tgid.to_string();
        // Where tests run in a pid namespace of their own, /proc has other numbers than the table.
        let ids = (tgid == member.pid.to_string()).then(|| [fields[1], fields[3], fields[2]].map(ToOwned::to_owned));
        let joined = if member.spawned { "spawned" } else { "forked" };
        expected.push((
            tgid,
            ids,
            joined.to_owned(),
            member.comm.clone(),
            played.service.name().to_owned(),
        ));
    }
    expected.sort();
    assert_eq!(expected.len(), members(&played.marker).len());
    let mut lines = table(&sandbox);
    lines.sort();
    assert_eq!(lines.len(), expected.len(), "{lines:?}");
    for (line, (tgid, ids, joined, comm, service)) in lines.iter().zip(&expected) {
        assert_eq!(line[0], *tgid);
        assert!(ids.as_ref().is_none_or(|ids| line[1..4] == *ids), "{line:?} {ids:?}");
        assert!(line[4].parse::<u64>().unwrap() < 600, "{line:?}");
        assert_eq!((&line[5], &line[6]), (joined, comm));
        assert_eq!(line[7], format!("test/{service}"));
    }
    sandbox.stop(&mut played, &StopPolicy::default()).await;
    assert_eq!(table(&sandbox), Vec::<Vec<String>>::new());
    sandbox.close();
}

#[tokio::test]
async fn a_process_cannot_write_lines_of_its_own() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    // As long as a name may be.
    let service = sandbox.tracker.register(&"n".repeat(64)).unwrap();
    let mut command = tokio::process::Command::new("sh");
    command
        .args([
            "-c",
            r#"printf '1\nx\t\033\177\303\251 y' >/proc/$$/comm; echo named; read end"#,
        ])
        .env(Marker::ENV, marker.as_str())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    let stdout = child.stdout.take().unwrap().into_owned_fd().unwrap();
    let mut said = String::new();
    BufReader::new(fs::File::from(stdout)).read_line(&mut said).unwrap();
    assert_eq!(said, "named\n");
    let lines = table(&sandbox);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!(lines[0][6..], ["1?x?????", "y", &format!("test/{}", "n".repeat(64))]);
    stop(&sandbox.tracker, &service, &StopPolicy::default()).await.unwrap();
    child.wait().await.unwrap();
    sandbox.tracker.unregister(&service).unwrap();
    sandbox.close();
}

#[tokio::test]
async fn it_is_printed_by_the_program_that_has_taken_the_place() {
    let sandbox = Sandbox::with(|config| config.sources = [1; 32]);
    let mut played = sandbox.play("setsid", [""; 0]);
    let inode = || fs::metadata(sandbox.pins().join("v2").join(TEXT_FILE)).unwrap().ino();
    let (before, lines) = (inode(), table(&sandbox).len());
    drop(sandbox.successor([2; 32]));
    assert_ne!(inode(), before);
    assert_eq!(table(&sandbox).len(), lines);
    sandbox.stop(&mut played, &StopPolicy::default()).await;
    sandbox.close();
}
