//! Starting a process of a service: registration, surroundings, identity.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::File,
    process::Stdio,
    sync::{Arc, OnceLock},
};

use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::{Gid, Group, Uid, User, getgrouplist},
};
use tokio::{process::Command, task::JoinHandle};

use super::{
    children::{Children, OwnChild},
    definition::{Definition, LogMode},
    logs::{Capture, LogError, LogRing, Stream},
    state_files::{Run, StateFiles},
    terminate::blocking,
    turns::Turns,
};
use crate::{
    process::{Execution, Identity, Launch, ProcessKey},
    tracker::{Service, Tracker, TrackerError},
};

/// What all services share.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) tracker: Tracker,
    pub(super) logs: Arc<LogRing>,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) children: Children,
    pub(super) epoch: std::time::Instant,
    /// Soft and hard limit of open files that services get.
    pub(super) descriptors: (u64, u64),
    pub(super) starts: Turns,
    /// Where states are saved for the supervisor that follows this one if it is killed.
    pub(super) state: Option<StateFiles>,
}

/// Why a process of a service could not be started.
#[derive(Debug, thiserror::Error)]
pub(super) enum SpawnError {
    #[error("its exec is no command: `zinit check` says why")]
    NoCommand,
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("there is no user {0:?}")]
    NoUser(String),
    #[error("there is no group {0:?}")]
    NoGroup(String),
    #[error("user {0:?} has no name, so its group must be given")]
    GroupNeeded(String),
    #[error("failed to look up {name:?}")]
    LookUp { name: String, source: nix::Error },
    #[error("failed to pass on a descriptor")]
    Descriptor(#[from] std::io::Error),
}

/// A process that was created.
#[derive(Debug)]
pub(super) struct Started {
    /// The service that it is a member of.
    pub(super) service: Service,
    /// The service's main process, as the books have it.
    pub(super) main: Option<ProcessKey>,
    pub(super) child: OwnChild,
    /// Which may take for ever.
    pub(super) execution: Execution,
    /// Where its output is read.
    pub(super) captures: Vec<Capture>,
}

impl Started {
    /// What another supervisor finds the process and its output by. `None`: the books did not tell which process it is.
    pub(super) fn run(&self) -> Option<Run> {
        Some(Run {
            service: self.service.id(),
            main: self.main?,
            pipes: self.captures.iter().map(Capture::pipe).collect(),
        })
    }
}

/// The service in the books: the one that is known, if it still is there, or one of that name, or a new one.
///
/// One with living members is what an earlier supervisor left, and is returned as it is.
pub(super) fn enter(tracker: &Tracker, name: &str, known: Option<Service>) -> Result<Service, TrackerError> {
    if let Some(service) = known {
        match tracker.live(&service) {
            Ok(_) => return Ok(service),
            Err(TrackerError::NotRegistered(_)) => {}
            Err(error) => return Err(error),
        }
    }
    match find(tracker, name)? {
        Some(service) => Ok(service),
        None => tracker.register(name),
    }
}

