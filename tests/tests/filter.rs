//! The counters that spare bystanders a lookup in the books: they miss no member, whoever has kept them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, fs};

use aya::maps::{Array, Map, MapData};
use zinit_tests::{
    Cleanup, Marker, actor,
    sandbox::{DEADLINE, Sandbox},
    survivors,
};
use zinit_tracker::{
    Service, StopPolicy,
    records::{FILTER_ELEMENTS, FILTER_UNKNOWN, map},
    stop,
};

type Counters = Array<MapData, [u32; 16]>;

fn counters(sandbox: &Sandbox) -> Counters {
    Map::Array(sandbox.map(map::FILTER)).try_into().unwrap()
}

/// The counters that are not 0, by the number that tgids lead to.
fn counted(counters: &Counters) -> BTreeMap<u32, u32> {
    let elements = (0..FILTER_ELEMENTS).map(|element| (element, counters.get(&element, 0).unwrap()));
    let each = elements.flat_map(|(element, members)| (element * 16..).zip(members));
    each.filter(|(_, members)| *members != 0).collect()
}

/// What they must be for the members of these services.
fn expected(sandbox: &Sandbox, services: &[&Service]) -> BTreeMap<u32, u32> {
    let mut expected = BTreeMap::new();
    let members = services
        .iter()
        .flat_map(|service| sandbox.tracker.processes(service).unwrap());
    for member in members {
        *expected.entry(member.key.tgid % (FILTER_ELEMENTS * 16)).or_default() += 1;
    }
    expected
}

fn assert_unknown(counters: &Counters) {
    for element in 0..FILTER_ELEMENTS {
        for members in counters.get(&element, 0).unwrap() {
            assert!(
                members.abs_diff(FILTER_UNKNOWN) < FILTER_UNKNOWN / 2,
                "{element}: {members}"
            );
        }
    }
}

#[tokio::test]
async fn they_are_those_of_the_entries() {
    let sandbox = Sandbox::new();
    let counters = counters(&sandbox);
    assert_eq!(counted(&counters), BTreeMap::new());

    let mut played: Vec<_> = ["double-fork", "setsid", "setpgid"]
        .into_iter()
        .map(|behaviour| sandbox.play(behaviour, [""; 0]))
        .collect();
    // One that is taken in, and let go again.
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut ready = zinit_tests::Ready::new().unwrap();
    let mut command = actor("setsid", [""; 0], &marker);
    let mut adopted = ready.attach(&mut command).spawn().unwrap();
    ready.wait().unwrap();
    let service = sandbox.tracker.register("adopted").unwrap();
    sandbox.tracker.adopt(&service, adopted.id()).unwrap();
    let services: Vec<_> = played.iter().map(|played| &played.service).chain([&service]).collect();
    let before = expected(&sandbox, &services);
    assert!(before.len() > 5, "{before:?}");
    assert_eq!(counted(&counters), before);

    let released = sandbox.tracker.release(adopted.id()).unwrap();
    let after = expected(&sandbox, &services);
    assert_eq!(before.len(), after.len() + released.len());
    assert_eq!(counted(&counters), after);

    stop(&sandbox.tracker, &service, &StopPolicy::default()).await.unwrap();
    sandbox.tracker.unregister(&service).unwrap();
    adopted.kill().unwrap();
    adopted.wait().unwrap();
    for played in &mut played {
        sandbox.stop(played, &StopPolicy::default()).await;
    }
    assert_eq!(counted(&counters), BTreeMap::new());
    sandbox.close();
}

