//! Whether the books agree with themselves. The programs keep counters and entries in step: a member is counted before its entry
//! appears and until after that is gone. Where they are not, another program has written to the maps.

use std::time::Duration;

use tokio::time::Instant;

use super::{Stop, StopError};
use crate::tracker::{Member, Tracking};

/// For how long a member may be counted without an entry: it is being entered or taken out by a program, which does not wait.
const STEP: Duration = Duration::from_millis(100);

impl Stop<'_> {
    /// Compares entries with counters that say that nobody is left; once they agree, again only when others have joined. Returns whether
    /// nobody is: by the counters, or by the entries if there is a contradiction.
    pub(super) fn compare(&mut self) -> Result<bool, StopError> {
        if self.tracker.tracking() == Tracking::Procfs {
            return Ok(true);
        }
        if self.contradictions == 0 {
            let forks = self.forks();
            if self.agreed == Some(forks) {
                return Ok(true);
            }
            let entries = self.tracker.entries_against(&self.ids())?;
            if entries.is_empty() {
                self.agreed = Some(forks);
                return Ok(true);
            }
            for kin in &mut self.family {
                if kin.refresh(self.tracker)? > 0 {
                    return Ok(false);
                }
            }
            if self.forks() != forks {
                return Ok(false);
            }
            self.contradictions = entries.len() as u64;
            tracing::warn!(
                service = self.service.name(),
                entries = entries.len(),
                "counters and entries of the books contradict each other: another program has written to the maps"
            );
        }
        let members = self.tracker.members(&self.ids())?;
        let there = self.tracker.existing()?;
        Ok(!members.iter().any(|member| there.contains_key(&member.key)))
    }

    /// Notes for how long members have been counted of whom there is no entry.
    pub(super) fn look_for_entries(&mut self, members: &[Member]) {
        let live: u64 = self.family.iter().map(|kin| kin.info.live).sum();
        let exits = self.family.iter().map(|kin| kin.info.exits).sum();
        let now = (self.forks(), exits);
        if self.tracker.tracking() == Tracking::Procfs || live == 0 || !members.is_empty() {
            self.without_entry = None;
            return;
        }
        match self.without_entry {
            Some((since, forks, exits)) if (forks, exits) == now => {
                if since.elapsed() > STEP {
                    self.contradictions = self.contradictions.max(live);
                }
            }
            _ => self.without_entry = Some((Instant::now(), now.0, now.1)),
        }
    }
}
