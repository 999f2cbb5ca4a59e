//! Saying that the process tree is complete, or why it never will be.

use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};
use zinit_tests::Ready;

use crate::life;

/// Reports readiness without facts.
pub(crate) fn signal() -> Result<()> {
    signal_with(&[])
}

/// Reports readiness and facts about the tree, if anybody has asked.
pub(crate) fn signal_with(facts: &[(&str, &dyn Display)]) -> Result<()> {
    let facts: String = facts.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
    send(&format!("ready\n{facts}\n"))
}

/// Reports that the behaviour cannot be played, here and to the test, and ends this process.
pub(crate) fn fail(error: &anyhow::Error) -> ! {
    eprintln!("actor: {error:#}");
    let reason = format!("{error:#}").replace('\n', "; ");
    if let Err(error) = send(&format!("failed: {reason}\n\n")) {
        eprintln!("actor: {error:#}");
    }
    life::exit_now(1);
}

fn send(message: &str) -> Result<()> {
    let Some(path) = std::env::var_os(Ready::ENV) else {
        return Ok(());
    };
    ensure!(
        message.len() <= libc::PIPE_BUF,
        "a message of {} bytes is not written at once",
        message.len()
    );
    // Without O_NONBLOCK this would wait for a test that has gone.
    let mut fifo = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .with_context(|| format!("failed to open {}", path.display()))?;
    fifo.write_all(message.as_bytes()).context("failed to report readiness")
}
