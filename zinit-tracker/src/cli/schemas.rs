//! Whether every output as JSON has a schema in `schemas/`. The tests of both programs have this file; `tests/tests/schemas.rs`
//! holds outputs against schemas.

use std::{collections::BTreeSet, fs, path::Path};

use clap::Command;

/// A schema for another output of the same command.
const VARIANTS: [&str; 1] = ["-dry-run"];

/// What the schemas refer to, which belongs to no command.
const COMMON: &str = "definitions";

/// Asserts that the commands which print JSON, and no others, have schemas; of the files, those for which `ours` is true are meant,
/// each called by `prefix` and the name of its command.
pub(crate) fn assert_complete(command: &Command, prefix: &str, ours: impl Fn(&str) -> bool) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas");
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let described: BTreeSet<String> = files
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .filter(|name| name != COMMON && ours(name))
        .map(|name| VARIANTS.iter().fold(name, |name, end| name.replace(end, "")))
        .collect();
    let printing = command.get_subcommands().filter(|command| {
        let mut ids = command.get_arguments().map(|argument| argument.get_id().as_str());
        ids.any(|id| id == "json" || id == "report")
    });
    let printing: BTreeSet<_> = printing
        .map(|command| format!("{prefix}{}", command.get_name()))
        .collect();
    assert!(!printing.is_empty());
    assert_eq!(described, printing, "schemas (left), commands that print JSON (right)");
    // `get_subcommands` shows one level, and there is no other.
    assert!(command.get_subcommands().all(|command| !command.has_subcommands()));
}
