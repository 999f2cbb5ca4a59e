//! What is shown and what is chosen: changes with what is read and what is pressed, and does nothing by itself.

use std::{
    collections::{HashMap, VecDeque},
    time::Instant,
};

use zinit_tracker::{Member, ServiceId, ServiceInfo, StopPolicy, StopReport, process::ProcessKey, tracker::Escape};

use super::{
    list::Cursor,
    sample::{Load, ServiceSample, Snapshot, Tree, Wanted},
};
use crate::cli::{output, stop};

/// How many lines of events are kept.
const KEPT_EVENTS: usize = 2000;

/// What the user wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Quit,
    Suspend,
    /// Find out whom a stop would signal.
    Preview(ServiceInfo),
    Stop(ServiceInfo),
    Release(Member),
    /// Show the events of the service with this name.
    Follow(String),
    Unfollow,
}

/// All that a drawing depends on.
pub(super) struct State {
    pub(super) snapshot: Snapshot,
    pub(super) place: Place,
    pub(super) services: Cursor<ServiceId>,
    pub(super) order: ServiceOrder,
    pub(super) reversed: bool,
    /// Services are shown whose names contain it.
    pub(super) filter: String,
    /// Whether keys are letters of the filter.
    pub(super) typing: bool,
    pub(super) over: Option<Over>,
    /// The news, until the next key.
    pub(super) message: Option<String>,
    /// What is being done, and since when.
    pub(super) busy: Option<(String, Instant)>,
}

/// Which list is shown.
pub(super) enum Place {
    Services,
    Processes(Box<Processes>),
    Events(Box<Events>),
}

pub(super) struct Processes {
    pub(super) service: ServiceId,
    pub(super) name: String,
    pub(super) cursor: Cursor<ProcessKey>,
    pub(super) order: ProcessOrder,
    /// Processes are shown whose pid or name contains it.
    pub(super) filter: String,
    /// Who has left something; `None`: not known yet.
    pub(super) escapes: Option<HashMap<ProcessKey, Escape>>,
}

pub(super) struct Events {
    pub(super) name: String,
    pub(super) lines: VecDeque<String>,
    /// How many lines are below the last one that is seen.
    pub(super) below: usize,
    /// How many lines are seen at a time.
    pub(super) height: usize,
    pub(super) back: Place,
}

/// What lies over the list.
pub(super) enum Over {
    Help,
    /// A question; `then` is done if the answer is yes.
    Ask {
        text: Text,
        then: Action,
    },
    Tell(Text),
}

/// Lines that can be scrolled.
#[derive(Default)]
pub(super) struct Text {
    pub(super) title: String,
    /// What always stays in sight.
    pub(super) head: Vec<String>,
    pub(super) lines: Vec<String>,
    /// The first line that is seen.
    pub(super) top: usize,
    /// How many lines are seen at a time, and how many there are as they are folded.
    pub(super) height: usize,
    pub(super) count: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ServiceOrder {
    Name,
    Live,
    Forks,
    Cpu,
    Memory,
    Proof,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProcessOrder {
    Tree,
    Cpu,
    Memory,
    Escapes,
}

impl ServiceOrder {
    pub(super) fn next(self) -> Self {
        match self {
            Self::Name => Self::Live,
            Self::Live => Self::Forks,
            Self::Forks => Self::Cpu,
            Self::Cpu => Self::Memory,
            Self::Memory => Self::Proof,
            Self::Proof => Self::Name,
        }
    }
}

impl ProcessOrder {
    pub(super) fn next(self) -> Self {
        match self {
            Self::Tree => Self::Cpu,
            Self::Cpu => Self::Memory,
            Self::Memory => Self::Escapes,
            Self::Escapes => Self::Tree,
        }
    }
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            snapshot: Err("reading the books …".to_owned()),
            place: Place::Services,
            services: Cursor::default(),
            order: ServiceOrder::Name,
            reversed: false,
            filter: String::new(),
            typing: false,
            over: None,
            message: None,
            busy: None,
        }
    }

