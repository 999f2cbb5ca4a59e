//! The pin directory: where the maps, programs and links live on when no process holds them.
//!
//! ```text
//! DIRECTORY/            flock: whoever loads, unloads, registers or unregisters holds it exclusively
//!   v2/                 the layout version; flock: every open tracker holds it shared
//!     processes …       the maps, and a table of the first for people
//!     links/ programs/
//! ```

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, SYSFS_MAGIC, statfs},
};
use rustix::{
    fs::{FlockOperation, flock},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};
use zinit_ebpf::{EARLIER_LAYOUT_VERSION, LAYOUT_VERSION};

/// Where bpffs is mounted by convention.
const BPFFS: &str = "/sys/fs/bpf";

/// What the pin of a successor ends in: bpffs refuses names with a dot.
const SUCCESSOR: &str = "_new";

/// What goes wrong with pins.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The directory cannot hold pins.
    #[error("{0} is not on a bpf file system: mount one (mount -t bpf bpf /sys/fs/bpf)")]
    NotBpffs(PathBuf),
    /// A file operation failed.
    #[error("failed to {operation} {path}")]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The record that says what is pinned cannot be read.
    #[error("{0} is not the layout record of a tracker: if no tracker uses this directory, remove it (rm -r)")]
    Unreadable(PathBuf),
    /// Another version of the tracker is loaded.
    #[error(
        "{path} holds pins of layout {found}, this program uses layout {expected}: stop its services and unload it with \
         the zinit-tracker that made it{alternative}"
    )]
    OtherLayout {
        /// The directory.
        path: PathBuf,
        /// What is there.
        found: String,
        /// What this program writes.
        expected: u32,
        /// What else can be done, or nothing.
        alternative: &'static str,
    },
}

impl PinError {
    /// Whether the directory is gone: somebody has removed it, and nobody else can be using it.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PinError {
    move |source| PinError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// A pin directory, locked for use.
#[derive(Debug)]
pub(super) struct PinDirectory {
    base: PathBuf,
    /// Of the layout whose pins are meant.
    version: u32,
    /// A bpffs that only this process can reach; it goes with the descriptor.
    private: Option<OwnedFd>,
}

/// Use of a pin directory, exclusive or shared as it was asked for, until dropped.
#[derive(Debug)]
pub(crate) struct Guard(File);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = flock(&self.0, FlockOperation::Unlock) {
            tracing::debug!(%error, "closing the descriptor unlocks the pin directory");
        }
    }
}

impl PinDirectory {
    /// A directory that is or can be created, mounting bpffs at its usual place if nothing is mounted there.
    pub(super) fn open(base: &Path) -> Result<Self, PinError> {
        if base.starts_with(BPFFS) && !is_bpffs(Path::new(BPFFS)) {
            mount_bpffs_once()?;
        }
        let parent = base.parent().unwrap_or(base);
        // The directory may go between two looks, its parent does not.
        if !is_bpffs(base) && !is_bpffs(parent) {
            return Err(PinError::NotBpffs(base.to_owned()));
        }
        Ok(Self::at(base))
    }

    /// The directory if it is there and can hold pins.
    pub(super) fn existing(base: &Path) -> Option<Self> {
        (base.is_dir() && is_bpffs(base)).then(|| Self::at(base))
    }

    pub(super) fn at(base: &Path) -> Self {
        Self {
            base: base.to_owned(),
            version: LAYOUT_VERSION,
            private: None,
        }
    }

    /// The same directory, opened once more.
    pub(super) fn again(&self) -> Self {
        Self {
            version: self.version,
            ..Self::at(&self.base)
        }
    }

    pub(super) fn base(&self) -> &Path {
        &self.base
    }

    /// Removes what a failed load has pinned. The caller holds the directory exclusively.
    pub(super) fn discard(&self) {
        if let Err(error) = self.remove() {
            tracing::warn!(%error, "failed to remove the pins of a failed load");
        }
    }

    /// A directory on a bpffs of its own that is mounted nowhere (`fsmount(2)`, kernel 5.2).
    pub(super) fn private() -> Result<Self, PinError> {
        let bpffs = Path::new("a private bpf file system");
        let mount = || {
            let context = fsopen("bpf", FsOpenFlags::FSOPEN_CLOEXEC)?;
            fsconfig_create(context.as_fd())?;
            fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        };
        let mount = mount().map_err(|error| failed("create", bpffs)(error.into()))?;
        let base = PathBuf::from(format!("/proc/self/fd/{}/zinit", mount.as_raw_fd()));
        fs::create_dir(&base).map_err(failed("create", bpffs))?;
        Ok(Self {
            base,
            version: LAYOUT_VERSION,
            private: Some(mount),
        })
    }

    /// The directory, if others can reach it.
    pub(super) fn public(&self) -> Option<&Path> {
        self.private.is_none().then_some(&self.base)
    }

