//! `zinit-tracker ps`: services and their processes.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;
use zinit_tracker::{Member, ServiceInfo, Tracker};

use super::{Global, output};

/// List services and their processes, as the kernel knows them.
///
/// PPID is the process that created it, which getppid() may not say any more; SESSION and GROUP are those it was created
/// with.
#[derive(Args)]
#[group(id = "listing")]
pub(super) struct Options {
    /// Only this service: NAME or INSTANCE/NAME
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A service with its members, as JSON shows it.
#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    info: ServiceInfo,
    processes: Vec<Member>,
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    show(global, options, output::members)
}

/// Prints the services that were asked for, each with its members drawn as `draw` does.
pub(super) fn show(global: &Global, options: &Options, draw: fn(&[Member]) -> String) -> anyhow::Result<ExitCode> {
    let services = listed(global, options.name.as_deref())?;
    if options.json {
        output::print_json(&services)?;
        return Ok(ExitCode::SUCCESS);
    }
    if services.is_empty() {
        output::note("no service is registered");
    }
    let drawn = services
        .iter()
        .map(|service| headline(&service.info) + &draw(&service.processes));
    output::print(&drawn.collect::<String>())?;
    Ok(ExitCode::SUCCESS)
}

/// The services that were asked for, with their members. Where nothing is pinned there are none.
fn listed(global: &Global, name: Option<&str>) -> anyhow::Result<Vec<Listed>> {
    let Some(tracker) = (match name {
        None => global.existing()?,
        Some(_) => Some(global.existing_or_fail()?),
    }) else {
        return Ok(Vec::new());
    };
    let services = match name {
        Some(name) => vec![tracker.find(name)?],
        None => tracker.services()?,
    };
    let listed = with_members(&tracker, services);
    super::close(tracker);
    listed
}

fn with_members(tracker: &Tracker, services: Vec<ServiceInfo>) -> anyhow::Result<Vec<Listed>> {
    services
        .into_iter()
        .map(|info| {
            let processes = tracker.processes(&info.handle())?;
            Ok(Listed { info, processes })
        })
        .collect()
}

/// One line on a service.
fn headline(info: &ServiceInfo) -> String {
    let state = match info.state {
        zinit_tracker::tracker::ServiceState::Up => "up",
        zinit_tracker::tracker::ServiceState::Stopping => "stopping",
        zinit_tracker::tracker::ServiceState::Killing => "killing",
    };
    let mut line = format!(
        "{}/{}: {state}, {} live, {} ever, peak {}",
        info.instance, info.name, info.live, info.forks, info.peak
    );
    if info.adopted {
        line.push_str(", adopted");
    }
    if info.lost > 0 {
        line.push_str(&format!(", {} operations LOST", info.lost));
    }
    line.push('\n');
    line
}
