//! Services that never come to rest, within bounds: of time always, of processes where they multiply.

use std::convert::Infallible;
use std::slice;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, getpid};

use crate::acks::Acks;
use crate::signals::{ignore, ignore_all};
use crate::{life, process, ready};

/// How long these services go on by default.
pub(crate) const DEFAULT_SECONDS: u64 = 20;

/// How many processes a storm creates in all, at most.
const STORM_BIRTHS: usize = 10_000;

/// Has a descendant, never the same, that ignores SIGTERM: each forks one child and exits at once, for `seconds`.
pub(crate) fn refork_chain(seconds: u64) -> Result<Infallible> {
    refork_chains(1, seconds)
}

/// As [`refork_chain`], `count` of them at once.
pub(crate) fn refork_chains(count: usize, seconds: u64) -> Result<Infallible> {
    let acks = Acks::new()?;
    let end = Instant::now() + Duration::from_secs(seconds);
    // The scheduler runs the newborn first, so that this process would not get to say that all are there.
    set_nice(-20)?;
    for _ in 0..count {
        process::fork(|| {
            set_nice(0)?;
            ignore(Signal::SIGTERM)?;
            acks.done()?;
            refork_until(end)
        })?;
    }
    acks.wait(count)?;
    for _ in 0..count {
        waitpid(None, None).context("failed to wait for the first of a chain")?;
    }
    ready::signal()?;
    life::rest()
}

fn set_nice(value: i32) -> Result<()> {
    // SAFETY: 0 means the calling process.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, value) }).context("failed to set the priority")?;
    Ok(())
}

fn refork_until(end: Instant) -> ! {
    while Instant::now() < end {
        // SAFETY: the process has one thread, so the child may do what its parent could.
        match unsafe { nix::unistd::fork() } {
            Ok(ForkResult::Parent { .. }) => break,
            Ok(ForkResult::Child) => life::begin(),
            // Somebody is trying to end this; try again.
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    life::exit_now(0);
}

/// Has `count` processes in all, which ignore SIGTERM and replace those that are killed, for `seconds`.
///
/// They stand in a binary heap: whoever holds place `i` sees to it that places `2i + 1` and `2i + 2` are held, by processes
/// of its own or by those of an earlier holder.
pub(crate) fn storm(count: usize, seconds: u64, sessions: Sessions) -> Result<Infallible> {
    ensure!(count > 0, "a storm needs a process");
    match sessions {
        Sessions::One => ignore(Signal::SIGTERM)?,
        Sessions::Many => ignore_all()?,
    }
    SigSet::from(Signal::SIGCHLD)
        .thread_block()
        .context("failed to block SIGCHLD")?;
    let board = Board::new(count, Instant::now() + Duration::from_secs(seconds), sessions)?;
    board.places[0].store(getpid().as_raw(), Ordering::Relaxed);
    hold(board, 0)
}

/// What the processes of a storm share.
#[derive(Clone, Copy)]
struct Board {
    /// The pid that holds each place, 0 if none ever has.
    places: &'static [AtomicI32],
    births: &'static AtomicUsize,
    end: Instant,
    sessions: Sessions,
}

/// Where the processes of a storm live.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sessions {
    /// In the session that they were born in.
    One,
    /// Each in a session of its own, and deaf to every signal that can be ignored.
    Many,
}

impl Board {
    fn new(count: usize, end: Instant, sessions: Sessions) -> Result<Self> {
        let births_size = size_of::<AtomicUsize>();
        let size = births_size + count * size_of::<AtomicI32>();
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
        );
        // SAFETY: asks for new memory, anywhere.
        let memory = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0) };
        ensure!(
            memory != libc::MAP_FAILED,
            "failed to map shared memory: {}",
            Errno::last()
        );
        // SAFETY: the mapping is aligned to a page, zeroed, large enough, and never unmapped.
        let births = unsafe { &*memory.cast::<AtomicUsize>() };
        // SAFETY: the counter is followed by room for `count` pids.
        let first = unsafe { memory.byte_add(births_size) };
        // SAFETY: as above, and the places are only used through atomics.
        let places = unsafe { slice::from_raw_parts(first.cast::<AtomicI32>(), count) };
        Ok(Self {
            places,
            births,
            end,
            sessions,
        })
    }

    fn is_full(self) -> bool {
        self.places.iter().all(|place| place.load(Ordering::Relaxed) != 0)
    }
}

/// Holds a place and keeps those below it held.
fn hold(board: Board, place: usize) -> Result<Infallible> {
    let mut below = [2 * place + 1, 2 * place + 2].map(|place| Below { place, child: None });
    let mut announced = place != 0;
    while Instant::now() < board.end {
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
        let mut all_own = true;
        for place in &mut below {
            all_own &= place.keep_held(board)?;
        }
        if !announced && board.is_full() {
            ready::signal()?;
            announced = true;
        }
        let settled = all_own && announced;
        wait_for_child(Duration::from_millis(if settled { 200 } else { 10 }));
    }
    ensure!(announced, "the storm's time was over before every place was held");
    life::exit_now(0)
}

/// A place below the one that this process holds.
struct Below {
    place: usize,
    /// The process that we have put there last.
    child: Option<Pid>,
}

impl Below {
    /// Sees to it that the place is held; says whether we would be told if that changed.
    fn keep_held(&mut self, board: Board) -> Result<bool> {
        let Some(slot) = board.places.get(self.place) else {
            return Ok(true);
        };
        if self.child.is_some_and(is_alive) {
            return Ok(true);
        }
        let holder = slot.load(Ordering::Relaxed);
        if holder != 0 && is_alive(Pid::from_raw(holder)) {
            return Ok(false);
        }
        if board.births.fetch_add(1, Ordering::Relaxed) >= STORM_BIRTHS {
            return Ok(true);
        }
        let place = self.place;
        let child = process::fork(|| {
            let held = slot.compare_exchange(holder, getpid().as_raw(), Ordering::Relaxed, Ordering::Relaxed);
            if held.is_err() {
                life::exit_now(0);
            }
            if board.sessions == Sessions::Many {
                nix::unistd::setsid()?;
            }
            hold(board, place)
        });
        if child.is_err() {
            // Somebody is trying to end this; try again.
            board.births.fetch_sub(1, Ordering::Relaxed);
        }
        self.child = child.ok();
        Ok(self.child.is_some())
    }
}

fn is_alive(pid: Pid) -> bool {
    kill(pid, None).is_ok()
}

/// Waits until a child has changed its state, at most for `timeout`.
fn wait_for_child(timeout: Duration) {
    let set = SigSet::from(Signal::SIGCHLD);
    let timeout = libc::timespec {
        tv_sec: 0,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: the set and the time are live values, and the details of the signal are not asked for.
    unsafe { libc::sigtimedwait(set.as_ref(), std::ptr::null_mut(), &timeout) };
}
