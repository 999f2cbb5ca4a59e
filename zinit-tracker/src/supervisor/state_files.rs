//! What a supervisor saves for the one that follows it if it is killed: a file a service, in a directory beside its socket.
//!
//! The kernel's books know which processes a service has, which one is the main process and how that ended. Saved is what they
//! cannot know: what is wanted of the service, and by which definition it was started. One thread writes, so that a slow disk
//! holds up nobody else and no older state overwrites a newer one.
//!
//! ```text
//! SOCKET.state/              mode 0700, and nobody else's
//!   supervisor.json          there once every service has a file, and as long as all have
//!   services/NAME.json
//! ```

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{definition::Definition, logs::Stream, machine::Snapshot};
use crate::{process::ProcessKey, tracker::ServiceId};

/// Of the files; another one is not read.
const VERSION: u32 = 1;

/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// How often it is tried to write what could not be written.
const AGAIN: Duration = Duration::from_secs(1);

const SUPERVISOR: &str = "supervisor.json";
const SERVICES: &str = "services";

/// One service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Saved {
    /// What it was started by; before it was, what it is to be started by.
    pub(super) definition: Definition,
    pub(super) snapshot: Snapshot,
    pub(super) run: Option<Run>,
}

/// A main process and what goes with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Run {
    /// As the books have the service.
    pub(super) service: ServiceId,
    pub(super) main: ProcessKey,
    /// Where its output is read: the inodes of the pipes.
    pub(super) pipes: Vec<(Stream, u64)>,
}

/// What every file begins with.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Header {
    version: u32,
    /// `/proc/sys/kernel/random/boot_id`: pids and start times mean something within one boot.
    boot: String,
}

#[derive(Serialize)]
struct Written<'a> {
    #[serde(flatten)]
    header: &'a Header,
    #[serde(flatten)]
    saved: Option<&'a Saved>,
    /// The end was regular, and processes were left.
    #[serde(skip_serializing_if = "is_false")]
    ended: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_false(value: &bool) -> bool {
    !value
}

/// What an earlier supervisor has saved.
#[derive(Debug, Default)]
pub(super) struct Past {
    /// Every service that it supervised is in `services` or `spoilt`.
    pub(super) complete: bool,
    /// It came to a regular end, and had to leave processes.
    pub(super) ended: bool,
    pub(super) services: BTreeMap<String, Saved>,
    /// Services whose file is no good, and why.
    pub(super) spoilt: BTreeMap<String, String>,
}

/// Why nothing can be saved.
#[derive(Debug, thiserror::Error)]
pub(super) enum StateError {
    #[error("failed to make a directory of {}", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("{} is not a directory that belongs to this user alone", path.display())]
    Shared { path: PathBuf },
}

/// The thread's work.
#[derive(Debug)]
enum Order {
    /// `None`: the service is not supervised any more.
    Service(String, Option<Box<Saved>>),
    /// Every service has a file, once those ordered before are written.
    Complete,
    /// Everything is removed; after an end that left processes, what says so is kept.
    End { clean: bool },
    /// Tells when everything ordered before is done, and whether it could be.
    Barrier(oneshot::Sender<bool>),
}

/// The directory, and the thread that writes there.
#[derive(Debug)]
pub(super) struct StateFiles {
    directory: PathBuf,
    orders: Sender<Order>,
}

