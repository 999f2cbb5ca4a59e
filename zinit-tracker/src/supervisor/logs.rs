//! What services print: read from their pipes, kept in a ring, passed on to whoever follows.
//!
//! A service writes to a pipe that [`LogRing::capture`] makes. One task a pipe cuts what comes into lines; the ring keeps the
//! newest of all services. Nothing a service prints, or stops printing, can do harm: lines have a longest length, the ring
//! a most number of lines and bytes, and a follower that does not keep up loses lines and is told how many.
//!
//! The service's end of the pipe is open for reading too. So a service never gets SIGPIPE because the supervisor died,
//! and the supervisor's successor can take the pipe up again from a process that holds it ([`LogRing::recapture`]). One that
//! it hands over to gets the reading ends, and the lines, as they are ([`LogRing::pause`], [`LogRing::inherit`]).
//!
//! Deliberately absent: files, rotation, time stamps. zinit's ring has none either.

use std::{
    collections::{HashMap, VecDeque},
    fmt, fs, io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use rustix::{
    buffer::spare_capacity,
    fs::{FileType, Mode, OFlags},
    pipe::PipeFlags,
};
use serde::{Deserialize, Serialize};
use tokio::{
    net::unix::pipe,
    sync::{broadcast, mpsc, oneshot},
};

use super::answered::answered;

/// Lines that are kept unless told otherwise.
pub const DEFAULT_LINES: usize = 2000;

/// The longest line in bytes; what is longer is cut into several.
pub const MAX_LINE: usize = 8 * 1024;

/// The most bytes of text that the ring keeps, whatever its number of lines.
pub const MAX_BYTES: usize = 64 * 1024 * 1024;

/// Lines that a follower may be behind before it loses some.
const FOLLOWER_LAG: usize = 4096;

/// What one read takes from a pipe at most: what a pipe holds.
const READ_SIZE: usize = 64 * 1024;

/// What room for the next line a pipe keeps.
const KEPT: usize = 128;

/// What [`Capture::settle`] reads at most, so that it ends although somebody goes on writing.
const SETTLE_BYTES: usize = 1024 * 1024;

/// Why the output of a service cannot be captured.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// There was no pipe to be had.
    #[error("failed to create a pipe for the output of service {service:?}")]
    Pipe {
        /// The service.
        service: String,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A process's end of the pipe could not be opened.
    #[error("failed to take up {stream} of service {service:?} again")]
    Reopen {
        /// The service.
        service: String,
        /// Which of its streams.
        stream: Stream,
        /// What the kernel answered.
        source: io::Error,
    },
    /// Nobody has the pipe any more, so nothing can come from it.
    #[error("no process has the pipe of {stream} of service {service:?} any more")]
    NoPipe {
        /// The service.
        service: String,
        /// Which of its streams.
        stream: Stream,
    },
}

/// Where a service wrote a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

impl Stream {
    /// How the line begins, in zinit's words.
    const fn mark(self) -> &'static str {
        match self {
            Self::Out => "[+]",
            Self::Err => "[-]",
        }
    }
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Out => "standard output",
            Self::Err => "standard error",
        })
    }
}

/// A line that a service wrote. It prints as zinit's `[+] NAME: text` (`[-]`: standard error).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// The service.
    pub service: Arc<str>,
    /// Where it wrote the line.
    pub stream: Stream,
    /// The line without its end; bytes that are no UTF-8 are replaced.
    pub text: Box<str>,
}

impl fmt::Display for LogLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.stream.mark(), self.service, self.text)
    }
}

/// The newest lines of all services.
#[derive(Debug)]
pub struct LogRing(Mutex<Ring>);

#[derive(Debug)]
struct Ring {
    lines: VecDeque<Arc<LogLine>>,
    /// The number of the first of them; the very first line of all has number 0.
    first: u64,
    capacity: usize,
    bytes: usize,
    followers: broadcast::Sender<Arc<LogLine>>,
    pipes: Vec<Reading>,
    /// Pipes of the supervisor before, by inode, until their service takes them up.
    inherited: HashMap<u64, Capture>,
}

/// A pipe that is read, as long as it is.
#[derive(Debug)]
struct Reading {
    service: Arc<str>,
    stream: Stream,
    file: Weak<pipe::Receiver>,
    requests: mpsc::Sender<Request>,
}

