//! What is measured, one file a subject.

mod command;
mod forks;
mod growth;
mod hooks;
mod idle;
mod kill;
mod list;
mod memory;
mod open;
mod size;
mod start;
mod stop;
mod storms;

use anyhow::Result;

use crate::{figure::Row, load::Load};

/// Something that is measured, in one row of the table or several.
#[derive(Debug)]
pub(crate) struct Subject {
    /// That of its file.
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) measure: fn(&Load) -> Result<Vec<Row>>,
}

pub(crate) const ALL: &[Subject] = &[
    Subject {
        name: "hooks",
        about: "time that the kernel spends in our programs, an event",
        measure: hooks::measure,
    },
    Subject {
        name: "forks",
        about: "a process created, ended and waited for, with tracking and without",
        measure: forks::measure,
    },
    Subject {
        name: "stop",
        about: "one process stopped through the library",
        measure: stop::measure,
    },
    Subject {
        name: "kill",
        about: "trees killed and known to be gone",
        measure: kill::measure,
    },
    Subject {
        name: "storms",
        about: "processes that are others again and again, killed and known to be gone",
        measure: storms::measure,
    },
    Subject {
        name: "list",
        about: "the members of a service listed",
        measure: list::measure,
    },
    Subject {
        name: "open",
        about: "a tracker opened",
        measure: open::measure,
    },
    Subject {
        name: "size",
        about: "the programs on disk",
        measure: size::measure,
    },
    Subject {
        name: "command",
        about: "one service stopped by a command",
        measure: command::measure,
    },
    Subject {
        name: "start",
        about: "a supervisor started with many services",
        measure: start::measure,
    },
    Subject {
        name: "memory",
        about: "memory of a supervisor with many services, and of the kernel's books",
        measure: memory::measure,
    },
    Subject {
        name: "idle",
        about: "wake-ups of a supervisor whose services run",
        measure: idle::measure,
    },
    Subject {
        name: "growth",
        about: "stop and list by the number of members",
        measure: growth::measure,
    },
];

/// The subject of this name.
///
/// # Errors
///
/// There is none; which ones there are.
pub(crate) fn named(name: &str) -> Result<&'static Subject, String> {
    let known = || ALL.iter().map(|subject| subject.name).collect::<Vec<_>>().join(", ");
    let found = ALL.iter().find(|subject| subject.name == name);
    found.ok_or_else(|| format!("there is no such row, there is: {}", known()))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    #[test]
    fn each_file_is_a_subject_and_each_subject_a_file() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/bin/bench/rows");
        let files = fs::read_dir(directory).unwrap();
        let files = files.map(|file| file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned());
        let files: BTreeSet<_> = files.filter(|name| name != "mod").collect();
        assert_eq!(files, ALL.iter().map(|subject| subject.name.to_owned()).collect());
    }

    #[test]
    fn an_unknown_row_is_refused_by_naming_those_that_there_are() {
        assert_eq!(named("forks").unwrap().name, "forks");
        let refused = named("fork").unwrap_err();
        assert!(refused.contains("hooks, forks, stop"), "{refused}");
    }
}
