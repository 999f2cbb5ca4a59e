//! Where the books are kept: in the kernel, or without it in this process. Nobody else has to know.

use std::{
    path::Path,
    sync::{RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use zinit_ebpf::{Exit, ExitKey, Process, Service, ServiceName, StateChange, Stats, Stops, Task};

use super::TrackerError;
use crate::{
    fallback::{Procfs, Sight},
    kernel::{self, EventStream, EventsError, Gate, Kernel, ProgramLog, ProgramRuns},
    process::{Pidfd, ProcessKey},
};

/// How long a stop waits for the lock of the books, which others hold for milliseconds unless they are stopped themselves.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);
/// How often it tries.
const LOCK_RECHECK: Duration = Duration::from_millis(5);

/// The books of either level.
pub(super) enum Books {
    Kernel(Box<Kernel>),
    Procfs(Procfs),
}

/// Use of the books, exclusive or shared as it was asked for, until dropped.
pub(super) enum Guard<'a> {
    Kernel(kernel::Guard),
    Exclusive(#[expect(dead_code, reason = "held for what its drop does")] RwLockWriteGuard<'a, ()>),
    Shared(#[expect(dead_code, reason = "held for what its drop does")] RwLockReadGuard<'a, ()>),
}

impl Books {
    /// Waits until the holder alone may register, unregister, adopt and release.
    pub(super) fn exclusive(&self) -> Result<Guard<'_>, TrackerError> {
        Ok(match self {
            Self::Kernel(kernel) => Guard::Kernel(kernel.exclusive()?),
            Self::Procfs(procfs) => Guard::Exclusive(procfs.exclusive()),
        })
    }

    /// As [`Books::exclusive`], but does not wait.
    ///
    /// # Errors
    ///
    /// [`TrackerError::Locked`] if somebody else has use of them.
    pub(super) fn try_exclusive(&self) -> Result<Guard<'_>, TrackerError> {
        let guard = match self {
            Self::Kernel(kernel) => kernel.try_exclusive()?.map(Guard::Kernel),
            Self::Procfs(procfs) => procfs.try_exclusive().map(Guard::Exclusive),
        };
        guard.ok_or(TrackerError::Locked)
    }

    /// As [`Books::try_exclusive`]; `None`: what was to be locked is gone, so that nobody else can use it.
    pub(super) fn try_exclusive_unless_gone(&self) -> Result<Option<Guard<'_>>, TrackerError> {
        match self.try_exclusive() {
            Err(TrackerError::Pin(error)) if error.is_gone() => Ok(None),
            result => result.map(Some),
        }
    }

    /// As [`Books::exclusive`], for those who must not block their thread, nor wait for long.
    ///
    /// # Errors
    ///
    /// [`TrackerError::Locked`] when the time is over.
    pub(super) async fn exclusive_in_time(&self) -> Result<Guard<'_>, TrackerError> {
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match self.try_exclusive() {
                Err(TrackerError::Locked) if Instant::now() < deadline => {}
                result => return result,
            }
            tokio::time::sleep(LOCK_RECHECK).await;
        }
    }

    /// Waits until nobody does so; others may wait for the same.
    pub(super) fn shared(&self) -> Result<Guard<'_>, TrackerError> {
        Ok(match self {
            Self::Kernel(kernel) => Guard::Kernel(kernel.shared()?),
            Self::Procfs(procfs) => Guard::Shared(procfs.shared()),
        })
    }

    /// Ends this process's use of the books, and removes what is pinned if no other process uses it and `unused` agrees.
    /// Returns whether nothing is left.
    pub(super) fn unload_if(&self, unused: impl FnOnce(&[(u32, Service)]) -> bool) -> Result<bool, TrackerError> {
        match self {
            Self::Kernel(kernel) => Ok(kernel.unload_if(|| Ok(unused(&kernel.services()?)))?),
            Self::Procfs(procfs) => Ok(unused(&procfs.services())),
        }
    }

    /// Every member of every service.
    pub(super) fn processes(&self) -> Result<Vec<(u32, Process)>, TrackerError> {
        Ok(match self {
            Self::Kernel(kernel) => kernel.processes()?,
            Self::Procfs(procfs) => procfs.processes()?,
        })
    }

    /// The entry of a process, whatever its service.
    pub(super) fn process(&self, tgid: u32) -> Result<Option<Process>, TrackerError> {
        Ok(match self {
            Self::Kernel(kernel) => kernel.process(tgid)?,
            Self::Procfs(procfs) => procfs.process(tgid),
        })
    }

    /// Every registered service, with its members as they were last counted.
    pub(super) fn services(&self) -> Result<Vec<(u32, Service)>, TrackerError> {
        Ok(match self {
            Self::Kernel(kernel) => kernel.services()?,
            Self::Procfs(procfs) => procfs.services(),
        })
    }

    /// The service with this id, with its members as they are now.
    pub(super) fn service(&self, id: u32) -> Result<Option<Service>, TrackerError> {
        Ok(match self {
            Self::Kernel(kernel) => kernel.service(id)?,
            Self::Procfs(procfs) => procfs.service(id)?,
        })
    }

    /// Enters a new service and returns its id.
    pub(super) fn insert_service(&self, exclusive: &Guard<'_>, service: &Service) -> Result<u32, TrackerError> {
        match (self, exclusive) {
            (Self::Kernel(kernel), Guard::Kernel(guard)) => Ok(kernel.insert_service(guard, service)?),
            (Self::Procfs(procfs), _) => Ok(procfs.insert_service(service)),
            (Self::Kernel(_), _) => unreachable!("the guard is of these books"),
        }
    }

    /// Removes a service.
    pub(super) fn remove_service(&self, exclusive: &Guard<'_>, id: u32) -> Result<(), TrackerError> {
        match (self, exclusive) {
            (Self::Kernel(kernel), Guard::Kernel(guard)) => {
                kernel.remove_service(guard, id)?;
            }
            (Self::Procfs(procfs), _) => {
                procfs.remove_service(id);
            }
            (Self::Kernel(_), _) => unreachable!("the guard is of these books"),
        }
        Ok(())
    }

    /// Changes a service without touching its counters. Returns whether it exists.
    pub(super) fn change(&self, id: u32, change: StateChange) -> Result<bool, TrackerError> {
        Ok(match self {
            Self::Kernel(kernel) => kernel.change(id, change)?,
            Self::Procfs(procfs) => procfs.change(id, change)?,
        })
    }

    /// Takes exactly this process out of its service; `dead`: because it was seen dead. Returns whether it was in one, and
    /// left without an exit record.
    pub(super) fn release(&self, key: ProcessKey, dead: bool) -> Result<bool, TrackerError> {
        Ok(match self {
            Self::Kernel(kernel) => kernel.release(key, dead)?,
            Self::Procfs(procfs) => procfs.release(key, dead)?,
        })
    }

    /// Exit records, the oldest of which may be gone.
    pub(super) fn exits(&self) -> Result<Vec<(ExitKey, Exit)>, TrackerError> {
        Ok(match self {
            Self::Kernel(kernel) => kernel.exits()?,
            Self::Procfs(procfs) => procfs.exits(),
        })
    }

    /// The stops of each service; without the kernel's books they are nobody's but the caller's, who knows them.
    pub(super) fn stops(&self) -> Result<Vec<(ServiceName, Stops)>, TrackerError> {
        match self {
            Self::Kernel(kernel) => Ok(kernel.stops()?),
            Self::Procfs(_) => Ok(Vec::new()),
        }
    }

    pub(super) fn change_stops(&self, name: &ServiceName, change: impl FnOnce(&mut Stops)) -> Result<(), TrackerError> {
        match self {
            Self::Kernel(kernel) => Ok(kernel.change_stops(name, change)?),
            Self::Procfs(_) => Ok(()),
        }
    }

    pub(super) fn stats(&self) -> Result<Stats, TrackerError> {
        Ok(match self {
            Self::Kernel(kernel) => kernel.stats()?,
            Self::Procfs(procfs) => procfs.stats(),
        })
    }

    /// How often the kernel skipped each hook; there are none without it.
    pub(super) fn misses(&self) -> Result<Vec<(&'static str, u64)>, TrackerError> {
        match self {
            Self::Kernel(kernel) => Ok(kernel.misses()?),
            Self::Procfs(_) => Ok(Vec::new()),
        }
    }

    /// How often each program ran; there are none without the kernel's books.
    pub(super) fn program_runs(&self) -> Result<Vec<ProgramRuns>, TrackerError> {
        match self {
            Self::Kernel(kernel) => Ok(kernel.program_runs()?),
            Self::Procfs(_) => Ok(Vec::new()),
        }
    }

    pub(super) fn missed_creations(&self) -> Result<u64, TrackerError> {
        match self {
            Self::Kernel(kernel) => Ok(kernel.missed_creations()?),
            Self::Procfs(_) => Ok(0),
        }
    }

    /// How often the kernel skipped the hook that sees deaths.
    pub(super) fn missed_exits(&self) -> Result<u64, TrackerError> {
        match self {
            Self::Kernel(kernel) => Ok(kernel.missed_exits()?),
            Self::Procfs(_) => Ok(0),
        }
    }

    /// Hooks that are loaded but not attached.
    pub(super) fn loose_hooks(&self) -> Vec<&'static str> {
        match self {
            Self::Kernel(kernel) => kernel.loose_hooks(),
            Self::Procfs(_) => Vec::new(),
        }
    }

    /// Attaches those again. Returns which.
    pub(super) fn mend_hooks(&self, exclusive: &Guard<'_>) -> Result<Vec<&'static str>, TrackerError> {
        match (self, exclusive) {
            (Self::Kernel(kernel), Guard::Kernel(guard)) => Ok(kernel.mend_hooks(guard)?),
            (Self::Procfs(_), _) => Ok(Vec::new()),
            (Self::Kernel(_), _) => unreachable!("the guard is of these books"),
        }
    }

    /// Maps whose pins are gone or are other maps'.
    pub(super) fn replaced_pins(&self) -> Vec<&'static str> {
        match self {
            Self::Kernel(kernel) => kernel.replaced_pins(),
            Self::Procfs(_) => Vec::new(),
        }
    }

    /// Every process that the caller can see, the dead and unreaped included.
    pub(super) fn tasks(&self) -> Result<Vec<Task>, TrackerError> {
        Ok(match self {
            Self::Kernel(kernel) => kernel.tasks()?,
            Self::Procfs(procfs) => procfs.tasks()?,
        })
    }

    pub(super) fn request_adoption(&self, key: ProcessKey, service: u32) -> Result<(), TrackerError> {
        match self {
            Self::Kernel(kernel) => Ok(kernel.request_adoption(key, service)?),
            Self::Procfs(procfs) => Ok(procfs.adopt_root(key, service)?),
        }
    }

    pub(super) fn withdraw_adoptions(&self) -> Result<(), TrackerError> {
        match self {
            Self::Kernel(kernel) => Ok(kernel.withdraw_adoptions()?),
            Self::Procfs(_) => Ok(()),
        }
    }

    /// One pass over all processes that takes in descendants. Returns how many it took in.
    pub(super) fn adopt(&self) -> Result<usize, TrackerError> {
        Ok(match self {
            Self::Kernel(kernel) => kernel.adopt()?,
            Self::Procfs(procfs) => procfs.look()?,
        })
    }

    /// Closes a gate on who forks while it is killed; `None`: there is none without the kernel's books.
    pub(super) fn close_gate(&self) -> Result<Option<Gate>, TrackerError> {
        match self {
            Self::Kernel(kernel) => Ok(Some(kernel.close_gate()?)),
            Self::Procfs(_) => Ok(None),
        }
    }

    pub(super) fn events(&self) -> Result<EventStream, EventsError> {
        match self {
            Self::Kernel(kernel) => kernel.events(),
            Self::Procfs(_) => Err(EventsError::NotRecorded),
        }
    }

    pub(super) fn take_log(&self) -> Option<ProgramLog> {
        match self {
            Self::Kernel(kernel) => kernel.take_log(),
            Self::Procfs(_) => None,
        }
    }

    /// How many processes they can hold.
    pub(super) fn capacity(&self) -> u32 {
        match self {
            Self::Kernel(kernel) => kernel.max_processes(),
            Self::Procfs(_) => u32::MAX,
        }
    }

    /// The directory with the pins; `None` if there is none that others see.
    pub(super) fn pin_directory(&self) -> Option<&Path> {
        match self {
            Self::Kernel(kernel) => kernel.pin_directory(),
            Self::Procfs(_) => None,
        }
    }

    /// Whether nothing speaks against a pidfd being the member's whose pid and start were matched.
    pub(super) fn agrees(&self, key: ProcessKey, pidfd: &Pidfd) -> bool {
        match self {
            // The entry is read last, and a reaped process has none.
            Self::Kernel(_) => true,
            Self::Procfs(procfs) => procfs.agrees(key, pidfd),
        }
    }

    /// Whether the books themselves hold the member, and it lives.
    pub(super) fn vouch_for(&self, key: ProcessKey) -> bool {
        match self {
            Self::Kernel(_) => false,
            Self::Procfs(procfs) => procfs.holds(key),
        }
    }

    /// What these books see of a service and what not; `None`: everything.
    pub(super) fn sight(&self, id: u32) -> Result<Option<Sight>, TrackerError> {
        match self {
            Self::Kernel(_) => Ok(None),
            Self::Procfs(procfs) => Ok(Some(procfs.sight(id)?)),
        }
    }
}
