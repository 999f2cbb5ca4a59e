//! `zinit-tracker metrics`: what the books say, for Prometheus.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use zinit_tracker::{
    metrics::{Format, Reading},
    process::rights,
    rpc::{HttpAddress, HttpServer},
};

use super::{Global, output};

/// Print metrics in the format of OpenMetrics, or serve them to Prometheus.
///
/// Of each service: living processes, forks, exits, who has escaped, and what speaks against the books; of all: capacity, failed operations,
/// dropped events, and how long each eBPF program ran (which the kernel measures only while `sysctl kernel.bpf_stats_enabled` is 1).
/// The books do not keep how long stops took and what survived them: `stop --report` says that.
///
/// With --listen, each `GET /metrics` reads them anew, until SIGINT or SIGTERM. Whoever reaches the address sees the names of all
/// services, so it is a loopback address unless you name another.
#[derive(Args)]
#[command(after_help = "\
Examples:
  zinit-tracker metrics
  zinit-tracker metrics --listen 127.0.0.1:9464

Exit status: 0, also if nothing is loaded, and after SIGINT or SIGTERM; 1 if it could not listen, or the books cannot be read.")]
pub(super) struct Options {
    /// Serve them there: ADDRESS:PORT, or :PORT on the loopback address; port 0 is any that is free
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<HttpAddress>,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let config = global.lasting_config()?;
    if options.listen.is_some() {
        rights::keep_only(rights::TO_READ | rights::TO_LISTEN).context("failed to give up rights")?;
    }
    // What cannot be read now is not worth listening for.
    let reading = Reading::take(&config)?;
    let Some(address) = &options.listen else {
        if !reading.is_loaded() {
            output::note("no service is registered");
        }
        output::print(
            &reading
                .text(Format::OpenMetrics)
                .context("failed to write the metrics")?,
        )?;
        return Ok(ExitCode::SUCCESS);
    };
    let failed = "failed to handle signals";
    let mut interrupted = signal(SignalKind::interrupt()).context(failed)?;
    let mut terminated = signal(SignalKind::terminate()).context(failed)?;
    let server = HttpServer::metrics(address, config).await?;
    output::note(&format!("metrics are served at http://{}/metrics", server.address()));
    tokio::select! {
        _ = interrupted.recv() => {}
        _ = terminated.recv() => {}
    }
    drop(server);
    Ok(ExitCode::SUCCESS)
}
