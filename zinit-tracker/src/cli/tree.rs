//! `zinit-tracker tree`: services and their processes by who created whom.

use std::{
    collections::{HashMap, HashSet},
    process::ExitCode,
};

use clap::Args;
use serde::Serialize;
use zinit_tracker::{Member, ServiceInfo, process::ProcessKey, stop::Fate, tracker::Ended};

use super::{Global, history, listing::listed, output, pager, ps};

/// Show services and their processes as trees of who created whom.
///
/// Creation does not change when a process is reparented; a process whose creator has died stands at the top. With --dot, the dead
/// are shown too, as far as the kernel has records: the newest 16,384 of all services.
#[derive(Args)]
#[command(after_help = "\
Examples:
  zinit-tracker tree
  zinit-tracker tree web --dot | dot -Tsvg > web.svg

Exit status: 0, or 1 if it failed.")]
pub(super) struct Options {
    /// Only this service: NAME or INSTANCE/NAME
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print a graph for Graphviz, of all processes that the service has had: dead ones dashed, with how they ended
    #[arg(long, conflicts_with = "json")]
    dot: bool,
}

/// A service with its members, as JSON shows it.
#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    info: ServiceInfo,
    processes: Vec<Member>,
    #[serde(skip)]
    ended: Vec<Ended>,
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let services = listed(global, options.name.as_deref(), |tracker, info| {
        // The living first: one that dies in between is among the dead then.
        let processes = tracker.processes(&info.handle())?;
        let mut ended = if options.dot { tracker.history()? } else { Vec::new() };
        ended.retain(|ended| ended.service == info.id && processes.iter().all(|member| member.key != ended.key));
        Ok(Listed { info, processes, ended })
    })?;
    if options.json {
        output::print_json(&services)?;
        return Ok(ExitCode::SUCCESS);
    }
    if services.is_empty() {
        output::note("no service is registered");
    }
    if options.dot {
        output::print(&dot(&services))?;
        for service in &services {
            history::say_without_record(&service.info, service.ended.len() as u64);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let drawn = services
        .iter()
        .map(|service| ps::headline(&service.info) + &tree(&service.processes));
    pager::show(global, &drawn.collect::<String>())?;
    Ok(ExitCode::SUCCESS)
}

/// A graph in the language of Graphviz: a box a process, an arrow from its creator.
fn dot(services: &[Listed]) -> String {
    let mut text = "digraph processes {\n  node [shape=box];\n".to_owned();
    let mut edges = Vec::new();
    let mut keys = HashSet::new();
    for service in services {
        let name = format!("{}/{}", service.info.instance, service.info.name);
        text.push_str(&format!(
            "  subgraph cluster_{} {{\n    label={};\n",
            service.info.id,
            quoted(&[&name])
        ));
        for ended in &service.ended {
            let how = ended
                .status
                .map_or("ended".to_owned(), |status| Fate::of_wait_status(status).to_string());
            let label = quoted(&[&format!("{} {}", ended.pid, ended.comm), &how]);
            text.push_str(&format!("    \"{}\" [label={label}, style=dashed];\n", ended.key));
            edges.push((ended.parent, ended.key));
        }
        for member in &service.processes {
            let label = quoted(&[&format!("{} {}", member.pid, member.comm)]);
            text.push_str(&format!("    \"{}\" [label={label}];\n", member.key));
            edges.push((member.parent, member.key));
        }
        text.push_str("  }\n");
    }
    keys.extend(edges.iter().map(|(_, child)| *child));
    for (creator, child) in edges.iter().filter(|(creator, _)| keys.contains(creator)) {
        text.push_str(&format!("  \"{creator}\" -> \"{child}\";\n"));
    }
    text.push_str("}\n");
    text
}

/// Lines as one string of Graphviz. Names are others' choice: nothing in them ends the string or the line.
fn quoted(lines: &[&str]) -> String {
    let lines: Vec<_> = lines
        .iter()
        .map(|line| output::plain(line).replace('\\', "\\\\").replace('"', "\\\""))
        .collect();
    format!("\"{}\"", lines.join("\\n"))
}

/// A process in a tree, which follows its creator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// Its index among the members.
    pub(super) member: usize,
    /// The index of its creator's row; `None`: it stands at the top.
    pub(super) above: Option<usize>,
    /// How many rows stand above it.
    pub(super) depth: usize,
    /// Whether no other process of the same creator follows.
    is_last: bool,
}

/// The members, each below its creator.
pub(super) fn rows(members: &[Member]) -> Vec<Row> {
    let known: HashSet<ProcessKey> = members.iter().map(|member| member.key).collect();
    let mut children: HashMap<ProcessKey, Vec<usize>> = HashMap::new();
    let mut top = Vec::new();
    for (index, member) in members.iter().enumerate() {
        if known.contains(&member.parent) {
            children.entry(member.parent).or_default().push(index);
        } else {
            top.push(index);
        }
    }
    let mut rows: Vec<Row> = Vec::with_capacity(members.len());
    // Depth first with a stack of its own: a chain of generations may be as long as the books are large.
    let mut stack: Vec<Row> = Vec::new();
    let push = |stack: &mut Vec<Row>, born: &[usize], above, depth| {
        for (index, member) in born.iter().enumerate().rev() {
            stack.push(Row {
                member: *member,
                above,
                depth,
                is_last: index + 1 == born.len(),
            });
        }
    };
    push(&mut stack, &top, None, 0);
    while let Some(row) = stack.pop() {
        let (here, depth) = (rows.len(), row.depth + 1);
        let key = members[row.member].key;
        rows.push(row);
        if let Some(born) = children.get(&key) {
            push(&mut stack, born, Some(here), depth);
        }
    }
    rows
}

/// What stands before a process: its branch, and those of the `most` rows next above that go on below it.
pub(super) fn branches(rows: &[Row], row: &Row, most: usize) -> String {
    let mut pieces = vec![if row.is_last { "└─" } else { "├─" }];
    let mut above = row.above;
    while let Some(index) = above {
        if pieces.len() > most {
            break;
        }
        pieces.push(if rows[index].is_last { "   " } else { "│  " });
        above = rows[index].above;
    }
    pieces.into_iter().rev().collect()
}

fn tree(members: &[Member]) -> String {
    let rows = rows(members);
    let mut text = String::new();
    for row in &rows {
        let member = &members[row.member];
        text.push_str(&format!(
            "{} {} {}\n",
            branches(&rows, row, usize::MAX),
            member.pid,
            output::plain(&member.comm)
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn a_name_does_not_end_its_string() {
        assert_eq!(quoted(&["a\"b\\", "c\nd"]), r#""a\"b\\\nc\\nd""#);
    }
}
