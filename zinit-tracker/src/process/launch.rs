//! What a new process does to itself until it executes its program, without whoever created it having to wait for that.
//!
//! `Command::spawn` returns when the program was executed, which takes for ever if it is on a server that does not answer. Here
//! it returns as soon as the process exists: the last that the new process does for the command is to close what it has of its
//! creator's descriptors, among them the one by which the command learns how the execution went. From there on the process
//! is on its own, and tells through a pipe.

use std::{
    ffi::{CString, OsStr, OsString},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd, RawFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::PathBuf,
    ptr,
};

use nix::{
    errno::Errno,
    sys::{
        resource::{Resource, setrlimit},
        signal::SigSet,
    },
    unistd::{Gid, Uid},
};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::{io::AsyncReadExt as _, net::unix::pipe::Receiver, process::Command};

use super::stat;

/// Where programs are looked for if the environment does not say (`_PATH_DEFPATH`).
const DEFAULT_PATH: &str = "/bin:/usr/bin";
/// What executes a file that is no executable the kernel knows, as execvp(3) does.
const SHELL: &std::ffi::CStr = c"/bin/sh";
/// Exit status of a process that could not execute its program.
const NOT_EXECUTED: i32 = 127;
/// The largest signal number, and some more (`_NSIG`).
const LAST_SIGNAL: i32 = 64;

/// As whom a process runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// `None`: as the creator's user.
    pub(crate) user: Option<Uid>,
    pub(crate) group: Gid,
    /// All of its groups; none is kept of the creator's.
    pub(crate) groups: Vec<Gid>,
}

/// What a new process does to itself before it executes its program.
#[derive(Clone, Debug, Default)]
pub struct Launch {
    /// Lead a session of its own, and block no signal, whatever its creator blocks.
    pub(crate) session: bool,
    /// Resource, soft limit, hard limit.
    pub(crate) limits: Vec<(Resource, u64, u64)>,
    /// Where it works; the command itself has no directory. `None`: where its creator does.
    pub(crate) directory: Option<PathBuf>,
    pub(crate) identity: Option<Identity>,
}

/// Why a process did not execute its program.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// It could not get its session, limits or identity.
    #[error("failed to prepare {program:?}")]
    Prepare {
        /// The program.
        program: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// It could not enter its directory.
    #[error("failed to enter {}, the directory of {program:?}", .directory.display())]
    Enter {
        /// The program.
        program: String,
        /// The directory.
        directory: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// There is no such program, or it cannot be executed.
    #[error("failed to start {program:?}")]
    Execute {
        /// The program.
        program: String,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// What became of a process that was to execute a program.
#[derive(Debug)]
pub enum Launched {
    /// It runs the program, or did.
    Executed,
    /// It exits.
    Failed(LaunchError),
    /// It was killed before.
    Died,
}

/// How far a process had come that failed.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Step {
    Prepare,
    Enter,
    Execute,
}

/// The execution of a program by a process that exists, which may take for ever.
#[derive(Debug)]
pub struct Execution {
    pid: u32,
    program: String,
    directory: PathBuf,
    report: Receiver,
}

/// A command that is ready to create one process.
#[derive(Debug)]
pub(crate) struct Armed {
    program: String,
    directory: PathBuf,
    report: Receiver,
    /// The new process has it, too.
    writer: OwnedFd,
}

/// What the new process needs: all of it is prepared, since it must not allocate.
struct Plan {
    session: bool,
    limits: Vec<(Resource, u64, u64)>,
    directory: Option<CString>,
    identity: Option<(Option<Uid>, Gid, Vec<libc::gid_t>)>,
    /// Where the program may be, in this order.
    candidates: Vec<CString>,
    arguments: Strings,
    /// For a script that names no interpreter: the shell, a place for the script, its arguments.
    shell: Strings,
    environment: Strings,
    report: RawFd,
    /// Descriptors that are of no use to the program, from the first to the last.
    useless: Vec<(RawFd, RawFd)>,
}

/// Strings as execve(2) takes them.
struct Strings {
    /// Of what the strings are; null last.
    pointers: Vec<*const libc::c_char>,
    _strings: Vec<CString>,
}

// SAFETY: the pointers lead into the heap memory of the strings beside them, which nobody changes.
unsafe impl Send for Strings {}
// SAFETY: as above; they are only read.
unsafe impl Sync for Strings {}

impl Strings {
    fn new(strings: Vec<CString>) -> Self {
        let pointers = strings.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect();
        Self {
            pointers,
            _strings: strings,
        }
    }
}

impl Launch {
    /// Makes the command create processes that execute its program in this way, as the last that it does for them: hooks that
    /// are added later do not run. The environment is this process's and what the command adds to it. Must be called within a
    /// tokio runtime.
    ///
    /// Before Linux 5.9 (`close_range`) the command still waits until the program was executed.
    ///
    /// # Errors
    ///
    /// When a string has a NUL, or there is no descriptor left.
    pub(crate) fn arm(&self, command: &mut Command) -> io::Result<Armed> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut plan = self.plan(command, writer.as_raw_fd())?;
        let armed = Armed {
            program: command.as_std().get_program().to_string_lossy().into_owned(),
            directory: self.directory.clone().unwrap_or_default(),
            report: Receiver::from_owned_fd(reader)?,
            writer,
        };
        // SAFETY: between fork and exec `run` only makes system calls, none of which allocates or takes a lock; all data was
        // prepared before, and the plan lives as long as the command.
        unsafe { command.pre_exec(move || plan.run()) };
        Ok(armed)
    }

    fn plan(&self, command: &Command, report: RawFd) -> io::Result<Plan> {
        let command = command.as_std();
        let mut environment: std::collections::BTreeMap<OsString, OsString> = std::env::vars_os().collect();
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => environment.insert(name.to_owned(), value.to_owned()),
                None => environment.remove(name),
            };
        }
        let program = command.get_program();
        let candidates = candidates(program, environment.get(OsStr::new("PATH")).map(OsString::as_os_str));
        let arguments = command.get_args().map(terminated).collect::<io::Result<Vec<_>>>()?;
        let shell = [SHELL.to_owned(), CString::default()]
            .into_iter()
            .chain(arguments.clone());
        let variables = environment.iter().map(|(name, value)| {
            let mut variable = name.clone();
            variable.push("=");
            variable.push(value);
            terminated(&variable)
        });
        let identity = self.identity.as_ref().map(|identity| {
            let groups = identity.groups.iter().map(|group| group.as_raw()).collect();
            (identity.user, identity.group, groups)
        });
        Ok(Plan {
            session: self.session,
            limits: self.limits.clone(),
            directory: self.directory.as_ref().map(terminated).transpose()?,
            identity,
            candidates: candidates.iter().map(terminated).collect::<io::Result<_>>()?,
            shell: Strings::new(shell.collect()),
            arguments: Strings::new([terminated(program)?].into_iter().chain(arguments).collect()),
            environment: Strings::new(variables.collect::<io::Result<_>>()?),
            report,
            useless: useless(report)?,
        })
    }
}

