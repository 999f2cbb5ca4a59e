//! Room for answers that wait to be read: so many bytes for all clients together, and so many for a batch.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::RpcError;

/// The most bytes that the answers of a batch have together.
pub const MAX_BATCH_ANSWER: usize = 32 * 1024 * 1024;

/// The most bytes of answers that wait to be read, of all clients together: the longest that a client takes.
pub(super) const MAX_WAITING: usize = 512 * 1024 * 1024;

/// An answer to a single request that is not longer needs no room: there is one of them a connection.
const SMALL: usize = 64 * 1024;

/// The room of all clients. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Room(Arc<Semaphore>);

/// The room of one message's answers.
#[derive(Debug)]
pub(super) struct Share {
    room: Room,
    /// What is left of a batch's; `None`: the answer is the only one.
    left: Option<AtomicUsize>,
}

/// An answer that has its room.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) text: String,
    /// Given back when the answer goes.
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

impl Room {
    /// Room for so many bytes.
    pub(super) fn new(most: usize) -> Self {
        Self(Arc::new(Semaphore::new(most)))
    }

    pub(super) fn for_one(&self) -> Share {
        Share {
            room: self.clone(),
            left: None,
        }
    }

    pub(super) fn for_batch(&self) -> Share {
        Share {
            room: self.clone(),
            left: Some(AtomicUsize::new(MAX_BATCH_ANSWER)),
        }
    }
}

impl Share {
    /// Whether there may be room for another answer; an error otherwise, and nothing is to be done for it.
    pub(super) fn check(&self) -> Result<(), RpcError> {
        match &self.left {
            Some(left) if left.load(Ordering::Relaxed) == 0 => Err(RpcError::busy(
                "this was not done: the answers of a batch have at most 32 MiB together, so ask for it in another message",
            )),
            _ => Ok(()),
        }
    }

    /// Takes room for an answer.
    ///
    /// # Errors
    ///
    /// There is none: the answer is to be dropped.
    pub(super) fn keep(&self, text: String) -> Result<Kept, RpcError> {
        if let Some(left) = &self.left {
            let fits = |left: usize| left.checked_sub(text.len());
            if left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_err() {
                // What comes behind it would be smaller by chance only.
                left.store(0, Ordering::Relaxed);
                return Err(RpcError::busy(
                    "this was done, but the answers of a batch have at most 32 MiB together: ask for it in another message",
                ));
            }
        } else if text.len() <= SMALL {
            return Ok(Kept { text, permit: None });
        }
        let size = u32::try_from(text.len()).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room.0);
        match room.try_acquire_many_owned(size) {
            Ok(permit) => Ok(Kept {
                text,
                permit: Some(permit),
            }),
            Err(_) => Err(RpcError::busy(
                "this was done, but answers of 512 MiB wait for clients to read them: ask again later",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(length: usize) -> String {
        "x".repeat(length)
    }

    #[test]
    fn a_batch_has_so_much_room_and_then_nothing_more_is_done() {
        let share = Room::new(MAX_WAITING).for_batch();
        let kept = share.keep(text(MAX_BATCH_ANSWER - 10)).unwrap();
        assert!(share.check().is_ok());
        assert!(share.keep(text(11)).unwrap_err().message.contains("was done"));
        assert!(share.check().unwrap_err().message.contains("not done"));
        drop(kept);
        assert!(share.check().is_err(), "what was read was an answer of this batch too");
    }

    #[test]
    fn all_clients_together_have_so_much_room_which_they_give_back() {
        let room = Room::new(2 * SMALL);
        let first = room.for_batch().keep(text(SMALL)).unwrap();
        assert!(room.for_one().keep(text(SMALL + 1)).is_err());
        assert!(
            room.for_one().keep(text(SMALL)).is_ok(),
            "small answers are always given"
        );
        let second = room.for_batch().keep(text(SMALL)).unwrap();
        assert!(room.for_batch().keep(text(1)).is_err());
        drop((first, second));
        assert!(room.for_one().keep(text(SMALL + 1)).is_ok());
    }
}
