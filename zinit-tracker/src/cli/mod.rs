//! The command line: one file a subcommand. Parses, calls the library, prints.

mod attach;
mod clock;
mod completions;
mod diff;
mod doctor;
mod escapes;
mod events;
mod history;
mod listing;
mod man;
mod manual;
mod metrics;
mod output;
mod pager;
mod paint;
mod parse;
mod print;
mod promises;
mod ps;
mod release;
mod run;
#[cfg(test)]
mod schemas;
mod signals;
mod stop;
mod top;
mod tree;
mod unload;
mod why;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;
use zinit_tracker::{Config, Level, Pins, Tracker, TrackerError, tracker::DEFAULT_PINS};

/// Status when this program itself fails while it runs a command, as env(1) and timeout(1) use it.
const FAILED_RUN: u8 = 125;

/// Stop services so that nothing of them is left, and prove it.
///
/// eBPF programs keep, in the kernel, a live map of every service's descendants, also of those that call setsid,
/// daemonise, change group or are reparented. A stop signals exactly that set.
#[derive(Parser)]
#[command(
    name = "zinit-tracker",
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = "Examples:\n  \
        zinit-tracker run -- make test\n  \
        zinit-tracker why 4711\n  \
        zinit-tracker stop --grace 5s web\n\n\
        Exit status: 0, 1 if it failed, 2 if the arguments are no good; `run`, `stop` and `doctor` have more to say, see their help."
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every subcommand.
#[derive(Args)]
#[command(next_help_heading = "Options of every command")]
struct Global {
    /// Pin maps and programs in DIR, on a bpf file system; trackers in different directories know nothing of each other
    #[arg(long, global = true, value_name = "DIR", env = "ZINIT_TRACKER_PINS", default_value = DEFAULT_PINS)]
    pins: PathBuf,
    /// How well descendants must be known
    #[arg(
        long,
        global = true,
        value_name = "LEVEL",
        env = "ZINIT_TRACKER_TRACKING",
        value_enum,
        default_value = "auto"
    )]
    tracking: Wanted,
    /// Say more on stderr; twice for the diagnostics of the eBPF programs too (RUST_LOG overrides)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// When listings have colours
    #[arg(long, global = true, value_name = "WHEN", value_enum, default_value = "auto")]
    color: paint::When,
    /// Write long listings to a terminal as they are, and not through $PAGER or less
    #[arg(long, global = true)]
    no_pager: bool,
}

/// How well descendants must be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Wanted {
    /// Exactly if that is possible here, else by looking at /proc, and a warning says why
    Auto,
    /// Exactly, or not at all
    Ebpf,
    /// By looking at /proc: only the `run` itself knows its service, and processes can be missed
    Procfs,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Options),
    Ps(ps::Options),
    Tree(tree::Options),
    Top(top::Options),
    Why(why::Options),
    Escapes(escapes::Options),
    Diff(diff::Options),
    Events(events::Options),
    History(history::Options),
    Metrics(metrics::Options),
    Attach(attach::Options),
    Stop(stop::Options),
    Release(release::Options),
    Doctor(doctor::Options),
    Unload(unload::Options),
    Completions(completions::Options),
    Man(man::Options),
}

impl Global {
    fn config(&self) -> Config {
        Config {
            level: match self.tracking {
                Wanted::Auto => Level::Auto,
                Wanted::Ebpf => Level::Ebpf,
                Wanted::Procfs => Level::Procfs,
            },
            pins: Pins::Shared(self.pins.clone()),
            program_log: (self.verbose > 1).then_some(aya_log::Level::Debug),
            ..Config::default()
        }
    }

    /// As [`Global::config`], for books that outlive this command: only the kernel keeps such.
    fn lasting_config(&self) -> anyhow::Result<Config> {
        match self.config() {
            Config {
                level: Level::Procfs, ..
            } => Err(TrackerError::NotShared.into()),
            config => Ok(Config {
                level: Level::Ebpf,
                ..config
            }),
        }
    }

    /// The tracker that is pinned, for subcommands that only look or stop; they load nothing.
    fn existing(&self) -> anyhow::Result<Option<Tracker>> {
        Ok(Tracker::open_existing(&self.lasting_config()?)?)
    }

    fn existing_or_fail(&self) -> anyhow::Result<Tracker> {
        self.existing()?.with_context(|| {
            format!(
                "nothing is tracked: no tracker is pinned in {} (`run` and `attach` load one)",
                self.pins.display()
            )
        })
    }
}

/// Parses the command line and does what it says.
pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    paint::choose(cli.global.color);
    let filter = match (std::env::var("RUST_LOG"), cli.global.verbose) {
        (Ok(directives), _) => EnvFilter::new(directives),
        (Err(_), 0) => EnvFilter::new("warn"),
        (Err(_), 1) => EnvFilter::new("warn,zinit_tracker=info"),
        // The programs log as `zinit_ebpf`.
        (Err(_), _) => EnvFilter::new("warn,zinit_tracker=debug,zinit_ebpf=debug"),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| top::Log)
        .log_internal_errors(false)
        .with_ansi(paint::on_stderr())
        .without_time()
        .with_target(false)
        .init();
    let failure = if matches!(cli.command, Command::Run(_)) {
        FAILED_RUN
    } else {
        1
    };
    match execute(&cli) {
        Ok(status) => status,
        Err(error) => {
            output::failure(&error);
            ExitCode::from(failure)
        }
    }
}

fn execute(cli: &Cli) -> anyhow::Result<ExitCode> {
    let global = &cli.global;
    match &cli.command {
        Command::Run(options) => runtime()?.block_on(run::run(global, options)),
        Command::Stop(options) => runtime()?.block_on(stop::run(global, options)),
        Command::Ps(options) => ps::run(global, options),
        Command::Tree(options) => tree::run(global, options),
        Command::Top(options) => top::run(global, options),
        Command::Why(options) => why::run(global, options),
        Command::Escapes(options) => escapes::run(global, options),
        Command::Diff(options) => diff::run(global, options),
        Command::Events(options) => runtime()?.block_on(events::run(global, options)),
        Command::History(options) => history::run(global, options),
        Command::Metrics(options) => runtime()?.block_on(metrics::run(global, options)),
        Command::Attach(options) => attach::run(global, options),
        Command::Release(options) => release::run(global, options),
        Command::Doctor(options) => runtime()?.block_on(doctor::run(global, options)),
        Command::Unload(options) => unload::run(global, options),
        Command::Completions(options) => completions::run(options),
        Command::Man(options) => man::run(options),
    }
}

/// One thread is enough: the work is waiting.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")
}

/// Removes the pins when no service is left. A failure is worth a line, not the command's status.
fn close(tracker: Tracker) {
    if let Err(error) = tracker.close() {
        output::note(&format!("failed to remove the pins: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn what_is_printed_as_json_has_a_schema() {
        super::schemas::assert_complete(&super::Cli::command(), "", |name| !name.starts_with("zinit-"));
    }
}
