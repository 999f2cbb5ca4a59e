//! zinit as the first process of a pid namespace: it reaps what falls to it, and ends as init programs do.
//!
//! In a namespace of its own, "power off" and "reboot" end the namespace: the kernel kills its first process with SIGINT
//! or SIGHUP (reboot(2)). A machine that boots with zinit is another matter.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs::{self, File},
    os::unix::process::ExitStatusExt as _,
    process::{Child, Command, ExitStatus, Stdio},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use zinit_tests::{
    daemon::{Daemon, wait_for},
    survivors,
};

const FLOOD: &str = "i=0; while [ $i -lt 300 ]; do (setsid sh -c 'exit 7' &); i=$((i+1)); done; exit 42";

/// A daemon as PID 1 of a namespace; `unshare` is what the test waits for.
struct Namespace {
    daemon: Daemon,
    unshare: Child,
}

impl Namespace {
    /// `None` where the kernel cannot show a nested pid namespace.
    fn start(container: bool) -> Option<Self> {
        let daemon = Daemon::prepare(&[("web", "exec: sh -c '(setsid sleep 300 &); exec sleep 301'\n")]);
        let flood = daemon.script("flood", FLOOD);
        daemon.write("flood", &format!("exec: {flood}\noneshot: true\nafter: [web]\n"));
        Self::run(daemon, container, "").serves()
    }

    /// The daemon as PID 1, once this was done in its namespaces.
    fn run(daemon: Daemon, container: bool, before: &str) -> Self {
        let init = daemon.init(&[]);
        let arguments = init
            .get_args()
            .filter(|argument| container || *argument != "--container");
        let log = File::create(daemon.scratch().join("log")).unwrap();
        let unshare = Command::new("unshare")
            .args([
                "--fork",
                "--kill-child",
                "--pid",
                "--mount",
                "--mount-proc",
                "sh",
                "-ec",
            ])
            .arg(format!("{before}\nexec \"$@\""))
            .arg("sh")
            .arg(init.get_program())
            .args(arguments)
            .envs(init.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { daemon, unshare }
    }

    fn serves(mut self) -> Option<Self> {
        let mut ended = false;
        wait_for("the daemon answers, or cannot", || {
            ended = self.unshare.try_wait().unwrap().is_some() || self.log().contains("nothing is supervised");
            ended || self.daemon.zinit(&["list"]).status.success()
        });
        if ended {
            // Stable releases before 6.5 may have what it takes, and may not; then they must say so.
            assert!(self.log().contains("needs Linux 6.5"), "{}", self.log());
            println!("SKIPPED: this kernel cannot show a nested pid namespace");
            return None;
        }
        Some(self)
    }

    /// What is mounted in this place as the daemon sees it.
    fn mounts(&self, place: &str) -> Vec<String> {
        let init = self.init().as_raw_nonzero();
        let mounts = fs::read_to_string(format!("/proc/{init}/mountinfo")).unwrap();
        let there = mounts.lines().filter(|line| line.split(' ').nth(4) == Some(place));
        there.map(ToOwned::to_owned).collect()
    }

    /// The children of the daemon: those that it created, and orphans that fell to it.
    fn children(&self) -> Vec<String> {
        let init = self.init().as_raw_nonzero();
        let children = fs::read_to_string(format!("/proc/{init}/task/{init}/children")).unwrap();
        children.split_whitespace().map(ToOwned::to_owned).collect()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.daemon.scratch().join("log")).unwrap()
    }

    /// The daemon as it is seen from here.
    fn init(&self) -> Pid {
        let unshare = self.unshare.id();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
        Pid::from_raw(children.trim().parse().unwrap()).unwrap()
    }

    /// `init` is a child of our own child, which waits for nothing but its end.
    fn signal(&self, signal: Signal) {
        let init = pidfd_open(self.init(), PidfdFlags::empty()).unwrap();
        pidfd_send_signal(&init, signal).unwrap();
    }

    fn zombies(&self) -> usize {
        let stat = |pid: &String| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let children = self.children();
        children.iter().filter(|pid| stat(pid).contains(") Z ")).count()
    }

