//! Listings on a terminal of their own, a pseudo-terminal: colours, and the pager; and what they are elsewhere.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::unix::fs::symlink,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
};

use nix::pty::{Winsize, openpty};
use regex::Regex;
use zinit_tests::{
    Cleanup, Marker,
    daemon::{wait_for, within},
    holds::skipped,
    sandbox::Sandbox,
};
use zinit_tracker::{StopPolicy, stop};

/// Large enough for every listing here but those that are to be too long.
const ROWS: u16 = 200;

/// The variables that listings look at; tests set them, and nobody else does.
const VARIABLES: [&str; 8] = [
    "CI",
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "COLORTERM",
    "LESS",
    "NO_COLOR",
    "PAGER",
    "RUST_LOG",
];

const CTRL_C: &str = "\u{3}";

/// A command on a terminal of its own.
struct Session {
    child: Child,
    master: File,
    shown: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
    /// A test that fails leaves the tool and its pager.
    _cleanup: Cleanup,
}

impl Session {
    fn start(command: &Command, rows: u16) -> Self {
        let size = Winsize {
            ws_row: rows,
            ws_col: 200,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(&size, None).unwrap();
        let mut setsid = Command::new("/usr/bin/setsid");
        // A session of its own, so that the keys of the terminal reach it and nobody else.
        setsid.args(["--ctty", "--wait"]);
        let slave = || Stdio::from(pty.slave.try_clone().unwrap());
        let mut wrapped = within(setsid, command);
        let marker = Marker::new();
        let cleanup = Cleanup::new(&marker);
        wrapped.env(Marker::ENV, marker.as_str());
        let child = wrapped.stdin(slave()).stdout(slave()).stderr(slave()).spawn().unwrap();
        drop((wrapped, pty.slave));
        let master = File::from(pty.master);
        let shown = Arc::new(Mutex::new(Vec::new()));
        let (mut from, to) = (master.try_clone().unwrap(), Arc::clone(&shown));
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // The last one to close the terminal makes it an error.
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                to.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        Self {
            child,
            master,
            shown,
            reader,
            _cleanup: cleanup,
        }
    }

    /// What has been shown so far, lines as they were before the terminal got them.
    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).replace("\r\n", "\n")
    }

    fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// What was shown until its end, which must be a success.
    fn end(mut self) -> String {
        let status = self.child.wait().unwrap();
        let Self { reader, shown, .. } = self;
        reader.join().unwrap();
        let shown = String::from_utf8_lossy(&shown.lock().unwrap()).replace("\r\n", "\n");
        assert!(status.success(), "{status}: {shown}");
        shown
    }
}

/// The tool, with these variables and none that the machine has.
fn command(sandbox: &Sandbox, args: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = sandbox.tool(args);
    for name in VARIABLES {
        command.env_remove(name);
    }
    command.env("TERM", "xterm").envs(variables.iter().copied());
    command
}

fn on_terminal(sandbox: &Sandbox, args: &[&str], variables: &[(&str, &str)]) -> String {
    Session::start(&command(sandbox, args, variables), ROWS).end()
}

