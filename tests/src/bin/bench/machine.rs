//! What was measured on.

use std::{fs, thread, time::SystemTime};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// A description of this machine at this time.
pub(crate) struct Machine {
    kernel: String,
    cpu: String,
    cpus: usize,
    memory_bytes: u64,
    time: SystemTime,
    load: String,
}

impl Machine {
    /// # Errors
    ///
    /// `/proc` says nothing.
    pub(crate) fn describe() -> Result<Self> {
        let kernel = rustix::system::uname();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("failed to read what processors there are")?;
        let model = cpuinfo.lines().find(|line| line.starts_with("model name"));
        let model = model.and_then(|line| line.split_once(": "));
        let meminfo = fs::read_to_string("/proc/meminfo").context("failed to read how much memory there is")?;
        let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kilobytes = total.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        Ok(Self {
            kernel: kernel.release().to_string_lossy().into_owned(),
            cpu: model.map_or("unknown", |(_, model)| model).to_owned(),
            cpus: thread::available_parallelism()?.get(),
            memory_bytes: kilobytes.context("/proc/meminfo has no total")? * 1024,
            time: SystemTime::now(),
            load: Self::load(),
        })
    }

    /// The load averages now: what else runs on the machine disturbs.
    pub(crate) fn load() -> String {
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        load.split(' ').take(3).collect::<Vec<_>>().join(" ")
    }

    fn date(&self) -> String {
        humantime::format_rfc3339_seconds(self.time).to_string()
    }

    pub(crate) fn sentence(&self) -> String {
        format!(
            "{}, Linux {}, {} × {}, {:.1} GiB; load {} at the beginning",
            self.date(),
            self.kernel,
            self.cpus,
            self.cpu,
            self.memory_bytes as f64 / f64::from(1 << 30),
            self.load
        )
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "kernel": self.kernel,
            "cpu": self.cpu,
            "cpus": self.cpus,
            "memory_bytes": self.memory_bytes,
            "date": self.date(),
            "load_at_beginning": self.load,
        })
    }
}
