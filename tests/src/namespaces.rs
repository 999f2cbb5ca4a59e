//! The first process of namespaces of its own, with a root of its own that lies over the machine's (overlayfs): whatever systemd does
//! there when it starts, such as emptying `/tmp`, stays there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    ffi::OsStr,
    fs,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

use crate::{Cleanup, Marker, daemon::wait_for, sandbox::PinDir, survivors};

/// Makes a root over the machine's and enters it; what writes to the kernel's settings fails there.
const ENTER: &str = r#"
place=$1; shift
mount -t tmpfs -o mode=755 tmpfs "$place"
mkdir "$place/upper" "$place/work" "$place/root"
mount -t overlay -o "lowerdir=/,upperdir=$place/upper,workdir=$place/work" overlay "$place/root"
cd "$place/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys && mount -o remount,bind,ro proc/sys
mount --rbind /dev dev
mount --bind /sys sys && mount -o remount,bind,ro sys
mount --bind /sys/fs/bpf sys/fs/bpf
mount -t tmpfs -o mode=755 cgroup sys/fs/cgroup
mkdir sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
"#;

/// Cgroups of this test's own, one in each hierarchy that systemd works with: it makes others below.
#[derive(Debug)]
struct Cgroups(Vec<PathBuf>);

impl Cgroups {
    fn new(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mut own = Vec::new();
        for mount in mounts.lines() {
            let fields: Vec<_> = mount.split(' ').collect();
            let named = fields[2] == "cgroup" && fields[3].split(',').any(|option| option == "name=systemd");
            if fields[2] == "cgroup2" || named {
                let path = Path::new(fields[1]).join(name);
                fs::create_dir(&path).unwrap();
                own.push(path);
            }
        }
        Self(own)
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for top in &self.0 {
            // The dead leave their cgroups a moment after they have ended, and nothing tells when.
            wait_for("the cgroups are empty", || {
                remove_empty(top);
                !top.exists()
            });
        }
    }
}

fn remove_empty(directory: &Path) {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_empty(&entry.path());
    }
    // If it is not empty yet, it is looked at again.
    drop(fs::remove_dir(directory));
}

/// A first process of namespaces of its own; all that is in them ends with this value.
#[derive(Debug)]
pub struct Namespaces {
    unshare: Child,
    /// What all processes carry.
    pub marker: Marker,
    pins: PinDir,
    directory: TempDir,
    _cleanup: Cleanup,
    _cgroups: Cgroups,
}

impl Namespaces {
    /// Runs the shell's commands in the new root, with these as `$1` and so on; the last of them executes the first process.
    #[must_use]
    pub fn start<S: AsRef<OsStr>>(script: &str, arguments: impl IntoIterator<Item = S>) -> Self {
        let directory = TempDir::new_in("/var/tmp").unwrap();
        let (marker, pins) = (Marker::new(), PinDir::new());
        let place = directory.path().join("place");
        fs::create_dir(&place).unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let cgroups = Cgroups::new(marker.as_str());
        let join = cgroups
            .0
            .iter()
            .map(|path| format!("echo 0 >{}/cgroup.procs; ", path.display()));
        let enter = "exec unshare --fork --kill-child --pid --mount --uts --ipc --cgroup sh -ec \"$@\"";
        let unshare = Command::new("sh")
            .arg("-ec")
            .arg(join.chain([enter.to_owned()]).collect::<String>())
            .arg("sh")
            .arg(format!("{ENTER}{script}"))
            .arg("sh")
            .arg(&place)
            .args(arguments)
            .env(Marker::ENV, marker.as_str())
            .env("ZINIT_TRACKER_PINS", pins.path())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Self {
            unshare,
            _cgroups: cgroups,
            _cleanup: Cleanup::new(&marker),
            marker,
            pins,
            directory,
        }
    }

    /// Where the services' maps are pinned.
    #[must_use]
    pub fn pins(&self) -> &Path {
        self.pins.path()
    }

    /// What was said inside.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// The first process as it is seen from here, once it is there.
    #[must_use]
    pub fn init(&self) -> Option<Pid> {
        let unshare = self.unshare.id();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
        Pid::from_raw(children.trim().parse().ok()?)
    }

    /// Sends the first process a signal.
    pub fn signal(&self, signal: Signal) {
        // A child of our own child, which waits for nothing but its end.
        let init = pidfd_open(self.init().unwrap(), PidfdFlags::empty()).unwrap();
        pidfd_send_signal(&init, signal).unwrap();
    }

    /// Whether the first process has not ended.
    pub fn is_running(&mut self) -> bool {
        self.unshare.try_wait().unwrap().is_none()
    }

    /// Waits for the end, and returns the exit status or the signal, negative.
    pub fn ends(&mut self) -> i32 {
        let mut status = None;
        wait_for("the namespaces end", || {
            status = self.unshare.try_wait().unwrap();
            status.is_some()
        });
        let status = status.unwrap();
        assert_eq!(survivors(&self.marker), [], "{}", self.log());
        assert!(!self.pins.path().exists(), "pins are left: {}", self.log());
        status.code().unwrap_or_else(|| -status.signal().unwrap())
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        if let Ok(None) = self.unshare.try_wait() {
            // The namespaces go with it.
            eprintln!("{}", self.log());
            self.unshare.kill().unwrap();
            self.unshare.wait().unwrap();
        }
    }
}

impl Namespaces {
    /// Runs a command inside.
    ///
    /// # Panics
    ///
    /// If there is no first process yet.
    #[must_use]
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// A command that runs inside.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let init = self.init().unwrap().as_raw_nonzero();
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--target={init}"))
            .args(["--mount", "--pid", "--root", "--wd=/"])
            .args(arguments)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    /// What a command prints inside, which must succeed.
    pub fn prints(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }
}
