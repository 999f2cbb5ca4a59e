//! What the processes of a service use, from `/proc`. Processor time is measured from one question to the next: nobody sleeps.

use std::time::Instant;

use super::handle::{Stats, Usage};
use crate::tracker::{CpuShares, Member, Service, Tracker, TrackerError};

/// Remembers what each process had used when it was last looked at.
#[derive(Debug, Default)]
pub(super) struct Meter {
    shares: CpuShares,
}

impl Meter {
    /// Looks at every member now.
    pub(super) fn measure(&mut self, tracker: &Tracker, service: &Service, main: u32) -> Result<Stats, TrackerError> {
        let members = tracker.processes(service)?;
        self.shares
            .retain(|key| members.iter().any(|member| member.key == *key));
        let mut stats = Stats {
            name: service.name().to_owned(),
            pid: main,
            memory_usage: 0,
            cpu_usage: 0.0,
            children: Vec::new(),
        };
        for member in members {
            let Some(usage) = self.look_at(tracker, &member)? else {
                continue;
            };
            if member.pid == main {
                stats.memory_usage = usage.memory_usage;
                stats.cpu_usage = usage.cpu_usage;
            } else {
                stats.children.push(usage);
            }
        }
        Ok(stats)
    }

    /// `None`: it is gone.
    fn look_at(&mut self, tracker: &Tracker, member: &Member) -> Result<Option<Usage>, TrackerError> {
        let Some(usage) = tracker.usage(member)? else {
            return Ok(None);
        };
        Ok(Some(Usage {
            pid: member.pid,
            memory_usage: usage.memory,
            cpu_usage: self.shares.percent(member.key, usage.cpu, Instant::now()),
        }))
    }
}
