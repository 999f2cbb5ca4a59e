//! Starts that hang in the kernel, as when a program is on a server that does not answer: nobody else waits for them, and
//! they can be stopped.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{path::PathBuf, time::Duration};

use zinit_tests::{
    daemon::{Daemon, wait_for},
    holds::{HungMount, skipped},
    sandbox::DEADLINE,
    supervised::Supervised,
    survivors,
};
use zinit_tracker::{
    stop::Cause,
    supervisor::{Definition, State, SupervisorError},
};

fn definition(program: &str) -> Definition {
    Definition {
        shutdown_timeout: Duration::from_millis(100),
        kill_after: DEADLINE,
        ..Definition::new([program.to_owned(), "120".to_owned()])
    }
}

/// A service that rests starts, runs and stops.
async fn assert_others_live(supervised: &Supervised, name: &str) {
    supervised.play(name, "rest", &[], |_| {}).await;
    supervised.until_state(name, State::Running).await;
    supervised.stop(name).await;
}

/// Stops a service whose process has nothing left to hang on. It dies when it gets to it, which a stop of little patience may not see.
async fn stop_at_last(supervised: &Supervised, name: &str) {
    let stopped = async {
        loop {
            match supervised.handle.stop(name).await {
                Ok(report) => return report,
                Err(error) => assert!(matches!(error, SupervisorError::Survivors(_)), "{error}"),
            }
        }
    };
    let report = tokio::time::timeout(DEADLINE, stopped).await.unwrap();
    assert!(report.proven, "{report:#?}");
    assert_eq!(supervised.status(name).await.pid, 0);
}

/// Starts a service that hangs, and stops it while the server has not even seen what it was asked.
async fn check(definition: impl FnOnce(&HungMount) -> Definition) {
    let Some(hung) = HungMount::new() else {
        return skipped("this kernel has no FUSE");
    };
    let supervised = Supervised::new().await;
    supervised.monitor("hangs", definition(&hung)).await;
    let status = supervised.until("hangs", |status| status.pid != 0).await;
    assert_eq!(status.state, State::Blocked);
    assert_others_live(&supervised, "one").await;
    supervised.stop("hangs").await;
    supervised.assert_nothing_left();
    assert_others_live(&supervised, "another").await;
    supervised.monitor("again", definition_of_rest()).await;
    supervised.until_state("again", State::Running).await;
    supervised.close().await;
}

fn definition_of_rest() -> Definition {
    definition("sleep")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_cannot_be_read_holds_up_nobody_and_can_be_stopped() {
    check(|hung| definition(&hung.file())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_cannot_be_entered_holds_up_nobody_and_can_be_stopped() {
    check(|hung| Definition {
        dir: PathBuf::from(hung.file()),
        ..definition("sleep")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_command_that_cannot_be_read_does_not_hold_up_the_stop() {
    let Some(mut hung) = HungMount::new() else {
        return skipped("this kernel has no FUSE");
    };
    let supervised = Supervised::new().await;
    let mut tested = definition("sleep");
    tested.test = Some(vec![hung.file()]);
    tested.kill_after = Duration::from_millis(100);
    supervised.monitor("tested", tested).await;
    let hung = tokio::task::spawn_blocking(move || {
        hung.wait_for_victim();
        hung
    });
    let hung = hung.await.unwrap();
    assert_eq!(supervised.status("tested").await.state, State::Spawned);
    assert_others_live(&supervised, "other").await;
    let error = supervised.handle.stop("tested").await.unwrap_err();
    assert!(matches!(error, SupervisorError::Survivors(_)), "{error}");
    drop(hung);
    stop_at_last(&supervised, "tested").await;
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_cannot_even_be_killed_is_named_and_holds_up_nobody() {
    let Some(mut hung) = HungMount::new() else {
        return skipped("this kernel has no FUSE");
    };
    let supervised = Supervised::new().await;
    let mut hangs = definition(&hung.file());
    hangs.kill_after = Duration::from_millis(100);
    supervised.monitor("hangs", hangs).await;
    let hung = tokio::task::spawn_blocking(move || {
        hung.wait_for_victim();
        hung
    });
    let hung = hung.await.unwrap();
    let pid = supervised.until("hangs", |status| status.pid != 0).await.pid;
    let error = supervised.handle.stop("hangs").await.unwrap_err();
    let SupervisorError::Survivors(report) = &error else {
        panic!("{error}");
    };
    let [survivor] = &report.survivors[..] else {
        panic!("{report:#?}");
    };
    assert_eq!(survivor.pid, pid);
    assert!(matches!(survivor.cause, Cause::Uninterruptible(_)), "{survivor:#?}");
    let state = supervised.status("hangs").await.state.to_string();
    assert!(state.contains(&format!("pid {pid} ")), "{state}");
    assert_others_live(&supervised, "other").await;
    drop(hung);
    stop_at_last(&supervised, "hangs").await;
    supervised.assert_nothing_left();
    supervised.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_at_the_same_time_do_not_wait_for_one_that_hangs() {
    let Some(hung) = HungMount::new() else {
        return skipped("this kernel has no FUSE");
    };
    let supervised = Supervised::new().await;
    let names: Vec<_> = (0..40).map(|number| format!("s{number}")).collect();
    for (number, name) in names.iter().enumerate() {
        let program = if number % 4 == 1 {
            hung.file()
        } else {
            "sleep".to_owned()
        };
        supervised.define(name, definition(&program));
    }
    supervised.handle.reload().await.unwrap();
    for (number, name) in names.iter().enumerate() {
        if number % 4 == 1 {
            let status = supervised.until(name, |status| status.pid != 0).await;
            assert_eq!(status.state, State::Blocked);
        } else {
            supervised.until_state(name, State::Running).await;
        }
    }
    let report = supervised.close().await;
    assert_eq!((report.stopped.len(), report.overdue.len()), (40, 0), "{report:#?}");
}

#[test]
fn at_level_procfs_a_start_that_hangs_holds_up_no_request() {
    let Some(hung) = HungMount::new() else {
        return skipped("this kernel has no FUSE");
    };
    let hangs = format!("exec: {}\nshutdown_timeout: 0.1\nkill_after: 60", hung.file());
    let mut daemon = Daemon::prepare(&[("hangs", &hangs), ("web", "exec: sleep 3600")]);
    daemon.run_as(daemon.init(&["--tracking", "procfs"]));
    daemon.wait_for_state("web", "Running");
    wait_for("the process exists", || daemon.pid("hangs") != 0);
    assert_eq!(daemon.state("hangs"), "Blocked");
    assert_eq!(daemon.json(&["stats", "web", "--json"])["name"], "web");
    // What this level cannot prove is said.
    for request in [["restart", "web"], ["stop", "hangs"]] {
        assert!(daemon.zinit(&request).status.success(), "{request:?}: {}", daemon.log());
    }
    daemon.wait_for_state("web", "Running");
    assert_eq!(daemon.pid("hangs"), 0);
    assert_eq!(survivors(&daemon.marker).len(), 2, "the daemon and the other service");
    daemon.shutdown();
}