fn find(tracker: &Tracker, name: &str) -> Result<Option<Service>, TrackerError> {
    match tracker.find(&format!("{}/{name}", tracker.instance())) {
        Ok(info) => Ok(Some(info.handle())),
        Err(TrackerError::UnknownService(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Takes the service out of the books, if it is there. It must be empty.
pub(super) fn leave(tracker: &Tracker, name: &str, known: Option<Service>) -> Result<(), TrackerError> {
    let found = match known {
        Some(service) => Some(service),
        None => find(tracker, name)?,
    };
    found.map_or(Ok(()), |service| tracker.unregister(&service))
}

/// Enters the service anew, so that what was held against the last run does not count against the next.
pub(super) fn enter_anew(tracker: &Tracker, name: &str, known: Option<Service>) -> Result<Service, TrackerError> {
    leave(tracker, name, known)?;
    tracker.register(name)
}

/// Starts something on a thread where it may block, in its turn. It is started also if nobody waits for that.
pub(super) fn in_turn(
    context: &Arc<Context>,
    start: impl FnOnce(&Context) -> Result<Started, SpawnError> + Send + 'static,
) -> JoinHandle<Result<Started, SpawnError>> {
    let context = Arc::clone(context);
    tokio::spawn(async move {
        let _turn = context.starts.take().await;
        blocking(&context, start).await
    })
}

/// Creates a process that executes a command, as a member of the service. Blocks: on locks of the books, and on name services.
pub(super) fn spawn(
    context: &Context,
    service: Service,
    definition: &Definition,
    argv: &[String],
) -> Result<Started, SpawnError> {
    let (program, arguments) = argv.split_first().ok_or(SpawnError::NoCommand)?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).envs(&context.environment);
    let descriptors = std::iter::once((Resource::RLIMIT_NOFILE, context.descriptors.0, context.descriptors.1));
    let mut launch = Launch {
        session: true,
        directory: Some(definition.dir.clone()),
        limits: descriptors.chain(defined_limits(definition)).collect(),
        identity: None,
    };
    let mut owner = None;
    if let Some(account) = Account::of(definition)? {
        command.envs(account.environment);
        owner = account.identity.user;
        launch.identity = Some(account.identity);
    }
    command.envs(&definition.env);
    let captures = connect(context, service.name(), definition.log, owner, &mut command)?;
    let (child, execution) = context.children.create(|fork| {
        let tracker = &context.tracker;
        tracker.launch_by(&service, &mut command, &launch, fork)
    })?;
    // What cannot be read now is not saved: another supervisor would have the books alone, and they are right.
    let main = context.tracker.info(&service).ok().and_then(|info| info.main);
    Ok(Started {
        service,
        main,
        child,
        execution,
        captures,
    })
}

fn defined_limits(definition: &Definition) -> impl Iterator<Item = (Resource, u64, u64)> + '_ {
    let limits = definition.limits.iter();
    limits.map(|limit| (limit.resource, limit.soft, limit.hard))
}

/// Lets this process have as many descriptors as it may: a service takes three. Returns the limits that it had when this
/// was called first, which are what services get.
pub(super) fn raise_descriptor_limit() -> (u64, u64) {
    static FIRST: OnceLock<(u64, u64)> = OnceLock::new();
    *FIRST.get_or_init(|| {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 4096));
        if let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
            tracing::warn!(%error, soft, "services may run out of file descriptors");
        }
        (soft, hard)
    })
}

/// Says where the output goes. A pipe of our own is given to the user whom the service runs as: `/dev/stdout` opens it anew.
fn connect(
    context: &Context,
    name: &str,
    log: LogMode,
    owner: Option<Uid>,
    command: &mut Command,
) -> Result<Vec<Capture>, SpawnError> {
    match log {
        LogMode::Ring => {
            let name: Arc<str> = name.into();
            let (out, out_capture) = context.logs.capture(&name, Stream::Out)?;
            let (err, err_capture) = context.logs.capture(&name, Stream::Err)?;
            for pipe in [&out, &err] {
                // Both ends are one file.
                std::os::unix::fs::fchown(pipe, owner.map(Uid::as_raw), None)?;
            }
            command.stdout(File::from(out)).stderr(File::from(err));
            Ok(vec![out_capture, err_capture])
        }
        LogMode::Stdout => {
            command.stdout(Stdio::inherit()).stderr(Stdio::inherit());
            Ok(Vec::new())
        }
        LogMode::None => {
            command.stdout(Stdio::null()).stderr(Stdio::null());
            Ok(Vec::new())
        }
    }
}

