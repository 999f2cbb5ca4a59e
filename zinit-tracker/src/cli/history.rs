//! `zinit-tracker history`: processes of services that have ended, and what came of stops.

use std::{collections::HashMap, process::ExitCode, time::Duration};

use clap::Args;
use serde::Serialize;
use zinit_tracker::{
    ServiceInfo, Tracker,
    stop::Fate,
    tracker::{Ended, KEPT_EXITS, ServiceStops},
};

use super::{Global, clock, close, output, pager, paint};

/// How many free records a processor may keep for itself while another one evicts (`LOCAL_FREE_TARGET` of
/// kernel/bpf/bpf_lru_list.c).
const FREE_PER_CPU: usize = 128;

/// Show processes of services that have ended: how, when, and how long they lived; and the last stop of each service.
///
/// The kernel keeps the records of the newest 16,384 deaths of all services together, also of services that are not registered
/// any more, until nothing is tracked. A line on stderr says of which services records are missing, and whether others' may be.
/// Below, the last stop of each service that was stopped, and how many stops it had, whoever stopped it: of about 1,024 services that differ in
/// name, those that were stopped last.
///
/// COMMAND is the name that the process had when it ended. WHEN is counted back from the wall clock as it is set now.
#[derive(Args)]
#[command(after_help = "\
Examples:
  zinit-tracker history              of every service
  zinit-tracker history web --json   of one, for a program

Exit status: 0, also if nobody has ended; 1 if there is no such service, or the books cannot be read.")]
pub(super) struct Options {
    /// Only this service, NAME or INSTANCE/NAME; it must be registered
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct History {
    /// How many records the kernel keeps at most, and how many it has.
    capacity: usize,
    records: usize,
    /// Whether records of services that are not registered any more may have been evicted.
    may_be_evicted: bool,
    services: Vec<Service>,
    processes: Vec<Process>,
    stops: Vec<Stops>,
}

/// A registered service.
#[derive(Serialize)]
struct Service {
    id: u32,
    instance: String,
    name: String,
    exits: u64,
    /// Deaths without a record: evicted, or nobody saw how.
    without_record: u64,
}

#[derive(Serialize)]
struct Process {
    service_id: u32,
    /// `INSTANCE/NAME`; none if it is not registered any more.
    service: Option<String>,
    pid: u32,
    tgid: u32,
    start_boottime_ns: u64,
    parent_tgid: u32,
    parent_start_boottime_ns: u64,
    comm: String,
    fate: Option<Fate>,
    ended_boottime_ns: u64,
    /// The same on the wall clock.
    ended: String,
    lived_ns: u64,
}

/// The stops of a service, under whichever id.
#[derive(Serialize)]
struct Stops {
    /// `INSTANCE/NAME`.
    service: String,
    count: u64,
    killed: u64,
    survived: u64,
    survivors: u64,
    unproven: u64,
    elapsed_us: u64,
    last: LastStop,
}

#[derive(Serialize)]
struct LastStop {
    service_id: u32,
    requested_boottime_ns: u64,
    /// The same on the wall clock.
    requested: String,
    elapsed_us: u64,
    killing_us: Option<u64>,
    kill_rounds: u32,
    gate: bool,
    processes: u32,
    survivors: u32,
    proven: bool,
    doubts: Vec<&'static str>,
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let tracker = match &options.name {
        None => global.existing()?,
        Some(_) => Some(global.existing_or_fail()?),
    };
    let history = match tracker {
        None => History::new(&[], None, &[], &[]),
        Some(tracker) => {
            let history = read(&tracker, options.name.as_deref());
            close(tracker);
            history?
        }
    };
    if options.json {
        output::print_json(&history)?;
        return Ok(ExitCode::SUCCESS);
    }
    pager::show(global, &history.table())?;
    history.say_what_is_missing();
    Ok(ExitCode::SUCCESS)
}

fn read(tracker: &Tracker, name: Option<&str>) -> anyhow::Result<History> {
    let only = name.map(|name| tracker.find(name)).transpose()?;
    // In this order: every death that is counted here has its record by the time that they are read.
    let services = tracker.services()?;
    let ended = tracker.history()?;
    Ok(History::new(&services, only.as_ref(), &ended, &tracker.stops()?))
}

impl History {
    fn new(services: &[ServiceInfo], only: Option<&ServiceInfo>, ended: &[Ended], stops: &[ServiceStops]) -> Self {
        let mut records: HashMap<u32, u64> = HashMap::new();
        for ended in ended {
            *records.entry(ended.service.number()).or_default() += 1;
        }
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let shown = |id| only.is_none_or(|only| only.id == id);
        let names: HashMap<u32, String> = services
            .iter()
            .map(|info| (info.id.number(), format!("{}/{}", info.instance, info.name)))
            .collect();
        Self {
            capacity: KEPT_EXITS,
            records: ended.len(),
            may_be_evicted: only.is_none() && ended.len() + FREE_PER_CPU * cpus >= KEPT_EXITS,
            services: services
                .iter()
                .filter(|info| shown(info.id))
                .map(|info| Service {
                    id: info.id.number(),
                    instance: info.instance.clone(),
                    name: info.name.clone(),
                    exits: info.exits,
                    without_record: info
                        .exits
                        .saturating_sub(records.get(&info.id.number()).copied().unwrap_or(0)),
                })
                .collect(),
            processes: ended
                .iter()
                .filter(|ended| shown(ended.service))
                .map(|ended| Process::new(ended, names.get(&ended.service.number()).cloned()))
                .collect(),
            stops: stops
                .iter()
                .filter(|stops| only.is_none_or(|only| only.instance == stops.instance && only.name == stops.name))
                .map(Stops::new)
                .collect(),
        }
    }

