//! A random process tree that comes to rest.
//!
//! The shape depends on the seed alone: every node has a generator of its own, seeded by its parent, and a budget, the number
//! of processes it may bring into the world with all its descendants.
//!
//! While it grows, every node holds the write end of one pipe, inherited also across exec. It writes its kind when it is
//! born, `DEATH` just before it exits, and closes the pipe when it rests. So the end of file tells the root that the tree is
//! at rest, and the bytes tell what it consists of, without a look at /proc.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ffi::{CString, c_int, c_void};
use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, IntoRawFd, RawFd};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, setpgid, setsid};

use zinit_tests::random::Random;

use crate::escapes::outlive_leader;
use crate::process::{Environment, Program};
use crate::{life, process, ready};

/// Written by a node just before it exits.
const DEATH: u8 = b'.';

/// How a node comes into the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// fork.
    Fork,
    /// clone without flags.
    Clone,
    /// clone3 without flags.
    Clone3,
    /// clone with `CLONE_PARENT`: a sibling of its creator.
    CloneParent,
    /// clone with `CLONE_FILES | CLONE_FS`.
    CloneFiles,
    /// clone with `CLONE_VFORK` on memory of its own, then exec.
    CloneVfork,
    /// clone with `CLONE_VM` for good; has no children.
    CloneVm,
    /// clone with `CLONE_NEWPID`: the first process of a nested pid namespace.
    PidNamespace,
    /// vfork, then exec.
    Vfork,
    /// posix_spawn.
    PosixSpawn,
    /// fork, then exec.
    ForkExec,
    /// fork, then exec by a thread that is not the leader.
    ThreadExec,
    /// fork by a thread that is not the leader and ends after that.
    ThreadFork,
    /// fork by a thread that is not the leader and rests after that.
    RestingThreadFork,
    /// fork, then the leader exits and another thread lives on.
    LeaderExits,
    /// Two forks with setsid in between, and an exit in the middle: two processes.
    Daemon,
}

impl Kind {
    const ALL: [Self; 16] = [
        Self::Fork,
        Self::Clone,
        Self::Clone3,
        Self::CloneParent,
        Self::CloneFiles,
        Self::CloneVfork,
        Self::CloneVm,
        Self::PidNamespace,
        Self::Vfork,
        Self::PosixSpawn,
        Self::ForkExec,
        Self::ThreadExec,
        Self::ThreadFork,
        Self::RestingThreadFork,
        Self::LeaderExits,
        Self::Daemon,
    ];

    /// The name in the facts and of the processes (at most 15 characters).
    fn name(self) -> &'static str {
        match self {
            Self::Fork => "fork",
            Self::Clone => "clone",
            Self::Clone3 => "clone3",
            Self::CloneParent => "clone_parent",
            Self::CloneFiles => "clone_files",
            Self::CloneVfork => "clone_vfork",
            Self::CloneVm => "clone_vm",
            Self::PidNamespace => "pid_namespace",
            Self::Vfork => "vfork",
            Self::PosixSpawn => "posix_spawn",
            Self::ForkExec => "fork_exec",
            Self::ThreadExec => "thread_exec",
            Self::ThreadFork => "thread_fork",
            Self::RestingThreadFork => "resting_thread",
            Self::LeaderExits => "leader_exits",
            Self::Daemon => "daemon",
        }
    }

    /// What a node of this kind writes when it is born.
    fn byte(self) -> u8 {
        b'A' + self as u8
    }

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.byte() == byte)
    }

    fn random(random: &mut Random) -> Self {
        // A new pid namespace costs more than all others, and nests at most 32 deep.
        match Self::ALL[random.below(Self::ALL.len())] {
            Self::PidNamespace if random.below(8) != 0 => Self::Fork,
            kind => kind,
        }
    }
}