    /// Waits for exclusive use; makes the directory anew if its last user has removed it in the meantime.
    pub(super) fn create_exclusive(&self) -> Result<Guard, PinError> {
        loop {
            match fs::create_dir(&self.base) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(failed("create", &self.base)(error)),
            }
            if let Some(exclusive) = self.exclusive_if_there()? {
                return Ok(exclusive);
            }
        }
    }

    /// Waits for exclusive use.
    pub(super) fn exclusive(&self) -> Result<Guard, PinError> {
        self.exclusive_if_there()?
            .ok_or_else(|| failed("lock", &self.base)(io::ErrorKind::NotFound.into()))
    }

    /// Waits for exclusive use; `None` if the directory is not there.
    ///
    /// Each holder opens the directory anew: duplicates of one descriptor share its lock.
    pub(super) fn exclusive_if_there(&self) -> Result<Option<Guard>, PinError> {
        self.locked(FlockOperation::LockExclusive)
    }

    /// Waits until nobody has exclusive use, and lets others do the same.
    pub(super) fn shared(&self) -> Result<Guard, PinError> {
        self.locked(FlockOperation::LockShared)?
            .ok_or_else(|| failed("lock", &self.base)(io::ErrorKind::NotFound.into()))
    }

    /// Exclusive use, if nobody has any now. Does not wait.
    pub(super) fn try_exclusive(&self) -> Result<Option<Guard>, PinError> {
        match self.locked(FlockOperation::NonBlockingLockExclusive) {
            Ok(Some(exclusive)) => Ok(Some(exclusive)),
            Ok(None) => Err(failed("lock", &self.base)(io::ErrorKind::NotFound.into())),
            Err(PinError::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn locked(&self, operation: FlockOperation) -> Result<Option<Guard>, PinError> {
        loop {
            let lock = match File::open(&self.base) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(failed("open", &self.base)(error)),
            };
            match flock(&lock, operation) {
                Ok(()) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(failed("lock", &self.base)(error.into())),
            }
            if same_file(&lock, &self.base) {
                return Ok(Some(Guard(lock)));
            }
        }
    }

    /// The directory of the layout.
    pub(super) fn layout(&self) -> PathBuf {
        self.base.join(format!("v{}", self.version))
    }

    /// Which layout it is.
    pub(super) fn version(&self) -> u32 {
        self.version
    }

    /// Refuses pins of a layout that is neither this program's nor the one before; the directory as one of the latter, if it has such.
    pub(super) fn check_layouts(&self) -> Result<Option<Self>, PinError> {
        let mut earlier = None;
        let entries = fs::read_dir(&self.base).map_err(failed("list", &self.base))?;
        for entry in entries {
            let name = entry.map_err(failed("list", &self.base))?.file_name();
            let name = name.to_string_lossy();
            let version = name.strip_prefix('v').and_then(|version| version.parse::<u32>().ok());
            match version {
                None | Some(LAYOUT_VERSION) => {}
                Some(version @ EARLIER_LAYOUT_VERSION) => {
                    earlier = Some(Self {
                        version,
                        ..Self::at(&self.base)
                    });
                }
                Some(_) => return Err(self.other_layout(&name)),
            }
        }
        Ok(earlier)
    }

    pub(super) fn other_layout(&self, found: &str) -> PinError {
        PinError::OtherLayout {
            path: self.base.clone(),
            found: found.to_owned(),
            expected: LAYOUT_VERSION,
            alternative: match self.version {
                EARLIER_LAYOUT_VERSION => ", or start zinit of this version, which takes them over",
                _ => "",
            },
        }
    }

    /// Creates the directories that the pins go into.
    pub(super) fn create_layout(&self) -> Result<(), PinError> {
        for path in [self.layout(), self.links(), self.programs()] {
            fs::create_dir_all(&path).map_err(failed("create", &path))?;
        }
        Ok(())
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.layout().join(name)
    }

    fn links(&self) -> PathBuf {
        self.layout().join("links")
    }

    fn programs(&self) -> PathBuf {
        self.layout().join("programs")
    }

    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.links().join(name)
    }

    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.programs().join(name)
    }

    /// Removes what is pinned in the place of a hook's link, if anything is.
    pub(super) fn remove_link(&self, name: &str) -> Result<(), PinError> {
        let path = self.link(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Where the successor of a program or link is pinned until it takes the place.
    pub(super) fn successor(path: &Path) -> PathBuf {
        let mut path = path.as_os_str().to_owned();
        path.push(SUCCESSOR);
        path.into()
    }

    /// Puts the pinned successor in the place of a program or link, whose own pin goes in the same step.
    pub(super) fn succeed(path: &Path) -> Result<(), PinError> {
        fs::rename(Self::successor(path), path).map_err(failed("replace", path))
    }

    /// Removes successors that never took their places.
    pub(super) fn remove_successors(&self) -> Result<(), PinError> {
        for directory in [self.links(), self.programs(), self.layout()] {
            let entries = match fs::read_dir(&directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                entries => entries.map_err(failed("list", &directory))?,
            };
            for entry in entries {
                let path = entry.map_err(failed("list", &directory))?.path();
                if path.as_os_str().as_encoded_bytes().ends_with(SUCCESSOR.as_bytes()) {
                    fs::remove_file(&path).map_err(failed("remove", &path))?;
                }
            }
        }
        Ok(())
    }

    /// Whose lock the one reader of the events holds.
    pub(super) fn events_lock(&self) -> PathBuf {
        self.programs()
    }

    /// Marks the layout as in use until the file is closed.
    pub(super) fn in_use(&self) -> Result<File, PinError> {
        let path = self.layout();
        let file = File::open(&path).map_err(failed("open", &path))?;
        flock(&file, FlockOperation::LockShared).map_err(|error| failed("lock", &path)(error.into()))?;
        Ok(file)
    }

    /// Ends the use that `mine` stands for.
    pub(super) fn leave(&self, mine: &File) -> Result<(), PinError> {
        flock(mine, FlockOperation::Unlock).map_err(|error| failed("unlock", &self.layout())(error.into()))
    }

    /// Whether the holder of `mine` is the only user of the layout; then it stays so until `mine` is closed. If not, `mine` may
    /// have lost its lock.
    pub(super) fn is_only_user(&self, mine: &File) -> Result<bool, PinError> {
        match flock(mine, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(failed("lock", &self.layout())(error.into())),
        }
    }

    /// Removes every pin, links first so that the programs stop before their maps go.
    ///
    /// The base directory goes too, unless something else is in it.
    pub(super) fn remove(&self) -> Result<(), PinError> {
        self.remove_layout()?;
        match fs::remove_dir(&self.base) {
            Ok(()) => Ok(()),
            Err(error) if is_expected_leftover(&error) => Ok(()),
            Err(error) => Err(failed("remove", &self.base)(error)),
        }
    }
}

impl PinDirectory {
    /// Removes the pins of this layout.
    pub(super) fn remove_layout(&self) -> Result<(), PinError> {
        for directory in [self.links(), self.programs(), self.layout()] {
            remove_directory(&directory)?;
        }
        Ok(())
    }
}

fn is_expected_leftover(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy
    )
}