    fn table(&self) -> String {
        let mut text = paint::dim(&format!(
            "{:<24}  {:>9}  {:>7}  {:<12}  {:<15}  {}\n",
            "WHEN", "LIVED", "PID", "HOW", "COMMAND", "SERVICE"
        ));
        for process in &self.processes {
            let how = process.fate.map_or("unknown".to_owned(), |fate| fate.to_string());
            let service = match &process.service {
                Some(name) => output::plain(name),
                None => format!("service {}, not registered any more", process.service_id),
            };
            let how = paint::fate(process.fate, &format!("{how:<12}"));
            text.push_str(&format!(
                "{:<24}  {:>9}  {:>7}  {how}  {:<15}  {service}\n",
                process.ended,
                output::human(Duration::from_nanos(process.lived_ns)),
                process.pid,
                output::plain(&process.comm),
            ));
        }
        if !self.stops.is_empty() {
            text.push_str(&paint::dim(&format!(
                "\n{:<24}  {:>9}  {:>9}  {:>7}  {:<12}  {}\n",
                "LAST STOP", "TOOK", "PROCESSES", "STOPS", "OUTCOME", "SERVICE"
            )));
        }
        text.extend(self.stops.iter().map(Stops::line));
        text
    }

    fn say_what_is_missing(&self) {
        for service in &self.services {
            let name = format!("{}/{}", service.instance, service.name);
            say(&name, service.without_record, service.exits);
        }
        if self.may_be_evicted {
            output::note(&format!(
                "{} records: older ones, of services that are not registered any more, may have made room (the kernel keeps {})",
                self.records, self.capacity
            ));
        }
    }
}

/// Says on stderr if deaths of the service are missing in so many records.
pub(super) fn say_without_record(info: &ServiceInfo, records: u64) {
    let name = format!("{}/{}", info.instance, info.name);
    say(&name, info.exits.saturating_sub(records), info.exits);
}

fn say(name: &str, without_record: u64, exits: u64) {
    if without_record > 0 {
        output::note(&format!(
            "{name}: {without_record} of {exits} deaths have no record (the kernel keeps the newest {KEPT_EXITS} of all services)"
        ));
    }
}

impl Stops {
    fn new(stops: &ServiceStops) -> Self {
        let last = &stops.last;
        Self {
            service: format!("{}/{}", stops.instance, stops.name),
            count: stops.count,
            killed: stops.killed,
            survived: stops.survived,
            survivors: stops.survivors,
            unproven: stops.unproven,
            elapsed_us: microseconds(stops.elapsed),
            last: LastStop {
                service_id: last.service.number(),
                requested_boottime_ns: clock::nanoseconds(last.requested),
                requested: clock::wall(last.requested),
                elapsed_us: microseconds(last.elapsed),
                killing_us: last.killing.map(microseconds),
                kill_rounds: last.kill_rounds,
                gate: last.gate,
                processes: last.processes,
                survivors: last.survivors,
                proven: last.proven,
                doubts: last.doubts.clone(),
            },
        }
    }

    fn line(&self) -> String {
        let last = &self.last;
        let outcome = match (last.survivors, last.proven) {
            (0, true) => format!("{:<12}", "proven"),
            (0, false) => paint::alarm(&format!("{:<12}", "not proven")),
            (survivors, _) => paint::alarm(&format!("{:<12}", format!("{survivors} survived"))),
        };
        let why = match &last.doubts[..] {
            [] => String::new(),
            doubts => format!("  {}", doubts.join(", ")),
        };
        format!(
            "{:<24}  {:>9}  {:>9}  {:>7}  {outcome}  {}{why}\n",
            last.requested,
            output::human(Duration::from_micros(last.elapsed_us)),
            last.processes,
            self.count,
            output::plain(&self.service),
        )
    }
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Process {
    fn new(ended: &Ended, service: Option<String>) -> Self {
        Self {
            service_id: ended.service.number(),
            service,
            pid: ended.pid,
            tgid: ended.key.tgid,
            start_boottime_ns: ended.key.start_boottime_ns,
            parent_tgid: ended.parent.tgid,
            parent_start_boottime_ns: ended.parent.start_boottime_ns,
            comm: ended.comm.clone(),
            fate: ended.status.map(Fate::of_wait_status),
            ended_boottime_ns: clock::nanoseconds(ended.ended),
            ended: clock::wall(ended.ended),
            lived_ns: clock::nanoseconds(ended.ended.saturating_sub(ended.key.started())),
        }
    }
}
