//! Services whose processes leave the places where a supervisor looks for them.

use std::convert::Infallible;
use std::fs;
use std::os::fd::RawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Pid, getpid, getppid};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use rustix::process::{PidfdFlags, pidfd_open};

use crate::acks::{Acks, ack_to};
use crate::process::{Environment, Program};
use crate::{life, process, ready};

/// One process, at rest.
pub(crate) fn rest() -> Result<Infallible> {
    ready::signal()?;
    life::rest()
}

/// What the executed children of other behaviours play.
pub(crate) fn at_rest(acks: RawFd) -> Result<Infallible> {
    ack_to(acks, 0)?;
    life::rest()
}

/// Has a child that does `set_up`.
fn with_child(set_up: impl FnOnce() -> Result<()>) -> Result<Infallible> {
    let acks = Acks::new()?;
    process::fork(|| {
        set_up()?;
        acks.done()?;
        life::rest()
    })?;
    acks.wait(1)?;
    ready::signal()?;
    life::rest()
}

/// Has a child.
pub(crate) fn child() -> Result<Infallible> {
    with_child(|| Ok(()))
}

/// Has a child that leads a session.
pub(crate) fn setsid() -> Result<Infallible> {
    with_child(|| Ok(nix::unistd::setsid().map(drop)?))
}

/// Has a child that leads a process group.
pub(crate) fn setpgid() -> Result<Infallible> {
    with_child(|| Ok(nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0))?))
}

/// Has a daemon.
pub(crate) fn double_fork() -> Result<Infallible> {
    make_daemon()?;
    ready::signal()?;
    life::rest()
}

/// Has a daemon, and exits with status 0.
pub(crate) fn double_fork_orphan() -> Result<Infallible> {
    let main = pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).context("failed to open a pidfd")?;
    process::daemon(|| {
        // The daemon says that all are there, for the main process could not say that it is gone.
        retry_on_intr(|| poll(&mut [PollFd::new(&main, PollFlags::IN)], None)).context("failed to wait")?;
        ready::signal()?;
        life::rest()
    })?;
    life::exit_now(0)
}

fn make_daemon() -> Result<()> {
    let acks = Acks::new()?;
    process::daemon(|| {
        acks.done()?;
        life::rest()
    })?;
    acks.wait(1).map(drop)
}

/// Has a child, and exits with `status`.
pub(crate) fn spawn_and_exit(status: i32) -> Result<Infallible> {
    let acks = Acks::new()?;
    process::fork(|| {
        acks.done()?;
        life::rest()
    })?;
    acks.wait(1)?;
    ready::signal()?;
    life::exit_now(status)
}

/// Has `count` children in as many sessions.
pub(crate) fn sessions(count: usize) -> Result<Infallible> {
    let acks = Acks::new()?;
    for _ in 0..count {
        process::fork(|| {
            nix::unistd::setsid()?;
            acks.done()?;
            life::rest()
        })?;
    }
    acks.wait(count)?;
    ready::signal()?;
    life::rest()
}

/// Has `generations` generations of descendants, one process each.
pub(crate) fn chain(generations: usize) -> Result<Infallible> {
    fn descend(generations: usize, acks: Acks) -> Result<Infallible> {
        if generations > 0 {
            process::fork(|| descend(generations - 1, acks))?;
        }
        acks.done()?;
        life::rest()
    }

    let acks = Acks::new()?;
    if generations > 0 {
        process::fork(|| descend(generations - 1, acks))?;
    }
    acks.wait(generations)?;
    ready::signal()?;
    life::rest()
}

/// Has a child that is a subreaper and has got its orphaned grandchild, a session leader, as a child.
pub(crate) fn subreaper() -> Result<Infallible> {
    let acks = Acks::new()?;
    process::fork(|| {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let (reaper, orphaned, set_up) = (getpid(), Acks::new()?, Acks::new()?);
        let middle = process::fork(|| {
            process::fork(|| {
                nix::unistd::setsid()?;
                orphaned.wait(1)?;
                ensure!(
                    getppid() == reaper,
                    "the orphan went to {}, not to its subreaper {reaper}",
                    getppid()
                );
                set_up.done()?;
                life::rest()
            })?;
            life::exit_now(0);
        })?;
        process::wait(middle)?;
        orphaned.done()?;
        set_up.wait(1)?;
        acks.done()?;
        life::rest()
    })?;
    acks.wait(1)?;
    ready::signal()?;
    life::rest()
}

/// Loses its leading thread; another one forks a child after that.
pub(crate) fn thread_fork() -> Result<Infallible> {
    std::thread::spawn(|| {
        let Err(error) = outlive_leader().and_then(|()| child());
        ready::fail(&error);
    });
    life::exit_thread();
}

