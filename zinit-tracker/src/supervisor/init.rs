//! Duties of PID 1, and what other supervisors share of them: mounts, orphans, signals, and the last system call.
//!
//! As PID 1 outside a container, signals mean what the conventions of init programs have them mean:
//!
//! | signal | sent by | meaning |
//! |---|---|---|
//! | SIGINT | the kernel for Ctrl-Alt-Del | reboot |
//! | SIGTERM | anyone; BusyBox has it reboot, systemd re-execute | power off |
//! | SIGUSR1, SIGUSR2 | BusyBox halt(8), poweroff(8) | power off |
//! | SIGPWR | power failure daemons, `lxc-stop` | power off |
//! | SIGRTMIN+3, SIGRTMIN+4 | systemd's halt and poweroff, container managers | power off |
//! | SIGRTMIN+5 | systemd's reboot | reboot |
//!
//! In a container all of them shut down. A supervisor that is not PID 1 shuts down on SIGTERM and SIGINT. Only PID 1 outside
//! a container powers off or reboots the machine; others end.

use std::{
    env, fs, io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{Arc, atomic::AtomicBool, mpsc::channel},
    thread,
    time::Duration,
};

use nix::sys::signal::SigSet;
use rustix::{
    fs::{AtFlags, StatxAttributes, StatxFlags},
    mount::{MountFlags, mount},
    system::{RebootCommand, reboot},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

use super::handle::Finished;
use crate::process::zombie;

/// File systems that a machine needs: where, of which type.
const FILE_SYSTEMS: [(&str, &str); 6] = [
    ("/proc", "proc"),
    ("/sys", "sysfs"),
    ("/dev", "devtmpfs"),
    ("/run", "tmpfs"),
    ("/sys/fs/cgroup", "cgroup2"),
    ("/sys/fs/bpf", "bpf"),
];

/// How long the end waits for the disks.
const SYNC: Duration = Duration::from_secs(30);

/// The usual places of programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Whether this process is the first of its pid namespace.
#[must_use]
pub fn is_pid_1() -> bool {
    std::process::id() == 1
}

/// What services get for a `PATH` if nobody sets one: the kernel gives none to PID 1. `None` if this process has its own.
#[must_use]
pub fn missing_path() -> Option<&'static str> {
    (is_pid_1() && env::var_os("PATH").is_none()).then_some(PATH)
}

/// Lets this process have as many descriptors as it may; services get what it had when this was called first.
pub fn raise_descriptor_limit() {
    super::command::raise_descriptor_limit();
}

/// Blocks all signals in the calling thread, and in those that it creates from now on. Launched services start with none blocked.
pub fn block_signals() {
    if let Err(error) = SigSet::all().thread_block() {
        tracing::warn!(%error, "signals stay as they are");
    }
}

/// Lets the calling thread receive signals, once there are handlers: those included that came while all were blocked.
pub fn unblock_signals() {
    if let Err(error) = SigSet::all().thread_unblock() {
        tracing::warn!(%error, "signals stay blocked");
    }
}

/// Takes up the duties: orphans of services fall to this process, and as PID 1 outside a container the file systems are
/// mounted where nothing is, and Ctrl-Alt-Del becomes a signal.
///
/// What fails is reported: a machine without one of these may still be of use.
pub fn take_duty(container: bool) {
    if let Err(error) = rustix::process::set_child_subreaper(Some(rustix::process::getpid())) {
        tracing::warn!(%error, "orphans will not fall to this process");
    }
    if !is_pid_1() || container {
        return;
    }
    for (path, kind) in FILE_SYSTEMS {
        if let Err(error) = mount_if_missing(path, kind) {
            tracing::warn!(path, kind, %error, "failed to mount");
        }
    }
    if let Err(error) = reboot(RebootCommand::CadOff) {
        tracing::warn!(%error, "Ctrl-Alt-Del restarts the machine at once");
    }
}

fn mount_if_missing(path: &str, kind: &str) -> io::Result<()> {
    if !Path::new(path).exists() {
        fs::create_dir_all(path)?;
    }
    if is_mount_point(Path::new(path))? {
        return Ok(());
    }
    let (flags, data) = match kind {
        "devtmpfs" => (MountFlags::NOSUID, None),
        // Its own default is that everybody may write to it.
        "tmpfs" => (MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=0755")),
        _ => (MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None),
    };
    mount(kind, path, kind, flags, data)?;
    tracing::info!(path, kind, "mounted");
    Ok(())
}

/// Whether something is mounted here. Linux 5.8 says so; before, a part of the same file system is taken for none.
fn is_mount_point(path: &Path) -> io::Result<bool> {
    let stat = rustix::fs::statx(rustix::fs::CWD, path, AtFlags::empty(), StatxFlags::BASIC_STATS)?;
    if stat.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT) {
        return Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    }
    let Some(parent) = path.parent() else {
        return Ok(true);
    };
    Ok(fs::metadata(path)?.dev() != fs::metadata(parent)?.dev())
}

/// Signals that ask for the end.
#[derive(Debug)]
pub struct Signals {
    asked: mpsc::UnboundedReceiver<Finished>,
    /// Set by the handler itself, before anybody else knows.
    came: Arc<AtomicBool>,
}