impl StateFiles {
    /// Uses a directory, and makes it if need be.
    ///
    /// # Errors
    ///
    /// It cannot be made, or others may write there.
    pub(super) fn open(directory: &Path) -> Result<Self, StateError> {
        for path in [directory.to_owned(), directory.join(SERVICES)] {
            let failed = |source| StateError::Directory {
                path: path.clone(),
                source,
            };
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
                _ => {}
            }
            let found = fs::symlink_metadata(&path).map_err(failed)?;
            let ours = found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o077 == 0;
            if !found.is_dir() || !ours {
                return Err(StateError::Shared { path });
            }
        }
        let (orders, received) = channel();
        let writer = Writer {
            directory: directory.to_owned(),
            header: Header::of_boot(boot_id()),
            unsaved: BTreeMap::new(),
            complete: false,
            // By the supervisor before, if there was one.
            marked: true,
        };
        // It ends when the last sender is gone.
        thread::Builder::new()
            .name("state".to_owned())
            .spawn(move || writer.work(&received))
            .map_err(|source| StateError::Directory {
                path: directory.to_owned(),
                source,
            })?;
        Ok(Self {
            directory: directory.to_owned(),
            orders,
        })
    }

    /// What an earlier supervisor has saved, in this boot. What is no good is left out, and named.
    pub(super) fn past(&self) -> Past {
        let boot = boot_id();
        let mut past = Past::default();
        match read(&self.directory.join(SUPERVISOR))
            .and_then(|text| Ok(text.map(|text| supervisor(&text, &boot)).transpose()?.flatten()))
        {
            Ok(Some(found)) => {
                past.complete = true;
                past.ended = found.ended;
            }
            Ok(None) => {}
            Err(reason) => tracing::warn!(reason, "what the last supervisor has saved about itself is no good"),
        }
        let entries = match fs::read_dir(self.directory.join(SERVICES)) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::warn!(%error, path = %self.directory.display(), "failed to look for what the last supervisor has saved");
                return past;
            }
        };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let Some(name) = name
                .strip_suffix(".json")
                .filter(|name| super::config::check_name(name).is_ok())
            else {
                // Of a supervisor that was killed while it wrote.
                remove(&path);
                continue;
            };
            let saved = read(&path).and_then(|text| text.map_or(Ok(None), |text| service(&text, &boot)));
            match saved {
                Ok(Some(saved)) => {
                    past.services.insert(name.to_owned(), saved);
                }
                // Of another boot.
                Ok(None) => remove(&path),
                Err(reason) => {
                    past.spoilt.insert(name.to_owned(), reason);
                }
            }
        }
        past
    }

    fn order(&self, order: Order) {
        if self.orders.send(order).is_err() {
            tracing::error!("the thread that saves states is gone");
        }
    }

    /// Saves a service. `None`: it is not supervised any more.
    pub(super) fn save(&self, service: &str, saved: Option<Saved>) {
        self.order(Order::Service(service.to_owned(), saved.map(Box::new)));
    }

    /// Every service was given to be saved.
    pub(super) fn complete(&self) {
        self.order(Order::Complete);
    }

    /// The supervisor ends; `clean`: it leaves no process.
    pub(super) fn end(&self, clean: bool) {
        self.order(Order::End { clean });
    }

    /// Waits until everything that was given to be saved is, or could not be; whether it is. Cancel-safe.
    pub(super) async fn settled(&self) -> bool {
        let (done, settled) = oneshot::channel();
        self.order(Order::Barrier(done));
        // An error means that the thread is gone, which was said.
        settled.await.unwrap_or(false)
    }
}

/// What `supervisor.json` says beside the header.
#[derive(Deserialize)]
pub(super) struct Supervisor {
    #[serde(default)]
    pub(super) ended: bool,
}

/// The text of a file.
pub(super) fn written(header: &Header, saved: Option<&Saved>, ended: bool) -> serde_json::Result<String> {
    let mut text = serde_json::to_string(&Written { header, saved, ended })?;
    text.push('\n');
    Ok(text)
}

/// `None`: of another boot.
pub(super) fn supervisor(text: &str, boot: &str) -> Result<Option<Supervisor>, String> {
    let Some(()) = check(text, boot)? else { return Ok(None) };
    serde_json::from_str::<Supervisor>(text)
        .map(Some)
        .map_err(|error| error.to_string())
}

/// `None`: of another boot.
pub(super) fn service(text: &str, boot: &str) -> Result<Option<Saved>, String> {
    let Some(()) = check(text, boot)? else { return Ok(None) };
    serde_json::from_str(text).map(Some).map_err(|error| error.to_string())
}

/// Of a file from the future nothing but its version can be understood.
fn check(text: &str, boot: &str) -> Result<Option<()>, String> {
    let header: Header = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if header.version != VERSION {
        return Err(format!(
            "it has version {}, and this supervisor reads version {VERSION}",
            header.version
        ));
    }
    Ok((header.boot == boot).then_some(()))
}

/// The text of a file; `None`: there is none.
fn read(path: &Path) -> Result<Option<String>, String> {
    use rustix::fs::{Mode, OFlags};
    // Nobody else writes to the directory, but an operator may have put anything there.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => fs::File::from(file),
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    if !metadata.is_file() || metadata.len() > MAX_FILE {
        return Err("it is no regular file of at most 1 MiB".to_owned());
    }
    let mut text = String::new();
    file.take(MAX_FILE)
        .read_to_string(&mut text)
        .map_err(|error| error.to_string())?;
    Ok(Some(text))
}

fn boot_id() -> String {
    // Without it, files of the last boot would pass for this one's: their processes are then not found, by their start times.
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, path = %path.display(), "failed to remove what was saved");
        }
        _ => {}
    }
}

