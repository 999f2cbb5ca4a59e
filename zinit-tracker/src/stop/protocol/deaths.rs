//! Deaths: from the exit records of the books, and observed through pidfds until nothing is held any more.

use std::collections::HashSet;

use tokio::time::Instant;

use super::{KILL_RECHECK, Stop, StopError};
use crate::{
    process::ProcessKey,
    stop::report::{Fate, StoppedProcess},
    tracker::{Ended, Existence, TrackerError, Watched},
};

/// So many deaths are looked at one by one.
const FEW: usize = 16;

impl Stop<'_> {
    /// Waits until every member that died has been observed dead.
    pub(super) async fn verify(&mut self, deadline: Instant) -> Result<(), StopError> {
        loop {
            let complete = self.observe_exits()?;
            self.bury_dead()?;
            self.forget_released(&[])?;
            if complete && self.unaccounted() > 0 && self.is_empty()? {
                self.account_for_unrecorded()?;
            }
            if complete && self.watch.is_empty() {
                self.unexplained = self.may_be_dying()?;
                if !self.unexplained {
                    return Ok(());
                }
            }
            if Instant::now() >= deadline || !self.is_empty()? {
                return Ok(());
            }
            self.wait(deadline.min(Instant::now() + KILL_RECHECK)).await?;
        }
    }

    /// Exits that were counted during the stop and of which nothing else is known.
    pub(super) fn unaccounted(&self) -> u64 {
        self.exits().saturating_sub(self.accounted.len() as u64)
    }

    /// Of more members that die at once than there are exit records, some leave no record. Those that were listed are
    /// looked for among all processes: who is not there any more is reaped, and who is dead is watched.
    pub(super) fn account_for_unrecorded(&mut self) -> Result<(), StopError> {
        if self.family.iter().any(|kin| kin.info.released) {
            // Who was released and died is none of those that were counted.
            return Ok(());
        }
        let there = self.tracker.existing()?;
        let unrecorded = |seen: &&StoppedProcess| seen.fate.is_none() && !self.accounted.contains(&seen.key);
        let candidates: Vec<_> = self
            .seen
            .values()
            .filter(unrecorded)
            .filter(|seen| seen.pid != 0)
            .map(|seen| (seen.key, seen.pid))
            .collect();
        for (key, pid) in candidates {
            match there.get(&key) {
                // It was released.
                Some(Existence::Alive) => continue,
                Some(Existence::Dying) => match self.tracker.open_matching(pid, key) {
                    Err(TrackerError::Pidfd(error)) if error.is_exhaustion() => continue,
                    result => match result? {
                        Some(_) if !self.watch.has_room() => continue,
                        Some(pidfd) => self.keep(key, Watched::Dying(pidfd))?,
                        None => {}
                    },
                },
                Some(Existence::Dead) | None => {}
            }
            self.accounted.insert(key);
        }
        Ok(())
    }

    /// Whether a process is dying that may have been a member: deaths of the family have left no record, and nobody's record
    /// is this one's. A member can stay so for long, as one whose tracer does not reap its threads.
    pub(super) fn may_be_dying(&self) -> Result<bool, StopError> {
        let counted: u64 = self.family.iter().map(|kin| kin.info.exits).sum();
        let explained = self.recorded.union(&self.accounted).count();
        if counted <= explained as u64 {
            return Ok(false);
        }
        let there = self.tracker.existing()?;
        let mut dying = there.iter().filter(|(_, found)| **found == Existence::Dying).peekable();
        if dying.peek().is_none() {
            return Ok(false);
        }
        let all: Vec<_> = self.tracker.services()?.iter().map(|info| info.id).collect();
        let known: HashSet<_> = self.tracker.ended(&all)?.into_iter().map(|ended| ended.key).collect();
        for (key, _) in dying {
            if !known.contains(key) && !self.recorded.contains(key) && !self.tracker.is_recorded_alive(*key)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Looks through the exit records and watches those dead members that still close their files.
    ///
    /// Returns whether all have been observed or are being watched.
    pub(super) fn observe_exits(&mut self) -> Result<bool, StopError> {
        for kin in &mut self.family {
            kin.refresh(self.tracker)?;
        }
        let counted = self.exits();
        if self.exits_read == Some(counted) {
            return Ok(true);
        }
        let mut complete = true;
        let mut unobserved = Vec::new();
        for ended in self.tracker.ended(&self.ids())? {
            self.recorded.insert(ended.key);
            if !self.ended_before.contains(&ended.key) {
                self.enter_death(&ended);
            }
            if !self.observed.contains(&ended.key) {
                unobserved.push(ended);
            }
        }
        if unobserved.len() > FEW {
            // One walk over all processes costs less than a look at each.
            let there = self.tracker.existing()?;
            let may_hold = |ended: &Ended| there.get(&ended.key).is_some_and(|found| *found != Existence::Dead);
            let (left, done): (Vec<_>, _) = unobserved.into_iter().partition(may_hold);
            self.observed.extend(done.into_iter().map(|ended| ended.key));
            unobserved = left;
        }
        for ended in unobserved {
            let opened = match self.tracker.open_matching(ended.pid, ended.key) {
                Err(TrackerError::Pidfd(error)) if error.is_exhaustion() => {
                    complete = false;
                    continue;
                }
                result => result?,
            };
            match opened {
                Some(pidfd) if !pidfd.is_dead() => {
                    complete &= self.watch.has_room();
                    self.keep(ended.key, Watched::Dying(pidfd))?;
                }
                Some(_) | None => {
                    self.observed.insert(ended.key);
                }
            }
        }
        // A death may be counted a moment before its record is there.
        if complete && self.unaccounted() == 0 {
            self.exits_read = Some(counted);
        }
        Ok(complete)
    }

    /// Notes how a member ended that was alive when the stop began.
    pub(super) fn enter_death(&mut self, ended: &Ended) {
        let seen = self
            .seen
            .entry(ended.key)
            .or_insert_with(|| StoppedProcess::new(ended.key, ended.pid, ended.parent, &ended.comm));
        seen.comm.clone_from(&ended.comm);
        if seen.ended_after.is_none() {
            seen.fate = ended.status.map(Fate::of_wait_status);
            seen.ended_after = Some(ended.ended.saturating_sub(self.began_boottime));
            self.accounted.insert(ended.key);
        }
    }

    pub(super) fn bury_dead(&mut self) -> Result<(), StopError> {
        let dead = self.watch.take_dead()?;
        self.bury(&dead)
    }

    /// Members that are dead leave the books even if the kernel missed their exit.
    pub(super) fn bury(&mut self, dead: &[ProcessKey]) -> Result<(), StopError> {
        for key in dead {
            if self.tracker.bury(*key)? {
                self.accounted.insert(*key);
            }
        }
        Ok(())
    }
}
