//! `zinit init`: the supervisor itself.

use std::{
    ffi::OsString,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, anyhow};
use clap::{Args, ValueEnum};
use sha2::{Digest as _, Sha256};
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::timeout,
};
use zinit_tracker::{
    Config, Level, Pins, Tracker,
    rpc::{Dispatcher, Listener, Server, Upgrade},
    supervisor::{
        Finished, Handle, Handover, LogRing, Options as SupervisorOptions, ShutdownReport, Supervisor,
        config::{ENVIRONMENT_FILE, ServiceDirectory, read_environment},
        init::{self, Signals},
    },
    tracker::DEFAULT_PINS,
};

use super::{
    Global,
    handover::{self, Departure, Parcel},
    stderr, upgrade,
};

/// How long the end waits for the server of clients.
const FAREWELL: Duration = Duration::from_secs(10);

/// Run as the supervisor: start the services of a directory, and keep them
///
/// SIGTERM and SIGINT end it as `zinit shutdown` does, SIGHUP is `zinit reload`. As PID 1 outside a container it powers off
/// or reboots the machine in the end.
#[derive(Args)]
#[command(after_help = "Example: zinit init --config /etc/zinit --container\n\n\
    Exit status: 0 after a shutdown that left nothing, 1 if processes are left or it could not begin.")]
pub(super) struct Options {
    /// Directory of the service files, NAME.yaml
    #[arg(short, long, value_name = "DIR", default_value = "/etc/zinit/")]
    config: PathBuf,
    /// How many lines of services' output to keep
    #[arg(short, long, value_name = "LINES", default_value_t = zinit_tracker::supervisor::DEFAULT_LINES)]
    buffer: usize,
    /// End on a signal or a shutdown instead of powering off
    #[arg(long)]
    container: bool,
    /// Pin maps and programs in DIR, on a bpf file system
    #[arg(long, value_name = "DIR", env = "ZINIT_TRACKER_PINS", default_value = DEFAULT_PINS)]
    pins: PathBuf,
    /// How well descendants must be known
    #[arg(
        long,
        value_name = "LEVEL",
        env = "ZINIT_TRACKER_TRACKING",
        value_enum,
        default_value = "auto"
    )]
    tracking: Wanted,
}

/// How well descendants must be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Wanted {
    /// Exactly if that is possible here, else by looking at /proc, and a warning says why
    Auto,
    /// Exactly, or not at all
    Ebpf,
    /// By looking at /proc: processes can be missed
    Procfs,
}

impl From<Wanted> for Level {
    fn from(wanted: Wanted) -> Self {
        match wanted {
            Wanted::Auto => Self::Auto,
            Wanted::Ebpf => Self::Ebpf,
            Wanted::Procfs => Self::Procfs,
        }
    }
}

pub(super) fn run(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    // By way of the log, which does not wait for stderr.
    panic::set_hook(Box::new(|panicked| tracing::error!("{panicked}")));
    let result = panic::catch_unwind(AssertUnwindSafe(|| supervise(global, options)));
    let result = result.unwrap_or_else(|_| Err(anyhow!("the supervisor has failed; the lines above say where")));
    // The kernel panics if PID 1 ends, so an operator would never see why.
    if let Err(error) = &result
        && rules_machine(options)
    {
        let causes: Vec<_> = error.chain().map(ToString::to_string).collect();
        stderr::note(&causes.join(": "));
        stderr::note("nothing is supervised: Ctrl-Alt-Del restarts the machine, SIGTERM powers it off");
        init::hold();
    }
    stderr::flush();
    result
}

/// Whether the machine ends with this process.
fn rules_machine(options: &Options) -> bool {
    init::is_pid_1() && !options.container
}

/// Is not waited for in the end, whatever that is: a thread of it may hang, and readers of pipes that somebody kept.
struct Background(Option<Runtime>);

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

