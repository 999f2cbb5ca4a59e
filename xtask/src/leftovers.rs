//! What tests of ours may leave on a machine: BPF maps, programs, links, pins, cgroups and processes.
//!
//! A survey lists what is there now, one line a thing with an identity that is never used twice; what is in a later
//! survey and not in an earlier one was left in between. Nothing is removed here.

use crate::workspace::output;
use anyhow::{Context as _, Result};
use serde::{Deserialize, de::DeserializeOwned};
use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs, io,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// The environment variable, or text in the arguments, by which a process shows that a test started it.
pub(crate) const MARKER: &str = "ZINIT_TEST_MARKER";

/// The BPF filesystem.
const BPFFS: &str = "/sys/fs/bpf";
/// The kernel frees BPF objects after a grace period of its own: how long that may take.
const DEADLINE: Duration = Duration::from_secs(10);
/// Between two surveys.
const INTERVAL: Duration = Duration::from_millis(50);

/// Maps that aya makes for the object beside those that it declares by name.
const OTHER_MAPS: [&str; 5] = [zinit_ebpf::map::EARLIER, "AYA_LOGS", ".rodata", ".data", ".bss"];

/// Finds what is left.
pub(crate) struct Survey {
    bpftool: Option<PathBuf>,
    before: BTreeSet<String>,
}

impl Survey {
    /// Records what is there before the tests.
    ///
    /// # Errors
    ///
    /// bpftool fails, or `/proc` or the BPF filesystem cannot be listed.
    pub(crate) fn begin() -> Result<Self> {
        let bpftool = bpftool();
        let before = present(bpftool.as_deref())?;
        Ok(Self { bpftool, before })
    }

    /// Whether maps, programs and links are looked at, too; it takes bpftool.
    pub(crate) fn sees_bpf(&self) -> bool {
        self.bpftool.is_some()
    }

    /// Unmounts the BPF filesystem at its usual place if it was not there before: the tracker mounts it where it may.
    ///
    /// # Errors
    ///
    /// It is in use: then something of ours is.
    pub(crate) fn unmount(&self) -> Result<()> {
        let mut now = BTreeSet::new();
        mounts(&mut now)?;
        let line = mount_line(BPFFS);
        if now.contains(&line) && !self.before.contains(&line) {
            rustix::mount::unmount(BPFFS, rustix::mount::UnmountFlags::empty())
                .with_context(|| format!("failed to unmount {BPFFS}"))?;
        }
        Ok(())
    }

    /// What has come and not gone, a line each, within the time that the kernel may take.
    ///
    /// # Errors
    ///
    /// As for [`Survey::begin`].
    pub(crate) fn finish(&self) -> Result<Vec<String>> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left =
                present(self.bpftool.as_deref()).map(|now| now.difference(&self.before).cloned().collect::<Vec<_>>());
            let clean = left.as_ref().is_ok_and(Vec::is_empty);
            if clean || Instant::now() >= deadline {
                return left;
            }
            thread::sleep(INTERVAL);
        }
    }
}

fn present(bpftool: Option<&Path>) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    if let Some(bpftool) = bpftool {
        bpf_objects(bpftool, &mut found)?;
    }
    pins(&mut found)?;
    mounts(&mut found)?;
    cgroups(&mut found)?;
    processes(&mut found)?;
    Ok(found)
}

/// Cgroups of services, which trackers make below their own: that of the tests is ours.
fn cgroups(found: &mut BTreeSet<String>) -> Result<()> {
    let own = fs::read_to_string("/proc/self/cgroup").context("failed to read our cgroup")?;
    let Some(own) = own.lines().find_map(|line| line.strip_prefix("0::/")) else {
        return Ok(());
    };
    let mounts = fs::read_to_string("/proc/self/mounts").context("failed to list what is mounted")?;
    for mount in mounts.lines() {
        let mut fields = mount.split(' ').skip(1);
        if let (Some(path), Some("cgroup2")) = (fields.next(), fields.next()) {
            // Where only a part of the hierarchy is mounted, ours is elsewhere.
            let entries = fs::read_dir(Path::new(path).join(own)).into_iter().flatten().flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            found.extend(
                names
                    .filter(|name| name.starts_with("zinit-tracker-"))
                    .map(|name| format!("cgroup {name}")),
            );
        }
    }
    Ok(())
}

/// BPF filesystems that are mounted.
fn mounts(found: &mut BTreeSet<String>) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("failed to list what is mounted")?;
    for mount in mounts.lines() {
        let mut fields = mount.split(' ').skip(1);
        if let (Some(path), Some("bpf")) = (fields.next(), fields.next()) {
            found.insert(mount_line(path));
        }
    }
    Ok(())
}

