//! What keeps processes from ending, even those that were killed; it lets go when it is dropped.
//!
//! In a test, a hold is created after the [`Cleanup`] of what it holds, so that it goes first: nothing that is held can be
//! ended.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::Child,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen},
};

use crate::{Cleanup, Marker, Ready, actor};

/// Far more than the kernel needs for anything that is waited for here.
const DEADLINE: Duration = Duration::from_secs(60);

/// Says why a test is skipped; in CI it must not be.
///
/// # Panics
///
/// In CI, where everything that a test needs has to be there.
pub fn skipped(why: &str) {
    assert!(std::env::var_os("CI").is_none(), "CI must not skip this: {why}");
    println!("SKIPPED: {why}");
}

/// A version of the cgroup interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// A cgroup that can be frozen, thawed and removed when it is dropped.
#[derive(Debug)]
pub struct Freezer {
    version: Version,
    directory: PathBuf,
}

impl Freezer {
    /// A cgroup of the version 1 freezer; `None` where that is not mounted or read-only.
    #[must_use]
    pub fn v1() -> Option<Self> {
        Self::new(Version::V1)
    }

    /// A cgroup of version 2; `None` where that is not mounted, read-only, or older than Linux 5.2.
    #[must_use]
    pub fn v2() -> Option<Self> {
        Self::new(Version::V2).filter(|freezer| freezer.directory.join("cgroup.freeze").exists())
    }

    fn new(version: Version) -> Option<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let root = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
            let fits = match version {
                Version::V1 => kind == "cgroup" && options.split(',').any(|option| option == "freezer"),
                Version::V2 => kind == "cgroup2",
            };
            fits.then_some(path)
        })?;
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let directory = Path::new(root).join(format!("zinit-test-{}-{number}", std::process::id()));
        fs::create_dir(&directory).ok()?;
        Some(Self { version, directory })
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &str {
        self.directory.to_str().expect("the mount point is plain text")
    }

    /// Moves a process in.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn add(&self, pid: u32) {
        fs::write(self.directory.join("cgroup.procs"), pid.to_string()).expect("a process can be moved");
    }

    /// Moves one thread in; version 1 only.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn add_thread(&self, tid: u32) {
        fs::write(self.directory.join("tasks"), tid.to_string()).expect("a thread can be moved");
    }

    /// Freezes its members. Does not wait until they are.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn freeze(&self) {
        self.order(true).expect("a cgroup can be frozen");
    }

    /// Thaws its members.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn thaw(&self) {
        self.order(false).expect("a cgroup can be thawed");
    }

    fn order(&self, freeze: bool) -> io::Result<()> {
        let (file, order) = match (self.version, freeze) {
            (Version::V1, true) => ("freezer.state", "FROZEN"),
            (Version::V1, false) => ("freezer.state", "THAWED"),
            (Version::V2, true) => ("cgroup.freeze", "1"),
            (Version::V2, false) => ("cgroup.freeze", "0"),
        };
        fs::write(self.directory.join(file), order)
    }

    /// Members that live on belong to a test that has failed, whose cleanup comes later.
    fn evict(&self) -> io::Result<()> {
        let parent = self.directory.parent().expect("it is below the mount point");
        for pid in fs::read_to_string(self.directory.join("cgroup.procs"))?.lines() {
            match fs::write(parent.join("cgroup.procs"), pid) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn remove(&self) -> io::Result<()> {
        self.order(false)?;
        self.evict()?;
        let started = Instant::now();
        loop {
            match fs::remove_dir(&self.directory) {
                // Dead members leave their cgroup a moment later.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && started.elapsed() < DEADLINE => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                result => return result,
            }
        }
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("failed to remove {}: {error}", self.directory.display());
        }
    }
}

/// When a tracer stops what it traces, or keeps it.
#[derive(Clone, Copy, Debug)]
pub enum TracedUntil {
    /// The thread stops in its exit until the tracer lets it go.
    LetGo,
    /// The thread exits, and the tracer has to reap it.
    Reaped,
}

/// A process that traces a thread, and lets it go when it is dropped.
#[derive(Debug)]
pub struct Tracer {
    child: Child,
    _cleanup: Cleanup,
}

impl Tracer {
    /// What the process is called.
    pub const COMM: &'static str = "tracer";

