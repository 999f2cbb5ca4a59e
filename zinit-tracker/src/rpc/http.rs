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
    io,
    path::{Path, PathBuf},
};

use futures_util::stream::unfold;
use http_body_util::{BodyExt as _, LengthLimitError, Limited, StreamBody};
use hyper::{
    HeaderMap, Method, Request, StatusCode,
    body::{Body as _, Bytes, Frame, Incoming},
    header::{CONTENT_TYPE, HeaderValue},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::timeout,
};

use super::{
    client::connect,
    connection::MAX_REQUEST,
    error::RpcError,
    message::{Answer, Entry, Message},
};
use crate::http::{
    Answers, HttpAddress, HttpError, HttpServer, PATIENCE, Refusal, Reply, plain, refused, reply, respond,
};

/// What is passed on of an answer at a time; one that is shorter is sent with its length.
const PIECE: usize = 64 * 1024;

/// The supervisor at this socket.
#[derive(Debug)]
pub(super) struct Supervisor {
    pub(super) socket: PathBuf,
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
        Self::answering(address, Supervisor { socket }, "controls the services").await
    }
}

impl Answers for Supervisor {
    async fn answer(&self, request: Request<Incoming>) -> Reply {
        if let Err(refusal) = check_request(request.method(), request.headers()) {
            return refused(&refusal);
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

/// Refuses what a form or a link can send.
fn check_request(method: &Method, headers: &HeaderMap) -> Result<(), Refusal> {
    let refuse = |status, reason| Err(Refusal { status, reason });
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
    let mut stream = connect(socket).await?;
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::http::{Front, Guard};

    #[test]
    fn what_a_form_or_a_link_can_send_is_refused() {
        let check = |method: Method, content_type: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.extend(content_type.map(|text| (CONTENT_TYPE, text.parse().unwrap())));
            check_request(&method, &headers).map_err(|refusal| refusal.status.as_u16())
        };
        for method in [Method::GET, Method::OPTIONS, Method::PUT] {
            assert_eq!(check(method, Some("application/json")), Err(405));
        }
        for content_type in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data",
            "",
            "text/plain; application/json",
        ] {
            assert_eq!(check(Method::POST, Some(content_type)), Err(415));
        }
        assert_eq!(check(Method::POST, None), Err(415));
        assert_eq!(check(Method::POST, Some("application/json; charset=utf-8")), Ok(()));
    }

    /// A front whose supervisor gives this answer to whatever it is asked.
    fn front(directory: &Path, answer: Vec<u8>) -> Front<Supervisor> {
        let socket = directory.join("z.sock");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_buf(&mut Vec::with_capacity(PIECE)).await.unwrap();
            // It may be that nobody reads it.
            drop(stream.write_all(&answer).await);
        });
        let address = "localhost:80".parse().unwrap();
        Front {
            guard: Guard::new(&address, "127.0.0.1:80".parse().unwrap()),
            answers: Supervisor { socket },
        }
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
