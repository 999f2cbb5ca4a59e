//! What `cargo xtask bench` measures other programs with: a process that does one thing and has next to nothing.
//!
//! Linked statically, so that the kernel's own cost of a process, against which all else is compared, is as small as it gets.
//!
//! - `forks N`: creates N processes, one after the other, which exit at once; prints the nanoseconds that it took, by the clock and
//!   of processor time;
//! - `execs N`: the same with processes that execute this program anew;
//! - `sessions N`: has N children, each in a session of its own, says so as `zinit_tests::ready` wants it, and rests;
//! - `storm N S`: N processes, each of which creates another in its place and exits, again and again for up to S seconds; says when
//!   all of them are there by the byte below, and has that FIFO open in all of them;
//! - `exit`: exits at once;
//! - `rest`: says that it is there, and rests;
//! - otherwise: writes a byte to the FIFO that `ZINIT_BENCH_FIFO` names, and rests with that open.

use std::{
    ffi::{CString, c_int},
    fs::File,
    io::Write as _,
    os::fd::{AsRawFd as _, IntoRawFd as _},
    process::exit,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        resource::{UsageWho, getrusage},
        signal::{SigHandler, Signal, signal},
        wait::waitpid,
    },
    unistd::{ForkResult, close, execv, fork, pause, pipe, read, setsid},
};

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["forks", count] => forks(count.parse()?, || {}),
        ["execs", count] => {
            let path = CString::new("/proc/self/exe")?;
            let arguments = [path.clone(), CString::new("exit")?];
            forks(count.parse()?, || {
                // It returns if it fails, and only then.
                if execv(&path, &arguments).is_err() {
                    exit_now(1);
                }
            })
        }
        ["sessions", count] => sessions(count.parse()?),
        ["storm", count, seconds] => storm(count.parse()?, Duration::from_secs(seconds.parse()?)),
        ["exit"] => exit(0),
        ["rest"] => {
            ready()?;
            rest()
        }
        // s6 gives a program the name of its service.
        [] | [_] if std::env::var_os("ZINIT_BENCH_FIFO").is_some() => announce(),
        _ => bail!("there is no such behaviour"),
    }
}

fn rest() -> ! {
    loop {
        pause();
    }
}

fn exit_now(status: c_int) -> ! {
    // SAFETY: it ends the process, and runs nothing of it.
    unsafe { libc::_exit(status) }
}

/// Creates a process that lives this life, and exits.
fn child(live: impl FnOnce()) -> Result<nix::unistd::Pid> {
    // SAFETY: this program has one thread, so that the child may do what its parent could.
    match unsafe { fork() }.context("failed to fork")? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            live();
            exit_now(0)
        }
    }
}

fn forks(count: usize, live: impl Fn()) -> Result<()> {
    let (cpu, began) = (processor_time()?, Instant::now());
    for _ in 0..count {
        waitpid(child(&live)?, None)?;
    }
    let took = began.elapsed();
    println!("{} {}", took.as_nanos(), (processor_time()? - cpu).as_nanos());
    Ok(())
}

/// Of this process, and of those that it has waited for.
fn processor_time() -> Result<Duration> {
    let mut total = Duration::ZERO;
    for who in [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN] {
        let usage = getrusage(who)?;
        for time in [usage.user_time(), usage.system_time()] {
            total += Duration::new(time.tv_sec().try_into()?, u32::try_from(time.tv_usec())? * 1000);
        }
    }
    Ok(total)
}

fn sessions(count: usize) -> Result<()> {
    let (all, one) = pipe()?;
    for _ in 0..count {
        child(|| {
            if setsid().is_err() {
                exit_now(1);
            }
            // The end of file is what the parent waits for.
            if close(one.as_raw_fd()).is_err() {
                exit_now(1);
            }
            rest()
        })?;
    }
    drop(one);
    while read(&all, &mut [0]) == Err(Errno::EINTR) {}
    ready()?;
    rest()
}

fn storm(count: usize, lasts: Duration) -> Result<()> {
    let end = Instant::now() + lasts;
    // Whoever else gets the orphans might not reap them as fast as they come. This way the kernel does.
    nix::sys::prctl::set_child_subreaper(true)?;
    // SAFETY: no function of this program is made a handler.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
    let mut fifo = fifo()?;
    let (all, one) = pipe()?;
    for _ in 0..count {
        child(|| {
            // Before, there might be no processor left to create the others.
            if close(one.as_raw_fd()).is_err() || read(&all, &mut [0]) != Ok(0) {
                exit_now(1);
            }
            flee(end);
        })?;
    }
    drop(one);
    fifo.write_all(b"x")?;
    std::thread::sleep(lasts);
    Ok(())
}

/// Is another process again and again.
fn flee(end: Instant) {
    while Instant::now() < end {
        // SAFETY: this program has one thread, so that the child may do what its parent could.
        if let Ok(ForkResult::Parent { .. }) = unsafe { fork() } {
            exit_now(0)
        }
    }
}

/// Says that all is there, as `zinit_tests::ready` wants it.
fn ready() -> Result<()> {
    let fifo = std::env::var_os("ZINIT_TEST_READY").context("ZINIT_TEST_READY is not set")?;
    File::options().write(true).open(fifo)?.write_all(b"ready\n\n")?;
    Ok(())
}

fn fifo() -> Result<File> {
    let fifo = std::env::var_os("ZINIT_BENCH_FIFO").context("ZINIT_BENCH_FIFO is not set")?;
    Ok(File::options().write(true).open(fifo)?)
}

fn announce() -> Result<()> {
    let mut fifo = fifo()?;
    fifo.write_all(b"x")?;
    // Whoever reads sees the end of this process by the end of the file.
    let _open = fifo.into_raw_fd();
    rest()
}