    /// Has a process seize the thread, which goes on running.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    #[must_use]
    pub fn seize(tid: u32, until: TracedUntil) -> Self {
        let marker = Marker::new();
        let cleanup = Cleanup::new(&marker);
        let mut ready = Ready::new().expect("a FIFO can be made");
        let until = match until {
            TracedUntil::LetGo => "let-go",
            TracedUntil::Reaped => "reaped",
        };
        let mut command = actor("trace", [&tid.to_string(), until], &marker);
        ready.attach(&mut command);
        let child = command.spawn().expect("the actor starts");
        let this = Self {
            child,
            _cleanup: cleanup,
        };
        ready.wait().expect("the thread can be traced");
        this
    }

    /// The tracer's pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it let go of the thread, and end.
    ///
    /// # Panics
    ///
    /// When it could not.
    pub fn detach(mut self) {
        // Our child, and not reaped, so the pid is certainly its.
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).expect("a child can be signalled");
        let status = self.child.wait().expect("a child can be waited for");
        assert!(status.success(), "the tracer ended with {status}");
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // The kernel detaches what a tracer traces when that ends.
        for result in [self.child.kill(), self.child.wait().map(drop)] {
            if let Err(error) = result {
                eprintln!("failed to end a tracer: {error}");
            }
        }
    }
}

/// A file system whose server does not answer, mounted nowhere: whoever looks up a file in it hangs, even when it is
/// killed, until this is dropped.
#[derive(Debug)]
pub struct HungMount {
    server: File,
    mount: OwnedFd,
}

/// `FUSE_INIT` of linux/fuse.h, the kernel's first request.
const FUSE_INIT: u32 = 26;

impl HungMount {
    /// `None` where the kernel has no FUSE.
    ///
    /// # Panics
    ///
    /// When it has and the mount fails.
    #[must_use]
    pub fn new() -> Option<Self> {
        let server = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).ok()?;
        let number = server.as_raw_fd().to_string();
        for (option, value) in [
            ("fd", number.as_str()),
            ("rootmode", "40000"),
            ("user_id", "0"),
            ("group_id", "0"),
        ] {
            fsconfig_set_string(&context, option, value).expect("FUSE takes its options");
        }
        fsconfig_create(&context).expect("a FUSE file system can be created");
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
            .expect("a FUSE file system can be mounted");
        let mut this = Self { server, mount };
        this.greet();
        Some(this)
    }

    /// A file in it, for processes of this machine while this value lives.
    #[must_use]
    pub fn file(&self) -> String {
        format!("/proc/{}/fd/{}/file", std::process::id(), self.mount.as_raw_fd())
    }

    /// Returns when somebody has asked for something in it, and hangs from then on.
    ///
    /// # Panics
    ///
    /// When nobody does.
    pub fn wait_for_victim(&mut self) {
        let opcode = self.request().0;
        assert_ne!(opcode, FUSE_INIT, "the kernel greets once");
    }

    /// Answers the kernel's greeting with the oldest version whose answer has this length, 7.23, and no feature.
    fn greet(&mut self) {
        let (opcode, unique) = self.request();
        assert_eq!(opcode, FUSE_INIT, "the kernel greets first");
        let mut answer = Vec::new();
        // struct fuse_out_header: length, error, request.
        answer.extend(80_u32.to_ne_bytes());
        answer.extend(0_i32.to_ne_bytes());
        answer.extend(unique.to_ne_bytes());
        // struct fuse_init_out: major, minor, max_readahead, flags, two 16-bit limits, max_write, time_gran, reserved.
        for word in [7_u32, 23, 0, 0, 0, 4096, 1] {
            answer.extend(word.to_ne_bytes());
        }
        answer.resize(80, 0);
        self.server.write_all(&answer).expect("the kernel takes the answer");
    }

    /// Takes the next request: its opcode and number (struct fuse_in_header).
    fn request(&mut self) -> (u32, u64) {
        let timeout = Timespec::try_from(DEADLINE).expect("a minute fits");
        let ready = poll(&mut [PollFd::new(&self.server, PollFlags::IN)], Some(&timeout)).expect("poll works");
        assert_eq!(ready, 1, "no request within {DEADLINE:?}");
        // FUSE_MIN_READ_BUFFER is 8 KiB, more if files can be written in larger pieces.
        let mut request = [0; 64 * 1024];
        let length = self.server.read(&mut request).expect("a request can be read");
        assert!(length >= 40, "a request has a header");
        let word = |at: usize| request[at..at + 4].try_into().expect("four bytes");
        let opcode = u32::from_ne_bytes(word(4));
        let unique = u64::from_ne_bytes(request[8..16].try_into().expect("eight bytes"));
        (opcode, unique)
    }
}
