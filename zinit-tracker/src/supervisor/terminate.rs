//! Bringing processes down: of one service with all that its definition asks for, or of all services, come what may.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    task::JoinSet,
    time::{error::Elapsed, timeout},
};

use super::{
    command::{Context, enter},
    definition::{Definition, KeepPattern},
    error,
    service::chain,
};
use crate::{
    stop::{Evidence, StopError, StopPolicy, StopReport, Survivor, stop},
    tracker::{Member, Service, ServiceInfo, Tracker, TrackerError},
};

/// How long what is killed at the very end may take to die.
const LAST_RESORT: Duration = Duration::from_secs(5);

/// How long a stop and the end wait for the books: somebody may hold their lock and sleep.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);

/// Runs what may block where that harms nobody.
///
/// # Errors
///
/// Those of the operation; [`TrackerError::BrokenOff`] if it panics.
pub(super) async fn blocking<T, E>(
    context: &Arc<Context>,
    operation: impl FnOnce(&Context) -> Result<T, E> + Send + 'static,
) -> Result<T, E>
where
    T: Send + 'static,
    E: From<TrackerError> + Send + 'static,
{
    let context = Arc::clone(context);
    let result = tokio::task::spawn_blocking(move || operation(&context)).await;
    result.unwrap_or_else(|error| Err(TrackerError::BrokenOff(error.to_string()).into()))
}

/// Whether the service, or one nested in it, has a living process.
///
/// # Errors
///
/// When it is not registered any more.
pub(super) fn is_process_running(tracker: &Tracker, service: &Service) -> Result<bool, TrackerError> {
    Ok(tracker.live_with_nested(service)? > 0)
}

/// Whether anything speaks against the books of the service.
fn is_doubted(tracker: &Tracker, service: &Service) -> Result<bool, TrackerError> {
    let info = tracker.info(service)?;
    Ok(!Evidence::gather(tracker)?.against(tracker, &info).is_empty())
}

/// Stops the service as its definition says: releases what it keeps, asks, waits `shutdown_timeout`, kills, and verifies.
/// Not `gently`: kills at once, and keeps nothing.
pub(super) async fn kill_wait_enhanced(
    context: &Arc<Context>,
    (name, known): (String, Option<Service>),
    definition: Arc<Definition>,
    main: Option<u32>,
    gently: bool,
) -> Result<StopReport, StopError> {
    let policy = StopPolicy {
        signal: definition.stop_signal,
        target: definition.kill_mode,
        grace: if gently {
            definition.shutdown_timeout
        } else {
            Duration::ZERO
        },
        kill_timeout: definition.kill_after,
        ..StopPolicy::default()
    };
    let entering = blocking(context, move |context| {
        let service = enter(&context.tracker, &name, known)?;
        if gently {
            release_kept(&context.tracker, &service, &definition.keep, main)?;
        }
        Ok::<_, TrackerError>(service)
    });
    let service = timeout(PATIENCE, entering).await.map_err(|_| TrackerError::Locked)??;
    stop(&context.tracker, &service, &policy).await
}

/// Takes the members that match a pattern out of the service, with their descendants. The main process stays.
fn release_kept(
    tracker: &Tracker,
    service: &Service,
    patterns: &[KeepPattern],
    main: Option<u32>,
) -> Result<(), TrackerError> {
    if patterns.is_empty() {
        return Ok(());
    }
    loop {
        let kept = |member: &Member| Some(member.pid) != main && is_kept(member, patterns);
        let Some(member) = tracker.processes(service)?.into_iter().find(kept) else {
            return Ok(());
        };
        let released = tracker.release_member(member.clone())?;
        tracing::info!(
            service = service.name(),
            pid = member.pid,
            comm = member.comm,
            processes = released.len(),
            "kept"
        );
        if released.is_empty() && tracker.is_member(&member)? {
            // It cannot be taken out, and would be found for ever.
            return Err(TrackerError::NotTracked(member.pid));
        }
    }
}

fn is_kept(member: &Member, patterns: &[KeepPattern]) -> bool {
    let read = |file: &str| format!("/proc/{}/{file}", member.pid);
    let comm = std::fs::read_to_string(read("comm"));
    let comm = comm.as_deref().map_or(member.comm.as_str(), str::trim_end);
    let executable = std::fs::read_link(read("exe"));
    let executable = executable.as_ref().ok().and_then(|path| path.to_str());
    patterns.iter().any(|pattern| pattern.matches(comm, executable))
}

/// Kills whatever is left of a service, and verifies that nothing is.
///
/// Returns what speaks against that.
pub(super) async fn ensure_processes_terminated(
    context: &Context,
    service: &Service,
) -> Result<Option<String>, StopError> {
    let policy = StopPolicy {
        grace: Duration::ZERO,
        kill_timeout: LAST_RESORT,
        ..StopPolicy::default()
    };
    let report = stop(&context.tracker, service, &policy).await?;
    if !report.processes.is_empty() {
        tracing::warn!(
            service = service.name(),
            processes = report.processes.len(),
            "killed what was left at the end"
        );
    }
    Ok(doubts_of(&report))
}

/// What speaks against the books; `None`: nothing does.
pub(super) fn doubts_of(report: &StopReport) -> Option<String> {
    let doubts: Vec<_> = report.doubts.iter().map(ToString::to_string).collect();
    (!report.proven).then(|| doubts.join("; "))
}

/// How the report of a shutdown has it.
pub(super) fn unproven_service(service: &str, doubts: &str) -> String {
    format!("service {service:?} is empty; not proven: {doubts}")
}

