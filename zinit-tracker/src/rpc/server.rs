//! The Unix socket that clients connect to.
//!
//! Only root and the supervisor's own user may: the socket's mode says so, and the kernel's word about every peer. A socket
//! that a live supervisor listens on is left alone; one that was left behind is replaced. A lock beside it, held as long as the
//! server lives, keeps others away also if the socket is removed.

use std::{
    fs, io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::{FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::resource::{Resource, getrlimit};
use rustix::{
    fs::Mode,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use tokio::{
    io::AsyncWriteExt as _,
    net::{UnixListener, UnixStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, timeout},
};

use super::{
    connection,
    dispatch::Dispatcher,
    error::RpcError,
    lock::{Holder, Lock},
    message::Answer,
    room::{MAX_WAITING, Room},
    slots::Slots,
};

/// Connections at once, if the limit of descriptors allows it: they get a quarter.
const MAX_CONNECTIONS: usize = 1024;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// How long a process that a killed supervisor was creating may take to close the socket after the lock.
const CLOSING: Duration = Duration::from_secs(1);

/// How long clients may take to get their last answers when the server ends.
const FAREWELL: Duration = Duration::from_secs(5);

/// Why there is no socket for clients.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// It would be taken away from somebody.
    #[error("{} is listening on {} already: shut it down first, or name another socket with --socket", .1, .0.display())]
    Live(PathBuf, Holder),
    /// Somebody who does not listen there has the place: its socket was removed, or it hangs.
    #[error(
        "{} has {}, though nobody listens there: end it first (SIGTERM shuts it down), or name another socket with --socket",
        .1, .0.display()
    )]
    Held(PathBuf, Holder),
    /// It is something that we did not make.
    #[error("{} is there and no socket: remove it, or name another socket with --socket", .0.display())]
    NoSocket(PathBuf),
    /// Its lock is a file that we did not make, or that others can open.
    #[error("{} is no lock of this user's: remove it, or name another socket with --socket", .0.display())]
    NoLock(PathBuf),
    /// The kernel has a limit of 107 bytes.
    #[error("{} is too long for the path of a socket: it can have 107 bytes", .0.display())]
    TooLong(PathBuf),
    /// The path cannot be used.
    #[error("failed to {operation} {}", path.display())]
    Path {
        /// What was tried.
        operation: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// A socket that is in place; nobody is served yet, but clients can connect and wait.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode: whether it is still ours when it is to be removed.
    identity: (u64, u64),
    lock: Option<Lock>,
}

impl Listener {
    /// Puts the socket in place.
    ///
    /// # Errors
    ///
    /// The path is taken or cannot be used.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    pub async fn bind(path: &Path) -> Result<Self, ServerError> {
        let failed = |operation| {
            move |source: io::Error| ServerError::Path {
                operation,
                path: path.to_owned(),
                source,
            }
        };
        let address = SocketAddrUnix::new(path).map_err(|_| ServerError::TooLong(path.to_owned()))?;
        let lock = Lock::take(path).await?;
        make_room(path).await?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|error| failed("create the socket")(error.into()))?;
        rustix::net::bind(&socket, &address).map_err(|error| failed("create the socket")(error.into()))?;
        let metadata = fs::symlink_metadata(path).map_err(failed("look at"))?;
        // Nobody can connect before it listens.
        rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR).map_err(|error| failed("protect")(error.into()))?;
        rustix::net::listen(&socket, BACKLOG).map_err(|error| failed("listen on")(error.into()))?;
        let listener = UnixListener::from_std(socket.into()).map_err(failed("listen on"))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
            lock: Some(lock),
        })
    }

    /// Takes over what [`Listener::descriptors`] gave out in the process that this one was before it executed another program.
    ///
    /// # Errors
    ///
    /// They are not the socket at this path and its lock.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    pub fn inherit(path: &Path, socket: OwnedFd, lock: OwnedFd) -> Result<Self, ServerError> {
        let failed = |operation| {
            move |source: io::Error| ServerError::Path {
                operation,
                path: path.to_owned(),
                source,
            }
        };
        let taken = rustix::net::getsockname(&socket).map_err(|error| failed("recognise")(error.into()))?;
        let ours = SocketAddrUnix::try_from(taken)
            .is_ok_and(|taken| taken.path_bytes() == Some(path.as_os_str().as_encoded_bytes()));
        let metadata = fs::symlink_metadata(path).map_err(failed("look at"))?;
        if !ours || !metadata.file_type().is_socket() {
            return Err(ServerError::NoSocket(path.to_owned()));
        }
        let lock = Lock::inherit(lock.into(), path).map_err(failed("keep the lock of"))?;
        Ok(Self {
            listener: UnixListener::from_std(socket.into()).map_err(failed("listen on"))?,
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
            lock: Some(lock),
        })
    }

    /// The socket and its lock, for a program that this process executes. `None`: there is no lock.
    #[must_use]
    pub fn descriptors(&self) -> Option<(BorrowedFd<'_>, BorrowedFd<'_>)> {
        Some((self.listener.as_fd(), self.lock.as_ref()?.file().as_fd()))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours =
            fs::symlink_metadata(&self.path).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "failed to remove the socket");
        }
    }
}

