//! The examples of the repository, started for real: the unit below a systemd that is PID 1 of namespaces of its own, and the
//! container's files as the root of another, since no container engine is at hand.
//!
//! Both have a root of their own that lies over the machine's (overlayfs): whatever systemd does there when it starts, such as emptying
//! `/tmp`, stays there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;
use zinit_tests::{Cleanup, Marker, daemon::wait_for, sandbox::PinDir, survivors, tool::zinit};

const SYSTEMD: &str = "/lib/systemd/systemd";

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

fn example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../zinit-tracker/examples")
        .join(path)
}

/// Cgroups of this test's own, one in each hierarchy that systemd works with: it makes others below.
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

/// A first process of namespaces of its own.
struct Namespaces {
    unshare: Child,
    marker: Marker,
    pins: PinDir,
    directory: TempDir,
    _cleanup: Cleanup,
    _cgroups: Cgroups,
}

impl Namespaces {
    /// Runs the shell's commands in the new root, with the program as `$1` and the example as `$3`; the last of them executes the first
    /// process.
    fn start(script: &str, example: &Path) -> Self {
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
            .arg(zinit())
            .arg(directory.path())
            .arg(example)
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

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// The first process as it is seen from here, once it is there.
    fn init(&self) -> Option<Pid> {
        let unshare = self.unshare.id();
        let children = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
        Pid::from_raw(children.trim().parse().ok()?)
    }

    fn signal(&self, signal: Signal) {
        // A child of our own child, which waits for nothing but its end.
        let init = pidfd_open(self.init().unwrap(), PidfdFlags::empty()).unwrap();
        pidfd_send_signal(&init, signal).unwrap();
    }

    /// Waits for the end, and returns the exit status or the signal, negative.
    fn ends(&mut self) -> i32 {
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
    fn run(&self, arguments: &[&str]) -> Output {
        let init = self.init().unwrap().as_raw_nonzero();
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--target={init}"))
            .args(["--mount", "--pid", "--root", "--wd=/"])
            .args(arguments)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command.output().unwrap()
    }

    fn prints(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}{}", self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Waits until zinit has a service in this state.
    fn wait_for_state(&mut self, service: &str, state: &str) {
        let wanted = format!("{service}: {state}\n");
        wait_for(&wanted, || {
            assert!(self.unshare.try_wait().unwrap().is_none(), "{}", self.log());
            if self.init().is_none() {
                return false;
            }
            let output = self.run(&["zinit", "list"]);
            output.status.success() && String::from_utf8_lossy(&output.stdout).contains(&wanted)
        });
    }

    fn pid(&self, service: &str) -> String {
        let status = self.prints(&["zinit", "status", service]);
        let pid = status.lines().find_map(|line| line.strip_prefix("pid: "));
        pid.unwrap().to_owned()
    }
}

#[test]
fn below_systemd_services_outlive_zinit_and_are_stopped_exactly() {
    if !Path::new(SYSTEMD).exists() {
        assert!(std::env::var_os("CI").is_none(), "CI must have systemd");
        println!("SKIPPED: systemd is not installed");
        return;
    }
    let script = r#"
touch usr/sbin/zinit && mount --bind "$1" usr/sbin/zinit
rm -rf etc/zinit && mkdir etc/zinit
printf '%s\n' 'exec: sh -c "setsid sleep 3601 & exec sleep 3600"' >etc/zinit/web.yaml
mkdir -p run/systemd/system/zinit.service.d
cp "$3" run/systemd/system/zinit.service
printf '%s\n' '[Service]' "Environment=ZINIT_TRACKER_PINS=$ZINIT_TRACKER_PINS ZINIT_TEST_MARKER=$ZINIT_TEST_MARKER" \
    >run/systemd/system/zinit.service.d/test.conf
printf '%s\n' '[Unit]' 'DefaultDependencies=no' 'AllowIsolate=yes' 'Wants=zinit.service' >run/systemd/system/test.target
export container=test
exec chroot . /lib/systemd/systemd --unit=test.target --log-target=console
"#;
    let mut namespaces = Namespaces::start(script, &example("zinit.service"));
    namespaces.wait_for_state("web", "Running");
    let pid = namespaces.pid("web");
    let show = ["systemctl", "show", "--value", "--property=MainPID", "zinit.service"];
    let main = namespaces.prints(&show);
    assert_eq!(
        namespaces.prints(&["zinit", "upgrade"]).split(' ').next(),
        Some("zinit")
    );
    assert_eq!(namespaces.prints(&show), main);
    namespaces.prints(&["kill", "-KILL", main.trim()]);
    wait_for("systemd starts it anew", || {
        let now = namespaces.prints(&show);
        now != main && now.trim() != "0"
    });
    namespaces.wait_for_state("web", "Running");
    assert_eq!(namespaces.pid("web"), pid, "{}", namespaces.log());
    namespaces.prints(&["systemctl", "reload", "zinit.service"]);

    namespaces.prints(&["systemctl", "stop", "zinit.service"]);
    let left = survivors(&namespaces.marker);
    let left: Vec<_> = left.iter().filter(|member| member.comm.contains("sleep")).collect();
    assert!(left.is_empty(), "{left:?}");
    let result = namespaces.prints(&["systemctl", "show", "--value", "--property=Result", "zinit.service"]);
    assert_eq!(result, "success\n", "{}", namespaces.log());
    assert!(!namespaces.pins.path().exists(), "pins are left: {}", namespaces.log());
    // PID 1 halts: in a pid namespace that ends it.
    namespaces.signal(Signal::from_named_raw(libc::SIGRTMIN() + 3).unwrap_or(Signal::KILL));
    namespaces.ends();
}

#[test]
fn the_containers_files_are_a_container() {
    let containerfile = fs::read_to_string(example("container/Containerfile")).unwrap();
    let entrypoint = containerfile.lines().find_map(|line| line.strip_prefix("ENTRYPOINT "));
    let entrypoint: Vec<String> = serde_json::from_str(entrypoint.unwrap()).unwrap();
    assert!(containerfile.contains("\nCOPY zinit /usr/sbin/zinit\nCOPY services /etc/zinit\n"));
    assert!(containerfile.contains("\nSTOPSIGNAL SIGTERM\n"));
    let script = format!(
        "touch usr/sbin/zinit && mount --bind \"$1\" usr/sbin/zinit\n\
         rm -rf etc/zinit && cp -r \"$3\" etc/zinit\n\
         exec chroot . {}\n",
        entrypoint.join(" ")
    );
    let mut namespaces = Namespaces::start(&script, &example("container/services"));
    namespaces.wait_for_state("clock", "Running");
    namespaces.wait_for_state("greet", "Success");
    let lines = namespaces.prints(&["zinit", "log", "--snapshot", "greet"]);
    assert!(lines.contains("hello from a container"), "{lines}");
    namespaces.signal(Signal::TERM);
    assert_eq!(namespaces.ends(), 0, "{}", namespaces.log());
}
