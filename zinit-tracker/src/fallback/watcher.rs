//! A thread that looks now and then: orphans are reaped, and who loses its parents has been seen while it had them.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{books::Shared, error::ProcfsError};

/// How often it looks at least, on a machine with few processes.
const INTERVAL: Duration = Duration::from_millis(100);
/// How much longer than a look the pause after it is, so that it takes at most 2 % of a processor.
const PAUSE: u32 = 50;

/// Ends the thread when it is dropped.
pub(super) struct Watcher {
    done: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    pub(super) fn start(shared: Arc<Shared>) -> Result<Self, ProcfsError> {
        let done = Arc::new((Mutex::new(false), Condvar::new()));
        let told = Arc::clone(&done);
        let thread = thread::Builder::new()
            .name("zinit-procfs".to_owned())
            .spawn(move || watch(&shared, &told))
            .map_err(ProcfsError::Thread)?;
        Ok(Self {
            done,
            thread: Some(thread),
        })
    }
}

fn watch(shared: &Shared, (done, woken): &(Mutex<bool>, Condvar)) {
    let mut pause = INTERVAL;
    loop {
        let done = done.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = woken.wait_timeout_while(done, pause, |done| !*done);
        if *waited.unwrap_or_else(PoisonError::into_inner).0 {
            return;
        }
        let began = Instant::now();
        if let Err(error) = shared.look() {
            tracing::debug!(error = &error as &dyn std::error::Error, "failed to look at /proc");
        }
        pause = INTERVAL.max(began.elapsed() * PAUSE);
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let (done, woken) = &*self.done;
        *done.lock().unwrap_or_else(PoisonError::into_inner) = true;
        woken.notify_all();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that looks at /proc had panicked");
        }
    }
}
