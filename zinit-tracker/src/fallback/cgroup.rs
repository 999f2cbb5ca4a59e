//! A cgroup of a service's own, where the version 2 hierarchy is mounted and writable (cgroups(7), kernel 4.5).
//!
//! It lies below the cgroup of the caller, whose limits go on to apply. No controller is enabled: what counts is that
//! processes inherit it, that the kernel tells when it is empty, and that it can be frozen (kernel 5.2).

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::OnceLock,
    time::{Duration, Instant},
};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use procfs::process::Process;

use super::error::{ProcfsError, failed};
use crate::process::table;

/// How long the dead may take to leave.
const PATIENCE: Duration = Duration::from_secs(1);

/// A cgroup that this process has made.
#[derive(Debug)]
pub(super) struct Cgroup {
    directory: PathBuf,
    /// Its path as `/proc/PID/cgroup` shows it.
    path: String,
    frozen: bool,
}

/// How the names of cgroups begin; then come the pid of their tracker, when it began, and a number.
const PREFIX: &str = "zinit-tracker-";

/// What the names of this program's cgroups have in common: no other had its pid and began at the same time.
fn stem() -> &'static str {
    static STEM: OnceLock<String> = OnceLock::new();
    STEM.get_or_init(|| {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        format!(
            "{PREFIX}{}-{:x}-",
            std::process::id(),
            now.tv_sec * 1_000_000_000 + now.tv_nsec
        )
    })
}

/// The caller's own cgroup: its path as `/proc/PID/cgroup` shows it, and its directory.
fn own() -> Result<(String, PathBuf), ProcfsError> {
    let own = table::cgroup(std::process::id()).map_err(failed("read", Path::new("/proc/self/cgroup")))?;
    let own = own.ok_or(ProcfsError::NoCgroup)?;
    let directory = directory_of(&own).ok_or(ProcfsError::NoCgroup)?;
    let is_cgroup = statfs(&directory).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if !is_cgroup {
        return Err(ProcfsError::NoCgroup);
    }
    Ok((own, directory))
}

/// Removes what trackers have left that were killed, or followed by another program in the same process, unless somebody is in it.
pub(super) fn clear_away() -> Result<(), ProcfsError> {
    let (_, parent) = own()?;
    for entry in fs::read_dir(&parent).map_err(failed("list", &parent))?.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let Some((pid, _)) = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')) else {
            continue;
        };
        let abandoned = pid == std::process::id().to_string() || !Path::new("/proc").join(pid).exists();
        if abandoned && !name.starts_with(stem()) {
            match fs::remove_dir(entry.path()) {
                Ok(()) => tracing::debug!(%name, "removed the cgroup of a tracker that is gone"),
                Err(error) => tracing::debug!(%name, %error, "the cgroup of a tracker that is gone stays"),
            }
        }
    }
    Ok(())
}

impl Cgroup {
    /// Makes one below the caller's, with a number that no other of this process has. The error says why there is none to be had.
    pub(super) fn create(number: u32) -> Result<Self, ProcfsError> {
        let (own, parent) = own()?;
        let name = format!("{}{number}", stem());
        let directory = parent.join(&name);
        fs::create_dir(&directory).map_err(failed("create", &directory))?;
        Ok(Self {
            directory,
            path: format!("{}/{name}", own.trim_end_matches('/')),
            frozen: false,
        })
    }

    /// Whoever writes "0" to the file moves in.
    pub(super) fn procs(&self) -> Result<OwnedFd, ProcfsError> {
        let path = self.directory.join("cgroup.procs");
        let file = File::options().write(true).open(&path).map_err(failed("open", &path))?;
        Ok(file.into())
    }

