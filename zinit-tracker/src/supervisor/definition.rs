//! What one service is to be, as the supervisor wants to know it; no file format.

use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use nix::sys::{resource::Resource, signal::Signal};
use serde::{Deserialize, Serialize};

use super::SupervisorError;
pub use crate::stop::Target as KillMode;

/// One service.
///
/// Serialised, it is a note of one supervisor for the next, not the format of service files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Definition {
    /// The program and its arguments. Looked for in `PATH`; no shell is involved. Empty: there is none that could be run, and
    /// the service fails when it is started.
    pub exec: Vec<String>,
    /// A command that succeeds once the service is ready; repeated until it does.
    pub test: Option<Vec<String>>,
    /// Runs to its end once, and is not restarted. What its main process leaves running belongs to the service until
    /// that is stopped.
    pub oneshot: bool,
    /// How long processes may take to end by themselves after the stop signal, before SIGKILL.
    pub shutdown_timeout: Duration,
    /// Services that must be running, or have succeeded if they are oneshots, before this one starts.
    pub after: Vec<String>,
    /// The signal that asks processes to end.
    #[serde(with = "signal")]
    pub stop_signal: Signal,
    /// Where the output goes.
    pub log: LogMode,
    /// Environment variables beside those that every service gets.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub dir: PathBuf,
    /// Whom the stop signal goes to; SIGKILL always goes to every process.
    pub kill_mode: KillMode,
    /// How long killed processes may take to die before a stop gives up and names them.
    pub kill_after: Duration,
    /// Processes that a stop leaves alone, along with their descendants.
    pub keep: Vec<KeepPattern>,
    /// Whether and when it is restarted. A oneshot never is.
    pub restart: RestartPolicy,
    /// User name or number that it runs as, with that user's groups; `None`: the supervisor's.
    pub user: Option<String>,
    /// Group name or number that it runs as; `None`: the user's.
    pub group: Option<String>,
    /// Resource limits; others are the supervisor's.
    pub limits: Vec<Limit>,
}

impl Definition {
    /// A service that runs this command, with everything else as zinit has it by default.
    #[must_use]
    pub fn new<S: Into<String>>(exec: impl IntoIterator<Item = S>) -> Self {
        Self {
            exec: exec.into_iter().map(Into::into).collect(),
            test: None,
            oneshot: false,
            shutdown_timeout: Duration::from_secs(10),
            after: Vec::new(),
            stop_signal: Signal::SIGTERM,
            log: LogMode::Ring,
            env: BTreeMap::new(),
            dir: PathBuf::from("/"),
            kill_mode: KillMode::All,
            kill_after: Duration::from_secs(10),
            keep: Vec::new(),
            restart: RestartPolicy::default(),
            user: None,
            group: None,
            limits: Vec::new(),
        }
    }
}

/// Where a service's standard output and error go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogMode {
    /// Into the supervisor's ring of lines.
    #[default]
    Ring,
    /// To the supervisor's own standard output and error.
    Stdout,
    /// Nowhere.
    None,
}

/// Processes that a stop leaves alone: a pattern with `*`, `?` and `[…]`.
///
/// A pattern with a slash is matched against the path of the executable, another against the command name (15 bytes, as
/// in `/proc/PID/comm`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct KeepPattern(glob::Pattern);

impl KeepPattern {
    /// Reads a pattern.
    ///
    /// # Errors
    ///
    /// When it is malformed, with the position.
    pub fn new(pattern: &str) -> Result<Self, glob::PatternError> {
        glob::Pattern::new(pattern).map(Self)
    }

    /// Whether it names a process with this command name and executable.
    #[must_use]
    pub fn matches(&self, comm: &str, executable: Option<&str>) -> bool {
        if self.0.as_str().contains('/') {
            executable.is_some_and(|path| self.0.matches(path))
        } else {
            self.0.matches(comm)
        }
    }
}

impl From<KeepPattern> for String {
    fn from(pattern: KeepPattern) -> Self {
        pattern.0.as_str().to_owned()
    }
}

impl TryFrom<String> for KeepPattern {
    type Error = glob::PatternError;

    fn try_from(pattern: String) -> Result<Self, Self::Error> {
        Self::new(&pattern)
    }
}

impl fmt::Display for KeepPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_str().fmt(f)
    }
}

/// Whether and when a service whose main process has ended is started again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// After which ends.
    pub when: RestartWhen,
    /// How long after the end, at first.
    pub delay: Duration,
    /// Each end that follows within `max_delay` of a start doubles the delay, up to this. Equal to `delay`: it stays.
    pub max_delay: Duration,
    /// How many restarts are too many; `None`: none are.
    pub limit: Option<RestartLimit>,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            when: RestartWhen::Always,
            delay: Duration::from_secs(2),
            max_delay: Duration::from_secs(2),
            limit: None,
        }
    }
}

/// After which ends a service is restarted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartWhen {
    /// Every one.
    #[default]
    Always,
    /// Those other than with exit status 0.
    OnFailure,
    /// None.
    Never,
}

/// How many restarts are too many: the service then fails, until it is started on request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartLimit {
    /// So many restarts are made.
    pub restarts: u32,
    /// Within this time.
    pub window: Duration,
}

/// A resource limit (setrlimit(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Of what.
    #[serde(with = "resource")]
    pub resource: Resource,
    /// What is enforced; `u64::MAX`: no limit.
    pub soft: u64,
    /// What the service may raise it to; `u64::MAX`: no limit.
    pub hard: u64,
}

