//! The client's side of the socket.

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt as _,
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::{Instant, sleep},
};

use super::{
    error::RpcError,
    lines::{Line, Lines},
};

/// The longest answer in bytes: every line of a large ring.
pub(super) const MAX_ANSWER: usize = 512 * 1024 * 1024;

/// How long a client waits for a place in the queue of a supervisor that is busy, or stopped.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it looks for one.
const TRY_AGAIN: Duration = Duration::from_millis(10);

/// Why a request got no answer, or which error it got.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("failed to connect to {}: is `zinit init` running, and with this socket?", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to {} broke", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
    /// The supervisor hung up before it answered.
    #[error("the supervisor at {} hung up before it answered", .0.display())]
    Closed(PathBuf),
    /// The answer is none.
    #[error("what answers at {} is no zinit: {reason}", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The supervisor answered with an error.
    #[error("{}", .0.line())]
    Rpc(RpcError),
}

/// Connects to a socket. While more wait for a place there than it has places to wait, it is tried again, as no descriptor announces one.
pub(super) async fn connect(path: &Path) -> io::Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                sleep(TRY_AGAIN).await
            }
            result => return result,
        }
    }
}

/// A connection to a supervisor.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    lines: Lines<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    requests: u64,
    /// Subscribed lines that came while an answer was awaited.
    notified: VecDeque<String>,
}

impl Client {
    /// Connects to the supervisor at a socket.
    ///
    /// # Errors
    ///
    /// [`ClientError::Connect`].
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    pub async fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = connect(path).await.map_err(|source| ClientError::Connect {
            path: path.to_owned(),
            source,
        })?;
        let (reader, writer) = stream.into_split();
        Ok(Self {
            path: path.to_owned(),
            lines: Lines::new(reader, MAX_ANSWER),
            writer,
            requests: 0,
            notified: VecDeque::new(),
        })
    }

    /// Asks for something and waits for the answer, as long as that takes.
    ///
    /// # Errors
    ///
    /// The supervisor's error, or none came, or the result is of another shape.
    pub async fn call<T: DeserializeOwned>(&mut self, method: &str, params: Value) -> Result<T, ClientError> {
        self.requests += 1;
        let id = json!(self.requests);
        let request = json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
        let sent = self.writer.write_all(format!("{request}\n").as_bytes()).await;
        // A supervisor that refuses a connection says why before it hangs up.
        if let Err(source) = sent
            && source.kind() != io::ErrorKind::BrokenPipe
        {
            return Err(self.broken(source));
        }
        loop {
            let mut message = self.message().await?;
            if message["method"].is_string() {
                self.notify(&message);
                continue;
            }
            if message["id"] != id && !message["id"].is_null() {
                continue;
            }
            if !message["error"].is_null() {
                let error = serde_json::from_value(message["error"].take());
                return Err(error.map_or_else(|error| self.protocol(&error.to_string()), ClientError::Rpc));
            }
            return serde_json::from_value(message["result"].take()).map_err(|error| self.protocol(&error.to_string()));
        }
    }

    /// The next line of a subscription; `None`: the supervisor has ended.
    ///
    /// # Errors
    ///
    /// The connection broke.
    pub async fn next_line(&mut self) -> Result<Option<String>, ClientError> {
        loop {
            if let Some(line) = self.notified.pop_front() {
                return Ok(Some(line));
            }
            match self.message().await {
                Ok(message) => self.notify(&message),
                Err(ClientError::Closed(_)) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn notify(&mut self, message: &Value) {
        if let Some(line) = message["params"]["result"].as_str() {
            self.notified.push_back(line.to_owned());
        }
    }

    async fn message(&mut self) -> Result<Value, ClientError> {
        match self.lines.next().await {
            Ok(Some(Line::Text(text))) => {
                serde_json::from_slice(&text).map_err(|error| self.protocol(&error.to_string()))
            }
            Ok(Some(Line::TooLong)) => Err(self.protocol("its answer is longer than 512 MiB")),
            Ok(None) => Err(ClientError::Closed(self.path.clone())),
            // It hung up while we were still sending.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Err(ClientError::Closed(self.path.clone())),
            Err(source) => Err(self.broken(source)),
        }
    }

    fn broken(&self, source: io::Error) -> ClientError {
        ClientError::Broken {
            path: self.path.clone(),
            source,
        }
    }

    fn protocol(&self, reason: &str) -> ClientError {
        ClientError::Protocol {
            path: self.path.clone(),
            reason: reason.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, os::unix::net, pin::pin, task::Poll};

    use super::*;

    #[tokio::test]
    async fn a_client_waits_for_a_place_in_the_queue() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = net::UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = UnixStream::connect(&path).await {
            waiting.push(stream);
        }
        let mut late = pin!(connect(&path));
        let first = poll_fn(|context| Poll::Ready(late.as_mut().poll(context))).await;
        assert!(first.is_pending());
        listener.accept().unwrap();
        late.await.unwrap();
    }
}
