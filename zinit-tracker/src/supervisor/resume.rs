//! What an earlier supervisor left, put together from what it saved and from the books.
//!
//! The books decide what runs and what has ended; what was saved only says what is wanted, and counts for the run that it was
//! saved of. A process that was saved and is not in the books (somebody removed the pins, or there are no books that outlive a
//! supervisor) is adopted, if it still is the one by its start: then its service is not proven, but it is not started twice either.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    command::Context,
    definition::Definition,
    logs::captured_from,
    machine::{Remains, Snapshot},
    registry::Loaded,
    service::chain,
    state_files::{Past, Run, Saved, StateFiles},
};
use crate::{
    process::{Matched, ProcessKey},
    stop::Fate,
    tracker::{Member, Service, ServiceInfo, Tracker, TrackerError},
};

/// A service to go on with.
#[derive(Debug)]
pub(super) struct Resumed {
    /// By which it runs.
    pub(super) definition: Definition,
    /// `None`: nothing is known of what was wanted.
    pub(super) snapshot: Option<Snapshot>,
    pub(super) remains: Remains,
    pub(super) service: Option<Service>,
    pub(super) main: Option<(u32, ProcessKey, Matched)>,
    /// Its last main process, alive or not, and where its output can be read.
    pub(super) run: Option<Run>,
    /// Who may hold the pipes open.
    pub(super) members: Vec<u32>,
}

/// What there is when a registry begins.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Services of this instance that may have living processes and are not resumed.
    pub(super) occupied: BTreeSet<String>,
    pub(super) resumed: BTreeMap<String, Resumed>,
    /// Definitions; of services that an earlier supervisor did not have, only if it had not come as far as having them all.
    pub(super) services: Loaded,
}

impl Found {
    /// Looks. Blocks.
    ///
    /// # Errors
    ///
    /// The books cannot be read.
    pub(super) fn look(context: &Context, loaded: Loaded) -> Result<Self, TrackerError> {
        let tracker = &context.tracker;
        let services = tracker.services()?.into_iter();
        let own = services.filter(|info| info.instance == tracker.instance());
        let own: BTreeMap<_, _> = own.map(|info| (info.name.clone(), info)).collect();
        let past = context.state.as_ref().map(StateFiles::past).filter(|past| !past.ended);
        let Some(past) = past else {
            return Ok(Self {
                occupied: own.into_keys().collect(),
                resumed: BTreeMap::new(),
                services: loaded,
            });
        };
        Ok(put_together(tracker, own, past, loaded))
    }
}

fn put_together(tracker: &Tracker, mut own: BTreeMap<String, ServiceInfo>, past: Past, loaded: Loaded) -> Found {
    let mut found = Found::default();
    let definitions: BTreeMap<_, _> = loaded
        .iter()
        .filter_map(|(name, definition)| Some((name.as_str(), definition.as_ref().ok()?)))
        .collect();
    for (service, reason) in &past.spoilt {
        tracing::warn!(
            service,
            reason,
            "its saved state is no good: only the kernel's books tell about it"
        );
    }
    let mut names: BTreeSet<_> = past.services.keys().cloned().collect();
    names.extend(own.keys().cloned());
    let mut saved = past.services;
    for name in names {
        let info = own.remove(&name);
        let saved = saved.remove(&name);
        let Some(definition) = saved
            .as_ref()
            .map(|saved| &saved.definition)
            .or_else(|| definitions.get(name.as_str()).copied())
        else {
            if info.is_some() {
                found.occupied.insert(name);
            }
            continue;
        };
        let definition = definition.clone();
        match resume(tracker, &name, definition, info, saved) {
            Ok(resumed) => {
                found.resumed.insert(name, resumed);
            }
            Err(error) => {
                tracing::error!(
                    service = name,
                    reason = chain(&error),
                    "cannot be taken up: it is stopped before it is started"
                );
                found.occupied.insert(name);
            }
        }
    }
    found.services = loaded;
    if past.complete {
        // Its files may have been no good, or it was forgotten, or the file is new: nothing of that is for a crash to change.
        found.services.retain(|(name, _)| {
            let known =
                found.resumed.contains_key(name) || found.occupied.contains(name) || past.spoilt.contains_key(name);
            if !known {
                tracing::warn!(
                    service = name,
                    "was not supervised before the crash and is not now: `zinit monitor` changes that"
                );
            }
            known
        });
    }
    found
}

