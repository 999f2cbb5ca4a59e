//! The supervisor: keeps services as they are defined, and brings them down so that nothing is left.
//!
//! Uses [`tracker`](crate::tracker) and [`stop`](mod@crate::stop) only; the JSON-RPC server and the command line use it
//! through a [`Handle`]. It never ends because a service, a probe or a client misbehaves.
//!
//! Deliberately not here: sockets and the wire format, and whatever else a client sees.

mod answered;
mod children;
mod command;
pub mod config;
mod definition;
mod error;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod graph;
mod handle;
mod handover;
pub mod init;
mod logs;
mod machine;
mod main_process;
mod meter;
mod registry;
mod resume;
mod service;
mod shutdown;
mod state;
mod state_files;
mod terminate;
mod turns;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
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
pub use handover::{Handover, TrialError};
pub use logs::{
    Capture, DEFAULT_LINES, Followed, Follower, LogError, LogLine, LogRing, MAX_BYTES, MAX_LINE, Paused, PausedPipe,
    Stream,
};
pub use state::{State, Target};

use self::{
    children::Children,
    command::Context,
    registry::{Asked, Registry, Requests},
    resume::Found,
    state_files::StateFiles,
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
    /// Directory in which states are saved, so that a supervisor that follows one which was killed goes on with its services; it
    /// must be the same for both, and nobody else's. `None`: the next one stops what it finds, and starts it anew.
    pub state: Option<PathBuf>,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("environment", &self.environment)
            .field("reap_orphans", &self.reap_orphans)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// A supervisor at work.
#[derive(Debug)]
pub struct Supervisor {
    handle: Handle,
    context: Arc<Context>,
    asked: Asked,
    end: JoinHandle<(Finished, ShutdownReport)>,
    reaper: Option<JoinHandle<()>>,
}

impl Supervisor {
    /// Supervises and starts every service that has a definition. One whose definition is no good is reported and skipped.
    ///
    /// Services that a supervisor of the same instance was keeping when it was killed go on, if that saved their states; what it left
    /// running otherwise is stopped before the service is started anew.
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
            state: options.state.as_deref().and_then(open_state),
        });
        let reaper = options
            .reap_orphans
            .then(|| tokio::spawn(reap_orphans(context.children.clone())));
        let first = look(&context, &options.definitions).await?;
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let asked = Asked::default();
        let keeper = Keeper {
            context: Arc::clone(&context),
            definitions: options.definitions,
            requests: Arc::new(Mutex::new(receiver)),
            asked: Arc::clone(&asked),
        };
        Ok(Self {
            handle: Handle::new(requests),
            context,
            asked,
            end: tokio::spawn(keeper.keep(first)),
            reaper,
        })
    }

    /// How clients talk to it.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// What it takes to have another program take this one's place.
    #[must_use]
    pub fn handover(&self) -> Handover {
        Handover {
            context: Arc::clone(&self.context),
            asked: Arc::clone(&self.asked),
        }
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
        if let Some(state) = &self.context.state {
            state.end(end.1.is_complete());
            if tokio::time::timeout(terminate::PATIENCE, state.settled())
                .await
                .is_err()
            {
                tracing::warn!("the saved states are left: the disk does not answer");
            }
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

/// Without it everything works but the supervisor's own death.
fn open_state(directory: &Path) -> Option<StateFiles> {
    let opened = StateFiles::open(directory);
    opened
        .inspect_err(|error| {
            let reason = service::chain(error);
            tracing::error!(
                reason,
                "states are not saved: if this supervisor is killed, its services are started anew"
            );
        })
        .ok()
}

async fn reap_orphans(children: Children) {
    if let Err(error) = children.reap_orphans().await {
        tracing::error!(%error, "orphans are not reaped");
    }
}

/// Reads definitions and looks at what an earlier supervisor, or registry, has left.
async fn look(context: &Arc<Context>, definitions: &Arc<dyn Definitions>) -> Result<Found, TrackerError> {
    if let Some(state) = &context.state
        && tokio::time::timeout(terminate::PATIENCE, state.settled())
            .await
            .is_err()
    {
        tracing::warn!("the newest states are not saved: the disk does not answer");
    }
    let definitions = Arc::clone(definitions);
    terminate::blocking(context, move |context| Found::look(context, definitions.load_all())).await
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
                Arc::clone(&self.requests),
                Arc::clone(&self.asked),
            );
            match tokio::spawn(registry.run(found)).await {
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
            match look(&self.context, &self.definitions).await {
                Ok(found) => return found,
                Err(error) => tracing::error!(%error, "failed to find out what runs"),
            }
        }
    }
}
