//! Another program holds the lock of the books, as one does that is stopped while it loads: stops end all the same, and
//! say what they could not do.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs::File,
    process::Stdio,
    sync::mpsc::{Sender, channel},
    thread::JoinHandle,
    time::Duration,
};

use zinit_tests::{
    Cleanup, Marker, Ready, actor,
    sandbox::{DEADLINE, Sandbox},
    supervised::Supervised,
    survivors,
};
use zinit_tracker::{
    StopError, StopPolicy, stop,
    stop::{Cause, Doubt},
    supervisor::{Definition, KeepPattern, State, SupervisorError},
};

/// Holds the lock until it is let go, or somebody seems to wait for it without end.
struct Lock {
    let_go: Sender<()>,
    holder: JoinHandle<bool>,
}

impl Lock {
    fn hold(sandbox: &Sandbox) -> Self {
        let file = File::open(sandbox.pins()).unwrap();
        file.lock().unwrap();
        let (let_go, asked) = channel::<()>();
        let holder = std::thread::spawn(move || {
            let in_time = asked.recv_timeout(DEADLINE).is_ok();
            drop(file);
            in_time
        });
        Self { let_go, holder }
    }

    /// Asserts that it was held until now.
    fn let_go(self) {
        let asked = self.let_go.send(());
        assert!(self.holder.join().unwrap() && asked.is_ok(), "somebody waited for it");
    }
}

fn policy(patience: Duration) -> StopPolicy {
    StopPolicy {
        grace: patience,
        kill_timeout: patience,
        ..StopPolicy::default()
    }
}

const SOON: Duration = Duration::from_millis(300);

#[tokio::test]
async fn who_is_missing_in_the_books_is_a_survivor_and_taken_in_later() {
    let sandbox = Sandbox::with_capacity(1);
    let mut played = sandbox.play("double-fork", [""; 0]);
    let lock = Lock::hold(&sandbox);
    let error = stop(&sandbox.tracker, &played.service, &policy(SOON))
        .await
        .unwrap_err();
    lock.let_go();
    let StopError::Survivors(report) = &error else {
        panic!("{error}");
    };
    assert!(!report.survivors.is_empty(), "{report:#?}");
    for survivor in &report.survivors {
        assert_eq!(survivor.cause, Cause::LockedOut, "{report:#?}");
        assert!(survivor.cause.to_string().contains("lock"), "{}", survivor.cause);
    }
    stop(&sandbox.tracker, &played.service, &policy(DEADLINE))
        .await
        .unwrap();
    assert_eq!(survivors(&played.marker), []);
    played.child.wait().await.unwrap();
}

#[tokio::test]
async fn hooks_that_cannot_be_attached_again_are_a_doubt() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("child", [""; 0]);
    std::fs::remove_file(sandbox.pins().join("v2/links/zinit_exec")).unwrap();
    let lock = Lock::hold(&sandbox);
    let report = stop(&sandbox.tracker, &played.service, &policy(DEADLINE))
        .await
        .unwrap();
    lock.let_go();
    assert!(!report.proven);
    assert!(
        matches!(&report.doubts[..], [Doubt::DetachedHooks { hooks }] if *hooks == ["zinit_exec"]),
        "{report:#?}"
    );
    assert_eq!(survivors(&played.marker), []);
    played.child.wait().await.unwrap();
    let report = stop(&sandbox.tracker, &played.service, &policy(DEADLINE))
        .await
        .unwrap();
    assert_eq!(report.doubts, [Doubt::Unwatched]);
    sandbox.close();
}

#[tokio::test]
async fn nested_services_stay_in_the_books() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut ready = Ready::new().unwrap();
    let mut inner = actor("setsid", [""; 0], &marker);
    ready.attach(&mut inner);
    let service = sandbox.tracker.register("outer").unwrap();
    let mut command = tokio::process::Command::new(zinit_tests::tool());
    command
        .arg("--pins")
        .arg(sandbox.pins())
        .args(["run", "--name", "inner", "--"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .stderr(Stdio::null());
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    ready.wait().unwrap();
    let lock = Lock::hold(&sandbox);
    let patience = StopPolicy {
        kill_timeout: DEADLINE,
        ..policy(SOON)
    };
    let report = stop(&sandbox.tracker, &service, &patience).await.unwrap();
    lock.let_go();
    assert!(report.proven, "{report:#?}");
    assert_eq!(survivors(&marker), []);
    child.wait().await.unwrap();
    let left = sandbox.tracker.services().unwrap();
    assert_eq!(
        left.iter().map(|info| info.name.as_str()).collect::<Vec<_>>(),
        ["outer", "inner"]
    );
    let report = stop(&sandbox.tracker, &service, &patience).await.unwrap();
    assert!(report.proven, "{report:#?}");
    assert_eq!(sandbox.tracker.services().unwrap().len(), 1);
    sandbox.close();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_whose_kept_processes_cannot_be_released_is_left_alone_until_they_can() {
    let supervised = Supervised::new().await;
    let keeping = Definition {
        keep: vec![KeepPattern::new("sleep").unwrap()],
        shutdown_timeout: DEADLINE,
        kill_after: DEADLINE,
        ..Definition::new(["sh", "-c", "setsid sleep 121 & exec sleep 120"])
    };
    supervised.monitor("keeping", keeping).await;
    supervised.until_state("keeping", State::Running).await;
    let service = supervised.sandbox.tracker.find("keeping").unwrap().handle();
    let all_sleep = async {
        loop {
            let members = supervised.sandbox.tracker.processes(&service).unwrap();
            if members.len() == 2 && members.iter().all(|member| member.comm == "sleep") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(DEADLINE, all_sleep).await.unwrap();
    let lock = Lock::hold(&supervised.sandbox);
    let error = supervised.handle.stop("keeping").await.unwrap_err();
    lock.let_go();
    let SupervisorError::Stop { source, .. } = &error else {
        panic!("{error}");
    };
    assert!(source.to_string().contains("lock"), "{source}");
    assert_eq!(survivors(&supervised.marker).len(), 2);
    supervised.stop("keeping").await;
    assert_eq!(survivors(&supervised.marker).len(), 1, "the one that is kept");
    zinit_tests::kill_all(&supervised.marker, DEADLINE).unwrap();
    supervised.close().await;
}
