//! HTTP on an address of this machine, for those who answer it: [`rpc`](crate::rpc) and [`metrics`](crate::metrics).
//!
//! A connection carries one request. Its head is bounded, as are the time for it, the time to read the answer, and the number of
//! connections. It listens on the loopback address unless the operator names another, and refuses what comes from a page of another
//! origin. What a request means is not decided here.

mod address;
mod guard;

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, lookup_host},
    sync::{Notify, Semaphore},
    task::JoinHandle,
    time::sleep,
};

pub use self::address::{AddressError, HttpAddress};
pub(crate) use self::guard::{Guard, Refusal};

/// Connections at once; others wait to be accepted.
const MAX_CONNECTIONS: usize = 64;

/// How long a client may take to send the head of its request, and how long for its body.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// How long a client may take to read its answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(120);

/// How long the head of a request may be.
const MAX_HEAD: usize = 16 * 1024;

/// Why there is no HTTP server.
#[derive(Debug, thiserror::Error)]
#[error("failed to listen on {address}")]
pub struct HttpError {
    /// Where.
    address: HttpAddress,
    /// What the kernel answered.
    source: io::Error,
}

pub(crate) type Reply = Response<UnsyncBoxBody<Bytes, io::Error>>;

/// Who answers requests.
pub(crate) trait Answers: Send + Sync + 'static {
    /// The answer to a request that the guard has let through.
    fn answer(&self, request: Request<Incoming>) -> impl Future<Output = Reply> + Send;
}

/// Answers HTTP requests until it is dropped.
#[derive(Debug)]
pub struct HttpServer {
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl HttpServer {
    /// Begins to answer. `exposes`: what everyone can do who reaches the address, for the warning if that is not on the loopback.
    pub(crate) async fn answering(
        address: &HttpAddress,
        answers: impl Answers,
        exposes: &'static str,
    ) -> Result<Self, HttpError> {
        let failed = |source| HttpError {
            address: address.clone(),
            source,
        };
        let listener = bind(address).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        if !bound.ip().is_loopback() {
            tracing::warn!(address = %bound, "everyone who reaches this address {exposes}");
        }
        let front = Front {
            guard: Guard::new(address, bound),
            answers,
        };
        Ok(Self {
            address: bound,
            accepting: tokio::spawn(accept(listener, Arc::new(front))),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn bind(address: &HttpAddress) -> io::Result<TcpListener> {
    let candidates = lookup_host((address.host.as_str(), address.port)).await?;
    let mut result = Err(io::Error::new(
        io::ErrorKind::AddrNotAvailable,
        "the name has no address",
    ));
    for candidate in candidates {
        result = TcpListener::bind(candidate).await;
        if result.is_ok() {
            break;
        }
    }
    result
}

async fn accept<A: Answers>(listener: TcpListener, front: Arc<Front<A>>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let front = Arc::clone(&front);
                tokio::spawn(async move {
                    front.serve(stream).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "failed to accept an HTTP client");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Who answers, behind the guard.
#[derive(Debug)]
pub(crate) struct Front<A> {
    pub(crate) guard: Guard,
    pub(crate) answers: A,
}

impl<A: Answers> Front<A> {
    /// Answers the one request of a connection.
    pub(crate) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) {
        let answered = Notify::new();
        let service = service_fn(|request| async {
            let reply = self.answer(request).await;
            answered.notify_one();
            Ok::<_, Infallible>(reply)
        });
        let connection = http1::Builder::new()
            .keep_alive(false)
            .timer(TokioTimer::new())
            .header_read_timeout(PATIENCE)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service);
        let too_late = async {
            answered.notified().await;
            sleep(ANSWER_PATIENCE).await;
        };
        tokio::select! {
            served = connection => if let Err(error) = served {
                tracing::debug!(%error, "an HTTP client has gone");
            },
            () = too_late => tracing::debug!("an HTTP client does not read its answer"),
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Reply {
        match self.guard.check(request.headers()) {
            Ok(()) => self.answers.answer(request).await,
            Err(refusal) => refused(&refusal),
        }
    }
}

/// Tells the client, and the log, why.
pub(crate) fn refused(refusal: &Refusal) -> Reply {
    tracing::info!(
        status = refusal.status.as_u16(),
        reason = refusal.reason,
        "refused an HTTP request"
    );
    plain(refusal.status, refusal.reason)
}

pub(crate) fn plain(status: StatusCode, text: &str) -> Reply {
    respond(status, "text/plain; charset=utf-8", format!("{text}\n").into())
}

pub(crate) fn respond(status: StatusCode, content_type: &'static str, body: Bytes) -> Reply {
    let body = Full::new(body).map_err(|never| match never {});
    reply(status, content_type, body.boxed_unsync())
}

pub(crate) fn reply(status: StatusCode, content_type: &'static str, body: UnsyncBoxBody<Bytes, io::Error>) -> Reply {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