/// What the reader of a pipe is asked for.
#[derive(Debug)]
enum Request {
    Settle(oneshot::Sender<()>),
    /// To settle, and then to read no more until the other end of `resumed` is gone.
    Pause {
        done: oneshot::Sender<()>,
        resumed: oneshot::Receiver<()>,
    },
}

impl Ring {
    fn push(&mut self, line: LogLine) {
        let line = Arc::new(line);
        self.bytes += line.text.len();
        self.lines.push_back(Arc::clone(&line));
        while self.lines.len() > self.capacity || self.bytes > MAX_BYTES {
            let Some(oldest) = self.lines.pop_front() else { break };
            self.bytes -= oldest.text.len();
            self.first += 1;
        }
        // That nobody follows is no error.
        drop(self.followers.send(line));
    }
}

impl LogRing {
    /// A ring of so many lines. 0 keeps none, and followers still get them all.
    #[must_use]
    pub fn new(lines: usize) -> Self {
        Self(Mutex::new(Ring {
            lines: VecDeque::new(),
            first: 0,
            capacity: lines,
            bytes: 0,
            followers: broadcast::Sender::new(FOLLOWER_LAG),
            pipes: Vec::new(),
            inherited: HashMap::new(),
        }))
    }

    /// Reads what is in the pipes now, and no more until the result is dropped. An unfinished line is ended.
    pub async fn pause(&self) -> Paused {
        let readings: Vec<_> = {
            let mut ring = self.ring();
            ring.pipes.retain(|pipe| pipe.file.strong_count() > 0);
            let reading = |pipe: &Reading| {
                let file = pipe.file.upgrade()?;
                Some((
                    PausedPipe {
                        service: Arc::clone(&pipe.service),
                        stream: pipe.stream,
                        file,
                    },
                    pipe.requests.clone(),
                ))
            };
            ring.pipes.iter().filter_map(reading).collect()
        };
        let mut paused = Paused {
            pipes: Vec::new(),
            _resumed: Vec::new(),
        };
        for (pipe, requests) in readings {
            let (done, settled) = oneshot::channel();
            let (resume, resumed) = oneshot::channel();
            // Either fails only if the pipe has ended, and then everything is in the ring.
            if requests.send(Request::Pause { done, resumed }).await.is_ok()
                && answered(settled, &requests).await.is_some()
            {
                paused.pipes.push(pipe);
                paused._resumed.push(resume);
            }
        }
        paused
    }

    /// Whether every pipe that is read now is among these.
    #[must_use]
    pub fn is_all(&self, paused: &Paused) -> bool {
        let ring = self.ring();
        let live = ring.pipes.iter().filter(|pipe| pipe.file.strong_count() > 0);
        let is_paused = |pipe: &Reading| {
            let mut files = paused.pipes.iter().map(|paused| Arc::as_ptr(&paused.file));
            files.any(|file| file == pipe.file.as_ptr())
        };
        live.into_iter().all(is_paused)
    }