/// As whom a service runs, and what its environment says about that.
struct Account {
    identity: Identity,
    environment: Vec<(&'static str, String)>,
}

impl Account {
    /// `None`: as the supervisor.
    fn of(definition: &Definition) -> Result<Option<Self>, SpawnError> {
        let group = definition.group.as_deref().map(find_group).transpose()?;
        let Some(name) = definition.user.as_deref() else {
            return Ok(group.map(|group| Self {
                identity: Identity {
                    user: None,
                    group,
                    groups: vec![group],
                },
                environment: Vec::new(),
            }));
        };
        let (uid, user) = find_user(name)?;
        let Some(user) = user else {
            let group = group.ok_or_else(|| SpawnError::GroupNeeded(name.to_owned()))?;
            return Ok(Some(Self {
                identity: Identity {
                    user: Some(uid),
                    group,
                    groups: vec![group],
                },
                environment: Vec::new(),
            }));
        };
        let group = group.unwrap_or(user.gid);
        Ok(Some(Self {
            identity: Identity {
                user: Some(uid),
                group,
                groups: groups_of(&user, group)?,
            },
            environment: vec![
                ("HOME", user.dir.to_string_lossy().into_owned()),
                ("LOGNAME", user.name.clone()),
                ("SHELL", user.shell.to_string_lossy().into_owned()),
                ("USER", user.name),
            ],
        }))
    }
}

fn looked_up<T>(name: &str, result: nix::Result<T>) -> Result<T, SpawnError> {
    result.map_err(|source| SpawnError::LookUp {
        name: name.to_owned(),
        source,
    })
}

/// A user by name or number; a number need not have a name.
fn find_user(name: &str) -> Result<(Uid, Option<User>), SpawnError> {
    if let Some(user) = looked_up(name, User::from_name(name))? {
        return Ok((user.uid, Some(user)));
    }
    let number = number(name).ok_or_else(|| SpawnError::NoUser(name.to_owned()))?;
    let uid = Uid::from_raw(number);
    Ok((uid, looked_up(name, User::from_uid(uid))?))
}

/// The number of a user or group. The largest means "as it is" to setresuid(2), which would be root.
fn number(name: &str) -> Option<u32> {
    name.parse().ok().filter(|number| *number != u32::MAX)
}

/// A group by name or number; a number need not have a name.
fn find_group(name: &str) -> Result<Gid, SpawnError> {
    if let Some(group) = looked_up(name, Group::from_name(name))? {
        return Ok(group.gid);
    }
    let number = number(name).ok_or_else(|| SpawnError::NoGroup(name.to_owned()))?;
    Ok(Gid::from_raw(number))
}

fn groups_of(user: &User, group: Gid) -> Result<Vec<Gid>, SpawnError> {
    let name = CString::new(user.name.as_str()).map_err(|_| SpawnError::NoUser(user.name.clone()))?;
    looked_up(&user.name, getgrouplist(&name, group))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_becomes_root_by_a_number_that_means_no_change_or_by_no_name() {
        for name in ["4294967295", "-1", "", "4294967296"] {
            assert!(find_user(name).is_err(), "{name:?}");
            assert!(find_group(name).is_err(), "{name:?}");
        }
        assert_eq!(find_user("65534").unwrap().0, Uid::from_raw(65_534));
    }

    fn account(user: Option<&str>, group: Option<&str>) -> Result<Option<Identity>, SpawnError> {
        let definition = Definition {
            user: user.map(str::to_owned),
            group: group.map(str::to_owned),
            ..Definition::new(["service"])
        };
        Ok(Account::of(&definition)?.map(|account| account.identity))
    }

    #[test]
    fn users_and_groups_are_found_by_name_or_number() {
        let root = Identity {
            user: Some(Uid::from_raw(0)),
            group: Gid::from_raw(0),
            groups: vec![Gid::from_raw(0)],
        };
        assert_eq!(account(None, None).unwrap(), None);
        assert_eq!(account(Some("root"), None).unwrap().unwrap().user, root.user);
        assert_eq!(account(Some("0"), None).unwrap().unwrap().group, root.group);
        let nameless = account(Some("987654"), Some("4321")).unwrap().unwrap();
        assert_eq!(
            (nameless.user, nameless.group),
            (Some(Uid::from_raw(987_654)), Gid::from_raw(4321))
        );
        assert_eq!(account(None, Some("4321")).unwrap().unwrap().user, None);
    }

    #[test]
    fn what_does_not_exist_is_named() {
        let message = |user, group| account(user, group).unwrap_err().to_string();
        assert_eq!(message(Some("no such"), None), "there is no user \"no such\"");
        assert_eq!(message(None, Some("no such")), "there is no group \"no such\"");
        assert!(message(Some("987654"), None).contains("its group must be given"));
    }
}