fn in_pipe(sandbox: &Sandbox, args: &[&str], variables: &[(&str, &str)]) -> String {
    let output = command(sandbox, args, variables).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Without colours.
fn stripped(text: &str) -> String {
    Regex::new("\u{1b}\\[[0-9;]*m")
        .unwrap()
        .replace_all(text, "")
        .into_owned()
}

/// Without what differs between two calls: to a millisecond, when something was.
fn timeless(text: &str) -> String {
    Regex::new(r"[0-9]{4}-[0-9-]+T[0-9:.]+Z")
        .unwrap()
        .replace_all(text, "TIME")
        .into_owned()
}

/// A service with somebody who has left it, somebody who died badly, and a name that would colour what follows.
async fn play(sandbox: &Sandbox, marker: &Marker) -> tokio::process::Child {
    let directory = tempfile::tempdir().unwrap();
    let odd = directory.path().join("a\u{1b}[35mb");
    symlink("/bin/sleep", &odd).unwrap();
    let service = sandbox.tracker.register("web").unwrap();
    let mut command = tokio::process::Command::new("sh");
    let script = "sh -c 'exit 7'; (setsid sleep 3801 &); \"$0\" 3802 & exec sleep 3803";
    command.args(["-c", script]).arg(&odd).env(Marker::ENV, marker.as_str());
    let child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    wait_for("all sleep", || {
        let members = sandbox.tracker.processes(&service).unwrap();
        let asleep = |comm: &str| comm == "sleep" || comm.contains('\u{1b}');
        members.len() == 3 && members.iter().all(|member| asleep(&member.comm))
    });
    child
}

async fn end(sandbox: Sandbox, mut child: tokio::process::Child) {
    let service = sandbox.tracker.find("web").unwrap().handle();
    stop(&sandbox.tracker, &service, &StopPolicy::default()).await.unwrap();
    child.wait().await.unwrap();
    sandbox.close();
}

#[tokio::test]
async fn listings_have_colours_on_a_terminal_unless_they_are_unwanted_and_nowhere_else_unless_they_are_wanted() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let child = play(&sandbox, &marker).await;
    let pid = child.id().unwrap().to_string();
    let listings: [&[&str]; 6] = [
        &["ps"],
        &["tree"],
        &["escapes"],
        &["why", &pid],
        &["events"],
        &["history"],
    ];
    for args in listings {
        let plain = in_pipe(&sandbox, args, &[]);
        println!("{plain}");
        assert!(!plain.contains('\u{1b}'), "{plain:?}");
        let coloured = on_terminal(&sandbox, args, &[]);
        assert!(coloured.contains("\u{1b}["), "{args:?}: {coloured:?}");
        assert_eq!(timeless(&stripped(&coloured)), timeless(&plain), "{args:?}");

        let with = |more: &[&'static str]| [args, more].concat();
        let never = with(&["--color", "never"]);
        let always = with(&["--color", "always"]);
        for uncoloured in [
            on_terminal(&sandbox, args, &[("NO_COLOR", "1")]),
            on_terminal(&sandbox, args, &[("TERM", "dumb")]),
            on_terminal(&sandbox, &never, &[("CLICOLOR_FORCE", "1")]),
            in_pipe(&sandbox, args, &[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]),
        ] {
            assert_eq!(timeless(&uncoloured), timeless(&plain), "{args:?}");
        }
        for forced in [
            in_pipe(&sandbox, args, &[("CLICOLOR_FORCE", "1")]),
            in_pipe(&sandbox, &always, &[("NO_COLOR", "1")]),
        ] {
            assert_eq!(timeless(&forced), timeless(&coloured), "{args:?}");
        }
    }
    // Others come and go, and `diff` shows them.
    let missed = |text: &str| text.lines().find(|line| line.contains("MISSED")).unwrap().to_owned();
    let plain = in_pipe(&sandbox, &["diff", "web"], &[]);
    assert!(!plain.contains('\u{1b}'), "{plain:?}");
    let coloured = on_terminal(&sandbox, &["diff", "web", "--no-pager"], &[]);
    assert!(missed(&coloured).contains("\u{1b}[33mMISSED"), "{coloured:?}");
    assert_eq!(stripped(&missed(&coloured)), missed(&plain));

    let escapes = on_terminal(&sandbox, &["escapes"], &[]);
    assert!(escapes.contains("\u{1b}[33mleft session"), "{escapes:?}");
    let history = on_terminal(&sandbox, &["history"], &[]);
    assert!(history.contains("\u{1b}[31mexited 7"), "{history:?}");
    // Those who ended well do not stand out.
    assert!(history.contains("  exited 0  "), "{history:?}");
    end(sandbox, child).await;
}

#[tokio::test]
async fn what_a_process_calls_itself_does_not_command_the_terminal() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let child = play(&sandbox, &marker).await;
    for args in [&["ps"][..], &["tree"], &["ps", "--columns", "service,command"]] {
        let shown = on_terminal(&sandbox, &[args, &["--no-pager"]].concat(), &[]);
        assert!(shown.contains("a\\u{1b}[35mb"), "{args:?}: {shown:?}");
        assert!(!shown.contains("\u{1b}[35m"), "{args:?}: {shown:?}");
    }
    end(sandbox, child).await;
}