    /// Takes up what another supervisor has paused: its lines, oldest first, and the pipes that it read.
    ///
    /// # Errors
    ///
    /// A descriptor is no pipe to read from; the others are taken up all the same.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    pub fn inherit(
        self: &Arc<Self>,
        lines: Vec<LogLine>,
        pipes: Vec<(Arc<str>, Stream, OwnedFd)>,
    ) -> Result<(), LogError> {
        for line in lines {
            self.ring().push(line);
        }
        let mut result = Ok(());
        for (service, stream, reader) in pipes {
            match self.read(Arc::clone(&service), stream, reader) {
                Ok(capture) => {
                    let (_, inode) = capture.pipe();
                    self.ring().inherited.insert(inode, capture);
                }
                Err(source) => {
                    result = Err(LogError::Reopen {
                        service: service.to_string(),
                        stream,
                        source,
                    })
                }
            }
        }
        result
    }

    /// Adds a line, without its end; bytes that are no UTF-8 are replaced.
    pub fn line(&self, service: &str, stream: Stream, bytes: &[u8]) {
        self.push(&service.into(), stream, bytes);
    }

    fn push(&self, service: &Arc<str>, stream: Stream, bytes: &[u8]) {
        self.ring().push(LogLine {
            service: Arc::clone(service),
            stream,
            text: String::from_utf8_lossy(bytes).into(),
        });
    }

    /// Marks that a service is being started, as zinit does.
    pub fn mark_start(&self, service: &str) {
        self.line(service, Stream::Err, b"------------ [start] ------------");
    }

    /// The lines in the ring, oldest first, of one service or of all.
    #[must_use]
    pub fn snapshot(&self, service: Option<&str>) -> Vec<Arc<LogLine>> {
        self.ring().select(service)
    }

    /// The lines that come from now on.
    #[must_use]
    pub fn follow(&self, service: Option<&str>) -> Follower {
        self.ring().follow(service)
    }

    /// The lines in the ring and those that come later: none is missing in between, none comes twice. What leaves the ring
    /// before it is taken is lost.
    #[must_use]
    pub fn follow_from_start(self: &Arc<Self>, service: Option<&str>) -> Follower {
        let ring = self.ring();
        let past = Past {
            logs: Arc::clone(self),
            next: ring.first,
            end: ring.first + ring.lines.len() as u64,
        };
        Follower {
            past: Some(past),
            ..ring.follow(service)
        }
    }

    /// Makes a pipe for a stream of a service and reads it from now on. The descriptor is the service's to inherit; every
    /// other copy must be closed after it was started, or the end of the pipe is never seen.
    ///
    /// # Errors
    ///
    /// The process has too many descriptors.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    pub fn capture(self: &Arc<Self>, service: &Arc<str>, stream: Stream) -> Result<(OwnedFd, Capture), LogError> {
        let failed = |source| LogError::Pipe {
            service: service.to_string(),
            source,
        };
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let writer = readable_too(writer);
        let capture = self.read(Arc::clone(service), stream, reader).map_err(failed)?;
        Ok((writer, capture))
    }

    /// Takes up a pipe again that an earlier supervisor made, from any of the processes that may hold it; `pipe` is what
    /// [`Capture::pipe`] said. What was written in the meantime is still in it: a pipe keeps 64 KiB, and then the writer waits.
    ///
    /// # Errors
    ///
    /// None of the processes has it, or it cannot be opened.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    pub fn recapture(
        self: &Arc<Self>,
        service: &Arc<str>,
        stream: Stream,
        pipe: u64,
        processes: &[u32],
    ) -> Result<Capture, LogError> {
        let failed = |source| LogError::Reopen {
            service: service.to_string(),
            stream,
            source,
        };
        if let Some(capture) = self.ring().inherited.remove(&pipe) {
            return Ok(capture);
        }
        let held = processes.iter().find_map(|pid| held_by(*pid, pipe));
        let path = held.ok_or_else(|| LogError::NoPipe {
            service: service.to_string(),
            stream,
        })?;
        // Even if the descriptor is another file's by now, opening it does nothing: not to a device, since it was a pipe of ours.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let reader = rustix::fs::open(&path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        if identity(&reader).map_err(failed)? != Some(pipe) {
            return Err(LogError::NoPipe {
                service: service.to_string(),
                stream,
            });
        }
        self.read(Arc::clone(service), stream, reader).map_err(failed)
    }

    fn read(self: &Arc<Self>, service: Arc<str>, stream: Stream, reader: OwnedFd) -> io::Result<Capture> {
        let inode = identity(&reader)?.unwrap_or(0);
        let file = Arc::new(pipe::Receiver::from_owned_fd(reader)?);
        let (requests, receiver) = mpsc::channel(1);
        {
            let mut ring = self.ring();
            ring.pipes.retain(|pipe| pipe.file.strong_count() > 0);
            ring.pipes.push(Reading {
                service: Arc::clone(&service),
                stream,
                file: Arc::downgrade(&file),
                requests: requests.clone(),
            });
        }
        let pipe = Pipe {
            logs: Arc::clone(self),
            service,
            stream,
            file,
            partial: Vec::new(),
            cut: false,
        };
        tokio::spawn(pipe.run(receiver));
        Ok(Capture {
            pipe: (stream, inode),
            requests,
        })
    }

    /// A panic while the lock was held cannot have left the ring in pieces that matter.
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn select(&self, service: Option<&str>) -> Vec<Arc<LogLine>> {
        self.lines
            .iter()
            .filter(|line| concerns(line, service))
            .cloned()
            .collect()
    }

    fn follow(&self, service: Option<&str>) -> Follower {
        Follower {
            past: None,
            lines: self.followers.subscribe(),
            service: service.map(ToOwned::to_owned),
        }
    }
}

fn concerns(line: &LogLine, service: Option<&str>) -> bool {
    service.is_none_or(|service| *line.service == *service)
}