    /// The services that are shown, in their order.
    pub(super) fn shown(&self) -> Vec<&ServiceSample> {
        let Ok(sample) = &self.snapshot else {
            return Vec::new();
        };
        let mut shown: Vec<_> = sample
            .services
            .iter()
            .filter(|service| contains(&service.name(), &self.filter))
            .collect();
        // The largest first, and names from the first to the last.
        match self.order {
            ServiceOrder::Name => shown.sort_by_key(|service| service.name()),
            ServiceOrder::Live => shown.sort_by_key(|service| std::cmp::Reverse(service.info.live)),
            ServiceOrder::Forks => shown.sort_by(|a, b| {
                let rate = |service: &ServiceSample| service.fork_rate.unwrap_or(0.0);
                rate(b).total_cmp(&rate(a))
            }),
            ServiceOrder::Cpu => shown.sort_by(|a, b| b.load.cpu.total_cmp(&a.load.cpu)),
            ServiceOrder::Memory => shown.sort_by_key(|service| std::cmp::Reverse(service.load.memory)),
            ServiceOrder::Proof => shown.sort_by_key(|service| std::cmp::Reverse(service.doubts.len())),
        }
        if self.reversed {
            shown.reverse();
        }
        shown
    }

    /// The service that is meant: the chosen one, or the one whose processes are shown.
    pub(super) fn meant(&self) -> Option<&ServiceSample> {
        let id = match &self.place {
            Place::Services => self.services.chosen()?,
            Place::Processes(processes) => processes.service,
            Place::Events(_) => return None,
        };
        let sample = self.snapshot.as_ref().ok()?;
        sample.services.iter().find(|service| service.info.id == id)
    }

    /// The processes that are shown, and which of them is chosen.
    pub(super) fn tree(&self) -> Option<(&Processes, &Tree)> {
        let (Place::Processes(processes), Ok(sample)) = (&self.place, &self.snapshot) else {
            return None;
        };
        let tree = sample.tree.as_ref().filter(|tree| tree.service == processes.service)?;
        Some((processes, tree))
    }

    /// What was read.
    pub(super) fn sampled(&mut self, snapshot: Snapshot) {
        if let (Place::Processes(processes), Ok(sample)) = (&self.place, &snapshot)
            && !sample
                .services
                .iter()
                .any(|service| service.info.id == processes.service)
        {
            self.message = Some(format!("{} is not registered any more", output::plain(&processes.name)));
            self.place = Place::Services;
            self.typing = false;
        }
        self.snapshot = snapshot;
        let shown: Vec<_> = self.shown().iter().map(|service| service.info.id).collect();
        self.services.settle(&shown);
    }

    /// What some processes use.
    pub(super) fn looked_at(&mut self, loads: HashMap<ProcessKey, (char, Load)>) {
        if let Ok(sample) = &mut self.snapshot
            && let Some(tree) = &mut sample.tree
        {
            tree.loads.extend(loads);
        }
    }

    /// Who has left the service something.
    pub(super) fn looked_for_escapes(&mut self, service: ServiceId, found: Result<Vec<Escape>, String>) {
        let Place::Processes(processes) = &mut self.place else {
            return;
        };
        if processes.service != service {
            return;
        }
        match found {
            Ok(escapes) => {
                let by_key = escapes.into_iter().map(|escape| (escape.member.key, escape));
                processes.escapes = Some(by_key.collect());
            }
            Err(error) => self.message = Some(format!("who has escaped is unknown: {error}")),
        }
    }

    /// Whom a stop would signal.
    pub(super) fn previewed(&mut self, info: ServiceInfo, members: Result<Vec<Member>, String>) {
        self.busy = None;
        let name = output::plain(&format!("{}/{}", info.instance, info.name));
        let members = match members {
            Ok(members) => members,
            Err(error) => return self.tell(format!("{name} cannot be stopped"), vec![error]),
        };
        let policy = StopPolicy::default();
        let mut head = vec![
            format!(
                "{} would go to {}, and to who joins until then:",
                policy.signal,
                output::counted(members.len(), "process", "processes")
            ),
            format!("SIGKILL follows to whoever lives after {} s.", policy.grace.as_secs()),
        ];
        if stop::has_supervisor(&info) {
            let instance = output::plain(&info.instance);
            head.push(format!("Its supervisor ({instance}) may start it again."));
        }
        head.push("y: stop it    n: leave it".to_owned());
        self.over = Some(Over::Ask {
            text: Text {
                title: format!("Stop {name}?"),
                head,
                lines: lines(&output::members(&members)),
                ..Text::default()
            },
            then: Action::Stop(info),
        });
    }