    /// Waits for the end; `unshare` ends as the first process of the namespace did.
    fn ends(mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the namespace ends", || {
            status = self.unshare.try_wait().unwrap();
            status.is_some()
        });
        assert_eq!(survivors(&self.daemon.marker), [], "{}", self.log());
        assert!(!self.daemon.socket().exists(), "the socket is left");
        assert!(!self.log().contains("panicked"), "{}", self.log());
        let mounts = self.log();
        let mut mounts = mounts.lines().filter(|line| line.contains("mounted"));
        assert!(mounts.all(|line| line.contains("/run")), "{}", self.log());
        status.unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if let Ok(None) = self.unshare.try_wait() {
            // The namespace goes with it.
            self.unshare.kill().unwrap();
            self.unshare.wait().unwrap();
        }
    }
}

/// The services come up, orphans are reaped, and the way of ending has the status.
fn check(container: bool, end: impl FnOnce(&Namespace), ending: Ending) {
    let Some(namespace) = Namespace::start(container) else {
        return;
    };
    namespace.daemon.wait_for_state("flood", "Error(exited 42)");
    namespace.daemon.wait_for_state("web", "Running");
    wait_for("all orphans are reaped", || namespace.zombies() == 0);
    end(&namespace);
    let status = namespace.ends();
    let ended = (status.code(), status.signal());
    assert_eq!(
        ended,
        match ending {
            Ending::PoweredOff => (None, Some(2)),
            Ending::Rebooted => (None, Some(1)),
            Ending::Exited => (Some(0), None),
        }
    );
}

/// How the first process of a namespace ends.
enum Ending {
    PoweredOff,
    Rebooted,
    Exited,
}

#[test]
fn sigterm_powers_off() {
    check(false, |namespace| namespace.signal(Signal::TERM), Ending::PoweredOff);
}

#[test]
fn sigusr2_powers_off() {
    check(false, |namespace| namespace.signal(Signal::USR2), Ending::PoweredOff);
}

#[test]
fn ctrl_alt_del_reboots() {
    check(false, |namespace| namespace.signal(Signal::INT), Ending::Rebooted);
}

#[test]
fn the_shutdown_command_powers_off() {
    check(
        false,
        |namespace| namespace.daemon.does(&["shutdown"]),
        Ending::PoweredOff,
    );
}

#[test]
fn the_reboot_command_reboots() {
    check(false, |namespace| namespace.daemon.does(&["reboot"]), Ending::Rebooted);
}

#[test]
fn an_upgrade_keeps_pid_1_and_what_it_has_to_do() {
    let upgraded = |namespace: &Namespace| {
        let daemon = &namespace.daemon;
        let (pid, init) = (daemon.pid("web"), namespace.init());
        for round in 1..=3 {
            // What the upgrade tries and what it leaves is reaped like anything else.
            assert!(daemon.prints(&["upgrade"]).starts_with("zinit "), "{}", namespace.log());
            let info = daemon.call("system_info", &serde_json::json!([]));
            assert_eq!((&info["pid"], &info["upgrades"]), (&1.into(), &round.into()));
        }
        assert_eq!((daemon.pid("web"), namespace.init()), (pid, init));
        daemon.does(&["start", "flood"]);
        daemon.wait_for_state("flood", "Error(exited 42)");
        wait_for("all orphans are reaped", || namespace.zombies() == 0);
        namespace.signal(Signal::TERM);
    };
    check(false, upgraded, Ending::PoweredOff);
}

#[test]
fn a_container_ends_with_status_0() {
    check(true, |namespace| namespace.signal(Signal::INT), Ending::Exited);
}

#[test]
fn run_is_a_tmpfs_unless_something_is_mounted_there() {
    let daemon = || Daemon::prepare(&[]);
    let bare = "while umount -l /run 2>&-; do :; done";
    let Some(namespace) = Namespace::run(daemon(), false, bare).serves() else {
        return;
    };
    let mounts = namespace.mounts("/run");
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    for word in ["tmpfs", "nosuid", "nodev", "mode=755"] {
        assert!(mounts[0].contains(word), "{mounts:?}");
    }
    namespace.signal(Signal::TERM);
    namespace.ends();
    // A part of the same file system is something, too.
    let taken = format!("{bare}; mount --bind /run /run");
    let Some(namespace) = Namespace::run(daemon(), false, &taken).serves() else {
        return;
    };
    let mounts = namespace.mounts("/run");
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    assert!(!mounts[0].contains("mode=755"), "{mounts:?}");
    namespace.signal(Signal::TERM);
    namespace.ends();
}

