//! The way down: every service in reverse order of dependencies, then whatever is left.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::timeout,
};

use super::{
    SupervisorError,
    command::Context,
    graph::StopOrder,
    handle::ShutdownReport,
    service::Message,
    terminate::{LastLook, PATIENCE, blocking, doubts_of, unproven_service, verify_all_processes_terminated},
};
use crate::tracker::TrackerError;

/// How much longer than its `shutdown_timeout` a service is waited for.
const MARGIN: Duration = Duration::from_secs(2);

/// A service to be stopped.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) mailbox: mpsc::UnboundedSender<Message>,
    pub(super) shutdown_timeout: Duration,
}

/// Stops all services and verifies that nothing is left, of them or of any other that this instance ever started.
pub(super) async fn shutdown(
    context: Arc<Context>,
    order: StopOrder,
    members: HashMap<String, Member>,
) -> ShutdownReport {
    let mut report = kill_process_tree(order, members).await;
    no_more_starts(&context).await;
    let look = verify_all_processes_terminated(&context).await;
    report.survivors = look.survivors;
    report.unverified = look.unverified;
    for unproven in look.unproven {
        if !report.unproven.contains(&unproven) {
            report.unproven.push(unproven);
        }
    }
    for service in look.left {
        if !report.overdue.contains(&service) {
            report.overdue.push(service);
        }
    }
    report
}

/// Sees to it that the last look misses nobody: a start that has waited for a lock until now is too late.
async fn no_more_starts(context: &Arc<Context>) {
    // First, and here: all threads for what blocks may be taken.
    context.children.refuse();
    let closing = blocking(context, |context| {
        context.children.close();
        Ok::<_, TrackerError>(())
    });
    match timeout(PATIENCE, closing).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%error, "processes may still be created"),
        // It is a member already, since it was created.
        Err(_) => tracing::warn!("a process that is being created does not get to its program"),
    }
}

/// The way down when the other one broke off: kills whatever the books hold of these services and others.
pub(super) async fn at_once(context: Arc<Context>, services: Vec<String>) -> ShutdownReport {
    no_more_starts(&context).await;
    let looked = tokio::spawn(async move { verify_all_processes_terminated(&context).await }).await;
    let look = looked.unwrap_or_else(|error| LastLook::failed(&error));
    ShutdownReport {
        stopped: Vec::new(),
        overdue: services,
        survivors: look.survivors,
        unverified: look.unverified,
        unproven: look.unproven,
    }
}

/// Stops services over the graph of dependencies, dependants first and independent ones at the same time.
async fn kill_process_tree(mut order: StopOrder, mut members: HashMap<String, Member>) -> ShutdownReport {
    let mut report = ShutdownReport::default();
    let mut running = JoinSet::new();
    let mut next = order.first();
    loop {
        for name in next.drain(..) {
            if let Some(member) = members.remove(&name) {
                running.spawn(async move { (kill_in_time(&name, member).await, name) });
            }
        }
        match running.join_next().await {
            None => return report,
            Some(Ok((outcome, name))) => {
                next = order.down(&name);
                match outcome {
                    Outcome::Down { unproven } => {
                        report
                            .unproven
                            .extend(unproven.map(|doubts| unproven_service(&name, &doubts)));
                        report.stopped.push(name);
                    }
                    Outcome::Overdue => report.overdue.push(name),
                    Outcome::Forgotten => {}
                }
            }
            Some(Err(error)) => tracing::error!(%error, "failed to wait for a service"),
        }
    }
}

/// What became of a service that was to be stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Down {
        /// What speaks against it.
        unproven: Option<String>,
    },
    Overdue,
    /// A client dropped it before its turn, for which it was down.
    Forgotten,
}

async fn kill_in_time(name: &str, member: Member) -> Outcome {
    let (reply, answer) = oneshot::channel();
    if member.mailbox.send(Message::Stop(reply)).is_err() {
        return Outcome::Overdue;
    }
    let patience = member.shutdown_timeout.saturating_add(MARGIN);
    match timeout(patience, answer).await {
        Ok(Ok(Ok(report))) => Outcome::Down {
            unproven: doubts_of(&report),
        },
        Ok(Ok(Err(SupervisorError::ServiceNotFound { .. }))) => Outcome::Forgotten,
        Ok(Ok(Err(error @ SupervisorError::Survivors(_)))) => {
            tracing::error!(service = name, %error, "not down");
            Outcome::Overdue
        }
        Ok(Ok(Err(error))) => {
            tracing::error!(service = name, %error, "not known to be down");
            Outcome::Overdue
        }
        Ok(Err(_)) => Outcome::Overdue,
        Err(_) => {
            tracing::error!(service = name, ?patience, "not down in time: going on without it");
            Outcome::Overdue
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_service_that_was_forgotten_meanwhile_is_not_overdue() {
        let (mailbox, mut messages) = mpsc::unbounded_channel();
        let member = Member {
            mailbox,
            shutdown_timeout: Duration::from_secs(60),
        };
        let (outcome, ()) = tokio::join!(kill_in_time("web", member), async {
            if let Some(Message::Stop(reply)) = messages.recv().await {
                let service = "web".to_owned();
                assert!(reply.send(Err(SupervisorError::ServiceNotFound { service })).is_ok());
            }
        });
        assert_eq!(outcome, Outcome::Forgotten);
    }
}
