//! Services and their members: register, spawn, adopt, list, release.
//!
//! The pinned maps are the database; a [`Tracker`] is one client of them and keeps no state of its own that another
//! client would miss. How a service is stopped is [`stop`](mod@crate::stop)'s business.

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
use zinit_ebpf::{StateChange, Stats, service_state};

use crate::{
    kernel::{
        EventStream, EventsError, Gate, Kernel, KernelError, LoadOptions, PinError, ProgramLog, check_requirements,
    },
    process::{
        Pidfd, PidfdError, ProcessKey,
        stat::{self, Condition, StartClock},
    },
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

    /// On failure, what was loaded goes, unless somebody uses it.
    fn new(kernel: Kernel, config: &Config) -> Result<Self, TrackerError> {
        match Self::stand(&kernel, config) {
            Ok((instance, here, clock)) => Ok(Self {
                kernel,
                here,
                clock,
                instance,
            }),
            Err(error) => {
                let unused = || Ok(kernel.services()?.is_empty());
                if let Err(leftover) = kernel.unload_if(unused) {
                    tracing::warn!(error = %leftover, "failed to remove the pins");
                }
                Err(error)
            }
        }
    }

    /// Who the caller is, as the kernel and `/proc` see it.
    fn stand(kernel: &Kernel, config: &Config) -> Result<(String, Here, StartClock), TrackerError> {
        let instance = service::checked_instance(&config.instance)?.to_owned();
        let pid = std::process::id();
        let task = kernel
            .tasks()?
            .into_iter()
            .find(|task| task.pid == pid)
            .ok_or(TrackerError::NoSelf)?;
        if !stat::is_initial_pid_namespace() && task.pid_namespace_level == 0 {
            return Err(TrackerError::NoSelf);
        }
        let here = Here {
            key: ProcessKey {
                tgid: task.tgid,
                start_boottime_ns: task.start_boottime_ns,
            },
            pid_namespace: task.pid_namespace,
            level: task.pid_namespace_level,
        };
        let clock = StartClock::calibrate(pid, here.key.start_boottime_ns).ok_or(TrackerError::NoProc)?;
        Ok((instance, here, clock))
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

    /// Forgets every service and removes the pins, if no service has a member and no other process uses the tracker.
    ///
    /// # Errors
    ///
    /// [`TrackerError::NotEmpty`] or [`TrackerError::InUse`], and then nothing was changed; or when the pins cannot be
    /// removed.
    pub fn unload(self) -> Result<(), TrackerError> {
        let mut busy = None;
        let unused = || {
            let services = self.kernel.services()?;
            busy = services.iter().find(|(_, service)| service.live > 0).copied();
            Ok(busy.is_none())
        };
        if self.kernel.unload_if(unused)? {
            return Ok(());
        }
        Err(match busy {
            Some((id, service)) => {
                let info = ServiceInfo::new(id, &service);
                TrackerError::NotEmpty {
                    name: format!("{}/{}", info.instance, info.name),
                    live: info.live,
                }
            }
            None => TrackerError::InUse,
        })
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

    pub(crate) fn missed_creations(&self) -> Result<u64, TrackerError> {
        Ok(self.kernel.missed_creations()?)
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
        let change = StateChange {
            state: state.into(),
            ..StateChange::NONE
        };
        self.kernel.change(service.0, change)?;
        Ok(())
    }

    /// Hooks that are loaded but not attached any more.
    pub(crate) fn detached_hooks(&self) -> Vec<&'static str> {
        self.kernel.detached_hooks()
    }

    /// Whether processes of this service can be invisible to the caller: their registrant is in another pid namespace.
    pub(crate) fn is_out_of_sight(&self, info: &ServiceInfo) -> bool {
        self.here.level != 0 && info.pid_namespace != self.here.pid_namespace
    }

    /// A pidfd that certainly is the member's: its entry is there before and after opening, and `/proc` shows the
    /// entry's start time for the pid that was opened.
    ///
    /// `None`: the member is dead, or was released.
    pub(crate) fn open_member(&self, member: &Member) -> Result<Option<Pidfd>, TrackerError> {
        let Some(pidfd) = self.open_matching(member.pid, member.key)? else {
            if self.is_member(member)? && member.pid != 0 && self.is_gone(member.key)? {
                // Its exit was missed, and whoever reaped it freed the pid: nothing else will take it out.
                self.bury(member.key)?;
            }
            return Ok(None);
        };
        Ok(self.is_member(member)?.then_some(pidfd))
    }

    /// Whether the process is a member of that service right now.
    pub(crate) fn is_member(&self, member: &Member) -> Result<bool, TrackerError> {
        let entry = self.kernel.process(member.key.tgid)?;
        Ok(entry.is_some_and(|entry| {
            entry.start_boottime_ns == member.key.start_boottime_ns && entry.service == member.service.0
        }))
    }

    /// Whether exactly this process is a member of any service.
    pub(crate) fn is_recorded_alive(&self, key: ProcessKey) -> Result<bool, TrackerError> {
        let entry = self.kernel.process(key.tgid)?;
        Ok(entry.is_some_and(|entry| entry.start_boottime_ns == key.start_boottime_ns))
    }

    /// Whether the kernel has no living process of this name, as far as the caller's pid namespace shows.
    fn is_gone(&self, key: ProcessKey) -> Result<bool, TrackerError> {
        let tasks = self.kernel.tasks()?;
        Ok(!tasks.iter().any(|task| {
            task.tgid == key.tgid && task.start_boottime_ns == key.start_boottime_ns && task.live_threads > 0
        }))
    }

    /// What `/proc` says of exactly this process.
    pub(crate) fn condition(&self, pid: u32, key: ProcessKey) -> Option<Condition> {
        let condition = stat::condition(pid)?;
        let matches = self.clock.matches(pid, key.start_boottime_ns);
        matches.is_ok_and(|matches| matches).then_some(condition)
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
        let matches = self
            .clock
            .matches(pid, key.start_boottime_ns)
            .map_err(|source| PidfdError::Match { pid, source })?;
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
        Duration::from_nanos(stat::boottime_ns())
    }
}
