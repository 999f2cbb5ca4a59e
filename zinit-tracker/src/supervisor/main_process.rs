//! A service's main process: a child of this supervisor, or of an earlier one that it follows.

use std::{io, sync::Arc};

use nix::sys::signal::Signal;

use super::{children::OwnChild, command::Context, terminate::blocking};
use crate::{
    process::{Death, Matched, PidfdError, ProcessKey},
    stop::Fate,
    tracker::TrackerError,
};

/// A main process.
#[derive(Debug)]
pub(super) enum MainProcess {
    Own(OwnChild),
    Inherited(Inherited),
}

/// One that an earlier supervisor has created, so that it is nobody's here to wait for: its end is seen by a pidfd, and the kernel's
/// books know how it ended.
#[derive(Debug)]
pub(super) struct Inherited {
    pid: u32,
    key: ProcessKey,
    process: Matched,
    death: Death,
    context: Arc<Context>,
}

impl Inherited {
    /// The process was found to be the one that has the key.
    ///
    /// # Errors
    ///
    /// Descriptors are used up.
    pub(super) fn new(context: &Arc<Context>, pid: u32, key: ProcessKey, process: Matched) -> io::Result<Self> {
        Ok(Self {
            pid,
            key,
            death: process.death()?,
            process,
            context: Arc::clone(context),
        })
    }

    async fn fate(&self) -> Option<Fate> {
        let key = self.key;
        let end = blocking(&self.context, move |context| context.tracker.end_of(key)).await;
        let status = match end {
            Ok(end) => end.and_then(|end| end.status),
            Err(error) => {
                let error: TrackerError = error;
                tracing::warn!(pid = self.pid, %error, "failed to find out how a main process ended");
                None
            }
        };
        status.map(Fate::of_wait_status)
    }
}

impl MainProcess {
    /// Its pid; of a child certainly its own, else as long as it lives.
    pub(super) fn pid(&self) -> Option<u32> {
        match self {
            Self::Own(child) => child.pid(),
            Self::Inherited(process) => Some(process.pid),
        }
    }

    /// Sends a signal. Returns whether the process was there to receive it.
    pub(super) fn signal(&self, signal: Signal) -> Result<bool, PidfdError> {
        match self {
            Self::Own(child) => child.matched()?.map_or(Ok(false), |process| process.signal(signal)),
            Self::Inherited(process) => process.process.signal(signal),
        }
    }

    /// Waits until it has ended. Cancel-safe. `None`: nobody knows how.
    pub(super) async fn ended(&mut self) -> Option<Fate> {
        match self {
            Self::Own(child) => child.ended().await,
            Self::Inherited(process) => {
                // It fails if the runtime ends.
                if let Err(error) = process.death.happened().await {
                    tracing::debug!(%error, "the end of a main process cannot be waited for");
                }
                process.fate().await
            }
        }
    }

    /// Whether, and how, it has ended.
    pub(super) async fn has_ended(&mut self) -> Option<Option<Fate>> {
        match self {
            Self::Own(child) => child.has_ended(),
            Self::Inherited(process) => match process.process.is_dead() {
                true => Some(process.fate().await),
                false => None,
            },
        }
    }
}
