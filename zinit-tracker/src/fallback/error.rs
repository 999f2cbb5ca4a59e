//! What goes wrong without the kernel's books.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::process::PidfdError;

/// An operation of the `procfs` fallback that failed.
#[derive(Debug, thiserror::Error)]
pub enum ProcfsError {
    /// A file could not be used.
    #[error("failed to {operation} {path}")]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// There is no `/proc` that shows the caller.
    #[error("/proc does not show this process: mount it (mount -t proc proc /proc)")]
    NoProc,
    /// The version 2 hierarchy is not mounted, or not at the caller's cgroup.
    #[error("no cgroup v2 hierarchy shows this process's cgroup")]
    NoCgroup,
    /// Orphans cannot be received.
    #[error("failed to become a subreaper")]
    Subreaper(#[source] io::Error),
    /// The thread that looks now and then could not be started.
    #[error("failed to start a thread")]
    Thread(#[source] io::Error),
    /// A process could not be held on to.
    #[error(transparent)]
    Pidfd(#[from] PidfdError),
}

pub(super) fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ProcfsError {
    move |source| ProcfsError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

pub(super) fn unreadable(source: io::Error) -> ProcfsError {
    failed("read", Path::new("/proc"))(source)
}