/// A service of which a thousand processes have ended.
async fn many_deaths(sandbox: &Sandbox) {
    let service = sandbox.tracker.register("web").unwrap();
    let mut command = tokio::process::Command::new("sh");
    command.args(["-c", "i=0; while [ $i -lt 1000 ]; do (:); i=$((i+1)); done; true"]);
    let mut child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    assert!(child.wait().await.unwrap().success());
    sandbox.tracker.wait_empty(&service).await.unwrap();
}

#[tokio::test]
async fn what_is_longer_than_the_terminal_goes_through_the_pager() {
    const HISTORY: &[&str] = &["history", "--color", "never"];
    const PAGER: (&str, &str) = ("PAGER", "sed 's/^/paged: /'");
    let sandbox = Sandbox::new();
    many_deaths(&sandbox).await;
    let plain = timeless(&in_pipe(&sandbox, HISTORY, &[PAGER]));
    assert!(!plain.contains("paged"), "{plain}");
    assert!(plain.lines().count() > 1000 && plain.len() > 65_536, "{}", plain.len());
    let shown = |args: &[&str], variables: &[(&str, &str)], rows| {
        timeless(&Session::start(&command(&sandbox, args, variables), rows).end())
    };

    let paged: String = plain.lines().map(|line| format!("paged: {line}\n")).collect();
    assert_eq!(shown(HISTORY, &[PAGER], ROWS), paged);
    assert_eq!(
        shown(&["events", "--color", "never"], &[PAGER], ROWS)
            .matches("paged: ")
            .count(),
        1001
    );
    for (variables, rows) in [
        // It fits.
        (PAGER, 2000),
        (("PAGER", ""), ROWS),
        (("PAGER", "cat"), ROWS),
    ] {
        assert_eq!(shown(HISTORY, &[variables], rows), plain, "{variables:?}");
    }
    let unwanted = [HISTORY, &["--no-pager"]].concat();
    assert_eq!(shown(&unwanted, &[PAGER], ROWS), plain);
    // Programs read JSON, not people.
    assert!(!shown(&["history", "--json"], &[PAGER], ROWS).contains("paged"));

    // Who quits early has seen enough, and the tool does not fail.
    assert_eq!(
        shown(HISTORY, &[("PAGER", "head -n 1")], ROWS),
        plain.lines().next().unwrap().to_owned() + "\n"
    );
    assert_eq!(shown(HISTORY, &[("PAGER", "exit 1")], ROWS), "");
    // One that is not there says so itself.
    let anyway = shown(HISTORY, &[("PAGER", "/nowhere/pager")], ROWS);
    assert!(
        anyway.contains("/nowhere/pager") && anyway.ends_with(&plain),
        "{anyway}"
    );
    sandbox.close();
}

#[tokio::test]
async fn the_usual_pager_is_less_which_gets_the_keys() {
    if Command::new("less")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        skipped("less cannot be run");
        return;
    }
    let sandbox = Sandbox::new();
    many_deaths(&sandbox).await;
    let mut session = Session::start(&command(&sandbox, &["history"], &[]), 24);
    let prompts = |session: &Session| session.shown().matches(":\u{1b}[K").count();
    wait_for("less asks what to do", || prompts(&session) == 1);
    let shown = session.shown();
    assert!(shown.contains("\u{1b}[2m"), "{shown:?}");
    assert!(shown.matches("exited 0").count() < 24, "{shown}");
    // It is for less, which does not end by it.
    session.press(CTRL_C);
    wait_for("less asks again", || prompts(&session) == 2);
    session.press("G");
    wait_for("the end is shown", || session.shown().contains("(END)"));
    session.press("q");
    session.end();

    // Without it, listings are as without any pager.
    let nowhere = command(&sandbox, &["history", "--color", "never"], &[("PATH", "/nowhere")]);
    let shown = Session::start(&nowhere, 24).end();
    assert_eq!(timeless(&shown), timeless(&in_pipe(&sandbox, &["history"], &[])));
    sandbox.close();
}
