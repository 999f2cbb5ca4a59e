//! `zinit-tracker run`: a command as a service that is stopped exactly when it ends.

use std::{
    convert::Infallible,
    ffi::OsString,
    io,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{ExitCode, ExitStatus},
    time::Duration,
};

use clap::Args;
use nix::sys::signal::Signal;
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep_until},
};
use zinit_tracker::{
    Config, Pins, ProgramLog, Service, StopError, StopPolicy, Tracker, TrackerError,
    process::{Launch, LaunchError, Launched, Matched},
    stop,
    tracker::{DEFAULT_PINS, ServiceState},
};

use super::{
    FAILED_RUN, Global, close, output, parse,
    signals::{Received, Signals},
    stop::forget,
};

/// Exit status if the command was not found, as shells have it.
const NOT_FOUND: u8 = 127;
/// Exit status if the command could not be executed.
const NOT_EXECUTABLE: u8 = 126;

/// Run a command as a service, and stop everything that is left of it when it ends.
///
/// The command keeps stdin, stdout and stderr. SIGTERM, SIGINT, SIGHUP and SIGQUIT stop the service with that signal; a
/// second one kills what is left at once. Ctrl-C and Ctrl-\ reach the command from the terminal: if it has not ended when
/// the grace period is over, it is killed. SIGUSR1, SIGUSR2 and SIGWINCH go to the command. Signals that are ignored when
/// this program starts stay ignored.
#[derive(Args)]
#[command(after_help = "\
Example: zinit-tracker run --grace 5s --report /tmp/report.json -- make test

Exit status: the command's; 128+N if signal N killed it; 127 if it was not found, 126 if it could not be executed;
125 if this program failed or something survived; 0 if the command was released and runs on.")]
pub(super) struct Options {
    /// Name of the service [default: the command's name and this process's pid]
    #[arg(long)]
    name: Option<String>,
    /// How long members may take to end after the stop signal, before SIGKILL
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse::duration)]
    grace: Duration,
    /// Stop signal [default: TERM, or the signal that this program received]
    #[arg(long, value_parser = parse::signal)]
    signal: Option<Signal>,
    /// Write the report of the stop as JSON to FILE, or to stdout for -
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// The command and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    command: Vec<OsString>,
}

pub(super) async fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let report = options.report.as_deref().map(output::ReportFile::open).transpose()?;
    // Before the command exists, so that no signal ends this program and leaves the command alone.
    let mut signals = Signals::listen()?;
    let tracker = Tracker::open(&config(global))?;
    let mut log = tracker.program_log();
    let result = tokio::select! {
        result = supervise(&tracker, options, &mut signals, report) => result,
        never = forward_log(log.as_mut()) => match never {},
    };
    if let Some(log) = &mut log {
        log.flush();
    }
    close(tracker);
    result
}

/// Passes on the programs' diagnostics, if there are any to be had. Never returns.
async fn forward_log(log: Option<&mut ProgramLog>) -> Infallible {
    match log {
        None => std::future::pending().await,
        Some(log) => {
            if let Err(error) = log.forward().await {
                tracing::warn!(%error, "the programs' log cannot be read");
            }
            std::future::pending().await
        }
    }
}

/// The usual directory may be replaced by a private one; a directory that was asked for may not.
fn config(global: &Global) -> Config {
    let mut config = Config {
        sole_parent: true,
        ..global.config()
    };
    if global.pins == Path::new(DEFAULT_PINS) {
        config.pins = Pins::SharedOrPrivate(global.pins.clone());
    }
    config
}