/// Waits until the leading thread of this process is a zombie. To be called by another one.
///
/// # Errors
/// Fails if that takes longer than ten seconds: no event says when it happens, so this looks again and again.
pub(crate) fn outlive_leader() -> Result<()> {
    let started = Instant::now();
    loop {
        let stat = fs::read_to_string("/proc/self/stat").context("failed to read /proc/self/stat")?;
        let (_, fields) = stat.rsplit_once(')').context("failed to understand /proc/self/stat")?;
        if fields.trim_start().starts_with('Z') {
            return Ok(());
        }
        ensure!(
            started.elapsed() < Duration::from_secs(10),
            "the leading thread did not exit"
        );
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The actor at rest, which acknowledges on the descriptor that it inherits.
fn program_at_rest(acks: Acks) -> Result<Program> {
    Program::actor(
        &["at-rest".to_owned(), acks.write_fd().to_string()],
        Environment::Inherited,
    )
}

/// Has a child created by vfork and exec.
pub(crate) fn vfork() -> Result<Infallible> {
    let acks = Acks::new()?;
    program_at_rest(acks)?.vfork().context("failed to vfork")?;
    acks.wait(1)?;
    ready::signal()?;
    life::rest()
}

/// Has a child created by posix_spawn.
pub(crate) fn posix_spawn() -> Result<Infallible> {
    let acks = Acks::new()?;
    program_at_rest(acks)?.posix_spawn().context("failed to posix_spawn")?;
    acks.wait(1)?;
    ready::signal()?;
    life::rest()
}

/// Has two children, one of which was created by the other with `CLONE_PARENT`.
pub(crate) fn clone_parent() -> Result<Infallible> {
    let (acks, grandparent) = (Acks::new()?, getpid());
    process::fork(|| {
        process::clone(libc::CLONE_PARENT, || {
            ensure!(
                getppid() == grandparent,
                "the parent is {}, not {grandparent}",
                getppid()
            );
            acks.done()?;
            life::rest()
        })?;
        acks.done()?;
        life::rest()
    })?;
    acks.wait(2)?;
    ready::signal()?;
    life::rest()
}

/// Has a child that moves itself into a new cgroup at `dir`, which whoever named it removes.
pub(crate) fn cgroup_move(dir: &str) -> Result<Infallible> {
    with_child(|| move_to_cgroup(dir))
}

/// Has a child that is the first process of a pid namespace, with two children there, one in a session of its own.
pub(crate) fn pid_namespace() -> Result<Infallible> {
    unshare(CloneFlags::CLONE_NEWPID).context("failed to create a pid namespace")?;
    let acks = Acks::new()?;
    process::fork(|| {
        ensure!(
            getpid() == Pid::from_raw(1),
            "the first process of a pid namespace has pid {}",
            getpid()
        );
        for leads_session in [false, true] {
            process::fork(|| {
                if leads_session {
                    nix::unistd::setsid()?;
                }
                acks.done()?;
                life::rest()
            })?;
        }
        acks.done()?;
        life::rest()
    })?;
    acks.wait(3)?;
    ready::signal()?;
    life::rest()
}

/// Has a child in user, mount, UTS and IPC namespaces of its own, with a child there.
pub(crate) fn namespaces() -> Result<Infallible> {
    let acks = Acks::new()?;
    process::fork(|| {
        let kinds =
            CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
        unshare(kinds).context("failed to create namespaces")?;
        process::fork(|| {
            acks.done()?;
            life::rest()
        })?;
        acks.done()?;
        life::rest()
    })?;
    acks.wait(2)?;
    ready::signal()?;
    life::rest()
}

/// Has a child in a time namespace whose boot was a day earlier.
pub(crate) fn time_namespace() -> Result<Infallible> {
    // SAFETY: changes where children of this process live, and nothing else.
    let unshared = unsafe { libc::unshare(libc::CLONE_NEWTIME) };
    nix::errno::Errno::result(unshared).context("failed to create a time namespace")?;
    fs::write("/proc/self/timens_offsets", "boottime 86400 0").context("failed to set the clock")?;
    child()
}

/// Has a child without an environment, which carries the marker in its arguments.
pub(crate) fn clear_env(marker: &str) -> Result<Infallible> {
    let acks = Acks::new()?;
    let args = ["at-rest".to_owned(), acks.write_fd().to_string(), marker.to_owned()];
    let program = Program::actor(&args, Environment::Empty)?;
    process::fork(|| bail!("failed to execute the actor: {}", program.exec()))?;
    acks.wait(1)?;
    ready::signal()?;
    life::rest()
}

/// Has a daemon without an environment, which carries the marker in its arguments: nothing that it shows leads to the service
/// any more. With `dir` it has also moved itself into a new cgroup there, which whoever named it removes.
pub(crate) fn vanish(marker: &str, dir: Option<&str>) -> Result<Infallible> {
    let acks = Acks::new()?;
    let args = ["at-rest".to_owned(), acks.write_fd().to_string(), marker.to_owned()];
    let program = Program::actor(&args, Environment::Empty)?;
    process::daemon(|| {
        if let Some(dir) = dir {
            move_to_cgroup(dir)?;
        }
        bail!("failed to execute the actor: {}", program.exec())
    })?;
    acks.wait(1)?;
    ready::signal()?;
    life::rest()
}

fn move_to_cgroup(dir: &str) -> Result<()> {
    fs::create_dir(dir).with_context(|| format!("failed to create the cgroup {dir}"))?;
    fs::write(Path::new(dir).join("cgroup.procs"), "0").with_context(|| format!("failed to move to {dir}"))
}
