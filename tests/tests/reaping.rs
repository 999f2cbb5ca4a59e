//! A supervisor that reaps the orphans of its process. Alone in its binary: other tests' children would be taken.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use zinit_tests::{sandbox::DEADLINE, supervised::Supervised};
use zinit_tracker::supervisor::{Definition, State};

/// Dead children of this process that nobody has waited for.
fn zombies() -> usize {
    let own = std::process::id().to_string();
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let stats = processes.filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    stats
        .filter(|stat| {
            let fields: Vec<_> = stat
                .rsplit_once(") ")
                .map_or(Vec::new(), |(_, fields)| fields.split(' ').collect());
            fields.first() == Some(&"Z") && fields.get(1) == Some(&own.as_str())
        })
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_orphans_is_reaped_and_no_exit_status_is_stolen() {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    let supervised = Supervised::reaping().await;
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("orphans");
    // Each orphan is in a session of its own, and its parent is gone before it dies.
    let flood = "i=0; while [ $i -lt 1000 ]; do (sh -c 'exit 7' &); i=$((i+1)); done; exit 42";
    let mut orphans = Definition::new(["sh", "-c", flood]);
    orphans.oneshot = true;
    for number in 0..4 {
        supervised.monitor(&format!("flood-{number}"), orphans.clone()).await;
    }
    // Meanwhile many children of the supervisor's own come and go, each with a status of its own.
    for status in 1..=50 {
        let mut definition =
            Definition::new(["sh", "-c", &format!("echo {status} >>{}; exit {status}", log.display())]);
        definition.oneshot = true;
        supervised.monitor(&format!("own-{status}"), definition).await;
    }
    for status in 1..=50 {
        let name = format!("own-{status}");
        supervised
            .until_state(&name, State::Error(format!("exited {status}")))
            .await;
    }
    for number in 0..4 {
        let name = format!("flood-{number}");
        supervised
            .until_state(&name, State::Error("exited 42".to_owned()))
            .await;
    }
    let reaped = async {
        while zombies() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(DEADLINE, reaped).await.unwrap();
    supervised.close().await;
}
