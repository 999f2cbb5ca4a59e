//! The supervisor's own children, told from orphans that fell to it.
//!
//! Orphans are reaped here, own children by whoever waits for them, so that no exit status is stolen.

use std::{
    collections::HashMap,
    io,
    os::unix::process::ExitStatusExt as _,
    process::ExitStatus,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    sync::Notify,
};

use crate::{
    process::{Matched, PidfdError, zombie},
    stop::Fate,
};

/// How long the creation of a child is waited for by who wants none.
const CREATING: Duration = Duration::from_secs(1);

/// After how many orphans others get their turn.
const BATCH: usize = 64;

/// The supervisor's own children. Clones are the same set.
#[derive(Clone, Debug, Default)]
pub(super) struct Children(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Held shared while a child is created, so that it is known before anybody looks for orphans, and no longer.
    creating: RwLock<()>,
    /// No more children are created.
    closed: AtomicBool,
    /// How often a pid is known: it may go to a new child before the last one is struck off.
    own: Mutex<HashMap<u32, usize>>,
    /// An own child was waited for: orphans behind it can be reached.
    gone: Notify,
}

impl Children {
    /// Creates a child that is known from the beginning. `create` is given what creates the process of a command, and may wait before
    /// it uses that.
    pub(super) fn create<T, E>(
        &self,
        create: impl FnOnce(&mut dyn FnMut(&mut Command) -> io::Result<Child>) -> Result<(Child, T), E>,
    ) -> Result<(OwnChild, T), E> {
        let mut pid = None;
        let mut fork = |command: &mut Command| {
            let _creating = self.0.creating.read().unwrap_or_else(PoisonError::into_inner);
            if self.0.closed.load(Ordering::Acquire) {
                return Err(io::Error::other("the supervisor has shut down"));
            }
            let child = command.spawn()?;
            pid = child.id();
            *self.own().entry(pid.unwrap_or(0)).or_default() += 1;
            Ok(child)
        };
        match create(&mut fork) {
            Ok((child, more)) => {
                let child = OwnChild {
                    child,
                    pid: Some(pid.unwrap_or(0)),
                    children: self.clone(),
                };
                Ok((child, more))
            }
            Err(error) => {
                if let Some(pid) = pid {
                    self.strike_off(pid);
                }
                Err(error)
            }
        }
    }

    /// Whoever asks from now on creates no child. Does not wait for those who have asked.
    pub(super) fn refuse(&self) {
        self.0.closed.store(true, Ordering::Release);
    }

    /// From when this returns on, no more children are created.
    pub(super) fn close(&self) {
        self.refuse();
        // Those who have asked before are through.
        drop(self.0.creating.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Does something while no child is created; `None`: one is being created, and that takes longer than a second.
    pub(super) fn meanwhile_none<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        let deadline = Instant::now() + CREATING;
        loop {
            match self.0.creating.try_write() {
                Ok(_none) => return Some(work()),
                Err(TryLockError::Poisoned(poisoned)) => {
                    let _none = poisoned.into_inner();
                    return Some(work());
                }
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
                Err(TryLockError::WouldBlock) => thread::sleep(CREATING / 1000),
            }
        }
    }

    fn own(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        self.0.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn strike_off(&self, pid: u32) {
        let mut own = self.own();
        if let Some(count) = own.get_mut(&pid) {
            *count -= 1;
            if *count == 0 {
                own.remove(&pid);
            }
        }
        drop(own);
        self.0.gone.notify_one();
    }

    /// Reaps orphans as they die. Never returns, unless signals cannot be received.
    ///
    /// # Errors
    ///
    /// When there is no handler to be had for SIGCHLD.
    pub(super) async fn reap_orphans(self) -> io::Result<()> {
        let mut deaths = signal(SignalKind::child())?;
        loop {
            let children = self.clone();
            // It may have to wait while a child is created.
            match tokio::task::spawn_blocking(move || children.reap_some()).await {
                Ok(Ok(true)) => continue,
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::error!(%error, "failed to reap orphans"),
                Err(error) => tracing::error!(%error, "failed to reap orphans"),
            }
            tokio::select! {
                _ = deaths.recv() => {}
                () = self.0.gone.notified() => {}
            }
        }
    }

    /// Reaps orphans until the next zombie is an own child, or there is none. Returns whether to go on at once.
    fn reap_some(&self) -> io::Result<bool> {
        let _creating = self.0.creating.write().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..BATCH {
            match zombie::peek()? {
                Some(pid) if !self.own().contains_key(&pid) => {
                    zombie::reap(pid)?;
                    tracing::debug!(pid, "reaped an orphan");
                }
                _ => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// A child of the supervisor's own.
#[derive(Debug)]
pub(super) struct OwnChild {
    child: Child,
    /// `None` once it was waited for.
    pid: Option<u32>,
    children: Children,
}

impl OwnChild {
    /// Its pid, which is certainly its own: nobody has waited for it.
    pub(super) fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// The process itself, to be signalled; `None` once it was waited for.
    pub(super) fn matched(&self) -> Result<Option<Matched>, PidfdError> {
        Matched::child(&self.child)
    }

    /// Waits until it has ended. Cancel-safe. `None`: nobody knows how.
    pub(super) async fn ended(&mut self) -> Option<Fate> {
        let status = self.child.wait().await;
        self.struck_off(status)
    }

    /// Whether, and how, it has ended.
    pub(super) fn has_ended(&mut self) -> Option<Option<Fate>> {
        match self.child.try_wait() {
            Ok(None) => None,
            Ok(Some(status)) => Some(self.struck_off(Ok(status))),
            Err(error) => Some(self.struck_off(Err(error))),
        }
    }

    fn struck_off(&mut self, status: io::Result<ExitStatus>) -> Option<Fate> {
        if let Some(pid) = self.pid.take() {
            self.children.strike_off(pid);
        }
        match status {
            Ok(status) => status.code().map(Fate::Exited).or(status.signal().map(Fate::Killed)),
            Err(error) => {
                tracing::error!(%error, "failed to wait for a child");
                None
            }
        }
    }
}

impl Drop for OwnChild {
    fn drop(&mut self) {
        if let Some(pid) = self.pid.take() {
            self.children.strike_off(pid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_has_waited_until_the_end_creates_nothing() {
        let children = Children::default();
        let result = children.create(|fork| {
            // As one does who waits for the lock of the books.
            children.close();
            fork(&mut Command::new("true")).map(|child| (child, ()))
        });
        assert!(result.is_err());
    }
}
