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
pub(super) struct Options {
    /// Only this service: NAME or INSTANCE/NAME
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A service with its members, as JSON shows it.
#[derive(Serialize)]
pub(super) struct Listed {
    #[serde(flatten)]
    pub(super) info: ServiceInfo,
    pub(super) processes: Vec<Member>,
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let services = listed(global, options.name.as_deref())?;
    if options.json {
        output::print_json(&services)?;
        return Ok(ExitCode::SUCCESS);
    }
    if services.is_empty() {
        output::note("no service is registered");
    }
    let mut text = String::new();
    for service in &services {
        text.push_str(&headline(&service.info));
        text.push_str(&output::members(&service.processes));
    }
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// The services that were asked for, with their members. Where nothing is pinned there are none.
pub(super) fn listed(global: &Global, name: Option<&str>) -> anyhow::Result<Vec<Listed>> {
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
pub(super) fn headline(info: &ServiceInfo) -> String {
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
