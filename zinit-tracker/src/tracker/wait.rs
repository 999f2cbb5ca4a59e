//! Waiting for processes to die, woken by their pidfds.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::event::epoll;
use tokio::io::unix::AsyncFd;

use super::{Tracker, TrackerError, service::Service};
use crate::process::{Matched, Pidfd, ProcessKey, readable};

/// How many pidfds are open at a time at most; the rest are opened when some of these have died.
const BATCH: usize = 256;

/// A quarter of the descriptors that this process may have, up to [`BATCH`].
fn batch() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let quarter = limit.map_or(BATCH, |limit| usize::try_from(limit / 4).unwrap_or(BATCH));
    quarter.clamp(1, BATCH)
}

/// How soon the books are read again while a change is under way that no descriptor announces.
pub(crate) const RECHECK: Duration = Duration::from_millis(1);

/// How soon a release is noticed by those who wait for a service to be empty.
const RELEASE_RECHECK: Duration = Duration::from_millis(100);

/// A process that is watched.
#[derive(Debug)]
pub(crate) enum Watched {
    /// A member, which may be signalled.
    Member(Matched),
    /// One that is dying already.
    Dying(Pidfd),
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Member(matched) => matched.as_fd(),
            Self::Dying(pidfd) => pidfd.as_fd(),
        }
    }
}

/// Pidfds, watched together through one epoll descriptor.
pub(crate) struct Watch {
    epoll: AsyncFd<OwnedFd>,
    by_token: HashMap<u64, (ProcessKey, Watched)>,
    tokens: HashMap<ProcessKey, u64>,
    next: u64,
    batch: usize,
}

impl Watch {
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Self {
            epoll: readable(epoll)?,
            by_token: HashMap::new(),
            tokens: HashMap::new(),
            next: 0,
            batch: batch(),
        })
    }

    pub(crate) fn has_room(&self) -> bool {
        self.by_token.len() < self.batch
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_token.is_empty()
    }

    pub(crate) fn contains(&self, key: ProcessKey) -> bool {
        self.tokens.contains_key(&key)
    }

    /// The member, if it is watched as one.
    pub(crate) fn member(&self, key: ProcessKey) -> Option<&Matched> {
        match self.by_token.get(self.tokens.get(&key)?)? {
            (_, Watched::Member(matched)) => Some(matched),
            (_, Watched::Dying(_)) => None,
        }
    }

    /// Watches a process no more.
    pub(crate) fn remove(&mut self, key: ProcessKey) {
        if let Some(token) = self.tokens.remove(&key) {
            self.drop_token(token);
        }
    }

    /// Closing is not enough: while a child of this process has a copy of the descriptor, it would stay in the epoll set.
    fn drop_token(&mut self, token: u64) -> Option<ProcessKey> {
        let (key, process) = self.by_token.remove(&token)?;
        if let Err(error) = epoll::delete(self.epoll.get_ref(), &process) {
            tracing::warn!(%error, "a process that is watched no more stays in the set of those that are");
        }
        Some(key)
    }

    pub(crate) fn keys(&self) -> impl Iterator<Item = ProcessKey> + '_ {
        self.tokens.keys().copied()
    }

    pub(crate) fn add(&mut self, key: ProcessKey, process: Watched) -> io::Result<()> {
        let token = self.next;
        self.next += 1;
        epoll::add(
            self.epoll.get_ref(),
            &process,
            epoll::EventData::new_u64(token),
            epoll::EventFlags::IN,
        )?;
        self.by_token.insert(token, (key, process));
        self.tokens.insert(key, token);
        Ok(())
    }

    /// Waits until a watched process is dead and takes out all that are. Cancel-safe. For ever, if none is watched.
    pub(crate) async fn next_dead(&mut self) -> io::Result<Vec<ProcessKey>> {
        loop {
            let dead = self.take_dead()?;
            if !dead.is_empty() {
                return Ok(dead);
            }
            self.epoll.readable().await?.clear_ready();
        }
    }

    /// Takes out the watched processes that are dead.
    pub(crate) fn take_dead(&mut self) -> io::Result<Vec<ProcessKey>> {
        let mut dead = Vec::new();
        loop {
            let mut events = Vec::with_capacity(BATCH);
            let now = rustix::event::Timespec::default();
            match epoll::wait(
                self.epoll.get_ref().as_fd(),
                rustix::buffer::spare_capacity(&mut events),
                Some(&now),
            ) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            if events.is_empty() {
                return Ok(dead);
            }
            for event in events {
                if let Some(key) = self.drop_token(event.data.u64()) {
                    self.tokens.remove(&key);
                    dead.push(key);
                }
            }
        }
    }
}

impl Tracker {
    /// Waits until the service has no member. Cancel-safe; starts no stop.
    ///
    /// # Errors
    ///
    /// When the books cannot be read or the processes not be watched.
    pub async fn wait_empty(&self, service: &Service) -> Result<(), TrackerError> {
        let mut watch = Watch::new()?;
        loop {
            match self.info_of(service.id())? {
                Some(info) if info.live > 0 => {}
                // One that was unregistered had no member.
                _ => return Ok(()),
            }
            for member in self.processes(service)? {
                if watch.has_room()
                    && !watch.contains(member.key)
                    && let Some(matched) = self.open_member(&member)?
                {
                    watch.add(member.key, Watched::Member(matched))?;
                }
            }
            if watch.is_empty() {
                // A member is being created or dies right now.
                tokio::time::sleep(RECHECK).await;
            } else {
                // A released process is not waited for, and nothing announces a release.
                let dead = tokio::time::timeout(RELEASE_RECHECK, watch.next_dead()).await;
                for key in dead.unwrap_or(Ok(Vec::new()))? {
                    self.bury(key)?;
                }
            }
        }
    }
}
