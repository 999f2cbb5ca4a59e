//! `zinit-tracker top` in a real terminal, against what `/proc` says.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeSet, fs, process::Command};

use nix::unistd::getsid;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use zinit_tests::{
    Marker,
    daemon::wait_for,
    members,
    sandbox::{Played, Sandbox},
    survivors,
    terminal::Terminal,
    tool,
};
use zinit_tracker::StopPolicy;

/// Runs `top`; its pid, its status and the terminal's settings before and after are in files.
fn top(sandbox: &Sandbox, (columns, lines): (u16, u16)) -> Terminal {
    let script = format!(
        "stty -g >$DIR/before; sh -c 'echo $$ >$DIR/pid; exec \"$0\" --pins \"$1\" top' {} {}; \
         echo $? >$DIR/status; stty -g >$DIR/after; touch $DIR/done; exec sleep 300",
        tool().display(),
        sandbox.pins().display()
    );
    let terminal = Terminal::run(columns, lines, &script);
    terminal.shows("zinit-tracker top");
    terminal
}

fn pids(marker: &Marker) -> BTreeSet<u32> {
    members(marker)
        .iter()
        .map(|member| member.pid.cast_unsigned())
        .collect()
}

/// The words of the line that begins with this one.
fn line_of(screen: &str, first: &str) -> Option<Vec<String>> {
    let mut lines = screen
        .lines()
        .map(|line| line.split_whitespace().map(ToOwned::to_owned));
    lines.find_map(|mut words| (words.next()? == first).then(|| words.collect()))
}

/// Whether a service is shown with so many processes.
fn counts(screen: &str, played: &Played, count: usize) -> bool {
    let name = format!("test/{}", played.service.name());
    line_of(screen, &name).is_some_and(|words| words[0] == count.to_string())
}

/// Chooses a service by its name.
fn choose(terminal: &Terminal, name: &str) {
    terminal.press(&["/"]);
    terminal.type_in(name);
    terminal.press(&["Enter"]);
    let only = format!("only \"{name}\"");
    terminal.wait_for(&only, |screen| {
        screen.contains(&only) && screen.contains(&format!(" test/{name}:"))
    });
}

/// Waits for the end of `top`, which must leave the terminal as it was.
fn assert_ends_well(terminal: &Terminal, status: &str) {
    wait_for("top ends", || terminal.file("done").exists());
    let read = |name: &str| fs::read_to_string(terminal.file(name)).unwrap();
    assert_eq!(read("status").trim(), status, "{}", terminal.screen());
    assert_eq!(read("before"), read("after"), "the settings of the terminal");
    assert!(!terminal.is_alternate(), "{}", terminal.screen());
    assert!(!terminal.screen().contains("panicked"), "{}", terminal.screen());
}

fn quit(terminal: &Terminal) {
    terminal.press(&["q"]);
    assert_ends_well(terminal, "0");
}

async fn end(sandbox: Sandbox, played: impl IntoIterator<Item = Played>) {
    for mut played in played {
        sandbox.stop(&mut played, &StopPolicy::default()).await;
    }
    sandbox.close();
}

#[tokio::test]
async fn the_overview_counts_as_proc_does_on_small_and_large_terminals() {
    let sandbox = Sandbox::new();
    let played = [
        sandbox.play("chain", ["9"]),
        sandbox.play("double-fork", [""; 0]),
        sandbox.play("sessions", ["23"]),
    ];
    let there: Vec<_> = played.iter().map(|played| pids(&played.marker).len()).collect();
    let all: usize = there.iter().sum();
    for size in [(80, 24), (200, 50)] {
        let terminal = top(&sandbox, size);
        let screen = terminal.wait_for("all services are counted", |screen| {
            played
                .iter()
                .zip(&there)
                .all(|(played, count)| counts(screen, played, *count))
        });
        assert_eq!(line_of(&screen, "TOTAL").unwrap()[0], all.to_string(), "{screen}");
        let sessions = line_of(&screen, "test/sessions").unwrap();
        assert_eq!(sessions[sessions.len() - 2..], ["ebpf", "yes"], "{screen}");
        quit(&terminal);
    }
    end(sandbox, played).await;
}

