//! What a process may do, as the kernel says.

use std::{fs, io};

/// Capabilities of a thread, by their numbers in capabilities(7).
#[derive(Debug, PartialEq, Eq)]
pub struct Rights {
    effective: Vec<u32>,
    permitted: Vec<u32>,
    bounding: Vec<u32>,
    /// No program that it executes has more.
    for_good: bool,
}

impl Rights {
    /// These and no others, now and later.
    #[must_use]
    pub fn only(kept: &[u32]) -> Self {
        Self {
            effective: kept.to_vec(),
            permitted: kept.to_vec(),
            bounding: kept.to_vec(),
            for_good: true,
        }
    }

    /// Those of every thread of a process.
    ///
    /// # Panics
    ///
    /// When the process is gone.
    #[must_use]
    pub fn of_threads(pid: u32) -> Vec<Self> {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the process is there");
        threads.map(Self::of_thread).collect()
    }

    fn of_thread(thread: io::Result<fs::DirEntry>) -> Self {
        let status = thread.expect("threads can be listed").path().join("status");
        let text = fs::read_to_string(status).expect("the thread is there");
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.expect("the kernel says it").trim()
        };
        let set = |name: &str| {
            let bits = u64::from_str_radix(field(name), 16).expect("a set is in hexadecimal");
            (0..u64::BITS).filter(|bit| bits & (1 << bit) != 0).collect()
        };
        Self {
            effective: set("CapEff:"),
            permitted: set("CapPrm:"),
            bounding: set("CapBnd:"),
            for_good: field("NoNewPrivs:") == "1",
        }
    }
}
