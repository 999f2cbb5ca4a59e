//! Events that the kernel loses: from Linux 7.0 on it skips hooks under load. No process is lost to the books for that, and
//! if one hook has to do alone, the losses show.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use zinit_tests::{
    Cleanup, Marker, actor, rounds,
    sandbox::{DEADLINE, Sandbox},
    survivors,
};
use zinit_tracker::{ServiceInfo, StopPolicy, StopReport, records::program, stop, stop::Doubt};

const LOOPS: u64 = 8;
const PROCESSES: u64 = 2000;
/// The main process, the loops, and what they create.
const EXPECTED: u64 = 1 + LOOPS + LOOPS * PROCESSES;
/// Long enough for an emulated machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs eight loops at once, of two thousand processes each, to their end. Returns what the books say, and how the stop of
/// what may be left ended.
async fn fork_loops(sandbox: &Sandbox) -> (ServiceInfo, StopReport) {
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let service = sandbox.tracker.register("loops").unwrap();
    let args = [LOOPS.to_string(), PROCESSES.to_string()];
    let mut command = actor("fork-loops", args, &marker).into();
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
    tokio::time::timeout(DEADLINE, sandbox.tracker.wait_empty(&service))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(survivors(&marker), []);
    assert_eq!(sandbox.in_map(&service).len(), 0);
    let info = sandbox.tracker.info(&service).unwrap();
    let report = stop(&sandbox.tracker, &service, &StopPolicy::default()).await.unwrap();
    sandbox.tracker.unregister(&service).unwrap();
    (info, report)
}

fn misses(sandbox: &Sandbox) -> String {
    let misses = sandbox.tracker.misses().unwrap();
    let misses: Vec<_> = misses.iter().map(|(hook, count)| format!("{hook} {count}")).collect();
    misses.join(", ")
}

#[tokio::test]
async fn no_process_of_parallel_fork_loops_is_lost() {
    let sandbox = Sandbox::new();
    let rounds = rounds(2);
    for _ in 0..rounds {
        let (info, report) = fork_loops(&sandbox).await;
        assert_eq!(
            (info.forks, info.exits, info.live, info.lost),
            (EXPECTED, EXPECTED, 0, 0)
        );
        assert!(report.proven, "{report:#?}");
    }
    println!(
        "{rounds} rounds of {EXPECTED} processes: none lost; skipped by the kernel: {}; deaths found later: {}",
        misses(&sandbox),
        sandbox.tracker.stats().unwrap().healed
    );
    sandbox.close();
}

#[tokio::test]
async fn with_one_hook_alone_losses_show_and_make_a_service_unproven() {
    let sandbox = Sandbox::with(|config| config.without_hook = Some(program::WAKEUP_NEW));
    let (mut lost, mut skipped) = (0, 0);
    for _ in 0..rounds(2) {
        let (info, report) = fork_loops(&sandbox).await;
        lost += EXPECTED - info.forks;
        skipped += report.doubts.iter().map(missed).sum::<u64>();
        assert!(info.forks == EXPECTED || !report.proven, "{report:#?}");
        assert_eq!(report.proven, report.doubts.is_empty());
        assert!(report.doubts.iter().all(|doubt| missed(doubt) > 0), "{report:#?}");
    }
    println!("{lost} processes lost; skipped by the kernel: {}", misses(&sandbox));
    if skipped == 0 {
        println!("SKIPPED: this kernel has skipped no event, so there was nothing to show");
    }
    sandbox.close();
}

fn missed(doubt: &Doubt) -> u64 {
    match doubt {
        Doubt::MissedCreations { count } => *count,
        _ => 0,
    }
}
