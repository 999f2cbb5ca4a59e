//! A real terminal: tmux with a server of its own, whose screen can be read and whose keys can be pressed.

use std::{
    ffi::OsStr,
    path::PathBuf,
    process::{Command, Output},
};

use tempfile::TempDir;

use crate::{Cleanup, Marker, daemon::wait_for};

/// A terminal that runs one command.
#[derive(Debug)]
pub struct Terminal {
    directory: TempDir,
    _cleanup: Cleanup,
}

impl Terminal {
    /// Runs a shell script in a terminal of that many columns and lines. In it, `$DIR` is [`Terminal::file`]'s directory.
    ///
    /// # Panics
    ///
    /// When there is no tmux.
    #[must_use]
    pub fn run(columns: u16, lines: u16, script: &str) -> Self {
        let marker = Marker::new();
        let terminal = Self {
            directory: TempDir::new().expect("a directory can be made"),
            _cleanup: Cleanup::new(&marker),
        };
        let output = terminal
            .command(&[
                "new-session",
                "-d",
                "-x",
                &columns.to_string(),
                "-y",
                &lines.to_string(),
            ])
            .arg(script)
            .env(Marker::ENV, marker.as_str())
            .env("DIR", terminal.directory.path())
            .env_remove("TMUX")
            .env_remove("RUST_LOG")
            .output()
            .expect("tmux is installed");
        assert!(output.status.success(), "{output:?}");
        terminal
    }

    /// A file that the script may write.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What is on the screen, line by line.
    #[must_use]
    pub fn screen(&self) -> String {
        self.tmux(&["capture-pane", "-p"])
    }

    /// Waits until the screen is as it should be, and returns it.
    pub fn wait_for(&self, what: &str, mut is_so: impl FnMut(&str) -> bool) -> String {
        let mut screen = String::new();
        let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_for(what, || {
                screen = self.screen();
                is_so(&screen)
            });
        }));
        if seen.is_err() {
            panic!("in vain: {what}; the screen is\n{screen}");
        }
        screen
    }

    /// Waits until the screen shows a text, and returns the screen.
    pub fn shows(&self, text: &str) -> String {
        self.wait_for(text, |screen| screen.contains(text))
    }

    /// Presses keys, by the names that tmux has for them.
    pub fn press(&self, keys: &[&str]) {
        let arguments: Vec<_> = ["send-keys"].iter().chain(keys).copied().collect();
        self.tmux(&arguments);
    }

    /// Types letters.
    pub fn type_in(&self, text: &str) {
        self.tmux(&["send-keys", "-l", text]);
    }

    /// Changes the size.
    pub fn resize(&self, columns: u16, lines: u16) {
        self.tmux(&["resize-window", "-x", &columns.to_string(), "-y", &lines.to_string()]);
    }

    /// Whether a program has the alternate screen.
    #[must_use]
    pub fn is_alternate(&self) -> bool {
        self.tmux(&["display-message", "-p", "#{alternate_on}"]).trim() == "1"
    }

    fn tmux(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().expect("tmux is installed");
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new("tmux");
        // UTF-8 whatever the locale; no configuration of the user's.
        command.args(["-u", "-f", "/dev/null", "-S"]).arg(self.file("tmux"));
        command.args(arguments);
        command
    }

    fn end(&self) -> std::io::Result<Output> {
        self.command(&["kill-server"]).output()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("failed to end a terminal: {error}");
        }
    }
}