/// Grows a tree of at most `max` processes, waits until it is at rest, and says what it consists of.
///
/// Facts: `created` (with the root, and those that have exited), `alive` (with the root), and how many of each kind.
pub(crate) fn root(seed: u64, max: usize) -> Result<Infallible> {
    let (read, write) = nix::unistd::pipe().context("failed to create a pipe")?;
    let mut node = Node {
        place: Place::Root,
        random: Random(seed),
        budget: max.saturating_sub(1),
        report: write.into_raw_fd(),
    };
    node.grow()?;
    node.close_report();

    let mut bytes = Vec::new();
    File::from(read)
        .read_to_end(&mut bytes)
        .context("failed to read the reports of the nodes")?;
    let mut deaths = 0_usize;
    let mut births = BTreeMap::<Kind, usize>::new();
    for byte in bytes {
        match (byte, Kind::from_byte(byte)) {
            (DEATH, _) => deaths += 1,
            (_, Some(kind)) => *births.entry(kind).or_default() += 1,
            _ => bail!("a node reports {byte}"),
        }
    }
    let created = 1 + births.values().sum::<usize>();
    let alive = created - deaths;
    ensure!(
        created == max.max(1),
        "{created} of {max} processes were created: some failed"
    );
    let mut facts: Vec<(&str, &dyn Display)> = vec![("created", &created), ("alive", &alive)];
    facts.extend(births.iter().map(|(kind, count)| (kind.name(), count as &dyn Display)));
    ready::signal_with(&facts)?;
    life::rest()
}

/// Where a node stands, as far as that limits what it may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The first process of the tree: it does not exit and leaves its parent, the test, without further children.
    Root,
    /// The first process of a pid namespace: if it exited, the kernel would kill its descendants, unreported.
    NamespaceInit,
    Elsewhere,
}

/// What a node is made from.
#[derive(Debug, Clone, Copy)]
struct Seed {
    kind: Kind,
    seed: u64,
    budget: usize,
    report: RawFd,
}

/// The program that grows a node after exec.
pub(crate) fn executed_node(kind: &str, seed: u64, budget: usize, report: RawFd) -> Result<Infallible> {
    let kind = Kind::ALL
        .into_iter()
        .find(|known| known.name() == kind)
        .context("no such kind of node")?;
    Seed {
        kind,
        seed,
        budget,
        report,
    }
    .live(Place::Elsewhere)
}

impl Seed {
    /// Lives the life of a node in the calling process: is born, moves, grows, and exits or rests.
    fn live(self, place: Place) -> Result<Infallible> {
        set_name(self.kind)?;
        write(self.report, self.kind.byte())?;
        let mut node = Node {
            place,
            random: Random(self.seed),
            budget: self.budget,
            report: self.report,
        };
        node.wander()?;
        node.grow()?;
        if node.random.below(2) == 0 {
            reap();
        }
        if place == Place::Elsewhere && node.random.below(5) == 0 {
            write(node.report, DEATH)?;
            life::exit_now(0);
        }
        node.close_report();
        life::rest()
    }

    /// Becomes the program that lives the life of a node.
    fn exec(self) -> Result<Infallible> {
        bail!("failed to execute the actor: {}", self.program()?.exec())
    }

    fn program(self) -> Result<Program> {
        let Self {
            kind,
            seed,
            budget,
            report,
        } = self;
        let numbers = [seed.to_string(), budget.to_string(), report.to_string()];
        let args: Vec<_> = ["tree-node".to_owned(), kind.name().to_owned()]
            .into_iter()
            .chain(numbers)
            .collect();
        Program::actor(&args, Environment::Inherited)
    }
}

/// A living node.
struct Node {
    place: Place,
    random: Random,
    budget: usize,
    report: RawFd,
}

