//! Listings that are longer than the terminal, through a pager.

use std::{
    env,
    ffi::OsString,
    io::{self, IsTerminal as _, Write as _},
    process::{Command, Stdio},
    sync::{Arc, atomic::AtomicBool},
};

use anstream::adapter::strip_str;
use anyhow::Context as _;
use rustix::termios::tcgetwinsize;

use super::{Global, output};

/// The pager if the environment names none.
const USUAL: &str = "less";
/// A terminal that does not know its size.
const COLUMNS: usize = 80;
const ROWS: usize = 24;
/// Statuses of sh(1) for a command that it could not execute, or not find.
const NOT_EXECUTED: [i32; 2] = [126, 127];

/// Writes a listing to stdout, through a pager if that is a terminal, too small for it, and the user wants one.
pub(super) fn show(global: &Global, text: &str) -> anyhow::Result<()> {
    if let Some(pager) = wanted(global, text)
        && is_shown(pager, text)?
    {
        return Ok(());
    }
    output::print(text)
}

/// The pager for this text.
fn wanted(global: &Global, text: &str) -> Option<Command> {
    let stdout = io::stdout();
    if global.no_pager || !stdout.is_terminal() {
        return None;
    }
    let (columns, rows) = tcgetwinsize(&stdout).map_or((0, 0), |size| (size.ws_col.into(), size.ws_row.into()));
    if fits(text, or(columns, COLUMNS), or(rows, ROWS)) {
        return None;
    }
    let mut command = match env::var_os("PAGER") {
        None => Command::new(USUAL),
        Some(pager) if pager.is_empty() || pager == "cat" => return None,
        Some(pager) => through_shell(pager),
    };
    // As git(1) has them: quit if it fits after all, let colours through, leave the text on the screen.
    set_unless_set(&mut command, "LESS", "FRX");
    set_unless_set(&mut command, "LV", "-c");
    // Whoever may run this program as root by sudo(8) is not to get a shell by it.
    set_unless_set(&mut command, "LESSSECURE", "1");
    Some(command)
}

fn or(size: usize, usual: usize) -> usize {
    if size == 0 { usual } else { size }
}

/// `$PAGER` may have arguments, and anything else that a shell understands.
fn through_shell(pager: OsString) -> Command {
    let mut command = Command::new("sh");
    command.arg("-c").arg(pager);
    command
}

fn set_unless_set(command: &mut Command, name: &str, value: &str) {
    if env::var_os(name).is_none() {
        command.env(name, value);
    }
}

/// Whether the text and a prompt below it are on the screen at once.
fn fits(text: &str, columns: usize, rows: usize) -> bool {
    let plain = strip_str(text).to_string();
    let lines = plain.lines().map(|line| line.chars().count().div_ceil(columns).max(1));
    lines.sum::<usize>() < rows
}

/// Feeds the pager, and waits until the user is done with it. False: it could not be started, and nothing was shown.
fn is_shown(mut pager: Command, text: &str) -> anyhow::Result<bool> {
    // Ctrl-C is meant for the pager, which would be left with the terminal if it ended this program.
    for signal in [libc::SIGINT, libc::SIGQUIT] {
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false))).context("failed to handle signals")?;
    }
    let Ok(mut child) = pager.stdin(Stdio::piped()).spawn() else {
        return Ok(false);
    };
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(text.as_bytes()) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(error).context("failed to write to the pager");
            }
            // Who has seen enough does not read on.
            _ => {}
        }
    }
    let status = child.wait().context("failed to wait for the pager")?;
    Ok(!status.code().is_some_and(|code| NOT_EXECUTED.contains(&code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leaves_no_room_for_a_prompt_does_not_fit() {
        for (text, fits_in_it) in [
            ("", true),
            ("1\n2\n", true),
            ("1\n2\n3\n", false),
            // Two lines on the screen.
            ("1\n23456\n", false),
            ("1\n2345\n", true),
            // Colours take no room.
            ("1\n\u{1b}[31m2345\u{1b}[0m\n", true),
        ] {
            assert_eq!(fits(text, 4, 3), fits_in_it, "{text:?}");
        }
    }
}
