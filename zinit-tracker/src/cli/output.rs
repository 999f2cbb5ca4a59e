//! Writing to stdout and stderr without panicking when nobody reads.

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use serde::Serialize;
use zinit_tracker::{
    Member, StopReport,
    stop::{StoppedProcess, Survivor},
};

/// How many processes a report for people names.
const MOST_LINES: usize = 20;

/// One line on stderr, with the program's name. If stderr is gone, nobody can be told.
pub(super) fn note(text: &str) {
    let line = format!("zinit-tracker: {text}\n");
    drop(io::stderr().write_all(line.as_bytes()));
}

/// Writes text to stdout.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(())
}

/// Writes a value to stdout as JSON.
pub(super) fn print_json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// Whether the error is that the reader of stdout has gone.
pub(super) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Where a report goes: opened before anything starts, so that a report that cannot be written stops nothing half way.
#[derive(Debug)]
pub(super) enum ReportFile {
    Stdout,
    File(std::fs::File, PathBuf),
}

impl ReportFile {
    /// Opens the file, or stdout for `-`.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Stdout);
        }
        let file =
            std::fs::File::create(path).with_context(|| format!("failed to create the report {}", path.display()))?;
        Ok(Self::File(file, path.to_owned()))
    }

    /// Writes the report as JSON.
    pub(super) fn write<T: Serialize>(self, report: &T) -> anyhow::Result<()> {
        match self {
            Self::Stdout => print_json(report),
            Self::File(mut file, path) => {
                let text = serde_json::to_string_pretty(report)?;
                writeln!(file, "{text}").with_context(|| format!("failed to write the report {}", path.display()))
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
    for process in report.processes.iter().take(MOST_LINES) {
        note(&process_line(process));
    }
    if report.processes.len() > MOST_LINES {
        note(&format!("  … and {} more", report.processes.len() - MOST_LINES));
    }
    for survivor in &report.survivors {
        note(&survivor_line(survivor));
    }
    note(&summary(report));
}

fn process_line(process: &StoppedProcess) -> String {
    let mut line = format!("  {:>7}  {:<15}", process.pid, process.comm);
    for sent in &process.signals {
        line.push_str(&format!("  {} after {}", sent.signal, human(sent.after)));
    }
    match (process.fate, process.ended_after) {
        (Some(fate), Some(after)) => line.push_str(&format!("  → {fate} after {}", human(after))),
        _ => line.push_str("  → no exit record"),
    }
    line
}

fn survivor_line(survivor: &Survivor) -> String {
    format!(
        "  {:>7}  {:<15}  survives: {}",
        survivor.pid, survivor.comm, survivor.cause
    )
}

fn summary(report: &StopReport) -> String {
    let service = &report.service;
    let elapsed = human(report.elapsed);
    let ended = report.processes.len() - report.survivors.len().min(report.processes.len());
    let how = match (report.kill_rounds, report.gate) {
        (0, _) => String::new(),
        (rounds, false) => format!(", {}", counted(rounds as usize, "kill round")),
        (rounds, true) => format!(
            ", {}, with the system-call gate",
            counted(rounds as usize, "kill round")
        ),
    };
    let ended = counted(ended, "process").replace("processs", "processes");
    if !report.survivors.is_empty() {
        let left = counted(report.survivors.len(), "survivor");
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

fn counted(count: usize, what: &str) -> String {
    if count == 1 {
        format!("1 {what}")
    } else {
        format!("{count} {what}s")
    }
}

/// A table of members.
pub(super) fn members(members: &[Member]) -> String {
    let mut text = format!(
        "{:>7} {:>7} {:>7} {:>7}  {}\n",
        "PID", "PPID", "SESSION", "GROUP", "COMMAND"
    );
    for member in members {
        text.push_str(&format!(
            "{:>7} {:>7} {:>7} {:>7}  {}\n",
            member.pid, member.parent.tgid, member.session, member.group, member.comm
        ));
    }
    text
}
