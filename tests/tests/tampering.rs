//! Another program of root writes to the maps: it is noticed and named, nobody is killed by a forged record, no service is called
//! proven, and what lives is found all the same.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData},
};
use zinit_tests::{
    Cleanup, Marker,
    sandbox::{DEADLINE, Played, Sandbox},
    survivors,
};
use zinit_tracker::{
    Service, StopPolicy, StopReport,
    records::{self, Layout, Process, map},
    stop,
    stop::Doubt,
};

fn table<V: Pod>(sandbox: &Sandbox, name: &str) -> HashMap<MapData, u32, V> {
    Map::HashMap(sandbox.map(name)).try_into().unwrap()
}

fn processes(sandbox: &Sandbox) -> HashMap<MapData, u32, Process> {
    table(sandbox, map::PROCESSES)
}

fn services(sandbox: &Sandbox) -> HashMap<MapData, u32, records::Service> {
    table(sandbox, map::SERVICES)
}

fn change_live(sandbox: &Sandbox, service: &Service, change: impl FnOnce(u64) -> u64) {
    let mut services = services(sandbox);
    let mut record = services.get(&service.id().number(), 0).unwrap();
    record.live = change(record.live);
    services.insert(service.id().number(), record, 0).unwrap();
}

async fn stopped(sandbox: &Sandbox, service: &Service) -> StopReport {
    let policy = StopPolicy {
        kill_timeout: DEADLINE,
        ..StopPolicy::default()
    };
    stop(&sandbox.tracker, service, &policy).await.unwrap()
}

fn assert_contradicted(report: &StopReport) {
    let named = |doubt: &Doubt| matches!(doubt, Doubt::ContradictoryBooks { .. });
    assert!(!report.proven && report.doubts.iter().any(named), "{report:#?}");
    let said: Vec<_> = report.doubts.iter().map(ToString::to_string).collect();
    let expected = "another program has written to the maps";
    assert!(said.iter().any(|said| said.contains(expected)), "{said:?}");
}

async fn assert_stopped_unproven(sandbox: &Sandbox, mut played: Played) {
    let report = stopped(sandbox, &played.service).await;
    assert_eq!(survivors(&played.marker), [], "{report:#?}");
    assert_contradicted(&report);
    played.child.wait().await.unwrap();
}

#[tokio::test]
async fn a_counter_that_was_set_to_zero_makes_no_service_down() {
    let sandbox = Sandbox::new();
    let played = sandbox.play("sessions", ["3"]);
    change_live(&sandbox, &played.service, |live| {
        assert!(live > 3);
        0
    });
    assert_stopped_unproven(&sandbox, played).await;
}

#[tokio::test]
async fn a_counter_that_was_raised_does_not_keep_a_stop_from_its_end() {
    let sandbox = Sandbox::new();
    let played = sandbox.play("sessions", ["3"]);
    change_live(&sandbox, &played.service, |live| live + 5);
    assert_stopped_unproven(&sandbox, played).await;
}

#[tokio::test]
async fn a_member_whose_entry_was_deleted_is_found() {
    let sandbox = Sandbox::new();
    let played = sandbox.play("sessions", ["3"]);
    let members = sandbox.tracker.processes(&played.service).unwrap();
    processes(&sandbox).remove(&members.last().unwrap().key.tgid).unwrap();
    assert_stopped_unproven(&sandbox, played).await;
}

#[tokio::test]
async fn nobody_is_killed_by_a_forged_entry() {
    let sandbox = Sandbox::new();
    let played = sandbox.play("sessions", ["3"]);
    let mut bystander = tokio::process::Command::new("sleep")
        .arg("300")
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let members = sandbox.tracker.processes(&played.service).unwrap();
    let mut processes = processes(&sandbox);
    let mut entry = processes.get(&members[0].key.tgid, 0).unwrap();
    // Pidfds are matched to the tick.
    entry.start_boottime_ns -= 1_000_000_000;
    processes.insert(bystander.id().unwrap(), entry, 0).unwrap();
    assert_stopped_unproven(&sandbox, played).await;
    assert_eq!(bystander.try_wait().unwrap(), None, "a bystander was killed");
}

#[tokio::test]
async fn members_of_a_service_that_was_deleted_are_nobodys_and_are_not_forgotten() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("sessions", ["3"]);
    let other = sandbox.tracker.register("other").unwrap();
    let report = stopped(&sandbox, &other).await;
    assert!(report.proven, "{report:#?}");
    services(&sandbox).remove(&played.service.id().number()).unwrap();
    let anew = sandbox.tracker.register(played.service.name()).unwrap();
    for service in [&anew, &other] {
        assert_contradicted(&stopped(&sandbox, service).await);
    }
    zinit_tests::kill_all(&played.marker, DEADLINE).unwrap();
    played.child.wait().await.unwrap();
    let report = stopped(&sandbox, &other).await;
    assert!(report.proven, "{report:#?}");
}

#[tokio::test]
async fn a_number_of_the_next_service_that_was_forged_does_no_harm() {
    let sandbox = Sandbox::new();
    let mut layouts: Array<_, Layout> = Map::Array(sandbox.map(map::LAYOUT)).try_into().unwrap();
    let layout = layouts.get(&0, 0).unwrap();
    let next_service = u32::MAX;
    layouts.set(0, Layout { next_service, ..layout }, 0).unwrap();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    for name in ["one", "two", "three"] {
        let service = sandbox.tracker.register(name).unwrap();
        let mut command = Command::new("sleep");
        command.arg("300").env(Marker::ENV, marker.as_str());
        let mut child = sandbox.tracker.spawn(&service, &mut command.into()).unwrap();
        let report = stopped(&sandbox, &service).await;
        assert!(report.proven, "{report:#?}");
        assert_eq!(survivors(&marker), []);
        child.wait().await.unwrap();
    }
    sandbox.close();
}
