//! Services and their members: register, spawn, adopt, list, release.
//!
//! The pinned maps are the database; a [`Tracker`] is one client of them and keeps no state of its own that another
//! client would miss. How a service is stopped is [`stop`](crate::stop)'s business.

mod adopt;
mod config;
mod error;
mod member;
mod service;
mod spawn;
mod wait;

use std::{collections::HashSet, time::Duration};

pub use adopt::{Adoption, Suspect};
pub use config::{Config, DEFAULT_PINS, Pins};
pub use error::TrackerError;
pub use member::{Ended, Member};
pub use service::{Service, ServiceId, ServiceInfo, ServiceState};
pub(crate) use wait::{RECHECK, Watch};
use zinit_ebpf::{Stats, service_state};

use crate::{
    kernel::{
        EventStream, EventsError, Gate, Kernel, KernelError, LoadOptions, Loss, PinError, ProgramLog,
        check_requirements,
    },
    process::{Pidfd, ProcessKey, stat::StartClock},
};

/// How well descendants are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tracking {
    /// The kernel keeps the books: exact.
    Ebpf,
}

/// Where the caller stands: its pid namespace, and itself.
#[derive(Clone, Copy, Debug)]
struct Here {
    key: ProcessKey,
    pid_namespace: u32,
    level: u32,
}

/// A client of the machine's tracker.
pub struct Tracker {
    kernel: Kernel,
    here: Here,
    clock: StartClock,
    instance: String,
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracker")
            .field("pins", &self.kernel.pin_directory())
            .field("instance", &self.instance)
            .finish_non_exhaustive()
    }
}

impl Tracker {
    /// Joins the tracker that is pinned, or loads and pins it.
    ///
    /// # Errors
    ///
    /// When a requirement is not met, the pins are of another layout, or the kernel refuses a program.
    pub fn open(config: &Config) -> Result<Self, TrackerError> {
        check_requirements()?;
        let options = LoadOptions {
            max_processes: config.max_processes,
            log: config.program_log,
        };
        let kernel = match &config.pins {
            Pins::Shared(directory) => Kernel::open(directory, options)?,
            Pins::Private => Kernel::open_private(options)?,
            Pins::SharedOrPrivate(directory) => match Kernel::open(directory, options) {
                Err(KernelError::Pin(reason @ (PinError::NotBpffs(_) | PinError::Io { .. }))) => {
                    tracing::warn!(%reason, "running unpinned: tracking ends with this process, and others cannot see it");
                    Kernel::open_private(options)?
                }
                result => result?,
            },
        };
        Self::new(kernel, config)
    }

    /// Joins the tracker that is pinned; `None` if none is. Loads nothing and leaves nothing behind.
    ///
    /// # Errors
    ///
    /// As [`Tracker::open`].
    pub fn open_existing(config: &Config) -> Result<Option<Self>, TrackerError> {
        check_requirements()?;
        let directory = match &config.pins {
            Pins::Shared(directory) | Pins::SharedOrPrivate(directory) => directory,
            Pins::Private => return Ok(None),
        };
        Kernel::open_existing(directory)?
            .map(|kernel| Self::new(kernel, config))
            .transpose()
    }

    fn new(kernel: Kernel, config: &Config) -> Result<Self, TrackerError> {
        let instance = service::checked_instance(&config.instance)?.to_owned();
        let pid = std::process::id();
        let task = kernel
            .tasks()?
            .into_iter()
            .find(|task| task.pid == pid)
            .ok_or(TrackerError::NoSelf)?;
        let here = Here {
            key: ProcessKey {
                tgid: task.tgid,
                start_boottime_ns: task.start_boottime_ns,
            },
            pid_namespace: task.pid_namespace,
            level: task.pid_namespace_level,
        };
        let clock = StartClock::calibrate(pid, here.key.start_boottime_ns).ok_or(TrackerError::NoProc)?;
        Ok(Self {
            kernel,
            here,
            clock,
            instance,
        })
    }

    /// How well descendants are known.
    #[must_use]
    pub fn tracking(&self) -> Tracking {
        Tracking::Ebpf
    }

