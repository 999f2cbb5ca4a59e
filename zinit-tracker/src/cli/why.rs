//! `zinit-tracker why`: which service a process belongs to, and through whom.

use std::process::ExitCode;

use clap::Args;
use zinit_tracker::tracker::{Lineage, Link};

use super::{Global, close, output, pager, paint, parse};

/// Show which service a process belongs or belonged to, and who created it.
///
/// Each line is the creator of the one before, also if it is dead: the kernel keeps the records of the newest 16,384.
#[derive(Args)]
#[command(after_help = "Example: zinit-tracker why 4711\n\n\
    Exit status: 0, or 1 if the process belongs to no service or it failed.")]
pub(super) struct Options {
    /// The process; it may be dead
    #[arg(value_parser = parse::pid)]
    pid: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let tracker = global.existing_or_fail()?;
    let result = tracker.lineage(options.pid);
    close(tracker);
    let lineage = result?;
    if options.json {
        output::print_json(&lineage)?;
    } else {
        pager::show(global, &describe(options.pid, &lineage))?;
    }
    if lineage.pid_reused {
        let pid = options.pid;
        output::note(&format!(
            "pid {pid} is another process now, which belongs to no service"
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(pid: u32, lineage: &Lineage) -> String {
    let alive = lineage.line.first().is_some_and(|link| link.alive);
    let belongs = if alive { "belongs" } else { "belonged" };
    let mut text = match &lineage.service {
        Some(info) => {
            let name = paint::title(&format!("{}/{}", info.instance, info.name));
            format!("{pid} {belongs} to {name}\n")
        }
        None => format!(
            "{pid} {belongs} to service {}, which is not registered any more\n",
            lineage.service_id
        ),
    };
    text.extend(lineage.line.iter().map(link));
    let creator = &lineage.creator;
    text.push_str(&match &creator.alive {
        Some(alive) => format!("{:>7}  {:<15}  no member\n", alive.pid, output::plain(&alive.comm)),
        None => format!("{:>7}  {:<15}  dead, and no record of it\n", creator.key.tgid, "?"),
    });
    text
}

fn link(link: &Link) -> String {
    let mut notes = Vec::new();
    if link.main {
        notes.push("main process".to_owned());
    }
    if !link.alive {
        notes.push(paint::dead(&match link.fate {
            Some(fate) => format!("dead: {fate}"),
            None => "dead".to_owned(),
        }));
    }
    let line = format!(
        "{:>7}  {:<15}  {}",
        link.pid,
        output::plain(&link.comm),
        notes.join(", ")
    );
    format!("{}\n", line.trim_end())
}