/// The thread that writes.
struct Writer {
    directory: PathBuf,
    header: Header,
    /// States that could not be written, and have no file.
    unsaved: BTreeMap<String, Box<Saved>>,
    /// Every service was given to be saved.
    complete: bool,
    /// There may be a file that says that every service has one.
    marked: bool,
}

impl Header {
    pub(super) fn of_boot(boot: String) -> Self {
        Self { version: VERSION, boot }
    }
}

impl Writer {
    fn work(mut self, orders: &Receiver<Order>) {
        loop {
            let order = if self.is_behind() {
                match orders.recv_timeout(AGAIN) {
                    Err(RecvTimeoutError::Disconnected) => return,
                    order => order.ok(),
                }
            } else {
                let Ok(order) = orders.recv() else { return };
                Some(order)
            };
            self.obey(order, orders);
        }
    }

    fn is_behind(&self) -> bool {
        !self.unsaved.is_empty() || (self.complete && !self.marked)
    }

    /// Does this, and everything else that was ordered by now.
    fn obey(&mut self, order: Option<Order>, orders: &Receiver<Order>) {
        // Only the newest state of a service matters.
        let unsaved = std::mem::take(&mut self.unsaved);
        let troubled = !unsaved.is_empty();
        let mut states: BTreeMap<_, _> = unsaved.into_iter().map(|(name, saved)| (name, Some(saved))).collect();
        let mut barriers = Vec::new();
        let mut mark = self.complete && !self.marked;
        let mut next = order;
        while let Some(order) = next {
            match order {
                Order::Service(name, saved) => {
                    states.insert(name, saved);
                }
                Order::Barrier(done) => barriers.push(done),
                Order::Complete => (self.complete, mark) = (true, true),
                Order::End { clean } => {
                    states.clear();
                    self.complete = false;
                    self.end(clean);
                }
            }
            next = orders.try_recv().ok();
        }
        self.write_all(states, troubled);
        if mark && self.unsaved.is_empty() {
            self.mark(false);
        }
        let saved = !self.is_behind();
        for done in barriers {
            if done.send(saved).is_err() {
                tracing::debug!("whoever waited for states to be saved does not any more");
            }
        }
    }

    fn write_all(&mut self, states: BTreeMap<String, Option<Box<Saved>>>, mut troubled: bool) {
        for (name, saved) in states {
            let path = self.directory.join(SERVICES).join(format!("{name}.json"));
            let Some(saved) = saved else {
                remove(&path);
                continue;
            };
            let Err(error) = self.write(&path, Some(&saved), false) else {
                continue;
            };
            if self.marked {
                // Without a file, the service would pass for one that was forgotten.
                remove(&self.directory.join(SUPERVISOR));
                self.marked = false;
            }
            // Rather none than one that is no longer true.
            remove(&path);
            if !std::mem::replace(&mut troubled, true) {
                tracing::error!(
                    service = name, %error, path = %path.display(),
                    "failed to save a state: a supervisor that follows a crash has only the kernel's books"
                );
            }
            self.unsaved.insert(name, saved);
        }
        if troubled && self.unsaved.is_empty() {
            tracing::info!(path = %self.directory.display(), "states are saved again");
        }
    }

    fn mark(&mut self, ended: bool) {
        let path = self.directory.join(SUPERVISOR);
        let written = self.write(&path, None, ended);
        match &written {
            // It is tried again and again.
            Err(error) if !self.marked => tracing::debug!(%error, "failed to save that all states are saved"),
            Err(error) => tracing::error!(%error, "failed to save that all states are saved"),
            Ok(()) => {}
        }
        self.marked = written.is_ok();
        if !self.marked {
            // What is there may be another supervisor's, and true no more.
            remove(&path);
        }
    }

    /// A file is there as a whole or not at all. Nothing has to survive the machine, so nothing is synchronised.
    fn write(&self, path: &Path, saved: Option<&Saved>, ended: bool) -> io::Result<()> {
        let text = written(&self.header, saved, ended)?;
        let mut file = tempfile::Builder::new()
            .prefix(".")
            .tempfile_in(path.parent().unwrap_or(path))?;
        file.write_all(text.as_bytes())?;
        file.persist(path)?;
        Ok(())
    }

