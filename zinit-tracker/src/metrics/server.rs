//! Metrics over HTTP: `GET /metrics`.
//!
//! Every answer is a reading that began after its request came. The tracker is open for a reading only: who keeps it open keeps the last
//! user from removing the pins.

use std::{
    sync::mpsc::{self, Receiver, SyncSender, TrySendError},
    thread,
    time::Duration,
};

use hyper::{
    Method, Request, StatusCode,
    body::Incoming,
    header::{ACCEPT, ALLOW, HeaderValue},
};
use tokio::{sync::oneshot, time::timeout};

use super::{Format, Reading};
use crate::{
    http::{Answers, HttpAddress, HttpError, HttpServer, Reply, plain, respond},
    tracker::{Config, TrackerError},
};

/// How long a reading may take. It waits while others hold the lock of the books.
const PATIENCE: Duration = Duration::from_secs(8);

/// Who waits for a reading, those included that have given up while it hangs.
const MOST_WAITING: usize = 64;

type Answer = Result<Reading, String>;

/// The thread that reads. If it hangs, nothing waits for it: not the clients, and not the end of the program.
struct Books(SyncSender<oneshot::Sender<Answer>>);

impl HttpServer {
    /// Begins to answer `GET /metrics`, with what the books say that are pinned then.
    ///
    /// # Errors
    ///
    /// The address is unknown, not ours, or taken.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    pub async fn metrics(address: &HttpAddress, config: Config) -> Result<Self, HttpError> {
        let (sender, receiver) = mpsc::sync_channel(MOST_WAITING);
        thread::spawn(move || read(&receiver, || Reading::take(&config)));
        Self::answering(address, Books(sender), "sees names and figures of all services").await
    }
}

/// Reads once for all who wait.
fn read(requests: &Receiver<oneshot::Sender<Answer>>, take: impl Fn() -> Result<Reading, TrackerError>) {
    while let Ok(first) = requests.recv() {
        let waiting: Vec<_> = [first].into_iter().chain(requests.try_iter()).collect();
        let reading = take().map_err(|error| {
            tracing::warn!(error = &error as &dyn std::error::Error, "the books cannot be read");
            error.to_string()
        });
        for client in waiting {
            // One that has gone does not need it.
            drop(client.send(reading.clone()));
        }
    }
}

impl Answers for Books {
    async fn answer(&self, request: Request<Incoming>) -> Reply {
        if request.uri().path() != "/metrics" {
            return plain(StatusCode::NOT_FOUND, "metrics are at /metrics");
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut reply = plain(StatusCode::METHOD_NOT_ALLOWED, "ask with GET");
            reply.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return reply;
        }
        let accept: Vec<_> = request.headers().get_all(ACCEPT).iter().collect();
        let accept: Vec<_> = accept.iter().filter_map(|value| value.to_str().ok()).collect();
        let Some(format) = Format::preferred(&accept.join(",")) else {
            return plain(
                StatusCode::NOT_ACCEPTABLE,
                "there are application/openmetrics-text, version 1.0.0, and text/plain, version 0.0.4",
            );
        };
        let (sender, receiver) = oneshot::channel();
        match self.0.try_send(sender) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return too_long(),
            Err(TrySendError::Disconnected(_)) => return no_reader(),
        }
        match timeout(PATIENCE, receiver).await {
            Ok(Ok(Ok(reading))) => match reading.text(format) {
                Ok(text) => respond(StatusCode::OK, format.content_type(), text.into()),
                Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written"),
            },
            Ok(Ok(Err(error))) => plain(StatusCode::INTERNAL_SERVER_ERROR, &error),
            Ok(Err(_)) => no_reader(),
            Err(_) => too_long(),
        }
    }
}

fn too_long() -> Reply {
    plain(
        StatusCode::SERVICE_UNAVAILABLE,
        "reading the books takes too long: `lslocks` names who holds their lock",
    )
}

fn no_reader() -> Reply {
    plain(
        StatusCode::INTERNAL_SERVER_ERROR,
        "a fault: the books are not read any more",
    )
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn all_who_wait_share_a_reading() {
        let (sender, receiver) = mpsc::sync_channel(3);
        let mut waiting: Vec<_> = (0..3)
            .map(|_| {
                let (client, answer) = oneshot::channel();
                sender.send(client).unwrap();
                answer
            })
            .collect();
        drop(sender);
        let readings = Cell::new(0);
        read(&receiver, || {
            readings.set(readings.get() + 1);
            Ok(Reading { books: None })
        });
        assert_eq!(readings.get(), 1);
        assert!(waiting.iter_mut().all(|answer| answer.try_recv().unwrap().is_ok()));
    }
}
