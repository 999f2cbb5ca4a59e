//! How clients talk to the supervisor.

use std::collections::BTreeMap;

use nix::sys::signal::Signal;
use tokio::sync::{mpsc, oneshot};

use super::{
    SupervisorError,
    answered::answered,
    state::{State, Target},
};
use crate::{
    stop::{StopReport, Survivor},
    tracker::Tracking,
};

/// What a client sees of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Its main process; 0: none.
    pub pid: u32,
    /// What it is.
    pub state: State,
    /// What it is wanted to be.
    pub target: Target,
    /// The services that it depends on, and what they are; [`State::Unknown`] if they are not supervised.
    pub after: BTreeMap<String, State>,
    /// How well its descendants are known.
    pub tracking: Tracking,
    /// Why not exactly; `None`: exactly.
    pub fallback_reason: Option<String>,
}

/// What a service uses.
#[derive(Clone, Debug, PartialEq)]
pub struct Stats {
    /// Its name.
    pub name: String,
    /// Its main process.
    pub pid: u32,
    /// Resident memory of the main process, in bytes.
    pub memory_usage: u64,
    /// Processor time of the main process since it was last asked for, or since it started, in percent of one processor.
    pub cpu_usage: f64,
    /// Every other process of the service, however it is related to the main process.
    pub children: Vec<Usage>,
}

/// What a process uses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usage {
    /// Its pid.
    pub pid: u32,
    /// Resident memory in bytes.
    pub memory_usage: u64,
    /// As [`Stats::cpu_usage`].
    pub cpu_usage: f64,
}

/// What a reload found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reloaded {
    /// Services that were not supervised, and are now.
    pub added: Vec<String>,
    /// Services whose definition is another now; it holds from their next start on.
    pub changed: Vec<String>,
    /// Supervised services that have no definition any more; they stay as they are.
    pub missing: Vec<String>,
    /// Definitions that are no good, and why; services that had a good one keep it.
    pub failed: BTreeMap<String, String>,
}

/// How a shutdown went.
#[derive(Clone, Debug, Default)]
pub struct ShutdownReport {
    /// The services that were stopped, in the order in which they were down.
    pub stopped: Vec<String>,
    /// The services that the shutdown gave up on after their time, and had to kill in the end.
    pub overdue: Vec<String>,
    /// Processes that are left in spite of everything, by service.
    pub survivors: BTreeMap<String, Vec<Survivor>>,
    /// What could not be verified, and why; empty: nothing else is left.
    pub unverified: Vec<String>,
    /// Services that are empty, while something speaks against the books, and what; at level `procfs`, all that no cgroup vouches
    /// for.
    pub unproven: Vec<String>,
}

impl ShutdownReport {
    /// Whether no process is known to be left, and every service was looked at. It is proven if nothing is `unproven`, too.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.survivors.is_empty() && self.unverified.is_empty()
    }
}

/// What a supervisor ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// The machine is to be powered off.
    PowerOff,
    /// The machine is to be restarted.
    Reboot,
}

/// Talks to a supervisor. Clones talk to the same one. Every method fails with [`SupervisorError::ShuttingDown`] once the
/// supervisor has ended, and with [`SupervisorError::Failed`] if whoever was to answer panicked.
#[derive(Clone, Debug)]
pub struct Handle {
    requests: mpsc::Sender<Request>,
}

/// Where the answer to a request goes.
pub(super) type Reply<T> = oneshot::Sender<Result<T, SupervisorError>>;

/// A request and where its answer goes.
#[derive(Debug)]
pub(super) enum Request {
    List(Reply<BTreeMap<String, State>>),
    Status(String, Reply<Status>),
    Start(String, Reply<()>),
    Stop(String, Reply<StopReport>),
    Restart(String, Reply<StopReport>),
    Monitor(String, Reply<()>),
    Forget(String, Reply<()>),
    Kill(String, Signal, Reply<()>),
    Create(String, serde_json::Value, Reply<()>),
    Delete(String, Reply<()>),
    Get(String, Reply<serde_json::Value>),
    Stats(String, Reply<Stats>),
    Reload(Reply<Reloaded>),
    Finish(Finished, Reply<ShutdownReport>),
}

impl Handle {
    pub(super) fn new(requests: mpsc::Sender<Request>) -> Self {
        Self { requests }
    }

