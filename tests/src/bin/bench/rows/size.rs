//! The programs, stripped.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use zinit_tests::{tool, zinit};

use crate::{
    figure::{Row, Series, Target, Unit},
    load::Load,
};

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let other = load.peers.join("bin/zinit");
    let other = match other.is_file() {
        true => Some(Series::once("zinit of crates.io", stripped(&other)?)),
        false => None,
    };
    let mut rows = Vec::new();
    for program in [zinit(), tool()] {
        let name = program.file_name().context("a program has a name")?.to_string_lossy();
        let (what, ours) = (format!("`{name}`, stripped"), Series::once("", stripped(program)?));
        let row = match &other {
            Some(other) => Row::ratio(what, Unit::Bytes, ours, other.clone()),
            None => Row::figure(what, Unit::Bytes, ours),
        };
        rows.push(row.target(Target::Figure(8.0 * 1_048_576.0)));
    }
    Ok(rows)
}

/// The size without symbols and debug information.
fn stripped(program: &Path) -> Result<f64> {
    let directory = TempDir::new()?;
    let copy = directory.path().join("stripped");
    let strip = Command::new("strip").arg("-o").arg(&copy).arg(program).status();
    let status = strip.context("failed to start `strip`, which comes with the linker (binutils)")?;
    ensure!(status.success(), "`strip {}` failed: {status}", program.display());
    Ok(fs::metadata(&copy)?.len() as f64)
}
