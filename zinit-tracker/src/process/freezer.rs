//! Which cgroups freeze a thread: the freezer of cgroup version 1, and `cgroup.freeze` of version 2 (5.2).
//!
//! Reads only; nothing is thawed here.

use std::{
    fmt, io,
    path::{Component, Path, PathBuf},
};

use procfs::process::MountInfo;
use serde::Serialize;

/// A version of the cgroup interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "u8")]
pub enum CgroupVersion {
    /// Version 1. What it freezes does not even act on SIGKILL.
    V1,
    /// Version 2. What it freezes can be killed.
    V2,
}

impl From<CgroupVersion> for u8 {
    fn from(version: CgroupVersion) -> Self {
        match version {
            CgroupVersion::V1 => 1,
            CgroupVersion::V2 => 2,
        }
    }
}

impl fmt::Display for CgroupVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", u8::from(*self))
    }
}

/// The cgroups that keep a thread frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Frozen {
    /// The version that they belong to.
    pub version: CgroupVersion,
    /// Directories of those that were told to freeze: the thread's own cgroup or ancestors of it, innermost first. All of
    /// them have to be thawed.
    pub cgroups: Vec<String>,
}

impl fmt::Display for Frozen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cgroup {} {}", self.version, self.cgroups.join(" and "))
    }
}

/// Finds what freezes a thread, given its `/proc/PID/cgroup` (cgroups(7)) and the `mountinfo` of the caller.
///
/// `read` reads a file below a mount point. Hierarchies that are not mounted, and cgroups outside the caller's cgroup
/// namespace, are out of its sight. Version 1 is preferred, for that is what keeps a killed process.
pub(super) fn frozen(cgroups: &str, mountinfo: &str, read: impl Fn(&Path) -> Option<String>) -> Option<Frozen> {
    let places: Vec<_> = cgroups.lines().filter_map(Place::parse).collect();
    let mounts: Vec<_> = mountinfo
        .lines()
        .filter_map(|line| MountInfo::from_line(line).ok())
        .collect();
    [CgroupVersion::V1, CgroupVersion::V2].into_iter().find_map(|version| {
        let place = places.iter().find(|place| place.version == version)?;
        let mount = mounts.iter().find_map(|mount| place.seen_through(mount))?;
        place.frozen_by(&mount, &read)
    })
}

/// [`frozen`] with the caller's own view of the file system.
pub(super) fn frozen_here(cgroups: &str) -> Option<Frozen> {
    let text = |path: &Path| -> io::Result<String> { Ok(String::from_utf8_lossy(&std::fs::read(path)?).into_owned()) };
    let mountinfo = text(Path::new("/proc/self/mountinfo")).ok()?;
    frozen(cgroups, &mountinfo, |path| text(path).ok())
}

/// Where a thread stands in a hierarchy that can freeze.
struct Place {
    version: CgroupVersion,
    path: PathBuf,
}

/// A mounted hierarchy, and the thread's cgroup below the mount point.
struct Seen {
    mount_point: PathBuf,
    below: PathBuf,
}

impl Place {
    /// A line of `/proc/PID/cgroup`, `ID:CONTROLLERS:PATH`.
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.splitn(3, ':');
        let (id, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let version = if id == "0" && controllers.is_empty() {
            CgroupVersion::V2
        } else if controllers.split(',').any(|controller| controller == "freezer") {
            CgroupVersion::V1
        } else {
            return None;
        };
        Some(Self {
            version,
            path: path.into(),
        })
    }

    fn seen_through(&self, mount: &MountInfo) -> Option<Seen> {
        let fits = match self.version {
            CgroupVersion::V1 => mount.fs_type == "cgroup" && mount.super_options.contains_key("freezer"),
            CgroupVersion::V2 => mount.fs_type == "cgroup2",
        };
        if !fits {
            return None;
        }
        let below = self.path.strip_prefix(unescaped(&mount.root)).ok()?;
        // `..` leads out of the caller's cgroup namespace, not out of the mount.
        let inside = below.components().all(|part| matches!(part, Component::Normal(_)));
        inside.then(|| Seen {
            mount_point: unescaped(&mount.mount_point.to_string_lossy()).into(),
            below: below.to_owned(),
        })
    }

    fn frozen_by(&self, seen: &Seen, read: impl Fn(&Path) -> Option<String>) -> Option<Frozen> {
        let is = |cgroup: &Path, file: &str, told: &[&str]| {
            read(&cgroup.join(file)).is_some_and(|text| text.lines().any(|line| told.contains(&line.trim())))
        };
        let own = seen.mount_point.join(&seen.below);
        let (is_frozen, order) = match self.version {
            CgroupVersion::V1 => (
                is(&own, "freezer.state", &["FROZEN", "FREEZING"]),
                "freezer.self_freezing",
            ),
            CgroupVersion::V2 => (is(&own, "cgroup.events", &["frozen 1"]), "cgroup.freeze"),
        };
        if !is_frozen {
            return None;
        }
        let line = own.ancestors().take(1 + seen.below.components().count());
        let mut cgroups: Vec<_> = line.filter(|cgroup| is(cgroup, order, &["1"])).collect();
        if cgroups.is_empty() {
            // Whoever was told to freeze is above what is mounted here.
            cgroups.push(&own);
        }
        let cgroups = cgroups.iter().map(|cgroup| cgroup.to_string_lossy().into_owned());
        Some(Frozen {
            version: self.version,
            cgroups: cgroups.collect(),
        })
    }
}