fn mount_line(path: &str) -> String {
    format!("mount {path}")
}

fn bpftool() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // Debian installs it where only root's PATH leads, and not every root's.
    env::split_paths(&path)
        .chain(["/usr/sbin".into()])
        .map(|directory| directory.join("bpftool"))
        .find(|bpftool| bpftool.is_file())
}

/// A map or a program.
#[derive(Deserialize)]
struct Named {
    id: u32,
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
struct Link {
    id: u32,
    /// 0 for the kinds that have none.
    #[serde(default)]
    prog_id: u32,
}

fn bpf_objects(bpftool: &Path, found: &mut BTreeSet<String>) -> Result<()> {
    let maps: Vec<Named> = list(bpftool, "map")?;
    for Named { id, name } in maps {
        if zinit_ebpf::map::ALL.contains(&name.as_str()) || OTHER_MAPS.contains(&name.as_str()) {
            found.insert(format!("map {id} {name}"));
        }
    }
    // Links before programs: a link that is there has a program that is there.
    let links: Vec<Link> = list(bpftool, "link")?;
    let programs: Vec<Named> = list(bpftool, "prog")?;
    let programs: BTreeMap<u32, String> = programs
        .into_iter()
        .filter(|program| program.name.starts_with("zinit"))
        .map(|program| (program.id, program.name))
        .collect();
    for Link { id, prog_id } in links {
        if let Some(program) = programs.get(&prog_id) {
            found.insert(format!("link {id} of program {prog_id} {program}"));
        }
    }
    found.extend(programs.iter().map(|(id, name)| format!("program {id} {name}")));
    Ok(())
}

fn list<T: DeserializeOwned>(bpftool: &Path, kind: &str) -> Result<Vec<T>> {
    let json = output(Command::new(bpftool).args(["-j", kind, "list"]))?;
    serde_json::from_str(&json).with_context(|| format!("failed to read the {kind} list of bpftool"))
}

fn pins(found: &mut BTreeSet<String>) -> Result<()> {
    let is_ours = |path: &Path| {
        path.file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"zinit"))
    };
    let mut remaining: Vec<_> = entries(Path::new(BPFFS))?
        .into_iter()
        .filter(|path| is_ours(path))
        .collect();
    while let Some(path) = remaining.pop() {
        if path.is_dir() {
            remaining.extend(entries(&path)?);
        }
        found.insert(format!("pin {}", path.display()));
    }
    Ok(())
}

/// What a directory has; nothing, if it is gone.
fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    fs::read_dir(directory)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
        .or_else(|error| {
            if error.kind() == io::ErrorKind::NotFound {
                Ok(Vec::new())
            } else {
                Err(error)
            }
        })
        .with_context(|| format!("failed to list {}", directory.display()))
}

fn processes(found: &mut BTreeSet<String>) -> Result<()> {
    for directory in entries(Path::new("/proc"))? {
        let Some(pid) = directory
            .file_name()
            .and_then(|name| name.to_str()?.parse::<u32>().ok())
        else {
            continue;
        };
        // A process that is gone by now, or dies while it is looked at, is none that is left.
        let (Ok(arguments), Ok(environment), Ok(stat)) = (
            fs::read(directory.join("cmdline")),
            fs::read(directory.join("environ")),
            fs::read_to_string(directory.join("stat")),
        ) else {
            continue;
        };
        if !(marked(&arguments) || marked(&environment)) {
            continue;
        }
        let command = String::from_utf8_lossy(&arguments).replace('\0', " ");
        found.insert(format!(
            "process {pid} started at tick {}: {}",
            start(&stat).unwrap_or("?"),
            command.trim_end()
        ));
    }
    Ok(())
}

fn marked(text: &[u8]) -> bool {
    text.windows(MARKER.len()).any(|window| window == MARKER.as_bytes())
}

/// Field 22 of `/proc/PID/stat`; the second, the command in parentheses, may have spaces and parentheses of its own.
fn start(stat: &str) -> Option<&str> {
    stat.rsplit_once(") ")?.1.split(' ').nth(19)
}

#[cfg(test)]
mod tests {
    use super::{marked, start};

    #[test]
    fn the_start_is_found_behind_a_hostile_command_name() {
        let stat = "7 (a) R 1 ) b) S 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 4242 23";
        assert_eq!(start(stat), Some("4242"));
    }

    #[test]
    fn the_marker_is_found_in_arguments_and_environments() {
        assert!(marked(b"sh\0-c\0: ZINIT_TEST_MARKER; sleep 9\0"));
        assert!(marked(b"A=1\0ZINIT_TEST_MARKER=x\0"));
        assert!(!marked(b"ZINIT_TEST=1\0"));
        assert!(!marked(b""));
    }
}