fn supervise(global: &Global, options: &Options) -> anyhow::Result<ExitCode> {
    let parcel = handover::receive().context("failed to take over from the program before this one")?;
    // What was handed over may use up what there is.
    init::raise_descriptor_limit();
    // In all threads but this one, and here until there are handlers: when another program is executed, none is to be lost.
    init::block_signals();
    init::take_duty(options.container);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("failed to start the runtime")?;
    let handle = runtime.handle().clone();
    let background = Background(Some(runtime));
    let (finished, report) = handle.block_on(serve(global, options, parcel))?;
    drop(background);
    let survivors = tell_outcome(&report);
    stderr::flush();
    init::end(finished, options.container);
    Ok(if survivors {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// Supervises until somebody asks for the end.
async fn serve(
    global: &Global,
    options: &Options,
    parcel: Option<Parcel>,
) -> anyhow::Result<(Finished, ShutdownReport)> {
    let directory = match ServiceDirectory::open(&options.config) {
        // A machine without services is of more use than one that holds.
        Err(error) if rules_machine(options) => {
            tracing::warn!(error = format!("{:#}", anyhow!(error)), "starting without services");
            ServiceDirectory::expect(&options.config)
        }
        opened => opened?,
    };
    let mut signals = Signals::listen(options.container).context("failed to handle signals")?;
    let hangup = signal(SignalKind::hangup()).context("failed to handle signals")?;
    init::unblock_signals();
    let came = signals.came();
    let binary = std::env::current_exe().context("failed to find out which program this is")?;
    let socket = std::path::absolute(&global.socket).context("failed to find the working directory")?;
    if init::is_pid_1() {
        make_parent(&socket);
    }
    let logs = Arc::new(LogRing::new(options.buffer));
    let (upgrades, http, inherited) = match parcel {
        Some(parcel) => {
            if let Err(error) = logs.inherit(parcel.lines, parcel.pipes) {
                tracing::error!(
                    error = format!("{:#}", anyhow!(error)),
                    "some of services' output is lost"
                );
            }
            let listener = Listener::inherit(&socket, parcel.socket, parcel.lock);
            (parcel.upgrades, parcel.http, Some(listener))
        }
        None => (0, None, None),
    };
    // Before anything is started: another supervisor may have the socket.
    let listener = match inherited {
        Some(Ok(listener)) => listener,
        Some(Err(error)) => {
            tracing::warn!(error = format!("{:#}", anyhow!(error)), "the socket is made anew");
            Listener::bind(&socket).await?
        }
        None => Listener::bind(&socket).await?,
    };
    // Level procfs is not told that this is the sole parent of its children: orphans of several services fall to it, and as
    // PID 1 those of everybody.
    let tracker = Tracker::open(&Config {
        level: options.tracking.into(),
        pins: Pins::SharedOrPrivate(options.pins.clone()),
        instance: instance(&socket),
        replace_programs: true,
        ..Config::default()
    })?;
    tracing::info!(
        directory = %directory.path().display(),
        socket = %socket.display(),
        instance = tracker.instance(),
        tracking = ?tracker.tracking(),
        "supervising"
    );
    let mut environment = read_environment(Path::new(ENVIRONMENT_FILE)).unwrap_or_else(|error| {
        tracing::warn!(%error, "failed to read {ENVIRONMENT_FILE}");
        Default::default()
    });
    if let Some(path) = init::missing_path() {
        environment.entry("PATH".to_owned()).or_insert_with(|| path.to_owned());
    }
    let supervisor = Supervisor::start(
        tracker,
        SupervisorOptions {
            definitions: Arc::new(directory),
            logs: Arc::clone(&logs),
            environment,
            reap_orphans: true,
            state: Some(state_directory(&socket)),
        },
    )
    .await?;
    let handle = supervisor.handle();
    let (requests, mut asked) = mpsc::channel(1);
    let dispatcher = Dispatcher::new(handle.clone(), Arc::clone(&logs), socket).with_upgrades(requests, upgrades);
    if let Some(address) = &http {
        dispatcher.resume_http(address).await;
    }
    let mut server = Some(Server::start(listener, dispatcher.clone()));
    let succession = Succession {
        handover: supervisor.handover(),
        binary,
        dispatcher,
        logs,
        upgrades,
        came,
    };
    let reloading = tokio::spawn(reload_on_hangup(handle.clone(), hangup));
    let listening = tokio::spawn(async move {
        loop {
            let finished = signals.next().await;
            tokio::spawn(finish(handle.clone(), finished));
        }
    });
    let finished = supervisor.finished();
    tokio::pin!(finished);
    let end = loop {
        tokio::select! {
            end = &mut finished => break end,
            Some(upgrade) = asked.recv() => server = succession.begin(server, upgrade).await,
        }
    };
    listening.abort();
    reloading.abort();
    if let Some(server) = server
        && timeout(FAREWELL, server.close()).await.is_err()
    {
        tracing::warn!("clients are not waited for any longer");
    }
    Ok(end)
}

/// How often it is tried to find a moment in which no service is started.
const ATTEMPTS: u32 = 20;

/// Why another program was not executed.
enum Attempt {
    /// A service was started meanwhile, and its output would be lost.
    Again,
    Failed(anyhow::Error),
}

/// What it takes to be followed by another program in this process.
struct Succession {
    handover: Handover,
    /// Where this program was when it began.
    binary: PathBuf,
    dispatcher: Dispatcher,
    logs: Arc<LogRing>,
    upgrades: u32,
    /// A signal asks for the end.
    came: Arc<AtomicBool>,
}

impl Succession {
    /// Tries the program, and executes it if it will do. Returns the server if this one goes on.
    async fn begin(&self, server: Option<Server>, asked: Upgrade) -> Option<Server> {
        let Upgrade { binary, answer } = asked;
        let binary = binary.as_ref().unwrap_or(&self.binary);
        let tried = self.try_program(binary).await;
        let acceptable = tried.is_ok();
        let reply = || {
            if answer.send(tried).is_err() {
                tracing::debug!("whoever asked for the upgrade has gone");
            }
        };
        match server {
            Some(server) if acceptable => self.execute(server, binary, reply).await,
            server => {
                reply();
                server
            }
        }
    }

    /// What the program calls itself, or why it does not do.
    async fn try_program(&self, binary: &Path) -> Result<String, String> {
        let refused = |reason: String| format!("{} cannot take the supervisor's place: {reason}", binary.display());
        if let Some(obstacle) = self.handover.obstacle() {
            return Err(obstacle.to_owned());
        }
        let arguments = ["upgrade", "--check"].map(OsString::from).into_iter();
        let arguments: Vec<_> = arguments.chain(upgrade::command_line()).collect();
        let answer = self.handover.try_program(binary, &arguments).await;
        let answer = answer.map_err(|error| refused(format!("{:#}", anyhow!(error))))?;
        let understood = answer.trim_end().rsplit_once(" handover ");
        match understood {
            Some((version, number)) if version.starts_with("zinit ") && number == handover::VERSION.to_string() => {
                Ok(version.to_owned())
            }
            Some((version, number)) if version.starts_with("zinit ") => Err(refused(format!(
                "it takes over from other versions (handover {number})"
            ))),
            _ => Err(refused("it is no zinit that takes over".to_owned())),
        }
    }

    /// Returns if it is not executed.
    async fn depart(&self, binary: &Path, listener: &Listener, http: Option<String>) -> Attempt {
        let paused = self.logs.pause().await;
        if !self.handover.settle().await {
            return Attempt::Failed(anyhow!("states cannot be saved, so services would be started anew"));
        }
        let departure = Departure::prepare(binary, listener, http, self.upgrades, (&self.logs, &paused));
        let departure = match departure {
            Ok(departure) => departure,
            Err(error) => return Attempt::Failed(error.into()),
        };
        tracing::info!(binary = %binary.display(), "executing it in this supervisor's place");
        stderr::flush();
        let mut again = false;
        let error = self.handover.execute(|| {
            departure.leave(|| {
                if self.came.load(Ordering::Acquire) || self.handover.is_too_late() {
                    return Some("the supervisor is shutting down");
                }
                again = !self.logs.is_all(&paused);
                again.then_some("a service was started meanwhile")
            })
        });
        match again {
            true => Attempt::Again,
            false => Attempt::Failed(error.into()),
        }
    }

    /// Returns if the kernel does not execute it. Replies once nobody is let in any more: whoever connects then is served by the
    /// successor.
    async fn execute(&self, server: Server, binary: &Path, reply: impl FnOnce()) -> Option<Server> {
        let http = self.dispatcher.http_address().await;
        let listener = server.hand_over(reply).await?;
        for _ in 0..ATTEMPTS {
            match self.depart(binary, &listener, http.clone()).await {
                // Nobody has read from its pipes yet, so that nothing is lost by another try.
                Attempt::Again => {}
                Attempt::Failed(error) => {
                    tracing::error!(error = format!("{error:#}"), binary = %binary.display(), "not upgraded");
                    break;
                }
            }
        }
        if let Some(address) = &http {
            self.dispatcher.resume_http(address).await;
        }
        Some(Server::start(listener, self.dispatcher.clone()))
    }
}

/// On a bare machine nobody has made `/run` yet. If this fails, the socket's error says it better.
fn make_parent(socket: &Path) {
    if let Some(parent) = socket.parent()
        && let Err(error) = std::fs::create_dir_all(parent)
    {
        tracing::debug!(%error, path = %parent.display(), "failed to create the socket's directory");
    }
}

/// Rereads the service files whenever SIGHUP comes.
async fn reload_on_hangup(supervisor: Handle, mut hangup: Signal) {
    while hangup.recv().await.is_some() {
        match supervisor.reload().await {
            Ok(changes) => tracing::info!(?changes, "reloaded"),
            Err(error) => tracing::warn!(%error, "failed to reload"),
        }
    }
}

async fn finish(supervisor: Handle, finished: Finished) {
    let asked = match finished {
        Finished::PowerOff => supervisor.shutdown().await,
        Finished::Reboot => supervisor.reboot().await,
    };
    if let Err(error) = asked {
        tracing::debug!(%error, "the end had come already");
    }
}

/// Says what has been stopped, and names what is left; whether anything is or may be.
fn tell_outcome(report: &ShutdownReport) -> bool {
    for (service, survivors) in &report.survivors {
        for survivor in survivors {
            let (pid, comm, cause) = (survivor.pid, &survivor.comm, &survivor.cause);
            stderr::note(&format!("service {service:?}: pid {pid} ({comm:?}) survives: {cause}"));
        }
    }
    for doubt in &report.unverified {
        stderr::note(doubt);
    }
    let (stopped, overdue) = (report.stopped.join(", "), report.overdue.join(", "));
    for doubts in &report.unproven {
        stderr::note(doubts);
    }
    if report.is_complete() && report.unproven.is_empty() {
        tracing::info!(stopped, overdue, "all services are down, and nothing is left");
    } else if report.is_complete() {
        tracing::info!(stopped, overdue, "all services are empty; not proven for all of them");
    }
    !report.is_complete()
}

/// Beside the socket, on a file system that does not outlive the machine.
fn state_directory(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".state");
    path.into()
}

/// What this supervisor's services are told from others' by: its socket, which no other can have at the same time, and
/// which the next one at this place will have again.
fn instance(socket: &Path) -> String {
    if matches!(socket.to_str(), Some("/var/run/zinit.sock" | "/run/zinit.sock")) {
        return "zinit".to_owned();
    }
    let digest = Sha256::digest(socket.as_os_str().as_encoded_bytes());
    let short: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("zinit-{short}")
}
