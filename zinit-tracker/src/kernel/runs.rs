//! How often and how long the programs ran.

use std::{os::fd::AsFd, time::Duration};

use super::{
    books::{BooksError, failed},
    sys,
};

/// What the kernel counts of one program since it was loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProgramRuns {
    /// Its name.
    pub program: &'static str,
    /// How long it ran, of all processors together. The kernel measures it only while that is asked for
    /// (`kernel.bpf_stats_enabled`).
    pub run_time: Duration,
    /// How often it ran, while that is measured.
    pub runs: u64,
    /// How often it was skipped because it was already running on that processor; 0 before 5.12.
    pub recursion_misses: u64,
}

impl ProgramRuns {
    pub(super) fn of<E>(program: &'static str, fd: Result<impl AsFd, E>) -> Result<Self, BooksError>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let fd = fd.map_err(failed("inspect a program"))?;
        let info = sys::program_info(fd).map_err(failed("inspect a program"))?;
        Ok(Self {
            program,
            run_time: Duration::from_nanos(info.run_time_ns),
            runs: info.run_cnt,
            recursion_misses: info.recursion_misses,
        })
    }
}
