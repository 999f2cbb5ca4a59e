//! What came of a stop: the report, the doubts, the survivors.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use super::{Stop, StopError};
use crate::{
    stop::{
        proof::{Doubt, Evidence, doubt_of_level},
        report::StopReport,
        survivor::{Refusal, Survivor},
    },
    tracker::{LastStop, ServiceId, ServiceState, TrackerError, Tracking},
};

/// What is left of the report for those who ask later.
fn record(report: &StopReport, requested: Duration, service: ServiceId) -> LastStop {
    let count = |length| u32::try_from(length).unwrap_or(u32::MAX);
    LastStop {
        requested,
        service,
        elapsed: report.elapsed,
        killing: report.killing,
        kill_rounds: report.kill_rounds,
        gate: report.gate.is_some(),
        processes: count(report.processes.len()),
        survivors: count(report.survivors.len()),
        proven: report.proven,
        doubts: report.doubts.iter().map(Doubt::reason).collect(),
    }
}

impl Stop<'_> {
    pub(super) async fn finish(mut self) -> Result<StopReport, StopError> {
        drop(self.gate.take());
        let complete = self.observe_exits()?;
        self.bury_dead()?;
        let empty = self.is_empty()?;
        // Who is left is counted, is watched, or was found outside of the books. Only the kernel's count is as good as a list.
        let exact = self.tracker.tracking() != Tracking::Procfs;
        let survivors = match exact && empty && self.watch.is_empty() && self.strays.is_empty() {
            true => Vec::new(),
            false => self.survivors()?,
        };
        let doubts = self.doubts(complete)?;
        let Some(kin) = self.family.first() else {
            return Err(TrackerError::NotRegistered(self.service.name().to_owned()).into());
        };
        let report = StopReport {
            service: kin.info.name.clone(),
            instance: kin.info.instance.clone(),
            tracking: self.tracker.tracking(),
            fallback_reason: self.tracker.fallback_reason().map(ToOwned::to_owned),
            proven: empty && survivors.is_empty() && doubts.is_empty(),
            doubts,
            elapsed: self.began.elapsed(),
            killing: self.killing.map(|began| began.elapsed()),
            kill_rounds: self.rounds,
            gate: self.gate_used,
            processes: self.seen.into_values().collect(),
            survivors,
            suspects: self.sweeper.suspects(self.tracker)?,
        };
        self.tracker
            .record_stop(&kin.info, &record(&report, self.began_boottime, kin.info.id));
        if !empty || !report.survivors.is_empty() {
            return Err(StopError::Survivors(Box::new(report)));
        }
        for kin in self.family.iter().skip(1).rev() {
            // Its registrant was a member and is dead.
            match self.tracker.unregister_in_time(kin.info.id).await {
                Err(error @ TrackerError::Locked) => {
                    // It is empty, and goes with the next stop, or whoever cleans up.
                    tracing::warn!(%error, service = kin.info.name, "a nested service stays in the books");
                    break;
                }
                result => result?,
            }
        }
        self.tracker.set_state(self.service.id(), ServiceState::Up)?;
        Ok(report)
    }

    /// What speaks against the books by this evidence, for any service of the family.
    pub(super) fn doubts_by(&self, evidence: &Evidence) -> Vec<Doubt> {
        let mut doubted = Vec::new();
        for kin in &self.family {
            for doubt in evidence.against(self.tracker, &kin.info) {
                if !doubted.contains(&doubt) {
                    doubted.push(doubt);
                }
            }
        }
        doubted
    }

    pub(super) fn doubts(&self, complete: bool) -> Result<Vec<Doubt>, StopError> {
        let mut doubted = self.doubts_by(&Evidence::gather(self.tracker)?);
        for kin in &self.family {
            let of_level = self.tracker.sight(kin.info.id)?.and_then(doubt_of_level);
            doubted.extend(of_level.filter(|doubt| !doubted.contains(doubt)));
        }
        let unobserved = self.unaccounted();
        if unobserved > 0 || !complete || self.unexplained {
            doubted.push(Doubt::UnobservedDeaths {
                count: unobserved.max(1),
            });
        }
        if self.contradictions > 0 {
            doubted.push(Doubt::ContradictoryBooks {
                count: self.contradictions,
            });
        }
        Ok(doubted)
    }

    /// Members that are left, and dead ones that still hold resources.
    pub(super) fn survivors(&mut self) -> Result<Vec<Survivor>, StopError> {
        let members = self.list()?;
        self.forget_released(&members)?;
        let mut left: BTreeMap<_, _> = members
            .into_iter()
            .map(|member| (member.key, (member.pid, member.comm)))
            .collect();
        let there = self.tracker.existing()?;
        for stray in self.strays.iter().filter(|stray| there.contains_key(&stray.key)) {
            left.insert(stray.key, (stray.pid, stray.comm.clone()));
            let refusal = match self.sweeper.is_locked_out() {
                true => Refusal::LockedOut,
                false => Refusal::NoRoom,
            };
            self.refused.insert(stray.key, refusal);
        }
        // Some may have been dying already when the stop began, so that only their records tell who they are.
        let ended = self.tracker.ended(&self.ids())?;
        let ended: HashMap<_, _> = ended.into_iter().map(|ended| (ended.key, ended)).collect();
        for key in self.watch.keys() {
            let named = ended.get(&key).map(|ended| (ended.pid, ended.comm.clone()));
            let seen = || self.seen.get(&key).map(|seen| (seen.pid, seen.comm.clone()));
            left.entry(key)
                .or_insert_with(|| named.or_else(seen).unwrap_or_default());
        }
        let survivor = |(key, (pid, comm))| {
            let condition = self.tracker.condition(pid, key);
            Survivor::new(key, pid, comm, condition, self.refused.get(&key))
        };
        Ok(left.into_iter().map(survivor).collect())
    }
}