#[tokio::test]
async fn who_has_escaped_is_marked_and_why() {
    let sandbox = Sandbox::new();
    let played = [sandbox.play("setsid", [""; 0]), sandbox.play("double-fork", [""; 0])];
    let terminal = top(&sandbox, (80, 24));
    for played in &played {
        choose(&terminal, played.service.name());
        terminal.press(&["Enter"]);
        let main = played.child.id().unwrap();
        let session_of = |pid: u32| getsid(Some(nix::unistd::Pid::from_raw(pid.cast_signed()))).unwrap();
        let all = pids(&played.marker);
        let marked = |screen: &str, pid: u32| {
            line_of(screen, &pid.to_string()).is_some_and(|words| words.iter().any(|word| word.starts_with("session")))
        };
        let has_left = |pid: u32| session_of(pid) != session_of(main);
        assert!(all.iter().any(|pid| has_left(*pid)), "it should be an escape");
        let screen = terminal.wait_for("the escapes are marked", |screen| {
            !screen.contains("looking for escapes")
                && all.iter().all(|pid| line_of(screen, &pid.to_string()).is_some())
                && all.iter().any(|pid| marked(screen, *pid))
        });
        for pid in &all {
            assert_eq!(marked(&screen, *pid), has_left(*pid), "{pid}: {screen}");
        }
        // The daemon joined last.
        terminal.press(&["End"]);
        terminal.shows(&format!("left session {}, is in", session_of(main)));
        terminal.press(&["Escape"]);
        terminal.shows("Enter processes");
        terminal.press(&["Escape"]);
        terminal.wait_for("the filter has gone", |screen| !screen.contains("only \""));
    }
    quit(&terminal);
    end(sandbox, played).await;
}

#[tokio::test]
async fn a_stop_ends_exactly_whom_its_preview_lists() {
    let sandbox = Sandbox::new();
    let (mut stopped, other) = (sandbox.play("setsid", [""; 0]), sandbox.play("double-fork", [""; 0]));
    let before = pids(&other.marker);
    let all = pids(&stopped.marker);
    let terminal = top(&sandbox, (80, 24));
    choose(&terminal, "setsid");
    terminal.press(&["s"]);
    let screen = terminal.shows("Stop test/setsid?");
    let table = screen.lines().skip_while(|line| !line.contains("SESSION")).skip(1);
    let listed: BTreeSet<u32> = table
        .filter_map(|line| line.split_once('│')?.1.split_whitespace().next()?.parse().ok())
        .collect();
    assert_eq!(listed, all, "{screen}");
    assert!(screen.contains("may start it again"), "{screen}");

    terminal.press(&["n"]);
    terminal.wait_for("nothing is asked any more", |screen| {
        !screen.contains("Stop test/setsid?")
    });
    assert_eq!(pids(&stopped.marker), all, "no is no");

    terminal.press(&["s"]);
    terminal.shows("Stop test/setsid?");
    terminal.press(&["y"]);
    let screen = terminal.shows("service setsid is down: 2 processes ended");
    assert!(screen.contains("proven") && !screen.contains("not proven"), "{screen}");
    assert!(screen.contains("SIGTERM"), "{screen}");
    assert_eq!(survivors(&stopped.marker), []);
    assert_eq!(pids(&other.marker), before, "another service's processes");
    terminal.press(&["Escape"]);
    terminal.wait_for("it is empty", |screen| counts(screen, &stopped, 0));
    quit(&terminal);
    stopped.child.wait().await.unwrap();
    end(sandbox, [other]).await;
}