    fn end(&mut self, clean: bool) {
        let result = fs::remove_dir_all(self.directory.join(SERVICES));
        if let Err(error) = result {
            tracing::warn!(%error, path = %self.directory.display(), "failed to remove the saved states");
        }
        if clean {
            remove(&self.directory.join(SUPERVISOR));
            if let Err(error) = fs::remove_dir(&self.directory) {
                tracing::warn!(%error, path = %self.directory.display(), "failed to remove the directory of saved states");
            }
        } else {
            self.mark(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::machine::Machine;

    fn saved() -> Saved {
        let definition = Definition::new(["service"]);
        Saved {
            snapshot: Machine::new(&definition, false).snapshot(),
            definition,
            run: Some(Run {
                service: ServiceId(7),
                main: ProcessKey {
                    tgid: 42,
                    start_boottime_ns: u64::MAX,
                },
                pipes: vec![(Stream::Out, 1), (Stream::Err, 2)],
            }),
        }
    }

    struct Place {
        _directory: tempfile::TempDir,
        path: PathBuf,
        files: StateFiles,
    }

    fn place() -> Place {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket.state");
        Place {
            files: StateFiles::open(&path).unwrap(),
            path,
            _directory: directory,
        }
    }

    impl Place {
        fn file(&self, name: &str) -> PathBuf {
            self.path.join(SERVICES).join(format!("{name}.json"))
        }
    }

    #[tokio::test]
    async fn what_is_saved_is_read_again_and_the_newest_counts() {
        let place = place();
        place.files.save("web", Some(Saved { run: None, ..saved() }));
        place.files.save("web", Some(saved()));
        place.files.save("gone", Some(saved()));
        place.files.save("gone", None);
        place.files.settled().await;
        let past = place.files.past();
        assert_eq!(past.services, BTreeMap::from([("web".to_owned(), saved())]));
        assert!(!past.complete && past.spoilt.is_empty());
        place.files.complete();
        place.files.settled().await;
        assert!(place.files.past().complete);
    }

    #[tokio::test]
    async fn what_is_no_good_is_named_and_spoils_nothing_else() {
        let place = place();
        for name in ["good", "cut", "future", "boot", "empty", "pipe"] {
            place.files.save(name, Some(saved()));
        }
        place.files.settled().await;
        let text = fs::read_to_string(place.file("good")).unwrap();
        fs::write(place.file("cut"), &text[..text.len() / 2]).unwrap();
        fs::write(place.file("empty"), "").unwrap();
        fs::write(place.file("future"), text.replace("\"version\":1", "\"version\":2")).unwrap();
        fs::write(place.file("boot"), text.replace(&boot_id(), "another")).unwrap();
        fs::remove_file(place.file("pipe")).unwrap();
        nix::unistd::mkfifo(&place.file("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(place.path.join(SERVICES).join(".half"), "{").unwrap();
        let past = place.files.past();
        assert_eq!(past.services.keys().collect::<Vec<_>>(), ["good"]);
        let spoilt: Vec<_> = past.spoilt.keys().map(String::as_str).collect();
        assert_eq!(spoilt, ["cut", "empty", "future", "pipe"]);
        assert!(past.spoilt["future"].contains("version 2"), "{past:?}");
        assert!(
            !place.path.join(SERVICES).join(".half").exists(),
            "left by a writer that was killed"
        );
    }

    #[tokio::test]
    async fn nothing_is_left_of_a_clean_end_and_a_mark_of_another() {
        let place = place();
        place.files.save("web", Some(saved()));
        place.files.end(false);
        place.files.settled().await;
        let past = place.files.past();
        assert!(past.ended && past.services.is_empty());
        let second = StateFiles::open(&place.path).unwrap();
        second.end(true);
        second.settled().await;
        assert!(!place.path.exists());
    }

    #[test]
    fn a_directory_of_others_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let shared = directory.path().join("shared");
        fs::DirBuilder::new().mode(0o750).create(&shared).unwrap();
        assert!(matches!(StateFiles::open(&shared), Err(StateError::Shared { .. })));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path(), &link).unwrap();
        assert!(matches!(StateFiles::open(&link), Err(StateError::Shared { .. })));
    }

    #[tokio::test]
    async fn a_disk_without_room_holds_up_nobody_and_leaves_no_stale_state() {
        let place = place();
        place.files.save("web", Some(saved()));
        place.files.complete();
        place.files.settled().await;
        assert!(place.files.past().complete);
        // Nothing can be created where a file is instead of the directory of temporary files.
        let services = place.path.join(SERVICES);
        fs::remove_dir_all(&services).unwrap();
        fs::write(&services, "").unwrap();
        place.files.save("web", Some(saved()));
        place.files.settled().await;
        fs::remove_file(&services).unwrap();
        fs::create_dir(&services).unwrap();
        let past = place.files.past();
        assert!(past.services.is_empty());
        assert!(!past.complete, "the service would pass for one that was forgotten");
        // It is tried again by itself.
        let tried = async {
            while !place.files.past().complete {
                place.files.settled().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), tried).await.unwrap();
        assert_eq!(place.files.past().services.len(), 1);
    }
}