impl Signals {
    /// Listens from now on. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When a signal cannot be handled.
    pub fn listen(container: bool) -> io::Result<Self> {
        let (sender, asked) = mpsc::unbounded_channel();
        let came = Arc::new(AtomicBool::new(false));
        for (kind, finished) in meanings(is_pid_1(), container) {
            signal_hook::flag::register(kind.as_raw_value(), Arc::clone(&came))?;
            let mut signals = signal(kind)?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    tracing::info!(signal = kind.as_raw_value(), ?finished, "asked to end");
                    if sender.send(finished).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self { asked, came })
    }

    /// Is true from when the first one came, also if nobody has heard of it yet.
    #[must_use]
    pub fn came(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.came)
    }

    /// The next one. Cancel-safe.
    pub async fn next(&mut self) -> Finished {
        match self.asked.recv().await {
            Some(finished) => finished,
            // Those who listen do so as long as the runtime lives.
            None => std::future::pending().await,
        }
    }
}

fn meanings(pid_1: bool, container: bool) -> Vec<(SignalKind, Finished)> {
    let reboot = if container {
        Finished::PowerOff
    } else {
        Finished::Reboot
    };
    if !pid_1 {
        return vec![
            (SignalKind::terminate(), Finished::PowerOff),
            (SignalKind::interrupt(), Finished::PowerOff),
        ];
    }
    let realtime = |offset| SignalKind::from_raw(libc::SIGRTMIN() + offset);
    vec![
        (SignalKind::interrupt(), reboot),
        (SignalKind::terminate(), Finished::PowerOff),
        (SignalKind::user_defined1(), Finished::PowerOff),
        (SignalKind::user_defined2(), Finished::PowerOff),
        (SignalKind::from_raw(libc::SIGPWR), Finished::PowerOff),
        (realtime(3), Finished::PowerOff),
        (realtime(4), Finished::PowerOff),
        (realtime(5), reboot),
    ]
}

/// The end, once [`Supervisor::finished`](super::Supervisor::finished) says so: writes what is cached to the disks, for 30 s at
/// most; as PID 1 outside a container, powers off or reboots. Returns only if this process is to exit with status 0.
///
/// PID 1 must not exit: if the kernel refuses, it goes on reaping.
pub fn end(finished: Finished, container: bool) {
    if !is_pid_1() || container {
        sync();
        return;
    }
    leave(finished);
    hold();
}

/// Writes what is cached to the disks, and powers off or reboots. Returns if the kernel refuses.
fn leave(finished: Finished) {
    sync();
    let command = match finished {
        Finished::PowerOff => RebootCommand::PowerOff,
        Finished::Reboot => RebootCommand::Restart,
    };
    if let Err(error) = reboot(command) {
        tracing::error!(%error, ?finished, "the kernel refuses");
    }
}

/// A disk or server that does not answer must not keep the machine from ending.
fn sync() {
    if !in_time(SYNC, rustix::fs::sync) {
        tracing::error!(limit = ?SYNC, "going on although not everything is written to the disks");
    }
}

/// Runs it on a thread of its own, or here if there is none to be had. Whether it was through in time.
fn in_time(limit: Duration, operation: fn()) -> bool {
    let (done, waiting) = channel();
    let spawned = thread::Builder::new().spawn(move || {
        operation();
        if done.send(()).is_err() {
            tracing::debug!("nobody waits for it any more");
        }
    });
    match spawned {
        Ok(_) => waiting.recv_timeout(limit).is_ok(),
        Err(_) => {
            operation();
            true
        }
    }
}

/// For PID 1 when all else has failed: reaps, and does not return. The signals that ask for the end power off or reboot at
/// once.
pub fn hold() -> ! {
    let meanings = meanings(true, false);
    let asking = meanings.iter().map(|(kind, _)| kind.as_raw_value());
    match signal_hook::iterator::Signals::new(asking.chain([libc::SIGCHLD])) {
        Ok(mut signals) => {
            unblock_signals();
            reap();
            for signal in signals.forever() {
                reap();
                let meaning = meanings.iter().find(|(kind, _)| kind.as_raw_value() == signal);
                if let Some((_, finished)) = meaning {
                    leave(*finished);
                }
            }
        }
        Err(error) => {
            tracing::error!(%error, "signals cannot be handled");
            if let Err(error) = reboot(RebootCommand::CadOn) {
                tracing::error!(%error, "Ctrl-Alt-Del does nothing");
            }
        }
    }
    loop {
        reap();
        thread::sleep(Duration::from_secs(1));
    }
}

/// Takes away all dead children.
fn reap() {
    loop {
        match zombie::peek().and_then(|pid| pid.map(zombie::reap).transpose()) {
            Ok(Some(_)) => {}
            Ok(None) => return,
            Err(error) => return tracing::error!(%error, "failed to reap"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pid_1_outside_a_container_reboots() {
        let reboots = |pid_1, container| {
            let meanings = meanings(pid_1, container);
            meanings
                .iter()
                .filter(|(_, finished)| *finished == Finished::Reboot)
                .count()
        };
        assert_eq!(
            (reboots(true, false), reboots(true, true), reboots(false, false)),
            (2, 0, 0)
        );
    }

    #[test]
    fn a_mount_point_is_told_from_a_directory() {
        assert!(is_mount_point(Path::new("/proc")).unwrap());
        assert!(!is_mount_point(Path::new("/proc/self")).unwrap());
        assert!(is_mount_point(Path::new("/")).unwrap());
    }

    #[test]
    fn what_takes_for_ever_is_not_waited_for() {
        assert!(in_time(Duration::from_secs(60), || {}));
        assert!(!in_time(Duration::from_millis(1), || loop {
            thread::park();
        }));
    }
}
