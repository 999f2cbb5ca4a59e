//! The ring buffer of events: hints that something changed. The maps are the truth.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use aya::maps::{MapData, MapError, RingBuf};
use rustix::fs::{FlockOperation, flock};
use tokio::io::unix::AsyncFd;
use zinit_ebpf::Event;

use crate::process::readable;

/// Why no events can be had.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// The ring buffer has one reader at a time.
    #[error("another process reads the events: stop it first")]
    Busy,
    /// Without the kernel's books nothing announces what happens.
    #[error("level procfs records no events: that takes level ebpf (`zinit-tracker doctor` says what is missing)")]
    NotRecorded,
    /// The ring buffer could not be opened.
    #[error("failed to open the event ring buffer")]
    Map(#[from] MapError),
    /// The ring buffer could not be watched.
    #[error("failed to watch the event ring buffer")]
    Io(#[from] io::Error),
}

/// Events as they happen, until dropped. One reader at a time, machine-wide.
pub struct EventStream {
    ring: RingBuf<MapData>,
    ready: AsyncFd<OwnedFd>,
    _lock: File,
}

impl std::fmt::Debug for EventStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventStream").finish_non_exhaustive()
    }
}

impl EventStream {
    /// `lock`: a path whose lock makes this the only reader.
    pub(super) fn new(ring: RingBuf<MapData>, lock: &Path) -> Result<Self, EventsError> {
        let lock = File::open(lock)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            rustix::io::Errno::WOULDBLOCK => EventsError::Busy,
            error => EventsError::Io(error.into()),
        })?;
        let ready = readable(ring.as_fd().try_clone_to_owned()?)?;
        Ok(Self {
            ring,
            ready,
            _lock: lock,
        })
    }

    /// The next event. Events that found the buffer full are missing; `Tracker::stats` counts them.
    ///
    /// Cancel-safe: an event is either returned or still to come.
    pub async fn next(&mut self) -> Result<Event, EventsError> {
        loop {
            if let Some(event) = self.take() {
                return Ok(event);
            }
            let mut guard = self.ready.readable().await?;
            // An event that arrives from here on makes the descriptor ready again; one that came before is found now.
            guard.clear_ready();
            drop(guard);
        }
    }

    /// The next event if one is waiting.
    pub fn take(&mut self) -> Option<Event> {
        loop {
            let item = self.ring.next()?;
            if let Some(event) = decoded(&item) {
                return Some(event);
            }
        }
    }
}

/// The event in an item of the ring; `None`: it is something else.
pub(super) fn decoded(item: &[u8]) -> Option<Event> {
    let whole = item.len() == size_of::<Event>();
    // SAFETY: it is as long as an `Event`, which is plain data; the read needs no alignment.
    whole.then(|| unsafe { item.as_ptr().cast::<Event>().read_unaligned() })
}
