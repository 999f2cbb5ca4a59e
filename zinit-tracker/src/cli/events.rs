//! `zinit-tracker events`: what happens to the processes of services, as the kernel's programs tell it.

use std::{
    collections::{HashMap, HashSet},
    io,
    process::ExitCode,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use serde::Serialize;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};
use zinit_tracker::{
    ServiceInfo, Tracker,
    records::{COMM_LEN, Event, event_kind},
    stop::Fate,
    tracker::{Ended, EventLosses, ServiceState},
};

use super::{Global, clock, close, output, pager, paint, parse};

/// How many events are written at once, so that the ring is emptied faster than it is filled.
pub(super) const BATCH: usize = 512;

/// Show what happens to the processes of services: one line an event.
///
/// Without --follow, only the deaths that the kernel has records of, the newest 16,384 of all services together. With it,
/// also what happens from now on: fork, exec, exit, adopt (a running process joined), release (a process was let go) and
/// empty (the last process of a service has gone); and the steps of a stop: stopping (its processes are asked), killing, and up
/// (it has ended, and left nobody; the service can be started again). The kernel records no event when a process leaves its session, group,
/// cgroup or a namespace: `escapes` shows who has. Events are hints; `ps` shows who is there.
///
/// The events have one reader at a time, machine-wide: a second one is refused, so that none takes events from another. Nobody
/// else needs them. Where more happens than is read, the kernel drops events, and a line says how many. An exit with code 0 may
/// be a death that was only found later, of which the code is unknown; it is not in `history`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  zinit-tracker events -f                             what happens from now on
  zinit-tracker events --since 10m --service web      who died of web in the last ten minutes
  zinit-tracker events -f --json | jq 'select(.kind == \"exit\")'

Exit status: 0, also when SIGINT or SIGTERM ends it or its reader has gone (a second signal kills it);
1 if another process reads the events, there is no such service, or it failed.")]
pub(super) struct Options {
    /// Go on with what happens from now on
    #[arg(short, long)]
    follow: bool,
    /// Only this service, NAME or INSTANCE/NAME; may be given several times
    #[arg(long, value_name = "NAME")]
    service: Vec<String>,
    /// The recorded deaths of the last so long, such as 10m; without --follow, all are shown
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    since: Option<Duration>,
    /// Print JSON, one object a line
    #[arg(long)]
    json: bool,
}

/// A line, and an object of the JSON.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Line {
    Process(OfProcess),
    Service(OfService),
    Lost(Lost),
}

#[derive(Serialize)]
pub(super) struct OfService {
    kind: &'static str,
    time: String,
    boottime_ns: u64,
    service_id: u32,
    /// `INSTANCE/NAME`; none if it is not registered any more.
    service: Option<String>,
}

#[derive(Serialize)]
pub(super) struct OfProcess {
    #[serde(flatten)]
    service: OfService,
    pid: u32,
    tgid: u32,
    start_boottime_ns: u64,
    parent_tgid: u32,
    comm: String,
    /// Of an exit.
    fate: Option<Fate>,
}

#[derive(Serialize)]
pub(super) struct Lost {
    kind: &'static str,
    time: String,
    boottime_ns: u64,
    /// What: events of any kind, or those of one kind.
    lost: &'static str,
    count: u64,
}