    /// What a stop did.
    pub(super) fn stopped(&mut self, result: Result<StopReport, String>) {
        self.busy = None;
        match result {
            Ok(report) => {
                let mut lines = output::report_lines(&report, usize::MAX);
                // What it comes to is read first here.
                let head = lines.pop().into_iter().collect();
                self.over = Some(Over::Tell(Text {
                    title: format!(
                        "Stop of {}",
                        output::plain(&format!("{}/{}", report.instance, report.service))
                    ),
                    head,
                    lines,
                    ..Text::default()
                }));
            }
            Err(error) => self.tell("The stop failed".to_owned(), vec![error]),
        }
    }

    /// Who was released.
    pub(super) fn released(&mut self, result: Result<Vec<Member>, String>) {
        self.busy = None;
        match result {
            Ok(members) => {
                let count = output::counted(members.len(), "process runs on", "processes run on");
                self.tell(format!("Released: {count}"), lines(&output::members(&members)));
            }
            Err(error) => self.tell("The release failed".to_owned(), vec![error]),
        }
    }

    /// What happened.
    pub(super) fn happened(&mut self, events: Vec<String>) {
        if let Place::Events(shown) = &mut self.place {
            if shown.below > 0 {
                shown.below += events.len();
            }
            shown.lines.extend(events);
            while shown.lines.len() > KEPT_EVENTS {
                shown.lines.pop_front();
            }
        }
    }

    pub(super) fn tell(&mut self, title: String, lines: Vec<String>) {
        self.over = Some(Over::Tell(Text {
            title,
            lines,
            ..Text::default()
        }));
    }

    /// What must be read for what is shown; `visible`: the processes on the screen.
    pub(super) fn wanted(&self, visible: Vec<ProcessKey>) -> Wanted {
        match &self.place {
            Place::Processes(processes) => Wanted {
                service: Some(processes.service),
                visible,
            },
            Place::Services | Place::Events(_) => Wanted::default(),
        }
    }
}

impl Processes {
    pub(super) fn new(service: &ServiceSample) -> Self {
        Self {
            service: service.info.id,
            name: service.name(),
            cursor: Cursor::default(),
            order: ProcessOrder::Tree,
            filter: String::new(),
            escapes: None,
        }
    }

    /// The rows that are shown, in their order.
    pub(super) fn shown(&self, tree: &Tree) -> Vec<usize> {
        let member = |row: &usize| &tree.members[tree.rows[*row].member];
        let load = |row: &usize| {
            tree.loads
                .get(&member(row).key)
                .map(|(_, load)| *load)
                .unwrap_or_default()
        };
        let mut shown: Vec<_> = (0..tree.rows.len())
            .filter(|row| {
                self.filter.is_empty()
                    || contains(&member(row).comm, &self.filter)
                    || member(row).pid.to_string().contains(&self.filter)
            })
            .collect();
        match self.order {
            ProcessOrder::Tree => {}
            ProcessOrder::Cpu => shown.sort_by(|a, b| load(b).cpu.total_cmp(&load(a).cpu)),
            ProcessOrder::Memory => shown.sort_by_key(|row| std::cmp::Reverse(load(row).memory)),
            ProcessOrder::Escapes => shown.sort_by_key(|row| self.escape(member(row).key).is_none()),
        }
        shown
    }

    /// The names of these rows.
    pub(super) fn keys(tree: &Tree, shown: &[usize]) -> Vec<ProcessKey> {
        shown
            .iter()
            .map(|row| tree.members[tree.rows[*row].member].key)
            .collect()
    }

    pub(super) fn escape(&self, key: ProcessKey) -> Option<&Escape> {
        self.escapes.as_ref()?.get(&key)
    }

    /// Whether each process stands below its creator.
    pub(super) fn is_tree(&self) -> bool {
        self.order == ProcessOrder::Tree && self.filter.is_empty()
    }
}

fn contains(name: &str, filter: &str) -> bool {
    name.to_lowercase().contains(&filter.to_lowercase())
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(ToOwned::to_owned).collect()
}