    /// Whether a process that shows this path is in it or in one below it.
    pub(super) fn holds(&self, path: &str) -> bool {
        path.strip_prefix(&self.path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// The pids of those in it and below it.
    pub(super) fn pids(&self) -> Result<HashSet<u32>, ProcfsError> {
        let mut pids = HashSet::new();
        for directory in tree(&self.directory)? {
            let path = directory.join("cgroup.procs");
            match fs::read_to_string(&path) {
                // 0 stands for a process that the caller's pid namespace does not show.
                Ok(text) => {
                    let listed = text.lines().filter_map(|line| line.parse::<u32>().ok());
                    pids.extend(listed.filter(|pid| *pid != 0));
                }
                // Removed meanwhile, or threaded: then the domain above it lists the processes.
                Err(error) if is_gone(&error) || error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(error) => return Err(failed("read", &path)(error)),
            }
        }
        Ok(pids)
    }

    /// Whether anybody lives in it or below it.
    pub(super) fn is_populated(&self) -> Result<bool, ProcfsError> {
        let path = self.directory.join("cgroup.events");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(!text.lines().any(|line| line == "populated 0")),
            // Only one that nobody is in can be removed.
            Err(error) if is_gone(&error) => Ok(false),
            Err(error) => Err(failed("read", &path)(error)),
        }
    }

    /// Moves a process that was released to the cgroup above. One that is dead by now is no error.
    pub(super) fn expel(&self, pid: u32) -> Result<(), ProcfsError> {
        let path = self.directory.with_file_name("cgroup.procs");
        match fs::write(&path, pid.to_string()) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            result => result.map_err(failed("write", &path)),
        }
    }

    /// Stops those in it from running, so that nobody is created; a frozen process can be killed. Or lets them run.
    pub(super) fn freeze(&mut self, frozen: bool) -> Result<(), ProcfsError> {
        if self.frozen == frozen {
            return Ok(());
        }
        let path = self.directory.join("cgroup.freeze");
        match fs::write(&path, if frozen { "1" } else { "0" }) {
            // Before 5.2 it cannot be.
            Err(error) if !is_gone(&error) => return Err(failed("write", &path)(error)),
            Ok(()) | Err(_) => self.frozen = frozen,
        }
        Ok(())
    }

    /// Removes it and those below it. Fails while somebody is in it.
    pub(super) fn remove(&self) -> Result<(), ProcfsError> {
        for directory in tree(&self.directory)?.into_iter().rev() {
            let began = Instant::now();
            while let Err(error) = fs::remove_dir(&directory) {
                match error.raw_os_error() {
                    Some(libc::ENOENT) => break,
                    // The dead leave it a moment after they have ended, and nothing tells when.
                    Some(libc::EBUSY) if began.elapsed() < PATIENCE && self.pids()?.is_empty() => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    _ => return Err(failed("remove", &directory)(error)),
                }
            }
        }
        Ok(())
    }
}

/// The cgroup and those below it, upper ones first.
fn tree(top: &Path) -> Result<Vec<PathBuf>, ProcfsError> {
    let mut found = vec![top.to_owned()];
    let mut next = 0;
    while let Some(directory) = found.get(next).cloned() {
        next += 1;
        match fs::read_dir(&directory) {
            Ok(entries) => {
                let below = entries.filter_map(|entry| {
                    let entry = entry.ok()?;
                    entry.file_type().ok()?.is_dir().then(|| entry.path())
                });
                found.extend(below);
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(failed("list", &directory)(error)),
        }
    }
    Ok(found)
}

/// Where the version 2 hierarchy shows the cgroup with this path.
fn directory_of(path: &str) -> Option<PathBuf> {
    let mounts = Process::myself().and_then(|process| process.mountinfo()).ok()?;
    mounts
        .into_iter()
        .filter(|mount| mount.fs_type == "cgroup2")
        .find_map(|mount| {
            let below = Path::new(path).strip_prefix(&mount.root).ok()?;
            Some(mount.mount_point.join(below))
        })
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_holds_what_is_below_it_and_not_what_starts_alike() {
        let cgroup = Cgroup {
            directory: PathBuf::new(),
            path: "/a/b".to_owned(),
            frozen: false,
        };
        for (path, held) in [
            ("/a/b", true),
            ("/a/b/c", true),
            ("/a/bc", false),
            ("/a", false),
            ("/", false),
        ] {
            assert_eq!(cgroup.holds(path), held, "{path}");
        }
    }
}