impl Node {
    /// Perhaps leaves the session or the process group, or becomes a subreaper.
    fn wander(&mut self) -> Result<()> {
        match self.random.below(8) {
            0 => match setsid() {
                // Whoever leads a process group cannot leave its session.
                Ok(_) | Err(Errno::EPERM) => Ok(()),
                Err(error) => Err(error).context("failed to leave the session"),
            },
            1 => match setpgid(Pid::from_raw(0), Pid::from_raw(0)) {
                // Whoever leads a session cannot leave its process group.
                Ok(()) | Err(Errno::EPERM) => Ok(()),
                Err(error) => Err(error).context("failed to leave the process group"),
            },
            2 => Ok(rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?),
            _ => Ok(()),
        }
    }

    /// Creates children until the budget is spent.
    fn grow(&mut self) -> Result<()> {
        while self.budget > 0 {
            let share = match self.random.below(4) {
                0 => 1,
                1 => 1 + self.random.below(self.budget.min(8)),
                2 => 1 + self.random.below(self.budget),
                _ => self.budget,
            };
            self.budget -= share;
            let kind = match (Kind::random(&mut self.random), self.place) {
                // It would make the test its parent; and the kernel denies it to the first process of a namespace.
                (Kind::CloneParent, Place::Root | Place::NamespaceInit) => Kind::Fork,
                (Kind::Daemon, _) if share < 2 => Kind::Fork,
                (Kind::CloneVm, _) if share > 1 => Kind::Clone,
                (kind, _) => kind,
            };
            let seed = Seed {
                kind,
                seed: self.random.number(),
                budget: share - 1,
                report: self.report,
            };
            create(seed).with_context(|| format!("failed to create a node by {}", kind.name()))?;
        }
        Ok(())
    }

    fn close_report(&self) {
        // SAFETY: this process owns its copy of the descriptor and uses it no more: it is at rest.
        drop(unsafe { File::from_raw_fd(self.report) });
    }
}

/// Creates a process that lives the life of a node.
fn create(seed: Seed) -> Result<()> {
    let live = || seed.live(Place::Elsewhere);
    match seed.kind {
        Kind::Fork => process::fork(live).map(drop),
        Kind::Clone => Ok(process::clone(0, live).map(drop)?),
        Kind::Clone3 => Ok(process::clone3(live).map(drop)?),
        Kind::CloneParent => Ok(process::clone(libc::CLONE_PARENT, live).map(drop)?),
        Kind::CloneFiles => create_sharing_files(seed),
        Kind::CloneVfork => Ok(process::clone(libc::CLONE_VFORK, || seed.exec()).map(drop)?),
        Kind::CloneVm => Ok(process::clone_sharing_memory(live_on_shared_memory, argument(seed)).map(drop)?),
        Kind::PidNamespace => create_pid_namespace(seed),
        Kind::Vfork => Ok(seed.program()?.vfork().map(drop)?),
        Kind::PosixSpawn => Ok(seed.program()?.posix_spawn().map(drop)?),
        Kind::ForkExec => process::fork(|| seed.exec()).map(drop),
        Kind::ThreadExec => process::fork(|| in_another_thread(move || seed.exec())).map(drop),
        Kind::ThreadFork => std::thread::spawn(move || process::fork(|| seed.live(Place::Elsewhere)).map(drop))
            .join()
            .expect("a panic ends the process"),
        Kind::RestingThreadFork => fork_in_resting_thread(seed),
        Kind::LeaderExits => process::fork(|| {
            set_name(seed.kind)?;
            in_another_thread(move || {
                outlive_leader()?;
                seed.live(Place::Elsewhere)
            })
        })
        .map(drop),
        Kind::Daemon => create_daemon(seed),
    }
}

/// Goes on in another thread; the calling one, the leader, exits.
fn in_another_thread(live: impl FnOnce() -> Result<Infallible> + Send + 'static) -> Result<Infallible> {
    std::thread::spawn(move || {
        let Err(error) = live();
        ready::fail(&error);
    });
    life::exit_thread();
}

