//! What the guests have said, and the table of it.

use super::{doctor::Doctor, kernels::Boot};
use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

/// What marks a kernel in trouble, in its messages.
pub(crate) const TROUBLE: [&str; 6] = [
    "WARNING:",
    "BUG:",
    "Oops",
    "Kernel panic",
    "rcu: INFO",
    "blocked for more than",
];

/// A guest, as far as it got.
#[derive(Default)]
pub(crate) struct Guest {
    /// From the start of QEMU until init was ready to test.
    pub(crate) booted: Option<Duration>,
    /// All that it took.
    pub(crate) duration: Duration,
    /// What init says about the kernel: its release, preemption, security modules.
    pub(crate) facts: BTreeMap<String, String>,
    /// What the tool says of this kernel, if it could be understood.
    pub(crate) doctor: Option<Doctor>,
    /// The groups that have begun.
    pub(crate) groups: Vec<Group>,
    /// What the tests left behind.
    pub(crate) left: Vec<String>,
    /// Whether init came to its end.
    pub(crate) finished: bool,
    /// Whether the guest was ended at its limit.
    pub(crate) timed_out: bool,
    /// What the kernel said.
    pub(crate) console: String,
}

/// A test binary that has begun.
pub(crate) struct Group {
    pub(crate) name: String,
    /// The exit status, once it has ended.
    pub(crate) status: Option<i32>,
    pub(crate) output: Vec<String>,
}

/// The figures of a test binary.
#[derive(Default, PartialEq, Eq, Debug)]
pub(crate) struct Figures {
    pub(crate) passed: u32,
    pub(crate) failed: u32,
    /// Of those that passed, how many say that they could test nothing.
    pub(crate) skipped: u32,
    pub(crate) seconds: String,
}

impl Guest {
    /// Takes in a line.
    pub(crate) fn hear(&mut self, line: &str, elapsed: Duration) {
        let Some(said) = line.strip_prefix("@@ ") else {
            if let Some(group) = self.groups.last_mut().filter(|group| group.status.is_none()) {
                group.output.push(line.to_owned());
            }
            return;
        };
        let (word, rest) = said.split_once(' ').unwrap_or((said, ""));
        match word {
            "fact" => {
                let (name, value) = rest.split_once(' ').unwrap_or((rest, ""));
                self.facts.insert(name.to_owned(), value.to_owned());
            }
            "doctor" => self.doctor = serde_json::from_str(rest).ok(),
            "booted" => self.booted = Some(elapsed),
            "begin" => self.groups.push(Group {
                name: rest.to_owned(),
                status: None,
                output: Vec::new(),
            }),
            "end" => {
                if let Some(group) = self.groups.last_mut() {
                    group.status = rest.rsplit(' ').next().and_then(|status| status.parse().ok());
                }
            }
            "left" => self.left.push(rest.to_owned()),
            "done" => self.finished = true,
            _ => {}
        }
    }

    /// Everything that is wrong with it, a line each, but for the output of failed groups.
    pub(crate) fn faults(&self, boot: &Boot) -> Vec<String> {
        let mut faults = Vec::new();
        if self.timed_out {
            faults.push("the guest was ended at its limit".to_owned());
        } else if self.booted.is_none() {
            faults.push("it did not boot".to_owned());
        } else if !self.finished {
            faults.push("the guest ended before its time".to_owned());
        }
        match &self.doctor {
            Some(doctor) => {
                let comparisons = doctor.compare(&self.groups);
                faults.extend(comparisons.iter().filter_map(|comparison| comparison.fault()));
            }
            None if self.booted.is_some() => faults.push("doctor gave no answer".to_owned()),
            None => {}
        }
        faults.extend(self.left.iter().map(|thing| format!("left: {thing}")));
        if self.booted.is_some() {
            let ignored = boot
                .arguments
                .split_whitespace()
                .filter(|argument| !self.obeys(argument));
            faults.extend(ignored.map(|argument| format!("{argument} had no effect")));
        }
        let troubled = |line: &&str| TROUBLE.iter().any(|mark| line.contains(mark));
        let trouble = self.console.lines().filter(troubled);
        faults.extend(trouble.map(|line| format!("the kernel says: {}", line.trim())));
        for group in self.groups.iter().filter(|group| group.failed()) {
            faults.push(format!("{}: {}", group.name, group.outcome()));
        }
        faults
    }

    /// Whether the kernel has done what its command line says.
    fn obeys(&self, argument: &str) -> bool {
        let fact = |name: &str| self.facts.get(name).map_or("", String::as_str);
        match argument.split_once('=') {
            Some(("preempt", mode)) => fact("preempt") == mode,
            Some(("lsm", list)) => {
                let active: Vec<_> = fact("lsm").split(',').collect();
                list.split(',').all(|module| active.contains(&module))
            }
            Some(("lockdown", level)) => fact("lockdown").contains(&format!("[{level}]")),
            _ => true,
        }
    }
}

impl Group {
    /// Whether it failed, or has not ended.
    pub(crate) fn failed(&self) -> bool {
        self.status != Some(0)
    }

    /// The reasons of the tests that could test nothing.
    pub(crate) fn skipped(&self) -> impl Iterator<Item = &str> {
        self.output.iter().filter_map(|line| line.strip_prefix("SKIPPED: "))
    }

    /// What the test binary says at its end; `None` if it did not get there.
    pub(crate) fn figures(&self) -> Option<Figures> {
        let summary = self
            .output
            .iter()
            .rev()
            .find(|line| line.starts_with("test result: "))?;
        let count = |what: &str| {
            let before = summary.split(what).next()?;
            before.split_whitespace().next_back()?.parse().ok()
        };
        Some(Figures {
            passed: count(" passed")?,
            failed: count(" failed")?,
            skipped: u32::try_from(self.skipped().count()).ok()?,
            seconds: summary.rsplit(' ').next()?.to_owned(),
        })
    }