    async fn ask<T>(
        &self,
        service: Option<&str>,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, SupervisorError> {
        let over = || SupervisorError::ShuttingDown {
            service: service.map(str::to_owned),
        };
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.map_err(|_| over())?;
        // It closes its requests before it ends those who answer.
        let answer = answered(answer, &self.requests).await;
        answer.ok_or_else(|| match self.requests.is_closed() {
            true => over(),
            false => SupervisorError::Failed {
                service: service.map(str::to_owned),
            },
        })?
    }

    async fn ask_about<T>(
        &self,
        service: &str,
        request: impl FnOnce(String, Reply<T>) -> Request,
    ) -> Result<T, SupervisorError> {
        self.ask(Some(service), |reply| request(service.to_owned(), reply))
            .await
    }

    /// Every supervised service and what it is.
    ///
    /// # Errors
    ///
    /// See [`Handle`].
    pub async fn list(&self) -> Result<BTreeMap<String, State>, SupervisorError> {
        self.ask(None, Request::List).await
    }

    /// What a service is.
    ///
    /// # Errors
    ///
    /// [`SupervisorError::ServiceNotFound`].
    pub async fn status(&self, service: &str) -> Result<Status, SupervisorError> {
        self.ask_about(service, Request::Status).await
    }

    /// Wants a service up, and returns before it is. No effect if it is up; a oneshot that has ended, and a service that
    /// has failed, run again.
    ///
    /// # Errors
    ///
    /// [`SupervisorError::ServiceNotFound`], [`SupervisorError::ShuttingDown`].
    pub async fn start(&self, service: &str) -> Result<(), SupervisorError> {
        self.ask_about(service, Request::Start).await
    }

    /// Wants a service down, and returns when that is verified. No error if it is down already.
    ///
    /// # Errors
    ///
    /// [`SupervisorError::ServiceNotFound`], [`SupervisorError::Survivors`], [`SupervisorError::Stop`].
    pub async fn stop(&self, service: &str) -> Result<StopReport, SupervisorError> {
        self.ask_about(service, Request::Stop).await
    }

    /// Stops a service, and wants it up once it is down; returns when it is down, with how that went.
    ///
    /// # Errors
    ///
    /// As [`Handle::stop`]; with survivors, it is started as soon as they are gone. [`SupervisorError::ShuttingDown`].
    pub async fn restart(&self, service: &str) -> Result<StopReport, SupervisorError> {
        self.ask_about(service, Request::Restart).await
    }

    /// Supervises a service that has a definition, and wants it up.
    ///
    /// # Errors
    ///
    /// [`SupervisorError::ServiceAlreadyMonitored`], those of [`Definitions::load`](super::Definitions::load),
    /// [`SupervisorError::ShuttingDown`].
    pub async fn monitor(&self, service: &str) -> Result<(), SupervisorError> {
        self.ask_about(service, Request::Monitor).await
    }

    /// Drops a service that is down from supervision.
    ///
    /// # Errors
    ///
    /// [`SupervisorError::ServiceNotFound`], [`SupervisorError::ServiceIsUp`].
    pub async fn forget(&self, service: &str) -> Result<(), SupervisorError> {
        self.ask_about(service, Request::Forget).await
    }

    /// Sends one signal to the main process of a service.
    ///
    /// # Errors
    ///
    /// [`SupervisorError::ServiceNotFound`], [`SupervisorError::ServiceIsDown`], [`SupervisorError::Signal`].
    pub async fn kill(&self, service: &str, signal: Signal) -> Result<(), SupervisorError> {
        self.ask_about(service, |name, reply| Request::Kill(name, signal, reply))
            .await
    }

    /// Writes the definition of a service, which is not supervised for that.
    ///
    /// # Errors
    ///
    /// Those of [`Definitions::create`](super::Definitions::create).
    pub async fn create(&self, service: &str, file: serde_json::Value) -> Result<(), SupervisorError> {
        self.ask_about(service, |name, reply| Request::Create(name, file, reply))
            .await
    }

    /// Removes the definition of a service, which stays supervised if it is.
    ///
    /// # Errors
    ///
    /// Those of [`Definitions::delete`](super::Definitions::delete).
    pub async fn delete(&self, service: &str) -> Result<(), SupervisorError> {
        self.ask_about(service, Request::Delete).await
    }

    /// The fields of a definition's file.
    ///
    /// # Errors
    ///
    /// Those of [`Definitions::get`](super::Definitions::get).
    pub async fn get(&self, service: &str) -> Result<serde_json::Value, SupervisorError> {
        self.ask_about(service, Request::Get).await
    }

    /// What a service uses.
    ///
    /// # Errors
    ///
    /// [`SupervisorError::ServiceNotFound`], [`SupervisorError::ServiceIsDown`], [`SupervisorError::Tracker`].
    pub async fn stats(&self, service: &str) -> Result<Stats, SupervisorError> {
        self.ask_about(service, Request::Stats).await
    }

    /// Reads all definitions again: supervises new ones, and takes over changed ones for the next start.
    ///
    /// # Errors
    ///
    /// [`SupervisorError::ShuttingDown`].
    pub async fn reload(&self) -> Result<Reloaded, SupervisorError> {
        self.ask(None, Request::Reload).await
    }

    /// Stops everything, to power off. Returns when nothing is left, or nothing more can be done about it.
    ///
    /// # Errors
    ///
    /// See [`Handle`].
    pub async fn shutdown(&self) -> Result<ShutdownReport, SupervisorError> {
        self.ask(None, |reply| Request::Finish(Finished::PowerOff, reply)).await
    }

    /// Stops everything, to restart the machine. Otherwise as [`Handle::shutdown`]; of the two, the first call counts.
    ///
    /// # Errors
    ///
    /// See [`Handle`].
    pub async fn reboot(&self) -> Result<ShutdownReport, SupervisorError> {
        self.ask(None, |reply| Request::Finish(Finished::Reboot, reply)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_gets_no_answer_is_told_whether_the_supervisor_has_ended_or_failed() {
        let (sender, mut requests) = mpsc::channel(1);
        let handle = Handle::new(sender);
        let (asked, ()) = tokio::join!(handle.stop("web"), async { drop(requests.recv().await) });
        let error = asked.unwrap_err();
        assert!(matches!(&error, SupervisorError::Failed { .. }), "{error}");
        assert!(error.to_string().contains("\"web\""), "{error}");
        let (asked, ()) = tokio::join!(handle.list(), async {
            let request = requests.recv().await;
            requests.close();
            drop(request);
        });
        assert!(matches!(asked, Err(SupervisorError::ShuttingDown { service: None })));
        assert!(matches!(
            handle.start("web").await,
            Err(SupervisorError::ShuttingDown { .. })
        ));
    }
}
