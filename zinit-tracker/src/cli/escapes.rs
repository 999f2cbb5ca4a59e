//! `zinit-tracker escapes`: who has left its service's session, group, parents, cgroup or namespaces.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use zinit_tracker::{
    ServiceInfo,
    tracker::{Escape, Link},
};

use super::{Global, listing::listed, output, pager, paint};

/// Show the processes of services that have left what other supervisors go by.
///
/// That is the session or the process group that the service began in, their creator (which is dead, and their parent is no
/// process of the service), or the cgroup (version 2) or a namespace of the main process. It is told from where they are
/// now: it is not known when they left. A stop ends them all the same.
#[derive(Args)]
#[command(after_help = "\
Examples:
  zinit-tracker escapes              of every service
  zinit-tracker escapes web --json   of one, for a program

Exit status: 0, also if nobody has left; 1 if there is no such service, or the books cannot be read.")]
pub(super) struct Options {
    /// Only this service: NAME or INSTANCE/NAME
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A service and who has left it, as JSON shows it.
#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    info: ServiceInfo,
    escapes: Vec<Escape>,
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let listed = listed(global, options.name.as_deref(), |tracker, info| {
        let escapes = tracker.escapes(&info.handle())?;
        Ok(Listed { info, escapes })
    })?;
    if options.json {
        output::print_json(&listed)?;
        return Ok(ExitCode::SUCCESS);
    }
    if listed.is_empty() {
        output::note("no service is registered");
    }
    pager::show(global, &listed.iter().map(describe).collect::<String>())?;
    Ok(ExitCode::SUCCESS)
}

fn describe(listed: &Listed) -> String {
    let info = &listed.info;
    let escapes = &listed.escapes;
    let left = output::counted(escapes.len(), "has left something", "have left something");
    let name = paint::title(&format!("{}/{}", info.instance, info.name));
    let mut text = format!("{name}: {} live, {left}\n", info.live);
    for escape in escapes {
        let member = &escape.member;
        text.push_str(&format!("{:>7}  {}\n", member.pid, output::plain(&member.comm)));
        for departure in &escape.left {
            let left = paint::escaped(&format!("left {}", output::plain(&departure.to_string())));
            text.push_str(&format!("         {left}\n"));
        }
        if let Some(creator) = escape.line.get(1) {
            text.push_str(&format!("         created by {}\n", name_of(creator)));
        }
    }
    text
}

/// A creator, for people.
pub(super) fn name_of(link: &Link) -> String {
    let mut text = format!("{} {}", link.pid, output::plain(&link.comm));
    if link.main {
        text.push_str(", the main process");
    }
    if !link.alive {
        let fate = link.fate.map(|fate| format!(": {fate}")).unwrap_or_default();
        text.push_str(&format!(", {}", paint::dead(&format!("dead{fate}"))));
    }
    text
}
