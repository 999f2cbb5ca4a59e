//! `cargo xtask ci`: everything that must hold before a change is taken.

use crate::{bench, build_ebpf, fuzz, lint, test, vm};
use anyhow::{Context as _, Result};
use std::{fs, path::Path};

/// Lint, test with the committed BPF object, build it from source, test with that one too, see that the benchmarks work, fuzz for a minute each, and run the kernel matrix
#[derive(clap::Args)]
pub(crate) struct Options {}

/// Runs all of it; the committed object is in its place again afterwards.
///
/// # Errors
///
/// The first step that fails.
pub(crate) fn run(_: &Options) -> Result<()> {
    lint::run(&lint::Options {})?;
    println!("+ cargo xtask test (with the committed BPF object)");
    test::run(&test::Options::default())?;
    println!("+ cargo xtask build-ebpf");
    let path = build_ebpf::object_path();
    let committed = fs::read(&path).context("failed to read the committed object")?;
    let fresh = build_ebpf::build(None)?;
    println!("{}", build_ebpf::comparison(&fresh, Some(&committed)));
    if fresh == committed {
        println!("the tests above have covered both");
    } else {
        test_with(&path, &fresh, &committed)?;
    }
    println!("+ cargo xtask bench --quick");
    bench::run(&bench::Options::quick())?;
    println!("+ cargo xtask fuzz");
    fuzz::run(&fuzz::Options::default())?;
    println!("+ cargo xtask vm");
    vm::run(&vm::Options::default())?;
    println!("+ cargo xtask vm --pid1");
    vm::run(&vm::Options::pid1())
}

/// Runs the tests with the fresh object in the place of the committed one, which is there again afterwards.
fn test_with(path: &Path, fresh: &[u8], committed: &[u8]) -> Result<()> {
    println!("+ cargo xtask test (with the fresh BPF object)");
    fs::write(path, fresh).context("failed to put the fresh object in place")?;
    let tested = test::run(&test::Options::default());
    fs::write(path, committed).context("failed to restore the committed object")?;
    tested
}