    /// As the table has it.
    pub(crate) fn outcome(&self) -> String {
        let Some(figures) = self.figures() else {
            return match self.status {
                Some(124 | 137) => "TIMED OUT".to_owned(),
                Some(status) => format!("DIED ({status})"),
                None => "NO END".to_owned(),
            };
        };
        if figures.passed + figures.failed == 0 {
            return "none".to_owned();
        }
        let mut outcome = format!("{} ok", figures.passed);
        if figures.failed > 0 {
            outcome = format!("{}, {} FAILED", outcome, figures.failed);
        }
        if figures.skipped > 0 {
            outcome = format!("{}, {} skipped", outcome, figures.skipped);
        }
        outcome
    }
}

/// Kernel × group × result. A boot without a guest was skipped.
pub(crate) fn table(results: &[(Boot, Option<Guest>)]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for group in results
        .iter()
        .flat_map(|(_, guest)| guest)
        .flat_map(|guest| &guest.groups)
    {
        if !names.contains(&group.name.as_str()) {
            names.push(&group.name);
        }
    }
    let mut rows = vec![
        ["kernel", "boot"]
            .into_iter()
            .chain(names.iter().copied())
            .chain(["left", "total"])
            .map(ToOwned::to_owned)
            .collect::<Vec<_>>(),
    ];
    for (boot, guest) in results {
        let mut row = vec![boot.label()];
        match guest {
            Some(guest) => {
                row.push(guest.booted.map_or_else(|| "NO".to_owned(), seconds));
                for name in &names {
                    let group = guest.groups.iter().find(|group| group.name == *name);
                    row.push(group.map_or_else(|| "—".to_owned(), Group::outcome));
                }
                row.push(guest.left.len().to_string());
                row.push(seconds(guest.duration));
            }
            None => row.push("SKIPPED".to_owned()),
        }
        rows.push(row);
    }
    aligned(&rows)
}

/// What doctor promises on this kernel × what the tests saw; empty if it promises nothing.
pub(crate) fn promises(guest: &Guest) -> String {
    let comparisons = guest.doctor.iter().flat_map(|doctor| doctor.compare(&guest.groups));
    let mut rows: Vec<Vec<String>> = comparisons.map(|comparison| comparison.row().to_vec()).collect();
    if rows.is_empty() {
        return String::new();
    }
    rows.insert(0, ["promise", "doctor", "tests"].map(ToOwned::to_owned).to_vec());
    aligned(&rows)
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut table = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            write!(line, "{cell:width$}  ").expect("a string takes everything");
        }
        table.push_str(line.trim_end());
        table.push('\n');
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(lines: &[&str]) -> Guest {
        let mut guest = Guest::default();
        for line in lines {
            guest.hear(line, Duration::from_secs(3));
        }
        guest
    }

    #[test]
    fn a_guest_that_passes() {
        let guest = heard(&[
            "@@ fact preempt full",
            "@@ booted",
            r#"@@ doctor {"tracking":"ebpf","promises":[{"promise":1,"title":"Nothing escapes","holds":true,"detail":""}]}"#,
            "@@ begin escapes",
            "SKIPPED: no freezer",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 4.20s",
            "@@ end escapes 0",
            "@@ done",
        ]);
        let full = boot("preempt=full");
        assert_eq!(guest.faults(&full), Vec::<String>::new());
        let expected = Figures {
            passed: 12,
            failed: 0,
            skipped: 1,
            seconds: "4.20s".to_owned(),
        };
        assert_eq!(guest.groups[0].figures(), Some(expected));
        let promises = promises(&guest);
        assert!(
            promises.contains("1. Nothing escapes  holds   escapes: 12 ok, 1 skipped"),
            "{promises}"
        );
        let table = table(&[(full, Some(guest)), (boot(""), None)]);
        assert!(table.contains("12 ok, 1 skipped"), "{table}");
        assert!(table.contains("SKIPPED"), "{table}");
    }

    #[test]
    fn a_guest_that_hangs() {
        let mut guest = heard(&[
            "@@ booted",
            "@@ begin stopping",
            "running 3 tests",
            "@@ end stopping 124",
            "@@ begin cli",
        ]);
        guest.timed_out = true;
        let faults = guest.faults(&boot("preempt=full"));
        assert_eq!(
            faults,
            [
                "the guest was ended at its limit",
                "doctor gave no answer",
                "preempt=full had no effect",
                "stopping: TIMED OUT",
                "cli: NO END"
            ]
        );
    }

    #[test]
    fn a_promise_that_the_tests_refute() {
        let guest = heard(&[
            "@@ booted",
            r#"@@ doctor {"promises":[
                {"promise":1,"title":"Nothing escapes","holds":true,"detail":""},
                {"promise":3,"title":"Down means down","holds":false,"detail":"no pidfd"}]}"#
                .replace('\n', "")
                .as_str(),
            "@@ begin escapes",
            "test result: FAILED. 11 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 4.20s",
            "@@ end escapes 101",
            "@@ done",
        ]);
        assert_eq!(
            guest.faults(&boot("")),
            [
                "doctor says that promise 1 (Nothing escapes) holds, and escapes failed",
                "escapes: 11 ok, 1 FAILED"
            ]
        );
    }

    fn boot(arguments: &str) -> Boot {
        Boot {
            name: "7.x".to_owned(),
            version: "7.3.4+deb13".to_owned(),
            arguments: arguments.to_owned(),
            image: Ok("vmlinuz".into()),
        }
    }
}
