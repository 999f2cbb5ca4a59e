//! `zinit`: starts services, keeps them running, and stops them so that nothing of them is left.
//!
//! One file a subcommand. `init` is the supervisor; the others are its clients.

mod check;
mod completions;
mod forget;
mod handover;
mod init;
mod kill;
mod list;
mod log;
mod man;
#[path = "../../cli/manual.rs"]
mod manual;
mod monitor;
#[path = "../../cli/print.rs"]
mod print;
mod proxy;
mod reboot;
mod reload;
mod restart;
#[cfg(test)]
#[path = "../../cli/schemas.rs"]
mod schemas;
mod shutdown;
mod start;
mod stats;
mod status;
mod stderr;
mod stop;
mod upgrade;
mod yaml;

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use tracing_subscriber::{EnvFilter, fmt::writer::BoxMakeWriter};
use zinit_tracker::rpc::{Client, ClientError};

/// Start services, keep them running, and stop them so that nothing of them is left.
///
/// Without a command, lists the services.
#[derive(Parser)]
#[command(
    name = "zinit",
    version,
    propagate_version = true,
    after_help = "Examples:\n  \
        zinit check /etc/zinit && zinit init\n  \
        zinit status web\n  \
        zinit stop web && echo nothing of it is left\n\n\
        Exit status: 0, or 1 if what was asked for is not so; stderr says why."
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Option<Command>,
}

/// Options of every command, in front of it or behind it.
#[derive(Args)]
#[command(next_help_heading = "Options of every command")]
struct Global {
    /// The supervisor's Unix socket
    #[arg(
        short,
        long,
        global = true,
        value_name = "PATH",
        default_value = "/var/run/zinit.sock"
    )]
    socket: PathBuf,
    /// Say more on stderr (RUST_LOG overrides)
    #[arg(short, long, global = true)]
    debug: bool,
}

#[derive(Subcommand)]
enum Command {
    Init(init::Options),
    List(list::Options),
    Status(status::Options),
    Start(start::Options),
    Stop(stop::Options),
    Restart(restart::Options),
    Monitor(monitor::Options),
    Forget(forget::Options),
    Kill(kill::Options),
    Log(log::Options),
    Stats(stats::Options),
    Reload(reload::Options),
    Check(check::Options),
    Upgrade(upgrade::Options),
    Shutdown(shutdown::Options),
    Reboot(reboot::Options),
    Proxy(proxy::Options),
    Completions(completions::Options),
    Man(man::Options),
}

impl Global {
    /// Connects to the supervisor.
    async fn connect(&self) -> Result<Client, ClientError> {
        Client::connect(&self.socket).await
    }

    /// Asks the supervisor for something that has no result but success.
    async fn ask(&self, method: &str, params: serde_json::Value) -> anyhow::Result<ExitCode> {
        let () = self.connect().await?.call(method, params).await?;
        Ok(ExitCode::SUCCESS)
    }
}

fn main() -> ExitCode {
    handover::take_variable();
    let cli = match Cli::try_parse() {
        Ok(cli) if cli.command.is_none() && is_pid_1() => supervise(),
        Ok(cli) => cli,
        Err(usage) if is_pid_1() => {
            // The kernel passes on words of its command line that are not meant for init.
            explain(&usage);
            supervise()
        }
        Err(usage) => return explain(&usage),
    };
    log_to_stderr(&cli);
    let result = match &cli.command {
        Some(Command::Init(options)) => init::run(&cli.global, options),
        Some(Command::Check(options)) => check::run(options),
        Some(Command::Completions(options)) => completions::run(options),
        Some(Command::Man(options)) => man::run(options),
        command => runtime().and_then(|runtime| runtime.block_on(execute(&cli.global, command.as_ref()))),
    };
    match result {
        Ok(status) => status,
        Err(error) => {
            print::failure(&error);
            ExitCode::FAILURE
        }
    }
}

/// Whether the system ends with this process.
fn is_pid_1() -> bool {
    std::process::id() == 1
}

