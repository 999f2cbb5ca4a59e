//! Taking in a process tree that already runs.

use std::collections::HashSet;

use serde::Serialize;
use zinit_ebpf::{StateChange, Task, service_flag, service_state};

use super::{
    Tracker, TrackerError,
    member::Member,
    service::{Service, ServiceId, ServiceState},
};
use crate::process::{ProcessKey, stat};

/// Passes after which a tree that never rests is taken as it is: what it creates from then on is tracked anyway.
const MAX_PASSES: usize = 64;
/// `kthreadd`, the parent of every kernel thread, in the initial pid namespace.
const KTHREADD: u32 = 2;

/// What an adoption took in, and how sure it is.
#[derive(Debug, Serialize)]
pub struct Adoption {
    /// The members that the service has now.
    pub members: Vec<Member>,
    /// Whether the last pass over all processes found nothing new.
    pub settled: bool,
    /// Processes that share a sign with the members but do not descend from them as far as the kernel can tell.
    ///
    /// A process that was reparented before the adoption leaves no other trace, so even without suspects an adopted
    /// service is never proven.
    pub suspects: Vec<Suspect>,
}

/// A process that shows signs of a service and is not in its books.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Suspect {
    /// Its pid.
    pub pid: u32,
    /// Command name.
    pub comm: String,
    /// What it shares with the members: `session`, `group`, `cgroup`, `parent` or `cookie`.
    pub shares: &'static str,
}

impl Suspect {
    pub(super) fn new(pid: u32, comm: &str, shares: &'static str) -> Self {
        Self {
            pid,
            comm: comm.to_owned(),
            shares,
        }
    }
}

impl Tracker {
    /// Takes in the process and its descendants. The processes keep running, and everything that they create from now
    /// on is tracked exactly.
    ///
    /// First the root is entered, so that no new child is missed; then passes over all processes take in children of
    /// members until a pass finds none.
    ///
    /// # Errors
    ///
    /// When the pid is 0, 1, the caller's, an ancestor's of the caller or a kernel thread's, belongs to a service, or
    /// does not exist.
    pub fn adopt(&self, service: &Service, pid: u32) -> Result<Adoption, TrackerError> {
        let _guard = self.books.exclusive()?;
        let root = self.adoptable(pid)?;
        let info = self.info(service)?;
        if info.state != ServiceState::Up && info.live > 0 {
            return Err(TrackerError::Stopping(service.name().to_owned()));
        }
        let begun = self.begin_adoption(service, root);
        let settled = begun.and_then(|()| self.adopt_passes());
        self.end_adoption(service)?;
        let settled = settled?;
        let members = self.processes(service)?;
        if members.is_empty() {
            return Err(TrackerError::NoSuchProcess(pid));
        }
        let suspects = suspects(&members);
        Ok(Adoption {
            members,
            settled,
            suspects,
        })
    }

    fn begin_adoption(&self, service: &Service, root: ProcessKey) -> Result<(), TrackerError> {
        // Those of an adopter that died.
        self.books.withdraw_adoptions()?;
        let begin = StateChange {
            state: service_state::UP.into(),
            set_flags: service_flag::ADOPTED.into(),
            adopting: 1,
            ..StateChange::NONE
        };
        self.books.change(service.id.0, begin)?;
        self.books.request_adoption(root, service.id.0)
    }

    fn end_adoption(&self, service: &Service) -> Result<(), TrackerError> {
        self.books.withdraw_adoptions()?;
        let end = StateChange {
            adopting: 0,
            ..StateChange::NONE
        };
        self.books.change(service.id.0, end)?;
        Ok(())
    }

    /// Repeats the pass until it finds nothing. Returns whether it did.
    fn adopt_passes(&self) -> Result<bool, TrackerError> {
        for _ in 0..MAX_PASSES {
            if self.books.adopt()? == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The unique name of the process with this pid, if a service may have it.
    fn adoptable(&self, pid: u32) -> Result<ProcessKey, TrackerError> {
        let refused = |reason| TrackerError::Refused { pid, reason };
        let tasks = self.books.tasks()?;
        match pid {
            0 => return Err(refused("it names no process")),
            1 => return Err(refused("it is the init process of this pid namespace")),
            _ => {}
        }
        let task = tasks
            .iter()
            .find(|task| task.pid == pid && task.live_threads > 0)
            .ok_or(TrackerError::NoSuchProcess(pid))?;
        if task.tgid == self.here.key.tgid {
            return Err(refused("it is this process"));
        }
        if self.ancestors(&tasks).any(|tgid| tgid == task.tgid) {
            return Err(refused("it is an ancestor of this process"));
        }
        let initial_namespace = task.pid_namespace_level == 0;
        if initial_namespace && (task.tgid == KTHREADD || task.parent_tgid == KTHREADD) {
            return Err(refused("it is a kernel thread"));
        }
        if let Some(entry) = self.books.process(task.tgid)?
            && entry.start_boottime_ns == task.start_boottime_ns
        {
            return Err(TrackerError::AlreadyTracked {
                pid,
                service: self.name_of(ServiceId(entry.service))?,
            });
        }
        Ok(ProcessKey {
            tgid: task.tgid,
            start_boottime_ns: task.start_boottime_ns,
        })
    }

    /// The caller's parent, its parent, and so on, as far as the caller's pid namespace shows them.
    pub(super) fn ancestors<'a>(&self, tasks: &'a [Task]) -> impl Iterator<Item = u32> + 'a {
        let parent = |tgid: u32| {
            tasks
                .iter()
                .find(|task| task.tgid == tgid)
                .map(|task| task.parent_tgid)
                .filter(|parent| *parent != 0)
        };
        std::iter::successors(parent(self.here.key.tgid), move |tgid| parent(*tgid))
    }

    fn name_of(&self, id: ServiceId) -> Result<String, TrackerError> {
        let services = self.services()?;
        let name = services.into_iter().find(|info| info.id == id).map(|info| info.name);
        Ok(name.unwrap_or_else(|| id.to_string()))
    }
}

/// Living processes outside the members that are in a session or group that a member leads.
fn suspects(members: &[Member]) -> Vec<Suspect> {
    let pids: HashSet<_> = members.iter().map(|member| member.pid).collect();
    stat::all()
        .into_iter()
        .filter(|other| !pids.contains(&other.pid))
        .filter_map(|other| {
            let shares = if pids.contains(&other.session) {
                "session"
            } else if pids.contains(&other.group) {
                "group"
            } else {
                return None;
            };
            Some(Suspect::new(other.pid, &other.comm, shares))
        })
        .collect()
}
