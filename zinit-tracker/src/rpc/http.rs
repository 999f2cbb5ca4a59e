//! JSON-RPC over HTTP POST, in front of the Unix socket.
//!
//! Whoever reaches it controls services as root, and a web page can make a browser send requests to the machine it runs on.
//! So it listens on the loopback address unless the operator names another, and refuses what comes from a page: requests
//! with a foreign `Origin`, requests for a host that is not ours (a foreign name may be made to lead here), and contents
//! that a form can send. It answers no preflight request and sets no `Access-Control` header.
//!
//! A connection carries one request, whose head, body and length are bounded, as is the time for all of that and for reading
//! the answer, which is passed on as it comes and kept nowhere. Subscriptions need the Unix socket.

use std::{
    convert::Infallible,
    fmt, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use futures_util::stream::unfold;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::{Body as _, Bytes, Frame, Incoming},
    header::{CONTENT_TYPE, HOST, HeaderValue, ORIGIN},
    http::uri::Authority,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, UnixStream, lookup_host},
    sync::{Notify, Semaphore},
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{
    connection::MAX_REQUEST,
    error::RpcError,
    message::{Answer, Entry, Message},
};

/// The port if an address names none.
const DEFAULT_PORT: u16 = 8080;

/// Connections at once; others wait to be accepted.
const MAX_CONNECTIONS: usize = 64;

/// How long a client may take to send the head of its request, and how long for its body.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a client may take to read its answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(120);

/// What is passed on of an answer at a time; one that is shorter is sent with its length.
const PIECE: usize = 64 * 1024;

/// How long the head of a request may be.
const MAX_HEAD: usize = 16 * 1024;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpAddress {
    /// A name or an address; the loopback address if none was given.
    host: String,
    port: u16,
}

/// Text that is no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address: write it like 127.0.0.1:8080, localhost:8080, [::1]:8080 or :8080")]
pub struct AddressError(String);

impl FromStr for HttpAddress {
    type Err = AddressError;

