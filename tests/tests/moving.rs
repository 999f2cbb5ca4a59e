//! Books of the layout before this one are taken over while its programs run: the real ones, of the last build that had it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use aya::maps::{Array, Map, MapData};
use tokio::process::Child;
use zinit_tests::{
    Cleanup, Marker, Ready, actor,
    daemon::{Daemon, wait_for},
    earlier::{Earlier, entries},
    members,
    sandbox::{DEADLINE, PinDir, Sandbox},
    survivors,
};
use zinit_tracker::{
    Config, Level, Pins, Service, StopPolicy, StopReport, Tracker,
    records::{LAYOUT_VERSION, Layout, Process, map},
    stop,
};

const CAPACITY: u32 = 4096;

/// A service of the earlier build that an actor plays.
struct Played {
    id: u32,
    child: Child,
    marker: Marker,
    _cleanup: Cleanup,
}

fn play(earlier: &mut Earlier, behaviour: &str, args: &[&str]) -> Played {
    let marker = Marker::new();
    let cleanup = Cleanup::new(&marker);
    let mut ready = Ready::new().unwrap();
    let mut command = actor(behaviour, args.iter().copied(), &marker);
    ready.attach(&mut command);
    let id = earlier.register(behaviour);
    let child = earlier.spawn(id, &mut command.into());
    ready.wait().unwrap();
    Played {
        id,
        child,
        marker,
        _cleanup: cleanup,
    }
}

/// Starts a script in a service of the earlier build.
fn run(earlier: &mut Earlier, name: &str, script: &str) -> Played {
    let marker = Marker::new();
    let cleanup = Cleanup::new(&marker);
    let mut command = Command::new("sh");
    command.args(["-c", script]).env(Marker::ENV, marker.as_str());
    let id = earlier.register(name);
    let child = earlier.spawn(id, &mut command.into());
    Played {
        id,
        child,
        marker,
        _cleanup: cleanup,
    }
}

fn found(sandbox: &Sandbox, played: &Played) -> Service {
    let services = sandbox.tracker.services().unwrap();
    services
        .iter()
        .find(|info| info.id.number() == played.id)
        .unwrap()
        .handle()
}

fn assert_map_matches_oracle(sandbox: &Sandbox, played: &Played) {
    let oracle: BTreeSet<_> = members(&played.marker)
        .iter()
        .map(|member| (member.pid, member.start_time_ticks))
        .collect();
    let service = found(sandbox, played);
    assert_eq!(
        sandbox.in_map(&service),
        oracle,
        "the map (left) is not what /proc says"
    );
    assert_eq!(sandbox.tracker.live(&service).unwrap(), oracle.len() as u64);
}

async fn end(sandbox: &Sandbox, played: &mut Played) -> StopReport {
    let service = found(sandbox, played);
    let policy = StopPolicy {
        grace: Duration::from_millis(200),
        ..StopPolicy::default()
    };
    let stopping = stop(&sandbox.tracker, &service, &policy);
    let report = tokio::time::timeout(DEADLINE, stopping).await.unwrap().unwrap();
    assert_eq!(survivors(&played.marker), [], "{report:#?}");
    played.child.wait().await.unwrap();
    report
}

async fn end_proven(sandbox: &Sandbox, mut played: Played) {
    let report = end(sandbox, &mut played).await;
    assert!(report.proven, "{report:#?}");
}

