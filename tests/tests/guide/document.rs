//! The guide as a document: the files that it shows, and the transcripts.

use std::{collections::VecDeque, fs, path::Path};

/// What stands for lines that are left out.
const LEFT_OUT: &str = "…";

/// From how many blanks on a line is one of a block, in a list or outside of it.
const INDENT: usize = 4;

/// Which numbers may differ between a transcript and what is printed. Runs of blanks always may: numbers have widths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Numbers {
    /// Those of three digits or more, such as pids; counts may not.
    Large,
    /// All: times, and counts that depend on the version of a program.
    All,
}

/// A section of the guide.
#[derive(Debug)]
pub(crate) struct Section {
    /// Commands and what they print, in the order of the text. Those that were compared are taken out.
    transcripts: VecDeque<Transcript>,
    files: Vec<Transcript>,
}

#[derive(Debug)]
struct Transcript {
    command: String,
    lines: Vec<String>,
}

impl Section {
    /// The section whose heading begins like this.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub(crate) fn read(heading: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../zinit-tracker/guide.md");
        let text = fs::read_to_string(path).unwrap();
        let mut sections = text.split("\n## ");
        let section = sections.find(|section| section.starts_with(heading));
        let section = section.unwrap_or_else(|| panic!("the guide has no section {heading:?}"));
        let mut all: Vec<Transcript> = Vec::new();
        // How far the block is indented that the line is in.
        let mut block = None;
        for line in section.lines() {
            let text = line.trim_start();
            let indent = line.len() - text.len();
            if indent < INDENT {
                block = None;
            } else if let Some(command) = text.strip_prefix("# ") {
                block = Some(indent);
                all.push(Transcript {
                    command: command.to_owned(),
                    lines: Vec::new(),
                });
            } else if let (Some(indent), Some(last)) = (block, all.last_mut()) {
                last.lines.push(line[indent..].to_owned());
            }
        }
        let (files, transcripts): (Vec<_>, Vec<_>) = all.into_iter().partition(|it| it.command.starts_with("cat "));
        let transcripts = transcripts.into_iter().filter(|it| it.is_of_our_tools()).collect();
        Self { transcripts, files }
    }

    /// The file of that path, as the guide shows it for the first, second, … time (from 0).
    pub(crate) fn file(&self, path: &str, nth: usize) -> String {
        let command = format!("cat {path}");
        let mut files = self.files.iter().filter(|file| file.command == command);
        let file = files
            .nth(nth)
            .unwrap_or_else(|| panic!("the guide does not show {path}"));
        file.lines.join("\n") + "\n"
    }

    /// Compares what a command has printed with the guide's next transcript.
    ///
    /// # Panics
    ///
    /// If they differ by more than numbers, and lines for which the guide has `…`.
    pub(crate) fn compare(&mut self, command: &str, printed: &str, numbers: Numbers) {
        let shown = self.transcripts.pop_front();
        let shown =
            shown.unwrap_or_else(|| panic!("the guide has no other transcript, but there is {command}:\n{printed}"));
        assert_eq!(
            plain(command, numbers),
            plain(&shown.command, numbers),
            "the guide's next transcript"
        );
        let expected: Vec<_> = shown.lines.iter().map(|line| plain(line, numbers)).collect();
        let found: Vec<_> = printed.lines().map(|line| plain(line, numbers)).collect();
        assert!(
            fits(&expected, &found),
            "{command}: the guide shows\n{}\nand this was printed:\n{printed}",
            shown.lines.join("\n")
        );
    }

    /// Asserts that every transcript was compared.
    pub(crate) fn assert_all_compared(&self) {
        assert!(self.transcripts.is_empty(), "not compared: {:#?}", self.transcripts);
    }
}

impl Transcript {
    fn is_of_our_tools(&self) -> bool {
        matches!(self.command.split(' ').next(), Some("zinit" | "zinit-tracker"))
    }
}

/// Whether the lines are the expected ones, with any others where something is left out.
fn fits(expected: &[String], found: &[String]) -> bool {
    match expected {
        [] => found.is_empty(),
        [first, rest @ ..] if first.trim() == LEFT_OUT => {
            (0..=found.len()).any(|skipped| fits(rest, &found[skipped..]))
        }
        [first, rest @ ..] => found.first() == Some(first) && fits(rest, &found[1..]),
    }
}

/// A line without what differs from one run to the next: pids, times, and where a test has its supervisor.
fn plain(line: &str, numbers: Numbers) -> String {
    let mut text = String::new();
    for word in line.split_whitespace() {
        text.push(' ');
        text.push_str(&plain_word(word, numbers));
    }
    text
}

fn plain_word(word: &str, numbers: Numbers) -> String {
    // `zinit` names itself by a digest of where it listens, unless that is the usual place.
    let word = match word.split_once("zinit-") {
        Some(("", rest)) if rest.len() > 12 && rest.as_bytes()[12] == b'/' => format!("zinit{}", &rest[12..]),
        _ => word.to_owned(),
    };
    if numbers == Numbers::All && matches!(word.as_str(), "ms" | "µs") {
        return "s".to_owned();
    }
    let mut plain = String::new();
    let mut rest = word.as_str();
    while let Some(start) = rest.find(|c: char| c.is_ascii_digit()) {
        let fraction = |c: char| !c.is_ascii_digit() && (numbers != Numbers::All || c != '.');
        let length = rest[start..].find(fraction).unwrap_or(rest.len() - start);
        let (before, number) = (&rest[..start], &rest[start..start + length]);
        plain.push_str(before);
        plain.push_str(if numbers == Numbers::All || length >= 3 {
            "N"
        } else {
            number
        });
        rest = &rest[start + length..];
    }
    plain + rest
}

#[test]
fn a_transcript_fits_up_to_numbers_and_what_is_left_out() {
    let lines = |text: &str, numbers| -> Vec<_> { text.lines().map(|line| plain(line, numbers)).collect() };
    let printed = "zinit-0123456789ab/web: 2 live\n  4711  nginx\n  4712  nginx\nin 2.5 ms";
    for (shown, numbers, is_so) in [
        (
            "zinit/web: 2 live\n 815 nginx\n 816 nginx\nin 2.5 ms",
            Numbers::Large,
            true,
        ),
        (
            "zinit/web: 3 live\n 815 nginx\n 816 nginx\nin 2.5 ms",
            Numbers::Large,
            false,
        ),
        (
            "zinit/web: 3 live\n 815 nginx\n 816 nginx\nin 3.20 s",
            Numbers::All,
            true,
        ),
        ("zinit/web: 2 live\n…\nin 2.5 ms", Numbers::Large, true),
        ("zinit/web: 2 live\n…\n", Numbers::Large, true),
        ("zinit/web: 2 live\n", Numbers::Large, false),
        ("zinit/web: 2 live\n…\n 815 apache\n…", Numbers::Large, false),
    ] {
        assert_eq!(fits(&lines(shown, numbers), &lines(printed, numbers)), is_so, "{shown}");
    }
}
