//! What `/proc` says of a process beside its identity. Hints: each is read at its own moment, of whoever has the pid then.

use std::{collections::BTreeMap, os::unix::ffi::OsStrExt as _};

use procfs::process::Process;

fn process(pid: u32) -> Option<Process> {
    Process::new(i32::try_from(pid).ok()?).ok()
}

/// The value of a variable in the environment that the process was started with, if it is there and readable.
#[must_use]
pub fn environment(pid: u32, name: &str) -> Option<String> {
    let environment = process(pid)?.environ().ok()?;
    let value = environment.get(std::ffi::OsStr::new(name))?;
    std::str::from_utf8(value.as_bytes()).ok().map(ToOwned::to_owned)
}

/// Its cgroup in the version 2 hierarchy, where there is one.
#[must_use]
pub fn cgroup(pid: u32) -> Option<String> {
    let cgroups = process(pid)?.cgroups().ok()?;
    let unified = cgroups.into_iter().find(|cgroup| cgroup.hierarchy == 0)?;
    Some(unified.pathname)
}

/// A cgroup, as `/proc/PID/cgroup` shows it to the caller's cgroup namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// `v2`, or `v1` with the controllers or the name of the hierarchy.
    pub hierarchy: String,
    /// Its path below the hierarchy's root.
    pub path: String,
}

impl Cgroup {
    /// Whether it is of version 2.
    #[must_use]
    pub fn is_v2(&self) -> bool {
        self.hierarchy == V2
    }

    /// Whether it is the root, as the caller sees it.
    #[must_use]
    pub fn is_root(&self) -> bool {
        self.path == "/"
    }

    /// Whether it is that one of the same hierarchy, or below it. Nothing counts as below the root, which is nobody's own.
    #[must_use]
    pub fn is_within(&self, other: &Self) -> bool {
        let rest = self.path.strip_prefix(&other.path);
        rest.is_some_and(|rest| rest.is_empty() || (rest.starts_with('/') && !other.is_root()))
    }
}

const V2: &str = "v2";

/// Its cgroups, one a hierarchy.
#[must_use]
pub fn cgroups(pid: u32) -> Option<Vec<Cgroup>> {
    let cgroups = process(pid)?.cgroups().ok()?;
    let named = cgroups.into_iter().map(|cgroup| Cgroup {
        hierarchy: match cgroup.hierarchy {
            0 => V2.to_owned(),
            _ => format!("v1 {}", cgroup.controllers.join(",")),
        },
        path: cgroup.pathname.trim_end_matches(" (deleted)").to_owned(),
    });
    Some(named.collect())
}

/// Its namespaces by the names that `/proc/PID/ns` has for them (those for its children left out), as inode numbers.
#[must_use]
pub fn namespaces(pid: u32) -> Option<BTreeMap<String, u64>> {
    let namespaces = process(pid)?.namespaces().ok()?.0;
    let named = namespaces
        .into_iter()
        .map(|(name, namespace)| (name.to_string_lossy().into_owned(), namespace.identifier));
    Some(named.filter(|(name, _)| !name.ends_with("_for_children")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_within_itself_and_those_above_it() {
        let cgroup = |path: &str| Cgroup {
            hierarchy: V2.to_owned(),
            path: path.to_owned(),
        };
        let is_within = |path, other| cgroup(path).is_within(&cgroup(other));
        assert!(is_within("/a", "/a") && is_within("/a/b", "/a") && is_within("/", "/"));
        assert!(!is_within("/ab", "/a") && !is_within("/", "/a") && !is_within("/a", "/"));
    }

    #[test]
    fn this_process_has_the_cgroup_that_both_readers_find() {
        let me = std::process::id();
        let v2 = cgroups(me).unwrap().into_iter().find(Cgroup::is_v2);
        assert_eq!(v2.map(|cgroup| cgroup.path), cgroup(me));
    }
}