/// The services by number, and which of them are asked for.
pub(super) struct Services<'a> {
    tracker: &'a Tracker,
    names: &'a [String],
    wanted: HashSet<u32>,
    known: HashMap<u32, Option<ServiceInfo>>,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let tracker = match options.follow || !options.service.is_empty() {
        true => Some(global.existing_or_fail()?),
        false => global.existing()?,
    };
    let Some(tracker) = tracker else {
        output::note("no service is registered");
        return Ok(ExitCode::SUCCESS);
    };
    if options.follow {
        let shown = follow(&tracker, options).await;
        close(tracker);
        shown?;
    } else {
        let deaths = recorded(&tracker, options);
        // A pager may stay for long.
        close(tracker);
        match deaths? {
            deaths if options.json => output::print(&deaths)?,
            deaths => pager::show(global, &deaths)?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The recorded deaths that are asked for, without those that happen from now on.
fn recorded(tracker: &Tracker, options: &Options) -> anyhow::Result<String> {
    let mut services = Services::new(tracker, &options.service)?;
    deaths(tracker, options, &mut services, Tracker::now())
}

fn deaths(
    tracker: &Tracker,
    options: &Options,
    services: &mut Services<'_>,
    before: Duration,
) -> anyhow::Result<String> {
    let since = options
        .since
        .map_or(Duration::ZERO, |since| before.saturating_sub(since));
    let ended = tracker.history()?;
    let wanted = ended.iter().filter(|ended| (since..before).contains(&ended.ended));
    text(wanted.filter_map(|ended| of_record(services, ended)), options.json)
}

async fn follow(tracker: &Tracker, options: &Options) -> anyhow::Result<()> {
    let mut services = Services::new(tracker, &options.service)?;
    // In this order: what happens from `begin` on is either read or among the losses.
    let losses = tracker.event_losses()?;
    let begin = Tracker::now();
    let mut events = tracker.events()?;
    if options.since.is_some() && !output::is_read(&deaths(tracker, options, &mut services, begin)?)? {
        return Ok(());
    }
    let mut ending = Ending::new()?;
    let mut losses = losses;
    let mut ended = None;
    loop {
        let first = match ended {
            None => tokio::select! {
                event = events.next() => Some(event?),
                () = ending.comes() => {
                    ended = Some(clock::nanoseconds(Tracker::now()));
                    None
                }
            },
            Some(_) => None,
        };
        let mut lines = Vec::new();
        let (mut count, mut latest) = (0, 0);
        let mut next = first.or_else(|| events.take());
        while let Some(event) = next {
            if event.boottime_ns >= clock::nanoseconds(begin) {
                lines.extend(of_event(&mut services, &event));
            }
            latest = event.boottime_ns;
            count += 1;
            if count == BATCH {
                break;
            }
            next = events.take();
        }
        let now = tracker.event_losses()?;
        lines.extend(lost(losses, now));
        losses = now;
        if !output::is_read(&text(lines.into_iter(), options.json)?)? {
            return Ok(());
        }
        // What has happened before the end is shown, and not what goes on happening.
        if ended.is_some_and(|ended| count < BATCH || latest > ended) {
            return Ok(());
        }
        // While there are always events, only this lets signals through.
        tokio::task::yield_now().await;
    }
}

/// Is never sent: the end of the channel is the message.
enum Never {}

/// What ends a reader of events: SIGINT, SIGTERM, or that nobody reads its stdout.
struct Ending {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    unread: oneshot::Receiver<Never>,
}

impl Ending {
    fn new() -> anyhow::Result<Self> {
        let failed = "failed to watch for signals";
        let came = Arc::new(AtomicBool::new(false));
        for number in [libc::SIGINT, libc::SIGTERM] {
            // The first one may find this process writing to a reader that does not read.
            signal_hook::flag::register_conditional_default(number, Arc::clone(&came)).context(failed)?;
            signal_hook::flag::register(number, Arc::clone(&came)).context(failed)?;
        }
        let (gone, unread) = oneshot::channel::<Never>();
        // A thread of its own: poll(2) takes every kind of file, and epoll does not.
        std::thread::spawn(move || {
            let stdout = io::stdout();
            loop {
                let mut files = [PollFd::new(&stdout, PollFlags::empty())];
                match poll(&mut files, None) {
                    Err(rustix::io::Errno::INTR) => {}
                    // If stdout cannot be watched, the next line finds out.
                    Err(_) => std::thread::park(),
                    Ok(_) => break,
                }
            }
            drop(gone);
        });
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context(failed)?,
            terminate: signal(SignalKind::terminate()).context(failed)?,
            unread,
        })
    }

    async fn comes(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = &mut self.unread => {}
        }
    }
}

impl<'a> Services<'a> {
    pub(super) fn new(tracker: &'a Tracker, names: &'a [String]) -> anyhow::Result<Self> {
        let mut services = Self {
            tracker,
            names,
            wanted: HashSet::new(),
            known: HashMap::new(),
        };
        for name in names {
            services.wanted.insert(tracker.find(name)?.id.number());
        }
        services.learn()?;
        Ok(services)
    }

    fn learn(&mut self) -> anyhow::Result<()> {
        for info in self.tracker.services()? {
            let names = [info.name.clone(), format!("{}/{}", info.instance, info.name)];
            // One that has been registered anew has another number.
            if self.names.iter().any(|wanted| names.contains(wanted)) {
                self.wanted.insert(info.id.number());
            }
            self.known.insert(info.id.number(), Some(info));
        }
        Ok(())
    }

    /// What is known of the service: the outer `None` if it was not asked for.
    fn get(&mut self, id: u32) -> Option<Option<&ServiceInfo>> {
        if !self.known.contains_key(&id) {
            if let Err(error) = self.learn() {
                tracing::warn!(%error, "the name of a service is unknown");
            }
            // Numbers are given once: one that is not registered now never will be.
            self.known.entry(id).or_insert(None);
        }
        let wanted = self.names.is_empty() || self.wanted.contains(&id);
        wanted.then(|| self.known.get(&id).and_then(Option::as_ref))
    }
}