    /// Removes the pins if no service is registered and no other process uses the tracker. Returns whether it did.
    ///
    /// For one-shot uses: a supervisor just drops the tracker and finds everything again when it starts anew.
    ///
    /// # Errors
    ///
    /// When the pins cannot be removed.
    pub fn close(self) -> Result<bool, TrackerError> {
        let unused = || Ok(self.kernel.services()?.is_empty());
        Ok(self.kernel.unload_if(unused)?)
    }

    /// Events as they happen. Hints only; one reader at a time, machine-wide. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When another process reads them.
    pub fn events(&self) -> Result<EventStream, EventsError> {
        self.kernel.events()
    }

    /// Counters of the programs since they were loaded.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn stats(&self) -> Result<Stats, TrackerError> {
        Ok(self.kernel.stats()?)
    }

    /// How often the kernel skipped each hook since it was loaded.
    ///
    /// # Errors
    ///
    /// When a program cannot be inspected.
    pub fn misses(&self) -> Result<Vec<(&'static str, u64)>, TrackerError> {
        Ok(self.kernel.misses()?)
    }

    /// How many processes can be tracked at a time.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.kernel.max_processes()
    }

    /// Where the maps are pinned; `None`: nowhere, they go with this process.
    #[must_use]
    pub fn pin_directory(&self) -> Option<&std::path::Path> {
        self.kernel.pin_directory()
    }

    /// What the programs log, if this tracker loaded them with [`Config::program_log`]; `None` the second time.
    #[must_use]
    pub fn program_log(&self) -> Option<ProgramLog> {
        self.kernel.take_log()
    }

    pub(crate) fn loss(&self) -> Result<Loss, TrackerError> {
        Ok(self.kernel.loss()?)
    }

    pub(crate) fn attach_gate(&self) -> Result<Gate, TrackerError> {
        Ok(self.kernel.gate()?)
    }

    pub(crate) fn set_state(&self, service: ServiceId, state: ServiceState) -> Result<(), TrackerError> {
        let state = match state {
            ServiceState::Up => service_state::UP,
            ServiceState::Stopping => service_state::STOPPING,
            ServiceState::Killing => service_state::KILLING,
        };
        self.kernel.set_state(service.0, state, 0, 0)?;
        Ok(())
    }

    /// A pidfd that certainly is the member's: its entry is there before and after opening, and `/proc` shows the
    /// entry's start time for the pid that was opened.
    ///
    /// `None`: the member is dead, or was released.
    pub(crate) fn open_member(&self, member: &Member) -> Result<Option<Pidfd>, TrackerError> {
        let Some(pidfd) = self.open_matching(member.pid, member.key)? else {
            return Ok(None);
        };
        let entry = self.kernel.process(member.key.tgid)?;
        let unchanged = entry.is_some_and(|entry| {
            entry.start_boottime_ns == member.key.start_boottime_ns && entry.service == member.service.0
        });
        Ok(unchanged.then_some(pidfd))
    }

    /// A pidfd of the process with this name, if it is not reaped yet.
    ///
    /// If the pid had gone to another process before it was opened, the named one was reaped before that, and `/proc`,
    /// read afterwards, cannot show its start time.
    pub(crate) fn open_matching(&self, pid: u32, key: ProcessKey) -> Result<Option<Pidfd>, TrackerError> {
        if pid == 0 {
            return Ok(None);
        }
        let Some(pidfd) = Pidfd::open(pid)? else {
            return Ok(None);
        };
        let matches = self.clock.matches(pid, key.start_boottime_ns).unwrap_or(false);
        Ok(matches.then_some(pidfd))
    }

    /// The caller and its ancestors: no stop may signal one of them.
    pub(crate) fn own_line(&self) -> Result<HashSet<u32>, TrackerError> {
        let tasks = self.kernel.tasks()?;
        Ok(self.ancestors(&tasks).chain([self.here.key.tgid]).collect())
    }

    /// Buries a member that was seen dead although its exit was not recorded.
    pub(crate) fn bury(&self, key: ProcessKey) -> Result<bool, TrackerError> {
        Ok(self.kernel.release(key, true)?)
    }

    /// Time since boot, as the records count it.
    pub(crate) fn now() -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
    }
}
