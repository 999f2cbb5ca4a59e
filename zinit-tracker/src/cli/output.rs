//! Writing to stdout and stderr without panicking when nobody reads.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use serde::Serialize;
use zinit_tracker::{
    Member, StopReport, Tracking,
    stop::{StoppedProcess, Survivor},
};

use super::paint;
pub(super) use super::print::{failure, is_read, note, print, print_json};

/// How many processes a report for people names.
const MOST_LINES: usize = 20;

/// Text that a process chose itself, such as its name, without the characters that command a terminal.
pub(super) fn plain(text: &str) -> String {
    let plain = |c: char| {
        if c.is_control() {
            c.escape_default().collect()
        } else {
            c.to_string()
        }
    };
    text.chars().map(plain).collect()
}

/// Where a report goes: opened before anything starts, so that a report that cannot be written stops nothing half way.
#[derive(Debug)]
pub(super) enum ReportFile {
    Stdout,
    File(FreshFile),
}

/// A file for a report. What it held before is kept until the report is written; if it was not there, it goes again
/// unless the report is written.
#[derive(Debug)]
pub(super) struct FreshFile {
    file: fs::File,
    path: PathBuf,
    remove: bool,
}

impl Drop for FreshFile {
    fn drop(&mut self) {
        if self.remove
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(%error, path = %self.path.display(), "failed to remove the empty report");
        }
    }
}

impl ReportFile {
    /// Opens the file, or stdout for `-`.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Stdout);
        }
        let mut options = fs::File::options();
        options.write(true);
        let opened = match options.open(path) {
            Ok(file) => Ok((file, false)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                options.create_new(true).open(path).map(|file| (file, true))
            }
            Err(error) => Err(error),
        };
        let (file, remove) = opened.with_context(|| format!("failed to create the report {}", path.display()))?;
        Ok(Self::File(FreshFile {
            file,
            path: path.to_owned(),
            remove,
        }))
    }

    /// Writes the report as JSON. A reader that has gone is no error.
    pub(super) fn write<T: Serialize>(self, report: &T) -> anyhow::Result<()> {
        match self {
            Self::Stdout => print_json(report),
            Self::File(mut fresh) => {
                let text = serde_json::to_string_pretty(report)? + "\n";
                let failed = || format!("failed to write the report {}", fresh.path.display());
                // Devices and pipes cannot be made shorter, and need not be.
                if fresh.file.metadata().with_context(failed)?.is_file() {
                    fresh.file.set_len(0).with_context(failed)?;
                }
                fresh.remove = false;
                match fresh.file.write_all(text.as_bytes()) {
                    Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                        Err(error).with_context(|| format!("failed to write the report {}", fresh.path.display()))
                    }
                    _ => Ok(()),
                }
            }
        }
    }
}

/// A duration with the precision that people read.
pub(super) fn human(duration: Duration) -> String {
    let milliseconds = duration.as_secs_f64() * 1e3;
    if milliseconds < 1000.0 {
        format!("{milliseconds:.1} ms")
    } else {
        format!("{:.2} s", milliseconds / 1e3)
    }
}

/// The report of a stop, for people, on stderr; the last word is whether it is proven.
pub(super) fn report(report: &StopReport) {
    for line in report_lines(report, MOST_LINES) {
        note(&line);
    }
}

/// The report of a stop, for people: at most so many processes of each kind, and whether it is proven.
pub(super) fn report_lines(report: &StopReport, most: usize) -> Vec<String> {
    let mut lines: Vec<_> = report.processes.iter().take(most).map(process_line).collect();
    if report.processes.len() > most {
        lines.push(format!("  … and {} more", report.processes.len() - most));
    }
    lines.extend(report.survivors.iter().take(most).map(survivor_line));
    if report.survivors.len() > most {
        lines.push(format!("  … and {} more survive", report.survivors.len() - most));
    }
    lines.extend(report.suspects.iter().take(most).map(|suspect| {
        format!(
            "  {:>7}  {:<15}  not signalled, though it shares its {} with the service",
            suspect.pid,
            plain(&suspect.comm),
            suspect.shares
        )
    }));
    lines.push(summary(report));
    lines
}

fn process_line(process: &StoppedProcess) -> String {
    let mut line = format!("  {:>7}  {:<15}", process.pid, plain(&process.comm));
    if let Some(sign) = process.sign {
        line.push_str(&format!("  (found by its {})", sign.name()));
    }
    for sent in &process.signals {
        line.push_str(&format!("  {} after {}", sent.signal, human(sent.after)));
    }
    match (process.fate, process.ended_after) {
        (Some(fate), Some(after)) => line.push_str(&format!("  → {fate} after {}", human(after))),
        (None, Some(after)) => line.push_str(&format!("  → ended within {}, nobody saw how", human(after))),
        _ => line.push_str("  → no exit record"),
    }
    line
}

fn survivor_line(survivor: &Survivor) -> String {
    format!(
        "  {:>7}  {:<15}  survives: {}",
        survivor.pid,
        plain(&survivor.comm),
        plain(&survivor.cause.to_string())
    )
}

fn summary(report: &StopReport) -> String {
    let service = &report.service;
    let elapsed = human(report.elapsed);
    let survives = |key| report.survivors.iter().any(|survivor| survivor.key == key);
    let ended = report.processes.iter().filter(|process| !survives(process.key)).count();
    let rounds = counted(report.kill_rounds as usize, "kill round", "kill rounds");
    let how = match (report.kill_rounds, report.gate) {
        (0, _) => String::new(),
        (_, None) => format!(", {rounds}"),
        (_, Some(gate)) => format!(", {rounds}, with the gate at {}", gate.kind),
    };
    let how = match report.tracking {
        Tracking::Ebpf => how,
        Tracking::Procfs => how + ", level procfs",
    };
    let ended = counted(ended, "process", "processes");
    if !report.survivors.is_empty() {
        let left = counted(report.survivors.len(), "survivor", "survivors");
        return format!("service {service} is NOT down: {left}, {ended} ended in {elapsed}{how}: not proven");
    }
    if report.proven {
        return format!("service {service} is down: {ended} ended in {elapsed}{how}; nothing is left: proven");
    }
    let doubts: Vec<_> = report.doubts.iter().map(ToString::to_string).collect();
    format!(
        "service {service} is empty: {ended} ended in {elapsed}{how}; not proven: {}",
        doubts.join("; ")
    )
}

/// A number with its noun.
pub(super) fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// A table of members.
pub(super) fn members(members: &[Member]) -> String {
    let mut text = paint::dim(&format!(
        "{:>7} {:>7} {:>7} {:>7}  {}\n",
        "PID", "PPID", "SESSION", "GROUP", "COMMAND"
    ));
    for member in members {
        text.push_str(&format!(
            "{:>7} {:>7} {:>7} {:>7}  {}\n",
            member.pid,
            member.parent.tgid,
            member.session,
            member.group,
            plain(&member.comm)
        ));
    }
    text
}
