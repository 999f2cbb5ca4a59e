//! systemd, as the first process of namespaces of its own.

use std::{
    fs::{self, File},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns};
use rustix::process::Signal;
use tempfile::TempDir;
use zinit_tests::namespaces::Namespaces;

use super::fifo::Fifo;
use crate::load::Load;

/// Its name in the table.
pub(crate) const SYSTEMD: &str = "systemd";

const PROGRAM: &str = "/lib/systemd/systemd";

/// In the new root: `$1` has the services and the FIFO. The first byte says that systemd is executed now.
const SCRIPT: &str = r#"
mkdir -p mnt/bench run/systemd/system && mount --bind "$1" mnt/bench
# The kernel kills whole cgroups of version 2 only.
mount -t cgroup2 cgroup sys/fs/cgroup
cp mnt/bench/units/* run/systemd/system/
export container=test
printf x >mnt/bench/fifo
exec chroot . /lib/systemd/systemd --unit=bench.target --log-target=null
"#;

/// What all the units are there for, and nothing else.
const TARGET: &str = "[Unit]\nDefaultDependencies=no\nAllowIsolate=yes\n";

/// A systemd, all of whose services run.
pub(crate) struct Systemd {
    namespaces: Namespaces,
    fifo: Fifo,
    /// From its execution until the program of the last service runs.
    pub(crate) took: Duration,
    _directory: TempDir,
}

impl Systemd {
    /// Why it is not here, if it is not.
    pub(crate) fn missing() -> Option<String> {
        (!Path::new(PROGRAM).exists()).then(|| "systemd is not installed".to_owned())
    }

    /// Starts it with so many services `s0`, `s1` …, each of which runs the subject with these arguments, and waits until the program of
    /// each runs. They are killed at once when they are stopped if that is asked for.
    pub(crate) fn start(load: &Load, count: usize, arguments: &str, kill: bool) -> Result<Self> {
        let directory = TempDir::new_in("/var/tmp")?;
        let path = directory.path();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        let fifo = Fifo::new_in(path)?;
        fs::copy(&load.subject, path.join("subject")).context("failed to copy the subject")?;
        fs::create_dir(path.join("units"))?;
        let signal = if kill { "KillSignal=SIGKILL\n" } else { "" };
        let service = format!(
            "[Unit]\nDefaultDependencies=no\nStartLimitIntervalSec=0\n[Service]\nExecStart=/mnt/bench/subject {arguments}\n\
             Environment={}=/mnt/bench/fifo {}={}\nStandardOutput=null\n{signal}",
            Fifo::ENV,
            zinit_tests::Marker::ENV,
            load.marker.as_str(),
        );
        let mut target = TARGET.to_owned();
        for number in 0..count {
            let name = format!("s{number}.service");
            fs::write(path.join("units").join(&name), &service)?;
            target += &format!("Wants={name}\n");
        }
        fs::write(path.join("units/bench.target"), target)?;
        let mut namespaces = Namespaces::start(SCRIPT, [path]);
        let mut running = || {
            ensure!(namespaces.is_running(), "systemd has ended: {}", namespaces.log());
            Ok(())
        };
        fifo.wait_for(1, &mut running)?;
        let began = Instant::now();
        fifo.wait_for(count, &mut running)?;
        Ok(Self {
            took: began.elapsed(),
            namespaces,
            fifo,
            _directory: directory,
        })
    }

    /// Runs `systemctl` with these arguments, which enters the namespaces by itself: a program that does would take longer to start
    /// than it.
    fn systemctl(&self, arguments: &[&str]) -> Result<()> {
        let init = self.namespaces.init().context("systemd has ended")?.as_raw_nonzero();
        let inside = |name: &str| File::open(format!("/proc/{init}/{name}"));
        let (mount, pid, root) = (inside("ns/mnt")?, inside("ns/pid")?, inside("root")?);
        let outside = File::open("/proc/self/ns/pid")?;
        let mut command = Command::new("/bin/systemctl");
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
        // SAFETY: system calls only, of what was opened before.
        unsafe {
            command.pre_exec(move || {
                setns(&mount, CloneFlags::CLONE_NEWNS)?;
                nix::unistd::fchdir(&root)?;
                nix::unistd::chroot(".")?;
                Ok(())
            })
        };
        // systemd answers nobody whose pid it cannot see.
        setns(&pid, CloneFlags::CLONE_NEWPID).context("failed to enter a pid namespace")?;
        let child = command.spawn();
        setns(&outside, CloneFlags::CLONE_NEWPID).context("failed to leave a pid namespace")?;
        let status = child?.wait()?;
        ensure!(
            status.success(),
            "systemctl {} failed: {status}{}",
            arguments.join(" "),
            self.namespaces.log()
        );
        Ok(())
    }

    /// How long it takes to stop the only service, until the command has ended and every process of the service has, too.
    pub(crate) fn stop(&self) -> Result<Duration> {
        let began = Instant::now();
        let stopped = self.systemctl(&["stop", "s0.service"]);
        self.fifo.wait_until_closed()?;
        let took = began.elapsed();
        stopped.map(|()| took)
    }

    /// Starts the only service.
    pub(crate) fn start_again(&self) -> Result<()> {
        self.systemctl(&["start", "s0.service"])?;
        self.fifo.wait_for(1, || Ok(()))
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // All that is in its namespaces goes with it.
        if self.namespaces.init().is_some() {
            self.namespaces.signal(Signal::KILL);
            self.namespaces.ends();
        }
    }
}
