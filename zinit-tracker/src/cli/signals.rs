//! The signals that this program receives, with who sent them.

use std::{io, thread};

use nix::sys::signal::Signal;
use signal_hook::{
    iterator::{SignalsInfo, exfiltrator::WithOrigin},
    low_level::siginfo::{Cause, Origin},
};
use tokio::sync::mpsc;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// Stop the service.
    Stop {
        /// With this signal.
        signal: Signal,
        /// Whether the terminal sent it, which sends it to the whole foreground process group.
        from_terminal: bool,
    },
    /// Send the signal to the command.
    PassOn(Signal),
}

const STOP: [Signal; 4] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT];
const PASS_ON: [Signal; 3] = [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH];

/// Signals, in the order in which they arrive.
pub(super) struct Signals(mpsc::UnboundedReceiver<Received>);

impl Signals {
    /// Listens from now on, except for those that were ignored when this program started, say by nohup(1).
    pub(super) fn listen() -> io::Result<Self> {
        let ignored = ignored();
        let wanted = STOP.into_iter().chain(PASS_ON).map(|signal| signal as i32);
        let wanted = wanted.filter(|signal| ignored & (1 << (signal - 1)) == 0);
        let mut signals = SignalsInfo::<WithOrigin>::new(wanted)?;
        let (sender, receiver) = mpsc::unbounded_channel();
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for origin in signals.forever() {
                if received(&origin).is_some_and(|received| sender.send(received).is_err()) {
                    return;
                }
            }
        })?;
        Ok(Self(receiver))
    }

    /// The next signal. Cancel-safe.
    pub(super) async fn next(&mut self) -> Received {
        match self.0.recv().await {
            Some(received) => received,
            // The thread that sends lives as long as this program.
            None => std::future::pending().await,
        }
    }

    /// The next signal that asks to stop. Cancel-safe.
    pub(super) async fn next_stop(&mut self) -> Signal {
        loop {
            if let Received::Stop { signal, .. } = self.next().await {
                return signal;
            }
        }
    }
}

fn received(origin: &Origin) -> Option<Received> {
    let signal = Signal::try_from(origin.signal).ok()?;
    Some(if PASS_ON.contains(&signal) {
        Received::PassOn(signal)
    } else {
        Received::Stop {
            signal,
            from_terminal: matches!(signal, Signal::SIGINT | Signal::SIGQUIT) && origin.cause == Cause::Kernel,
        }
    })
}

/// The signals that this process ignores, one bit each.
fn ignored() -> u64 {
    procfs::process::Process::myself()
        .and_then(|process| process.status())
        .map_or(0, |status| status.sigign)
}
