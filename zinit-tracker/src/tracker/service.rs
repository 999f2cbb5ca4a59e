//! Registering services and looking them up.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};
use zinit_ebpf::{INSTANCE_LEN, NAME_LEN, Service as Record, StateChange, service_flag, service_state};

use super::{Tracker, TrackerError, books::Guard};
use crate::process::ProcessKey;

/// A service's number: unique between two loads of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ServiceId(pub(crate) u32);

impl ServiceId {
    /// As the records have it.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A registered service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub(crate) id: ServiceId,
    name: String,
}

impl Service {
    /// Its number.
    #[must_use]
    pub fn id(&self) -> ServiceId {
        self.id
    }

    /// Its name within its instance.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// What a service's members may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ServiceState {
    /// Live and fork.
    Up,
    /// A stop is under way, within its grace period.
    Stopping,
    /// A member that forks is killed.
    Killing,
}

impl ServiceState {
    /// As the kernel's records have it.
    #[must_use]
    pub fn of_record(state: u32) -> Self {
        match state {
            service_state::UP => Self::Up,
            service_state::STOPPING => Self::Stopping,
            _ => Self::Killing,
        }
    }

    /// Its name in listings.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Stopping => "stopping",
            Self::Killing => "killing",
        }
    }
}

/// The kernel's record of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ServiceInfo {
    /// Its number.
    pub id: ServiceId,
    /// Who manages it.
    pub instance: String,
    /// Its name within the instance.
    pub name: String,
    /// What its members may do.
    pub state: ServiceState,
    /// Members now.
    pub live: u64,
    /// Members that ever joined.
    pub forks: u64,
    /// Members that died.
    pub exits: u64,
    /// Most members at a time.
    pub peak: u64,
    /// Failed operations of the books that concern it.
    pub lost: u64,
    /// The first process spawned or adopted.
    pub main: Option<ProcessKey>,
    /// The process that registered it.
    pub registrant: ProcessKey,
    /// The service of which its registrant is a member.
    pub parent: Option<ServiceId>,
    /// Whether members were taken in that ran before tracking.
    pub adopted: bool,
    /// Whether members were taken out of it alive.
    pub released: bool,
    /// Whether hooks were found detached while it was registered.
    pub unwatched: bool,
    /// Time since boot at which it was registered.
    #[serde(rename = "registered_boottime_ns", serialize_with = "crate::units::nanoseconds")]
    pub registered: Duration,
    #[serde(skip)]
    pub(crate) missed_before: u64,
    #[serde(skip)]
    pub(crate) pid_namespace: u32,
}

impl ServiceInfo {
    /// What an entry of the map `services` says.
    #[must_use]
    pub fn new(id: u32, record: &Record) -> Self {
        Self {
            id: ServiceId(id),
            instance: text(&record.instance),
            name: text(&record.name),
            state: ServiceState::of_record(record.state),
            live: record.live,
            forks: record.forks,
            exits: record.exits,
            peak: record.peak,
            lost: record.lost,
            main: (record.root_tgid != 0).then_some(ProcessKey {
                tgid: record.root_tgid,
                start_boottime_ns: record.root_start_boottime_ns,
            }),
            registrant: ProcessKey {
                tgid: record.registrant_tgid,
                start_boottime_ns: record.registrant_start_boottime_ns,
            },
            parent: (record.parent != 0).then_some(ServiceId(record.parent)),
            adopted: record.flags & service_flag::ADOPTED != 0,
            released: record.flags & service_flag::RELEASED != 0,
            unwatched: record.flags & service_flag::UNWATCHED != 0,
            registered: Duration::from_nanos(record.registered_boottime_ns),
            missed_before: record.missed_before,
            pid_namespace: record.pid_namespace,
        }
    }

    /// What processes that the tracker starts for this service carry in their environment, as
    /// [`COOKIE`](super::COOKIE): unique until the next boot.
    #[must_use]
    pub fn cookie(&self) -> String {
        format!("{}/{}/{}", self.instance, self.name, self.registered.as_nanos())
    }

    /// The handle with which the service is worked on.
    #[must_use]
    pub fn handle(&self) -> Service {
        Service {
            id: self.id,
            name: self.name.clone(),
        }
    }
}

/// The text in an array that is padded with zeros.
pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

pub(super) fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    bytes
}

