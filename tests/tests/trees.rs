//! Random process trees: at rest the kernel map equals what an independent scan of /proc finds, and after the stop both
//! are empty.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use zinit_tests::sandbox::{DEADLINE, Sandbox};
use zinit_tracker::StopPolicy;

const SEEDS: u64 = 200;

/// Every tenth tree is larger, every fiftieth as large as they get.
fn size(seed: u64) -> u32 {
    match seed {
        seed if seed % 50 == 0 => 2000,
        seed if seed % 10 == 0 => 400,
        _ => 60,
    }
}

/// A quarter of the seeds, so that both processors have work.
async fn check_seeds(quarter: u64) {
    let sandbox = Sandbox::new();
    let policy = StopPolicy {
        grace: Duration::from_millis(200),
        kill_timeout: DEADLINE,
        ..StopPolicy::default()
    };
    let (mut processes, mut largest) = (0, 0);
    for seed in (1..=SEEDS).filter(|seed| seed % 4 == quarter) {
        let mut played = sandbox.play("tree", [seed.to_string(), size(seed).to_string()]);
        sandbox.assert_map_matches_oracle(&played);
        let report = sandbox.stop(&mut played, &policy).await;
        processes += report.processes.len();
        largest = largest.max(sandbox.tracker.info(&played.service).unwrap().forks);
        sandbox.tracker.unregister(&played.service).unwrap();
    }
    println!(
        "{} seeds: {processes} processes stopped, largest tree {largest}",
        SEEDS / 4
    );
    sandbox.close();
}

#[tokio::test]
async fn random_trees_match_the_oracle_first_quarter() {
    check_seeds(0).await;
}

#[tokio::test]
async fn random_trees_match_the_oracle_second_quarter() {
    check_seeds(1).await;
}

#[tokio::test]
async fn random_trees_match_the_oracle_third_quarter() {
    check_seeds(2).await;
}

#[tokio::test]
async fn random_trees_match_the_oracle_last_quarter() {
    check_seeds(3).await;
}
