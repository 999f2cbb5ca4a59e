//! Passing a supervisor on to another program in the same process: what is not in the books or on disk.
//!
//! The parcel is a memory file whose descriptor, and the pid that it is for, are in an environment variable. It names the
//! descriptors that stay open: the socket, its lock, the reading ends of services' pipes.

use std::{
    env,
    ffi::{CString, OsString},
    fs::File,
    io::{self, BufReader, BufWriter, Seek as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::Path,
    sync::OnceLock,
};

use rustix::{
    fs::MemfdFlags,
    io::{FdFlags, fcntl_getfd, fcntl_setfd},
};
use serde::{Deserialize, Serialize};
use zinit_tracker::{
    rpc::Listener,
    supervisor::{LogLine, LogRing, Paused, Stream, init},
};

/// What a parcel is written as. A program that reads another version is refused before.
pub(super) const VERSION: u32 = 1;

const VARIABLE: &str = "ZINIT_HANDOVER";

static RECEIVED: OnceLock<OsString> = OnceLock::new();

/// What is passed on; a line is a service, a stream and a text.
#[derive(Debug, Deserialize, Serialize)]
struct Contents<L> {
    version: u32,
    upgrades: u32,
    socket: RawFd,
    lock: RawFd,
    http: Option<String>,
    pipes: Vec<(String, Stream, RawFd)>,
    lines: Vec<L>,
}

/// What was passed on.
#[derive(Debug)]
pub(super) struct Parcel {
    /// How often a supervisor has been passed on in this process.
    pub(super) upgrades: u32,
    pub(super) socket: OwnedFd,
    pub(super) lock: OwnedFd,
    /// Where the HTTP server listened.
    pub(super) http: Option<String>,
    pub(super) pipes: Vec<(std::sync::Arc<str>, Stream, OwnedFd)>,
    pub(super) lines: Vec<LogLine>,
}

/// Takes the variable out of the environment, which services get. Must be called before there is a second thread.
pub(super) fn take_variable() {
    if let Some(value) = env::var_os(VARIABLE) {
        // SAFETY: there is no other thread yet that might read the environment.
        unsafe { env::remove_var(VARIABLE) };
        // It is empty until now.
        drop(RECEIVED.set(value));
    }
}

/// What the program before this one has passed on, if one has.
///
/// # Errors
///
/// It cannot be understood.
pub(super) fn receive() -> io::Result<Option<Parcel>> {
    let Some(value) = RECEIVED.get() else {
        return Ok(None);
    };
    let numbers = value.to_str().and_then(|value| value.split_once(':'));
    let numbers = numbers.and_then(|(pid, descriptor)| Some((pid.parse().ok()?, descriptor.parse().ok()?)));
    let (pid, descriptor): (u32, RawFd) = numbers.ok_or_else(|| invalid("the variable"))?;
    // A child that has it in its environment is somebody else.
    if pid != std::process::id() {
        return Ok(None);
    }
    let file = File::from(claim(descriptor)?);
    let contents: Contents<(String, Stream, String)> = serde_json::from_reader(BufReader::new(file))?;
    if contents.version != VERSION {
        return Err(invalid("the version"));
    }
    let pipes = contents
        .pipes
        .into_iter()
        .map(|(service, stream, descriptor)| Ok((service.into(), stream, claim(descriptor)?)));
    let lines = contents.lines.into_iter().map(|(service, stream, text)| LogLine {
        service: service.into(),
        stream,
        text: text.into(),
    });
    Ok(Some(Parcel {
        upgrades: contents.upgrades,
        socket: claim(contents.socket)?,
        lock: claim(contents.lock)?,
        http: contents.http,
        pipes: pipes.collect::<io::Result<_>>()?,
        lines: lines.collect(),
    }))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{what} of what was handed over is no good"),
    )
}

