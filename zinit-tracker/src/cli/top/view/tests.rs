//! What is drawn, on terminals of 80x24 and smaller.

use std::{
    collections::HashMap,
    sync::Weak,
    time::{Duration, Instant},
};

use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
};
use zinit_tracker::{
    Member, ServiceInfo,
    records::{Service, service_state},
    tracker::{Escape, Link},
};

use super::*;
use crate::cli::top::{keys::press, sample::Tree, state::Action};

fn info(id: u32, instance: &str, name: &str, live: u64) -> ServiceInfo {
    let mut record = Service {
        live,
        forks: 2 * live,
        exits: live,
        peak: live + 1,
        lost: 0,
        missed_before: 0,
        registered_boottime_ns: 0,
        registrant_start_boottime_ns: 0,
        root_start_boottime_ns: 0,
        root_tgid: 0,
        registrant_tgid: 1,
        state: service_state::UP,
        parent: 0,
        flags: 0,
        adopting_boottime_ns: 0,
        pid_namespace: 0,
        pid_namespace_level: 0,
        _pad: 0,
        instance: [0; _],
        name: [0; _],
    };
    record.instance[..instance.len()].copy_from_slice(instance.as_bytes());
    record.name[..name.len()].copy_from_slice(name.as_bytes());
    ServiceInfo::new(id, &record)
}

fn key(pid: u32) -> ProcessKey {
    ProcessKey {
        tgid: pid,
        start_boottime_ns: u64::from(pid) * 1_000_000_000,
    }
}

fn member(of: &ServiceInfo, pid: u32, parent: u32, comm: &str) -> Member {
    Member {
        key: key(pid),
        pid,
        service: of.id,
        parent: key(parent),
        session: 10,
        group: 10,
        comm: comm.to_owned(),
        spawned: false,
        adopted: false,
        joined: Duration::from_secs(pid.into()),
    }
}

/// Two services; of the first, a main process with a child that has a child, and a daemon.
fn state() -> State {
    let web = info(1, "tool", "web", 4);
    let members = vec![
        member(&web, 10, 1, "sh"),
        member(&web, 11, 10, "worker"),
        member(&web, 12, 11, "sleep"),
        member(&web, 13, 9, "ev\u{1b}[2Jil"),
    ];
    let loads = [(10, 'S', 0.0, 1), (11, 'R', 98.6, 120), (12, 'D', 1.0, 20_480)];
    let load = |cpu, mib: u64| Load { cpu, memory: mib << 20 };
    let tree = Tree {
        service: web.id,
        at: Duration::from_secs(4000),
        rows: tree::rows(&members),
        members,
        loads: loads
            .into_iter()
            .map(|(pid, state, cpu, mib)| (key(pid), (state, load(cpu, mib))))
            .collect(),
    };
    let services = vec![
        ServiceSample {
            info: web,
            fork_rate: Some(12.25),
            load: load(99.6, 20_601),
            doubts: Vec::new(),
        },
        ServiceSample {
            info: info(2, "zinit", "db", 300),
            fork_rate: None,
            load: load(0.0, 3),
            doubts: vec![Doubt::Adopted, Doubt::LostOperations { count: 2 }],
        },
    ];
    let mut state = State::new();
    state.sampled(Ok(Sample {
        tracker: Weak::new(),
        tracking: Tracking::Ebpf,
        services,
        tree: Some(tree),
        loads_age: Duration::from_secs(4),
        unknown_loads: 0,
    }));
    state
}

fn escapes(state: &State) -> Vec<Escape> {
    let tree = state.snapshot.as_ref().unwrap().tree.as_ref().unwrap();
    let link = |pid, comm: &str, alive| Link {
        key: key(pid),
        pid,
        comm: comm.to_owned(),
        service: tree.service,
        main: false,
        alive,
        fate: None,
        ended: None,
    };
    let left = vec![
        Departure::Session {
            of_service: 10,
            now: 13,
        },
        Departure::Parent { creator: 9, now: 1 },
    ];
    let line = vec![link(13, "evil", true), link(9, "\u{7}bell", false)];
    let member = tree.members[3].clone();
    vec![Escape { member, left, line }]
}

