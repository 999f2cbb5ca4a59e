//! Five hundred services that depend on each other at random: up in order, down in reverse, by their own clocks.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    time::{Duration, Instant},
};

use zinit_tests::{random::Random, sandbox::DEADLINE, supervised::Supervised};
use zinit_tracker::supervisor::{Definition, State};

const SERVICES: usize = 500;
const SEED: u64 = 20_261_124;

/// Which services each depends on; the names do not tell the order.
fn graph() -> BTreeMap<String, Vec<String>> {
    let mut random = Random(SEED);
    let mut names: Vec<_> = (0..SERVICES).map(|number| format!("s{number:03}")).collect();
    for index in (1..SERVICES).rev() {
        names.swap(index, random.below(index + 1));
    }
    let dependencies = |index: usize| {
        let count = if index == 0 { 0 } else { random.below(4) };
        (0..count).map(|_| names[random.below(index)].clone()).collect()
    };
    let dependencies: Vec<_> = (0..SERVICES).map(dependencies).collect();
    names.into_iter().zip(dependencies).collect()
}

/// Writes its times of start and end; its test waits for the first. It rests without a child: one that the signal meets before it has
/// executed its program forgets it, as bash does, and rests on.
fn definition(dir: &Path, name: &str, after: &[String]) -> Definition {
    let (up, down) = (dir.join(format!("{name}.up")), dir.join(format!("{name}.down")));
    let script = format!(
        "trap 'echo $EPOCHREALTIME >{down}; exit 0' TERM; mkfifo {up}.rest; echo $EPOCHREALTIME >{up}.new; mv {up}.new {up}; \
         read end <>{up}.rest",
        up = up.display(),
        down = down.display()
    );
    let test = format!("until [ -e {} ]; do sleep 0.02; done", up.display());
    Definition {
        test: Some(["sh", "-c", &test].map(str::to_owned).to_vec()),
        after: after.to_vec(),
        shutdown_timeout: DEADLINE,
        ..Definition::new(["bash", "-c", &script])
    }
}

/// Microseconds since 1970, as each service wrote them.
fn times(dir: &Path, suffix: &str) -> HashMap<String, u64> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .filter(|path| path.extension().is_some_and(|extension| extension == suffix))
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let text: String = std::fs::read_to_string(&path)
                .unwrap()
                .chars()
                .filter(char::is_ascii_digit)
                .collect();
            (name, text.parse().unwrap())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_services_come_up_in_order_and_go_down_in_reverse() {
    let graph = graph();
    let dir = tempfile::tempdir().unwrap();
    let supervised = Supervised::new().await;
    for (name, after) in &graph {
        supervised.define(name, definition(dir.path(), name, after));
    }
    let began = Instant::now();
    let reloaded = supervised.handle.reload().await.unwrap();
    assert_eq!(reloaded.added.len(), SERVICES);
    for name in graph.keys() {
        supervised.until_state(name, State::Running).await;
    }
    println!(
        "{SERVICES} services are up after {:.1} s",
        began.elapsed().as_secs_f64()
    );
    let began = Instant::now();
    let report = supervised.close_within(Duration::from_secs(600)).await;
    println!("and down {:.1} s later", began.elapsed().as_secs_f64());
    assert_eq!(
        (report.stopped.len(), report.overdue.len()),
        (SERVICES, 0),
        "{report:#?}"
    );
    let (up, down) = (times(dir.path(), "up"), times(dir.path(), "down"));
    assert_eq!((up.len(), down.len()), (SERVICES, SERVICES));
    let edges = graph
        .iter()
        .flat_map(|(name, after)| after.iter().map(move |dependency| (name, dependency)));
    for (name, dependency) in edges {
        assert!(up[dependency] < up[name], "{name} came up before {dependency}");
        assert!(down[name] < down[dependency], "{dependency} went down before {name}");
    }
}
