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

/// Its namespaces by the names that `/proc/PID/ns` has for them (those for its children left out), as inode numbers.
#[must_use]
pub fn namespaces(pid: u32) -> Option<BTreeMap<String, u64>> {
    let namespaces = process(pid)?.namespaces().ok()?.0;
    let named = namespaces
        .into_iter()
        .map(|(name, namespace)| (name.to_string_lossy().into_owned(), namespace.identifier));
    Some(named.filter(|(name, _)| !name.ends_with("_for_children")).collect())
}