/// The ranges of descriptors that the execution of a program closes, but for that of the report.
///
/// As long as the program is not executed, the new process would keep open what its creator closes, and what other processes
/// that are being created wait for.
fn useless(report: RawFd) -> io::Result<Vec<(RawFd, RawFd)>> {
    let mut kept = vec![0, 1, 2, report];
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // SAFETY: takes two numbers, and only looks.
        let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
        if flags >= 0 && flags & libc::FD_CLOEXEC == 0 {
            kept.push(number);
        }
    }
    kept.sort_unstable();
    kept.dedup();
    let next = kept.iter().skip(1).map(|kept| kept - 1).chain([RawFd::MAX]);
    let gaps = kept.iter().map(|kept| kept + 1).zip(next);
    Ok(gaps.filter(|(first, last)| first <= last).collect())
}

fn terminated(text: impl AsRef<OsStr>) -> io::Result<CString> {
    Ok(CString::new(text.as_ref().as_bytes())?)
}

/// The files that may be meant by the name of a program, as execvp(3) goes through them.
fn candidates(program: &OsStr, path: Option<&OsStr>) -> Vec<OsString> {
    let name = program.as_bytes();
    if name.contains(&b'/') || name.is_empty() {
        return vec![program.to_owned()];
    }
    let path = path.map_or(DEFAULT_PATH.as_bytes(), OsStr::as_bytes);
    let candidate = |directory: &[u8]| match directory {
        // The directory that it works in.
        b"" => program.to_owned(),
        directory => OsString::from_vec([directory, b"/", name].concat()),
    };
    path.split(|byte| *byte == b':').map(candidate).collect()
}

impl Plan {
    /// Never returns: the creator's command is told that the program was executed.
    fn run(&mut self) -> io::Result<()> {
        // None of this waits for anything, so that it is done when the command returns.
        let prepared = self.prepare();
        self.close_useless();
        let (step, error) = match prepared {
            Ok(()) => self.execute(),
            Err(error) => (Step::Prepare, error),
        };
        let [a, b, c, d] = error.raw_os_error().unwrap_or(libc::EINVAL).to_ne_bytes();
        let report = [step as u8, a, b, c, d];
        // SAFETY: the descriptor was open when the process was created, and is none of those that were closed. If nobody reads
        // what is written, nobody waits for it.
        unsafe { libc::write(self.report, report.as_ptr().cast(), report.len()) };
        // SAFETY: ends the process without running anything of its creator's.
        unsafe { libc::_exit(NOT_EXECUTED) }
    }

    /// Returns only if that fails.
    fn execute(&mut self) -> (Step, io::Error) {
        if let Some(directory) = &self.directory {
            // SAFETY: the string is terminated.
            if let Err(error) = succeeded(unsafe { libc::chdir(directory.as_ptr()) }.into()) {
                return (Step::Enter, error);
            }
        }
        // After the directory, which the creator may enter and its user may not.
        if let Some((user, group, groups)) = &self.identity
            && let Err(error) = become_user(*user, *group, groups)
        {
            return (Step::Prepare, error);
        }
        (Step::Execute, self.execute_candidates())
    }