fn checked(name: &str, longest: usize) -> Result<&str, TrackerError> {
    let reason = if name.is_empty() {
        "it is empty"
    } else if name.len() > longest {
        "it is too long (64 bytes for a service, 32 for an instance)"
    } else if name.contains(|c: char| c.is_control() || matches!(c, '/' | '\\')) {
        "it has a slash, a backslash or a control character"
    } else {
        return Ok(name);
    };
    Err(TrackerError::BadName {
        name: name.to_owned(),
        reason,
    })
}

pub(super) fn checked_instance(name: &str) -> Result<&str, TrackerError> {
    checked(name, INSTANCE_LEN)
}

impl Tracker {
    /// Registers a service without members.
    ///
    /// If the caller is itself a member of a service, the new one is nested in that: stopping the outer one stops it.
    ///
    /// # Errors
    ///
    /// When the name is no name or in use within this instance, or too many services are registered.
    pub fn register(&self, name: &str) -> Result<Service, TrackerError> {
        checked(name, NAME_LEN)?;
        let exclusive = self.books.exclusive()?;
        let taken = |info: &ServiceInfo| info.instance == self.instance && info.name == name;
        if self.services()?.iter().any(taken) {
            return Err(TrackerError::NameInUse(name.to_owned()));
        }
        let me = self.books.process(self.here.key.tgid)?;
        let parent = me.filter(|entry| entry.start_boottime_ns == self.here.key.start_boottime_ns);
        let record = Record {
            live: 0,
            forks: 0,
            exits: 0,
            peak: 0,
            lost: 0,
            missed_before: self.books.missed_creations()?,
            registered_boottime_ns: u64::try_from(Self::now().as_nanos()).unwrap_or(u64::MAX),
            registrant_start_boottime_ns: self.here.key.start_boottime_ns,
            root_start_boottime_ns: 0,
            root_tgid: 0,
            registrant_tgid: self.here.key.tgid,
            state: service_state::UP,
            parent: parent.map_or(0, |entry| entry.service),
            flags: 0,
            adopting_boottime_ns: 0,
            pid_namespace: self.here.pid_namespace,
            pid_namespace_level: self.here.level,
            _pad: 0,
            instance: padded(&self.instance),
            name: padded(name),
        };
        let id = self.books.insert_service(&exclusive, &record)?;
        Ok(Service {
            id: ServiceId(id),
            name: name.to_owned(),
        })
    }

    /// Forgets a service that has no members. One that is not registered any more is no error.
    ///
    /// What was held against it is forgotten with it. If its [`ServiceInfo::lost`] is not zero and it was not stopped since, a process
    /// may live that the books have missed, which only [`stop`](crate::stop::stop) looks for: stop it first.
    ///
    /// # Errors
    ///
    /// When it has members.
    pub fn unregister(&self, service: &Service) -> Result<(), TrackerError> {
        let exclusive = self.books.exclusive()?;
        self.unregister_id(service.id, &exclusive)
    }

    /// As [`Tracker::unregister`], without blocking the thread.
    ///
    /// # Errors
    ///
    /// Also [`TrackerError::Locked`], after a second.
    pub(crate) async fn unregister_in_time(&self, id: ServiceId) -> Result<(), TrackerError> {
        let exclusive = self.books.exclusive_in_time().await?;
        self.unregister_id(id, &exclusive)
    }