fn drawn(state: &mut State, (width, height): (u16, u16)) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal
        .draw(|frame| drop(draw(frame, state, Look { colours: false })))
        .unwrap();
    let buffer = terminal.backend().buffer();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..height).map(|y| line(y).trim_end().to_owned()).collect()
}

fn pressed(state: &mut State, code: KeyCode) -> Option<Action> {
    press(state, KeyEvent::new(code, KeyModifiers::NONE))
}

/// Compares with lines that need not fill the screen.
#[track_caller]
fn shows(state: &mut State, size: (u16, u16), expected: &str) {
    let drawn = drawn(state, size);
    let gaps = drawn.join("\n");
    let without_gaps: Vec<_> = drawn.iter().filter(|line| !line.is_empty()).cloned().collect();
    let expected: Vec<_> = expected.lines().filter(|line| !line.is_empty()).collect();
    assert_eq!(without_gaps, expected, "\n{gaps}");
}

#[test]
fn the_services_at_80x24() {
    let expected = "
 zinit-tracker top   level ebpf   2 services, 304 live
SERVICE             LIVE  FORKS/S   CPU %     MEMORY LEVEL  PROVABLE
tool/web               4     12.2    99.6   20.1 GiB ebpf   yes
zinit/db             300        …     0.0    3.0 MiB ebpf   no: adopted, lost-op
TOTAL                304     12.2    99.6   20.1 GiB
 tool/web: up, 8 ever, 4 died, peak 5   (CPU and memory of the last 4 s)
 a stop can prove that nothing is left
 Enter processes  s stop  e events  / filter  o order  ? help  q quit";
    shows(&mut state(), (80, 24), expected);
}