/// Runs loops of forks, does this meanwhile, and demands that nothing was missed.
async fn while_forking(sandbox: &Sandbox, meanwhile: impl FnOnce()) {
    const LOOPS: u64 = 4;
    const PROCESSES: u64 = 1000;
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let service = sandbox.tracker.register("loops").unwrap();
    let mut command = actor("fork-loops", [LOOPS.to_string(), PROCESSES.to_string()], &marker).into();
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    meanwhile();
    assert!(child.wait().await.unwrap().success());
    let empty = sandbox.tracker.wait_empty(&service);
    tokio::time::timeout(DEADLINE, empty).await.unwrap().unwrap();
    let info = sandbox.tracker.info(&service).unwrap();
    let all = 1 + LOOPS + LOOPS * PROCESSES;
    assert_eq!((info.forks, info.exits, info.live, info.lost), (all, all, 0, 0));
    let report = stop(&sandbox.tracker, &service, &StopPolicy::default()).await.unwrap();
    assert!(report.proven, "{report:#?}");
    assert_eq!(survivors(&marker), []);
    sandbox.tracker.unregister(&service).unwrap();
}

#[tokio::test]
async fn they_are_passed_on_to_a_build_that_keeps_them_too() {
    let sandbox = Sandbox::with(|config| config.sources = [1; 32]);
    let mut played = sandbox.play("double-fork", [""; 0]);
    while_forking(&sandbox, || drop(sandbox.successor([2; 32]))).await;
    let counters = counters(&sandbox);
    assert_eq!(counted(&counters), expected(&sandbox, &[&played.service]));
    sandbox.stop(&mut played, &StopPolicy::default()).await;
    assert_eq!(counted(&counters), BTreeMap::new());
    sandbox.close();
}

#[tokio::test]
async fn a_build_that_did_not_have_them_leaves_every_tgid_in_doubt() {
    let sandbox = Sandbox::with(|config| config.sources = [1; 32]);
    let mut played = sandbox.play("double-fork", [""; 0]);
    // What works on them goes on, but those that are pinned next know of no member.
    fs::remove_file(sandbox.pins().join("v2").join(map::FILTER)).unwrap();
    while_forking(&sandbox, || drop(sandbox.successor([2; 32]))).await;
    assert_unknown(&counters(&sandbox));
    sandbox.assert_map_matches_oracle(&played);
    while_forking(&sandbox, || {}).await;
    sandbox.stop(&mut played, &StopPolicy::default()).await;
    // For good.
    while_forking(&sandbox, || drop(sandbox.successor([3; 32]))).await;
    assert_unknown(&counters(&sandbox));
    sandbox.close();
}

#[tokio::test]
async fn a_build_in_between_that_did_not_keep_them_leaves_every_tgid_in_doubt() {
    let sandbox = Sandbox::with(|config| config.sources = [1; 32]);
    let mut played = sandbox.play("double-fork", [""; 0]);
    // As those of another build that was attached when the members joined: it says nothing of itself.
    let mut counters = counters(&sandbox);
    for element in 0..FILTER_ELEMENTS {
        counters.set(element, [0; 16], 0).unwrap();
    }
    counters.set(FILTER_ELEMENTS, [7; 16], 0).unwrap();
    while_forking(&sandbox, || drop(sandbox.successor([2; 32]))).await;
    assert_unknown(&counters);
    sandbox.assert_map_matches_oracle(&played);
    sandbox.stop(&mut played, &StopPolicy::default()).await;
    sandbox.close();
}

#[tokio::test]
async fn programs_of_a_build_that_died_while_it_replaced_others_leave_every_tgid_in_doubt() {
    for name in ["zinit_fork", "zinit_adopt"] {
        let sandbox = Sandbox::with(|config| config.sources = [1; 32]);
        let other = Sandbox::new();
        let mut played = sandbox.play("double-fork", [""; 0]);
        // One that keeps other counters than these is one that does not keep these.
        let path = |sandbox: &Sandbox| sandbox.pins().join("v2/programs").join(name);
        fs::remove_file(path(&sandbox)).unwrap();
        fs::rename(path(&other), path(&sandbox)).unwrap();
        drop(sandbox.second_client());
        assert_unknown(&counters(&sandbox));
        let report = stop(&sandbox.tracker, &played.service, &StopPolicy::default())
            .await
            .unwrap();
        assert_eq!(survivors(&played.marker), [], "{report:#?}");
        played.child.wait().await.unwrap();
    }
}
