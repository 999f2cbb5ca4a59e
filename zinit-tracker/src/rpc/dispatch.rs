//! What the methods do: asks the supervisor and the ring of lines, and puts the answers into zinit's shapes.

use std::{path::PathBuf, sync::Arc};

use nix::sys::signal::Signal;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::{Mutex, mpsc, oneshot};

use super::{
    error::{INTERNAL_ERROR, RpcError, SERVICE_SURVIVORS, causes, report_value},
    message::Request,
    method::{self, Call},
    openrpc,
    shapes::{ServiceStats, ServiceStatus, states},
};
use crate::{
    http::{HttpAddress, HttpServer},
    stop::StopReport,
    supervisor::{Handle, LogRing, Reloaded, ShutdownReport, SupervisorError},
};

/// Answers requests. Clones answer alike.
#[derive(Clone, Debug)]
pub struct Dispatcher {
    supervisor: Handle,
    logs: Arc<LogRing>,
    /// Where the HTTP server finds us.
    socket: PathBuf,
    http: Arc<Mutex<Option<HttpServer>>>,
    upgrading: Option<Upgrading>,
}

/// Who is asked to let another program take the supervisor's place.
#[derive(Clone, Debug)]
struct Upgrading {
    requests: mpsc::Sender<Upgrade>,
    /// How often that has been done.
    done: u32,
}

/// A request to let another program take the supervisor's place.
#[derive(Debug)]
pub struct Upgrade {
    /// The program; `None`: what is now where this one was.
    pub binary: Option<PathBuf>,
    /// Where the answer goes before it is done: what the program calls itself, or why it does not do.
    pub answer: oneshot::Sender<std::result::Result<String, String>>,
}

/// What a request leads to.
pub(super) enum Outcome {
    /// An answer.
    Answer(Value),
    /// A subscription to be entered, whose name is the answer.
    Subscribe { filter: Option<String>, recent: bool },
    /// The end of a subscription.
    Unsubscribe(Value),
}

type Result<T> = std::result::Result<T, RpcError>;

/// Names what was being done when something failed.
fn doing<T>(action: &str, result: std::result::Result<T, SupervisorError>) -> Result<T> {
    result.map_err(|error| RpcError::of_supervisor(&error, action))
}

impl Dispatcher {
    /// Answers for a supervisor and its ring of lines; `socket` is where its clients connect.
    #[must_use]
    pub fn new(supervisor: Handle, logs: Arc<LogRing>, socket: PathBuf) -> Self {
        Self {
            supervisor,
            logs,
            socket,
            http: Arc::default(),
            upgrading: None,
        }
    }

    /// Passes on requests for an upgrade, of which there have been so many in this process.
    #[must_use]
    pub fn with_upgrades(self, requests: mpsc::Sender<Upgrade>, done: u32) -> Self {
        Self {
            upgrading: Some(Upgrading { requests, done }),
            ..self
        }
    }

    /// Where the HTTP server listens, if there is one.
    pub async fn http_address(&self) -> Option<String> {
        self.http
            .lock()
            .await
            .as_ref()
            .map(|server| server.address().to_string())
    }

    /// Starts the HTTP server that there was before an upgrade.
    pub async fn resume_http(&self, address: &str) {
        if let Err(error) = self.start_http(address).await {
            tracing::error!(address, reason = error.line(), "the HTTP server is gone");
        }
    }

    pub(super) fn logs(&self) -> &Arc<LogRing> {
        &self.logs
    }

    /// Ends the HTTP server, if there is one.
    pub(super) async fn close(&self) {
        drop(self.http.lock().await.take());
    }

    /// Does what a request asks for.
    pub(super) async fn call(&self, request: &Request) -> Result<Outcome> {
        let call = method::bind(request)?;
        let answer = match call {
            Call::SubscribeLogs { filter, recent } => return Ok(Outcome::Subscribe { filter, recent }),
            Call::UnsubscribeLogs(subscription) => return Ok(Outcome::Unsubscribe(subscription)),
            Call::Discover => json!(openrpc::document().to_string()),
            Call::CurrentLogs(service) => self.current_logs(service.as_deref()),
            Call::Shutdown => down(doing("system shutdown", self.supervisor.shutdown().await)?)?,
            Call::Reboot => down(doing("system reboot", self.supervisor.reboot().await)?)?,
            Call::Reload => reloaded(doing("reloading definitions", self.supervisor.reload().await)?),
            Call::Upgrade(binary) => self.upgrade(binary).await?,
            Call::Info => self.info(),
            Call::StartHttp(address) => self.start_http(&address).await?,
            Call::StopHttp => self.stop_http().await?,
            call => self.service(call).await?,
        };
        Ok(Outcome::Answer(answer))
    }

