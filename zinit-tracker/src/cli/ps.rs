//! `zinit-tracker ps`: services and their processes.

use std::{cmp::Reverse, collections::HashMap, process::ExitCode, time::Duration};

use clap::{Args, ValueEnum};
use nix::unistd::{Uid, User};
use serde::Serialize;
use zinit_tracker::{Member, ServiceInfo, Tracker, tracker::MemberUsage};

use super::{Global, clock, listing::listed, output, pager, paint};

/// List services and their processes, as the kernel knows them.
///
/// PPID is the process that created it, which getppid() may not say any more; SESSION and GROUP are those it was created
/// with. USER, CPU, MEMORY and STATE are what /proc shows, each read at its own moment: the user that it acts as, processor time
/// since its start, resident memory, and the state as proc_pid_stat(5) has it; `?` if it has ended meanwhile.
#[derive(Args)]
#[command(after_help = "\
Examples:
  zinit-tracker ps --json
  zinit-tracker ps --columns service,pid,cpu,memory,command --sort memory

Exit status: 0, or 1 if it failed.")]
pub(super) struct Options {
    /// Only this service: NAME or INSTANCE/NAME
    name: Option<String>,
    /// What to show of each process; with `service` among it, all services are one table
    #[arg(long, value_enum, value_delimiter = ',', value_name = "COLUMN,…",
          default_values = ["pid", "ppid", "session", "group", "command"])]
    columns: Vec<Column>,
    /// Sort the processes of each service by it: age, cpu and memory the largest first; else the oldest member is first
    #[arg(long, value_enum, value_name = "COLUMN")]
    sort: Option<Column>,
    /// Print JSON; with `usage` of each process if --columns or --sort name user, cpu, memory or state
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Column {
    Pid,
    Ppid,
    Service,
    Session,
    Group,
    User,
    Age,
    Cpu,
    Memory,
    State,
    Command,
}

/// A service with its members, as JSON shows it.
#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    info: ServiceInfo,
    processes: Vec<Process>,
}

#[derive(Serialize)]
struct Process {
    #[serde(flatten)]
    member: Member,
    #[serde(skip)]
    service: String,
    /// None if it was not asked for, or the process has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

#[derive(Serialize)]
struct Usage {
    uid: u32,
    user: String,
    state: char,
    cpu_ns: u64,
    memory_bytes: u64,
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let used = |column: &Column| matches!(column, Column::User | Column::Cpu | Column::Memory | Column::State);
    let usage = options.columns.iter().chain(&options.sort).any(used);
    let mut services = listed(global, options.name.as_deref(), |tracker, info| {
        let service = format!("{}/{}", info.instance, info.name);
        let mut processes = Vec::new();
        for member in tracker.processes(&info.handle())? {
            let usage = if usage { tracker.usage(&member)? } else { None };
            processes.push(Process {
                member,
                service: service.clone(),
                usage: usage.map(Usage::from),
            });
        }
        Ok(Listed { info, processes })
    })?;
    if let Some(column) = options.sort {
        services
            .iter_mut()
            .for_each(|service| sort(&mut service.processes, column));
    }
    if options.json {
        output::print_json(&services)?;
        return Ok(ExitCode::SUCCESS);
    }
    if services.is_empty() {
        output::note("no service is registered");
    }
    let text = if options.columns.contains(&Column::Service) {
        let mut processes: Vec<_> = services.into_iter().flat_map(|service| service.processes).collect();
        if let Some(column) = options.sort {
            sort(&mut processes, column);
        }
        table(&processes, &options.columns)
    } else {
        let drawn = services
            .iter()
            .map(|service| headline(&service.info) + &table(&service.processes, &options.columns));
        drawn.collect()
    };
    pager::show(global, &text)?;
    Ok(ExitCode::SUCCESS)
}

impl From<MemberUsage> for Usage {
    fn from(usage: MemberUsage) -> Self {
        let user = User::from_uid(Uid::from_raw(usage.uid)).ok().flatten();
        Self {
            uid: usage.uid,
            user: user.map_or(usage.uid.to_string(), |user| user.name),
            state: usage.state,
            cpu_ns: clock::nanoseconds(usage.cpu),
            memory_bytes: usage.memory,
        }
    }
}

fn sort(processes: &mut [Process], column: Column) {
    let usage = |process: &Process, of: fn(&Usage) -> u64| Reverse(process.usage.as_ref().map(of));
    match column {
        Column::Pid => processes.sort_by_key(|process| process.member.pid),
        Column::Ppid => processes.sort_by_key(|process| process.member.parent.tgid),
        Column::Service => processes.sort_by_key(|process| process.service.clone()),
        Column::Session => processes.sort_by_key(|process| process.member.session),
        Column::Group => processes.sort_by_key(|process| process.member.group),
        Column::User => processes.sort_by_key(|process| process.usage.as_ref().map(|usage| usage.user.clone())),
        Column::Age => processes.sort_by_key(|process| process.member.key.started()),
        Column::Cpu => processes.sort_by_key(|process| usage(process, |usage| usage.cpu_ns)),
        Column::Memory => processes.sort_by_key(|process| usage(process, |usage| usage.memory_bytes)),
        Column::State => processes.sort_by_key(|process| process.usage.as_ref().map(|usage| usage.state)),
        Column::Command => processes.sort_by_key(|process| process.member.comm.clone()),
    }
}

impl Process {
    /// Whether it waits for its parent to reap it, as far as that was asked for.
    fn is_dead(&self) -> bool {
        self.usage
            .as_ref()
            .is_some_and(|usage| matches!(usage.state, 'Z' | 'X'))
    }
}

impl Column {
    fn is_text(self) -> bool {
        matches!(self, Self::Service | Self::User | Self::State | Self::Command)
    }

