//! Services that try to outrun the stop: they end. Times are printed, not asserted.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use tokio::sync::Mutex;
use zinit_tests::{
    orphans, rounds,
    sandbox::{DEADLINE, Played, Sandbox},
    survivors,
};
use zinit_tracker::{StopPolicy, StopReport, stop, stop::Doubt};

const BY_DEFAULT: u32 = 3;

/// Held by the test that runs: a storm leaves others next to nothing of the machine, for longer than another storm lasts.
static TURN: Mutex<()> = Mutex::const_new(());

/// Kills at once.
fn policy(gate: bool) -> StopPolicy {
    StopPolicy {
        grace: Duration::ZERO,
        kill_timeout: DEADLINE,
        gate,
        ..StopPolicy::default()
    }
}

async fn check(behaviour: &str, count: &str, gates: &[bool]) {
    let _turn = TURN.lock().await;
    orphans::reap_all();
    let sandbox = Sandbox::with(|config| config.max_processes = Some(32_768));
    for gate in gates {
        let mut reports = Vec::new();
        for _ in 0..rounds(BY_DEFAULT) {
            let played = sandbox.play(behaviour, [count]);
            reports.push(ended(&sandbox, &played, &policy(*gate)).await);
            sandbox.tracker.unregister(&played.service).unwrap();
        }
        let name = if *gate { "gate if need be" } else { "no gate" };
        println!("{behaviour} {count}, {name}: {}", summary(&reports));
    }
    sandbox.close();
}

/// Stops the service. So many may die in a moment that not all of their deaths leave a record, which the report must say.
async fn ended(sandbox: &Sandbox, played: &Played, policy: &StopPolicy) -> StopReport {
    let report = stop(&sandbox.tracker, &played.service, policy).await.unwrap();
    assert_eq!(survivors(&played.marker), []);
    assert_eq!(sandbox.tracker.live(&played.service).unwrap(), 0);
    let unrecorded = |doubt: &Doubt| matches!(doubt, Doubt::UnobservedDeaths { .. });
    assert!(report.doubts.iter().all(unrecorded), "{:?}", report.doubts);
    assert_eq!(report.proven, report.doubts.is_empty());
    report
}

/// Medians and extremes over all runs.
fn summary(reports: &[StopReport]) -> String {
    let of = |value: &dyn Fn(&StopReport) -> Option<u128>| {
        let mut values: Vec<_> = reports.iter().filter_map(value).collect();
        values.sort_unstable();
        match values[..] {
            [] => "none".to_owned(),
            [least, .., most] => format!("{} ({least} to {most})", values[values.len() / 2]),
            [only] => only.to_string(),
        }
    };
    let kinds: Vec<_> = reports
        .iter()
        .filter_map(|report| report.gate)
        .map(|gate| gate.kind)
        .collect();
    format!(
        "{} runs, {} proven; killing {} µs; kill rounds {}; processes {}; gates {} {:?}, closed after {} µs, in {} µs",
        reports.len(),
        reports.iter().filter(|report| report.proven).count(),
        of(&|report| Some(report.killing?.as_micros())),
        of(&|report| Some(report.kill_rounds.into())),
        of(&|report| Some(report.processes.len() as u128)),
        kinds.len(),
        kinds.first(),
        of(&|report| Some(report.gate?.closed_after.as_micros())),
        of(&|report| Some(report.gate?.took.as_micros())),
    )
}

#[tokio::test]
async fn two_thousand_processes_that_fork_into_sessions_of_their_own() {
    check("session-storm", "2000", &[true, false]).await;
}

#[tokio::test]
async fn two_hundred_chains_that_fork_themselves_again() {
    check("refork-chains", "200", &[true]).await;
}

/// How long so many repetitions take, the shortest of several times.
fn shortest(work: impl Fn()) -> Duration {
    let timed = || {
        let began = std::time::Instant::now();
        work();
        began.elapsed()
    };
    (0..5).map(|_| timed()).min().unwrap()
}

#[tokio::test]
async fn what_a_closed_gate_costs_others() {
    let _turn = TURN.lock().await;
    let sandbox = Sandbox::new();
    let calls = || {
        for _ in 0..20_000 {
            // SAFETY: a system call without arguments, and without a cached answer.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
    };
    let forks = || {
        for _ in 0..50 {
            let status = std::process::Command::new("true").spawn().unwrap().wait();
            assert!(status.map_or_else(
                |error| error.raw_os_error() == Some(libc::ECHILD),
                |status| status.success()
            ));
        }
    };
    let open = [shortest(calls), shortest(forks)];
    let behind = || [shortest(calls), shortest(forks)];
    let (kind, took, closed) = sandbox.tracker.with_gate(behind).unwrap().unwrap();
    let ratio = |index: usize| closed[index].as_secs_f64() / open[index].as_secs_f64();
    println!(
        "the gate at {kind} closed in {took:?}; system calls take {:.2} times as long, processes {:.2} times",
        ratio(0),
        ratio(1)
    );
    sandbox.close();
}
