//! Definitions from service files: `DIRECTORY/NAME.yaml`.
//!
//! Owns what a file may be (regular, or a link to a regular one; at most 1 MiB; UTF-8; YAML) and what its fields mean. A
//! file that is no good spoils nothing but itself: it is reported with its place, and the others are read.
//!
//! Deliberately absent: noticing changes by itself (`reload` asks for that), includes, variables, and directories in
//! directories.

mod check;
mod document;
mod environment;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod name;

use std::{
    fmt, fs,
    io::{self, Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

pub use self::{
    check::Findings,
    document::{Complaint, Document, parse},
    environment::{ENVIRONMENT_FILE, read_environment},
    name::{MAX_NAME, check_name},
};
use super::{SupervisorError, definition::Definition, definition::Definitions};

/// The largest service file in bytes.
pub const MAX_FILE: u64 = 1024 * 1024;

/// Why a service file is no good.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Directories and what is no directory.
    #[error("{} is no directory of service files", path.display())]
    NoDirectory {
        /// The directory.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The file could not be opened or read.
    #[error("failed to read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A directory, a device, a pipe, a socket.
    #[error("{} is no regular file, nor a link to one", path.display())]
    NoFile {
        /// The file.
        path: PathBuf,
    },
    /// Nobody writes that much about a service.
    #[error("{} is larger than 1 MiB", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Binary, or of another encoding.
    #[error("{} is no text: byte {position} is no UTF-8", path.display())]
    NoText {
        /// The file.
        path: PathBuf,
        /// Where the first bad byte is, from 0.
        position: usize,
    },
    /// The text is no good.
    #[error("{}: {complaint}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        complaint: Complaint,
    },
    /// The fields that a client gave are no good.
    #[error("{0}")]
    Fields(Complaint),
    /// A client gave something else than fields.
    #[error("a definition is an object with the fields of a service file")]
    NoFields,
}

/// A complaint about a file that is good nevertheless.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The file.
    pub path: PathBuf,
    /// What, and where.
    pub complaint: Complaint,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.complaint)
    }
}

/// What a directory says about one service.
#[derive(Debug)]
pub struct Entry {
    /// Its name; of a file whose name can be no service's, something that looks like it.
    pub name: String,
    /// What its file defines, or why it defines nothing.
    pub definition: Result<Definition, SupervisorError>,
    /// What is odd about the file.
    pub warnings: Vec<Warning>,
}

/// A directory of service files.
#[derive(Clone, Debug)]
pub struct ServiceDirectory {
    path: PathBuf,
}

impl ServiceDirectory {
    /// Uses a directory, which must be there and be readable. A relative path is made absolute.
    ///
    /// # Errors
    ///
    /// [`ConfigError::NoDirectory`].
    pub fn open(path: &Path) -> Result<Self, ConfigError> {
        let opened = fs::canonicalize(path).and_then(|path| fs::read_dir(&path).map(|_| path));
        opened
            .map(|path| Self { path })
            .map_err(|source| ConfigError::NoDirectory {
                path: path.to_owned(),
                source,
            })
    }

