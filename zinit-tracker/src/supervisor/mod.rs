//! The supervisor: keeps services as they are defined, and brings them down so that nothing is left.
//!
//! Uses [`tracker`](crate::tracker) and [`stop`](mod@crate::stop) only; the JSON-RPC server and the command line use it
//! through a [`Handle`]. It never ends because a service, a probe or a client misbehaves.
//!
//! Deliberately not here: sockets and the wire format, and whatever else a client sees.

mod children;
mod command;
pub mod config;
mod definition;
mod error;
mod graph;
mod handle;
pub mod init;
mod logs;
mod machine;
mod meter;
mod registry;
mod service;
mod shutdown;
mod state;
mod terminate;
mod turns;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Mutex, mpsc},
    task::JoinHandle,
};

pub use definition::{
    Definition, Definitions, KeepPattern, KillMode, Limit, LogMode, RestartLimit, RestartPolicy, RestartWhen,
};
pub use error::SupervisorError;
pub use handle::{Finished, Handle, Reloaded, ShutdownReport, Stats, Status, Usage};
pub use logs::{Capture, DEFAULT_LINES, Followed, Follower, LogError, LogLine, LogRing, MAX_BYTES, MAX_LINE, Stream};
pub use state::{State, Target};

use self::{
    children::Children,
    command::Context,
    registry::{Asked, Loaded, Registry, Requests},
    turns::Turns,
};
use crate::tracker::{Tracker, TrackerError};

/// How many requests may wait before clients do.
const REQUESTS: usize = 256;

/// How long after a registry has failed another takes over.
const AGAIN: Duration = Duration::from_secs(1);

/// What a supervisor works with.
#[derive(Clone)]
pub struct Options {
    /// Where definitions come from.
    pub definitions: Arc<dyn Definitions>,
    /// Where services' output goes.
    pub logs: Arc<LogRing>,
    /// Environment variables that every service gets, beside the supervisor's own.
    pub environment: BTreeMap<String, String>,
    /// Reap orphans that fall to this process, for PID 1 and subreapers. Then nothing else in this process may create
    /// children: their exit statuses would be taken.
    pub reap_orphans: bool,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("environment", &self.environment)
            .field("reap_orphans", &self.reap_orphans)
            .finish_non_exhaustive()
    }
}

/// A supervisor at work.
#[derive(Debug)]
pub struct Supervisor {
    handle: Handle,
    context: Arc<Context>,
    end: JoinHandle<(Finished, ShutdownReport)>,
    reaper: Option<JoinHandle<()>>,
}

impl Supervisor {
    /// Supervises and starts every service that has a definition. One whose definition is no good is reported and skipped.
    ///
    /// What an earlier supervisor of the same instance left running is stopped before the service is started anew.
    ///
    /// Raises this process's limit of open files as far as it may; services get the limit that was there before.
    ///
    /// # Errors
    ///
    /// When the books cannot be read.
    pub async fn start(tracker: Tracker, options: Options) -> Result<Self, TrackerError> {
        let context = Arc::new(Context {
            tracker,
            logs: options.logs,
            environment: options.environment,
            children: Children::default(),
            epoch: std::time::Instant::now(),
            descriptors: command::raise_descriptor_limit(),
            starts: Turns::new(),
        });
        let reaper = options
            .reap_orphans
            .then(|| tokio::spawn(reap_orphans(context.children.clone())));
        let first = Found::look(&context, &options.definitions).await?;
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let keeper = Keeper {
            context: Arc::clone(&context),
            definitions: options.definitions,
            requests: Arc::new(Mutex::new(receiver)),
            asked: Asked::default(),
        };
        Ok(Self {
            handle: Handle::new(requests),
            context,
            end: tokio::spawn(keeper.keep(first)),
            reaper,
        })
    }

    /// How clients talk to it.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits until [`Handle::shutdown`] or [`Handle::reboot`] is through, and removes the tracker's pins if nothing is
    /// tracked. Returns what is to be done now, for [`init::end`].
    ///
    /// Orphans are reaped no more.
    pub async fn finished(self) -> (Finished, ShutdownReport) {
        let end = match self.end.await {
            Ok(end) => end,
            // It catches the panics of others and does nothing itself: then the runtime ends.
            Err(_) => std::future::pending().await,
        };
        if let Some(reaper) = self.reaper {
            reaper.abort();
        }
        let left = terminate::blocking(&self.context, |context| context.tracker.leave());
        match tokio::time::timeout(terminate::PATIENCE, left).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "failed to remove the pins"),
            Err(_) => tracing::warn!("the pins are left: another program holds their lock"),
        }
        end
    }
}

async fn reap_orphans(children: Children) {
    if let Err(error) = children.reap_orphans().await {
        tracing::error!(%error, "orphans are not reaped");
    }
}

/// What there is when a registry begins.
#[derive(Debug)]
struct Found {
    /// Services of this instance that have living processes.
    occupied: BTreeSet<String>,
    services: Loaded,
}

impl Found {
    async fn look(context: &Arc<Context>, definitions: &Arc<dyn Definitions>) -> Result<Self, TrackerError> {
        let definitions = Arc::clone(definitions);
        terminate::blocking(context, move |context| {
            let tracker = &context.tracker;
            let services = tracker.services()?.into_iter();
            let own = services.filter(|info| info.live > 0 && info.instance == tracker.instance());
            Ok(Self {
                occupied: own.map(|info| info.name).collect(),
                services: definitions.load_all(),
            })
        })
        .await
    }
}

/// Sees to it that there is a registry: one that panics is followed by another, which finds everything in the books.
struct Keeper {
    context: Arc<Context>,
    definitions: Arc<dyn Definitions>,
    requests: Requests,
    asked: Asked,
}

impl Keeper {
    async fn keep(self, mut found: Found) -> (Finished, ShutdownReport) {
        loop {
            let registry = Registry::new(
                Arc::clone(&self.context),
                Arc::clone(&self.definitions),
                found.occupied,
                Arc::clone(&self.requests),
                Arc::clone(&self.asked),
            );
            match tokio::spawn(registry.run(found.services)).await {
                Ok(end) => return end,
                Err(error) => tracing::error!(%error, "the registry has failed: another takes over"),
            }
            found = self.look_again().await;
        }
    }

    async fn look_again(&self) -> Found {
        loop {
            // One that fails at once must not keep the machine busy.
            tokio::time::sleep(AGAIN).await;
            match Found::look(&self.context, &self.definitions).await {
                Ok(found) => return found,
                Err(error) => tracing::error!(%error, "failed to find out what runs"),
            }
        }
    }
}
