//! The supervisor's lines on stderr: written by a thread of their own, so that a full pipe or a stuck console stops nothing else.
//!
//! Not tracing-appender: its guard writes to stdout when the queue is full, and can flush only once.

use std::{
    io::{self, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use super::print;

/// How many lines may wait. Further ones are dropped and counted.
const LINES: usize = 4096;

/// How long the end waits for the lines that are left.
const PATIENCE: Duration = Duration::from_secs(2);

static QUEUE: OnceLock<Queue> = OnceLock::new();

/// Lines that wait to be written. Clones are the same queue.
#[derive(Clone)]
pub(super) struct Queue {
    lines: SyncSender<Box<[u8]>>,
    state: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    waiting: usize,
    /// Since the last line that was written.
    dropped: usize,
}

/// Lines go to the queue from now on.
///
/// # Errors
///
/// There is no thread to be had.
pub(super) fn queue() -> io::Result<Queue> {
    let queue = Queue::new(LINES, io::stderr())?;
    Ok(QUEUE.get_or_init(|| queue).clone())
}

/// One line with the program's name.
pub(super) fn note(text: &str) {
    match QUEUE.get() {
        Some(queue) => queue.push(format!(concat!(env!("CARGO_BIN_NAME"), ": {}\n"), text).as_bytes()),
        None => print::note(text),
    }
}

/// Waits until the lines are written, for 2 s at most.
pub(super) fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(PATIENCE);
    }
}

impl Queue {
    fn new(lines: usize, writer: impl Write + Send + 'static) -> io::Result<Self> {
        let (sender, receiver) = sync_channel(lines);
        let queue = Self {
            lines: sender,
            state: Arc::default(),
        };
        let state = Arc::clone(&queue.state);
        thread::Builder::new()
            .name("stderr".to_owned())
            .spawn(move || write_all(&receiver, &state, writer))?;
        Ok(queue)
    }

    fn push(&self, line: &[u8]) {
        let mut state = locked(&self.state.0);
        if self.lines.try_send(line.into()).is_ok() {
            state.waiting += 1;
        } else {
            state.dropped += 1;
        }
    }

    /// Whether all is written.
    fn flush(&self, patience: Duration) -> bool {
        let (state, written) = &*self.state;
        let waited = written.wait_timeout_while(locked(state), patience, |state| state.waiting > 0);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// tracing writes a line with one call.
impl Write for Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_all(lines: &Receiver<Box<[u8]>>, state: &(Mutex<State>, Condvar), mut writer: impl Write) {
    while let Ok(line) = lines.recv() {
        // If stderr is gone, nobody can be told.
        drop(writer.write_all(&line));
        let dropped = std::mem::take(&mut locked(&state.0).dropped);
        if dropped > 0 {
            let note = format!("zinit: {dropped} lines were dropped: stderr did not take them in time\n");
            drop(writer.write_all(note.as_bytes()));
        }
        locked(&state.0).waiting -= 1;
        state.1.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn a_reader_that_does_not_read_stops_nobody_and_is_told_what_it_missed() {
        let (mut reader, writer) = io::pipe().unwrap();
        let queue = Queue::new(4, writer).unwrap();
        // More than the pipe takes, so that the first line is never written to its end.
        queue.push(&vec![b'x'; 1024 * 1024]);
        for number in 0..100 {
            queue.push(format!("{number}\n").as_bytes());
        }
        assert!(!queue.flush(Duration::from_millis(1)));
        let reading = thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).map(|_| text)
        });
        assert!(queue.flush(Duration::from_secs(60)));
        drop(queue);
        let text = reading.join().unwrap().unwrap();
        let text = text.trim_start_matches('x');
        let (note, rest) = text.split_once('\n').unwrap();
        let lines: Vec<_> = rest.lines().collect();
        let dropped: usize = note.split(' ').nth(1).unwrap().parse().unwrap();
        assert_eq!(lines.len() + dropped, 100, "{text}");
        assert_eq!(lines[0], "0");
    }
}