#[tokio::test]
async fn who_is_released_runs_on_outside_of_the_service() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("setsid", [""; 0]);
    let all = pids(&played.marker);
    let terminal = top(&sandbox, (80, 24));
    terminal.shows("test/setsid");
    terminal.press(&["Enter"]);
    let main = played.child.id().unwrap();
    let child = *all.iter().find(|pid| **pid != main).unwrap();
    // The main process stands first, its child below it.
    terminal.wait_for("the processes are there", |screen| {
        line_of(screen, &child.to_string()).is_some()
    });
    terminal.press(&["End", "r"]);
    terminal.shows(&format!("{child} actor and its 0 descendants leave test/setsid"));
    terminal.press(&["y"]);
    terminal.shows("Released: 1 process runs on");
    let in_service: BTreeSet<u32> = sandbox
        .tracker
        .processes(&played.service)
        .unwrap()
        .iter()
        .map(|member| member.pid)
        .collect();
    assert_eq!(in_service, BTreeSet::from([main]));
    assert_eq!(pids(&played.marker), all, "it runs on");
    terminal.press(&["Escape"]);
    terminal.wait_for("it is out of the list", |screen| screen.contains(" 1 of 1"));
    quit(&terminal);
    zinit_tests::kill_all(&played.marker, zinit_tests::sandbox::DEADLINE).unwrap();
    played.child.wait().await.unwrap();
    wait_for("it is empty", || sandbox.tracker.live(&played.service).unwrap() == 0);
    sandbox.close();
}

#[tokio::test]
async fn what_happens_is_followed() {
    let sandbox = Sandbox::new();
    let played = sandbox.play("rest", [""; 0]);
    let terminal = top(&sandbox, (80, 24));
    choose(&terminal, "rest");
    terminal.press(&["e"]);
    terminal.shows("nothing has happened yet");
    // Who comes before the reader is ready is in no event, so it is repeated.
    let mut last = None;
    wait_for("an event is shown", || {
        let mut child = sandbox
            .tracker
            .spawn(&played.service, &mut tokio::process::Command::new("true"))
            .unwrap();
        let pid = child.id().unwrap();
        wait_for("it ends", || child.try_wait().unwrap().is_some());
        last = Some(pid);
        line_with(&terminal.screen(), "exit").is_some()
    });
    let screen = terminal.wait_for("its end is shown", |screen| {
        screen
            .lines()
            .any(|line| line.contains("exited 0") && line.contains(&last.unwrap().to_string()))
    });
    assert!(screen.contains("test/rest"), "{screen}");
    terminal.press(&["Escape"]);
    terminal.shows("Enter processes");
    // Another reader may have them now.
    wait_for("the events are free", || {
        let mut events = sandbox.tool(&["events", "-f"]);
        let mut child = events.stdout(std::process::Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        child.wait().unwrap().success()
    });
    quit(&terminal);
    end(sandbox, [played]).await;
}

fn line_with<'s>(screen: &'s str, word: &str) -> Option<&'s str> {
    screen
        .lines()
        .find(|line| line.split_whitespace().any(|other| other == word))
}

#[tokio::test]
async fn the_terminal_is_given_back_after_signals_and_ctrl_c() {
    let sandbox = Sandbox::new();
    let played = sandbox.play("rest", [""; 0]);
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let terminal = top(&sandbox, (80, 24));
        terminal.shows("test/rest");
        assert!(terminal.is_alternate());
        let pid = fs::read_to_string(terminal.file("pid")).unwrap();
        // It is a child of our terminal's shell, which reaps it at its end only.
        let pidfd = pidfd_open(Pid::from_raw(pid.trim().parse().unwrap()).unwrap(), PidfdFlags::empty()).unwrap();
        pidfd_send_signal(&pidfd, signal).unwrap();
        assert_ends_well(&terminal, "0");
    }
    let terminal = top(&sandbox, (80, 24));
    terminal.shows("test/rest");
    terminal.press(&["C-c"]);
    assert_ends_well(&terminal, "0");
    end(sandbox, [played]).await;
}