fn resume(
    tracker: &Tracker,
    name: &str,
    definition: Definition,
    info: Option<ServiceInfo>,
    saved: Option<Saved>,
) -> Result<Resumed, TrackerError> {
    let (snapshot, run) = saved.map_or((None, None), |saved| (Some(saved.snapshot), saved.run));
    let mut resumed = Resumed {
        definition,
        snapshot,
        remains: Remains::Nothing,
        service: None,
        main: None,
        run: None,
        members: Vec::new(),
    };
    let Some(info) = info else {
        if let Some(run) = run {
            resumed.take_in(tracker, name, run)?;
        }
        return Ok(resumed);
    };
    let service = info.handle();
    let run = run.filter(|run| run.service == info.id && Some(run.main) == info.main);
    let members = tracker.processes(&service)?;
    if info.main.is_some() && run.is_none() {
        resumed.snapshot = resumed.snapshot.map(Snapshot::of_later_run);
        tracing::warn!(service = name, "was started after its state was last saved");
    }
    resumed.run = info.main.map(|main| {
        let pid = || {
            members
                .iter()
                .find(|member| member.key == main)
                .map(|member| member.pid)
        };
        // Not saved, only the main process's own can be told: those of others may be a supervisor's below it.
        let pipes = run.map(|run| run.pipes).or_else(|| pid().map(captured_from));
        Run {
            service: info.id,
            main,
            pipes: pipes.unwrap_or_default(),
        }
    });
    resumed.members = members.iter().map(|member| member.pid).collect();
    resumed.remains = match info.main {
        Some(key) => resumed.find_main(tracker, key, &members)?,
        None if info.live > 0 => Remains::Ended(None),
        None => Remains::Entry,
    };
    resumed.service = Some(service);
    Ok(resumed)
}

impl Resumed {
    fn find_main(&mut self, tracker: &Tracker, key: ProcessKey, members: &[Member]) -> Result<Remains, TrackerError> {
        if let Some(member) = members.iter().find(|member| member.key == key)
            && let Some(process) = tracker.open_member(member)?
        {
            self.main = Some((member.pid, key, process));
            return Ok(Remains::Main);
        }
        let end = tracker.end_of(key)?;
        Ok(Remains::Ended(end.and_then(|end| end.status).map(Fate::of_wait_status)))
    }

    /// The books do not have the service. It has ended in good order, or the books are others than those that the last supervisor had.
    fn take_in(&mut self, tracker: &Tracker, name: &str, run: Run) -> Result<(), TrackerError> {
        let Some(pid) = tracker.pid_of_process(run.main)? else {
            let end = tracker.end_of(run.main)?;
            self.remains = Remains::Ended(end.and_then(|end| end.status).map(Fate::of_wait_status));
            self.run = Some(run);
            return Ok(());
        };
        let service = tracker.register(name)?;
        let taken = tracker.adopt(&service, pid);
        let members = match &taken {
            Ok(adoption) => adoption.members.as_slice(),
            Err(_) => &[],
        };
        let main = members.iter().find(|member| member.key == run.main);
        let process = main.map(|main| tracker.open_member(main)).transpose()?.flatten();
        let (Some(main), Some(process)) = (main, process) else {
            // The pid was another's by then, or it may not be adopted.
            for member in members {
                tracker.release_member(member.clone())?;
            }
            tracker.unregister(&service)?;
            taken?;
            self.remains = Remains::Ended(None);
            self.run = Some(run);
            return Ok(());
        };
        tracing::warn!(
            service = name,
            pid,
            "is not in the books, and was adopted: what left its tree before is unknown, so nothing about it is proven"
        );
        self.main = Some((main.pid, run.main, process));
        self.remains = Remains::Main;
        self.run = Some(Run {
            service: service.id(),
            ..run
        });
        self.members = members.iter().map(|member| member.pid).collect();
        self.service = Some(service);
        Ok(())
    }
}

/// What a service that is to be started for the first time is saved as.
pub(super) fn wanted(definition: &Definition) -> Saved {
    Saved {
        definition: definition.clone(),
        snapshot: Snapshot::WANTED,
        run: None,
    }
}
