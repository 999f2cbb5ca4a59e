//! Requests at random, many at a time, to services that live as badly as they can. Afterwards everything can be stopped, and
//! nothing is left.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, time::Duration};

use nix::sys::signal::Signal;
use tokio::task::JoinSet;
use zinit_tests::{random::Random, sandbox::DEADLINE, supervised::Supervised};
use zinit_tracker::supervisor::{Definition, Handle, SupervisorError};

const CLIENTS: u64 = 8;
const REQUESTS: usize = 200;

fn services(supervised: &Supervised) -> BTreeMap<&'static str, Definition> {
    let quick = |mut definition: Definition| {
        definition.shutdown_timeout = Duration::from_millis(100);
        definition.restart.delay = Duration::from_millis(5);
        definition.restart.max_delay = Duration::from_millis(20);
        definition
    };
    let sh = |script: &str| quick(Definition::new(["sh", "-c", script]));
    let mut tested = sh("exec sleep 100");
    tested.test = Some(vec!["true".to_owned()]);
    let mut oneshot = sh("(setsid sleep 100 &); exit 0");
    oneshot.oneshot = true;
    let mut dependent = sh("exec sleep 100");
    dependent.after = vec!["tested".to_owned(), "oneshot".to_owned()];
    BTreeMap::from([
        ("tested", tested),
        ("oneshot", oneshot),
        ("dependent", dependent),
        ("crashes", sh("(setsid sleep 100 &); exit 1")),
        ("missing", quick(Definition::new(["/no/such/program"]))),
        ("deaf", quick(supervised.actor("ignore-term-grandchildren", &[]))),
        ("daemon", quick(supervised.actor("double-fork-orphan", &[]))),
    ])
}

/// One request; what comes of it depends on the others, but it is always answered, and never by a broken supervisor.
async fn request(handle: &Handle, name: &str, which: usize) {
    let answered = async {
        match which {
            0..=2 => handle.start(name).await,
            3..=5 => handle
                .stop(name)
                .await
                .map(|report| assert!(report.proven, "{report:#?}")),
            6 | 7 => handle
                .restart(name)
                .await
                .map(|report| assert!(report.proven, "{report:#?}")),
            8 => handle.kill(name, Signal::SIGKILL).await,
            9 => handle.stats(name).await.map(drop),
            10 => handle.forget(name).await,
            11 => handle.monitor(name).await,
            12 => handle.reload().await.map(drop),
            _ => handle.status(name).await.map(drop),
        }
    };
    let answer = tokio::time::timeout(DEADLINE, answered).await;
    match answer.unwrap_or_else(|_| panic!("request {which} about {name} is not answered")) {
        Ok(())
        | Err(
            SupervisorError::ServiceIsDown { .. }
            | SupervisorError::ServiceIsUp { .. }
            | SupervisorError::ServiceNotFound { .. }
            | SupervisorError::ServiceAlreadyMonitored { .. },
        ) => {}
        Err(error) => panic!("request {which} about {name}: {error:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_requests_however_many_at_a_time_leave_anything_behind() {
    let supervised = Supervised::new().await;
    let services = services(&supervised);
    for (name, definition) in &services {
        supervised.monitor(name, definition.clone()).await;
    }
    let names: Vec<_> = services.keys().copied().collect();
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let (handle, names) = (supervised.handle.clone(), names.clone());
        clients.spawn(async move {
            let mut random = Random(client);
            for _ in 0..REQUESTS {
                let name = names[random.below(names.len())];
                request(&handle, name, random.below(14)).await;
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    supervised.handle.reload().await.unwrap();
    for name in &names {
        supervised.stop(name).await;
    }
    supervised.assert_nothing_left();
    let report = supervised.close().await;
    assert_eq!(
        (report.stopped.len(), report.overdue.len()),
        (names.len(), 0),
        "{report:#?}"
    );
}