#[test]
fn the_processes_of_a_service_at_80x24() {
    let mut state = state();
    pressed(&mut state, KeyCode::Enter);
    let (found, service) = (escapes(&state), state.meant().unwrap().info.id);
    state.looked_for_escapes(service, Ok(found));
    drawn(&mut state, (80, 24));
    pressed(&mut state, KeyCode::End);
    let expected = "
 tool/web   4 live   1 escaped   level ebpf
    PID S  CPU %    MEMORY     AGE HAS LEFT             COMMAND
     10 S    0.0   1.0 MiB   1h06m                      ├─ sh
     11 R   98.6 120.0 MiB   1h06m                      │  └─ worker
     12 D    1.0  20.0 GiB   1h06m                      │     └─ sleep
     13 …      …         …   1h06m session,parent       └─ ev\\u{1b}[2Jil
 4 of 4   (CPU and memory of the last 4 s)
 left session 10, is in 13; left its creator 9, which is dead: its parent is 1;
created by 9 \\u{7}bell, dead
 Esc back  s stop  r release  e events  / filter  o order  ? help  q quit";
    shows(&mut state, (80, 24), expected);
}

#[test]
fn whom_a_stop_would_signal_at_80x24() {
    let mut state = state();
    let Some(Action::Preview(info)) = pressed(&mut state, KeyCode::Char('s')) else {
        panic!("a stop begins with a preview");
    };
    let members = state.snapshot.as_ref().unwrap().tree.as_ref().unwrap().members.clone();
    state.previewed(info.clone(), Ok(members));
    let expected = "
 zinit-tracker top   level ebpf   2 services, 304 live
SERVICE             LIVE  FORKS/S   CPU %     MEMORY LEVEL  PROVABLE
tool/web               4     12.2    99.6   20.1 GiB ebpf   yes
zinit/db             300        …     0.0    3.0 MiB ebpf   no: adopted, lost-op
TOTAL                304     12.2    99.6   20.1 GiB
         ┌ Stop tool/web? ─────────────────────────────────────────────┐
         │SIGTERM would go to 4 processes, and to who joins until then:│
         │SIGKILL follows to whoever lives after 10 s.                 │
         │y: stop it    n: leave it                                    │
         │    PID    PPID SESSION   GROUP  COMMAND                     │
         │     10       1      10      10  sh                          │
         │     11      10      10      10  worker                      │
         │     12      11      10      10  sleep                       │
         │     13       9      10      10  ev\\u{1b}[2Jil               │
         └─────────────────────────────────────────────────────────────┘
 tool/web: up, 8 ever, 4 died, peak 5   (CPU and memory of the last 4 s)
 a stop can prove that nothing is left
 Enter processes  s stop  e events  / filter  o order  ? help  q quit";
    shows(&mut state, (80, 24), expected);
    assert_eq!(pressed(&mut state, KeyCode::Enter), None, "only y is yes");
    assert_eq!(pressed(&mut state, KeyCode::Char('y')), Some(Action::Stop(info)));
    assert!(state.over.is_none());
}

#[test]
fn a_no_stops_nobody() {
    for no in [KeyCode::Char('n'), KeyCode::Esc, KeyCode::Char('q')] {
        let mut state = state();
        let info = state.meant().unwrap().info.clone();
        state.previewed(info, Ok(Vec::new()));
        assert_eq!(pressed(&mut state, no), None);
        assert!(state.over.is_none());
        assert_eq!(pressed(&mut state, KeyCode::Char('y')), None);
    }
}

#[test]
fn no_control_character_of_a_name_reaches_the_terminal() {
    let mut state = state();
    pressed(&mut state, KeyCode::Enter);
    let text = drawn(&mut state, (80, 24)).join("");
    assert!(text.contains("ev\\u{1b}[2Jil"), "{text}");
    assert!(!text.contains(char::is_control), "{text:?}");
}

#[test]
fn a_small_terminal_gets_a_message() {
    for size in [(59, 24), (80, 11), (1, 1), (20, 3)] {
        let text = drawn(&mut state(), size).join(" ");
        assert!(text.contains("The terminal has") || size.0 < 20, "{text}");
    }
    assert!(drawn(&mut state(), (60, 12)).join(" ").contains("tool/web"));
}

#[test]
fn services_are_sorted_and_filtered() {
    let names = |state: &State| {
        state
            .shown()
            .iter()
            .map(|service| service.info.name.clone())
            .collect::<Vec<_>>()
    };
    let mut state = state();
    assert_eq!(names(&state), ["web", "db"]);
    pressed(&mut state, KeyCode::Char('o'));
    assert_eq!(state.order, ServiceOrder::Live);
    assert_eq!(names(&state), ["db", "web"]);
    pressed(&mut state, KeyCode::Char('O'));
    assert_eq!(names(&state), ["web", "db"]);
    for letter in ['/', 'D', 'b'] {
        pressed(&mut state, KeyCode::Char(letter));
    }
    assert_eq!(names(&state), ["db"]);
    assert!(drawn(&mut state, (80, 24))[23].starts_with(" /Db_"));
    pressed(&mut state, KeyCode::Esc);
    assert_eq!(names(&state).len(), 2);
}

#[test]
fn processes_are_filtered_by_name_and_pid() {
    let mut state = state();
    pressed(&mut state, KeyCode::Enter);
    for letter in ['/', 's', 'l', 'e'] {
        pressed(&mut state, KeyCode::Char(letter));
    }
    let text = drawn(&mut state, (80, 24));
    assert!(text[2].ends_with("  sleep") && text[3].is_empty(), "{text:#?}");
    pressed(&mut state, KeyCode::Enter);
    assert_eq!(pressed(&mut state, KeyCode::Esc), None);
    assert!(
        drawn(&mut state, (80, 24))[3].contains("worker"),
        "the first Esc ends the filter"
    );
    pressed(&mut state, KeyCode::Esc);
    assert!(matches!(state.place, Place::Services));
}

#[test]
fn a_release_names_the_process_and_how_many_go_with_it() {
    let mut state = state();
    pressed(&mut state, KeyCode::Enter);
    drawn(&mut state, (80, 24));
    pressed(&mut state, KeyCode::Char('r'));
    let text = drawn(&mut state, (80, 24)).join("\n");
    assert!(text.contains("10 sh and its 2 descendants leave tool/web"), "{text}");
    let Some(Action::Release(member)) = pressed(&mut state, KeyCode::Char('y')) else {
        panic!("yes releases");
    };
    assert_eq!(member.key, key(10));
}

#[test]
fn a_quit_while_something_is_under_way_asks() {
    let mut state = state();
    assert_eq!(pressed(&mut state, KeyCode::Char('q')), Some(Action::Quit));
    state.busy = Some(("stopping web".to_owned(), Instant::now()));
    assert_eq!(pressed(&mut state, KeyCode::Char('q')), None);
    assert_eq!(pressed(&mut state, KeyCode::Char('n')), None);
    assert_eq!(pressed(&mut state, KeyCode::Char('s')), None, "one thing at a time");
    pressed(&mut state, KeyCode::Char('q'));
    assert_eq!(pressed(&mut state, KeyCode::Char('y')), Some(Action::Quit));
}

#[test]
fn a_service_that_goes_leads_back_with_a_message() {
    let mut state = state();
    pressed(&mut state, KeyCode::Enter);
    let mut sample = state.snapshot.unwrap();
    sample.services.remove(0);
    state.snapshot = Err(String::new());
    state.sampled(Ok(sample));
    let text = drawn(&mut state, (80, 24)).join("\n");
    assert!(text.contains("tool/web is not registered any more"), "{text}");
    state.sampled(Err("the books are gone".to_owned()));
    let text = drawn(&mut state, (80, 24)).join("\n");
    assert!(text.contains("the books are gone"), "{text}");
}

#[test]
fn events_are_followed_until_one_goes_up() {
    let mut state = state();
    assert_eq!(
        pressed(&mut state, KeyCode::Char('e')),
        Some(Action::Follow("tool/web".to_owned()))
    );
    state.happened((0..100).map(|number| format!("event {number}")).collect());
    assert_eq!(drawn(&mut state, (80, 24))[22], "event 99");
    pressed(&mut state, KeyCode::Up);
    state.happened(vec!["event 100".to_owned()]);
    assert_eq!(drawn(&mut state, (80, 24))[22], "event 98", "it stays where one looks");
    pressed(&mut state, KeyCode::End);
    assert_eq!(drawn(&mut state, (80, 24))[22], "event 100");
    pressed(&mut state, KeyCode::Home);
    assert_eq!(drawn(&mut state, (80, 24))[1], "event 0");
    assert_eq!(pressed(&mut state, KeyCode::Esc), Some(Action::Unfollow));
    assert!(matches!(state.place, Place::Services));
}

#[test]
fn five_thousand_generations_are_drawn_to_the_last() {
    let mut state = state();
    pressed(&mut state, KeyCode::Enter);
    let sample = state.snapshot.as_mut().unwrap();
    let web = sample.services[0].info.clone();
    let members: Vec<_> = (0..5000).map(|pid| member(&web, pid + 2, pid + 1, "deep")).collect();
    sample.tree = Some(Tree {
        service: web.id,
        at: Duration::from_secs(6000),
        rows: tree::rows(&members),
        members,
        loads: HashMap::new(),
    });
    drawn(&mut state, (80, 24));
    pressed(&mut state, KeyCode::End);
    let text = drawn(&mut state, (80, 24));
    assert!(
        text[19].contains("…4999 ") && text[19].ends_with("└─ deep"),
        "{text:#?}"
    );
    assert!(text[20].starts_with(" 5000 of 5000"), "{text:#?}");
}

#[test]
fn long_lines_are_folded_between_words() {
    assert_eq!(fold("a word", 20), ["a word"]);
    assert_eq!(
        fold("one two three four five", 12),
        ["one two", "    three", "    four", "    five"]
    );
    assert_eq!(fold("abcdefghijklmnopqrst", 12), ["abcdefghijkl", "    mnopqrst"]);
}