/// The path of a descriptor by which a process holds a pipe.
fn held_by(pid: u32, pipe: u64) -> Option<PathBuf> {
    let wanted = format!("pipe:[{pipe}]");
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let mut paths = descriptors.filter_map(|entry| Some(entry.ok()?.path()));
    paths.find(|path| fs::read_link(path).is_ok_and(|leads| leads.as_os_str() == wanted.as_str()))
}

/// The pipes of [`LogRing::capture`] that a process has for its standard output and standard error, as [`Capture::pipe`] says
/// them. They are told by what other pipes are not: without a name, and the end to write to is open for reading too.
pub(super) fn captured_from(pid: u32) -> Vec<(Stream, u64)> {
    let mut found: Vec<(Stream, u64)> = Vec::new();
    for (stream, descriptor) in [(Stream::Out, 1), (Stream::Err, 2)] {
        let pipe = nameless_pipe(pid, descriptor).filter(|pipe| found.iter().all(|(_, known)| known != pipe));
        found.extend(pipe.map(|pipe| (stream, pipe)));
    }
    found
}

/// The inode of a pipe without a name that is open for both reading and writing.
fn nameless_pipe(pid: u32, descriptor: u32) -> Option<u64> {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{descriptor}")).ok()?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    let flags = OFlags::from_bits_retain(u32::from_str_radix(flags.trim(), 8).ok()?);
    if flags & OFlags::RWMODE != OFlags::RDWR {
        return None;
    }
    let leads = fs::read_link(format!("/proc/{pid}/fd/{descriptor}")).ok()?;
    leads.to_str()?.strip_prefix("pipe:[")?.strip_suffix(']')?.parse().ok()
}

/// The inode of a pipe; `None`: it is something else.
fn identity(file: &OwnedFd) -> io::Result<Option<u64>> {
    let stat = rustix::fs::fstat(file)?;
    Ok((FileType::from_raw_mode(stat.st_mode) == FileType::Fifo).then_some(stat.st_ino))
}

/// Opens a pipe's writing end for reading as well. Without `/proc` the end stays as it is: it works, but breaks if the
/// supervisor dies.
fn readable_too(writer: OwnedFd) -> OwnedFd {
    use std::os::fd::AsRawFd as _;
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap_or(writer)
}

/// Pipes that are not read for the time being; they are again when this is dropped.
#[derive(Debug)]
pub struct Paused {
    /// The pipes.
    pub pipes: Vec<PausedPipe>,
    _resumed: Vec<oneshot::Sender<()>>,
}

/// A pipe that is not read for the time being.
#[derive(Debug)]
pub struct PausedPipe {
    /// The service that writes to it.
    pub service: Arc<str>,
    /// Which of its streams.
    pub stream: Stream,
    /// The reading end.
    pub file: Arc<pipe::Receiver>,
}

/// A pipe that is being read. Reading goes on until every process that holds the pipe has closed it, also after this value
/// is gone: somebody who was let go on purpose may still write.
#[derive(Debug)]
pub struct Capture {
    pipe: (Stream, u64),
    requests: mpsc::Sender<Request>,
}

impl Capture {
    /// Which stream it reads, and the inode of the pipe, by which another supervisor finds it.
    #[must_use]
    pub fn pipe(&self) -> (Stream, u64) {
        self.pipe
    }

    /// Waits until what is in the pipe now is in the ring, and ends an unfinished line.
    pub async fn settle(&self) {
        let (done, settled) = oneshot::channel();
        // Either fails only if the pipe has ended, and then everything is in the ring.
        if self.requests.send(Request::Settle(done)).await.is_ok() {
            answered(settled, &self.requests).await;
        }
    }
}

/// The reading end of a pipe and the line that is not complete.
struct Pipe {
    logs: Arc<LogRing>,
    service: Arc<str>,
    stream: Stream,
    file: Arc<pipe::Receiver>,
    partial: Vec<u8>,
    /// A piece of the present line is in the ring already.
    cut: bool,
}