/// Resources by setrlimit(2)'s names without `RLIMIT_`, in small letters.
pub(super) const RESOURCES: [(&str, Resource); 16] = [
    ("as", Resource::RLIMIT_AS),
    ("core", Resource::RLIMIT_CORE),
    ("cpu", Resource::RLIMIT_CPU),
    ("data", Resource::RLIMIT_DATA),
    ("fsize", Resource::RLIMIT_FSIZE),
    ("locks", Resource::RLIMIT_LOCKS),
    ("memlock", Resource::RLIMIT_MEMLOCK),
    ("msgqueue", Resource::RLIMIT_MSGQUEUE),
    ("nice", Resource::RLIMIT_NICE),
    ("nofile", Resource::RLIMIT_NOFILE),
    ("nproc", Resource::RLIMIT_NPROC),
    ("rss", Resource::RLIMIT_RSS),
    ("rtprio", Resource::RLIMIT_RTPRIO),
    ("rttime", Resource::RLIMIT_RTTIME),
    ("sigpending", Resource::RLIMIT_SIGPENDING),
    ("stack", Resource::RLIMIT_STACK),
];

mod signal {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use super::Signal;

    pub(super) fn serialize<S: Serializer>(signal: &Signal, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(signal.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Signal, D::Error> {
        let name = String::deserialize(deserializer)?;
        name.parse()
            .map_err(|_| D::Error::custom(format_args!("{name:?} is no signal")))
    }
}

mod resource {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _, ser::Error as _};

    use super::{RESOURCES, Resource};

    pub(super) fn serialize<S: Serializer>(resource: &Resource, serializer: S) -> Result<S::Ok, S::Error> {
        let found = RESOURCES.iter().find(|(_, known)| known == resource);
        let (name, _) = found.ok_or_else(|| S::Error::custom("a resource without a name"))?;
        serializer.serialize_str(name)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Resource, D::Error> {
        let name = String::deserialize(deserializer)?;
        let found = RESOURCES.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, resource)| *resource)
            .ok_or_else(|| D::Error::custom(format_args!("{name:?} is no resource")))
    }
}

/// Where definitions come from. Calls may block on files.
pub trait Definitions: Send + Sync + 'static {
    /// The service of this name.
    ///
    /// # Errors
    ///
    /// [`SupervisorError::ServiceNotFound`], [`SupervisorError::BadName`], or [`SupervisorError::Config`] when the
    /// definition is no good.
    fn load(&self, service: &str) -> Result<Definition, SupervisorError>;

    /// Every service, by name; of those whose definition is no good, why. Reads what it can.
    fn load_all(&self) -> Vec<(String, Result<Definition, SupervisorError>)>;

    /// Writes a definition, given as the fields of its file.
    ///
    /// # Errors
    ///
    /// [`SupervisorError::ServiceAlreadyExists`], [`SupervisorError::BadName`], [`SupervisorError::Config`], or
    /// [`SupervisorError::ServiceFile`].
    fn create(&self, service: &str, file: &serde_json::Value) -> Result<(), SupervisorError>;

    /// Removes a definition. A service that is supervised stays so.
    ///
    /// # Errors
    ///
    /// [`SupervisorError::ServiceNotFound`], [`SupervisorError::BadName`], or [`SupervisorError::ServiceFile`].
    fn delete(&self, service: &str) -> Result<(), SupervisorError>;

    /// The fields of a definition's file.
    ///
    /// # Errors
    ///
    /// As [`Definitions::load`].
    fn get(&self, service: &str) -> Result<serde_json::Value, SupervisorError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_for_the_next_supervisor_is_what_it_reads() {
        let definition = Definition {
            test: Some(vec!["true".to_owned()]),
            oneshot: true,
            stop_signal: Signal::SIGUSR2,
            log: LogMode::None,
            kill_mode: KillMode::Main,
            keep: vec![KeepPattern::new("tmux*").unwrap()],
            restart: RestartPolicy {
                when: RestartWhen::OnFailure,
                limit: Some(RestartLimit {
                    restarts: 3,
                    window: Duration::from_millis(1500),
                }),
                ..RestartPolicy::default()
            },
            user: Some("nobody".to_owned()),
            limits: RESOURCES
                .iter()
                .map(|(_, resource)| Limit {
                    resource: *resource,
                    soft: 1,
                    hard: u64::MAX,
                })
                .collect(),
            ..Definition::new(["service", "argument"])
        };
        let text = serde_json::to_string(&definition).unwrap();
        assert_eq!(serde_json::from_str::<Definition>(&text).unwrap(), definition);
        let bad = text.replace("SIGUSR2", "SIGNONE");
        assert!(serde_json::from_str::<Definition>(&bad).is_err());
    }

    #[test]
    fn a_pattern_with_a_slash_is_about_the_executable() {
        let check = |pattern: &str, comm: &str, executable: Option<&str>| {
            KeepPattern::new(pattern).unwrap().matches(comm, executable)
        };
        assert!(check("tmux*", "tmux: server", None));
        assert!(!check("tmux", "tmux: server", Some("/usr/bin/tmux")));
        assert!(check("/usr/*/tmux", "tmux: server", Some("/usr/bin/tmux")));
        assert!(!check("*/tmux", "tmux", None));
    }
}