    /// A directory that may not be there yet; there are no service files then.
    #[must_use]
    pub fn expect(path: &Path) -> Self {
        Self {
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every service file, good or not, by name.
    ///
    /// # Errors
    ///
    /// [`ConfigError::NoDirectory`]: the directory itself cannot be read.
    pub fn entries(&self) -> Result<Vec<Entry>, ConfigError> {
        let failed = |source| ConfigError::NoDirectory {
            path: self.path.clone(),
            source,
        };
        let mut entries = Vec::new();
        for found in fs::read_dir(&self.path).map_err(failed)? {
            let path = found.map_err(failed)?.path();
            if path.extension().is_none_or(|extension| extension != "yaml") {
                continue;
            }
            if let Some(entry) = self.entry(&path) {
                entries.push(entry);
            }
        }
        entries.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(entries)
    }

    /// Reads one file; `None`: it has vanished.
    fn entry(&self, path: &Path) -> Option<Entry> {
        let stem = path.file_stem().unwrap_or_default();
        let Some(name) = stem.to_str() else {
            let name = stem.to_string_lossy().into_owned();
            return Some(Entry {
                definition: Err(SupervisorError::BadName {
                    service: name.clone(),
                    reason: "it is no UTF-8",
                }),
                name,
                warnings: Vec::new(),
            });
        };
        let (definition, warnings) = match self.document(name) {
            Ok(document) => (Ok(document.definition), self.warnings(name, document.warnings)),
            // A link that leads nowhere is there, but of no use.
            Err(SupervisorError::ServiceNotFound { service }) => {
                if fs::symlink_metadata(path).is_err() {
                    return None;
                }
                let error = ConfigError::NoFile { path: path.to_owned() };
                (Err(bad(&service, error)), Vec::new())
            }
            Err(error) => (Err(error), Vec::new()),
        };
        Some(Entry {
            name: name.to_owned(),
            definition,
            warnings,
        })
    }

    fn warnings(&self, name: &str, complaints: Vec<Complaint>) -> Vec<Warning> {
        let warning = |complaint| Warning {
            path: self.file(name),
            complaint,
        };
        complaints.into_iter().map(warning).collect()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.yaml"))
    }

    fn text(&self, name: &str) -> Result<String, SupervisorError> {
        check_name(name)?;
        match read(&self.file(name)) {
            Ok(text) => Ok(text),
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Err(SupervisorError::ServiceNotFound {
                    service: name.to_owned(),
                })
            }
            Err(error @ ConfigError::Read { .. }) => Err(SupervisorError::ServiceFile {
                service: name.to_owned(),
                source: error.into(),
            }),
            Err(error) => Err(bad(name, error)),
        }
    }

    fn document(&self, name: &str) -> Result<Document, SupervisorError> {
        let text = self.text(name)?;
        parse(&text, &self.path).map_err(|complaint| self.complain(name, complaint))
    }

    fn complain(&self, name: &str, complaint: Complaint) -> SupervisorError {
        let path = self.file(name);
        bad(name, ConfigError::Text { path, complaint })
    }

    /// The text of a file with these fields, which a client gave, if that is good.
    fn text_of(&self, service: &str, fields: &serde_json::Value) -> Result<String, SupervisorError> {
        if !fields.is_object() {
            return Err(bad(service, ConfigError::NoFields));
        }
        let text = serde_saphyr::to_string(fields).map_err(|error| SupervisorError::ServiceFile {
            service: service.to_owned(),
            source: error.into(),
        })?;
        if text.len() as u64 > MAX_FILE {
            let path = self.file(service);
            return Err(bad(service, ConfigError::TooLarge { path }));
        }
        // Places in a text that the client has not seen would only confuse it.
        let complain = |complaint: Complaint| {
            bad(
                service,
                ConfigError::Fields(Complaint {
                    line: 0,
                    column: 0,
                    ..complaint
                }),
            )
        };
        let document = parse(&text, &self.path).map_err(complain)?;
        match document.warnings.into_iter().next() {
            Some(warning) => Err(complain(warning)),
            None => Ok(text),
        }
    }

    /// Writes a file that is there as a whole or not at all, and replaces none.
    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let mut file = tempfile::Builder::new()
            .prefix(".zinit-")
            // As the file would be if an editor had made it; the umask takes away what it takes away.
            .permissions(fs::Permissions::from_mode(0o644))
            .tempfile_in(&self.path)?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist_noclobber(self.file(name))?;
        Ok(())
    }
}

impl Definitions for ServiceDirectory {
    fn load(&self, service: &str) -> Result<Definition, SupervisorError> {
        let document = self.document(service)?;
        for warning in self.warnings(service, document.warnings) {
            tracing::warn!(service, "{warning}");
        }
        Ok(document.definition)
    }

    fn load_all(&self) -> Vec<(String, Result<Definition, SupervisorError>)> {
        let entries = match self.entries() {
            Ok(entries) => entries,
            Err(error) => {
                tracing::error!(cause = %cause(&error), "{error}: no service files are read");
                return Vec::new();
            }
        };
        let pair = |entry: Entry| {
            for warning in entry.warnings {
                tracing::warn!(service = entry.name, "{warning}");
            }
            (entry.name, entry.definition)
        };
        entries.into_iter().map(pair).collect()
    }

