//! A supervisor with a hundred running services sleeps. Alone in its binary: its threads are watched.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use zinit_tests::{sandbox::DEADLINE, supervised::Supervised};
use zinit_tracker::supervisor::{Definition, State};

const SERVICES: usize = 100;

/// Longer than any period that a timer of the supervisor could have in normal operation.
const WINDOW: Duration = Duration::from_secs(5);

/// How often each thread of this process has waited for something, by thread id and name.
fn waits() -> BTreeMap<(i32, String), u64> {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    threads
        .filter_map(|thread| {
            let path = thread.unwrap().path();
            let status = std::fs::read_to_string(path.join("status")).ok()?;
            let field = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(name))?;
                Some(line.split_whitespace().nth(1)?.to_owned())
            };
            let id = path.file_name()?.to_str()?.parse().ok()?;
            Some(((id, field("Name")?), field("voluntary_ctxt_switches")?.parse().ok()?))
        })
        .collect()
}

#[test]
fn a_hundred_running_services_wake_nobody() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let supervised = runtime.block_on(async {
        let supervised = Supervised::new().await;
        let mut definition = Definition::new(["sleep", "120"]);
        definition.test = Some(vec!["true".to_owned()]);
        for number in 0..SERVICES {
            supervised.monitor(&format!("s{number}"), definition.clone()).await;
        }
        for number in 0..SERVICES {
            supervised.until_state(&format!("s{number}"), State::Running).await;
        }
        supervised
    });
    // What was under way may go on for a while (threads for blocking calls end after ten seconds without work), but
    // then there is a time in which nothing happens at all, as long as none of our timers ticks.
    let own = nix::unistd::gettid().as_raw();
    let began = Instant::now();
    loop {
        let before = waits();
        std::thread::sleep(WINDOW);
        let after = waits();
        let woken: Vec<_> = after
            .iter()
            .filter(|((id, _), _)| *id != own)
            .filter(|(thread, count)| before.get(*thread).is_none_or(|before| before < *count))
            .collect();
        if woken.is_empty() {
            println!(
                "nothing happened for {WINDOW:?}, {:.1} s after the last start",
                began.elapsed().as_secs_f64()
            );
            break;
        }
        assert!(began.elapsed() < DEADLINE, "{woken:?} are woken again and again");
    }
    runtime.block_on(supervised.close());
}