#[test]
fn without_a_directory_of_services_it_starts_without_services() {
    let daemon = Daemon::prepare(&[]);
    fs::remove_dir(daemon.config()).unwrap();
    let Some(namespace) = Namespace::run(daemon, false, "").serves() else {
        return;
    };
    assert!(
        namespace.log().contains("starting without services"),
        "{}",
        namespace.log()
    );
    fs::create_dir(namespace.daemon.config()).unwrap();
    namespace.daemon.write("late", "exec: sleep 300\n");
    assert!(namespace.daemon.zinit(&["reload"]).status.success());
    namespace.daemon.wait_for_state("late", "Running");
    namespace.signal(Signal::TERM);
    namespace.ends();
}

/// PID 1 that cannot begin: something is in the place of its socket. It goes on, reaps, and obeys.
#[test]
fn who_cannot_begin_reaps_and_can_be_ended() {
    for (signal, ended) in [(Signal::INT, 1), (Signal::TERM, 2)] {
        let daemon = Daemon::prepare(&[]);
        fs::create_dir(daemon.socket()).unwrap();
        let orphans = "(for i in 1 2 3 4 5; do (setsid sh -c 'exit 7' &); done; exec sleep 0.1) &";
        let mut namespace = Namespace::run(daemon, false, orphans);
        wait_for("the daemon holds", || namespace.log().contains("nothing is supervised"));
        wait_for("all orphans are reaped", || namespace.children().is_empty());
        assert!(namespace.unshare.try_wait().unwrap().is_none(), "{}", namespace.log());
        fs::remove_dir(namespace.daemon.socket()).unwrap();
        namespace.signal(signal);
        let status = namespace.ends();
        assert_eq!(status.signal(), Some(ended), "{status}");
    }
}

/// A console that takes nothing: the daemon starts, serves, and ends all the same.
#[test]
fn a_stderr_that_nobody_reads_holds_up_nothing() {
    let mut daemon = Daemon::prepare(&[("web", "exec: sleep 300\n")]);
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    // Full from the beginning.
    rustix::fs::fcntl_setfl(&writer, rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&writer, rustix::fs::OFlags::empty()).unwrap();
    let mut command = daemon.init(&[]);
    command.env("RUST_LOG", "trace");
    daemon.run_with_stderr(command, writer.into());
    daemon.wait_for_state("web", "Running");
    daemon.does(&["restart", "web"]);
    daemon.shutdown();
    drop(reader);
}

const AT_ONCE: usize = 5000;

#[test]
fn orphans_that_die_at_once_are_all_reaped() {
    let daemon = Daemon::prepare(&[]);
    let fifo = daemon.scratch().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    // With both ends: who opens it to read is not kept waiting, and none reads its end before this one is closed.
    let end = File::options().read(true).write(true).open(&fifo).unwrap();
    let orphans = daemon.script(
        "orphans",
        &format!(
            "i=0; while [ $i -lt {AT_ONCE} ]; do (read x <{} 2>&-) & i=$((i+1)); done; exit 42",
            fifo.display()
        ),
    );
    daemon.write("orphans", &format!("exec: {orphans}\noneshot: true\n"));
    let Some(namespace) = Namespace::run(daemon, false, "").serves() else {
        return;
    };
    namespace.daemon.wait_for_state("orphans", "Error(exited 42)");
    wait_for("the orphans are its children", || namespace.children().len() >= AT_ONCE);
    drop(end);
    wait_for("all orphans are reaped", || {
        // One that opens it only now waits for whoever writes.
        drop(File::options().read(true).write(true).open(&fifo).unwrap());
        namespace.children().is_empty()
    });
    namespace.signal(Signal::TERM);
    namespace.ends();
}