/// What PID 1 does unless it is told otherwise.
fn supervise() -> Cli {
    Cli::parse_from(["zinit", "init"])
}

/// Prints what clap has to say: help, the version, or what is wrong with the arguments, which has status 1 as any error.
fn explain(usage: &clap::Error) -> ExitCode {
    // Nobody can be told if stdout or stderr is gone.
    drop(usage.print());
    if usage.use_stderr() {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

async fn execute(global: &Global, command: Option<&Command>) -> anyhow::Result<ExitCode> {
    match command {
        None => list::run(global, &list::Options::default()).await,
        Some(Command::List(options)) => list::run(global, options).await,
        Some(Command::Status(options)) => status::run(global, options).await,
        Some(Command::Start(options)) => start::run(global, options).await,
        Some(Command::Stop(options)) => stop::run(global, options).await,
        Some(Command::Restart(options)) => restart::run(global, options).await,
        Some(Command::Monitor(options)) => monitor::run(global, options).await,
        Some(Command::Forget(options)) => forget::run(global, options).await,
        Some(Command::Kill(options)) => kill::run(global, options).await,
        Some(Command::Log(options)) => log::run(global, options).await,
        Some(Command::Stats(options)) => stats::run(global, options).await,
        Some(Command::Reload(options)) => reload::run(global, options).await,
        Some(Command::Upgrade(options)) => upgrade::run(global, options).await,
        Some(Command::Shutdown(options)) => shutdown::run(global, options).await,
        Some(Command::Reboot(options)) => reboot::run(global, options).await,
        Some(Command::Proxy(options)) => proxy::run(global, options).await,
        // `main` has seen to these: they need no supervisor.
        Some(Command::Init(_) | Command::Check(_) | Command::Completions(_) | Command::Man(_)) => Ok(ExitCode::FAILURE),
    }
}

/// The supervisor says what becomes of services; clients speak up only if something is wrong.
fn log_to_stderr(cli: &Cli) {
    let serves = matches!(cli.command, Some(Command::Init(_)));
    let filter = match (std::env::var("RUST_LOG"), cli.global.debug, serves) {
        (Ok(directives), _, _) => EnvFilter::new(directives),
        (Err(_), true, _) => EnvFilter::new("warn,zinit=debug,zinit_tracker=debug"),
        (Err(_), false, true) => EnvFilter::new("warn,zinit::init=info,zinit_tracker=info"),
        (Err(_), false, false) => EnvFilter::new("warn"),
    };
    let writer = match serves.then(stderr::queue) {
        Some(Ok(queue)) => BoxMakeWriter::new(move || queue.clone()),
        // Without a thread for it, lines are written where they come from.
        Some(Err(_)) | None => BoxMakeWriter::new(std::io::stderr),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .log_internal_errors(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .init();
}

/// One thread is enough for a client: its work is waiting.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_is_printed_as_json_has_a_schema() {
        schemas::assert_complete(&Cli::command(), "zinit-", |name| name.starts_with("zinit-"));
    }

    #[test]
    fn the_socket_is_named_before_or_behind_the_command() {
        for (arguments, socket, snapshot) in [
            ("list", "/var/run/zinit.sock", None),
            ("-s x list", "x", None),
            ("list -s x", "x", None),
            ("list --socket x", "x", None),
            ("-s x log", "x", Some(false)),
            ("log -s", "/var/run/zinit.sock", Some(true)),
            ("-s x log -s web", "x", Some(true)),
            ("log --socket x", "x", Some(false)),
            ("log --socket x -s web", "x", Some(true)),
        ] {
            let cli = Cli::try_parse_from(std::iter::once("zinit").chain(arguments.split(' '))).unwrap();
            assert_eq!(cli.global.socket, PathBuf::from(socket), "{arguments}");
            match (cli.command, snapshot) {
                (Some(Command::Log(options)), Some(snapshot)) => assert_eq!(options.snapshot, snapshot, "{arguments}"),
                (Some(Command::List(_)), None) => {}
                _ => panic!("{arguments}"),
            }
        }
    }
}