fn of_service(kind: &'static str, at: Duration, id: u32, info: Option<&ServiceInfo>) -> OfService {
    OfService {
        kind,
        time: clock::wall(at),
        boottime_ns: clock::nanoseconds(at),
        service_id: id,
        service: info.map(|info| format!("{}/{}", info.instance, info.name)),
    }
}

fn of_record(services: &mut Services<'_>, ended: &Ended) -> Option<Line> {
    let id = ended.service.number();
    let info = services.get(id)?;
    Some(Line::Process(OfProcess {
        service: of_service("exit", ended.ended, id, info),
        pid: ended.pid,
        tgid: ended.key.tgid,
        start_boottime_ns: ended.key.start_boottime_ns,
        parent_tgid: ended.parent.tgid,
        comm: ended.comm.clone(),
        fate: ended.status.map(Fate::of_wait_status),
    }))
}

pub(super) fn of_event(services: &mut Services<'_>, event: &Event) -> Option<Line> {
    let kind = match event.kind {
        event_kind::FORK => "fork",
        event_kind::EXEC => "exec",
        event_kind::EXIT => "exit",
        event_kind::EMPTY => "empty",
        event_kind::ADOPT => "adopt",
        event_kind::RELEASE => "release",
        event_kind::STATE => ServiceState::of_record(event.status).name(),
        // Of another build with the same layout.
        _ => "unknown",
    };
    let tracker = services.tracker;
    let info = services.get(event.service)?;
    let service = of_service(kind, Duration::from_nanos(event.boottime_ns), event.service, info);
    if matches!(event.kind, event_kind::EMPTY | event_kind::STATE) {
        return Some(Line::Service(service));
    }
    Some(Line::Process(OfProcess {
        service,
        pid: tracker.pid_of(event, info),
        tgid: event.tgid,
        start_boottime_ns: event.start_boottime_ns,
        parent_tgid: event.parent_tgid,
        comm: comm(&event.comm),
        fate: (event.kind == event_kind::EXIT).then(|| Fate::of_wait_status(event.status)),
    }))
}

fn comm(bytes: &[u8; COMM_LEN]) -> String {
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

/// Lines on what has been lost meanwhile.
pub(super) fn lost(before: EventLosses, now: EventLosses) -> impl Iterator<Item = Line> {
    let counts = [
        ("dropped", "any", before.dropped, now.dropped),
        ("missed", "fork", before.missed_creations, now.missed_creations),
        ("missed", "exec", before.missed_executions, now.missed_executions),
    ];
    let at = Tracker::now();
    let grown = counts.into_iter().filter(|(_, _, before, now)| now > before);
    grown.map(move |(kind, lost, before, now)| {
        Line::Lost(Lost {
            kind,
            time: clock::wall(at),
            boottime_ns: clock::nanoseconds(at),
            lost,
            count: now - before,
        })
    })
}

fn text(lines: impl Iterator<Item = Line>, json: bool) -> anyhow::Result<String> {
    let mut text = String::new();
    for line in lines {
        text.push_str(&if json {
            serde_json::to_string(&line)?
        } else {
            describe(&line)
        });
        text.push('\n');
    }
    Ok(text)
}

/// A line, for people.
pub(super) fn describe(line: &Line) -> String {
    let named = |service: &OfService| match &service.service {
        Some(name) => output::plain(name),
        None => format!("service {}", service.service_id),
    };
    match line {
        Line::Process(of) => {
            let service = &of.service;
            let mut text = format!(
                "{}  {:<7} {:>7}  {:<15}  {}",
                service.time,
                service.kind,
                of.pid,
                output::plain(&of.comm),
                named(service)
            );
            match (of.fate, service.kind) {
                (Some(fate), _) => text.push_str(&format!("  {}", paint::fate(Some(fate), &fate.to_string()))),
                (None, "fork") => text.push_str(&format!("  by {}", of.parent_tgid)),
                (None, _) => {}
            }
            text
        }
        Line::Service(service) => format!(
            "{}  {:<8} {:>6}  {:<15}  {}",
            service.time,
            service.kind,
            "",
            "",
            named(service)
        ),
        Line::Lost(lost) => {
            let what = match lost.lost {
                "any" => "events were DROPPED: more happened than was read".to_owned(),
                one => format!("events of kind {one} were MISSED: the kernel skipped its hooks"),
            };
            format!("{}  {}", lost.time, paint::alarm(&format!("{} {what}", lost.count)))
        }
    }
}
