//! A newer build's programs take the place of those that run: no event is missed, and nobody has to notice.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, fs, os::unix::fs::MetadataExt as _, time::Instant};

use zinit_tests::{
    Cleanup, Marker, actor, rounds,
    sandbox::{DEADLINE, Sandbox},
    survivors,
};
use zinit_tracker::{StopPolicy, stop, stop::Doubt};

const LOOPS: u64 = 4;
const PROCESSES: u64 = 2500;
/// The main process, the loops, and what they create.
const EXPECTED: u64 = 1 + LOOPS + LOOPS * PROCESSES;

/// What builds are told apart by.
fn build(number: u8) -> [u8; 32] {
    [number; 32]
}

/// What is pinned, by its path below the pin directory: another inode is another pin.
fn pinned(sandbox: &Sandbox) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    for directory in ["v2/links", "v2/programs"] {
        for entry in fs::read_dir(sandbox.pins().join(directory)).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{directory}/{}", entry.file_name().to_string_lossy());
            found.insert(name, entry.metadata().unwrap().ino());
        }
    }
    found
}

fn assert_all_replaced(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) {
    let names = |pins: &BTreeMap<String, u64>| pins.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(before), names(after));
    for (name, inode) in before {
        assert_ne!(after[name], *inode, "{name} is as before");
    }
}

#[tokio::test]
async fn no_fork_is_missed_while_programs_are_replaced() {
    let sandbox = Sandbox::with(|config| config.sources = build(0));
    let mut replaced = 0_u8;
    for _ in 0..rounds(1) {
        let marker = Marker::new();
        let _cleanup = Cleanup::new(&marker);
        let service = sandbox.tracker.register("loops").unwrap();
        let args = [LOOPS.to_string(), PROCESSES.to_string()];
        let began = Instant::now();
        let mut command = actor("fork-loops", args, &marker).into();
        let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
        let first = replaced;
        let status = loop {
            let before = pinned(&sandbox);
            replaced = replaced.wrapping_add(1);
            drop(sandbox.successor(build(replaced)));
            assert_all_replaced(&before, &pinned(&sandbox));
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
        };
        assert!(status.success(), "{status}");
        let seconds = began.elapsed().as_secs_f64();
        tokio::time::timeout(DEADLINE, sandbox.tracker.wait_empty(&service))
            .await
            .unwrap()
            .unwrap();
        let info = sandbox.tracker.info(&service).unwrap();
        assert_eq!(
            (info.forks, info.exits, info.live, info.lost),
            (EXPECTED, EXPECTED, 0, 0)
        );
        let report = stop(&sandbox.tracker, &service, &StopPolicy::default()).await.unwrap();
        assert!(report.proven, "{report:#?}");
        assert_eq!(survivors(&marker), []);
        sandbox.tracker.unregister(&service).unwrap();
        println!(
            "{EXPECTED} forks at {:.0}/s, programs replaced {} times meanwhile: none missed",
            EXPECTED as f64 / seconds,
            replaced.wrapping_sub(first)
        );
    }
    sandbox.close();
}

#[tokio::test]
async fn whoever_was_there_before_goes_on_and_proves() {
    let sandbox = Sandbox::with(|config| config.sources = build(0));
    let mut before = sandbox.play("double-fork", [""; 0]);
    let other = sandbox.successor(build(1));
    let mut after = sandbox.play("setsid", [""; 0]);
    sandbox.assert_map_matches_oracle(&before);
    sandbox.assert_map_matches_oracle(&after);
    let info = other.info(&before.service).unwrap();
    assert_eq!((info.lost, info.unwatched), (0, false));
    for played in [&mut before, &mut after] {
        sandbox.stop(played, &StopPolicy::default()).await;
    }
    drop(other);
    sandbox.close();
}

#[tokio::test]
async fn programs_are_left_as_they_are_by_who_does_not_ask_or_has_the_same() {
    let sandbox = Sandbox::with(|config| config.sources = build(0));
    let before = pinned(&sandbox);
    // Of this build's real sources.
    drop(sandbox.second_client());
    drop(sandbox.successor(build(0)));
    assert_eq!(pinned(&sandbox), before);
    sandbox.close();
}

#[tokio::test]
async fn what_one_left_that_died_while_replacing_is_cleared_away() {
    let sandbox = Sandbox::with(|config| config.sources = build(0));
    let other = Sandbox::with(|config| config.sources = build(1));
    let before = pinned(&sandbox);
    // A link that keeps a program attached, pinned and not yet in its place.
    for directory in ["links", "programs"] {
        let path = |sandbox: &Sandbox| sandbox.pins().join("v2").join(directory).join("zinit_fork");
        fs::rename(path(&other), path(&sandbox).with_file_name("zinit_fork_new")).unwrap();
    }
    drop(other.tracker);
    drop(sandbox.successor(build(1)));
    assert_all_replaced(&before, &pinned(&sandbox));
    sandbox.close();
}

#[tokio::test]
async fn a_replacement_that_was_broken_off_is_finished_without_a_gap() {
    let sandbox = Sandbox::with(|config| config.sources = build(0));
    let mut played = sandbox.play("setsid", [""; 0]);
    drop(sandbox.successor(build(1)));
    let pins = pinned(&sandbox);
    // As if whoever replaced them had died before the links had their places.
    let links = sandbox.pins().join("v2/links");
    for hook in ["zinit_fork", "zinit_exit"] {
        fs::rename(links.join(hook), links.join(format!("{hook}_new"))).unwrap();
    }
    drop(sandbox.second_client());
    assert_eq!(pinned(&sandbox), pins);
    assert!(!sandbox.tracker.info(&played.service).unwrap().unwatched);
    sandbox.stop(&mut played, &StopPolicy::default()).await;
    sandbox.close();
}

#[tokio::test]
async fn who_was_there_before_two_replacements_finds_the_build_that_he_knows() {
    let sandbox = Sandbox::with(|config| config.sources = build(0));
    let mut played = sandbox.play("setsid", [""; 0]);
    drop(sandbox.successor(build(1)));
    drop(sandbox.successor(build(0)));
    let pins = pinned(&sandbox);
    sandbox.stop(&mut played, &StopPolicy::default()).await;
    assert_eq!(pinned(&sandbox), pins, "the hooks were attached all the time");
    sandbox.close();
}

#[tokio::test]
async fn somebody_elses_program_in_the_place_of_ours_is_no_replacement() {
    // One that does something else, and one that does the same for other books.
    for theirs in ["zinit_exec", "zinit_fork"] {
        let sandbox = Sandbox::new();
        let other = Sandbox::new();
        let played = sandbox.play("setsid", [""; 0]);
        for directory in ["links", "programs"] {
            let path = |sandbox: &Sandbox, name| sandbox.pins().join("v2").join(directory).join(name);
            fs::rename(path(&other, theirs), path(&sandbox, "zinit_fork")).unwrap();
        }
        let report = stop(&sandbox.tracker, &played.service, &StopPolicy::default())
            .await
            .unwrap();
        assert_eq!(survivors(&played.marker), []);
        assert!(!report.proven, "{theirs}: {report:#?}");
        assert!(
            report.doubts.iter().any(|doubt| matches!(doubt, Doubt::Unwatched)),
            "{theirs}: {report:#?}"
        );
    }
}