async fn supervise(
    tracker: &Tracker,
    options: &Options,
    signals: &mut Signals,
    report: Option<output::ReportFile>,
) -> anyhow::Result<ExitCode> {
    let service = register(tracker, options).await?;
    let (program, arguments) = options
        .command
        .split_first()
        .ok_or_else(|| anyhow::anyhow!("no command is given"))?;
    let mut command = Command::new(program);
    command.args(arguments);
    let (mut child, mut execution) = match tracker.launch(&service, &mut command, &Launch::default()) {
        Ok(launched) => launched,
        Err(error) => {
            let status = match error {
                TrackerError::Command { .. } => NOT_EXECUTABLE,
                _ => FAILED_RUN,
            };
            return not_started(tracker, &service, error.into(), status).await;
        }
    };
    let asked = match until_stop_is_due(tracker, &service, &mut child, signals, options.grace).await {
        Ok(asked) => asked,
        Err(error) => {
            // Whatever failed, the command is not left running.
            let report = stop(tracker, &service, &StopPolicy::default()).await?;
            forget(tracker, &service, &report)?;
            return Err(error);
        }
    };
    if asked.is_none()
        && let Launched::Failed(error) = execution.outcome().await
    {
        let status = start_failure(&error);
        return not_started(tracker, &service, error.into(), status).await;
    }
    let policy = StopPolicy {
        signal: options
            .signal
            .or(asked.map(|asked| asked.signal))
            .unwrap_or(Signal::SIGTERM),
        grace: asked.map_or(options.grace, |asked| asked.grace),
        ..StopPolicy::default()
    };
    let (result, survived) = match stop_all(tracker, &service, &policy, signals).await {
        Ok(result) => (result, false),
        Err(StopError::Survivors(result)) => (*result, true),
        // Another stop has unregistered it, which only an empty service can be.
        Err(StopError::Tracker(TrackerError::NotRegistered(_))) => {
            output::note("the service was stopped by another process");
            return Ok(exit_code(child.wait().await?));
        }
        Err(error) => return Err(error.into()),
    };
    output::report(&result);
    if !survived {
        forget(tracker, &service, &result)?;
    }
    if let Some(report) = report {
        report.write(&result)?;
    }
    if survived {
        return Ok(ExitCode::from(FAILED_RUN));
    }
    match child.try_wait()? {
        Some(status) => Ok(exit_code(status)),
        None => {
            output::note("the command was released from the service and runs on");
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Ends a service whose command does not run.
async fn not_started(
    tracker: &Tracker,
    service: &Service,
    error: anyhow::Error,
    status: u8,
) -> anyhow::Result<ExitCode> {
    output::failure(&error);
    // The child that failed to execute may still be exiting.
    let report = stop(tracker, service, &StopPolicy::default()).await?;
    forget(tracker, service, &report)?;
    Ok(ExitCode::from(status))
}

/// Waits until the command has ended or a stop is asked for, and then for other stops.
async fn until_stop_is_due(
    tracker: &Tracker,
    service: &Service,
    child: &mut Child,
    signals: &mut Signals,
    grace: Duration,
) -> anyhow::Result<Option<Asked>> {
    let asked = until_asked(child, signals, grace).await?;
    wait_for_other_stop(tracker, service, signals, grace).await?;
    Ok(asked)
}

/// Another process may be stopping the service, with a signal and a grace period of its own: then that goes first.
async fn wait_for_other_stop(
    tracker: &Tracker,
    service: &Service,
    signals: &mut Signals,
    grace: Duration,
) -> anyhow::Result<()> {
    match tracker.info(service) {
        Ok(info) if info.state != ServiceState::Up => {}
        Ok(_) | Err(TrackerError::NotRegistered(_)) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let patience = grace.saturating_add(StopPolicy::default().kill_timeout);
    tokio::select! {
        result = tracker.wait_empty(service) => result?,
        _ = signals.next_stop() => {}
        // One that was interrupted leaves its state behind.
        () = tokio::time::sleep(patience) => {}
    }
    Ok(())
}

/// Registers under the chosen name. A service of that name that is empty is what a killed `run` left behind.
async fn register(tracker: &Tracker, options: &Options) -> anyhow::Result<Service> {
    let Some(name) = &options.name else {
        let program = options.command.first().map(PathBuf::from).unwrap_or_default();
        let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut name: String = program.chars().filter(|c| !c.is_control() && *c != '\\').collect();
        name.truncate(name.floor_char_boundary(48));
        return Ok(tracker.register(&format!("{name}-{}", std::process::id()))?);
    };
    match tracker.register(name) {
        Err(TrackerError::NameInUse(_)) => {
            let info = tracker.find(name)?;
            if !tracker.is_abandoned(&info)? {
                return Err(TrackerError::NameInUse(name.clone()).into());
            }
            // It may have had no time to kill what the books have missed, and only the sweep of a stop finds that.
            stop(tracker, &info.handle(), &StopPolicy::default()).await?;
            tracker.unregister(&info.handle())?;
            Ok(tracker.register(name)?)
        }
        result => Ok(result?),
    }
}

/// The status that shells give for a command that could not be started.
fn start_failure(error: &LaunchError) -> u8 {
    match error {
        LaunchError::Execute { source, .. } if source.kind() == io::ErrorKind::NotFound => NOT_FOUND,
        LaunchError::Execute { .. } => NOT_EXECUTABLE,
        LaunchError::Prepare { .. } | LaunchError::Enter { .. } => FAILED_RUN,
    }
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(i32::from(FAILED_RUN));
    ExitCode::from(u8::try_from(code).unwrap_or(FAILED_RUN))
}

/// Why the service is to be stopped before the command has ended.
#[derive(Clone, Copy, Debug)]
struct Asked {
    signal: Signal,
    grace: Duration,
}

/// Waits until the command has ended (`None`) or signals ask to stop.
///
/// What the terminal sends, it sends to the command as well, which may be acting on it; twice would be too much. So the
/// grace period runs, and the service is killed when it ends, or at the next signal.
async fn until_asked(child: &mut Child, signals: &mut Signals, grace: Duration) -> anyhow::Result<Option<Asked>> {
    let mut asked_by_terminal: Option<(Signal, Instant)> = None;
    loop {
        let now = Instant::now();
        let (pending, deadline) = asked_by_terminal.unzip();
        tokio::select! {
            status = child.wait() => {
                status?;
                return Ok(None);
            }
            () = sleep_until(deadline.unwrap_or(now)), if deadline.is_some() => {
                let signal = pending.unwrap_or(Signal::SIGINT);
                return Ok(Some(Asked { signal, grace: Duration::ZERO }));
            }
            received = signals.next() => match received {
                Received::PassOn(signal) => pass_on(child, signal)?,
                Received::Stop { signal, .. } if asked_by_terminal.is_some() => {
                    return Ok(Some(Asked { signal, grace: Duration::ZERO }));
                }
                Received::Stop { signal, from_terminal: true } => {
                    let deadline = Instant::now().checked_add(grace);
                    // A grace period that the clock cannot hold never ends.
                    asked_by_terminal = Some((signal, deadline.unwrap_or(now + Duration::from_secs(1 << 30))));
                }
                Received::Stop { signal, .. } => return Ok(Some(Asked { signal, grace })),
            }
        }
    }
}

/// Sends a signal to the command's main process.
fn pass_on(child: &Child, signal: Signal) -> anyhow::Result<()> {
    if let Some(child) = Matched::child(child)? {
        child.signal(signal)?;
    }
    Ok(())
}

/// Stops the service; another signal meanwhile ends the grace period.
async fn stop_all(
    tracker: &Tracker,
    service: &Service,
    policy: &StopPolicy,
    signals: &mut Signals,
) -> Result<zinit_tracker::StopReport, StopError> {
    tokio::select! {
        result = stop(tracker, service, policy) => return result,
        signal = signals.next_stop() => output::note(&format!("{signal} again: killing what is left")),
    }
    // What the first attempt had begun is in the kernel's books, so a new one simply goes on.
    let now = StopPolicy {
        grace: Duration::ZERO,
        ..policy.clone()
    };
    stop(tracker, service, &now).await
}