    /// The calls that concern services.
    async fn service(&self, call: Call) -> Result<Value> {
        let supervisor = &self.supervisor;
        let answer = match call {
            Call::List => value(&states(doing("listing services", supervisor.list().await)?)),
            Call::Status(name) => {
                let status = doing("getting status", supervisor.status(&name).await)?;
                value(&ServiceStatus::from(status))
            }
            Call::Start(name) => null(doing("starting service", supervisor.start(&name).await)?),
            Call::Stop { name, report } => stopped(&doing("stopping service", supervisor.stop(&name).await)?, report),
            Call::Restart { name, report } => {
                stopped(&doing("restarting service", supervisor.restart(&name).await)?, report)
            }
            Call::Monitor(name) => null(doing("monitoring service", supervisor.monitor(&name).await)?),
            Call::Forget(name) => null(doing("forgetting service", supervisor.forget(&name).await)?),
            Call::Kill(name, signal) => self.kill(&name, signal).await?,
            Call::Create(name, fields) => {
                doing("creating service", supervisor.create(&name, fields).await)?;
                json!(format!("service {name:?} is created"))
            }
            Call::Delete(name) => {
                doing("deleting service", supervisor.delete(&name).await)?;
                json!(format!("service {name:?} is deleted"))
            }
            Call::Get(name) => doing("getting service", supervisor.get(&name).await)?,
            Call::Stats(name) => {
                let stats = doing("collecting stats", supervisor.stats(&name).await)?;
                value(&ServiceStats::from(stats))
            }
            Call::Discover
            | Call::Shutdown
            | Call::Reboot
            | Call::Reload
            | Call::Upgrade(_)
            | Call::Info
            | Call::StartHttp(_)
            | Call::StopHttp
            | Call::CurrentLogs(_)
            | Call::SubscribeLogs { .. }
            | Call::UnsubscribeLogs(_) => Value::Null,
        };
        Ok(answer)
    }

    async fn kill(&self, name: &str, signal: Signal) -> Result<Value> {
        doing("sending signal", self.supervisor.kill(name, signal).await).map(null)
    }

    fn current_logs(&self, service: Option<&str>) -> Value {
        let lines = self.logs.snapshot(service);
        lines.iter().map(|line| Value::String(line.to_string())).collect()
    }

    async fn upgrade(&self, binary: Option<String>) -> Result<Value> {
        let failed = |message: &str| RpcError::of_kind(INTERNAL_ERROR, "upgrading", None, message, Vec::new());
        let Some(upgrading) = &self.upgrading else {
            return Err(failed("this supervisor is part of another program"));
        };
        let (answer, answered) = oneshot::channel();
        let binary = binary.map(PathBuf::from);
        let ends = |_| failed("the supervisor ends, or is being upgraded");
        upgrading
            .requests
            .try_send(Upgrade { binary, answer })
            .map_err(|error| ends(error.to_string()))?;
        match answered.await {
            Ok(Ok(version)) => Ok(json!(version)),
            Ok(Err(reason)) => Err(failed(&reason)),
            Err(error) => Err(ends(error.to_string())),
        }
    }

    fn info(&self) -> Value {
        json!({
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "upgrades": self.upgrading.as_ref().map_or(0, |upgrading| upgrading.done),
        })
    }

    async fn start_http(&self, address: &str) -> Result<Value> {
        let action = "starting http server";
        let failed = |message: &str, causes| RpcError::of_kind(INTERNAL_ERROR, action, None, message, causes);
        let address: HttpAddress = address
            .parse()
            .map_err(|error| RpcError::invalid_params(format!("{action}: {error}")))?;
        let mut running = self.http.lock().await;
        if let Some(server) = &*running {
            let message = format!("it runs already, at {}: stop it first", server.address());
            return Err(failed(&message, Vec::new()));
        }
        let server = HttpServer::start(&address, self.socket.clone())
            .await
            .map_err(|error| failed(&error.to_string(), causes(&error)))?;
        let message = format!("HTTP/RPC server started at {}", server.address());
        *running = Some(server);
        Ok(json!(message))
    }

    async fn stop_http(&self) -> Result<Value> {
        match self.http.lock().await.take() {
            Some(server) => {
                drop(server);
                Ok(Value::Null)
            }
            None => {
                let action = "stopping http server";
                let message = "no HTTP/RPC server is running";
                Err(RpcError::of_kind(INTERNAL_ERROR, action, None, message, Vec::new()))
            }
        }
    }
}

fn null((): ()) -> Value {
    Value::Null
}

fn stopped(report: &StopReport, wanted: bool) -> Value {
    if wanted { report_value(report) } else { Value::Null }
}

/// Results have no maps with keys other than text, so this does not fail.
fn value<T: Serialize>(value: &T) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}

fn reloaded(reloaded: Reloaded) -> Value {
    json!({
        "added": reloaded.added,
        "changed": reloaded.changed,
        "missing": reloaded.missing,
        "failed": reloaded.failed,
    })
}

/// A shutdown that left processes is no success, though nothing more can be done about them.
fn down(report: ShutdownReport) -> Result<Value> {
    if report.is_complete() {
        return Ok(Value::Null);
    }
    let unverified = report.unverified.iter().cloned();
    let left: Vec<_> = report
        .survivors
        .iter()
        .flat_map(|(service, survivors)| survivors.iter().map(move |survivor| (service, survivor)))
        .map(|(service, survivor)| {
            format!(
                "service {service:?}: pid {} ({}) survives: {}",
                survivor.pid, survivor.comm, survivor.cause
            )
        })
        .chain(unverified)
        .collect();
    let message = match report.survivors.is_empty() {
        true => "processes may be left",
        false => "processes are left",
    };
    Err(RpcError::of_kind(
        SERVICE_SURVIVORS,
        "system shutdown",
        None,
        message,
        left,
    ))
}
