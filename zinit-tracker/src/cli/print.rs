//! Writing to stdout and stderr without panicking when nobody reads. Both programs have this file.

use std::io::{self, Write as _};

use anyhow::Context as _;
use serde::Serialize;

/// One line on stderr, with the program's name. If stderr is gone, nobody can be told.
pub(crate) fn note(text: &str) {
    let line = format!(concat!(env!("CARGO_BIN_NAME"), ": {}\n"), text);
    drop(io::stderr().write_all(line.as_bytes()));
}

/// One line on stderr for an error and its causes; of causes with many lines, such as a verifier's log, the first.
pub(crate) fn failure(error: &anyhow::Error) {
    let lines = error.chain().map(ToString::to_string);
    let lines: Vec<_> = lines
        .filter_map(|text| text.lines().next().map(ToOwned::to_owned))
        .collect();
    note(&lines.join(": "));
    tracing::info!("{error:?}");
}

/// Writes text to stdout. A reader that has gone is no error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    is_read(text).map(drop)
}

/// As [`print()`]. Returns whether stdout still has a reader.
pub(crate) fn is_read(text: &str) -> anyhow::Result<bool> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("failed to write to stdout"),
    }
}

/// Writes a value to stdout as JSON.
pub(crate) fn print_json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}