    fn create(&self, service: &str, file: &serde_json::Value) -> Result<(), SupervisorError> {
        check_name(service)?;
        let text = self.text_of(service, file)?;
        self.write(service, &text).map_err(|error| {
            if error.kind() == io::ErrorKind::AlreadyExists {
                SupervisorError::ServiceAlreadyExists {
                    service: service.to_owned(),
                }
            } else {
                SupervisorError::ServiceFile {
                    service: service.to_owned(),
                    source: error.into(),
                }
            }
        })
    }

    fn delete(&self, service: &str) -> Result<(), SupervisorError> {
        check_name(service)?;
        fs::remove_file(self.file(service)).map_err(|error| {
            if error.kind() == io::ErrorKind::NotFound {
                SupervisorError::ServiceNotFound {
                    service: service.to_owned(),
                }
            } else {
                SupervisorError::ServiceFile {
                    service: service.to_owned(),
                    source: error.into(),
                }
            }
        })
    }

    fn get(&self, service: &str) -> Result<serde_json::Value, SupervisorError> {
        let text = self.text(service)?;
        document::parse_value(&text).map_err(|complaint| self.complain(service, complaint))
    }
}

fn bad(service: &str, error: ConfigError) -> SupervisorError {
    SupervisorError::Config {
        service: service.to_owned(),
        source: error.into(),
    }
}

fn cause(error: &ConfigError) -> String {
    std::error::Error::source(error).map_or_else(String::new, ToString::to_string)
}

