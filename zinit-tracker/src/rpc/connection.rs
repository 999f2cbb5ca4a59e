//! One client: lines in, answers and subscribed lines out.
//!
//! Requests of a connection are begun in the order in which they come and answered as they are done, so a `status` is
//! answered while a `stop` still waits. What a client can hold up is itself alone: while it does not read, nothing more of
//! it is read, lines that it is subscribed to are lost, not kept, and it is the first to go if its place is needed.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt as _, StreamExt as _,
    future::{join_all, pending, select_all},
    stream::FuturesUnordered,
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{
    io::AsyncRead,
    net::{UnixStream, unix::OwnedWriteHalf},
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    dispatch::{Dispatcher, Outcome},
    error::RpcError,
    lines::{Line, Lines},
    message::{Answer, Entry, Id, Message, to_json},
    plain::{self, Command},
    room::{Kept, Room, Share},
    slots::{Evicted, Slot, Use},
};
use crate::supervisor::{Followed, Follower};

/// The longest request in bytes.
pub const MAX_REQUEST: usize = 1024 * 1024;

/// Requests of one connection that are under way at once; the next is read when one is done.
const MAX_IN_FLIGHT: usize = 16;

/// Subscriptions of one connection.
const MAX_SUBSCRIPTIONS: usize = 16;

/// How long a client may take to read an answer, and so much longer for each [`PATIENCE_BYTES`] of it.
const PATIENCE: Duration = Duration::from_secs(30);
const PATIENCE_BYTES: usize = 1024 * 1024;

/// Work that is under way.
type Work = Pin<Box<dyn Future<Output = Done> + Send>>;

/// What came of a message.
enum Done {
    /// Of each request, in their order.
    Rpc { batch: bool, replies: Vec<Reply> },
    /// Of a command of the older protocol.
    Plain(Result<(), RpcError>),
}

/// What came of a request.
enum Reply {
    /// It is not told: the request is a notification.
    Untold,
    Answer(Kept),
    Subscribe {
        id: Id,
        filter: Option<String>,
        recent: bool,
    },
    Unsubscribe {
        id: Option<Id>,
        name: Value,
    },
}

/// Lines that a client has asked for.
struct Subscription {
    form: Form,
    follower: Follower,
}

/// How lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// As notifications of the subscription with this name.
    Notification(u64),
    /// As the older protocol has them.
    Plain,
}

/// What a client waits for next.
enum Event {
    Line(Option<Line>),
    Done(Done),
    Followed(usize, Option<Followed>),
    /// The place is needed for somebody else.
    Evicted,
    /// The server ends.
    Finishing,
}

/// Serves a client until it has gone, or has been told to go.
pub(super) async fn serve(
    stream: UnixStream,
    dispatcher: Dispatcher,
    room: Room,
    slot: Arc<Slot>,
    finishing: watch::Receiver<bool>,
) {
    let (reader, writer) = stream.into_split();
    let connection = Connection {
        dispatcher,
        room,
        writer,
        slot,
        finishing,
        in_flight: FuturesUnordered::new(),
        subscriptions: Vec::new(),
        reading: true,
    };
    // A client that has gone is none of our troubles, but somebody may wonder.
    if let Err(error) = connection.run(Lines::new(reader, MAX_REQUEST)).await {
        tracing::debug!(%error, "a client has gone");
    }
}

struct Connection {
    dispatcher: Dispatcher,
    room: Room,
    writer: OwnedWriteHalf,
    slot: Arc<Slot>,
    finishing: watch::Receiver<bool>,
    in_flight: FuturesUnordered<Work>,
    subscriptions: Vec<Subscription>,
    reading: bool,
}

impl Connection {
    async fn run<R: AsyncRead + Unpin>(mut self, mut lines: Lines<R>) -> io::Result<()> {
        while self.reading || !self.in_flight.is_empty() || self.is_behind() {
            let usage = match (self.in_flight.is_empty(), self.subscriptions.is_empty()) {
                (false, _) => Use::Serving,
                (true, false) => Use::Following,
                (true, true) => Use::Idle,
            };
            if self.slot.enter(usage).is_err() {
                return self.leave();
            }
            if !self.reading {
                if let Some(text) = self.next_past() {
                    self.send(&text, None).await?;
                    continue;
                }
                if self.in_flight.is_empty() {
                    break;
                }
            }
            let slot = Arc::clone(&self.slot);
            let event = tokio::select! {
                line = lines.next(), if self.reading && self.in_flight.len() < MAX_IN_FLIGHT => Event::Line(line?),
                Some(done) = self.in_flight.next(), if !self.in_flight.is_empty() => Event::Done(done),
                (index, followed) = next_line(&mut self.subscriptions), if self.reading => {
                    Event::Followed(index, followed)
                }
                () = slot.evicted() => Event::Evicted,
                _ = self.finishing.wait_for(|finishing| *finishing), if self.reading => Event::Finishing,
            };
            match event {
                Event::Line(None) | Event::Finishing => self.reading = false,
                Event::Line(Some(Line::TooLong)) => {
                    let error = RpcError::invalid_request("a request has at most 1 MiB");
                    self.send_answer(&Answer::to_nobody(error)).await?;
                }
                Event::Line(Some(Line::Text(text))) => match self.slot.enter(Use::Serving) {
                    Ok(()) => self.take(&text).await?,
                    Err(Evicted) => return self.leave(),
                },
                Event::Done(done) => self.finish(done).await?,
                Event::Followed(index, Some(followed)) => {
                    let text = self.subscriptions[index].form.write(&followed);
                    self.send(&text, None).await?;
                }
                Event::Followed(index, None) => drop(self.subscriptions.swap_remove(index)),
                Event::Evicted => return self.leave(),
            }
        }
        Ok(())
    }

