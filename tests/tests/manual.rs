//! Manual pages: one for every command, without a warning of what formats them, and with what `--help` says.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use zinit_tests::{holds::skipped, tool, zinit};

/// What every page has.
const SECTIONS: [&str; 9] = [
    "NAME",
    "SYNOPSIS",
    "DESCRIPTION",
    "OPTIONS",
    "EXAMPLES",
    "EXIT STATUS",
    "ENVIRONMENT",
    "FILES",
    "SEE ALSO",
];

fn programs() -> [(&'static str, &'static Path); 2] {
    [("zinit-tracker", tool()), ("zinit", zinit())]
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn help(program: &Path, command: Option<&str>) -> String {
    let output = Command::new(program).args(command).arg("--help").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

/// The commands that `--help` lists.
fn commands(program: &Path) -> Vec<String> {
    let help = help(program, None);
    let list = help.split_once("Commands:\n").unwrap().1;
    let entries = list.lines().take_while(|line| !line.is_empty());
    // What continues the line before is indented further.
    let names = entries.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = names.map(|line| line.split_whitespace().next().unwrap().to_owned());
    names.filter(|name| name != "help").collect()
}

/// Runs what formats a page. `None`: it is not here.
fn format(command: &str, arguments: &[&str], page: &Path) -> Option<Output> {
    let output = Command::new(command)
        .args(arguments)
        .arg(page)
        .env("LC_ALL", "C.UTF-8")
        .env("MANWIDTH", "500")
        .env("MANROFFOPT", "-rHY=0")
        .stdin(Stdio::null())
        .output();
    match output {
        Ok(output) => Some(output),
        Err(error) => {
            skipped(&format!("{command} cannot be run: {error}"));
            None
        }
    }
}

/// Words, as pages and `--help` break their lines differently.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn every_command_has_a_page_that_says_what_its_help_says() {
    let directory = tempfile::tempdir().unwrap();
    let mut expected = BTreeSet::new();
    for (name, program) in programs() {
        let written = Command::new(program).arg("man").arg(directory.path()).output().unwrap();
        assert!(written.status.success(), "{written:?}");
        assert_eq!(
            (text(&written.stdout), text(&written.stderr)),
            (String::new(), String::new())
        );
        let commands = commands(program);
        assert!(commands.len() > 10, "{commands:?}");
        let of_commands = commands.iter().map(Some);
        for command in of_commands.chain([None]) {
            let page = match command {
                Some(command) => format!("{name}-{command}.8"),
                None => format!("{name}.8"),
            };
            check(
                &directory.path().join(&page),
                &help(program, command.map(String::as_str)),
            );
            expected.insert(page);
        }
    }
    let written = fs::read_dir(directory.path()).unwrap();
    let written: BTreeSet<_> = written
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(written, expected);
}

/// Asserts that the page has its sections, and what stands at the end of the help.
fn check(page: &Path, help: &str) {
    let name = page.file_name().unwrap().to_string_lossy().into_owned();
    if let Some(output) = format("groff", &["-man", "-ww", "-z", "-Tutf8"], page) {
        assert!(output.status.success(), "{name}: {output:?}");
        assert_eq!(text(&output.stderr), "", "{name}: groff");
    }
    let Some(output) = format("man", &["--warnings", "-l"], page) else {
        return;
    };
    assert!(output.status.success(), "{name}: {output:?}");
    assert_eq!(text(&output.stderr), "", "{name}: man");
    let shown = text(&output.stdout);
    let sections = shown.lines().filter(|line| SECTIONS.contains(line));
    assert_eq!(sections.collect::<Vec<_>>(), SECTIONS.to_vec(), "{shown}");
    let shown = words(&shown.replace('\u{2010}', "-"));
    let examples = help.split_once("Example").map(|(_, end)| end).unwrap();
    let examples = examples
        .split("\n\n")
        .next()
        .unwrap()
        .trim_start_matches(['s', ':', ' ', '\n']);
    for example in examples.lines() {
        assert!(shown.contains(&words(example)), "{name}: {example:?} is not in {shown}");
    }
    let status = words(help.split_once("Exit status: ").unwrap().1);
    // The first letter is a capital there.
    assert!(shown.contains(&status[1..]), "{name}: {status:?} is not in {shown}");
    for option in help
        .split_whitespace()
        .filter(|word| word.starts_with("--") && word.len() > 2)
    {
        let option: String = option
            .chars()
            .take_while(|c| c.is_ascii_lowercase() || *c == '-')
            .collect();
        assert!(shown.contains(&option), "{name}: {option} is not in {shown}");
    }
}
