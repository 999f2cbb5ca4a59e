//! A `zinit` daemon of a test's own: its own socket, service files and pins, driven as users drive it.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    Cleanup, Marker,
    sandbox::{DEADLINE, PinDir},
    survivors,
    tool::{tool, zinit},
};

/// How often a condition is looked at that nothing announces.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// A daemon, and what it needs.
#[derive(Debug)]
pub struct Daemon {
    child: Option<Child>,
    _cleanup: Cleanup,
    pins: PinDir,
    directory: TempDir,
    /// What every process of its services carries.
    pub marker: Marker,
}

impl Daemon {
    /// A daemon with these service files, each a name and a text. It is not started yet.
    #[must_use]
    pub fn prepare(files: &[(&str, &str)]) -> Self {
        let marker = Marker::new();
        let daemon = Self {
            child: None,
            _cleanup: Cleanup::new(&marker),
            pins: PinDir::new(),
            directory: TempDir::new().expect("a directory can be made"),
            marker,
        };
        fs::create_dir(daemon.config()).expect("it is our directory");
        for (name, text) in files {
            daemon.write(name, text);
        }
        daemon
    }

    /// A daemon that serves its clients.
    #[must_use]
    pub fn start(files: &[(&str, &str)]) -> Self {
        let mut daemon = Self::prepare(files);
        daemon.run();
        daemon
    }

    /// Starts the daemon, and returns when it serves its clients.
    pub fn run(&mut self) {
        self.run_as(self.init(&[]));
    }

    /// Starts the daemon by this command, and returns when it serves its clients.
    pub fn run_as(&mut self, command: Command) {
        self.spawn(command);
        wait_for("the daemon answers", || self.zinit(&["list"]).status.success());
    }