    /// Reads `HOST:PORT`, `HOST`, `:PORT` or `PORT`.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(text.to_owned());
        let port = |text: &str| text.parse::<u16>().map_err(|_| wrong());
        let loopback = Ipv4Addr::LOCALHOST.to_string();
        let (host, port) = if text.bytes().all(|byte| byte.is_ascii_digit()) {
            (loopback, port(text)?)
        } else if let Ok(address) = text.parse::<SocketAddr>() {
            (address.ip().to_string(), address.port())
        } else if let Ok(address) = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            (address.to_string(), DEFAULT_PORT)
        } else if let Some(port_text) = text.strip_prefix(':') {
            (loopback, port(port_text)?)
        } else {
            let (host, port) = match text.rsplit_once(':') {
                Some((host, port_text)) => (host, port(port_text)?),
                None => (text, DEFAULT_PORT),
            };
            let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
            if host.is_empty() || !host.chars().all(is_plain) {
                return Err(wrong());
            }
            (host.to_owned(), port)
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for HttpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Why there is no HTTP server.
#[derive(Debug, thiserror::Error)]
#[error("failed to listen on {address}")]
pub struct HttpError {
    /// Where.
    address: HttpAddress,
    /// What the kernel answered.
    source: io::Error,
}

/// Answers HTTP requests until it is dropped.
#[derive(Debug)]
pub struct HttpServer {
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl HttpServer {
    /// Begins to answer, with what the supervisor at the Unix socket says.
    ///
    /// # Errors
    ///
    /// The address is unknown, not ours, or taken.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    pub async fn start(address: &HttpAddress, socket: PathBuf) -> Result<Self, HttpError> {
        let failed = |source| HttpError {
            address: address.clone(),
            source,
        };
        let listener = bind(address).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        if !bound.ip().is_loopback() {
            tracing::warn!(address = %bound, "everyone who reaches this address controls the services");
        }
        let front = Arc::new(Front {
            guard: Guard {
                name: address.host.to_ascii_lowercase(),
                local_only: bound.ip().is_loopback(),
            },
            socket,
        });
        Ok(Self {
            address: bound,
            accepting: tokio::spawn(accept(listener, front)),
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

async fn accept(listener: TcpListener, front: Arc<Front>) {
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

/// What stands in front of the socket.
#[derive(Debug)]
pub(super) struct Front {
    pub(super) guard: Guard,
    pub(super) socket: PathBuf,
}

type Reply = Response<UnsyncBoxBody<Bytes, io::Error>>;

impl Front {
    pub(super) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) {
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
        if let Err(refusal) = self.guard.check(request.method(), request.headers()) {
            tracing::info!(
                status = refusal.status.as_u16(),
                reason = refusal.reason,
                "refused an HTTP request"
            );
            return plain(refusal.status, refusal.reason);
        }
        let too_large = || plain(StatusCode::PAYLOAD_TOO_LARGE, "a request has at most 1 MiB");
        if request.body().size_hint().lower() > MAX_REQUEST as u64 {
            return too_large();
        }
        let body = Limited::new(request.into_body(), MAX_REQUEST).collect();
        let body = match timeout(PATIENCE, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => return too_large(),
            Ok(Err(_)) => return plain(StatusCode::BAD_REQUEST, "the body is not complete"),
            Err(_) => return plain(StatusCode::REQUEST_TIMEOUT, "the body takes too long"),
        };
        match ask(&self.socket, &body).await {
            Ok(Some(reply)) => reply,
            Ok(None) => respond(StatusCode::NO_CONTENT, "text/plain", Bytes::new()),
            Err(error) => {
                tracing::warn!(%error, "an HTTP request got no answer");
                plain(
                    StatusCode::BAD_GATEWAY,
                    &format!("the supervisor does not answer: {error}"),
                )
            }
        }
    }
}

/// Who may ask.
#[derive(Debug)]
pub(super) struct Guard {
    /// The host that the operator named, in lower case.
    pub(super) name: String,
    /// Only the loopback address is listened on.
    pub(super) local_only: bool,
}

/// What a request is answered with that is not let through.
#[derive(Debug, PartialEq, Eq)]
struct Refusal {
    status: StatusCode,
    reason: &'static str,
}

impl Guard {
    fn check(&self, method: &Method, headers: &HeaderMap) -> Result<(), Refusal> {
        let refuse = |status, reason| Err(Refusal { status, reason });
        let mut hosts = headers.get_all(HOST).iter();
        let (Some(host), None) = (hosts.next(), hosts.next()) else {
            return refuse(StatusCode::FORBIDDEN, "a request names one host");
        };
        if !self.is_ours(host) {
            return refuse(
                StatusCode::FORBIDDEN,
                "this host is not ours: ask for the address that zinit listens on",
            );
        }
        if headers.get_all(ORIGIN).iter().any(|origin| !is_same(origin, host)) {
            return refuse(StatusCode::FORBIDDEN, "web pages of another origin are not served");
        }
        if method != Method::POST {
            return refuse(StatusCode::METHOD_NOT_ALLOWED, "send JSON-RPC requests with POST");
        }
        if !headers.get(CONTENT_TYPE).is_some_and(is_json) {
            return refuse(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "send JSON, with Content-Type: application/json",
            );
        }
        Ok(())
    }

    /// Whether the request is for an address of this machine, rather than for a name that somebody made lead here.
    fn is_ours(&self, host: &HeaderValue) -> bool {
        let Some(authority) = host.to_str().ok().and_then(|text| text.parse::<Authority>().ok()) else {
            return false;
        };
        if authority.as_str().contains('@') {
            return false;
        }
        let name = authority.host().to_ascii_lowercase();
        let name = name.trim_start_matches('[').trim_end_matches(']');
        match name.parse::<IpAddr>() {
            Ok(address) => !self.local_only || address.is_loopback(),
            Err(_) => name == "localhost" || name == self.name,
        }
    }
}

/// Whether the origin is the host that is asked. We serve no pages, so this is a client that sets the header by itself.
fn is_same(origin: &HeaderValue, host: &HeaderValue) -> bool {
    let origin = origin.as_bytes().to_ascii_lowercase();
    let host = host.as_bytes().to_ascii_lowercase();
    origin.strip_prefix(b"http://") == Some(&*host)
}

fn is_json(content_type: &HeaderValue) -> bool {
    let text = content_type.to_str().unwrap_or_default();
    let media_type = text.split(';').next().unwrap_or_default().trim();
    media_type.eq_ignore_ascii_case("application/json")
}

/// Passes a request on to the supervisor; `None`: it has no answer, since it only has notifications.
async fn ask(socket: &Path, body: &[u8]) -> io::Result<Option<Reply>> {
    let message = Message::parse(body);
    let entries: &[Entry] = match &message {
        Message::Single(entry) => std::slice::from_ref(entry),
        Message::Batch(entries) => entries,
    };
    let is_stream = |entry: &Entry| {
        entry
            .as_ref()
            .is_ok_and(|request| request.method.ends_with("subscribeLogs"))
    };
    if entries.iter().any(is_stream) {
        let error = RpcError::invalid_request("subscriptions need the Unix socket; stream_currentLogs works here");
        return Ok(Some(json(Answer::to_nobody(error).to_json().into())));
    }
    // The socket's messages are lines.
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(body) else {
        let refused = entries.iter().find_map(|entry| entry.as_ref().err());
        return Ok(refused.map(|answer| json(answer.to_json().into())));
    };
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("{value}\n").as_bytes()).await?;
    if !entries
        .iter()
        .any(|entry| entry.as_ref().map_or(true, |request| request.id.is_some()))
    {
        return Ok(None);
    }
    pass_on(stream).await.map(Some)
}

/// Passes on a line as it comes. Fails if there is no beginning of one.
async fn pass_on(mut stream: UnixStream) -> io::Result<Reply> {
    let mut beginning = Vec::with_capacity(PIECE);
    while beginning.len() < PIECE {
        if stream.read_buf(&mut beginning).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if beginning.ends_with(b"\n") {
            beginning.pop();
            return Ok(json(beginning.into()));
        }
    }
    let frame = |piece: Vec<u8>| Ok(Frame::data(Bytes::from(piece)));
    let pieces = unfold((beginning, Some(stream)), move |(piece, stream)| async move {
        if !piece.is_empty() {
            return Some((frame(piece), (Vec::new(), stream)));
        }
        let mut stream = stream?;
        let mut piece = Vec::with_capacity(PIECE);
        match stream.read_buf(&mut piece).await {
            Ok(0) => Some((Err(io::ErrorKind::UnexpectedEof.into()), (Vec::new(), None))),
            Ok(_) if piece.ends_with(b"\n") => {
                piece.pop();
                Some((frame(piece), (Vec::new(), None)))
            }
            Ok(_) => Some((frame(piece), (Vec::new(), Some(stream)))),
            Err(error) => Some((Err(error), (Vec::new(), None))),
        }
    });
    Ok(reply(
        StatusCode::OK,
        "application/json",
        StreamBody::new(pieces).boxed_unsync(),
    ))
}

fn json(text: Bytes) -> Reply {
    respond(StatusCode::OK, "application/json", text)
}

fn plain(status: StatusCode, text: &str) -> Reply {
    respond(status, "text/plain; charset=utf-8", format!("{text}\n").into())
}

fn respond(status: StatusCode, content_type: &'static str, body: Bytes) -> Reply {
    let body = Full::new(body).map_err(|never| match never {});
    reply(status, content_type, body.boxed_unsync())
}

fn reply(status: StatusCode, content_type: &'static str, body: UnsyncBoxBody<Bytes, io::Error>) -> Reply {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;

    use super::*;

    fn address(text: &str) -> String {
        text.parse::<HttpAddress>()
            .map_or_else(|error| error.to_string(), |address| address.to_string())
    }

    #[test]
    fn addresses_are_on_the_loopback_unless_another_is_named() {
        for (text, expected) in [
            ("8081", "127.0.0.1:8081"),
            (":8081", "127.0.0.1:8081"),
            ("localhost", "localhost:8080"),
            ("localhost:1", "localhost:1"),
            ("127.0.0.1:8080", "127.0.0.1:8080"),
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("[::1]:80", "[::1]:80"),
            ("::1", "[::1]:8080"),
            ("[::1]", "[::1]:8080"),
        ] {
            assert_eq!(address(text), expected, "{text:?}");
        }
        for bad in [
            "",
            ":",
            "a:b",
            "a:99999",
            "99999",
            "http://localhost:80",
            "a b:80",
            "[::1]:x",
            "user@host:1",
            // Without brackets, where the address ends is anybody's guess.
            "e:::0",
        ] {
            assert!(bad.parse::<HttpAddress>().is_err(), "{bad:?}");
        }
    }

    fn check(guard: &Guard, method: Method, headers: &[(&str, &str)]) -> Result<(), u16> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let name: hyper::header::HeaderName = name.parse().unwrap();
            map.append(name, value.parse().unwrap());
        }
        guard.check(&method, &map).map_err(|refusal| refusal.status.as_u16())
    }

    #[test]
    fn only_requests_for_this_machine_that_no_foreign_page_sends_are_let_through() {
        let local = Guard {
            name: "127.0.0.1".to_owned(),
            local_only: true,
        };
        let post = |headers: &[(&str, &str)]| {
            let mut all = vec![("content-type", "application/json")];
            all.extend(headers);
            check(&local, Method::POST, &all)
        };
        for host in [
            "127.0.0.1:8080",
            "localhost",
            "LOCALHOST:8080",
            "127.9.9.9",
            "[::1]:8080",
        ] {
            assert_eq!(post(&[("host", host)]), Ok(()), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8080",
            "192.168.0.1",
            "localhost.evil.example",
            "x@localhost",
            "",
            "[::2]",
        ] {
            assert_eq!(post(&[("host", host)]), Err(403), "{host}");
        }
        assert_eq!(post(&[]), Err(403));
        assert_eq!(post(&[("host", "localhost"), ("host", "evil.example")]), Err(403));
        let host = ("host", "localhost:8080");
        assert_eq!(post(&[host, ("origin", "http://localhost:8080")]), Ok(()));
        for origin in [
            "http://evil.example",
            "null",
            "http://localhost:3000",
            "https://localhost:8080",
            "http://localhost:8080.evil.example",
        ] {
            assert_eq!(post(&[host, ("origin", origin)]), Err(403), "{origin}");
        }
    }

    #[test]
    fn what_a_form_or_a_link_can_send_is_refused() {
        let local = Guard {
            name: "localhost".to_owned(),
            local_only: true,
        };
        let host = ("host", "localhost");
        for method in [Method::GET, Method::OPTIONS, Method::PUT] {
            assert_eq!(
                check(&local, method, &[host, ("content-type", "application/json")]),
                Err(405)
            );
        }
        for content_type in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data",
            "",
            "text/plain; application/json",
        ] {
            assert_eq!(
                check(&local, Method::POST, &[host, ("content-type", content_type)]),
                Err(415)
            );
        }
        assert_eq!(check(&local, Method::POST, &[host]), Err(415));
        assert_eq!(
            check(
                &local,
                Method::POST,
                &[host, ("content-type", "application/json; charset=utf-8")]
            ),
            Ok(())
        );
    }

    #[test]
    fn on_an_address_of_the_network_names_that_the_operator_did_not_give_are_refused() {
        let open = Guard {
            name: "node1.example".to_owned(),
            local_only: false,
        };
        for (host, expected) in [
            ("node1.example:8080", Ok(())),
            ("10.0.0.5:8080", Ok(())),
            ("localhost", Ok(())),
            ("evil.example", Err(403)),
        ] {
            let headers = [("host", host), ("content-type", "application/json")];
            assert_eq!(check(&open, Method::POST, &headers), expected, "{host}");
        }
    }

    /// A front whose supervisor gives this answer to whatever it is asked.
    fn front(directory: &Path, answer: Vec<u8>) -> Front {
        let socket = directory.join("z.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_buf(&mut Vec::with_capacity(PIECE)).await.unwrap();
            // It may be that nobody reads it.
            drop(stream.write_all(&answer).await);
        });
        let guard = Guard {
            name: "localhost".to_owned(),
            local_only: true,
        };
        Front { guard, socket }
    }

    /// Both ends of a connection that has brought a request.
    async fn request() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let body = r#"{"jsonrpc":"2.0","id":1,"method":"stream_currentLogs"}"#;
        let length = body.len();
        let head = "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json";
        let request = format!("{head}\r\nContent-Length: {length}\r\n\r\n{body}");
        client.write_all(request.as_bytes()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_read_a_long_answer_has_to_go() {
        let directory = tempfile::tempdir().unwrap();
        let mut answer = vec![b'x'; 64 * 1024 * 1024];
        answer.push(b'\n');
        let front = front(directory.path(), answer);
        let (client, stream) = request().await;
        let day = Duration::from_secs(24 * 60 * 60);
        timeout(day, front.serve(stream)).await.expect("it waits for ever");
        drop(client);
    }

    #[tokio::test]
    async fn an_answer_of_any_length_is_passed_on_whole_or_seen_to_be_cut() {
        let directory = tempfile::tempdir().unwrap();
        for (length, whole) in [
            (10, true),
            (PIECE, true),
            (10 * PIECE + 1, true),
            (10, false),
            (2 * PIECE, false),
        ] {
            let mut answer = vec![b'x'; length];
            if whole {
                answer.push(b'\n');
            }
            let own = tempfile::tempdir_in(&directory).unwrap();
            let front = front(own.path(), answer);
            let (mut client, stream) = request().await;
            let mut text = Vec::new();
            let ((), read) = tokio::join!(front.serve(stream), client.read_to_end(&mut text));
            assert!(read.is_ok() || !whole, "{read:?}");
            let text = String::from_utf8(text).unwrap();
            let found = text.matches('x').count();
            if whole {
                assert!(text.starts_with("HTTP/1.1 200"), "{length}: {text:.200}");
                assert_eq!(found, length);
                assert!(length <= PIECE || text.ends_with("\r\n0\r\n\r\n"), "{length}");
            } else {
                assert!(
                    text.starts_with("HTTP/1.1 502") || !text.ends_with("\r\n0\r\n\r\n"),
                    "{length}"
                );
            }
        }
    }
}
