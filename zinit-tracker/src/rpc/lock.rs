//! The lock of a socket's path: whoever holds it is the only supervisor there, also if somebody removes the socket.
//!
//! It is a file of its own beside the socket, which nobody else may open: a lock on the directory, or on a file that others
//! can read, could be held by anybody. The file has the pid of its holder, for messages only.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{FlockOperation, Mode, OFlags};
use tokio::time::{Instant, sleep};

use super::server::ServerError;
use crate::process::Pidfd;

/// How long another supervisor may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often the lock is tried meanwhile: the kernel does not announce that it is free to those who wait for other things too.
const AGAIN: Duration = Duration::from_millis(10);

/// The lock. It is given back, and its file removed, when the value goes; the kernel gives it back if the process is killed.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Locks the path of a socket.
    ///
    /// # Errors
    ///
    /// Another supervisor has it, or the file cannot be used.
    pub(super) async fn take(socket: &Path) -> Result<Self, ServerError> {
        let path = path_of(socket);
        let failed = |source: io::Error| ServerError::Path {
            operation: "lock",
            path: path.clone(),
            source,
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let file = open(&path)?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // Its holder may have removed it since it was opened: then it is the lock of nothing.
                Ok(()) if is_in_place(&file, &path).map_err(failed)? => {
                    let mut lock = Self { file, path };
                    lock.sign();
                    return Ok(lock);
                }
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) if Instant::now() < deadline => {
                    let holder = Holder::of(&file);
                    // Somebody who answers does not end. For one who was killed a process may answer for a moment that was being
                    // created, and has lock and socket from it.
                    if super::server::is_live(socket).await && !holder.has_died() {
                        return Err(ServerError::Live(socket.to_owned(), holder));
                    }
                    sleep(AGAIN).await;
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(ServerError::Held(socket.to_owned(), Holder::of(&file)));
                }
                Err(error) => return Err(failed(error.into())),
            }
        }
    }

    /// Of the process that this one was before it executed another program: the kernel's lock is the descriptor's.
    pub(super) fn inherit(file: File, socket: &Path) -> io::Result<Self> {
        let path = path_of(socket);
        if !is_in_place(&file, &path)? {
            return Err(io::Error::other("the lock's file was replaced"));
        }
        Ok(Self { file, path })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Notes whose it is.
    fn sign(&mut self) {
        let text = format!("{}\n", std::process::id());
        let signed = self.file.set_len(0).and_then(|()| self.file.write_all(text.as_bytes()));
        if let Err(error) = signed {
            tracing::warn!(%error, path = %self.path.display(), "failed to note whose lock it is");
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is held: whoever has opened it meanwhile sees that it is not in place.
        if is_in_place(&self.file, &self.path).unwrap_or(false)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "failed to remove the lock");
        }
    }
}

/// Where the lock of a socket is.
fn path_of(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

/// Opens or creates the file, which must be ours and nobody else's to open.
fn open(path: &Path) -> Result<File, ServerError> {
    let failed = |source: rustix::io::Errno| ServerError::Path {
        operation: "open the lock",
        path: path.to_owned(),
        source: source.into(),
    };
    // A pipe that somebody has put there must not make us wait.
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?);
    let metadata = file.metadata().map_err(|source| ServerError::Path {
        operation: "look at the lock",
        path: path.to_owned(),
        source,
    })?;
    // It is written to, so it must not be another file of ours that somebody has linked to.
    let ours = metadata.is_file() && metadata.uid() == rustix::process::geteuid().as_raw() && metadata.nlink() <= 1;
    if !ours {
        return Err(ServerError::NoLock(path.to_owned()));
    }
    rustix::fs::fchmod(&file, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    Ok(file)
}

/// Whether the path leads to this file.
fn is_in_place(file: &File, path: &Path) -> io::Result<bool> {
    let opened = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (opened.dev(), opened.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Who has a lock, as far as that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder(Option<u32>);

impl Holder {
    /// Nobody knows who.
    pub(super) const UNKNOWN: Self = Self(None);

    fn of(file: &File) -> Self {
        let mut text = String::new();
        // It may be about to write.
        match file.take(16).read_to_string(&mut text) {
            Ok(_) => Self(text.trim_end().parse().ok()),
            Err(_) => Self::UNKNOWN,
        }
    }

    fn has_died(self) -> bool {
        let opened = self.0.and_then(|pid| Pidfd::open(pid).ok());
        opened.is_some_and(|process| process.is_none_or(|process| process.is_dead()))
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(pid) => write!(f, "a supervisor (pid {pid})"),
            None => f.write_str("a supervisor"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[tokio::test]
    async fn a_lock_that_was_left_is_taken_and_one_that_is_given_back_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("z.sock");
        let path = directory.path().join("z.sock.lock");
        fs::write(&path, "4194305 is long gone\n").unwrap();
        let lock = Lock::take(&socket).await.unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(lock);
        assert!(!path.exists());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_lock_gets_the_one_that_is_in_place() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("z.sock");
        let first = Lock::take(&socket).await.unwrap();
        let refused = Lock::take(&socket).await.unwrap_err().to_string();
        assert!(refused.contains(&format!("pid {}", std::process::id())), "{refused}");
        let second = async {
            let waits = Lock::take(&socket);
            tokio::pin!(waits);
            tokio::select! {
                biased;
                _ = &mut waits => panic!("there are two"),
                () = sleep(AGAIN * 5) => drop(first),
            }
            waits.await
        };
        let second = second.await.unwrap();
        assert!(is_in_place(&second.file, &second.path).unwrap());
    }

    #[tokio::test]
    async fn what_is_no_lock_of_ours_is_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("z.sock");
        let path = directory.path().join("z.sock.lock");
        let precious = directory.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        symlink(&precious, &path).unwrap();
        assert!(Lock::take(&socket).await.is_err());
        fs::remove_file(&path).unwrap();
        fs::hard_link(&precious, &path).unwrap();
        let refused = Lock::take(&socket).await.unwrap_err().to_string();
        assert!(refused.contains("remove it"), "{refused}");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(Lock::take(&socket).await.is_err());
        assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    }
}
