//! Why a request to the supervisor failed.

use std::{error::Error, io, sync::Arc};

use nix::errno::Errno;

use super::command::SpawnError;
use crate::{
    stop::{StopError, StopReport, Survivor},
    tracker::TrackerError,
};

type Source = Box<dyn Error + Send + Sync>;

/// Why a request to the supervisor failed.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// It is not supervised, or has no definition.
    #[error("service {service:?} is unknown")]
    ServiceNotFound {
        /// The service.
        service: String,
    },
    /// It is supervised already.
    #[error("service {service:?} is already monitored")]
    ServiceAlreadyMonitored {
        /// The service.
        service: String,
    },
    /// It has to be stopped first.
    #[error("service {service:?} is up: stop it first")]
    ServiceIsUp {
        /// The service.
        service: String,
    },
    /// It has no main process.
    #[error("service {service:?} is down")]
    ServiceIsDown {
        /// The service.
        service: String,
    },
    /// No such signal.
    #[error("service {service:?} cannot be sent {signal:?}: that is no signal")]
    InvalidSignal {
        /// The service.
        service: String,
        /// What was given for a signal.
        signal: String,
    },
    /// A name that cannot be a service's.
    #[error("{service:?} cannot be the name of a service: {reason}")]
    BadName {
        /// The name.
        service: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Its definition is no good.
    #[error("the definition of service {service:?} is no good")]
    Config {
        /// The service.
        service: String,
        /// Why.
        source: Source,
    },
    /// Nothing is started any more.
    #[error("the supervisor is shutting down")]
    ShuttingDown {
        /// The service that was asked for, if any.
        service: Option<String>,
    },
    /// Whoever was to answer has failed, and another has taken over; what was asked for may be done or not.
    #[error("{} has failed and begins anew (its messages say why): look at the status, and ask again", part(service.as_deref()))]
    Failed {
        /// The service that was asked for, if any.
        service: Option<String>,
    },
    /// A definition of that name is there.
    #[error("service {service:?} already has a definition")]
    ServiceAlreadyExists {
        /// The service.
        service: String,
    },
    /// The file of its definition could not be read, written or removed.
    #[error("failed to use the file of service {service:?}")]
    ServiceFile {
        /// The service.
        service: String,
        /// Why.
        source: Source,
    },
    /// Processes are left at the deadline of a stop; the report names them.
    #[error("service {:?} is not down: {}", .0.service, survivors(&.0.survivors))]
    Survivors(Box<StopReport>),
    /// It could not be stopped, or its stop not be verified.
    #[error("failed to stop service {service:?}")]
    Stop {
        /// The service.
        service: String,
        /// Why.
        source: Arc<StopError>,
    },
    /// A signal could not be sent.
    #[error("failed to signal service {service:?}")]
    Signal {
        /// The service.
        service: String,
        /// Why.
        source: crate::process::PidfdError,
    },
    /// Its processes could not be registered or listed.
    #[error("failed to track service {service:?}")]
    Tracker {
        /// The service.
        service: String,
        /// Why.
        source: Box<TrackerError>,
    },
}

/// Who was to answer.
fn part(service: Option<&str>) -> String {
    match service {
        Some(service) => format!("the supervisor's part for service {service:?}"),
        None => "a part of the supervisor".to_owned(),
    }
}

/// Who is left and why, in words.
pub(super) fn survivors(left: &[Survivor]) -> String {
    let named: Vec<_> = left
        .iter()
        .map(|survivor| format!("pid {} ({}) survived, {}", survivor.pid, survivor.comm, survivor.cause))
        .collect();
    if named.is_empty() {
        "its processes could not all be seen".to_owned()
    } else {
        named.join("; ")
    }
}

/// Whether the cause is that the machine, or a limit, is out of descriptors, processes or memory, or the books of room: others may give
/// some back.
pub(super) fn may_pass(error: &SpawnError) -> bool {
    if let SpawnError::Tracker(TrackerError::Untracked { .. }) = error {
        return true;
    }
    let number = |error: &(dyn Error + 'static)| {
        let io = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        let rustix = error
            .downcast_ref::<rustix::io::Errno>()
            .map(|errno| errno.raw_os_error());
        let nix = error.downcast_ref::<Errno>().map(|errno| *errno as i32);
        io.or(rustix).or(nix)
    };
    std::iter::successors(Some(error as &(dyn Error + 'static)), |error| (*error).source())
        .filter_map(number)
        .any(|number| {
            matches!(
                Errno::from_raw(number),
                Errno::EMFILE | Errno::ENFILE | Errno::EAGAIN | Errno::ENOMEM
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_machine_is_out_of_may_pass_and_what_is_wrong_does_not() {
        let denied = |number| {
            may_pass(&SpawnError::from(TrackerError::Command {
                program: "service".to_owned(),
                source: io::Error::from_raw_os_error(number),
            }))
        };
        for number in [libc::EMFILE, libc::ENFILE, libc::EAGAIN, libc::ENOMEM] {
            assert!(denied(number), "{number}");
        }
        for number in [libc::ENOENT, libc::EACCES, libc::ENOEXEC, libc::EPERM] {
            assert!(!denied(number), "{number}");
        }
        assert!(may_pass(&SpawnError::from(io::Error::from_raw_os_error(libc::EMFILE))));
        assert!(may_pass(&SpawnError::from(TrackerError::Untracked {
            program: "service".to_owned(),
        })));
        assert!(!may_pass(&SpawnError::NoCommand));
    }
}
