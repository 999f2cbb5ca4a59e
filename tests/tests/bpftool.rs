//! The document `zinit-ebpf/bpftool.md`: it has every pinned name, and bpftool still prints what it shows.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use zinit_tests::{daemon::wait_for, holds::skipped, kernel_is_at_least, sandbox::Sandbox};
use zinit_tracker::StopPolicy;

/// Where the document says that it looks.
const PLACE: &str = "/sys/fs/bpf/zinit/v2";

/// The commands of the document, and what it shows of each.
fn transcripts(text: &str) -> Vec<(String, String)> {
    let mut transcripts: Vec<(String, String)> = Vec::new();
    let blocks = text.lines().filter_map(|line| line.strip_prefix("    "));
    for line in blocks {
        match (line.strip_prefix("# "), transcripts.last_mut()) {
            (Some(command), _) => transcripts.push((command.to_owned(), String::new())),
            (None, Some((_, shown))) => *shown += &format!("{line}\n"),
            // How the service was started.
            (None, None) => {}
        }
    }
    transcripts
}

/// What a transcript has in common with each other of the same command: without numbers, digests, and repetitions of lines, as
/// there are other processors and processes.
fn shape(printed: &str) -> Vec<String> {
    let mut shape: Vec<String> = Vec::new();
    for line in printed.lines() {
        let mut words: Vec<_> = line.split_whitespace().map(word).collect();
        if let Some(tag) = words.iter().position(|word| word == "tag") {
            words.truncate(tag);
        }
        let line = words.join(" ");
        if !line.starts_with("loaded_at") && !shape.contains(&line) {
            shape.push(line);
        }
    }
    shape
}

fn word(word: &str) -> String {
    let mut plain = String::new();
    for c in word.chars() {
        match c {
            '0'..='9' | ',' if plain.ends_with('N') => {}
            '0'..='9' => plain.push('N'),
            c => plain.push(c),
        }
    }
    plain
}

fn names(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    entries.map(|entry| entry.path().to_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn the_document_has_every_pinned_name_and_what_bpftool_prints_of_it() {
    for tool in ["bpftool", "jq"] {
        if Command::new(tool)
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .is_err()
        {
            skipped(&format!("{tool} is missing: install Debian's package {tool}"));
            return;
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../zinit-ebpf/bpftool.md");
    let text = fs::read_to_string(path).unwrap();
    let transcripts = transcripts(&text);
    let sandbox = Sandbox::new();
    let place = sandbox.pins().join("v2");

    let mut pinned = names(&place);
    for directory in ["programs", "links"] {
        let directory = place.join(directory);
        assert!(pinned.remove(directory.to_str().unwrap()), "{pinned:?}");
        pinned.append(&mut names(&directory));
    }
    let shown: Vec<_> = transcripts
        .iter()
        .filter_map(|(command, _)| command.split_once(" show pinned "))
        .map(|(_, path)| path.replace(PLACE, place.to_str().unwrap()))
        .collect();
    for name in &pinned {
        // The kernel that the transcripts are from has no such security module.
        let gate = name.ends_with("/zinit_deny");
        let there = if gate {
            text.contains("`zinit_deny`")
        } else {
            shown.contains(name)
        };
        assert!(there, "the document does not show {name}");
    }
    for name in shown
        .iter()
        .filter(|name| kernel_is_at_least(5, 11) || !name.ends_with("/zinit_wakeup"))
    {
        assert!(pinned.contains(name), "{name} is not pinned, but in the document");
    }

    // A service that was stopped, and is not registered any more.
    let stopped = sandbox.tracker.register("stopped").unwrap();
    let policy = StopPolicy::default();
    zinit_tracker::stop(&sandbox.tracker, &stopped, &policy).await.unwrap();
    sandbox.tracker.unregister(&stopped).unwrap();
    // A member, and one that has ended.
    let mut played = sandbox.play("double-fork", [""; 0]);
    wait_for("a death is recorded", || {
        sandbox
            .tracker
            .history()
            .unwrap()
            .iter()
            .any(|ended| ended.service == played.service.id())
    });
    let mut compared = 0;
    for (command, shown) in transcripts {
        if command.ends_with("/zinit_wakeup") && !kernel_is_at_least(5, 11) {
            continue;
        }
        let here = command.replace(PLACE, place.to_str().unwrap());
        let output = Command::new("sh").args(["-c", &here]).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{command}: {output:?}");
        if command.starts_with("cat ") {
            assert_eq!(printed.lines().next(), shown.lines().next(), "{command}");
        } else if command.contains("jq") {
            // The columns, of which the last one or the first is text.
            let columns =
                |text: &str| -> BTreeSet<usize> { text.lines().map(|line| line.split('\t').count()).collect() };
            assert_eq!(columns(&printed), columns(&shown), "{command}: {printed}");
        } else {
            assert_eq!(shape(&printed), shape(&shown), "{command}: {printed}");
        }
        compared += 1;
    }
    println!("{} pinned names, {compared} commands compared", pinned.len());
    sandbox.stop(&mut played, &StopPolicy::default()).await;
    sandbox.close();
}