    /// The next line to be sent that was there when it was asked for.
    fn next_past(&mut self) -> Option<String> {
        self.subscriptions.iter_mut().find_map(|subscription| {
            let followed = subscription.follower.next_past()?;
            Some(subscription.form.write(&followed))
        })
    }

    /// Whether lines are still to be sent that were there when they were asked for.
    fn is_behind(&self) -> bool {
        let mut subscriptions = self.subscriptions.iter();
        subscriptions.any(|subscription| subscription.follower.is_behind())
    }

    /// Makes room, and says so if that takes no time: a client that has to go must not stay to be told.
    fn leave(&self) -> io::Result<()> {
        let error = RpcError::busy("this connection was idle, and others need its place: connect again");
        self.writer
            .try_write(write(&Answer::to_nobody(error)).as_bytes())
            .map(drop)
    }

    /// Begins what a line asks for.
    async fn take(&mut self, text: &[u8]) -> io::Result<()> {
        let text = text.trim_ascii();
        if text.is_empty() {
            return Ok(());
        }
        let dispatcher = self.dispatcher.clone();
        let mut work: Work = match plain::parse(text) {
            None => Box::pin(answer(dispatcher, self.room.clone(), Message::parse(text))),
            Some(Command::Log { follow }) => return self.print_logs(follow).await,
            Some(command) => Box::pin(async move { Done::Plain(plain::run(&dispatcher, command).await) }),
        };
        // The first step in the order of the requests: whoever sends `stop` and then `start` means that order.
        match (&mut work).now_or_never() {
            Some(done) => self.finish(done).await,
            None => {
                self.in_flight.push(work);
                Ok(())
            }
        }
    }

    async fn print_logs(&mut self, follow: bool) -> io::Result<()> {
        let mut follower = self.dispatcher.logs().follow_from_start(None);
        let form = Form::Plain;
        if follow && self.subscriptions.len() < MAX_SUBSCRIPTIONS {
            self.subscriptions.push(Subscription { form, follower });
            return Ok(());
        }
        self.reading = false;
        while let Some(followed) = follower.next_past() {
            self.send(&form.write(&followed), None).await?;
        }
        Ok(())
    }

    /// Tells the client what came of a message, and begins and ends its subscriptions.
    async fn finish(&mut self, done: Done) -> io::Result<()> {
        let (batch, replies) = match done {
            Done::Plain(result) => {
                let text = plain::write(&result);
                return self.send(&text, Some(patience(&text))).await;
            }
            Done::Rpc { batch, replies } => (batch, replies),
        };
        let mut text = String::new();
        // Their room is taken until they are read.
        let mut permits = Vec::new();
        for reply in replies {
            let answer = match reply {
                Reply::Untold => continue,
                Reply::Answer(Kept { text, permit }) => {
                    permits.push(permit);
                    text
                }
                Reply::Subscribe { id, filter, recent } => {
                    let outcome = self.subscribe(filter.as_deref(), recent).map(|name| json!(name));
                    Answer { id, outcome }.to_json()
                }
                Reply::Unsubscribe { id, name } => {
                    let outcome = Ok(json!(self.unsubscribe(&name)));
                    let Some(id) = id else { continue };
                    Answer { id, outcome }.to_json()
                }
            };
            if !text.is_empty() {
                text.push(',');
            } else if batch {
                text.push('[');
            }
            text.push_str(&answer);
        }
        if text.is_empty() {
            return Ok(());
        }
        text.push_str(if batch { "]\n" } else { "\n" });
        self.send(&text, Some(patience(&text))).await
    }

    fn subscribe(&mut self, filter: Option<&str>, recent: bool) -> Result<u64, RpcError> {
        static NAMES: AtomicU64 = AtomicU64::new(1);
        if self.subscriptions.len() >= MAX_SUBSCRIPTIONS {
            return Err(RpcError::busy(
                "a connection has at most 16 subscriptions: end one first",
            ));
        }
        let name = NAMES.fetch_add(1, Ordering::Relaxed);
        let logs = self.dispatcher.logs();
        let follower = if recent {
            logs.follow_from_start(filter)
        } else {
            logs.follow(filter)
        };
        let form = Form::Notification(name);
        self.subscriptions.push(Subscription { form, follower });
        Ok(name)
    }

