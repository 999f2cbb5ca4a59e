//! Fuzzing: what clients send.

use std::{
    io,
    net::Ipv4Addr,
    path::PathBuf,
    pin::Pin,
    sync::LazyLock,
    task::{Context, Poll},
};

use futures_util::FutureExt as _;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, ReadBuf},
    runtime::{Builder, Runtime},
};

use super::{
    http::Supervisor,
    lines::{Line, Lines},
    message::{Answer, Entry, Id, MAX_BATCH, Message, Params},
    method, plain,
};
use crate::http::{Front, Guard};

/// A stream that brings a few bytes at a time.
struct Pieces<'a> {
    rest: &'a [u8],
    size: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let size = self.size.min(self.rest.len()).min(buffer.remaining());
        let (piece, rest) = self.rest.split_at(size);
        buffer.put_slice(piece);
        self.rest = rest;
        Poll::Ready(Ok(()))
    }
}

/// Cuts the bytes into lines, of a length that the first byte says, and in pieces of a size that the second says: they must
/// be the same as those of the whole.
pub fn request_lines(data: &[u8]) {
    let [longest, size, rest @ ..] = data else {
        return;
    };
    let (longest, size) = (usize::from(*longest), usize::from(*size) + 1);
    let mut lines = Lines::new(Pieces { rest, size }, longest);
    let mut found = Vec::new();
    let next = |lines: &mut Lines<_>| lines.next().now_or_never().expect("the stream is always ready");
    while let Some(line) = next(&mut lines).expect("the stream does not fail") {
        found.push(line);
    }
    let expected = rest.split_inclusive(|byte| *byte == b'\n').map(|line| {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        if line.len() > longest {
            Line::TooLong
        } else {
            Line::Text(line.to_vec())
        }
    });
    assert_eq!(found, expected.collect::<Vec<_>>());
}

/// Reads the bytes as a message: its requests must be the same when they are sent again, and answers must be lines of JSON
/// that name the request.
pub fn requests(data: &[u8]) {
    if plain::parse(data).is_some() {
        return;
    }
    match Message::parse(data) {
        Message::Single(entry) => check(&entry),
        Message::Batch(entries) => {
            assert!((1..=MAX_BATCH).contains(&entries.len()));
            entries.iter().for_each(check);
        }
    }
}

fn check(entry: &Entry) {
    let request = match entry {
        Ok(request) => request,
        Err(answer) => return check_answer(answer),
    };
    let params = match &request.params {
        Params::Array(values) => json!(values),
        Params::Object(values) => json!(values),
    };
    let mut again = json!({"jsonrpc": "2.0", "method": request.method, "params": params});
    if let Some(id) = &request.id {
        again["id"] = json!(id);
    }
    assert_eq!(
        Message::parse(again.to_string().as_bytes()),
        Message::Single(Ok(request.clone()))
    );
    let id = request.id.clone().unwrap_or(Id::Null);
    let outcome = method::bind(request).map(|_| Value::Null);
    check_answer(&Answer { id, outcome });
}

fn check_answer(answer: &Answer) {
    let text = answer.to_json();
    assert!(!text.contains(['\n', '\r']), "{text}");
    let read: Value = serde_json::from_str(&text).expect("an answer is JSON");
    assert_eq!(read["id"], json!(answer.id));
    assert_eq!(read.get("error").is_some(), answer.outcome.is_err());
    assert_eq!(read.get("result").is_some(), answer.outcome.is_ok());
}

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let mut builder = Builder::new_current_thread();
    builder.enable_all().build().expect("a runtime can be made")
});

/// Reads the bytes as an HTTP request to a supervisor that has gone: nothing gets as far as there that a web page can send
/// without having asked.
pub fn http_request(data: &[u8]) {
    let front = Front {
        guard: Guard::new(
            &"localhost:80".parse().expect("it is an address"),
            (Ipv4Addr::LOCALHOST, 80).into(),
        ),
        answers: Supervisor {
            socket: PathBuf::from("/nonexistent/socket"),
        },
    };
    let mut reply = Vec::new();
    RUNTIME.block_on(async {
        let (mut client, server) = tokio::io::duplex(64 * 1024);
        let ask = async {
            // The server may have seen enough before the end.
            drop(client.write_all(data).await);
            drop(client.shutdown().await);
            client.read_to_end(&mut reply).await.expect("a pipe can be read");
        };
        tokio::join!(front.serve(server), ask);
    });
    let whole = String::from_utf8_lossy(&reply);
    // What a client that asks for it is told before it sends the body.
    let reply = whole.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n").unwrap_or(&whole);
    if reply.is_empty() {
        return;
    }
    let status = reply.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5));
    let status = status.unwrap_or_else(|| panic!("{reply:?}"));
    assert_eq!(reply.matches("HTTP/1.").count(), 1, "{reply:?}");
    if matches!(status, "200" | "204" | "502") {
        let request = String::from_utf8_lossy(data).to_ascii_lowercase();
        assert!(request.trim_start().starts_with("post "), "{request:?}");
        assert!(
            request.contains("host:") && request.contains("application/json"),
            "{request:?}"
        );
    } else {
        let refused = ["400", "403", "405", "408", "413", "414", "415", "431", "505"];
        assert!(refused.contains(&status), "{reply:?}");
    }
}