/// Removes a socket that nobody listens on.
async fn make_room(path: &Path) -> Result<(), ServerError> {
    let failed = |operation| {
        move |source| ServerError::Path {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => return Err(ServerError::NoSocket(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at")(error)),
    }
    let deadline = Instant::now() + CLOSING;
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                tracing::info!(path = %path.display(), "replacing a socket that nobody listens on");
                return fs::remove_file(path).map_err(failed("remove the stale socket"));
            }
            Err(error) if !means_live(&error) => return Err(failed("connect to")(error)),
            _ if Instant::now() < deadline => sleep(CLOSING / 100).await,
            // Somebody without our lock.
            _ => return Err(ServerError::Live(path.to_owned(), Holder::UNKNOWN)),
        }
    }
}

/// Whether somebody listens on the socket.
pub(super) async fn is_live(path: &Path) -> bool {
    match UnixStream::connect(path).await {
        Ok(_) => true,
        Err(error) => means_live(&error),
    }
}

/// The queue is full (EAGAIN), or its sockets are of another kind.
fn means_live(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::EPROTOTYPE)
}

/// Serves clients until it is closed.
#[derive(Debug)]
pub struct Server {
    finishing: watch::Sender<bool>,
    accepting: JoinHandle<(Listener, JoinSet<()>)>,
    dispatcher: Dispatcher,
    /// Not the listener's, which goes before the last clients have gone.
    lock: Option<Lock>,
}

impl Server {
    /// Begins to serve the clients of a socket.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    #[must_use]
    pub fn start(mut listener: Listener, dispatcher: Dispatcher) -> Self {
        let lock = listener.lock.take();
        let (finishing, finished) = watch::channel(false);
        let accepting = tokio::spawn(accept(listener, dispatcher.clone(), finished));
        Self {
            finishing,
            accepting,
            dispatcher,
            lock,
        }
    }

    /// Accepts nobody any more, answers what is under way, and removes the socket.
    pub async fn close(self) {
        let Self {
            finishing,
            accepting,
            dispatcher,
            lock: _lock,
        } = self;
        dispatcher.close().await;
        finishing.send_replace(true);
        if let Ok((listener, connections)) = accepting.await {
            drop(listener);
            Self::see_off(connections).await;
        }
    }

    /// As [`Server::close`], but the socket stays: clients can connect to it, and wait. `closed` is done once nobody is let in any
    /// more, before what is under way is waited for. `None`: the socket is gone.
    pub async fn hand_over(self, closed: impl FnOnce()) -> Option<Listener> {
        let Self {
            finishing,
            accepting,
            dispatcher,
            lock,
        } = self;
        dispatcher.close().await;
        finishing.send_replace(true);
        let accepted = accepting.await.ok();
        closed();
        let (mut listener, connections) = accepted?;
        listener.lock = lock;
        Self::see_off(connections).await;
        Some(listener)
    }

    async fn see_off(mut connections: JoinSet<()>) {
        let farewell = async { while connections.join_next().await.is_some() {} };
        if timeout(FAREWELL, farewell).await.is_err() {
            tracing::info!(clients = connections.len(), "clients did not take their last answers");
        }
    }
}

/// The number of connections that there is room for: whatever clients do, there are descriptors left for services.
fn most_connections() -> usize {
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
    usize::try_from(descriptors / 4)
        .unwrap_or(MAX_CONNECTIONS)
        .clamp(8, MAX_CONNECTIONS)
}

async fn accept(
    listener: Listener,
    dispatcher: Dispatcher,
    mut finishing: watch::Receiver<bool>,
) -> (Listener, JoinSet<()>) {
    let slots = Slots::new(most_connections());
    let room = Room::new(MAX_WAITING);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.listener.accept() => accepted,
            Some(ended) = connections.join_next(), if !connections.is_empty() => {
                if let Err(error) = ended {
                    tracing::error!(%error, "serving a client failed");
                }
                continue;
            }
            _ = finishing.wait_for(|finishing| *finishing) => return (listener, connections),
        };
        match accepted {
            Ok((stream, _)) => {
                if let Err(refusal) = check_peer(&stream) {
                    connections.spawn(refuse(stream, refusal));
                } else if let Some(slot) = slots.take() {
                    let (dispatcher, room) = (dispatcher.clone(), room.clone());
                    connections.spawn(connection::serve(stream, dispatcher, room, slot, finishing.clone()));
                } else {
                    let refusal = RpcError::busy("all connections are in use: try again later");
                    connections.spawn(refuse(stream, refusal));
                }
            }
            Err(error) => {
                // Out of descriptors, or of memory. The client waits in the queue meanwhile.
                tracing::warn!(%error, "failed to accept a client");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Root and the supervisor's own user may do everything, others nothing.
fn check_peer(stream: &UnixStream) -> Result<(), RpcError> {
    let ours = rustix::process::geteuid().as_raw();
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == ours => Ok(()),
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "refused a client of another user");
            Err(RpcError::invalid_request(
                "only root and the supervisor's own user may connect",
            ))
        }
        Err(error) => {
            tracing::warn!(%error, "refused a client whose user is not known");
            Err(RpcError::invalid_request("your user is not known"))
        }
    }
}

/// Says why, and hangs up. What fits into an empty socket's buffer takes no time.
async fn refuse(mut stream: UnixStream, error: RpcError) {
    let answer = Answer::to_nobody(error).to_json() + "\n";
    match timeout(Duration::from_secs(1), stream.write_all(answer.as_bytes())).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a client did not wait to be refused"),
        Err(_) => tracing::debug!("a client did not listen to why it is refused"),
    }
}