    fn title(self) -> String {
        format!("{self:?}").to_uppercase()
    }

    fn value(self, process: &Process) -> String {
        let member = &process.member;
        let usage = |of: &dyn Fn(&Usage) -> String| process.usage.as_ref().map_or("?".to_owned(), of);
        match self {
            Self::Pid => member.pid.to_string(),
            Self::Ppid => member.parent.tgid.to_string(),
            Self::Service => output::plain(&process.service),
            Self::Session => member.session.to_string(),
            Self::Group => member.group.to_string(),
            Self::User => usage(&|usage| output::plain(&usage.user)),
            Self::Age => coarse(Tracker::now().saturating_sub(member.key.started())),
            Self::Cpu => usage(&|usage| format!("{:.2} s", Duration::from_nanos(usage.cpu_ns).as_secs_f64())),
            Self::Memory => usage(&|usage| format!("{:.1} MiB", usage.memory_bytes as f64 / 1_048_576.0)),
            Self::State => usage(&|usage| usage.state.to_string()),
            Self::Command => output::plain(&member.comm),
        }
    }
}

/// An age in whole seconds, its two largest units.
pub(super) fn coarse(age: Duration) -> String {
    let seconds = age.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{:02}s", seconds % 60),
        (0, _, _) => format!("{hours}h{minutes:02}m"),
        _ => format!("{days}d{hours:02}h"),
    }
}

/// A column is as wide as what is in it, a number at least as wide as a pid.
fn table(processes: &[Process], columns: &[Column]) -> String {
    let mut lines: Vec<Vec<String>> = vec![columns.iter().map(|column| column.title()).collect()];
    lines.extend(
        processes
            .iter()
            .map(|process| columns.iter().map(|column| column.value(process)).collect()),
    );
    let mut widths: HashMap<usize, usize> = HashMap::new();
    for line in &lines {
        for (index, value) in line.iter().enumerate() {
            let least = if columns[index].is_text() { 0 } else { 7 };
            let width = widths.entry(index).or_insert(least);
            *width = (*width).max(value.chars().count());
        }
    }
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        let mut row = String::new();
        for (index, value) in line.iter().enumerate() {
            let width = widths.get(&index).copied().unwrap_or(0);
            match (index, columns[index].is_text()) {
                (0, true) => row.push_str(&format!("{value:<width$}")),
                (0, false) => row.push_str(&format!("{value:>width$}")),
                (_, true) => row.push_str(&format!("  {value:<width$}")),
                (_, false) => row.push_str(&format!(" {value:>width$}")),
            }
        }
        let row = row.trim_end();
        text.push_str(&match number.checked_sub(1).map(|index| &processes[index]) {
            None => paint::dim(row),
            Some(process) if process.is_dead() => paint::dead(row),
            Some(_) => row.to_owned(),
        });
        text.push('\n');
    }
    text
}

/// One line on a service.
pub(super) fn headline(info: &ServiceInfo) -> String {
    let state = info.state.name();
    let name = paint::title(&format!("{}/{}", info.instance, info.name));
    let mut line = format!(
        "{name}: {state}, {} live, {} ever, peak {}",
        info.live, info.forks, info.peak
    );
    if info.adopted {
        line.push_str(", adopted");
    }
    if info.lost > 0 {
        line.push_str(&paint::alarm(&format!(", {} operations LOST", info.lost)));
    }
    line.push('\n');
    line
}
