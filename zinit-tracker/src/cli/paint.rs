//! Colours of listings: what stands out, and what stands back. Without colours, text stays what it is.

use std::{io, sync::OnceLock};

use anstream::{AutoStream, ColorChoice};
use anstyle::{AnsiColor, Style};
use clap::ValueEnum;
use zinit_tracker::stop::Fate;

/// When there are colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum When {
    /// On a terminal, unless NO_COLOR is set; or if CLICOLOR_FORCE is set
    Auto,
    /// Also where stdout is no terminal
    Always,
    /// Nowhere
    Never,
}

/// Decides for the whole program, before anything is painted.
pub(super) fn choose(when: When) {
    let choice = match when {
        When::Auto => ColorChoice::Auto,
        When::Always => ColorChoice::Always,
        When::Never => ColorChoice::Never,
    };
    choice.write_global();
}

/// Whether messages on stderr have colours.
pub(super) fn on_stderr() -> bool {
    AutoStream::choice(&io::stderr()) != ColorChoice::Never
}

fn on_stdout() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| AutoStream::choice(&io::stdout()) != ColorChoice::Never)
}

/// The titles of columns, and what matters less.
pub(super) fn dim(text: &str) -> String {
    paint(Style::new().dimmed(), text)
}

/// A line on a service, above what is listed of it.
pub(super) fn title(text: &str) -> String {
    paint(Style::new().bold(), text)
}

/// What has left its service, or is missed by others.
pub(super) fn escaped(text: &str) -> String {
    paint(AnsiColor::Yellow.on_default(), text)
}

/// The dead.
pub(super) fn dead(text: &str) -> String {
    paint(AnsiColor::Red.on_default(), text)
}

/// What is wrong with the books or the listing.
pub(super) fn alarm(text: &str) -> String {
    paint(AnsiColor::Red.on_default().bold(), text)
}

/// How a process ended, as `text` says it: it stands out unless all went well.
pub(super) fn fate(fate: Option<Fate>, text: &str) -> String {
    match fate {
        None | Some(Fate::Exited(0)) => text.to_owned(),
        Some(_) => dead(text),
    }
}

/// Colours end with the line: pagers show lines each for itself.
fn paint(style: Style, text: &str) -> String {
    if !on_stdout() || text.is_empty() {
        return text.to_owned();
    }
    match text.strip_suffix('\n') {
        Some(line) => format!("{style}{line}{style:#}\n"),
        None => format!("{style}{text}{style:#}"),
    }
}
