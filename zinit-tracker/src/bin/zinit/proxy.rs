//! `zinit proxy`: HTTP in front of the supervisor's socket.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use zinit_tracker::{
    process::rights,
    rpc::{HttpAddress, HttpServer},
};

use super::{Global, print};

/// Answer JSON-RPC over HTTP POST, until Ctrl-C
///
/// Whoever reaches the address controls the services, so it is a loopback address unless you name another. Requests of
/// web pages, and for hosts other than this one, are refused.
#[derive(Args)]
#[command(after_help = "Example: zinit proxy --address 127.0.0.1:8080\n\n\
    Exit status: 0 after Ctrl-C or SIGTERM, 1 if it could not listen or the supervisor does not answer.")]
pub(super) struct Options {
    /// Where to listen: ADDRESS:PORT, or :PORT on the loopback address
    #[arg(short, long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    address: HttpAddress,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    rights::keep_only(rights::TO_LISTEN).context("failed to give up rights")?;
    // A proxy to nowhere helps nobody.
    drop(global.connect().await?);
    let failed = "failed to handle signals";
    let mut interrupted = signal(SignalKind::interrupt()).context(failed)?;
    let mut terminated = signal(SignalKind::terminate()).context(failed)?;
    let server = HttpServer::start(&options.address, global.socket.clone()).await?;
    print::print(&format!(
        "HTTP/RPC server started at {}\nPress Ctrl+C to stop\n",
        server.address()
    ))?;
    tokio::select! {
        _ = interrupted.recv() => {}
        _ = terminated.recv() => {}
    }
    drop(server);
    print::print("HTTP/RPC server stopped\n")?;
    Ok(ExitCode::SUCCESS)
}
