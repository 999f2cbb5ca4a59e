//! Many trivial services under a supervisor.

use std::{
    fs::{self, File},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;
use zinit_tests::{Cleanup, Marker, sandbox::PinDir, zinit};

use super::{fifo::Fifo, find};
use crate::load::Load;

/// Who starts the services, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Supervisor {
    Ours,
    /// The zinit of crates.io.
    Zinit,
    S6,
    Runit,
    Supervisord,
}

/// A supervisor, all of whose services run.
pub(crate) struct Running {
    supervisor: Supervisor,
    child: Child,
    directory: TempDir,
    fifo: Fifo,
    /// From the start of its program until the program of the last service runs.
    pub(crate) took: Duration,
    program: PathBuf,
    pins: PinDir,
    marker: Marker,
    _cleanup: Cleanup,
}

impl Supervisor {
    pub(crate) const OTHERS: [Self; 4] = [Self::Zinit, Self::S6, Self::Runit, Self::Supervisord];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Zinit => "zinit of crates.io",
            Self::S6 => "s6",
            Self::Runit => "runit",
            Self::Supervisord => "supervisord",
        }
    }

    /// Where its program is; the error is why it is not there.
    fn program(self, load: &Load) -> Result<PathBuf, String> {
        let name = match self {
            Self::Ours => return Ok(zinit().to_owned()),
            Self::Zinit => {
                let path = load.peers.join("bin/zinit-server");
                return path.is_file().then_some(path).ok_or("it is not installed".to_owned());
            }
            Self::S6 => "s6-svscan",
            Self::Runit => "runsvdir",
            Self::Supervisord => "supervisord",
        };
        find(name).ok_or_else(|| format!("{name} is not installed"))
    }

    /// Why it is not here, if it is not.
    pub(crate) fn missing(self, load: &Load) -> Option<String> {
        self.program(load).err()
    }

    /// Starts it with so many services, and waits until the program of each runs.
    pub(crate) fn start(self, load: &Load, count: usize) -> Result<Running> {
        let program = self.program(load).map_err(anyhow::Error::msg)?;
        let (directory, marker, pins) = (TempDir::new_in("/var/tmp")?, Marker::new(), PinDir::new());
        let path = directory.path();
        let fifo = Fifo::new_in(path)?;
        self.write_services(path, &load.subject, count)?;
        fs::create_dir_all(path.join("hero/var"))?;
        let mut command = self.command(&program, path);
        let log = File::create(path.join("log"))?;
        command
            .env(Fifo::ENV, fifo.path())
            .env("ZINIT_TRACKER_PINS", pins.path())
            .env(Marker::ENV, marker.as_str())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let cleanup = Cleanup::new(&marker);
        let began = Instant::now();
        let child = command
            .spawn()
            .with_context(|| format!("failed to start {}", self.name()))?;
        let mut running = Running {
            supervisor: self,
            child,
            directory,
            fifo,
            took: Duration::ZERO,
            program,
            pins,
            marker,
            _cleanup: cleanup,
        };
        running.wait_for(count)?;
        running.took = began.elapsed();
        Ok(running)
    }

    fn write_services(self, path: &Path, subject: &Path, count: usize) -> Result<()> {
        let services = path.join("services");
        fs::create_dir(&services)?;
        let mut ini = format!(
            "[supervisord]\nnodaemon=true\nminfds=20000\nlogfile={0}/supervisord.log\npidfile={0}/pid\n[unix_http_server]\nfile={0}/socket\n\
             [rpcinterface:supervisor]\nsupervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n\
             [supervisorctl]\nserverurl=unix://{0}/socket\n",
            path.display()
        );
        for number in 0..count {
            let name = format!("s{number}");
            match self {
                Self::Ours => {
                    fs::write(
                        services.join(format!("{name}.yaml")),
                        format!("exec: {}\n", subject.display()),
                    )?;
                }
                Self::Zinit => {
                    fs::write(
                        services.join(format!("{name}.toml")),
                        format!("[service]\nname = \"{name}\"\nexec = \"{}\"\n", subject.display()),
                    )?;
                }
                Self::S6 | Self::Runit => {
                    fs::create_dir(services.join(&name))?;
                    symlink(subject, services.join(&name).join("run"))?;
                }
                Self::Supervisord => {
                    ini += &format!("[program:{name}]\ncommand={}\nstartsecs=0\n", subject.display());
                    ini += "stdout_logfile=NONE\nstderr_logfile=NONE\n";
                }
            }
        }
        if self == Self::Supervisord {
            fs::write(path.join("supervisord.conf"), ini)?;
        }
        fs::set_permissions(&services, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    fn command(self, program: &Path, path: &Path) -> Command {
        let mut command = Command::new(program);
        let services = path.join("services");
        match self {
            Self::Ours => command
                .arg("--socket")
                .arg(path.join("socket"))
                .args(["init", "--container", "--config"])
                .arg(services),
            // Where its client looks, whatever it is told.
            Self::Zinit => command
                .arg("--socket")
                .arg(path.join("hero/var/zinit.sock"))
                .arg("--config-dir")
                .arg(services),
            Self::S6 => command.args(["-c", "2000"]).arg(services),
            Self::Runit => command.arg(services),
            Self::Supervisord => command.arg("-c").arg(path.join("supervisord.conf")),
        };
        command
    }
}

impl Running {
    /// The command that stops or starts a service, and waits for that where it can.
    fn control(&self, verb: &str, service: &str) -> Result<Command> {
        let path = self.directory.path();
        let tool = |name: &str| {
            find(name)
                .map(Command::new)
                .with_context(|| format!("{name} is not installed"))
        };
        let mut command = match self.supervisor {
            Supervisor::Ours => {
                let mut command = Command::new(&self.program);
                command.arg("--socket").arg(path.join("socket")).args([verb, service]);
                command
            }
            Supervisor::Zinit => {
                let mut command = Command::new(self.program.with_file_name("zinit"));
                command.args([verb, service]).env("HOME", path);
                command
            }
            Supervisor::S6 => {
                let mut command = tool("s6-svc")?;
                command.args(if verb == "stop" { ["-d", "-wD"] } else { ["-u", "-wu"] });
                command.arg(path.join("services").join(service));
                command
            }
            Supervisor::Runit => {
                let mut command = tool("sv")?;
                command.arg(verb).arg(path.join("services").join(service));
                command
            }
            Supervisor::Supervisord => {
                let mut command = tool("supervisorctl")?;
                command
                    .arg("-c")
                    .arg(path.join("supervisord.conf"))
                    .args([verb, service]);
                command
            }
        };
        command
            .env("ZINIT_TRACKER_PINS", self.pins.path())
            .env_remove("RUST_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(command)
    }

    /// Stops the only service, and starts it again. How long it took until the command that stops it had ended and the process had,
    /// too.
    pub(crate) fn stop_and_start(&mut self) -> Result<Duration> {
        let mut stop = self.control("stop", "s0")?;
        let began = Instant::now();
        let status = stop.status()?;
        // The process has the FIFO open until it ends.
        self.fifo
            .wait_until_closed()
            .with_context(|| self.supervisor.name().to_owned())?;
        let took = began.elapsed();
        ensure!(
            status.success(),
            "{}: stop failed: {status}{}",
            self.supervisor.name(),
            self.log()
        );
        let status = self.control("start", "s0")?.status()?;
        ensure!(
            status.success(),
            "{}: start failed: {status}{}",
            self.supervisor.name(),
            self.log()
        );
        self.wait_for(1)?;
        Ok(took)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// Waits until so many programs have said that they run.
    fn wait_for(&mut self, count: usize) -> Result<()> {
        let (child, supervisor, log) = (&mut self.child, self.supervisor, self.directory.path().join("log"));
        let log = || fs::read_to_string(&log).unwrap_or_default();
        self.fifo
            .wait_for(count, || match child.try_wait()? {
                Some(status) => bail!("it has ended by {status}"),
                None => Ok(()),
            })
            .with_context(|| format!("{}: {}", supervisor.name(), log()))
    }

    /// The processes of the supervisor itself, without those of services.
    pub(crate) fn processes(&self, subject: &Path) -> Result<Vec<i32>> {
        let members = zinit_tests::members(&self.marker).into_iter().map(|member| member.pid);
        let is_service = |pid: &i32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == subject);
        let own: Vec<_> = members.filter(|pid| !is_service(pid)).collect();
        ensure!(!own.is_empty(), "{} is not there", self.supervisor.name());
        Ok(own)
    }

    /// Where our maps are pinned.
    pub(crate) fn pins(&self) -> &Path {
        self.pins.path()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Killed rather than shut down: the services are next, by their marker, and then the pins.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("failed to end {}: {error}", self.supervisor.name());
        }
    }
}
