//! A cgroup whose memory runs out when a test says so.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::TestCgroup;

/// A cgroup with the memory controller, of either version. It is removed when it is dropped, which waits until it is empty.
#[derive(Debug)]
pub struct MemoryCgroup {
    cgroup: TestCgroup,
    files: &'static Files,
}

#[derive(Debug)]
struct Files {
    usage: &'static str,
    limit: &'static str,
    no_limit: &'static str,
    kills: &'static str,
}

const V1: Files = Files {
    usage: "memory.usage_in_bytes",
    limit: "memory.limit_in_bytes",
    no_limit: "-1",
    kills: "memory.oom_control",
};

const V2: Files = Files {
    usage: "memory.current",
    limit: "memory.max",
    no_limit: "max",
    kills: "memory.events",
};

impl MemoryCgroup {
    /// Creates it, or nothing where no hierarchy that is mounted has the controller and can be written to.
    ///
    /// # Errors
    ///
    /// The list of mounts cannot be read.
    pub fn new() -> io::Result<Option<Self>> {
        let name = format!("zinit-test-memory-{}", crate::Marker::new().as_str());
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let found = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
            let is_v1 = kind == "cgroup" && options.split(',').any(|option| option == "memory");
            let files = if is_v1 {
                &V1
            } else if kind == "cgroup2" {
                &V2
            } else {
                return None;
            };
            let directory = Path::new(path).join(&name);
            fs::create_dir(&directory).ok()?;
            let cgroup = TestCgroup::at(directory);
            cgroup
                .path()
                .join(files.limit)
                .exists()
                .then_some(Self { cgroup, files })
        });
        Ok(found)
    }

    /// The file that a process joins it by.
    #[must_use]
    pub fn procs(&self) -> PathBuf {
        self.cgroup.path().join("cgroup.procs")
    }

    /// Leaves its members so many bytes more than they have, though some of those may be taken from caches.
    ///
    /// # Errors
    ///
    /// The kernel refuses; that what is used cannot be brought below the limit is none.
    pub fn leave(&self, bytes: u64) -> io::Result<()> {
        let used: u64 = self.read(self.files.usage)?.trim().parse().map_err(io::Error::other)?;
        match fs::write(self.cgroup.path().join(self.files.limit), (used + bytes).to_string()) {
            Err(error) if error.kind() != io::ErrorKind::ResourceBusy => Err(error),
            _ => Ok(()),
        }
    }

    /// Leaves its members as much as there is.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn leave_all(&self) -> io::Result<()> {
        fs::write(self.cgroup.path().join(self.files.limit), self.files.no_limit)
    }

    /// How many of its members were killed for want of memory.
    ///
    /// # Errors
    ///
    /// The kernel does not say.
    pub fn kills(&self) -> io::Result<u64> {
        let text = self.read(self.files.kills)?;
        let count = text
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok());
        count.ok_or_else(|| io::Error::other(format!("no count of kills in {text:?}")))
    }

    fn read(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(self.cgroup.path().join(name))
    }
}
