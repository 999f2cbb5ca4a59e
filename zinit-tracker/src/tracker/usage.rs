//! What a member uses, as `/proc` shows it.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use procfs::{
    FromRead as _,
    process::{Process, Stat},
};

use super::{Member, Tracker, TrackerError};
use crate::process::ProcessKey;

/// `/proc` counts processor time in ticks of 10 ms: over less than this the figure would be noise.
const SHORTEST: Duration = Duration::from_millis(200);

/// What a member uses, at some moment.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberUsage {
    /// The user that it acts as (effective user id).
    pub uid: u32,
    /// Its state, as proc_pid_stat(5) has it: `R`, `S`, `D`, `T`, `t`, `Z` …
    pub state: char,
    /// Processor time since it started, to the tick of 10 ms; waited-for children not included.
    pub cpu: Duration,
    /// Resident memory in bytes.
    pub memory: u64,
}

/// What a member uses, without what takes more than one file of `/proc` to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemberLoad {
    /// As [`MemberUsage::state`].
    pub state: char,
    /// As [`MemberUsage::cpu`].
    pub cpu: Duration,
    /// As [`MemberUsage::memory`].
    pub memory: u64,
}

/// How much of a processor each process uses, from one look at it to the next: nobody sleeps.
#[derive(Clone, Debug, Default)]
pub struct CpuShares {
    samples: HashMap<ProcessKey, Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    cpu: Duration,
    at: Instant,
    /// What was found then.
    percent: f64,
}

impl CpuShares {
    /// Per cent of one processor since the last look; at the first one, since the process started. `cpu`: what it has used until `now`.
    pub fn percent(&mut self, key: ProcessKey, cpu: Duration, now: Instant) -> f64 {
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

    /// Forgets the others.
    pub fn retain(&mut self, is_there: impl Fn(&ProcessKey) -> bool) {
        self.samples.retain(|key, _| is_there(key));
    }
}

fn share(cpu: Duration, elapsed: Duration) -> f64 {
    if elapsed.is_zero() {
        return 0.0;
    }
    100.0 * cpu.as_secs_f64() / elapsed.as_secs_f64()
}

impl Tracker {
    /// As [`Tracker::usage`], at a fourth of the price: of thousands of members this is what can be asked every second.
    ///
    /// # Errors
    ///
    /// When the books cannot be read.
    pub fn load(&self, member: &Member) -> Result<Option<MemberLoad>, TrackerError> {
        let Some(load) = read_load(member.pid) else {
            return Ok(None);
        };
        // It has had its pid all the time, so what was read is its own.
        Ok(self.is_member(member)?.then_some(load))
    }

    /// What the member uses; `None`: it is dead or was released, or `/proc` does not show it.
    ///
    /// # Errors
    ///
    /// When the books cannot be read.
    pub fn usage(&self, member: &Member) -> Result<Option<MemberUsage>, TrackerError> {
        let Some(usage) = read(member.pid) else {
            return Ok(None);
        };
        // It has had its pid all the time, so what was read is its own.
        Ok(self.is_member(member)?.then_some(usage))
    }
}

fn read(pid: u32) -> Option<MemberUsage> {
    let process = Process::new(i32::try_from(pid).ok()?).ok()?;
    let load = load_of(&process.stat().ok()?);
    Some(MemberUsage {
        uid: process.status().ok()?.euid,
        state: load.state,
        cpu: load.cpu,
        memory: load.memory,
    })
}

fn read_load(pid: u32) -> Option<MemberLoad> {
    Some(load_of(&Stat::from_file(format!("/proc/{pid}/stat")).ok()?))
}

fn load_of(stat: &Stat) -> MemberLoad {
    let ticks = stat.utime.saturating_add(stat.stime);
    MemberLoad {
        state: stat.state,
        cpu: Duration::from_secs_f64(ticks as f64 / procfs::ticks_per_second() as f64),
        memory: stat.rss.saturating_mul(procfs::page_size()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_runs_and_uses_memory() {
        let usage = read(std::process::id()).unwrap();
        assert!(usage.memory > 100_000);
        assert!(matches!(usage.state, 'R' | 'S'), "{}", usage.state);
        assert_eq!(usage.uid, rustix::process::geteuid().as_raw());
        assert!(read_load(std::process::id()).unwrap().memory > 100_000);
        assert_eq!(read_load(u32::MAX), None);
    }

    #[test]
    fn processor_time_counts_from_one_question_to_the_next() {
        let mut shares = CpuShares::default();
        let key = ProcessKey {
            tgid: 7,
            start_boottime_ns: 0,
        };
        let begin = Instant::now();
        let seconds = Duration::from_secs;
        shares.samples.insert(
            key,
            Sample {
                cpu: seconds(10),
                at: begin,
                percent: 7.0,
            },
        );
        assert_eq!(shares.percent(key, seconds(11), begin + Duration::from_millis(1)), 7.0);
        assert_eq!(shares.percent(key, seconds(11), begin + seconds(2)), 50.0);
        assert_eq!(shares.percent(key, seconds(15), begin + seconds(4)), 200.0);
        shares.retain(|other| *other != key);
        assert!(shares.samples.is_empty());
    }
}