/// Makes a descriptor this program's own.
fn claim(descriptor: RawFd) -> io::Result<OwnedFd> {
    if descriptor <= 2 {
        return Err(invalid("a descriptor"));
    }
    // SAFETY: only asked whether it is open, for as long as the next line takes; no other thread opens or closes any yet.
    fcntl_getfd(unsafe { BorrowedFd::borrow_raw(descriptor) })?;
    // SAFETY: it is open, and this process has it from the program before, for nobody but us.
    let owned = unsafe { OwnedFd::from_raw_fd(descriptor) };
    fcntl_setfd(&owned, FdFlags::CLOEXEC)?;
    Ok(owned)
}

/// Everything that executing a program takes, made before: after that there is nothing that could fail for want of descriptors or memory.
pub(super) struct Departure<'a> {
    program: CString,
    arguments: Vec<CString>,
    variables: Vec<CString>,
    parcel: File,
    kept: Vec<BorrowedFd<'a>>,
}

impl<'a> Departure<'a> {
    /// Writes the parcel.
    ///
    /// # Errors
    ///
    /// There is no descriptor, or no memory, for it.
    pub(super) fn prepare(
        binary: &Path,
        listener: &'a Listener,
        http: Option<String>,
        upgrades: u32,
        (logs, paused): (&LogRing, &'a Paused),
    ) -> io::Result<Self> {
        let descriptors = listener.descriptors();
        let (socket, lock) = descriptors.ok_or_else(|| io::Error::other("the socket has no lock"))?;
        let lines = logs.snapshot(None);
        let pipes = paused.pipes.iter();
        let contents = Contents {
            version: VERSION,
            upgrades: upgrades + 1,
            socket: socket.as_raw_fd(),
            lock: lock.as_raw_fd(),
            http,
            pipes: pipes
                .map(|pipe| (pipe.service.to_string(), pipe.stream, pipe.file.as_raw_fd()))
                .collect(),
            lines: lines
                .iter()
                .map(|line| (&*line.service, line.stream, &*line.text))
                .collect(),
        };
        let parcel = File::from(rustix::fs::memfd_create("zinit-handover", MemfdFlags::CLOEXEC)?);
        let mut writer = BufWriter::new(&parcel);
        serde_json::to_writer(&mut writer, &contents)?;
        writer.flush()?;
        drop(writer);
        (&parcel).rewind()?;
        let arguments = env::args_os().map(|argument| c_string(argument.into_vec()));
        let mut variables: Vec<_> = env::vars_os()
            .map(|(name, value)| c_string([name.as_bytes(), b"=", value.as_bytes()].concat()))
            .collect::<Result<_, _>>()?;
        let variable = format!("{VARIABLE}={}:{}", std::process::id(), parcel.as_raw_fd());
        variables.push(c_string(variable.into_bytes())?);
        Ok(Self {
            program: c_string(binary.as_os_str().as_bytes().to_vec())?,
            arguments: arguments.collect::<Result<_, _>>()?,
            variables,
            parcel,
            kept: [socket, lock]
                .into_iter()
                .chain(paused.pipes.iter().map(|pipe| pipe.file.as_fd()))
                .collect(),
        })
    }

    /// Executes the program in this process, unless something has come in between. Returns only if it is not executed; then everything
    /// is as before.
    pub(super) fn leave(&self, in_between: impl FnOnce() -> Option<&'static str>) -> io::Error {
        // They would end the successor before it handles them, and wait for it this way. All other threads block them always.
        init::block_signals();
        let error = match in_between() {
            Some(reason) => io::Error::other(reason),
            None => self.execute().unwrap_err(),
        };
        init::unblock_signals();
        error
    }

    fn execute(&self) -> io::Result<std::convert::Infallible> {
        let keep = |flags: FdFlags| {
            let mut kept = self.kept.iter().copied().chain([self.parcel.as_fd()]);
            kept.try_for_each(|descriptor| fcntl_setfd(descriptor, flags))
        };
        let result = keep(FdFlags::empty())
            .map_err(io::Error::from)
            .and_then(|()| Ok(nix::unistd::execve(&self.program, &self.arguments, &self.variables)?));
        if let Err(error) = keep(FdFlags::CLOEXEC) {
            tracing::warn!(%error, "services will get a descriptor that is not for them");
        }
        result
    }
}

fn c_string(bytes: Vec<u8>) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| invalid("a text"))
}
