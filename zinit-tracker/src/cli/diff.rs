//! `zinit-tracker diff`: what other supervisors would have found of a service.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use zinit_tracker::{
    ServiceInfo,
    tracker::{Comparison, Finding, Missed, Stranger},
};

use super::{Global, close, output, pager, paint};

/// How many processes each list for people names.
const MOST_LINES: usize = 20;

/// Compare a service's processes with what other supervisors would find.
///
/// Those go by parents (a walk through /proc, from the processes that were started for the service and live), by the process group or the
/// session of the main process, or by its cgroup: version 2, or version 1 where version 2 is not used. For each is shown how many of the
/// processes in the kernel's books it finds, whom it misses and why, and whom it finds though they are not the service's. /proc is read
/// process by process: who comes or goes meanwhile is left out, as is this program.
#[derive(Args)]
#[command(after_help = "\
Examples:
  zinit-tracker diff web
  zinit-tracker diff web --json

Exit status: 0 if they could be compared, whatever the difference; 1 if there is no such service, or it failed.")]
pub(super) struct Options {
    /// The service: NAME or INSTANCE/NAME
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// As JSON shows it.
#[derive(Serialize)]
struct Compared {
    #[serde(flatten)]
    info: ServiceInfo,
    #[serde(flatten)]
    comparison: Comparison,
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let tracker = global.existing_or_fail()?;
    let compared = tracker.find(&options.name).and_then(|info| {
        let comparison = tracker.compare(&info.handle())?;
        Ok(Compared { info, comparison })
    });
    close(tracker);
    let compared = compared?;
    if options.json {
        output::print_json(&compared)?;
    } else {
        pager::show(global, &describe(&compared))?;
    }
    let restless = compared.comparison.came_or_went;
    if restless > 0 {
        output::note(&format!("{restless} came or went meanwhile, and are left out"));
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(compared: &Compared) -> String {
    let (info, comparison) = (&compared.info, &compared.comparison);
    let members = comparison.members.len();
    let mut text = format!(
        "{}: {} in the kernel's books\n",
        paint::title(&format!("{}/{}", info.instance, info.name)),
        output::counted(members, "process", "processes")
    );
    for finding in &comparison.methods {
        text.push_str(&headline(finding, members));
        text.extend(finding.missed.iter().take(MOST_LINES).map(missed));
        text.push_str(&more(finding.missed.len(), "missed"));
        text.extend(finding.strangers.iter().take(MOST_LINES).map(stranger));
        text.push_str(&more(finding.strangers.len(), "not of the service"));
    }
    text
}

fn headline(finding: &Finding, members: usize) -> String {
    let mut text = format!(
        "{}: finds {} of {members}",
        output::plain(&finding.method.to_string()),
        finding.found
    );
    if !finding.strangers.is_empty() {
        let others = output::counted(finding.strangers.len(), "that is", "that are");
        text.push_str(&format!(", and {others} not of the service"));
    }
    text.push('\n');
    text
}

fn missed(missed: &Missed) -> String {
    format!(
        "  {:>7}  {:<15}  {}\n",
        missed.member.pid,
        output::plain(&missed.member.comm),
        paint::escaped(&format!("MISSED: {}", output::plain(&missed.why.to_string())))
    )
}

fn stranger(stranger: &Stranger) -> String {
    let whose = match &stranger.service {
        Some(service) => format!("of {}", output::plain(service)),
        None => format!("of no service, parent {}", stranger.ppid),
    };
    format!(
        "  {:>7}  {:<15}  {}\n",
        stranger.pid,
        output::plain(&stranger.comm),
        paint::dim(&format!("not of the service: {whose}"))
    )
}

/// How many are not named.
fn more(count: usize, what: &str) -> String {
    match count.saturating_sub(MOST_LINES) {
        0 => String::new(),
        more => format!("  … and {more} more {what}\n"),
    }
}