fn remove_directory(directory: &Path) -> Result<(), PinError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("list", directory)(error)),
    };
    for entry in entries {
        let path = entry.map_err(failed("list", directory))?.path();
        fs::remove_file(&path).map_err(failed("remove", &path))?;
    }
    fs::remove_dir(directory).map_err(failed("remove", directory))
}

fn same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => a.ino() == b.ino() && a.dev() == b.dev(),
        _ => false,
    }
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

/// Whether maps can be pinned in the directory, which need not exist: it is on a bpf file system, or one can be mounted.
#[must_use]
pub fn can_pin(directory: &Path) -> bool {
    let mountable =
        || directory.starts_with(BPFFS) && statfs(BPFFS).is_ok_and(|found| found.filesystem_type() == SYSFS_MAGIC);
    is_bpffs(directory) || directory.parent().is_some_and(is_bpffs) || mountable()
}

/// Where the bpf file system is, in words.
pub(super) fn bpffs() -> &'static str {
    if is_bpffs(Path::new(BPFFS)) {
        "mounted at /sys/fs/bpf"
    } else {
        "not mounted at /sys/fs/bpf: it is mounted when it is needed, or where that cannot be, `run` works unpinned"
    }
}

/// Mounts bpffs unless somebody else has by now: of two that mount it, the later would hide what the earlier has pinned.
fn mount_bpffs_once() -> Result<(), PinError> {
    let parent = Path::new("/sys/fs");
    let lock = File::open(parent).map_err(failed("open", parent))?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|error| failed("lock", parent)(error.into()))?;
    if is_bpffs(Path::new(BPFFS)) {
        return Ok(());
    }
    mount_bpffs()
}

fn mount_bpffs() -> Result<(), PinError> {
    let path = Path::new(BPFFS);
    // Whatever else is mounted there is somebody's choice.
    if !statfs(path).is_ok_and(|found| found.filesystem_type() == SYSFS_MAGIC) {
        return Err(PinError::NotBpffs(path.to_owned()));
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    match mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=700")) {
        Ok(()) | Err(Errno::EBUSY) => {
            tracing::info!(path = BPFFS, "mounted bpffs");
            Ok(())
        }
        Err(error) => {
            tracing::debug!(%error, path = BPFFS, "failed to mount bpffs");
            Err(PinError::NotBpffs(path.to_owned()))
        }
    }
}
