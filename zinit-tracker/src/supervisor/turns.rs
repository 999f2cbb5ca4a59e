//! Turns to start something: each start takes a thread, and the books let in one at a time for the most part.

use std::{
    pin::pin,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

/// How many have their turn at once.
const AT_ONCE: usize = 8;

/// How long all of them may take: a start can hang, on a name service that does not answer, and must not hold up the others.
const PATIENCE: Duration = Duration::from_secs(1);

/// Turns.
#[derive(Debug)]
pub(super) struct Turns {
    free: Semaphore,
    over: AtomicU64,
}

/// A turn; it is over when the value goes.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    turns: &'a Turns,
    /// `None`: those who have theirs hang.
    permit: Option<SemaphorePermit<'a>>,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self {
            free: Semaphore::new(AT_ONCE),
            over: AtomicU64::new(0),
        }
    }

    /// Waits for a turn, in the order of the calls.
    pub(super) async fn take(&self) -> Turn<'_> {
        let mut acquired = pin!(self.free.acquire());
        let permit = loop {
            let over = self.over.load(Ordering::Relaxed);
            match timeout(PATIENCE, &mut acquired).await {
                Ok(permit) => break permit.ok(),
                Err(_) if self.over.load(Ordering::Relaxed) == over => break None,
                Err(_) => {}
            }
        };
        Turn { turns: self, permit }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // The others' ends do not show that those who have their turn get on.
        if self.permit.is_some() {
            self.turns.over.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, atomic::AtomicUsize};

    use tokio::{task::JoinSet, time::sleep};

    use super::*;

    /// How many of so many that take so long each had their turn at the same time.
    async fn most_at_once(turns: &Arc<Turns>, count: usize, takes: Duration) -> usize {
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut running = JoinSet::new();
        for _ in 0..count {
            let (turns, now, most) = (Arc::clone(turns), Arc::clone(&now), Arc::clone(&most));
            running.spawn(async move {
                let _turn = turns.take().await;
                most.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                sleep(takes).await;
                now.fetch_sub(1, Ordering::Relaxed);
            });
        }
        while running.join_next().await.is_some() {}
        most.load(Ordering::Relaxed)
    }

    #[tokio::test(start_paused = true)]
    async fn some_have_their_turn_at_once_however_long_the_queue_is() {
        let turns = Arc::new(Turns::new());
        let most = most_at_once(&turns, 100 * AT_ONCE, Duration::from_millis(100)).await;
        assert_eq!(most, AT_ONCE);
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_hang_hold_up_nobody() {
        let turns = Arc::new(Turns::new());
        let mut hanging = Vec::new();
        for _ in 0..AT_ONCE {
            hanging.push(turns.take().await);
        }
        assert_eq!(most_at_once(&turns, 3, Duration::from_millis(100)).await, 3);
        drop(hanging);
        assert_eq!(most_at_once(&turns, 100, Duration::from_millis(100)).await, AT_ONCE);
    }
}
