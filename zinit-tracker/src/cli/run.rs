//! `zinit-tracker run`: a command as a service that is stopped exactly when it ends.

use std::{
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
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};
use zinit_tracker::{Config, Pins, Service, StopError, StopPolicy, Tracker, TrackerError, stop, tracker::DEFAULT_PINS};

use super::{FAILED_RUN, Global, close, output, parse};

/// Run a command as a service, and stop everything that is left of it when it ends.
///
/// The command keeps stdin, stdout and stderr. SIGTERM, SIGINT, SIGHUP and SIGQUIT stop the service with that signal; a
/// second one kills what is left at once. SIGUSR1, SIGUSR2 and SIGWINCH go to the command.
///
/// Exit status: the command's; 128+N if signal N killed it; 127 if it was not found, 126 if it could not be executed;
/// 125 if this program failed or something survived.
#[derive(Args)]
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
    let result = tokio::select! {
        result = supervise(&tracker, options, &mut signals, report) => result,
        error = forward_log(&tracker) => Err(error),
    };
    close(tracker);
    result
}

/// Passes on the programs' diagnostics, if there are any to be had. Returns only an error.
async fn forward_log(tracker: &Tracker) -> anyhow::Error {
    match tracker.program_log() {
        None => std::future::pending().await,
        Some(log) => match log.forward().await {
            Ok(()) => std::future::pending().await,
            Err(error) => error.into(),
        },
    }
}

/// The usual directory may be replaced by a private one; a directory that was asked for may not.
fn config(global: &Global) -> Config {
    let mut config = global.config();
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
    let service = register(tracker, options)?;
    let (program, arguments) = options
        .command
        .split_first()
        .ok_or_else(|| anyhow::anyhow!("no command is given"))?;
    let mut command = Command::new(program);
    command.args(arguments);
    let mut child = match tracker.spawn(&service, &mut command) {
        Ok(child) => child,
        Err(error) => {
            let status = start_failure(&error);
            output::note(&error.to_string());
            // The child that failed to execute may still be exiting.
            stop(tracker, &service, &StopPolicy::default()).await?;
            tracker.unregister(&service)?;
            return Ok(ExitCode::from(status));
        }
    };
    let received = until_ended(&mut child, signals, options.grace).await?;
    let policy = StopPolicy {
        signal: options.signal.or(received).unwrap_or(Signal::SIGTERM),
        grace: options.grace,
        ..StopPolicy::default()
    };
    let outcome = stop_all(tracker, &service, &policy, signals).await;
    let (result, survived) = match outcome {
        Ok(result) => (result, false),
        Err(StopError::Survivors(result)) => (*result, true),
        Err(error) => return Err(error.into()),
    };
    output::report(&result);
    if let Some(report) = report {
        report.write(&result)?;
    }
    if survived {
        return Ok(ExitCode::from(FAILED_RUN));
    }
    tracker.unregister(&service)?;
    match child.try_wait()? {
        Some(status) => Ok(exit_code(status)),
        None => {
            output::note("the command was released from the service and runs on");
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Registers under the chosen name. A service of that name that is empty is what a killed `run` left behind.
fn register(tracker: &Tracker, options: &Options) -> anyhow::Result<Service> {
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
            if info.live > 0 || info.forks == 0 {
                return Err(TrackerError::NameInUse(name.clone()).into());
            }
            tracker.unregister(&info.handle())?;
            Ok(tracker.register(name)?)
        }
        result => Ok(result?),
    }
}

/// The status that shells give for a command that could not be started.
fn start_failure(error: &TrackerError) -> u8 {
    match error {
        TrackerError::Command { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
        TrackerError::Command { .. } => 126,
        _ => FAILED_RUN,
    }
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(i32::from(FAILED_RUN));
    ExitCode::from(u8::try_from(code).unwrap_or(FAILED_RUN))
}

/// Waits until the command has ended or a signal asks to stop. Returns that signal.
async fn until_ended(child: &mut Child, signals: &mut Signals, grace: Duration) -> anyhow::Result<Option<Signal>> {
    loop {
        tokio::select! {
            status = child.wait() => {
                status?;
                return Ok(None);
            }
            received = signals.next() => match received {
                Received::PassOn(signal) => pass_on(child, signal)?,
                Received::Stop(signal @ (Signal::SIGINT | Signal::SIGQUIT)) if in_foreground() => {
                    // The terminal sent it to the command as well, which may be acting on it; twice would be too much.
                    tokio::select! {
                        status = child.wait() => {
                            status?;
                            return Ok(None);
                        }
                        _ = signals.next_stop() => return Ok(Some(signal)),
                        () = tokio::time::sleep(grace) => return Ok(Some(signal)),
                    }
                }
                Received::Stop(signal) => return Ok(Some(signal)),
            }
        }
    }
}

/// Sends a signal to the command's main process. It is our child and not reaped, so the pid is certainly its.
fn pass_on(child: &Child, signal: Signal) -> anyhow::Result<()> {
    if let Some(pid) = child.id()
        && let Some(pidfd) = zinit_tracker::process::Pidfd::open(pid)?
    {
        pidfd.signal(signal)?;
    }
    Ok(())
}

/// Whether this process is in the foreground process group of its terminal.
fn in_foreground() -> bool {
    let Ok(terminal) = std::fs::File::open("/dev/tty") else {
        return false;
    };
    rustix::termios::tcgetpgrp(&terminal).is_ok_and(|group| group == rustix::process::getpgrp())
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

/// A signal that this program received.
enum Received {
    Stop(Signal),
    PassOn(Signal),
}

struct Signals(mpsc::UnboundedReceiver<Received>);

impl Signals {
    fn listen() -> io::Result<Self> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let stop: fn(Signal) -> Received = Received::Stop;
        let pass_on: fn(Signal) -> Received = Received::PassOn;
        for (signal_number, received) in [
            (Signal::SIGTERM, stop),
            (Signal::SIGINT, stop),
            (Signal::SIGHUP, stop),
            (Signal::SIGQUIT, stop),
            (Signal::SIGUSR1, pass_on),
            (Signal::SIGUSR2, pass_on),
            (Signal::SIGWINCH, pass_on),
        ] {
            let mut stream = signal(SignalKind::from_raw(signal_number as i32))?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() && sender.send(received(signal_number)).is_ok() {}
            });
        }
        Ok(Self(receiver))
    }

    async fn next(&mut self) -> Received {
        match self.0.recv().await {
            Some(received) => received,
            // The senders live as long as the runtime.
            None => std::future::pending().await,
        }
    }

    async fn next_stop(&mut self) -> Signal {
        loop {
            if let Received::Stop(signal) = self.next().await {
                return signal;
            }
        }
    }
}
