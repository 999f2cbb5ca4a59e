//! The gates: they keep members of services that are being killed from creating further processes.
//!
//! Attached for as long as a stop needs one, because whoever forks (or, with the second, makes a system call) pays for it.

use std::{fmt, sync::Mutex, time::Duration};

use aya::programs::{BtfTracePoint, Lsm, lsm::LsmLink, tp_btf::BtfTracePointLink};
use serde::Serialize;
use zinit_ebpf::{NO_SERVICE, PROBE_ERRNO, program};

use super::{
    books::{BooksError, Kernel, failed, lock},
    pins::PinDirectory,
    runs::ProgramRuns,
};

/// How a gate works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum GateKind {
    /// The LSM hook `task_alloc` refuses members children. Only where BPF LSM is active (5.7).
    TaskAlloc,
    /// The tracepoint `sys_enter` kills members at their next system call.
    SysEnter,
}

impl fmt::Display for GateKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TaskAlloc => "task_alloc",
            Self::SysEnter => "sys_enter",
        })
    }
}

/// A closed gate; it opens when this is dropped.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(crate) kind: GateKind,
    /// How long it took to close, the proof of its effect included.
    pub(crate) took: Duration,
    _link: Link,
}

#[derive(Debug)]
enum Link {
    TaskAlloc { _link: LsmLink },
    SysEnter { _link: BtfTracePointLink },
}

/// The programs of the gates. aya changes them on use.
pub(super) struct Gates {
    /// `None` where the kernel refused it.
    deny: Option<Mutex<Lsm>>,
    sys_enter: Mutex<BtfTracePoint>,
}

impl Gates {
    /// Opens those that are pinned.
    pub(super) fn pinned(pins: &PinDirectory) -> Result<Self, BooksError> {
        let path = pins.program(program::DENY);
        let deny = path.exists().then(|| Lsm::from_pin(path).map(Mutex::new)).transpose();
        let sys_enter = BtfTracePoint::from_pin(pins.program(program::GATE)).map(Mutex::new);
        Ok(Self {
            deny: deny.map_err(failed("open a pinned program"))?,
            sys_enter: sys_enter.map_err(failed("open a pinned program"))?,
        })
    }

    /// How often each gate ran since it was loaded.
    pub(super) fn runs(&self) -> Result<Vec<ProgramRuns>, BooksError> {
        let mut runs = vec![ProgramRuns::of(program::GATE, lock(&self.sys_enter).fd())?];
        if let Some(deny) = &self.deny {
            runs.push(ProgramRuns::of(program::DENY, lock(deny).fd())?);
        }
        Ok(runs)
    }

    fn close_task_alloc(&self) -> Result<Option<LsmLink>, BooksError> {
        let Some(deny) = &self.deny else {
            return Ok(None);
        };
        let mut deny = lock(deny);
        let id = deny.attach().map_err(failed("attach the gate at task_alloc"))?;
        deny.take_link(id)
            .map(Some)
            .map_err(failed("attach the gate at task_alloc"))
    }

    fn close_sys_enter(&self) -> Result<BtfTracePointLink, BooksError> {
        let mut gate = lock(&self.sys_enter);
        let id = gate.attach().map_err(failed("attach the gate at sys_enter"))?;
        gate.take_link(id).map_err(failed("attach the gate at sys_enter"))
    }
}

impl Kernel {
    /// Closes the gate that costs others least: at `task_alloc` if that takes effect, else at `sys_enter`.
    pub(crate) fn close_gate(&self) -> Result<Gate, BooksError> {
        let began = std::time::Instant::now();
        let link = match self.effective_task_alloc() {
            Ok(Some(link)) => Link::TaskAlloc { _link: link },
            without => {
                if let Err(error) = without {
                    tracing::debug!(%error, "no gate at task_alloc");
                }
                let link = self.gates().close_sys_enter()?;
                Link::SysEnter { _link: link }
            }
        };
        Ok(Gate {
            kind: match link {
                Link::TaskAlloc { .. } => GateKind::TaskAlloc,
                Link::SysEnter { .. } => GateKind::SysEnter,
            },
            took: began.elapsed(),
            _link: link,
        })
    }

    /// The gate at `task_alloc`, if it refuses this thread a task when asked to: where BPF LSM is not active, a program
    /// can be attached and is never called.
    fn effective_task_alloc(&self) -> Result<Option<LsmLink>, BooksError> {
        let Some(link) = self.gates().close_task_alloc()? else {
            return Ok(None);
        };
        self.request_spawn(NO_SERVICE)?;
        let refused = is_refused_a_thread();
        self.withdraw_spawn()?;
        Ok(refused.then_some(link))
    }
}

/// Any other failure to create a thread, say at a limit, shows nothing.
fn is_refused_a_thread() -> bool {
    match std::thread::Builder::new().stack_size(64 * 1024).spawn(|| {}) {
        Ok(thread) => {
            // It does nothing, so it cannot panic.
            drop(thread.join());
            false
        }
        Err(error) => error.raw_os_error() == Some(PROBE_ERRNO),
    }
}
