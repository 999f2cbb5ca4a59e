//! What goes wrong with services.

use crate::{
    fallback::ProcfsError,
    kernel::{BooksError, KernelError, PinError, RequirementError},
    process::PidfdError,
};

/// Why an operation on services failed.
#[derive(Debug, thiserror::Error)]
pub enum TrackerError {
    /// The kernel or the caller lacks something.
    #[error(transparent)]
    Requirement(#[from] RequirementError),
    /// The kernel's books could not be opened or closed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The kernel's books could not be read or changed.
    #[error(transparent)]
    Books(#[from] BooksError),
    /// The pins could not be locked.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The books of level `procfs` could not be kept.
    #[error(transparent)]
    Procfs(#[from] ProcfsError),
    /// Nobody else's books can be joined at level `procfs`.
    #[error(
        "level procfs keeps its books in the process that runs the service, and nobody else can see them: to stop the service, \
         send that process SIGTERM"
    )]
    NotShared,
    /// A pidfd could not be used.
    #[error(transparent)]
    Pidfd(#[from] PidfdError),
    /// The task iterator does not show the caller.
    #[error(
        "the kernel does not show this process under its pid: in a nested pid namespace that needs Linux 6.5 or a stable release since"
    )]
    NoSelf,
    /// There is no `/proc` that shows the caller.
    #[error("/proc does not show this process: mount it (mount -t proc proc /proc)")]
    NoProc,
    /// A name that cannot be a name.
    #[error("{name:?} cannot be a name: {reason}")]
    BadName {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The name belongs to another service.
    #[error("the name {0:?} is in use: choose another with --name, or stop that service first")]
    NameInUse(String),
    /// No such service.
    #[error("no service is named {0:?}: `zinit-tracker ps` lists them")]
    UnknownService(String),
    /// Services of several instances have the name.
    #[error("several instances have a service {name:?}: choose one of {candidates}")]
    AmbiguousService {
        /// The name.
        name: String,
        /// The choices.
        candidates: String,
    },
    /// The service was unregistered.
    #[error("service {0:?} is not registered any more")]
    NotRegistered(String),
    /// The service has members.
    #[error("service {name:?} still has processes ({live}): stop it first")]
    NotEmpty {
        /// The service.
        name: String,
        /// How many.
        live: u64,
    },
    /// Another process has the tracker open.
    #[error("another process uses the tracker: end it first")]
    InUse,
    /// Another program holds the lock of the books for longer than this one may wait.
    #[error("another program holds the lock of the books: `lslocks` names it; let it go on, or end it")]
    Locked,
    /// The service is being stopped.
    #[error("service {0:?} is being stopped")]
    Stopping(String),
    /// The command could not be started.
    #[error("failed to start {program:?}")]
    Command {
        /// The program.
        program: String,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// The process was created but is not in the books, and was killed for that.
    #[error("{program:?} was started but could not be tracked (the books are full?), so it was killed")]
    Untracked {
        /// The program.
        program: String,
    },
    /// No process has the pid.
    #[error("no process has pid {0} (a thread may have it, or a process that is dead)")]
    NoSuchProcess(u32),
    /// The pid is not a service's to have.
    #[error("refusing pid {pid}: {reason}")]
    Refused {
        /// The pid.
        pid: u32,
        /// Why.
        reason: &'static str,
    },
    /// The process belongs to a service.
    #[error("pid {pid} already belongs to service {service:?}")]
    AlreadyTracked {
        /// The pid.
        pid: u32,
        /// Its service.
        service: String,
    },
    /// The process belongs to no service.
    #[error("pid {0} belongs to no service")]
    NotTracked(u32),
    /// The process belongs to no service, and no recorded one that had the pid did.
    #[error("pid {0} belongs to no service, and no process of that pid that is on record did")]
    NoLineage(u32),
    /// A fault of this program; what it has panicked with is in the log.
    #[error("an operation on the books broke off: {0}")]
    BrokenOff(String),
    /// A file descriptor could not be watched.
    #[error("failed to watch processes")]
    Watch(#[from] std::io::Error),
}
