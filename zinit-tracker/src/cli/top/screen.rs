//! The terminal: taken, and given back as it was, whatever happens.

use std::{
    io::{self, Stdout, Write as _},
    panic,
    sync::{
        Mutex, Once,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::Context as _;
use ratatui::{
    Frame, Terminal,
    backend::CrosstermBackend,
    crossterm::{
        cursor::{Hide, Show},
        execute,
        terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode},
    },
    layout::{Position, Rect},
};

/// Whether the terminal is ours.
static TAKEN: AtomicBool = AtomicBool::new(false);
/// What was said on stderr meanwhile.
static SAID: Mutex<Vec<u8>> = Mutex::new(Vec::new());
/// More is of no use to anybody.
const MOST_SAID: usize = 64 * 1024;

/// The terminal while it is ours.
pub(super) struct Screen(Terminal<CrosstermBackend<Stdout>>);

impl Screen {
    /// Takes the terminal.
    pub(super) fn take() -> anyhow::Result<Self> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let previous = panic::take_hook();
            panic::set_hook(Box::new(move |what| {
                give_back();
                previous(what);
            }));
        });
        take().context("failed to take the terminal")?;
        let terminal = Terminal::new(CrosstermBackend::new(io::stdout()));
        // From here on the drop gives it back.
        match terminal {
            Ok(terminal) => Ok(Self(terminal)),
            Err(error) => {
                give_back();
                Err(error).context("failed to take the terminal")
            }
        }
    }

    pub(super) fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> anyhow::Result<()> {
        self.0.draw(draw).context("failed to draw")?;
        Ok(())
    }

    /// Gives the terminal back, stops this process as Ctrl-Z does, and takes the terminal again when it goes on.
    pub(super) fn suspend(&mut self) -> anyhow::Result<()> {
        give_back();
        signal_hook::low_level::emulate_default_handler(libc::SIGTSTP).context("failed to stop")?;
        self.retake()
    }

    /// Takes the terminal again after somebody else may have used it.
    pub(super) fn retake(&mut self) -> anyhow::Result<()> {
        give_back();
        take().context("failed to take the terminal again")?;
        // Not `clear`, which asks the terminal where its cursor is: the answer would go to whoever reads keys.
        let size = self.0.size().context("failed to ask the terminal for its size")?;
        let area = Rect::from((Position::ORIGIN, size));
        self.0.resize(area).context("failed to clear the terminal")
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

fn take() -> io::Result<()> {
    TAKEN.store(true, Ordering::SeqCst);
    let taken = enable_raw_mode().and_then(|()| execute!(io::stdout(), EnterAlternateScreen, Hide));
    if taken.is_err() {
        give_back();
    }
    taken
}

/// If the terminal is gone, nobody can be told.
fn give_back() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        drop(execute!(io::stdout(), LeaveAlternateScreen, Show));
        drop(disable_raw_mode());
        let said = std::mem::take(&mut *said());
        drop(io::stderr().write_all(&said));
    }
}

fn said() -> std::sync::MutexGuard<'static, Vec<u8>> {
    SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// stderr for the log: while the terminal is taken, what is written waits until it is given back.
pub(crate) struct Log;

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !TAKEN.load(Ordering::SeqCst) {
            return io::stderr().write(bytes);
        }
        let mut said = said();
        if said.len() < MOST_SAID {
            said.extend_from_slice(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