/// What the end found.
#[derive(Debug, Default)]
pub(super) struct LastLook {
    /// Services that had something left.
    pub(super) left: Vec<String>,
    /// What is left nevertheless, by service.
    pub(super) survivors: BTreeMap<String, Vec<Survivor>>,
    /// What could not be found out, and why.
    pub(super) unverified: Vec<String>,
    /// Services that are empty, and what speaks against it.
    pub(super) unproven: Vec<String>,
}

/// Kills whatever the books hold for this instance, supervised or not, and takes what is empty out of the books.
pub(super) async fn verify_all_processes_terminated(context: &Arc<Context>) -> LastLook {
    let mut look = LastLook::default();
    let mut running = JoinSet::new();
    for service in look.services(context).await {
        match is_process_running(&context.tracker, &service) {
            Err(TrackerError::NotRegistered(_)) => continue,
            // What the books have missed is found by the sweep of a stop; one that a stop has swept already costs little again.
            Ok(false) => match is_doubted(&context.tracker, &service) {
                Ok(false) | Err(TrackerError::NotRegistered(_)) => continue,
                Ok(true) | Err(_) => {}
            },
            Ok(true) | Err(_) => look.left.push(service.name().to_owned()),
        }
        let context = Arc::clone(context);
        running.spawn(async move {
            let result = timeout(PATIENCE, ensure_processes_terminated(&context, &service)).await;
            (service.name().to_owned(), result)
        });
    }
    while let Some(ended) = running.join_next().await {
        match ended {
            Ok((name, result)) => look.note(name, result),
            Err(error) => look.doubt(&format!("a last stop broke off: {error}")),
        }
    }
    match timeout(PATIENCE, blocking(context, leave_all)).await {
        Ok(Ok(occupied)) => occupied
            .into_iter()
            .for_each(|(name, error)| look.slipped_in(name, &error)),
        Ok(Err(error)) => {
            tracing::warn!(%error, "services stay in the books");
            look.again(context);
        }
        Err(_) => {
            tracing::warn!("services stay in the books: another program holds their lock");
            look.again(context);
        }
    }
    look.left.sort();
    look
}

impl LastLook {
    /// It broke off.
    pub(super) fn failed(error: &dyn std::fmt::Display) -> Self {
        let mut look = Self::default();
        look.doubt(&format!("failed to verify that nothing is left: {error}"));
        look
    }

    /// Looks for what has slipped in where services cannot be taken out of the books, which would show it.
    fn again(&mut self, context: &Context) {
        let services = match own_services(context) {
            Ok(services) => services,
            Err(error) => return self.doubt(&format!("failed to list what is left: {}", chain(&error))),
        };
        for service in services {
            let name = service.name();
            match is_process_running(&context.tracker, &service) {
                Ok(false) | Err(TrackerError::NotRegistered(_)) => {}
                Ok(true) if self.survivors.contains_key(name) => {}
                Ok(true) => self.doubt(&format!("service {name:?} is not down: it has processes again")),
                Err(error) => self.doubt(&format!("service {name:?} is not known to be down: {}", chain(&error))),
            }
        }
    }

    /// The services of this instance that are in the books.
    async fn services(&mut self, context: &Arc<Context>) -> Vec<Service> {
        let listed = timeout(PATIENCE, blocking(context, own_services)).await;
        match listed.unwrap_or(Err(TrackerError::Locked)) {
            Ok(services) => services,
            Err(error) => {
                self.doubt(&format!("failed to list what is left: {}", chain(&error)));
                Vec::new()
            }
        }
    }

    fn note(&mut self, service: String, result: Result<Result<Option<String>, StopError>, Elapsed>) {
        match result {
            Ok(Ok(doubts)) => self
                .unproven
                .extend(doubts.map(|doubts| unproven_service(&service, &doubts))),
            Ok(Err(StopError::Survivors(report))) => {
                tracing::error!(service, "not down: {}", error::survivors(&report.survivors));
                self.survivors.insert(service, report.survivors);
            }
            Ok(Err(error)) => self.doubt(&format!(
                "service {service:?} is not known to be down: {}",
                chain(&error)
            )),
            Err(error) => self.doubt(&format!("service {service:?} is not known to be down: {error}")),
        }
    }

    /// The service had nothing left, or was stopped, and has processes again.
    fn slipped_in(&mut self, service: String, error: &TrackerError) {
        if !self.survivors.contains_key(&service) {
            self.doubt(&format!("service {service:?} is not down: {}", chain(error)));
        }
        if !self.left.contains(&service) {
            self.left.push(service);
        }
    }

    fn doubt(&mut self, doubt: &str) {
        tracing::error!("{doubt}");
        self.unverified.push(doubt.to_owned());
    }
}

/// The services of this instance that are in the books.
fn own_services(context: &Context) -> Result<Vec<Service>, TrackerError> {
    let services = context.tracker.services()?;
    let own = services
        .iter()
        .filter(|info| info.instance == context.tracker.instance());
    Ok(own.map(ServiceInfo::handle).collect())
}

/// Takes what is empty out of the books. Returns what is not.
fn leave_all(context: &Context) -> Result<Vec<(String, TrackerError)>, TrackerError> {
    let services = own_services(context)?;
    let mut occupied = Vec::new();
    for service in services {
        match context.tracker.unregister(&service) {
            Ok(()) => {}
            Err(error @ TrackerError::NotEmpty { .. }) => occupied.push((service.name().to_owned(), error)),
            Err(error) => tracing::warn!(service = service.name(), %error, "stays in the books"),
        }
    }
    Ok(occupied)
}