/// Forks in a thread that rests from then on.
fn fork_in_resting_thread(seed: Seed) -> Result<()> {
    let (read, write) = nix::unistd::pipe().context("failed to create a pipe")?;
    let write = write.into_raw_fd();
    std::thread::spawn(move || {
        let forked = process::fork(move || {
            close(write);
            seed.live(Place::Elsewhere)
        });
        if let Err(error) = forked {
            ready::fail(&error);
        }
        // Nothing but system calls from here on, so that the other thread can clone without finding a lock taken.
        close(write);
        life::rest();
    });
    let ended = File::from(read).read(&mut [0]).context("failed to wait for a thread")?;
    ensure!(ended == 0, "a thread wrote what nobody asked for");
    Ok(())
}

/// Creates a node with `CLONE_FILES | CLONE_FS`, which then makes a file table of its own, so that it can close its report.
fn create_sharing_files(seed: Seed) -> Result<()> {
    let (read, write) = nix::unistd::pipe().context("failed to create a pipe")?;
    let (read, write) = (read.into_raw_fd(), write.into_raw_fd());
    process::clone(libc::CLONE_FILES | libc::CLONE_FS, || {
        unshare(CloneFlags::CLONE_FILES | CloneFlags::CLONE_FS).context("failed to leave the file table")?;
        self::write(write, 0)?;
        close(read);
        close(write);
        seed.live(Place::Elsewhere)
    })?;
    // SAFETY: the descriptor is this process's own again once the child has left the table, and used no more.
    let mut left = unsafe { File::from_raw_fd(read) };
    left.read_exact(&mut [0]).context("failed to wait for a child")?;
    close(write);
    Ok(())
}

/// Creates the first process of a pid namespace, or a common one where that is not possible: too deep, or not allowed.
fn create_pid_namespace(seed: Seed) -> Result<()> {
    match process::clone(libc::CLONE_NEWPID, || seed.live(Place::NamespaceInit)) {
        Ok(_) => Ok(()),
        Err(Errno::ENOSPC | Errno::EPERM | Errno::EINVAL | Errno::EUSERS) => create(Seed {
            kind: Kind::Fork,
            ..seed
        }),
        Err(error) => Err(error.into()),
    }
}

/// Creates a daemon. The process in the middle counts as a node that exits early.
fn create_daemon(seed: Seed) -> Result<()> {
    process::daemon(|| {
        // On behalf of the process in the middle, which has exited or is about to.
        write(seed.report, seed.kind.byte())?;
        write(seed.report, DEATH)?;
        Seed {
            budget: seed.budget - 1,
            ..seed
        }
        .live(Place::Elsewhere)
    })
}

/// Packs what a node on shared memory needs into a number: its descriptor. Its kind is known, and it has no budget.
fn argument(seed: Seed) -> usize {
    usize::try_from(seed.report).expect("a descriptor is not negative")
}

/// The life of a node that shares the memory of its creator, by system calls alone.
extern "C" fn live_on_shared_memory(argument: *mut c_void) -> c_int {
    life::begin();
    let report = c_int::try_from(argument.addr()).expect("a descriptor fits");
    let byte = Kind::CloneVm.byte();
    // SAFETY: writes one live byte.
    unsafe { libc::write(report, (&raw const byte).cast(), 1) };
    close(report);
    life::rest();
}

/// Names the calling thread, so that a test that finds a wrong process can say how it was made.
fn set_name(kind: Kind) -> Result<()> {
    let name = CString::new(kind.name())?;
    rustix::thread::set_name(&name).context("failed to name the process")
}

/// Reaps those children that have already exited; others stay zombies for as long as their parent rests.
fn reap() {
    while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
}

fn write(fd: RawFd, byte: u8) -> Result<()> {
    // SAFETY: the descriptor stays open during the call: only this process closes it.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let written = rustix::io::write(fd, &[byte]).context("failed to report")?;
    ensure!(written == 1, "failed to report: nothing was written");
    Ok(())
}

fn close(fd: RawFd) {
    // SAFETY: the caller owns the descriptor in this process and uses it no more.
    unsafe { libc::close(fd) };
}
