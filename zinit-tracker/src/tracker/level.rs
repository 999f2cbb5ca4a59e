//! Which books a tracker gets: the kernel's, or where they cannot be had those of level `procfs`.

use std::{error::Error, fmt, sync::atomic::AtomicU64};

use super::{
    Config, Here, Tracker, TrackerError,
    books::Books,
    config::{Level, Pins},
    service,
};
use crate::{
    fallback::{self, Procfs},
    kernel::{KernelError, LoadError, PinError, RequirementError},
    process::{ProcessKey, stat::StartClock, table::Row},
};

/// How well descendants are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tracking {
    /// The kernel keeps the books: exact.
    Ebpf,
    /// By looking at `/proc`, as a subreaper, and in a cgroup where one can be had: as good as that goes.
    Procfs,
}

impl fmt::Display for Tracking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ebpf => "ebpf",
            Self::Procfs => "procfs",
        })
    }
}

/// Why there are no kernel's books here, in one line; `None`: what failed has another cause, which level `procfs` would hide.
fn reason_to_fall_back(error: &TrackerError, config: &Config) -> Option<String> {
    let is_reason = match error {
        // Without `/proc` there is no level at all.
        TrackerError::Requirement(error) => !matches!(error, RequirementError::NoProc),
        TrackerError::NoSelf => true,
        TrackerError::Kernel(KernelError::Load(error)) => matches!(
            error,
            LoadError::Types(_) | LoadError::Object(_) | LoadError::Btf(_) | LoadError::Program { .. }
        ),
        // A directory that was asked for is wrong; of the usual one, and of a private one, there may be none to be had.
        TrackerError::Kernel(KernelError::Pin(PinError::Io { .. })) => !matches!(config.pins, Pins::Shared(_)),
        _ => false,
    };
    is_reason.then(|| in_one_line(error))
}

/// An error and its causes; of those with many lines, such as a verifier's log, the first.
fn in_one_line(error: &dyn Error) -> String {
    let mut lines: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        next = cause.source();
        let text = cause.to_string();
        let line = text.lines().next().unwrap_or_default();
        // An error that is passed on says the same twice.
        if lines.last().is_none_or(|last| last != line) {
            lines.push(line.to_owned());
        }
    }
    lines.join(": ")
}

impl Tracker {
    /// Opens the books of the level that is asked for. At [`Level::Auto`] these are the kernel's: the pinned tracker is
    /// joined, or loaded and pinned. Where they cannot be had, a warning says why, and level `procfs` takes their place.
    ///
    /// # Errors
    ///
    /// When the pins are of another layout or cannot be used; at [`Level::Ebpf`] also when a requirement is not met or the
    /// kernel refuses a program; at level `procfs` when `/proc` does not show this process.
    pub fn open(config: &Config) -> Result<Self, TrackerError> {
        match config.level {
            Level::Ebpf => Self::open_ebpf(config),
            Level::Procfs => Self::open_procfs(config, "it was asked for".to_owned()),
            Level::Auto => {
                let error = match Self::open_ebpf(config) {
                    Ok(tracker) => return Ok(tracker),
                    Err(error) => error,
                };
                let Some(reason) = reason_to_fall_back(&error, config) else {
                    return Err(error);
                };
                let tracker = Self::open_procfs(config, reason.clone())?;
                tracing::warn!(
                    reason,
                    "exact tracking is not possible here: level procfs, which can miss processes"
                );
                Ok(tracker)
            }
        }
    }

    fn open_procfs(config: &Config, reason: String) -> Result<Self, TrackerError> {
        let instance = service::checked_instance(&config.instance)?.to_owned();
        let me = std::process::id();
        let procfs = Procfs::open(reason, config.sole_parent)?;
        let started = Row::read(me).ok().flatten().ok_or(TrackerError::NoProc)?.key;
        Ok(Self {
            books: Books::Procfs(procfs),
            here: Here {
                key: ProcessKey { tgid: me, ..started },
                pid_namespace: fallback::pid_namespace(),
                // The books know processes by the pids of this namespace: nothing has to be translated.
                level: 0,
            },
            clock: StartClock::default(),
            instance,
            // What it hides is hidden from the books as well.
            proc_may_hide: false,
            exits_looked_for: AtomicU64::new(0),
        })
    }

    /// How well descendants are known.
    #[must_use]
    pub fn tracking(&self) -> Tracking {
        match &self.books {
            Books::Kernel(_) => Tracking::Ebpf,
            Books::Procfs(_) => Tracking::Procfs,
        }
    }

    /// Why not exactly; `None`: exactly.
    #[must_use]
    pub fn fallback_reason(&self) -> Option<&str> {
        match &self.books {
            Books::Kernel(_) => None,
            Books::Procfs(procfs) => Some(procfs.reason()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::kernel::{BtfError, Capability};

    fn falls_back(error: TrackerError, pins: Pins) -> bool {
        let config = Config {
            pins,
            ..Config::default()
        };
        reason_to_fall_back(&error, &config).is_some()
    }

    #[test]
    fn what_the_kernel_or_the_caller_lacks_leads_to_the_fallback() {
        let capabilities = RequirementError::Capabilities(vec![Capability::Bpf]);
        for error in [
            capabilities,
            RequirementError::NoBpf,
            RequirementError::KernelTooOld("4.19".to_owned()),
        ] {
            assert!(falls_back(error.into(), Pins::Private));
        }
        assert!(falls_back(TrackerError::NoSelf, Pins::Private));
    }

    #[test]
    fn what_somebody_should_look_into_does_not() {
        let layout = PinError::OtherLayout {
            path: PathBuf::new(),
            found: "v9".to_owned(),
            expected: 1,
            alternative: "",
        };
        assert!(!falls_back(KernelError::Pin(layout).into(), Pins::Private));
        assert!(!falls_back(
            KernelError::Pin(PinError::NotBpffs(PathBuf::new())).into(),
            Pins::Shared(PathBuf::new())
        ));
        assert!(!falls_back(
            KernelError::Load(LoadError::NoMap("x")).into(),
            Pins::Private
        ));
        // Its services run, and would be started once more.
        let take_over = KernelError::TakeOver {
            version: 1,
            source: Box::new(KernelError::Load(LoadError::Types(BtfError::NoStructure("x")))),
        };
        assert!(!falls_back(take_over.into(), Pins::SharedOrPrivate(PathBuf::new())));
        assert!(!falls_back(RequirementError::NoProc.into(), Pins::Private));
    }
}
