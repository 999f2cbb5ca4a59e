//! The services that a stop concerns: the one that was asked for, and those nested in it.

use super::{Stop, StopError};
use crate::tracker::{ServiceId, ServiceInfo, Tracker};

/// A service of the family that is stopped: the one that was asked for, or one nested in it.
pub(super) struct Kin {
    /// Its record when it was last seen: once it is empty, whoever registered it may unregister it.
    pub(super) info: ServiceInfo,
    /// Exits that it had counted when the stop met it.
    pub(super) exits_before: u64,
}

impl Kin {
    pub(super) fn new(info: ServiceInfo) -> Self {
        Self { info, exits_before: 0 }
    }

    /// Reads the record again and returns how many members there are; one that is gone has none.
    pub(super) fn refresh(&mut self, tracker: &Tracker) -> Result<u64, StopError> {
        match tracker.info_of(self.info.id)? {
            Some(info) => {
                self.info = info;
                Ok(self.info.live)
            }
            None => Ok(0),
        }
    }
}

impl Stop<'_> {
    pub(super) fn ids(&self) -> Vec<ServiceId> {
        self.family.iter().map(|kin| kin.info.id).collect()
    }

    /// Takes services into the family that are nested in it and were not known. Returns whether there were any.
    pub(super) fn meet_kin(&mut self) -> Result<bool, StopError> {
        let known = self.ids();
        let nested = self.tracker.nested(self.service.id())?;
        let mut met = false;
        for id in nested.into_iter().filter(|id| !known.contains(id)) {
            if let Some(info) = self.tracker.info_of(id)? {
                // It was registered during the stop, or its exits are counted when the stop begins.
                self.family.push(Kin::new(info));
                met = true;
            }
        }
        Ok(met)
    }

    /// Whether no service of the family has a member, and none was added to the family.
    pub(super) fn is_empty(&mut self) -> Result<bool, StopError> {
        // Outer services first: once they are empty, nobody is left to spawn into the inner ones.
        for kin in &mut self.family {
            if kin.refresh(self.tracker)? > 0 && self.contradictions == 0 {
                return Ok(false);
            }
        }
        if self.meet_kin()? {
            return Ok(false);
        }
        self.compare()
    }

    /// Exits that the family has counted during the stop.
    pub(super) fn exits(&self) -> u64 {
        let counted = |kin: &Kin| kin.info.exits.saturating_sub(kin.exits_before);
        self.family.iter().map(counted).sum()
    }

    /// Members that had joined the family when it was last looked at.
    pub(super) fn forks(&self) -> u64 {
        self.family.iter().map(|kin| kin.info.forks).sum()
    }
}
