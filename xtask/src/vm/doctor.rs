//! What the tracker's own `doctor` says in a guest, held against what the tests have seen there.

use super::{groups::PROMISES, report::Group};
use serde::Deserialize;

/// The part of `zinit-tracker doctor --json` that tests can confirm or refute.
#[derive(Deserialize)]
pub(crate) struct Doctor {
    /// None if this version of the tool gives no verdicts.
    #[serde(default)]
    promises: Vec<Promise>,
}

#[derive(Deserialize)]
struct Promise {
    #[serde(rename = "promise")]
    number: u32,
    title: String,
    holds: bool,
    detail: String,
}

/// A promise beside the groups that show it.
pub(crate) struct Comparison<'a> {
    promise: &'a Promise,
    /// Those of its groups that ran here.
    groups: Vec<&'a Group>,
}

impl Doctor {
    /// Each promise, with what its groups saw among these.
    pub(crate) fn compare<'a>(&'a self, ran: &'a [Group]) -> Vec<Comparison<'a>> {
        let compare = |promise: &'a Promise| {
            let shown = PROMISES.iter().find(|(number, _)| *number == promise.number);
            let names = shown.map_or(&[][..], |(_, names)| names);
            let groups = ran.iter().filter(|group| names.contains(&group.name.as_str()));
            Comparison {
                promise,
                groups: groups.collect(),
            }
        };
        self.promises.iter().map(compare).collect()
    }
}

impl Comparison<'_> {
    /// Where doctor is too sure of itself.
    pub(crate) fn fault(&self) -> Option<String> {
        let refuted = self.groups.iter().filter(|group| group.failed());
        let refuted: Vec<_> = refuted.map(|group| group.name.as_str()).collect();
        (self.promise.holds && !refuted.is_empty()).then(|| {
            format!(
                "doctor says that promise {} ({}) holds, and {} failed",
                self.promise.number,
                self.promise.title,
                refuted.join(", ")
            )
        })
    }

    /// A row of the table: promise, what doctor says, what the tests saw.
    pub(crate) fn row(&self) -> [String; 3] {
        let seen = |group: &&Group| format!("{}: {}", group.name, group.outcome());
        let seen: Vec<_> = self.groups.iter().map(seen).collect();
        let holds = self.promise.holds;
        let verdict = if holds { "holds" } else { "does not hold" };
        [
            format!("{}. {}", self.promise.number, self.promise.title),
            if self.promise.detail.is_empty() {
                verdict.to_owned()
            } else {
                format!("{verdict}: {}", self.promise.detail)
            },
            if seen.is_empty() {
                "not tested here".to_owned()
            } else {
                seen.join("; ")
            },
        ]
    }
}
