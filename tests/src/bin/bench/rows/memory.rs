//! Memory: of supervisors with many services, and of the kernel's books.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use zinit_tracker::records::TEXT_FILE;

use crate::{
    figure::{Row, Series, Target, Unit},
    load::Load,
    peers::{find, services::Supervisor},
};

const NOTE: &str = "Resident pages of all processes of the supervisor; what they share is counted in each, so that of supervisors with \
                    a process a service the sum says more than they take.";

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let count = load.pick(50, 1000);
    let what = format!("memory with {count} services");
    let running = Supervisor::Ours.start(load, count)?;
    let ours = Series::once("ours", resident(&running.processes(&load.subject)?)?);
    let books = books(running.pins());
    drop(running);
    let mut rows = vec![
        Row::figure(&what, Unit::Bytes, ours.clone())
            .target(Target::Figure(25.0 * 1_048_576.0))
            .note(NOTE),
    ];
    for supervisor in Supervisor::OTHERS {
        rows.push(match supervisor.missing(load) {
            Some(reason) => Row::skipped(format!("{what}, {}", supervisor.name()), reason),
            None => {
                let running = supervisor.start(load, count)?;
                let theirs = resident(&running.processes(&load.subject)?)?;
                let theirs = Series::once(supervisor.name(), theirs);
                Row::ratio(&what, Unit::Bytes, ours.clone(), theirs).note(NOTE)
            }
        });
    }
    let what = "maps in the kernel, at the default size";
    rows.push(match books? {
        Some(bytes) => {
            Row::figure(what, Unit::Bytes, Series::once("", bytes)).target(Target::Figure(32.0 * 1_048_576.0))
        }
        None => Row::skipped(what, "bpftool is not installed"),
    });
    Ok(rows)
}

/// Resident bytes of the processes.
fn resident(pids: &[i32]) -> Result<f64> {
    let mut kilobytes = 0;
    for pid in pids {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        kilobytes += number.with_context(|| format!("/proc/{pid}/status has no VmRSS"))?;
    }
    Ok((kilobytes * 1024) as f64)
}

/// What the kernel says that the pinned maps take; `None`: there is no bpftool to ask with.
fn books(pins: &Path) -> Result<Option<f64>> {
    let Some(bpftool) = find("bpftool") else {
        return Ok(None);
    };
    let mut total = 0;
    let mut maps = 0;
    for layout in fs::read_dir(pins)? {
        for pin in fs::read_dir(layout?.path())? {
            let path = pin?.path();
            // The table of members is no map, but prints one.
            if path.is_dir() || path.ends_with(TEXT_FILE) {
                continue;
            }
            let output = Command::new(&bpftool)
                .args(["-j", "map", "show", "pinned"])
                .arg(&path)
                .output()?;
            let map: Value = serde_json::from_slice(&output.stdout).context("bpftool says no JSON")?;
            total += map["bytes_memlock"]
                .as_u64()
                .with_context(|| format!("no size of {}", path.display()))?;
            maps += 1;
        }
    }
    ensure!(maps > 0, "{} has no maps", pins.display());
    Ok(Some(total as f64))
}