impl Pipe {
    async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut asked = true;
        loop {
            let read = tokio::select! {
                request = requests.recv(), if asked => {
                    match request {
                        Some(request) => self.asked(request).await,
                        None => asked = false,
                    }
                    continue;
                }
                read = self.read() => read,
            };
            match read {
                Ok(bytes) if bytes.is_empty() => break,
                Ok(bytes) => self.take(&bytes),
                Err(error) => {
                    tracing::warn!(service = %self.service, %error, "failed to read what the service prints");
                    break;
                }
            }
            // A service that floods its pipe must not keep others from theirs.
            tokio::task::yield_now().await;
        }
        self.end_line();
    }

    async fn asked(&mut self, request: Request) {
        self.settle();
        let (done, resumed) = match request {
            Request::Settle(done) => (done, None),
            Request::Pause { done, resumed } => (done, Some(resumed)),
        };
        if done.send(()).is_err() {
            tracing::trace!(service = %self.service, "whoever settled this has stopped waiting");
        }
        if let Some(resumed) = resumed {
            // An error is that the other end is gone, which is what is waited for.
            drop(resumed.await);
        }
    }

    /// What is there, once something is; nothing at the end. Has a buffer only meanwhile: there are two pipes a service, and
    /// most are silent.
    async fn read(&self) -> io::Result<Vec<u8>> {
        loop {
            self.file.readable().await?;
            let mut buffer = Vec::with_capacity(READ_SIZE);
            match self.file.try_read_buf(&mut buffer) {
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
                Ok(_) => return Ok(buffer),
            }
        }
    }

    fn settle(&mut self) {
        let mut buffer = Vec::with_capacity(READ_SIZE);
        let mut total = 0;
        while total < SETTLE_BYTES {
            // Not the runtime's `try_read`, which knows of what was written only after it has polled.
            buffer.clear();
            match rustix::io::read(&*self.file, spare_capacity(&mut buffer)) {
                Ok(0) => break,
                Ok(length) => {
                    self.take(&buffer);
                    total += length;
                }
                Err(rustix::io::Errno::INTR) => {}
                // Nothing is left; any other error is met again by the next read.
                Err(_) => break,
            }
        }
        self.end_line();
    }

    fn take(&mut self, mut bytes: &[u8]) {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            self.extend(&bytes[..end]);
            // An empty line is a line, unless it is the end of one that was cut.
            if !self.cut || !self.partial.is_empty() {
                self.push();
            }
            self.cut = false;
            bytes = &bytes[end + 1..];
        }
        self.extend(bytes);
    }

    /// Adds to the present line, and cuts it where it gets too long.
    fn extend(&mut self, mut bytes: &[u8]) {
        while self.partial.len() + bytes.len() > MAX_LINE {
            let (piece, rest) = bytes.split_at(MAX_LINE - self.partial.len());
            self.partial.extend_from_slice(piece);
            let carried = split_character(&self.partial);
            let carried = self.partial.split_off(self.partial.len() - carried);
            self.push();
            self.partial = carried;
            self.cut = true;
            bytes = rest;
        }
        self.partial.extend_from_slice(bytes);
    }

    fn end_line(&mut self) {
        if !self.partial.is_empty() {
            self.push();
        }
        self.cut = false;
    }

    fn push(&mut self) {
        let line = self.partial.strip_suffix(b"\r").unwrap_or(&self.partial);
        self.logs.push(&self.service, self.stream, line);
        self.partial.clear();
        // A long line must not cost memory as long as the service lives.
        self.partial.shrink_to(KEPT);
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// How many bytes at the end are the beginning of a character that goes on behind them.
fn split_character(bytes: &[u8]) -> usize {
    let tail = &bytes[bytes.len().saturating_sub(3)..];
    for (index, &byte) in tail.iter().enumerate().rev() {
        let have = tail.len() - index;
        let length = match byte {
            0xC2..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0..=0xF4 => 4,
            0x80..=0xBF => continue,
            _ => return 0,
        };
        return if have < length { have } else { 0 };
    }
    0
}

/// What a follower gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Followed {
    /// A line.
    Line(Arc<LogLine>),
    /// So many lines, of any service, came faster than they were taken, and are lost to this follower.
    Lost(u64),
}

impl fmt::Display for Followed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => line.fmt(f),
            Self::Lost(count) => write!(
                f,
                "[-] zinit: {count} lines are lost: they came faster than they were read"
            ),
        }
    }
}

/// Gets the lines that come, as fast as it takes them. Keeps none: one that takes nothing costs nothing.
#[derive(Debug)]
pub struct Follower {
    past: Option<Past>,
    lines: broadcast::Receiver<Arc<LogLine>>,
    service: Option<String>,
}