#[tokio::test]
async fn it_can_be_suspended() {
    let sandbox = Sandbox::new();
    let played = sandbox.play("rest", [""; 0]);
    let terminal = Terminal::run(80, 24, "exec env PS1='ready> ' sh -i");
    terminal.shows("ready>");
    terminal.type_in(&format!("{} --pins {} top", tool().display(), sandbox.pins().display()));
    terminal.press(&["Enter"]);
    for _ in 0..2 {
        terminal.shows("test/rest");
        assert!(terminal.is_alternate());
        terminal.press(&["C-z"]);
        terminal.wait_for("the shell goes on", |screen| screen.contains("Stopped"));
        assert!(!terminal.is_alternate());
        terminal.type_in("clear; fg");
        terminal.press(&["Enter"]);
    }
    terminal.shows("test/rest");
    terminal.press(&["q"]);
    terminal.shows("ready>");
    assert!(!terminal.is_alternate());
    drop(terminal);
    end(sandbox, [played]).await;
}

#[tokio::test]
async fn a_terminal_that_is_too_small_is_told_so_until_it_grows() {
    let sandbox = Sandbox::new();
    let played = sandbox.play("rest", [""; 0]);
    let terminal = top(&sandbox, (80, 24));
    terminal.shows("test/rest");
    terminal.resize(40, 6);
    terminal.shows("The terminal has 40x6");
    terminal.resize(200, 50);
    terminal.wait_for("it is drawn again", |screen| counts(screen, &played, 1));
    quit(&terminal);
    end(sandbox, [played]).await;
}

#[tokio::test]
async fn services_come_and_go_and_so_do_the_books() {
    let sandbox = Sandbox::new();
    let terminal = top(&sandbox, (80, 24));
    terminal.shows("no service is registered");
    let mut played = sandbox.play("rest", [""; 0]);
    terminal.wait_for("it has come", |screen| counts(screen, &played, 1));
    terminal.press(&["Enter"]);
    terminal.shows("Esc back");
    sandbox.stop(&mut played, &StopPolicy::default()).await;
    sandbox.tracker.unregister(&played.service).unwrap();
    terminal.shows("no service is registered");

    let played = sandbox.play("child", [""; 0]);
    terminal.press(&["Escape"]);
    terminal.wait_for("another has come", |screen| counts(screen, &played, 2));
    // As somebody does who does not know better.
    fs::remove_dir_all(sandbox.pins()).unwrap();
    terminal.shows("the books are gone");
    quit(&terminal);
}

#[tokio::test]
async fn five_thousand_processes_scroll_to_the_end() {
    let sandbox = Sandbox::new();
    let played = sandbox.play("sessions", ["5000"]);
    let last = sandbox.tracker.processes(&played.service).unwrap().last().unwrap().pid;
    let terminal = top(&sandbox, (80, 24));
    for (columns, lines) in [(80, 24), (200, 50)] {
        terminal.resize(columns, lines);
        let screen = terminal.wait_for("all are counted", |screen| counts(screen, &played, 5001));
        println!("{screen}");
        terminal.press(&["Enter"]);
        terminal.wait_for("the first are there", |screen| {
            screen.contains(" 1 of 5001") && screen.contains("5000 escaped")
        });
        terminal.press(&["PageDown"]);
        terminal.wait_for("a page further", |screen| !screen.contains(" 1 of 5001"));
        terminal.press(&["End"]);
        let screen = terminal.wait_for("the last is looked at", |screen| {
            line_of(screen, &last.to_string()).is_some_and(|words| words[0] == "S")
        });
        println!("{screen}");
        assert!(screen.contains(" 5001 of 5001"), "{screen}");
        let shown = line_of(&screen, &last.to_string()).unwrap();
        assert!(shown.iter().any(|word| word == "session,group"), "{screen}");
        terminal.press(&["Home"]);
        terminal.wait_for("the first again", |screen| screen.contains(" 1 of 5001"));
        terminal.press(&["Escape"]);
        terminal.shows("Enter processes");
    }
    quit(&terminal);
    end(sandbox, [played]).await;
}

#[test]
fn without_a_terminal_it_says_what_to_use() {
    let output = Command::new(tool()).arg("top").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("needs a terminal") && stderr.contains("`ps`"),
        "{stderr}"
    );
    assert!(output.stdout.is_empty());
}

#[test]
fn at_level_procfs_it_says_that_nobody_else_sees_those_books() {
    let output = Command::new(tool())
        .args(["top", "--tracking", "procfs"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("level procfs"), "{stderr}");
}
