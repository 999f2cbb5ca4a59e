//! What the processes of a service use, from `/proc`. Processor time is measured from one question to the next: nobody sleeps.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::handle::{Stats, Usage};
use crate::{
    process::ProcessKey,
    tracker::{Member, Service, Tracker, TrackerError},
};

/// `/proc` counts processor time in ticks of 10 ms: over less than this the figure would be noise.
const SHORTEST: Duration = Duration::from_millis(200);

/// Remembers what each process had used when it was last looked at.
#[derive(Debug, Default)]
pub(super) struct Meter {
    samples: HashMap<ProcessKey, Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    cpu: Duration,
    at: Instant,
    /// What was found then.
    percent: f64,
}

impl Meter {
    /// Looks at every member now.
    pub(super) fn measure(&mut self, tracker: &Tracker, service: &Service, main: u32) -> Result<Stats, TrackerError> {
        let members = tracker.processes(service)?;
        self.samples
            .retain(|key, _| members.iter().any(|member| member.key == *key));
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
            cpu_usage: self.percent(member.key, usage.cpu, Instant::now()),
        }))
    }

    fn percent(&mut self, key: ProcessKey, cpu: Duration, now: Instant) -> f64 {
        let (before, elapsed) = match self.samples.get(&key) {
            Some(sample) => {
                let elapsed = now.saturating_duration_since(sample.at);
                if elapsed < SHORTEST {
                    return sample.percent;
                }
                (sample.cpu, elapsed)
            }
            None => (Duration::ZERO, Tracker::now().saturating_sub(key.started())),
        };
        let percent = share(cpu.saturating_sub(before), elapsed);
        self.samples.insert(key, Sample { cpu, at: now, percent });
        percent
    }
}

fn share(cpu: Duration, elapsed: Duration) -> f64 {
    if elapsed.is_zero() {
        return 0.0;
    }
    100.0 * cpu.as_secs_f64() / elapsed.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_counts_from_one_question_to_the_next() {
        let mut meter = Meter::default();
        let key = ProcessKey {
            tgid: 7,
            start_boottime_ns: 0,
        };
        let begin = Instant::now();
        let seconds = Duration::from_secs;
        meter.samples.insert(
            key,
            Sample {
                cpu: seconds(10),
                at: begin,
                percent: 7.0,
            },
        );
        assert_eq!(meter.percent(key, seconds(11), begin + Duration::from_millis(1)), 7.0);
        assert_eq!(meter.percent(key, seconds(11), begin + seconds(2)), 50.0);
        assert_eq!(meter.percent(key, seconds(15), begin + seconds(4)), 200.0);
    }
}