    fn close_useless(&self) {
        for (first, last) in &self.useless {
            // SAFETY: takes three numbers. Nothing in this process uses the descriptors any more; if the kernel cannot close
            // them, they close when the program is executed.
            unsafe { libc::syscall(libc::SYS_close_range, *first, *last, 0) };
        }
    }

    fn prepare(&self) -> io::Result<()> {
        default_handlers();
        if self.session {
            nix::unistd::setsid()?;
            SigSet::empty().thread_set_mask()?;
        }
        for (resource, soft, hard) in &self.limits {
            setrlimit(*resource, *soft, *hard)?;
        }
        Ok(())
    }

    /// As execvp(3).
    fn execute_candidates(&mut self) -> io::Error {
        let mut result = Errno::ENOENT;
        for candidate in &self.candidates {
            let file = candidate.as_ptr();
            let mut error = execute(file, &self.arguments, &self.environment);
            if error == Errno::ENOEXEC {
                if let Some(script) = self.shell.pointers.get_mut(1) {
                    *script = file;
                }
                error = execute(SHELL.as_ptr(), &self.shell, &self.environment);
            }
            match error {
                Errno::EACCES => result = error,
                Errno::ENOENT | Errno::ENOTDIR | Errno::ESTALE | Errno::ENODEV | Errno::ETIMEDOUT => {}
                error => return error.into(),
            }
        }
        result.into()
    }
}

/// Returns only if that fails.
fn execute(file: *const libc::c_char, arguments: &Strings, environment: &Strings) -> Errno {
    // SAFETY: the file is a terminated string of the plan's, the others are arrays of such strings that end in null.
    unsafe { libc::execve(file, arguments.pointers.as_ptr(), environment.pointers.as_ptr()) };
    Errno::last()
}

/// Handlers are the creator's, and run in this process until it executes its program: a signal would be lost.
fn default_handlers() {
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: all zeros is a value of this plain structure, with the default disposition and no flags.
        let mut found: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: only writes to the structure. A signal that there is not is an error, and is passed over.
        let known = unsafe { libc::sigaction(signal, ptr::null(), &raw mut found) } == 0;
        if known && found.sa_sigaction != libc::SIG_DFL && found.sa_sigaction != libc::SIG_IGN {
            found.sa_sigaction = libc::SIG_DFL;
            // SAFETY: only reads the structure; the default disposition runs no code of this process's.
            unsafe { libc::sigaction(signal, &raw const found, ptr::null_mut()) };
        }
    }
}

/// Gives up the creator's groups and user. Raw system calls: those of the C library want to reach every thread.
fn become_user(user: Option<Uid>, group: Gid, groups: &[libc::gid_t]) -> io::Result<()> {
    let group = group.as_raw();
    // SAFETY: the pointer and the length are those of one slice.
    succeeded(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    // SAFETY: takes three numbers.
    succeeded(unsafe { libc::syscall(libc::SYS_setresgid, group, group, group) })?;
    let Some(user) = user.map(Uid::as_raw) else {
        return Ok(());
    };
    // SAFETY: takes three numbers.
    succeeded(unsafe { libc::syscall(libc::SYS_setresuid, user, user, user) })
}

fn succeeded(result: libc::c_long) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

impl Armed {
    /// The command has created the process with this pid.
    pub(crate) fn created(self, pid: u32) -> Execution {
        drop(self.writer);
        Execution {
            pid,
            program: self.program,
            directory: self.directory,
            report: self.report,
        }
    }
}

impl Execution {
    /// Waits until the process executes its program, or never will. It must not have been waited for. Cancel-safe.
    ///
    /// The report comes in one piece, and its end with the execution or the end of the process.
    pub async fn outcome(&mut self) -> Launched {
        let mut report = [0; 5];
        let [step, errno @ ..] = match self.report.read(&mut report).await {
            Ok(5) => report,
            _ if stat::has_executed(self.pid) => return Launched::Executed,
            _ => return Launched::Died,
        };
        let source = io::Error::from_raw_os_error(i32::from_ne_bytes(errno));
        let program = self.program.clone();
        Launched::Failed(if step == Step::Enter as u8 {
            LaunchError::Enter {
                program,
                directory: self.directory.clone(),
                source,
            }
        } else if step == Step::Execute as u8 {
            LaunchError::Execute { program, source }
        } else {
            LaunchError::Prepare { program, source }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(program: &str, path: Option<&str>) -> Vec<String> {
        let candidates = candidates(OsStr::new(program), path.map(OsStr::new));
        candidates.into_iter().map(|it| it.into_string().unwrap()).collect()
    }

    #[test]
    fn a_name_is_looked_for_in_the_path_and_a_path_is_not() {
        assert_eq!(found("sh", Some("/a:/b")), ["/a/sh", "/b/sh"]);
        assert_eq!(found("sh", Some("/a::b")), ["/a/sh", "sh", "b/sh"]);
        assert_eq!(found("sh", None), ["/bin/sh", "/usr/bin/sh"]);
        assert_eq!(found("./sh", Some("/a")), ["./sh"]);
        assert_eq!(found("", Some("/a")), [""]);
    }
}