/// A path of mountinfo, in which blanks and backslashes are octal escapes (proc_pid_mountinfo(5)).
fn unescaped(path: &str) -> String {
    let mut text = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('\\') {
        text.push_str(before);
        let code = after.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code.filter(u8::is_ascii) {
            Some(code) => {
                text.push(code.into());
                rest = &after[3..];
            }
            None => {
                text.push('\\');
                rest = after;
            }
        }
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
38 31 0:35 / /sys/fs/cgroup/blkio rw,relatime - cgroup cgroup rw,blkio
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    fn found(cgroups: &str, mounts: &str, files: &[(&str, &str)]) -> Option<Frozen> {
        frozen(cgroups, mounts, |path| {
            let file = files.iter().find(|(name, _)| Path::new(name) == path)?;
            Some(file.1.to_owned())
        })
    }

    #[test]
    fn a_thawed_thread_is_not_frozen() {
        let files = [
            ("/sys/fs/cgroup/freezer/a/freezer.state", "THAWED\n"),
            ("/sys/fs/cgroup/unified/b/cgroup.events", "populated 1\nfrozen 0\n"),
        ];
        assert_eq!(found("6:freezer:/a\n0::/b\n", MOUNTS, &files), None);
        assert_eq!(found("", MOUNTS, &files), None);
        assert_eq!(found("6:freezer:/a\n", "", &files), None);
    }

    #[test]
    fn version_1_names_every_ancestor_that_was_told_to_freeze() {
        let files = [
            ("/sys/fs/cgroup/freezer/a/b/c/freezer.state", "FREEZING\n"),
            ("/sys/fs/cgroup/freezer/a/b/c/freezer.self_freezing", "1\n"),
            ("/sys/fs/cgroup/freezer/a/b/freezer.self_freezing", "0\n"),
            ("/sys/fs/cgroup/freezer/a/freezer.self_freezing", "1\n"),
        ];
        let frozen = found("6:cpu,freezer:/a/b/c\n", MOUNTS, &files).unwrap();
        assert_eq!(frozen.version, CgroupVersion::V1);
        assert_eq!(
            frozen.cgroups,
            ["/sys/fs/cgroup/freezer/a/b/c", "/sys/fs/cgroup/freezer/a"]
        );
    }

    #[test]
    fn version_2_names_the_ancestor_that_was_told_to_freeze() {
        let files = [
            ("/sys/fs/cgroup/unified/a/b/cgroup.events", "populated 1\nfrozen 1\n"),
            ("/sys/fs/cgroup/unified/a/b/cgroup.freeze", "0\n"),
            ("/sys/fs/cgroup/unified/a/cgroup.freeze", "1\n"),
        ];
        let frozen = found("6:freezer:/\n0::/a/b\n", MOUNTS, &files).unwrap();
        assert_eq!(frozen.to_string(), "cgroup v2 /sys/fs/cgroup/unified/a");
        let json = serde_json::to_value(&frozen).unwrap();
        assert_eq!(json["version"], 2);
    }

    #[test]
    fn a_freeze_from_above_the_mount_is_laid_on_the_threads_own_cgroup() {
        // As in a container without a cgroup namespace, which sees a part of the hierarchy.
        let mounts = "50 40 0:34 /docker/x /cg\\040roups rw - cgroup cgroup rw,freezer\n";
        let files = [("/cg roups/a/freezer.state", "FROZEN\n")];
        let frozen = found("6:freezer:/docker/x/a\n", mounts, &files).unwrap();
        assert_eq!(frozen.cgroups, ["/cg roups/a"]);
        let outside = found("6:freezer:/docker/other\n", mounts, &files);
        assert_eq!(outside, None);
    }

    #[test]
    fn a_cgroup_outside_the_namespace_is_not_looked_for() {
        let files = [("/sys/fs/cgroup/freezer/../a/freezer.state", "FROZEN\n")];
        assert_eq!(found("6:freezer:/../a\n", MOUNTS, &files), None);
    }

    #[test]
    fn escapes_are_read_and_other_backslashes_kept() {
        assert_eq!(unescaped("/a\\040b\\134c"), "/a b\\c");
        assert_eq!(unescaped("/a\\9\\"), "/a\\9\\");
    }
}
