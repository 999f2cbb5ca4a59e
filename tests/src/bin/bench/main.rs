//! Measures what the project promises of its speed and size, and others side by side with it. Run by `cargo xtask bench`, which
//! builds all that it takes.
//!
//! [`figure`] and [`table`] are what is measured and how it is shown, [`rows`] has one file a subject, [`peers`] one a supervisor that
//! we are compared with, [`load`] the processes that all of them are measured with.

mod figure;
mod load;
mod machine;
mod peers;
mod rows;
mod table;

use std::{
    env,
    fs::File,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use nix::sys::signal::{SigHandler, Signal, signal};
use zinit_tests::{Marker, kill_all};

use self::{figure::Row, load::Load, machine::Machine, table::Results};

/// Set for the process that measures; the one that starts it cleans up behind it, however it ends.
const MEASURES: &str = "ZINIT_BENCH_MEASURES";

/// Measure, and compare with others
#[derive(Parser)]
struct Options {
    /// Fewer rounds and smaller sizes: shows that it works
    #[arg(long)]
    quick: bool,
    /// Write all that was measured to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The program that processes of services run
    #[arg(long, value_name = "FILE")]
    subject: PathBuf,
    /// Where other supervisors are that were installed for this
    #[arg(long, value_name = "DIRECTORY")]
    peers: PathBuf,
    /// What is measured; all if nothing is named
    #[arg(value_name = "ROW", value_parser = rows::named)]
    rows: Vec<&'static rows::Subject>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match env::var_os(MEASURES) {
        Some(_) => measure(&options),
        None => watch_over(),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs this program once more, and ends whatever is left when that has ended.
fn watch_over() -> Result<bool> {
    // An interrupt is for the one that measures. This one has to clean up.
    for interrupt in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: no function of this program is made a handler.
        unsafe { signal(interrupt, SigHandler::SigIgn) }.context("failed to ignore a signal")?;
    }
    let mut command = Command::new(env::current_exe()?);
    command.args(env::args_os().skip(1)).env(MEASURES, "1");
    // SAFETY: it calls what a signal handler may call.
    unsafe { command.pre_exec(listen_to_interrupts) };
    let mut child = command.spawn().context("failed to start the process that measures")?;
    let (pid, status) = (child.id(), child.wait()?);
    if status.code().is_none() {
        eprintln!("the process that measures ended by {status}: cleaning up");
    }
    let killed = kill_all(&Marker::every_of(pid), Duration::from_secs(60))?;
    if killed > 0 {
        eprintln!("{killed} processes were left and are no more");
    }
    load::remove_pins_of(pid);
    Ok(status.success())
}

fn listen_to_interrupts() -> std::io::Result<()> {
    for interrupt in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: no function of this program is made a handler.
        unsafe { signal(interrupt, SigHandler::SigDfl) }?;
    }
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
    Ok(())
}

/// Measures all rows, and says whether each has a figure or a reason why it has none.
fn measure(options: &Options) -> Result<bool> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "it loads BPF programs, which takes root"
    );
    let load = Load::new(&options.subject, &options.peers, options.quick)?;
    let mut results = Results::new(Machine::describe()?, peers::versions(&load), options.quick);
    let mut failed = false;
    let wanted: Vec<_> = match options.rows[..] {
        [] => rows::ALL.iter().collect(),
        _ => options.rows.clone(),
    };
    for subject in wanted {
        eprintln!("{}: {}", subject.name, subject.about);
        let began = std::time::Instant::now();
        match (subject.measure)(&load) {
            Ok(rows) => {
                for row in &rows {
                    eprintln!("    {}", table::line(row));
                }
                results.add(subject.name, rows);
            }
            Err(error) => {
                failed = true;
                eprintln!("    failed: {error:#}");
                results.add(
                    subject.name,
                    vec![Row::skipped(subject.about, format!("failed: {error:#}"))],
                );
            }
        }
        eprintln!("    ({:.1} s)", began.elapsed().as_secs_f64());
    }
    results.end(Machine::load());
    if let Some(path) = &options.json {
        let file = File::create(path).with_context(|| format!("failed to create {}", path.display()))?;
        serde_json::to_writer_pretty(file, &results.json())
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    print!("{}", results.markdown());
    Ok(!failed)
}