    /// Starts the daemon by this command, and returns before it serves its clients.
    pub fn spawn(&mut self, mut command: Command) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .expect("it is our directory");
        self.child = Some(command.stderr(log).spawn().expect("zinit can be run"));
    }

    /// As [`Daemon::run_as`], with another stderr than the file that [`Daemon::log`] reads.
    pub fn run_with_stderr(&mut self, mut command: Command, stderr: Stdio) {
        self.child = Some(command.stderr(stderr).spawn().expect("zinit can be run"));
        wait_for("the daemon answers", || self.zinit(&["list"]).status.success());
    }

    /// The command that starts the daemon, with more arguments.
    #[must_use]
    pub fn init(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(&["init", "--container", "--config"]);
        command.arg(self.config()).args(arguments).stdout(Stdio::null());
        command
    }

    /// A `zinit` command for this daemon.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(zinit());
        command
            .arg("--socket")
            .arg(self.socket())
            .args(arguments)
            .env("ZINIT_TRACKER_PINS", self.pins.path())
            .env(Marker::ENV, self.marker.as_str())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    /// Runs a `zinit` command.
    #[must_use]
    pub fn zinit(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("zinit can be run")
    }

    /// What a `zinit` command prints, which must succeed.
    #[must_use]
    pub fn prints(&self, arguments: &[&str]) -> String {
        let output = self.zinit(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {stderr}{}", self.log());
        assert_eq!(stderr, "", "{arguments:?}");
        String::from_utf8(output.stdout).expect("it prints UTF-8")
    }

    /// Runs a `zinit` command that must succeed and print nothing.
    pub fn does(&self, arguments: &[&str]) {
        assert_eq!(self.prints(arguments), "", "{arguments:?}");
    }

    /// Where its maps are pinned.
    #[must_use]
    pub fn pins(&self) -> &Path {
        self.pins.path()
    }

    /// A `zinit-tracker` command for this daemon's pins.
    #[must_use]
    pub fn tracker(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(tool());
        command.args(arguments).env("ZINIT_TRACKER_PINS", self.pins.path());
        command.env_remove("RUST_LOG").stdin(Stdio::null());
        command.output().expect("zinit-tracker can be run")
    }

    /// The one line on stderr of a `zinit` command, which must fail with status 1.
    #[must_use]
    pub fn refuses(&self, arguments: &[&str]) -> String {
        let output = self.zinit(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{arguments:?}: {stderr}");
        assert!(stderr.starts_with("zinit: "), "{stderr}");
        stderr
    }

    /// What JSON a `zinit` command prints.
    #[must_use]
    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.prints(arguments)).expect("it prints JSON")
    }

    /// The state of a service.
    #[must_use]
    pub fn state(&self, service: &str) -> String {
        let states = self.json(&["list", "--json"]);
        states[service].as_str().unwrap_or("not supervised").to_owned()
    }

    /// The main process of a service; 0: none.
    #[must_use]
    pub fn pid(&self, service: &str) -> u64 {
        self.json(&["status", service, "--json"])["pid"]
            .as_u64()
            .expect("a status has a pid")
    }

    /// Waits until a service is in a state that begins like this.
    pub fn wait_for_state(&self, service: &str, state: &str) {
        wait_for(&format!("{service} is {state}"), || {
            let now = self.state(service);
            now.starts_with(state)
        });
    }

    /// Writes a service file.
    pub fn write(&self, service: &str, text: &str) {
        fs::write(self.config().join(format!("{service}.yaml")), text).expect("it is our directory");
    }

    /// Defines a service that runs a shell script, with more lines of its file, and returns what its processes carry besides, and
    /// what ends them.
    #[must_use]
    pub fn define(&self, service: &str, script: &str, more: &str) -> (Marker, Cleanup) {
        let marker = Marker::new();
        let path = self.script(&format!("{service}.sh"), script);
        let variable = format!("{}: {}", Marker::ENV, marker.as_str());
        self.write(service, &format!("exec: {path}\nenv: {{{variable}}}\n{more}"));
        let cleanup = Cleanup::new(&marker);
        (marker, cleanup)
    }

    /// Writes a script that a service can run, and returns its path.
    #[must_use]
    pub fn script(&self, name: &str, text: &str) -> String {
        let path = self.directory.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("it is our directory");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("it is our file");
        path.to_str().expect("our paths are UTF-8").to_owned()
    }

    /// The directory of service files.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.directory.path().join("config")
    }

    /// A place for whatever the test needs.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    /// Where clients connect.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("zinit.sock")
    }

    /// What keeps other daemons from that place.
    #[must_use]
    pub fn socket_lock(&self) -> PathBuf {
        self.directory.path().join("zinit.sock.lock")
    }

    /// Where it saves states for the daemon that follows.
    #[must_use]
    pub fn state_directory(&self) -> PathBuf {
        self.directory.path().join("zinit.sock.state")
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("stderr")
    }

    /// What the daemon has said so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// A connection to the daemon.
    #[must_use]
    pub fn connect(&self) -> Connection {
        let stream = UnixStream::connect(self.socket()).expect("the daemon listens");
        stream
            .set_read_timeout(Some(DEADLINE))
            .expect("a socket can have a timeout");
        stream
            .set_write_timeout(Some(DEADLINE))
            .expect("a socket can have a timeout");
        let reader = BufReader::new(stream.try_clone().expect("there are descriptors left"));
        Connection { reader, stream }
    }

    /// The result of a request over a connection of its own.
    #[must_use]
    pub fn call(&self, method: &str, params: &Value) -> Value {
        let answer = self.connect().call(method, params);
        assert!(answer["error"].is_null(), "{method}: {answer}");
        answer["result"].clone()
    }

    /// The error of a request over a connection of its own.
    #[must_use]
    pub fn error(&self, method: &str, params: &Value) -> Value {
        let answer = self.connect().call(method, params);
        assert!(answer["error"].is_object(), "{method}: {answer}");
        answer["error"].clone()
    }

    /// The daemon's own process.
    #[must_use]
    pub fn process(&self) -> Pid {
        let child = self.child.as_ref().expect("it has been started");
        let pid = i32::try_from(child.id()).expect("a pid fits");
        Pid::from_raw(pid).expect("a pid is not 0")
    }

    /// Sends the daemon itself a signal.
    pub fn signal(&self, signal: Signal) {
        // It is our child and not reaped: the pid is its.
        let pidfd = pidfd_open(self.process(), PidfdFlags::empty()).expect("it is our child");
        pidfd_send_signal(&pidfd, signal).expect("it is our child");
    }

    /// Waits for the daemon's end.
    pub fn wait(&mut self) -> ExitStatus {
        let child = self.child.as_mut().expect("it has been started");
        let mut ended = None;
        wait_for("the daemon ends", || {
            ended = child.try_wait().expect("it is our child");
            ended.is_some()
        });
        self.child = None;
        ended.expect("it has ended")
    }

    /// Shuts the daemon down, and asserts that this went well and nothing is left.
    pub fn shutdown(mut self) {
        self.does(&["shutdown"]);
        self.assert_ends_well();
    }

    /// Waits for the end of a daemon that was asked to end, and asserts that nothing is left.
    pub fn assert_ends_well(&mut self) {
        let status = self.wait();
        assert!(status.success(), "{status}: {}", self.log());
        assert_eq!(survivors(&self.marker), [], "{}", self.log());
        assert!(!self.socket().exists(), "the socket is left");
        assert!(!self.socket_lock().exists(), "the socket's lock is left");
        assert!(!self.state_directory().exists(), "saved states are left");
        assert!(!self.pins.path().exists(), "pins are left: {}", self.log());
        assert!(!self.log().contains("panicked"), "{}", self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The marker finds its services, and the daemon; but only its parent can reap it.
        if let Some(child) = &mut self.child {
            eprintln!(
                "the daemon said:\n{}",
                fs::read_to_string(self.directory.path().join("stderr")).unwrap_or_default()
            );
            if let Err(error) = child.kill().and_then(|()| child.wait()) {
                eprintln!("failed to end the daemon: {error}");
            }
        }
    }
}

/// A connection that speaks lines.
#[derive(Debug)]
pub struct Connection {
    reader: BufReader<UnixStream>,
    /// The other direction.
    pub stream: UnixStream,
}

impl Connection {
    /// Sends text as it is.
    pub fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).expect("the daemon reads");
    }

    /// Sends a request without waiting for its answer.
    pub fn request(&mut self, id: u64, method: &str, params: &Value) {
        let request = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
        self.send(&format!("{request}\n"));
    }

    /// The next line; `None`: the daemon has hung up.
    pub fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let length = self.reader.read_line(&mut line).expect("the daemon answers in time");
        (length > 0).then_some(line)
    }

    /// The next message.
    pub fn message(&mut self) -> Value {
        let line = self.line().expect("the daemon answers");
        serde_json::from_str(&line).expect("it answers JSON")
    }

    /// The answer to a request.
    pub fn call(&mut self, method: &str, params: &Value) -> Value {
        self.request(1, method, params);
        self.message()
    }
}

/// Has a command run by another one, such as setpriv(1), that executes what its arguments end with.
#[must_use]
pub fn within(mut wrapper: Command, inner: &Command) -> Command {
    wrapper.arg(inner.get_program()).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => wrapper.env(name, value),
            None => wrapper.env_remove(name),
        };
    }
    wrapper.stdin(Stdio::null()).stdout(Stdio::null());
    wrapper
}

/// Waits until something is so.
///
/// # Panics
///
/// If it is not so in time.
pub fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(LOOK_AGAIN);
    }
}
