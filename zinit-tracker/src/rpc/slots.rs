//! Places for connections: so many, and those that only wait make room for those that want something.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::{sync::Notify, time::Instant};

/// Places for connections.
#[derive(Debug)]
pub(super) struct Slots {
    most: usize,
    taken: Mutex<Vec<Weak<Slot>>>,
}

/// A place; it is free again when the value goes.
#[derive(Debug)]
pub(super) struct Slot {
    /// What it is used for, and since when.
    state: Mutex<(Use, Instant)>,
    evicted: Notify,
}

/// What a connection is used for. Those that come first make room first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Use {
    /// Nothing: no request is under way, or the client does not read what it is sent.
    Idle,
    /// Lines are sent as they come.
    Following,
    /// A request is under way: makes no room.
    Serving,
    /// It has to go.
    Evicted,
}

/// The place was needed for somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Evicted;

impl Slots {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            taken: Mutex::default(),
        }
    }

    /// A place. If all are taken, the connection that has been idle for longest has to go, or else the one that has only
    /// been sent lines for longest; `None`: all are served.
    pub(super) fn take(&self) -> Option<Arc<Slot>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.retain(|slot| slot.strong_count() > 0);
        while taken.len() >= self.most {
            let slots = taken.iter().enumerate();
            let waiting = slots.filter_map(|(index, slot)| {
                let slot = slot.upgrade()?;
                let (usage, since) = *slot.state();
                (usage < Use::Serving).then_some((usage, since, index, slot))
            });
            let (_, _, index, slot) = waiting.min_by_key(|(usage, since, ..)| (*usage, *since))?;
            // It may have been given a request since it was looked at.
            if slot.evict() {
                taken.swap_remove(index);
            }
        }
        let slot = Arc::new(Slot {
            state: Mutex::new((Use::Idle, Instant::now())),
            evicted: Notify::new(),
        });
        taken.push(Arc::downgrade(&slot));
        Some(slot)
    }
}

impl Slot {
    /// Notes what the connection is used for from now on.
    ///
    /// # Errors
    ///
    /// It has to go: what it was about to begin must not be begun.
    pub(super) fn enter(&self, usage: Use) -> Result<(), Evicted> {
        let mut state = self.state();
        if state.0 == Use::Evicted {
            return Err(Evicted);
        }
        *state = (usage, Instant::now());
        Ok(())
    }

    /// Waits until the place is wanted back.
    pub(super) async fn evicted(&self) {
        self.evicted.notified().await;
    }

    /// Whether it has to go now.
    fn evict(&self) -> bool {
        let mut state = self.state();
        if state.0 >= Use::Serving {
            return false;
        }
        state.0 = Use::Evicted;
        self.evicted.notify_one();
        true
    }

    /// What is in there is good at any time.
    fn state(&self) -> MutexGuard<'_, (Use, Instant)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;

    fn is_evicted(slot: &Slot) -> bool {
        slot.state().0 == Use::Evicted
    }

    #[tokio::test(start_paused = true)]
    async fn the_connection_that_has_been_idle_for_longest_makes_room() {
        let slots = Slots::new(2);
        let first = slots.take().unwrap();
        advance(Duration::from_secs(1)).await;
        let second = slots.take().unwrap();
        advance(Duration::from_secs(1)).await;
        first.enter(Use::Idle).unwrap();
        let third = slots.take().unwrap();
        second.evicted().await;
        assert!(is_evicted(&second));
        assert!(!is_evicted(&first) && !is_evicted(&third));
    }

    #[tokio::test(start_paused = true)]
    async fn who_follows_lines_makes_room_when_nobody_is_idle() {
        let slots = Slots::new(3);
        let (first, second, third) = (slots.take().unwrap(), slots.take().unwrap(), slots.take().unwrap());
        first.enter(Use::Following).unwrap();
        second.enter(Use::Serving).unwrap();
        advance(Duration::from_secs(1)).await;
        third.enter(Use::Idle).unwrap();
        let fourth = slots.take().unwrap();
        assert!(is_evicted(&third) && !is_evicted(&first));
        fourth.enter(Use::Serving).unwrap();
        let fifth = slots.take().unwrap();
        assert!(is_evicted(&first));
        fifth.enter(Use::Serving).unwrap();
        assert!(slots.take().is_none());
        assert!(!is_evicted(&second));
    }

    #[test]
    fn nobody_who_is_served_has_to_go() {
        let slots = Slots::new(2);
        let (first, second) = (slots.take().unwrap(), slots.take().unwrap());
        first.enter(Use::Serving).unwrap();
        second.enter(Use::Serving).unwrap();
        assert!(slots.take().is_none());
        drop(first);
        assert!(slots.take().is_some());
        assert!(!is_evicted(&second));
    }

    #[test]
    fn who_has_to_go_begins_nothing() {
        let slots = Slots::new(1);
        let first = slots.take().unwrap();
        slots.take().unwrap();
        assert_eq!(first.enter(Use::Serving), Err(Evicted));
        assert!(!first.evict(), "it is told once");
    }
}