#[tokio::test]
async fn members_are_as_they_were() {
    let pins = PinDir::new();
    let mut earlier = Earlier::load(pins.path(), CAPACITY);
    let mut dead = run(&mut earlier, "dead", "exit 7");
    let pid = dead.child.id().unwrap();
    dead.child.wait().await.unwrap();
    let played = [
        play(&mut earlier, "double-fork", &[]),
        play(&mut earlier, "chain", &["5"]),
        play(&mut earlier, "sessions", &["50"]),
    ];
    let before = earlier.members();
    assert!(before.len() > 50, "{}", before.len());
    let services: BTreeMap<u32, _> = (1..=4).map(|id| (id, earlier.service(id))).collect();
    let directory = earlier.directory().to_owned();
    earlier.leave();

    let sandbox = Sandbox::taking_over(pins, None);
    assert!(!directory.exists());
    let after: BTreeMap<u32, Process> = entries(&sandbox.pins().join("v2").join(map::PROCESSES));
    assert_eq!(after, before);
    for info in sandbox.tracker.services().unwrap() {
        let service = services[&info.id.number()];
        assert_eq!(
            (info.live, info.forks, info.exits, info.lost, info.unwatched),
            (service.live, service.forks, service.exits, service.lost, false),
            "{}",
            info.name
        );
        assert_eq!(
            info.main.map_or(0, |main| main.tgid),
            service.root_tgid,
            "{}",
            info.name
        );
    }
    assert_eq!(sandbox.tracker.services().unwrap().len(), services.len());
    let exits = sandbox.tracker.history().unwrap();
    let exit = exits.iter().find(|exit| exit.key.tgid == pid).unwrap();
    assert_eq!(exit.status, Some(7 << 8), "{exit:?}");
    for played in played {
        assert_map_matches_oracle(&sandbox, &played);
        end_proven(&sandbox, played).await;
    }
    // Its number is not given away.
    assert_eq!(sandbox.tracker.register("next").unwrap().id().number(), 5);
    sandbox.close();
}

#[tokio::test]
async fn nobody_is_missed_who_is_born_meanwhile() {
    const CHILDREN: usize = 1500;
    let pins = PinDir::new();
    let mut earlier = Earlier::load(pins.path(), CAPACITY);
    let script = format!(
        "i=0; while [ $i -lt {CHILDREN} ]; do i=$((i+1)); (setsid sleep 3600 & exec sleep 3600) & done; exec sleep 3601"
    );
    let played = run(&mut earlier, "grows", &script);
    wait_for("it grows", || earlier.members().len() > CHILDREN / 4);
    let at = earlier.members().len();
    earlier.leave();
    let sandbox = Sandbox::taking_over(pins, None);
    let service = found(&sandbox, &played);
    assert!(at < CHILDREN, "it was done before: {at}");
    wait_for("all are there", || {
        sandbox.tracker.live(&service).unwrap() > 2 * CHILDREN as u64
    });
    assert_map_matches_oracle(&sandbox, &played);
    println!(
        "{at} members when the books were taken over, {} in the end",
        2 * CHILDREN + 1
    );
    end_proven(&sandbox, played).await;
    sandbox.close();
}

/// What is written to when the hooks are attached, who does something then, and where our books are.
static MEANWHILE: OnceLock<(PathBuf, u32, PathBuf)> = OnceLock::new();

fn have_a_child() {
    let (trigger, parent, books) = MEANWHILE.get().unwrap();
    assert_eq!(entries(books), BTreeMap::new(), "they are taken over already");
    fs::write(trigger, "go").unwrap();
    // One that is not in our books, of one who is not.
    wait_for("the child is in our books", || entries(books).len() == 1);
    assert!(!entries(books).contains_key(parent));
}

