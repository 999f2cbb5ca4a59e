//! Services with processes that something can keep from ending, and the tracer that keeps them.

use std::convert::Infallible;
use std::ffi::CString;
use std::sync::mpsc;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use nix::sys::ptrace;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Gid, Pid, Uid, gettid, setresgid, setresuid};
use zinit_tests::holds::Tracer;

use crate::acks::Acks;
use crate::{life, process, ready};

/// `nobody` on most machines; on any, not root.
const OTHER_USER: u32 = 65_534;

fn set_name(name: &str) -> Result<()> {
    rustix::thread::set_name(&CString::new(name)?).context("failed to name the process")
}

/// Has a second thread, whose id is the fact `thread`.
pub(crate) fn thread() -> Result<Infallible> {
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        if let Err(error) = set_name("second").and_then(|()| Ok(send.send(gettid())?)) {
            ready::fail(&error);
        }
        life::rest();
    });
    let tid = receive.recv().context("the thread ended")?;
    ready::signal_with(&[("thread", &tid)])?;
    life::rest()
}

/// Has a child, the fact `waiting`, that waits for its vfork, the fact `child`, which rests.
pub(crate) fn vfork_wait() -> Result<Infallible> {
    let acks = Acks::new()?;
    let waiting = process::fork(|| {
        set_name("waiting")?;
        process::clone(libc::CLONE_VFORK, || {
            set_name("vforked")?;
            acks.done_with(nix::unistd::getpid().as_raw())?;
            life::rest()
        })?;
        bail!("a vfork did not wait")
    })?;
    let child = acks.wait(1)?[0];
    ready::signal_with(&[("waiting", &waiting), ("child", &child)])?;
    life::rest()
}

/// Has a child, the fact `hung`, that asks for the attributes of a file.
pub(crate) fn stat(file: &str) -> Result<Infallible> {
    let acks = Acks::new()?;
    let hung = process::fork(|| {
        set_name("hung")?;
        acks.done()?;
        match std::fs::metadata(file) {
            Err(error) => bail!("{file} is not to be had: {error}"),
            Ok(_) => bail!("{file} was there at once"),
        }
    })?;
    acks.wait(1)?;
    ready::signal_with(&[("hung", &hung)])?;
    life::rest()
}

/// Has a child, the fact `foreign`, that is another user, in a user namespace which that user made.
pub(crate) fn user_namespace() -> Result<Infallible> {
    let acks = Acks::new()?;
    let foreign = process::fork(|| {
        let (user, group) = (Uid::from_raw(OTHER_USER), Gid::from_raw(OTHER_USER));
        setresgid(group, group, group).context("failed to change the group")?;
        setresuid(user, user, user).context("failed to change the user")?;
        unshare(CloneFlags::CLONE_NEWUSER).context("failed to create a user namespace")?;
        set_name("foreign")?;
        acks.done()?;
        life::rest()
    })?;
    acks.wait(1)?;
    ready::signal_with(&[("foreign", &foreign)])?;
    life::rest()
}

/// Traces a thread until SIGTERM: `let-go` stops it in its exit, `reaped` just does not reap it.
pub(crate) fn trace(tid: i32, until: &str) -> Result<Infallible> {
    set_name(Tracer::COMM)?;
    let (tid, options) = match until {
        "let-go" => (Pid::from_raw(tid), ptrace::Options::PTRACE_O_TRACEEXIT),
        "reaped" => (Pid::from_raw(tid), ptrace::Options::empty()),
        other => bail!("no such tracer: {other}"),
    };
    let term = SigSet::from(Signal::SIGTERM);
    term.thread_block().context("failed to block SIGTERM")?;
    ptrace::seize(tid, options).context("failed to trace")?;
    ready::signal()?;
    term.wait().context("failed to wait for SIGTERM")?;
    if until == "let-go" {
        ptrace::detach(tid, None).context("failed to detach")?;
    }
    // One that has exited is let go when its tracer ends.
    life::exit_now(0)
}
