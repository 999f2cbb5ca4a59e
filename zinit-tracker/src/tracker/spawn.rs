//! Starting a process as a member of a service.

use tokio::process::{Child, Command};
use zinit_ebpf::StateChange;

use super::{
    Tracker, TrackerError,
    service::{Service, ServiceState},
};

impl Tracker {
    /// Starts the command as a member of the service. Must be called within a tokio runtime.
    ///
    /// The kernel attributes the process while it is created: there is no window in which it could fork unseen, and it
    /// needs no help from the child. If it cannot be tracked it is killed rather than left to run unseen.
    ///
    /// Not `async` on purpose: the request is the calling thread's, and no other task may create a process on this
    /// thread in between.
    ///
    /// # Errors
    ///
    /// When the service is being stopped or not registered, the command cannot be started, or it could not be tracked.
    pub fn spawn(&self, service: &Service, command: &mut Command) -> Result<Child, TrackerError> {
        // Nobody unregisters the service in between.
        let _guard = self.kernel.shared()?;
        let before = self.info(service)?;
        if before.state != ServiceState::Up {
            if before.live > 0 {
                return Err(TrackerError::Stopping(service.name().to_owned()));
            }
            self.set_state(service.id, ServiceState::Up)?;
        }
        self.kernel.request_spawn(service.id.0)?;
        let result = command.spawn();
        let pending = self.kernel.withdraw_spawn();
        let mut child = match result {
            Ok(child) => child,
            Err(source) => {
                // A request that could not be withdrawn would take this thread's next process.
                pending?;
                return Err(TrackerError::Command {
                    program: command_name(command),
                    source,
                });
            }
        };
        let recorded = match pending {
            Ok(pending) => self.is_attributed(service, pending, before.lost, child.id()),
            Err(error) => Err(error.into()),
        };
        if let Ok(true) = recorded {
            return Ok(child);
        }
        child.start_kill()?;
        // What it may have created before it died is unknown.
        let doubt = StateChange {
            lost: 1,
            ..StateChange::NONE
        };
        self.kernel.change(service.id.0, doubt)?;
        recorded?;
        Err(TrackerError::Untracked {
            program: command_name(command),
        })
    }

    /// Whether the kernel entered the new process.
    ///
    /// A pending request means that no hook saw the creation, a loss that one saw it and could not record it.
    fn is_attributed(
        &self,
        service: &Service,
        pending: bool,
        lost_before: u64,
        pid: Option<u32>,
    ) -> Result<bool, TrackerError> {
        let lost = self.info(service)?.lost > lost_before;
        Ok((!pending && !lost) || self.is_recorded(service, pid)?)
    }

    /// Whether the process with this pid is in the books of the service, alive or dead.
    fn is_recorded(&self, service: &Service, pid: Option<u32>) -> Result<bool, TrackerError> {
        let Some(pid) = pid else {
            return Ok(false);
        };
        let alive = self.processes(service)?.iter().any(|member| member.pid == pid);
        Ok(alive || self.ended(&[service.id])?.iter().any(|ended| ended.pid == pid))
    }
}

fn command_name(command: &Command) -> String {
    command.as_std().get_program().to_string_lossy().into_owned()
}