/// Reads a file if it is one. Nothing that is opened here blocks: not a pipe that nobody writes to, nor a device.
fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => fs::File::from(file),
        // Sockets and some devices cannot even be opened.
        Err(rustix::io::Errno::NXIO | rustix::io::Errno::NODEV) => {
            return Err(ConfigError::NoFile { path: path.to_owned() });
        }
        Err(error) => return Err(failed(error.into())),
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(ConfigError::NoFile { path: path.to_owned() });
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    String::from_utf8(bytes).map_err(|error| ConfigError::NoText {
        path: path.to_owned(),
        position: error.utf8_error().valid_up_to(),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::{ffi::OsStrExt as _, fs::symlink};

    use super::*;

    fn directory(files: &[(&str, &str)]) -> (tempfile::TempDir, ServiceDirectory) {
        let temporary = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(temporary.path().join(name), text).unwrap();
        }
        let services = ServiceDirectory::open(temporary.path()).unwrap();
        (temporary, services)
    }

    /// The chain of causes, as a client sees it.
    fn chain(error: &SupervisorError) -> String {
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(error) = source {
            text.push_str(&format!(": {error}"));
            source = error.source();
        }
        text
    }

    #[test]
    fn one_bad_file_does_not_keep_others_from_being_read() {
        let (temporary, services) = directory(&[
            ("good.yaml", "exec: a"),
            ("bad.yaml", "exec: 'a"),
            ("other.yml", "exec: a"),
            (".zinit-x", "exec: a"),
            ("a.b.yaml", "exec: a"),
            ("new\nline.yaml", "exec: a"),
            (&format!("{}.yaml", "x".repeat(65)), "exec: a"),
        ]);
        let path = temporary.path();
        fs::write(path.join(std::ffi::OsStr::from_bytes(b"\xff.yaml")), "exec: a").unwrap();
        fs::write(path.join("binary.yaml"), b"exec: \xff\xfe").unwrap();
        fs::write(path.join("huge.yaml"), vec![b' '; 1024 * 1024 + 1]).unwrap();
        fs::create_dir(path.join("directory.yaml")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path.join("pipe.yaml"),
            rustix::fs::FileType::Fifo,
            Mode::RWXU,
            0,
        )
        .unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path.join("socket.yaml")).unwrap();
        symlink(path.join("good.yaml"), path.join("link.yaml")).unwrap();
        symlink(path.join("nowhere"), path.join("dangling.yaml")).unwrap();
        symlink(path.join("loop.yaml"), path.join("loop.yaml")).unwrap();
        symlink("/dev/zero", path.join("zero.yaml")).unwrap();
        let all = services.load_all();
        let good: Vec<_> = all
            .iter()
            .filter(|(_, result)| result.is_ok())
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(good, ["good", "link"]);
        let complaint = |name: &str| {
            let (_, result) = all
                .iter()
                .find(|(found, _)| found == name)
                .unwrap_or_else(|| panic!("{name}"));
            chain(result.as_ref().unwrap_err())
        };
        for (name, expected) in [
            ("bad", "bad.yaml: line 1, column 7: unclosed quote"),
            ("a.b", "a slash, a backslash or a dot"),
            ("new\nline", "a control character"),
            ("\u{fffd}", "no UTF-8"),
            ("binary", "binary.yaml is no text: byte 6 is no UTF-8"),
            ("huge", "huge.yaml is larger than 1 MiB"),
            ("directory", "directory.yaml is no regular file, nor a link to one"),
            ("pipe", "pipe.yaml is no regular file"),
            ("socket", "socket.yaml is no regular file"),
            ("dangling", "dangling.yaml is no regular file, nor a link to one"),
            ("loop", "failed to read"),
            ("zero", "zero.yaml is no regular file, nor a link to one"),
        ] {
            assert!(complaint(name).contains(expected), "{name}: {}", complaint(name));
        }
        assert_eq!(all.len(), good.len() + 13);
        assert!(matches!(
            services.load("vanished"),
            Err(SupervisorError::ServiceNotFound { .. })
        ));
        assert!(matches!(services.load("../good"), Err(SupervisorError::BadName { .. })));
    }

    #[test]
    fn a_directory_that_is_none_is_refused() {
        let (temporary, services) = directory(&[("good.yaml", "exec: a")]);
        for path in ["missing", "good.yaml"] {
            let error = ServiceDirectory::open(&temporary.path().join(path)).unwrap_err();
            assert!(
                error
                    .to_string()
                    .ends_with(&format!("{path} is no directory of service files")),
                "{error}"
            );
        }
        drop(temporary);
        assert_eq!(services.load_all().len(), 0);
    }

    #[test]
    fn what_is_created_is_what_is_loaded_got_and_deleted() {
        let (temporary, services) = directory(&[]);
        let fields = serde_json::json!({
            "exec": "sh -c 'echo \"a: b\"'", "after": ["yes", "1"], "env": {"A": "null", "B": "1.10", "C": "a\nb"}, "oneshot": true,
        });
        services.create("web", &fields).unwrap();
        assert_eq!(services.get("web").unwrap(), fields);
        let definition = services.load("web").unwrap();
        assert_eq!(definition.after, ["yes", "1"]);
        assert_eq!(definition.env["B"], "1.10");
        assert!(matches!(
            services.create("web", &fields),
            Err(SupervisorError::ServiceAlreadyExists { .. })
        ));
        assert_eq!(
            fs::read_dir(temporary.path()).unwrap().count(),
            1,
            "nothing else is left"
        );
        services.delete("web").unwrap();
        assert!(matches!(
            services.delete("web"),
            Err(SupervisorError::ServiceNotFound { .. })
        ));
        assert!(matches!(
            services.get("web"),
            Err(SupervisorError::ServiceNotFound { .. })
        ));
    }

    #[test]
    fn fields_that_are_no_good_are_not_written() {
        let (temporary, services) = directory(&[]);
        for (fields, expected) in [
            (serde_json::json!("exec: a"), "an object"),
            (serde_json::json!({}), "exec is missing"),
            (serde_json::json!({"exec": "a 'b"}), "exec: a quote is not closed"),
            (
                serde_json::json!({"exec": "a", "signal": {"stop": "SIGNOPE"}}),
                "signal.stop",
            ),
            (
                serde_json::json!({"exec": "a", "afetr": []}),
                "afetr: unknown field: did you mean after?",
            ),
            (
                serde_json::json!({"exec": "a", "oneshot": "maybe"}),
                "oneshot: invalid boolean",
            ),
            (
                serde_json::json!({"exec": "x".repeat(1024 * 1024)}),
                "larger than 1 MiB",
            ),
        ] {
            let error = chain(&services.create("web", &fields).unwrap_err());
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains("line "), "{error}");
        }
        let good = serde_json::json!({"exec": "a"});
        for name in ["", "..", "a/b", "a.b", "../x"] {
            assert!(
                matches!(services.create(name, &good), Err(SupervisorError::BadName { .. })),
                "{name:?}"
            );
            assert!(
                matches!(services.delete(name), Err(SupervisorError::BadName { .. })),
                "{name:?}"
            );
        }
        assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
    }
}
