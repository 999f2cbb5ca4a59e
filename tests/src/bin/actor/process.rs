//! The ways to create a process.
//!
//! Each runs `child` in the new process, which never returns to the caller's code: it rests, exits, or fails and says so.
//! Whoever calls this from a process with several threads makes sure that the others hold no lock: they rest.

use std::convert::Infallible;
use std::ffi::{CString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::LazyLock;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use crate::{life, ready};

/// Creates a process with fork.
pub(crate) fn fork(child: impl FnOnce() -> Result<Infallible>) -> Result<Pid> {
    // SAFETY: no other thread holds a lock (see the module), so the child may do what its parent could.
    match unsafe { nix::unistd::fork() }.context("failed to fork")? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => run(child),
    }
}

/// Creates a process with clone, on a copy of the caller's memory, so without `CLONE_VM`.
pub(crate) fn clone(flags: c_int, child: impl FnOnce() -> Result<Infallible>) -> nix::Result<Pid> {
    assert_eq!(flags & libc::CLONE_VM, 0, "two processes cannot run on one stack");
    // SAFETY: like fork, for without CLONE_VM the child has its own copy of the stack; the other arguments are unused.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
    parent_or_run(pid, child)
}

/// Creates a process with clone3 (Linux 5.3), on a copy of the caller's memory.
pub(crate) fn clone3(child: impl FnOnce() -> Result<Infallible>) -> nix::Result<Pid> {
    // SAFETY: all zeroes is a valid clone_args: no flags, the caller's stack, nothing to fill in.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.exit_signal = libc::SIGCHLD.cast_unsigned().into();
    // SAFETY: like fork; the kernel reads a live clone_args of the size it is told.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    parent_or_run(pid, child)
}

fn parent_or_run(pid: i64, child: impl FnOnce() -> Result<Infallible>) -> nix::Result<Pid> {
    match Errno::result(pid)? {
        0 => run(child),
        pid => Ok(Pid::from_raw(i32::try_from(pid).expect("a pid fits"))),
    }
}

fn run(child: impl FnOnce() -> Result<Infallible>) -> ! {
    life::begin();
    let Err(error) = child();
    ready::fail(&error);
}

/// Creates a process that is a daemon: in a session of its own without being its leader, and without its parent.
pub(crate) fn daemon(child: impl FnOnce() -> Result<Infallible>) -> Result<()> {
    let middle = fork(|| {
        nix::unistd::setsid()?;
        fork(child)?;
        life::exit_now(0);
    })?;
    wait(middle)
}

/// Waits until a child has ended with status 0.
pub(crate) fn wait(child: Pid) -> Result<()> {
    match waitpid(child, None).context("failed to wait for a child")? {
        WaitStatus::Exited(_, 0) => Ok(()),
        other => anyhow::bail!("a child ended with {other:?}"),
    }
}

/// Where the actor is. `main` asks for it first: a process whose leader has exited could not find out any more.
pub(crate) static ACTOR: LazyLock<PathBuf> = LazyLock::new(|| std::env::current_exe().expect("/proc is mounted"));

/// A program with its arguments and environment, in the form that exec wants, so that a child can execute it without allocating.
pub(crate) struct Program {
    // The pointers in `argv` and `envp` lead into these.
    _strings: Vec<CString>,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
}

/// The environment of a [`Program`].
pub(crate) enum Environment {
    /// That of the caller.
    Inherited,
    /// None at all.
    Empty,
}

impl Program {
    /// The actor itself, playing `args`.
    pub(crate) fn actor(args: &[String], environment: Environment) -> Result<Self> {
        let path = ACTOR.clone().into_os_string().into_vec();
        let mut strings = vec![CString::new(path)?];
        for arg in args {
            strings.push(CString::new(arg.as_str())?);
        }
        let argc = strings.len();
        if let Environment::Inherited = environment {
            for (name, value) in std::env::vars_os() {
                let variable = [name.into_vec(), value.into_vec()].join(&b'=');
                strings.push(CString::new(variable)?);
            }
        }
        let (argv, envp) = strings.split_at(argc);
        let pointers = |strings: &[CString]| {
            strings
                .iter()
                .map(|string| string.as_ptr())
                .chain([std::ptr::null()])
                .collect::<Vec<_>>()
        };
        let (argv, envp) = (pointers(argv), pointers(envp));
        Ok(Self {
            _strings: strings,
            argv,
            envp,
        })
    }

    /// Becomes this program. Only makes async-signal-safe calls; returns only if that fails.
    pub(crate) fn exec(&self) -> Errno {
        // SAFETY: both arrays end with a null pointer and lead to strings that live as long as `self`.
        unsafe { libc::execve(self.argv[0], self.argv.as_ptr(), self.envp.as_ptr()) };
        Errno::last()
    }

    /// Runs this program in a process created by vfork: it shares the caller's memory, and the caller waits, until exec.
    ///
    /// Not by calling `vfork`, which returns twice on one stack and which Rust cannot express, but with the same flags and
    /// a stack of its own; to the kernel it is the same.
    pub(crate) fn vfork(&self) -> nix::Result<Pid> {
        let mut stack = vec![0_u128; 4096];
        let this: *const Self = self;
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: the stack grows down from the end of a buffer, aligned for 16 bytes, that the child stops using before this
        // call returns, like `self`.
        let pid = unsafe {
            libc::clone(
                exec_or_exit,
                stack.as_mut_ptr_range().end.cast(),
                flags,
                this.cast_mut().cast(),
            )
        };
        Errno::result(pid).map(Pid::from_raw)
    }

    /// Runs this program in a process created by posix_spawn.
    pub(crate) fn posix_spawn(&self) -> nix::Result<Pid> {
        let mut pid = 0;
        let (actions, attributes) = (std::ptr::null(), std::ptr::null());
        let (argv, envp) = (self.argv.as_ptr().cast(), self.envp.as_ptr().cast());
        // SAFETY: as for exec; null asks for no file actions and no attributes.
        let error = unsafe { libc::posix_spawn(&mut pid, self.argv[0], actions, attributes, argv, envp) };
        if error == 0 {
            Ok(Pid::from_raw(pid))
        } else {
            Err(Errno::from_raw(error))
        }
    }
}

extern "C" fn exec_or_exit(program: *mut c_void) -> c_int {
    // SAFETY: `vfork` passes a pointer to a program that its caller keeps until the child has executed it or exited.
    let program = unsafe { &*program.cast::<Program>() };
    program.exec();
    life::exit_now(127);
}

/// Creates a process that shares the caller's memory for ever, `CLONE_VM` without `CLONE_VFORK`, and runs `main` with `arg`.
///
/// `main` shares the caller's thread-local storage as well, `errno` included: it makes system calls and nothing else.
pub(crate) fn clone_sharing_memory(main: extern "C" fn(*mut c_void) -> c_int, arg: usize) -> nix::Result<Pid> {
    let stack = vec![0_u128; 4096].leak();
    let flags = libc::CLONE_VM | libc::SIGCHLD;
    let arg = std::ptr::without_provenance_mut(arg);
    // SAFETY: the stack grows down from the end of a buffer, aligned for 16 bytes, that is never freed.
    let pid = unsafe { libc::clone(main, stack.as_mut_ptr_range().end.cast(), flags, arg) };
    Errno::result(pid).map(Pid::from_raw)
}
