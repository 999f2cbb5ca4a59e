//! The processes that others are measured with, and the tracker that tracks them.

use std::{
    fs::{self, File},
    io::Write as _,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    sys::wait::{Id, WaitPidFlag, WaitStatus, waitid},
    unistd::Pid,
};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::{process::Child, runtime::Runtime};
use zinit_tests::{Cleanup, Marker, Ready, TestCgroup, sandbox::PinDir};
use zinit_tracker::{Config, Level, Pins, Service, Tracker};

/// What all rows measure with.
pub(crate) struct Load {
    /// Fewer rounds and smaller sizes.
    pub(crate) quick: bool,
    /// Runs what is asynchronous, in the thread that measures.
    pub(crate) runtime: Runtime,
    /// The program that processes run: `tests/subject`.
    pub(crate) subject: PathBuf,
    /// Where other supervisors were installed.
    pub(crate) peers: PathBuf,
    /// What all processes carry that this measures with.
    pub(crate) marker: Marker,
    _cleanup: Cleanup,
}

impl Load {
    pub(crate) fn new(subject: &Path, peers: &Path, quick: bool) -> Result<Self> {
        let subject = fs::canonicalize(subject).with_context(|| format!("there is no {}", subject.display()))?;
        // Orphans are reaped between two rounds, by whoever measures.
        nix::sys::prctl::set_child_subreaper(true).context("failed to become a subreaper")?;
        let marker = Marker::new();
        Ok(Self {
            quick,
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build()?,
            subject,
            peers: peers.to_owned(),
            _cleanup: Cleanup::new(&marker),
            marker,
        })
    }

    /// One or the other, as a quick run was asked for or a whole one.
    pub(crate) fn pick<T>(&self, quick: T, whole: T) -> T {
        if self.quick { quick } else { whole }
    }

    /// A command that runs the subject.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.subject);
        command
            .args(arguments)
            .env(Marker::ENV, self.marker.as_str())
            .stdin(Stdio::null());
        command
    }

    /// A tree of so many processes in sessions of their own below one more, as members of a service.
    pub(crate) fn tracked_sessions(&self, tracker: &Tracker, count: usize) -> Result<(Service, Child)> {
        let mut ready = Ready::new()?;
        let mut command = self.command(&["sessions", &count.to_string()]);
        ready.attach(&mut command);
        let service = tracker.register("sessions")?;
        let _runtime = self.runtime.enter();
        let child = tracker.spawn(&service, &mut command.into())?;
        ready.wait()?;
        Ok((service, child))
    }

    /// The same in a cgroup.
    pub(crate) fn sessions_in(&self, cgroup: &Path, count: usize) -> Result<std::process::Child> {
        let mut ready = Ready::new()?;
        let mut command = Command::new("sh");
        command
            .args(["-ec", "echo 0 >\"$1/cgroup.procs\"; shift; exec \"$@\"", "sh"])
            .arg(cgroup)
            .arg(&self.subject)
            .args(["sessions", &count.to_string()])
            .env(Marker::ENV, self.marker.as_str())
            .stdin(Stdio::null());
        let child = ready.attach(&mut command).spawn()?;
        ready.wait()?;
        Ok(child)
    }

    /// Reaps the dead, which have been given to this process: as zombies they would slow down what comes next.
    pub(crate) fn reap(&self) -> Result<()> {
        loop {
            match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("failed to reap"),
            }
        }
    }
}

/// A tracker with pins of its own.
pub(crate) struct Open {
    pub(crate) tracker: Tracker,
    pub(crate) pins: PinDir,
}

impl Open {
    /// Loads the programs; `None`: with room for as many processes as by default.
    pub(crate) fn load(max_processes: Option<u32>) -> Result<Self> {
        let pins = PinDir::new();
        let config = Config {
            max_processes,
            ..config(pins.path())
        };
        let tracker = Tracker::open(&config)?;
        Ok(Self { tracker, pins })
    }

    /// Removes what was loaded.
    pub(crate) fn close(self) -> Result<()> {
        ensure!(self.tracker.close()?, "somebody else uses the pins of this run");
        Ok(())
    }
}

pub(crate) fn config(pins: &Path) -> Config {
    Config {
        level: Level::Ebpf,
        pins: Pins::Shared(pins.to_owned()),
        instance: "bench".to_owned(),
        ..Config::default()
    }
}

/// Removes pins that a process has left which did not come to remove them.
pub(crate) fn remove_pins_of(pid: u32) {
    let prefix = Marker::every_of(pid);
    for entry in fs::read_dir("/sys/fs/bpf").into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix.as_str())
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            eprintln!("failed to remove {}: {error}", entry.path().display());
        }
    }
}

/// A cgroup of version 2, and what tells whether somebody is in it.
pub(crate) struct Cgroup {
    directory: TestCgroup,
    events: File,
}

impl Cgroup {
    /// `None`: there is no version 2, or its kernel cannot kill (before 5.14).
    pub(crate) fn new(marker: &Marker) -> Result<Option<Self>> {
        let Some(directory) = TestCgroup::new(marker.as_str())? else {
            return Ok(None);
        };
        fs::create_dir(directory.path()).context("failed to create a cgroup")?;
        if !directory.path().join("cgroup.kill").exists() {
            return Ok(None);
        }
        let events = File::open(directory.path().join("cgroup.events"))?;
        Ok(Some(Self { directory, events }))
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Kills all, and waits until nobody is left.
    pub(crate) fn kill(&self) -> Result<()> {
        File::options()
            .write(true)
            .open(self.path().join("cgroup.kill"))?
            .write_all(b"1")?;
        let mut events = [0; 256];
        loop {
            let length = rustix::io::pread(&self.events, &mut events, 0)?;
            if events[..length].starts_with(b"populated 0") {
                return Ok(());
            }
            poll(
                &mut [PollFd::from_borrowed_fd(self.events.as_fd(), PollFlags::PRI)],
                None,
            )?;
        }
    }
}

/// Keeps this thread, and the processes that it creates, to one processor.
pub(crate) struct Pinned(CpuSet);

impl Pinned {
    pub(crate) fn to_one_cpu() -> Result<Self> {
        let before = sched_getaffinity(Pid::from_raw(0))?;
        let last = (0..CpuSet::count()).rev().find(|cpu| before.is_set(*cpu) == Ok(true));
        let Some(last) = last else {
            bail!("this process may run nowhere");
        };
        let mut one = CpuSet::new();
        one.set(last)?;
        sched_setaffinity(Pid::from_raw(0), &one)?;
        Ok(Self(before))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(Pid::from_raw(0), &self.0) {
            eprintln!("failed to run on all processors again: {error}");
        }
    }
}