/// Lines that were in the ring when somebody began to follow it, and are not taken yet.
#[derive(Debug)]
struct Past {
    logs: Arc<LogRing>,
    /// The number of the next one.
    next: u64,
    /// The number of the first line that comes by the other way.
    end: u64,
}

impl Past {
    /// `None`: all have been taken.
    fn next(&mut self, service: Option<&str>) -> Option<Followed> {
        let ring = self.logs.ring();
        let lost = ring.first.min(self.end).saturating_sub(self.next);
        if lost > 0 {
            self.next += lost;
            return Some(Followed::Lost(lost));
        }
        while self.next < self.end {
            let index = usize::try_from(self.next - ring.first).ok()?;
            self.next += 1;
            let line = ring.lines.get(index)?;
            if concerns(line, service) {
                return Some(Followed::Line(Arc::clone(line)));
            }
        }
        None
    }
}

impl Follower {
    /// Whether lines may be left that were in the ring when it began.
    pub(crate) fn is_behind(&self) -> bool {
        self.past.is_some()
    }

    /// The next line of its service that was in the ring when it began, or how many were lost; `None`: all were taken.
    pub(crate) fn next_past(&mut self) -> Option<Followed> {
        let next = self.past.as_mut()?.next(self.service.as_deref());
        if next.is_none() {
            self.past = None;
        }
        next
    }