#[tokio::test]
async fn who_is_born_of_one_who_is_not_there_yet_is() {
    let directory = tempfile::TempDir::new().unwrap();
    let trigger = directory.path().join("trigger");
    nix::unistd::mkfifo(&trigger, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let pins = PinDir::new();
    let mut earlier = Earlier::load(pins.path(), CAPACITY);
    let script = format!("read word < {}; setsid sleep 3600 & exec sleep 3601", trigger.display());
    let played = run(&mut earlier, "parent", &script);
    let parent = played.child.id().unwrap();
    let books = pins.path().join(format!("v{LAYOUT_VERSION}")).join(map::PROCESSES);
    MEANWHILE.set((trigger, parent, books)).unwrap();
    earlier.leave();
    let sandbox = Sandbox::taking_over(pins, Some(have_a_child));
    let info = sandbox.tracker.info(&found(&sandbox, &played)).unwrap();
    assert_eq!((info.live, info.lost, info.unwatched), (2, 0, false));
    assert_map_matches_oracle(&sandbox, &played);
    end_proven(&sandbox, played).await;
    sandbox.close();
}

#[tokio::test]
async fn nobody_runs_away_from_being_taken_over() {
    let pins = PinDir::new();
    let mut earlier = Earlier::load(pins.path(), CAPACITY);
    let played = play(&mut earlier, "refork-chains", &["8"]);
    earlier.leave();
    let sandbox = Sandbox::taking_over(pins, None);
    end_proven(&sandbox, played).await;
    sandbox.close();
}

#[tokio::test]
async fn whoever_uses_them_can_go_on_and_nothing_is_proven() {
    let pins = PinDir::new();
    let mut earlier = Earlier::load(pins.path(), CAPACITY);
    let mut played = run(
        &mut earlier,
        "shared",
        "setsid sleep 3600 & while :; do setsid sleep 0.01 & wait $!; done",
    );
    wait_for("it runs", || earlier.members().len() >= 3);
    let sandbox = Sandbox::taking_over(pins, None);
    let directory = earlier.directory().to_owned();
    assert!(sandbox.tracker.info(&found(&sandbox, &played)).unwrap().unwatched);
    // By one who does not know ours.
    let mut late = Command::new("sleep");
    late.arg("3600").env(Marker::ENV, played.marker.as_str());
    let mut late = earlier.spawn(played.id, &mut late.into());
    let service = found(&sandbox, &played);
    let policy = StopPolicy {
        grace: Duration::from_millis(200),
        ..StopPolicy::default()
    };
    let report = stop(&sandbox.tracker, &service, &policy).await.unwrap();
    assert!(!report.proven, "{report:#?}");
    played.child.wait().await.unwrap();
    // Both have seen those end whom both have.
    let left: Vec<_> = earlier.members().into_keys().collect();
    assert_eq!(left, [late.id().unwrap()]);
    earlier.leave();
    drop(sandbox.second_client());
    assert!(directory.exists(), "a member is forgotten");
    late.kill().await.unwrap();
    drop(sandbox.second_client());
    assert!(!directory.exists());
    sandbox.close();
}

#[tokio::test]
async fn what_they_missed_or_let_go_is_not_taken_for_proven() {
    let pins = PinDir::new();
    let mut earlier = Earlier::load(pins.path(), CAPACITY);
    let mut let_go = play(&mut earlier, "setsid", &[]);
    let root = let_go.child.id().unwrap();
    let released = earlier.members().into_keys().find(|tgid| *tgid != root).unwrap();
    earlier.release(released);
    // Births are not seen any more.
    fs::remove_file(earlier.directory().join("links/zinit_fork")).unwrap();
    earlier.leave();
    let sandbox = Sandbox::taking_over(pins, None);
    let info = sandbox.tracker.info(&found(&sandbox, &let_go)).unwrap();
    assert!(info.released && info.unwatched, "{info:?}");
    let policy = StopPolicy {
        grace: Duration::from_millis(200),
        ..StopPolicy::default()
    };
    let report = stop(&sandbox.tracker, &found(&sandbox, &let_go), &policy)
        .await
        .unwrap();
    assert!(!report.proven, "{report:#?}");
    let left: Vec<_> = survivors(&let_go.marker).iter().map(|left| left.pid).collect();
    assert_eq!(left, [i32::try_from(released).unwrap()], "{report:#?}");
    let_go.child.wait().await.unwrap();
    sandbox.close();
}

#[tokio::test]
async fn pins_that_were_removed_half_way_are_in_nobodys_way() {
    let pins = PinDir::new();
    let earlier = Earlier::load(pins.path(), CAPACITY);
    let directory = earlier.directory().to_owned();
    earlier.leave();
    fs::remove_file(directory.join(map::LAYOUT)).unwrap();
    let config = Config {
        pins: Pins::Shared(pins.path().to_owned()),
        level: Level::Ebpf,
        ..Config::default()
    };
    assert!(Tracker::open_existing(&config).unwrap().is_none());
    assert!(!pins.path().exists());
    // Whoever loads next finds it so too.
    drop(Earlier::load(pins.path(), CAPACITY));
    fs::remove_file(directory.join(map::LAYOUT)).unwrap();
    let sandbox = Sandbox::taking_over(pins, None);
    assert!(!directory.exists());
    sandbox.close();
}

#[tokio::test]
async fn who_died_half_way_has_lost_nobody() {
    let pins = PinDir::new();
    let mut earlier = Earlier::load(pins.path(), CAPACITY);
    let played = play(&mut earlier, "setsid", &[]);
    let before = earlier.members();
    earlier.leave();
    // Pins of ours that are not complete: without the record that says so.
    let other = Sandbox::new();
    let moved = pins.path().join(format!("v{LAYOUT_VERSION}"));
    fs::rename(other.pins().join(format!("v{LAYOUT_VERSION}")), &moved).unwrap();
    let layout = MapData::from_pin(moved.join(map::LAYOUT)).unwrap();
    let mut layouts: Array<_, Layout> = Map::Array(layout).try_into().unwrap();
    layouts.set(0, Layout::default(), 0).unwrap();
    drop(other);
    let sandbox = Sandbox::taking_over(pins, None);
    assert_eq!(entries(&moved.join(map::PROCESSES)), before);
    end_proven(&sandbox, played).await;
    sandbox.close();
}

#[tokio::test]
async fn who_does_not_ask_for_it_is_refused_and_told_the_way_out() {
    let pins = PinDir::new();
    let mut earlier = Earlier::load(pins.path(), CAPACITY);
    let mut played = run(&mut earlier, "stays", "exec sleep 3600");
    let pinned = tree(pins.path());
    let config = Config {
        pins: Pins::Shared(pins.path().to_owned()),
        level: Level::Ebpf,
        ..Config::default()
    };
    for error in [
        Tracker::open(&config).unwrap_err(),
        Tracker::open_existing(&config).unwrap_err(),
    ] {
        let message = error.to_string();
        assert!(
            message.contains("holds pins of layout v1, this program uses layout 2"),
            "{message}"
        );
        assert!(
            message.contains("or start zinit of this version, which takes them over"),
            "{message}"
        );
    }
    assert_eq!(tree(pins.path()), pinned);
    played.child.kill().await.unwrap();
}

#[tokio::test]
async fn a_supervisor_takes_them_over_when_it_starts() {
    let mut daemon = Daemon::prepare(&[]);
    let mut earlier = Earlier::load(daemon.pins(), CAPACITY);
    let mut played = play(&mut earlier, "setsid", &[]);
    let directory = earlier.directory().to_owned();
    earlier.leave();
    let (_, _cleanup) = daemon.define("new", "exec sleep 3600", "");
    daemon.run();
    daemon.wait_for_state("new", "Running");
    assert!(!directory.exists());
    let listed = daemon.tracker(&["ps", "--json"]);
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    for member in members(&played.marker) {
        assert!(
            listed.contains(&format!("\"pid\": {}", member.pid)) || listed.contains(&format!("\"pid\":{}", member.pid)),
            "{listed}"
        );
    }
    let stopped = daemon.tracker(&["stop", "setsid"]);
    assert!(stopped.status.success(), "{stopped:?}");
    assert_eq!(survivors(&played.marker), []);
    played.child.wait().await.unwrap();
    daemon.shutdown();
}

/// Everything below a directory.
fn tree(directory: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            found.insert(path.display().to_string());
            if path.is_dir() {
                open.push(path);
            }
        }
    }
    found
}