    fn unregister_id(&self, id: ServiceId, exclusive: &Guard<'_>) -> Result<(), TrackerError> {
        match self.info_of(id)? {
            Some(info) if self.nested_live(&info)? > 0 => Err(TrackerError::NotEmpty {
                name: info.name,
                live: info.live,
            }),
            Some(info) => {
                self.inherit_doubts(&info)?;
                self.books.remove_service(exclusive, id.0)?;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// How many members the service and those nested in it have.
    ///
    /// # Errors
    ///
    /// When it is not registered any more.
    pub(crate) fn live_with_nested(&self, service: &Service) -> Result<u64, TrackerError> {
        self.nested_live(&self.info(service)?)
    }

    fn nested_live(&self, info: &ServiceInfo) -> Result<u64, TrackerError> {
        let mut live = 0;
        for id in self.nested(info.id)? {
            live += self.info_of(id)?.map_or(0, |other| other.live);
        }
        Ok(live)
    }

    /// What a nested service's books cannot prove, those of the outer one cannot either.
    fn inherit_doubts(&self, nested: &ServiceInfo) -> Result<(), TrackerError> {
        let Some(parent) = nested.parent else {
            return Ok(());
        };
        let flags = [
            (nested.adopted, service_flag::ADOPTED),
            (nested.released, service_flag::RELEASED),
            (nested.unwatched, service_flag::UNWATCHED),
        ];
        let change = StateChange {
            set_flags: flags
                .iter()
                .filter(|(set, _)| *set)
                .map(|(_, flag)| u64::from(*flag))
                .sum(),
            lost: nested.lost,
            ..StateChange::NONE
        };
        self.books.change(parent.0, change)?;
        Ok(())
    }

    /// Whether the service is empty and the process that registered it is dead: nobody will come back for it.
    ///
    /// # Errors
    ///
    /// When the processes cannot be listed.
    pub fn is_abandoned(&self, info: &ServiceInfo) -> Result<bool, TrackerError> {
        if info.live > 0 {
            return Ok(false);
        }
        let tasks = self.books.tasks()?;
        let alive = tasks.iter().any(|task| {
            task.tgid == info.registrant.tgid
                && task.start_boottime_ns == info.registrant.start_boottime_ns
                && task.live_threads > 0
        });
        Ok(!alive)
    }

    /// Every registered service of every instance, oldest first. At level `procfs` with the members that were last seen.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn services(&self) -> Result<Vec<ServiceInfo>, TrackerError> {
        let records = self.books.services()?;
        let mut services: Vec<_> = records
            .iter()
            .map(|(id, record)| ServiceInfo::new(*id, record))
            .collect();
        services.sort_by_key(|service| service.id);
        Ok(services)
    }

    /// The kernel's record of a service.
    ///
    /// # Errors
    ///
    /// When it is not registered any more.
    pub fn info(&self, service: &Service) -> Result<ServiceInfo, TrackerError> {
        self.info_of(service.id)?
            .ok_or_else(|| TrackerError::NotRegistered(service.name.clone()))
    }

    pub(crate) fn info_of(&self, id: ServiceId) -> Result<Option<ServiceInfo>, TrackerError> {
        Ok(self.books.service(id.0)?.map(|record| ServiceInfo::new(id.0, &record)))
    }

    /// How many members the service has: the kernel's counter, which is 0 only when there is none.
    ///
    /// # Errors
    ///
    /// When it is not registered any more.
    pub fn live(&self, service: &Service) -> Result<u64, TrackerError> {
        self.info(service).map(|info| info.live)
    }

    /// Finds a service by `NAME`, preferring this tracker's instance, or by `INSTANCE/NAME`.
    ///
    /// # Errors
    ///
    /// When there is none, or several other instances have one of that name.
    pub fn find(&self, name: &str) -> Result<ServiceInfo, TrackerError> {
        let (instance, wanted) = match name.split_once('/') {
            Some((instance, wanted)) => (Some(instance), wanted),
            None => (None, name),
        };
        let mut found = self.services()?;
        found.retain(|info| info.name == wanted && instance.is_none_or(|instance| info.instance == instance));
        if let Some(mine) = found.iter().position(|info| info.instance == self.instance) {
            return Ok(found.swap_remove(mine));
        }
        match found.len() {
            0 => Err(TrackerError::UnknownService(name.to_owned())),
            1 => Ok(found.swap_remove(0)),
            _ => {
                let candidates: Vec<_> = found
                    .iter()
                    .map(|info| format!("{}/{}", info.instance, info.name))
                    .collect();
                Err(TrackerError::AmbiguousService {
                    name: name.to_owned(),
                    candidates: candidates.join(", "),
                })
            }
        }
    }

    /// The service and those nested in it, outer ones first.
    pub(crate) fn nested(&self, service: ServiceId) -> Result<Vec<ServiceId>, TrackerError> {
        let all = self.services()?;
        let mut family = vec![service];
        // A nested service is registered after the one it is nested in, so its id is larger and one pass in order of
        // ids finds every depth.
        for info in &all {
            if info.parent.is_some_and(|parent| family.contains(&parent)) {
                family.push(info.id);
            }
        }
        Ok(family)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for bad in ["", "a/b", "a\\b", "a\nb", "a\0b", &"x".repeat(NAME_LEN + 1)] {
            assert!(checked(bad, NAME_LEN).is_err(), "{bad:?}");
        }
        for good in ["web", "a.b", "ünï", &"x".repeat(NAME_LEN)] {
            assert!(checked(good, NAME_LEN).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn padded_text_survives() {
        for name in ["", "a", &"x".repeat(NAME_LEN)] {
            assert_eq!(text(&padded::<NAME_LEN>(name)), name);
        }
    }
}