    fn unsubscribe(&mut self, name: &Value) -> bool {
        let form = name.as_u64().map(Form::Notification);
        let found = self
            .subscriptions
            .iter()
            .position(|subscription| Some(subscription.form) == form);
        found.map(|index| self.subscriptions.swap_remove(index)).is_some()
    }

    async fn send_answer(&mut self, answer: &Answer) -> io::Result<()> {
        let text = write(answer);
        self.send(&text, Some(patience(&text))).await
    }

    /// Sends text. Fails if the client has not read it by the deadline, or its place is needed meanwhile; without a deadline
    /// also if the server ends.
    async fn send(&mut self, text: &str, deadline: Option<Instant>) -> io::Result<()> {
        let mut rest = text.as_bytes();
        let mut stalled = false;
        while !rest.is_empty() {
            match self.writer.try_write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => rest = &rest[length..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !stalled {
                        stalled = true;
                        self.slot.enter(Use::Idle).map_err(|Evicted| not_read())?;
                    }
                    tokio::select! {
                        writable = self.writer.writable() => writable?,
                        () = self.slot.evicted() => return Err(not_read()),
                        () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                            return Err(not_read());
                        }
                        // Somebody waits for the answer to a request, be it the one that ends the server.
                        _ = self.finishing.wait_for(|finishing| *finishing),
                            if deadline.is_none() && self.in_flight.is_empty() => return Err(not_read()),
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Until when a client may take to read this.
fn patience(text: &str) -> Instant {
    let more = u32::try_from(text.len() / PATIENCE_BYTES).unwrap_or(u32::MAX);
    Instant::now() + PATIENCE + Duration::from_secs(1) * more
}

fn not_read() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it does not read what it is sent")
}

/// Carries out the requests of a message; those of a batch all at once.
async fn answer(dispatcher: Dispatcher, room: Room, message: Message) -> Done {
    match message {
        Message::Single(entry) => Done::Rpc {
            batch: false,
            replies: vec![reply(&dispatcher, &room.for_one(), entry).await],
        },
        Message::Batch(entries) => {
            let share = room.for_batch();
            let replies = entries.into_iter().map(|entry| reply(&dispatcher, &share, entry));
            Done::Rpc {
                batch: true,
                replies: join_all(replies).await,
            }
        }
    }
}

async fn reply(dispatcher: &Dispatcher, share: &Share, entry: Entry) -> Reply {
    let (id, outcome) = match entry {
        Ok(request) => {
            let outcome = match share.check() {
                Ok(()) => dispatcher.call(&request).await,
                Err(error) => Err(error),
            };
            (request.id, outcome)
        }
        Err(Answer { id, outcome }) => (Some(id), outcome.map(Outcome::Answer)),
    };
    let (id, outcome) = match (id, outcome) {
        (id, Ok(Outcome::Unsubscribe(name))) => return Reply::Unsubscribe { id, name },
        // Nobody could end a subscription whose name is not told.
        (None, _) => return Reply::Untold,
        (Some(id), Ok(Outcome::Subscribe { filter, recent })) => return Reply::Subscribe { id, filter, recent },
        (Some(id), Ok(Outcome::Answer(answer))) => (id, Ok(answer)),
        (Some(id), Err(error)) => (id, Err(error)),
    };
    let answer = Answer { id, outcome };
    let text = answer.to_json();
    if answer.outcome.is_err() {
        // It has to be told in any case, and is short but for the survivors that it may name.
        return Reply::Answer(Kept { text, permit: None });
    }
    let Answer { id, outcome } = answer;
    drop(outcome);
    Reply::Answer(share.keep(text).unwrap_or_else(|error| {
        let refusal = Answer {
            id,
            outcome: Err(error),
        };
        Kept {
            text: refusal.to_json(),
            permit: None,
        }
    }))
}

/// The next line of any subscription, with the subscription's index.
async fn next_line(subscriptions: &mut [Subscription]) -> (usize, Option<Followed>) {
    if subscriptions.is_empty() {
        return pending().await;
    }
    let nexts = subscriptions
        .iter_mut()
        .map(|subscription| Box::pin(subscription.follower.next()));
    let (followed, index, _) = select_all(nexts).await;
    (index, followed)
}

impl Form {
    fn write(self, followed: &Followed) -> String {
        match (self, followed) {
            (Self::Notification(name), followed) => notification(name, &followed.to_string()),
            (Self::Plain, Followed::Line(line)) => plain::write_line(line),
            (Self::Plain, Followed::Lost(count)) => plain::write_lost(*count),
        }
    }
}

fn notification(subscription: u64, line: &str) -> String {
    let params = json!({"subscription": subscription, "result": line});
    write(&json!({"jsonrpc": "2.0", "method": "stream_subscribeLogs", "params": params}))
}

/// A message as one line.
fn write<T: Serialize + ?Sized>(message: &T) -> String {
    to_json(message) + "\n"
}
