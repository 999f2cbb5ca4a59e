//! How stop and list grow with the size of a service.

use std::fs;

use anyhow::{Context as _, Result};

use super::{kill::kill, list::listed};
use crate::{
    figure::{Row, Series, Spread, Unit},
    load::{Load, Open},
};

/// What a process of this load takes of the kernel, with room to spare.
const BYTES_PER_PROCESS: u64 = 128 * 1024;

/// Others' processes, and the dead that are not reaped yet.
const OTHER_PIDS: usize = 10_000;

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let sizes: &[usize] = load.pick(&[10, 100, 500], &[10, 100, 1000, 5000, 10_000, 25_000, 50_000]);
    let rounds = load.pick(2, 5);
    let largest = *sizes.last().context("there are sizes")?;
    let _pids = PidMax::at_least(largest + OTHER_PIDS)?;
    let open = Open::load(Some(u32::try_from(largest + OTHER_PIDS)?))?;
    let mut rows = Vec::new();
    for size in sizes {
        if let Some(reason) = is_too_much(*size)? {
            rows.push(Row::skipped(format!("stop and list {size} members"), reason));
            continue;
        }
        let (mut lists, mut stops) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let (service, child) = load.tracked_sessions(&open.tracker, *size)?;
            lists.push(listed(&open.tracker, &service, *size)?.as_nanos() as f64 / *size as f64);
            stops.push(kill(load, &open.tracker, &service, child, *size)?.as_nanos() as f64 / *size as f64);
        }
        for (what, values) in [("list", lists), ("kill and verify", stops)] {
            let total = Unit::Nanoseconds.show(Spread::of(&values).median * *size as f64);
            let series = Series {
                name: String::new(),
                values,
            };
            rows.push(Row::figure(
                format!("{what}, {size} members, a member ({total} in all)"),
                Unit::Nanoseconds,
                series,
            ));
        }
    }
    open.close()?;
    Ok(rows)
}

/// Why the machine cannot have so many processes more, if it cannot.
fn is_too_much(size: usize) -> Result<Option<String>> {
    let number = |path: &str| -> Result<usize> {
        let text = fs::read_to_string(path).with_context(|| format!("failed to read {path}"))?;
        text.trim().parse().with_context(|| format!("{path} is no number"))
    };
    let threads = number("/proc/sys/kernel/threads-max")?;
    if threads < size + OTHER_PIDS {
        return Ok(Some(format!("kernel.threads-max is {threads}")));
    }
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available = available.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    let available = available.context("/proc/meminfo does not say what is available")? * 1024;
    let needed = size as u64 * BYTES_PER_PROCESS;
    Ok((available < needed).then(|| {
        let show = |bytes: u64| Unit::Bytes.show(bytes as f64);
        format!("{} are available, it takes up to {}", show(available), show(needed))
    }))
}

/// Raises the highest pid where it has to be, for as long as this lives.
struct PidMax(Option<String>);

impl PidMax {
    const PATH: &str = "/proc/sys/kernel/pid_max";

    fn at_least(wanted: usize) -> Result<Self> {
        let before = fs::read_to_string(Self::PATH).context("failed to read kernel.pid_max")?;
        if before.trim().parse::<usize>()? >= wanted {
            return Ok(Self(None));
        }
        fs::write(Self::PATH, wanted.to_string()).context("failed to raise kernel.pid_max")?;
        Ok(Self(Some(before)))
    }
}

impl Drop for PidMax {
    fn drop(&mut self) {
        if let Some(before) = &self.0
            && let Err(error) = fs::write(Self::PATH, before)
        {
            eprintln!("failed to restore kernel.pid_max to {}: {error}", before.trim());
        }
    }
}
