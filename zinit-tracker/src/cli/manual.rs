//! Manual pages: what clap knows of the command line, and sections that are made from the ends of the texts of `--help`. Both
//! programs have this file.

use std::{fs, path::Path};

use anyhow::Context as _;
use clap::Command;
use clap_mangen::{
    Man,
    roff::{Inline, Roff, bold, roman},
};

/// The section of the manual: programs that administrators run.
const SECTION: &str = "8";

/// What begins a paragraph at the end of a text of `--help`.
const EXAMPLE: &str = "Example: ";
const EXAMPLES: &str = "Examples:\n";
const EXIT_STATUS: &str = "Exit status: ";

/// What clap does not know.
pub(crate) struct Facts<'a> {
    /// Variables of the environment that no option names, each with what it does.
    pub(crate) environment: &'a [(&'a str, &'a str)],
    /// Files, each with what it is.
    pub(crate) files: &'a [(&'a str, &'a str)],
    /// Other pages.
    pub(crate) related: &'a [&'a str],
}

/// Writes a page for the program and one for each of its subcommands.
pub(crate) fn write(program: Command, facts: &Facts<'_>, directory: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("failed to make the directory {}", directory.display()))?;
    for (name, text) in pages(program, facts)? {
        let path = directory.join(format!("{name}.{SECTION}"));
        fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(())
}

/// The pages and their names.
fn pages(program: Command, facts: &Facts<'_>) -> anyhow::Result<Vec<(String, String)>> {
    let mut program = program.disable_help_subcommand(true);
    program.build();
    let name = |command: &Command| command.get_display_name().unwrap_or(command.get_name()).to_owned();
    let subcommands: Vec<_> = program
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .collect();
    let mut names: Vec<_> = subcommands.iter().map(|command| name(command)).collect();
    names.push(program.get_name().to_owned());
    let page_of = |command: &Command| {
        let own = name(command);
        let is_program = own == program.get_name();
        let others = names
            .iter()
            .filter(|other| **other != own && (is_program || *other == program.get_name()));
        let related = others
            .map(String::as_str)
            .chain(facts.related.iter().copied())
            .collect();
        Ok((own, page(&program, command, facts, related)?))
    };
    subcommands.into_iter().chain([&program]).map(page_of).collect()
}

fn page(program: &Command, command: &Command, facts: &Facts<'_>, related: Vec<&str>) -> anyhow::Result<String> {
    let version = program.get_version().unwrap_or_default();
    let man = Man::new(command.clone())
        .section(SECTION)
        .source(format!("{} {version}", program.get_name()));
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut text)?;
    }
    man.render_options_section(&mut text)?;
    let mut roff = Roff::new();
    let end = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    for paragraph in end.split("\n\n") {
        add(&mut roff, paragraph);
    }
    let of_options = command.get_arguments().filter_map(|argument| {
        let variable = argument.get_env()?.to_str()?;
        Some((variable, format!("As --{}, which overrides it.", argument.get_long()?)))
    });
    let others = facts.environment.iter().map(|(name, what)| (*name, (*what).to_owned()));
    list(&mut roff, "ENVIRONMENT", of_options.chain(others));
    list(
        &mut roff,
        "FILES",
        facts.files.iter().map(|(name, what)| (*name, (*what).to_owned())),
    );
    let mut see: Vec<Inline> = Vec::new();
    for name in related {
        if !see.is_empty() {
            see.push(roman(", "));
        }
        see.extend([bold(name), roman(format!("({SECTION})"))]);
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text(see);
    roff.to_writer(&mut text)?;
    Ok(in_ascii(&String::from_utf8(text)?))
}

/// Adds a paragraph of the end of a text of `--help` as a section.
fn add(roff: &mut Roff, paragraph: &str) {
    let examples = paragraph
        .strip_prefix(EXAMPLES)
        .or_else(|| paragraph.strip_prefix(EXAMPLE));
    if let Some(examples) = examples {
        roff.control("SH", ["EXAMPLES"]);
        roff.control("EX", []);
        for line in examples.lines() {
            roff.text([roman(line.trim_start())]);
        }
        roff.control("EE", []);
    } else if let Some(text) = paragraph.strip_prefix(EXIT_STATUS) {
        roff.control("SH", ["EXIT STATUS"]);
        // In a sentence of its own here.
        let mut letters = text.chars();
        let first = letters
            .next()
            .map(|letter| letter.to_uppercase().to_string())
            .unwrap_or_default();
        roff.text([roman(first + &letters.as_str().replace('\n', " "))]);
    } else if !paragraph.is_empty() {
        roff.control("SH", ["NOTES"]);
        roff.text([roman(paragraph.replace('\n', " "))]);
    }
}

/// Adds a section of names with what they mean, if there are any.
fn list<'a>(roff: &mut Roff, heading: &str, items: impl Iterator<Item = (&'a str, String)>) {
    let mut items = items.peekable();
    if items.peek().is_none() {
        return;
    }
    roff.control("SH", [heading]);
    for (name, what) in items {
        roff.control("TP", []);
        roff.text([bold(name)]);
        roff.text([roman(what)]);
    }
}

/// Not every roff reads UTF-8.
fn in_ascii(text: &str) -> String {
    let mut ascii = String::new();
    for letter in text.chars() {
        match letter {
            '…' => ascii.push_str("..."),
            letter if letter.is_ascii() => ascii.push(letter),
            letter => ascii.push_str(&format!("\\[u{:04X}]", u32::from(letter))),
        }
    }
    ascii
}
