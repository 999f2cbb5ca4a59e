//! Starting a process as a member of a service.

use std::io;

use tokio::process::{Child, Command};
use zinit_ebpf::StateChange;

use super::{
    Tracker, TrackerError,
    books::Books,
    service::{Service, ServiceInfo, ServiceState},
};
use crate::{
    fallback::Procfs,
    kernel::Kernel,
    process::{Execution, Launch},
};

/// The environment variable that carries [`ServiceInfo::cookie`](super::ServiceInfo::cookie).
///
/// A sign for whoever has to look for members without the kernel's books. A program may clear it, so its absence says
/// nothing.
pub const COOKIE: &str = "ZINIT_TRACKER_COOKIE";

/// Creates the process of a command. The caller of [`Tracker::spawn`] does not change threads.
pub(crate) type Fork<'a> = &'a mut dyn FnMut(&mut Command) -> io::Result<Child>;

impl Tracker {
    /// Starts the command as a member of the service. Must be called within a tokio runtime.
    ///
    /// The kernel attributes the process while it is created: there is no window in which it could fork unseen, and it
    /// needs no help from the child. Its environment gets [`COOKIE`]. If it cannot be tracked it is killed rather than left to run unseen.
    ///
    /// Not `async` on purpose: the request is the calling thread's, and no other task may create a process on this
    /// thread in between.
    ///
    /// # Errors
    ///
    /// When the service is being stopped or not registered, the command cannot be started, or it could not be tracked.
    pub fn spawn(&self, service: &Service, command: &mut Command) -> Result<Child, TrackerError> {
        self.create(service, command, &mut Command::spawn)
    }

    /// As [`Tracker::spawn`], but returns as soon as the process exists: to execute its program may take for ever, as when that
    /// is on a server that does not answer. Others wait for [`Tracker::spawn`] until then if they register or unregister.
    ///
    /// Of the command, the program, its arguments, what is added to the environment and the standard streams count; the directory is
    /// the launch's. It can be launched once.
    ///
    /// # Errors
    ///
    /// As [`Tracker::spawn`], but that the program cannot be executed is told by the [`Execution`].
    pub fn launch(
        &self,
        service: &Service,
        command: &mut Command,
        launch: &Launch,
    ) -> Result<(Child, Execution), TrackerError> {
        self.launch_by(service, command, launch, Command::spawn)
    }

    /// As [`Tracker::launch`]; `fork` calls [`Command::spawn`], if a process may be created at all.
    pub(crate) fn launch_by(
        &self,
        service: &Service,
        command: &mut Command,
        launch: &Launch,
        fork: impl FnOnce(&mut Command) -> io::Result<Child>,
    ) -> Result<(Child, Execution), TrackerError> {
        let mut fork = Some(fork);
        let mut execution = None;
        let child = self.create(service, command, &mut |command| {
            let fork = fork.take().ok_or(io::ErrorKind::Unsupported)?;
            let armed = launch.arm(command)?;
            let child = fork(command)?;
            execution = Some(armed.created(child.id().unwrap_or(0)));
            Ok(child)
        })?;
        match execution {
            Some(execution) => Ok((child, execution)),
            None => unreachable!("a child was created with it"),
        }
    }

    fn create(&self, service: &Service, command: &mut Command, fork: Fork<'_>) -> Result<Child, TrackerError> {
        // Nobody unregisters the service in between.
        let _guard = self.books.shared()?;
        let before = self.info(service)?;
        if before.state != ServiceState::Up {
            if before.live > 0 {
                return Err(TrackerError::Stopping(service.name().to_owned()));
            }
            self.set_state(service.id, ServiceState::Up)?;
        }
        command.env(COOKIE, before.cookie());
        match &self.books {
            Books::Kernel(kernel) => self.spawn_in_kernel(kernel, service, &before, command, fork),
            Books::Procfs(procfs) => self.spawn_in_procfs(procfs, service, &before, command, fork),
        }
    }

    fn spawn_in_procfs(
        &self,
        procfs: &Procfs,
        service: &Service,
        before: &ServiceInfo,
        command: &mut Command,
        fork: Fork<'_>,
    ) -> Result<Child, TrackerError> {
        let cookie = format!("{COOKIE}={}", before.cookie());
        match procfs.spawn(service.id.0, &cookie, command, fork)? {
            Ok((child, true)) => Ok(child),
            Ok((child, false)) => {
                self.kill_untracked(service, child)?;
                Err(TrackerError::Untracked {
                    program: command_name(command),
                })
            }
            Err(source) => Err(TrackerError::Command {
                program: command_name(command),
                source,
            }),
        }
    }

    fn spawn_in_kernel(
        &self,
        kernel: &Kernel,
        service: &Service,
        before: &ServiceInfo,
        command: &mut Command,
        fork: Fork<'_>,
    ) -> Result<Child, TrackerError> {
        kernel.request_spawn(service.id.0)?;
        let result = fork(command);
        let pending = kernel.withdraw_spawn();
        let child = match result {
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
        self.kill_untracked(service, child)?;
        recorded?;
        Err(TrackerError::Untracked {
            program: command_name(command),
        })
    }

    fn kill_untracked(&self, service: &Service, mut child: Child) -> Result<(), TrackerError> {
        child.start_kill()?;
        // What it may have created before it died is unknown.
        let doubt = StateChange {
            lost: 1,
            ..StateChange::NONE
        };
        self.books.change(service.id.0, doubt)?;
        Ok(())
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
