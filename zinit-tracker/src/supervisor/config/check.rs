//! Everything that is wrong with a directory of service files, as `zinit check` tells it.

use std::collections::BTreeSet;

use super::{super::graph::Graph, ConfigError, ServiceDirectory};

/// What a directory is like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Services whose files are good.
    pub services: Vec<String>,
    /// What keeps a service from being started, or is ignored although it was surely meant.
    pub faults: Vec<String>,
    /// What may be on purpose.
    pub notes: Vec<String>,
}

impl ServiceDirectory {
    /// Reads every file, and looks at what the services want of each other.
    ///
    /// # Errors
    ///
    /// The directory cannot be read.
    pub fn check(&self) -> Result<Findings, ConfigError> {
        let mut findings = Findings::default();
        let mut good = Vec::new();
        for entry in self.entries()? {
            findings.faults.extend(entry.warnings.iter().map(ToString::to_string));
            match entry.definition {
                Ok(definition) => good.push((entry.name, definition.after)),
                Err(error) => findings.faults.push(innermost(&error)),
            }
        }
        let graph = Graph::new(good.iter().map(|(name, after)| (name.as_str(), after.as_slice())));
        for (name, cycle) in graph.cycles() {
            findings.faults.push(format!(
                "service {name:?} can never start: its dependencies form a cycle, {cycle}"
            ));
        }
        let known: BTreeSet<_> = good.iter().map(|(name, _)| name.as_str()).collect();
        for (name, after) in &good {
            for dependency in after.iter().filter(|dependency| !known.contains(dependency.as_str())) {
                findings.notes.push(format!(
                    "service {name:?} waits for {dependency:?}, which has no good file here, until that is monitored"
                ));
            }
        }
        findings.services = good.into_iter().map(|(name, _)| name).collect();
        Ok(findings)
    }
}

/// The cause that names the file and the place; outer ones only say that there is one.
fn innermost(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) if source.is::<ConfigError>() => {
            let cause = source.source().map_or_else(String::new, |cause| format!(": {cause}"));
            format!("{source}{cause}")
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_check_finds_what_is_wrong_with_files_and_between_them() {
        let temporary = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("good", "exec: a"),
            ("waits", "exec: a\nafter: [good, missing]"),
            ("bad", "exec: 'a"),
            ("odd", "exec: a\nafetr: [good]"),
            ("one", "exec: a\nafter: [two]"),
            ("two", "exec: a\nafter: [one]"),
        ] {
            fs::write(temporary.path().join(format!("{name}.yaml")), text).unwrap();
        }
        let directory = ServiceDirectory::open(temporary.path()).unwrap();
        let findings = directory.check().unwrap();
        assert_eq!(findings.services, ["good", "odd", "one", "two", "waits"]);
        let file = |name: &str| directory.path().join(name).display().to_string();
        assert_eq!(
            findings.faults,
            [
                format!("{}: line 1, column 7: unclosed quote", file("bad.yaml")),
                format!(
                    "{}: line 2, column 1: afetr: unknown field: did you mean after?",
                    file("odd.yaml")
                ),
                "service \"one\" can never start: its dependencies form a cycle, one → two → one".to_owned(),
                "service \"two\" can never start: its dependencies form a cycle, two → one → two".to_owned(),
            ]
        );
        assert_eq!(
            findings.notes,
            ["service \"waits\" waits for \"missing\", which has no good file here, until that is monitored"]
        );
    }
}