    /// The next line of its service, or how many were lost; `None` when the ring is gone.
    ///
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Followed> {
        if let Some(past) = self.next_past() {
            return Some(past);
        }
        loop {
            match self.lines.recv().await {
                Ok(line) if concerns(&line, self.service.as_deref()) => return Some(Followed::Line(line)),
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(count)) => return Some(Followed::Lost(count)),
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write as _, os::fd::AsFd as _};

    use super::*;

    fn texts(logs: &LogRing, service: Option<&str>) -> Vec<String> {
        logs.snapshot(service).iter().map(ToString::to_string).collect()
    }

    fn ring(lines: usize) -> Arc<LogRing> {
        Arc::new(LogRing::new(lines))
    }

    fn service(name: &str) -> Arc<str> {
        name.into()
    }

    /// What the ring has after a service has written this and closed its pipe.
    async fn written(chunks: &[&[u8]]) -> Vec<String> {
        let logs = ring(DEFAULT_LINES);
        let (writer, capture) = logs.capture(&service("web"), Stream::Out).unwrap();
        let mut writer = File::from(writer);
        for chunk in chunks {
            writer.write_all(chunk).unwrap();
            tokio::task::yield_now().await;
        }
        drop(writer);
        capture.requests.closed().await;
        texts(&logs, None)
            .iter()
            .map(|line| line.strip_prefix("[+] web: ").unwrap().to_owned())
            .collect()
    }

    #[tokio::test]
    async fn output_is_cut_into_lines() {
        assert_eq!(written(&[b"a\nb\r\n\nc"]).await, ["a", "b", "", "c"]);
        assert_eq!(written(&[b"par", b"tial\nrest"]).await, ["partial", "rest"]);
        assert_eq!(written(&[]).await, [""; 0]);
        assert_eq!(written(&[b"\n"]).await, [""]);
    }

    #[tokio::test]
    async fn what_is_paused_goes_on_where_it_was_or_with_a_successor() {
        let logs = ring(DEFAULT_LINES);
        let (writer, capture) = logs.capture(&service("web"), Stream::Out).unwrap();
        let mut writer = File::from(writer);
        writer.write_all(b"one\ntw").unwrap();
        let paused = logs.pause().await;
        assert_eq!(texts(&logs, None), ["[+] web: one", "[+] web: tw"]);
        writer.write_all(b"o\n").unwrap();
        tokio::task::yield_now().await;
        assert_eq!(texts(&logs, None).len(), 2);

        // As another program finds it.
        let reader = paused.pipes[0].file.as_fd().try_clone_to_owned().unwrap();
        let next = ring(DEFAULT_LINES);
        let lines = logs.snapshot(None).iter().map(|line| (**line).clone()).collect();
        next.inherit(lines, vec![(service("web"), Stream::Out, reader)])
            .unwrap();
        let (_, pipe) = capture.pipe();
        let taken_up = next.recapture(&service("web"), Stream::Out, pipe, &[]).unwrap();
        taken_up.settle().await;
        assert_eq!(texts(&next, None), ["[+] web: one", "[+] web: tw", "[+] web: o"]);
        let again = next.recapture(&service("web"), Stream::Out, pipe, &[]);
        assert!(matches!(again, Err(LogError::NoPipe { .. })));

        // As if that had failed: nobody else reads it.
        drop((taken_up, next));
        drop(paused);
        drop(writer);
        capture.requests.closed().await;
    }

    #[tokio::test]
    async fn bytes_that_are_no_utf8_are_replaced() {
        assert_eq!(written(&[b"a\xffb\0c\n"]).await, ["a\u{fffd}b\0c"]);
    }

    #[tokio::test]
    async fn a_long_line_is_cut_and_nothing_of_it_is_lost() {
        let lines = written(&[&[b'x'; MAX_LINE], b"\nshort\n"]).await;
        assert_eq!(lines, ["x".repeat(MAX_LINE), "short".to_owned()]);
        let lines = written(&[&[b'x'; MAX_LINE + 1], b"\nshort\n"]).await;
        assert_eq!(lines, ["x".repeat(MAX_LINE), "x".to_owned(), "short".to_owned()]);
        let lines = written(&[&[b'x'; 2 * MAX_LINE], b"\n\n"]).await;
        assert_eq!(lines, ["x".repeat(MAX_LINE), "x".repeat(MAX_LINE), String::new()]);
    }

    #[tokio::test]
    async fn a_line_is_not_cut_inside_a_character() {
        for before in 0..4 {
            let text = "x".repeat(before) + &"🦀".repeat(MAX_LINE / 4 + 3);
            let lines = written(&[text.as_bytes(), b"\n"]).await;
            assert_eq!(lines.concat(), text);
            assert_eq!(lines.len(), 2);
        }
    }

    #[tokio::test]
    async fn settling_brings_everything_written_so_far_into_the_ring() {
        let logs = ring(10);
        let (writer, capture) = logs.capture(&service("web"), Stream::Err).unwrap();
        let mut writer = File::from(writer);
        writer.write_all(b"one\ntwo").unwrap();
        capture.settle().await;
        assert_eq!(texts(&logs, None), ["[-] web: one", "[-] web: two"]);
        writer.write_all(b"three\n").unwrap();
        drop(writer);
        capture.settle().await;
        capture.settle().await;
        capture.requests.closed().await;
        assert_eq!(texts(&logs, None).len(), 3);
    }

    #[tokio::test]
    async fn a_pipe_is_read_on_after_its_capture_is_dropped() {
        let logs = ring(10);
        let mut follower = logs.follow(None);
        let (writer, capture) = logs.capture(&service("web"), Stream::Out).unwrap();
        drop(capture);
        File::from(writer).write_all(b"late\n").unwrap();
        let line = follower.next().await.unwrap();
        assert_eq!(line.to_string(), "[+] web: late");
    }

    #[tokio::test]
    async fn a_pipe_survives_its_reader_and_is_taken_up_again() {
        let first = ring(10);
        let (writer, capture) = first.capture(&service("web"), Stream::Out).unwrap();
        let script = "echo before; read -r line; echo after";
        let mut child = std::process::Command::new("sh")
            .args(["-c", script])
            .stdin(std::process::Stdio::piped())
            .stdout(writer)
            .spawn()
            .unwrap();
        let mut follower = first.follow(None);
        assert_eq!(follower.next().await.unwrap().to_string(), "[+] web: before");
        let (stream, pipe) = capture.pipe();
        drop(capture);

        let second = ring(10);
        let mut follower = second.follow(None);
        let again = second
            .recapture(&service("web"), stream, pipe, &[u32::MAX, child.id()])
            .unwrap();
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        child.wait().unwrap();
        drop(again);
        let first_line = tokio::select! {
            line = follower.next() => line.unwrap().to_string(),
            // The first reader may have got it instead, as it reads on in this test.
            () = async { while first.snapshot(None).len() < 2 { tokio::task::yield_now().await } } => {
                first.snapshot(None)[1].to_string()
            }
        };
        assert_eq!(first_line, "[+] web: after");
    }

    #[tokio::test]
    async fn pipes_that_were_made_are_known_from_others() {
        let ring = ring(1);
        let (out, capture) = ring.capture(&service("web"), Stream::Out).unwrap();
        let (err, other) = ring.capture(&service("web"), Stream::Err).unwrap();
        let (foreign, _writer) = io::pipe().unwrap();
        let both = out.try_clone().unwrap();
        let again = out.try_clone().unwrap();
        let sleep = |stdout: std::process::Stdio, stderr: std::process::Stdio| {
            let mut command = std::process::Command::new("sleep");
            command.arg("60").stdout(stdout).stderr(stderr).spawn().unwrap()
        };
        let cases = [
            (sleep(out.into(), err.into()), vec![capture.pipe(), other.pipe()]),
            (sleep(both.into(), std::process::Stdio::null()), vec![capture.pipe()]),
            (
                sleep(foreign.into(), again.into()),
                vec![(Stream::Err, capture.pipe().1)],
            ),
            (
                sleep(std::process::Stdio::piped(), std::process::Stdio::piped()),
                vec![],
            ),
        ];
        for (mut child, expected) in cases {
            let found = captured_from(child.id());
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(found, expected);
        }
        assert_eq!(captured_from(u32::MAX), []);
    }

    #[tokio::test]
    async fn only_the_pipe_that_was_made_is_taken_up() {
        let (_writer, capture) = ring(1).capture(&service("web"), Stream::Out).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let (stream, pipe) = capture.pipe();
        let result = ring(1).recapture(&service("web"), stream, pipe, &[child.id()]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(result, Err(LogError::NoPipe { .. })), "{result:?}");
    }

    #[test]
    fn the_ring_keeps_the_newest_lines() {
        let logs = ring(3);
        for number in 0..5 {
            logs.line("web", Stream::Out, number.to_string().as_bytes());
        }
        logs.line("db", Stream::Err, b"x");
        assert_eq!(texts(&logs, None), ["[+] web: 3", "[+] web: 4", "[-] db: x"]);
        assert_eq!(texts(&logs, Some("web")), ["[+] web: 3", "[+] web: 4"]);
        assert_eq!(texts(&logs, Some("we")), [""; 0]);
        ring(0).line("web", Stream::Out, b"kept nowhere");
    }

    #[test]
    fn the_ring_keeps_so_many_bytes_and_no_more() {
        let logs = ring(usize::MAX);
        let text = "x".repeat(MAX_LINE);
        for _ in 0..MAX_BYTES / MAX_LINE + 10 {
            logs.line("web", Stream::Out, text.as_bytes());
        }
        assert_eq!(logs.snapshot(None).len(), MAX_BYTES / MAX_LINE);
    }

    #[tokio::test]
    async fn a_slow_follower_loses_lines_and_is_told() {
        let logs = ring(1);
        let mut follower = logs.follow(Some("web"));
        for number in 0..FOLLOWER_LAG + 7 {
            logs.line("web", Stream::Out, number.to_string().as_bytes());
        }
        assert_eq!(follower.next().await, Some(Followed::Lost(7)));
        assert_eq!(follower.next().await.unwrap().to_string(), "[+] web: 7");
        drop(logs);
        let mut left = 0;
        while follower.next().await.is_some() {
            left += 1;
        }
        assert_eq!(left, FOLLOWER_LAG - 1);
    }

    #[tokio::test]
    async fn what_is_there_and_what_follows_are_complete() {
        let logs = ring(10);
        logs.line("web", Stream::Out, b"before");
        logs.line("db", Stream::Out, b"of another");
        let mut follower = logs.follow_from_start(Some("web"));
        logs.line("web", Stream::Out, b"after");
        assert_eq!(follower.next().await.unwrap().to_string(), "[+] web: before");
        assert!(follower.is_behind());
        assert_eq!(follower.next().await.unwrap().to_string(), "[+] web: after");
        assert!(!follower.is_behind());
    }

    #[tokio::test]
    async fn a_follower_keeps_no_lines_that_leave_the_ring() {
        let logs = ring(3);
        for number in 0..5 {
            logs.line("web", Stream::Out, number.to_string().as_bytes());
        }
        let mut follower = logs.follow_from_start(None);
        assert_eq!(follower.next().await.unwrap().to_string(), "[+] web: 2");
        let line = Arc::downgrade(&logs.snapshot(None)[1]);
        logs.line("web", Stream::Out, b"5");
        logs.line("web", Stream::Out, b"6");
        assert!(line.upgrade().is_none(), "the follower keeps it");
        assert_eq!(follower.next().await, Some(Followed::Lost(1)));
        for number in 4..=6 {
            let line = follower.next().await.unwrap();
            assert_eq!(line.to_string(), format!("[+] web: {number}"));
        }
    }
}
