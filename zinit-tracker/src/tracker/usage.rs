//! What a member uses, as `/proc` shows it.

use std::time::Duration;

use procfs::process::Process;

use super::{Member, Tracker, TrackerError};

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

impl Tracker {
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
    let stat = process.stat().ok()?;
    let ticks = stat.utime.saturating_add(stat.stime);
    Some(MemberUsage {
        uid: process.status().ok()?.euid,
        state: stat.state,
        cpu: Duration::from_secs_f64(ticks as f64 / procfs::ticks_per_second() as f64),
        memory: stat.rss.saturating_mul(procfs::page_size()),
    })
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
    }
}
