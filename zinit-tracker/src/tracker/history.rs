//! What has happened: the records of those that died, and what is missing in the stream of events.

use zinit_ebpf::{Event, program};

use super::{Ended, ServiceInfo, Tracker, TrackerError};
use crate::process::ProcessKey;

/// How many dead members the kernel keeps records of, of all services together; the oldest make room.
pub const KEPT_EXITS: usize = 16_384;

/// Events that no reader will get, since the programs were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventLosses {
    /// Found the ring buffer full.
    pub dropped: u64,
    /// Creations that no hook saw; the processes may be nobody's, too.
    pub missed_creations: u64,
    /// Executions that the hook did not see; the processes may be nobody's, too.
    pub missed_executions: u64,
}

impl Tracker {
    /// The members that died, of all services, those included that are not registered any more; oldest first.
    ///
    /// The kernel keeps the records of the newest [`KEPT_EXITS`].
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn history(&self) -> Result<Vec<Ended>, TrackerError> {
        self.all_ended()
    }

    /// How exactly this process ended. `None`: it has not, or was no member, or its record has made room.
    ///
    /// # Errors
    ///
    /// As for [`Tracker::history`].
    pub fn end_of(&self, process: ProcessKey) -> Result<Option<Ended>, TrackerError> {
        Ok(self.all_ended()?.into_iter().find(|ended| ended.key == process))
    }

    /// What is missing in [`Tracker::events`], since the programs were loaded.
    ///
    /// # Errors
    ///
    /// When the counters cannot be read.
    pub fn event_losses(&self) -> Result<EventLosses, TrackerError> {
        let misses = self.misses()?;
        let execs = misses.iter().find(|(hook, _)| *hook == program::EXEC);
        Ok(EventLosses {
            dropped: self.stats()?.event_drops,
            missed_creations: self.missed_creations()?,
            missed_executions: execs.map_or(0, |(_, count)| *count),
        })
    }

    /// The pid that the caller's pid namespace has for the process of an event; 0 if it shows none, or that is unknown.
    #[must_use]
    pub fn pid_of(&self, event: &Event, service: Option<&ServiceInfo>) -> u32 {
        if self.here.level == 0 {
            return event.tgid;
        }
        let same_view = service.is_some_and(|info| info.pid_namespace == self.here.pid_namespace);
        if same_view { event.pid } else { 0 }
    }
}
