//! What a guest is made of: test binaries that need no libraries, the programs that tests call, and an init.

use super::cpio::Archive;
use crate::workspace::{cargo, output};
use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const TARGET: &str = "x86_64-unknown-linux-gnu";
const INIT: &[u8] = include_bytes!("init.sh");

/// Packages whose programs the tests call.
pub(crate) const PACKAGES: [&str; 6] = ["busybox-static", "dash", "coreutils", "util-linux", "mount", "bpftool"];

/// Those programs. Whatever else a script wants comes from busybox, which gives its processes other names.
const PROGRAMS: [&str; 24] = [
    "bpftool", "cat", "chmod", "cp", "cut", "dash", "env", "false", "head", "ls", "mkdir", "mount", "nsenter", "rm",
    "rmdir", "setpriv", "setsid", "sleep", "timeout", "touch", "true", "umount", "unshare", "wc",
];

/// How long one test binary may take in the guest.
const GROUP_SECONDS: u32 = 240;

/// What a group runs without a filter, where that is less than all: an emulated machine is slow.
const REDUCED: [(&str, &[&str]); 2] = [
    ("escapes", &["--skip", "a_hundred_times"]),
    ("trees", &["last_quarter"]),
];

/// Groups that a boot leaves out to save time: what depends on the version runs without arguments, the long one with them.
const ONLY_WITHOUT_ARGUMENTS: &str = "cli";
const ONLY_WITH_ARGUMENTS: &str = "trees";

/// What `cargo` has built.
pub(crate) struct Binaries {
    /// Test binaries by the name of their group.
    pub(crate) groups: Vec<(String, PathBuf)>,
    /// `actor` and `zinit-tracker`.
    others: Vec<(String, PathBuf)>,
}

/// What tests the actors, without a tracker: it says nothing about a kernel.
const LEFT_OUT: &str = "actor";

#[derive(Deserialize)]
struct Message {
    executable: Option<PathBuf>,
    target: Option<Target>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// Builds the end-to-end tests and what they run, without debug information and linked statically.
///
/// # Errors
///
/// The build fails.
pub(crate) fn build(directory: &Path) -> Result<Binaries> {
    let mut built = artifacts(
        directory,
        &["test", "--no-run", "--package", "zinit-tests", "--test", "*"],
    )?;
    built.extend(artifacts(
        directory,
        &["build", "--package", "zinit-tracker", "--bin", "zinit-tracker"],
    )?);
    let (groups, others): (Vec<_>, Vec<_>) = built.into_iter().partition(|artifact| artifact.test);
    let named = |artifact: Artifact| (artifact.name, artifact.path);
    let mut groups: Vec<_> = groups.into_iter().map(named).collect();
    groups.retain(|(name, _)| name != LEFT_OUT);
    groups.sort();
    Ok(Binaries {
        groups,
        others: others.into_iter().map(named).collect(),
    })
}

struct Artifact {
    name: String,
    path: PathBuf,
    test: bool,
}

fn artifacts(directory: &Path, arguments: &[&str]) -> Result<Vec<Artifact>> {
    let mut cargo = cargo();
    cargo
        .args(arguments)
        .args([
            "--quiet",
            "--message-format=json-render-diagnostics",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(directory)
        // Emulated processors are slow.
        .args([
            "--config",
            "profile.dev.opt-level=1",
            "--config",
            "profile.dev.debug=false",
        ])
        .args(["--config", "profile.dev.strip=true"])
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .stderr(Stdio::inherit());
    let messages = output(&mut cargo)?;
    let mut artifacts = Vec::new();
    for line in messages.lines() {
        let message: Message = serde_json::from_str(line).context("failed to understand cargo")?;
        if let (Some(path), Some(target)) = (message.executable, message.target) {
            artifacts.push(Artifact {
                test: target.kind.iter().any(|kind| kind == "test"),
                name: target.name,
                path,
            });
        }
    }
    Ok(artifacts)
}

/// Writes the first file system of a guest: one whose kernel has a plain command line or not, and that passes these
/// arguments to the test binaries.
///
/// # Errors
///
/// A program is not in the tree, or writing fails.
pub(crate) fn pack(path: &Path, tree: &Path, binaries: &Binaries, plain: bool, arguments: &[String]) -> Result<()> {
    let left_out = if plain {
        ONLY_WITH_ARGUMENTS
    } else {
        ONLY_WITHOUT_ARGUMENTS
    };
    let mut groups = binaries.groups.clone();
    groups.retain(|(name, _)| !arguments.is_empty() || name != left_out);
    let file = File::create(path).with_context(|| format!("failed to create {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    for directory in [
        "bin",
        "dev",
        "etc",
        "mnt",
        "proc",
        "root",
        "sys",
        "tests",
        "tests/bin",
        "tmp",
        "usr",
        "usr/bin",
        "usr/lib",
        "usr/lib64",
    ] {
        archive.directory(directory)?;
    }
    archive.symlink("lib64", "usr/lib64")?;
    // Until devtmpfs is mounted.
    archive.device("dev/console", 5, 1)?;
    archive.script("init", INIT)?;
    archive.program("bin/busybox", &tree.join("usr/bin/busybox"))?;
    archive.symlink("bin/sh", "/usr/bin/dash")?;
    archive.symlink("usr/bin/sh", "dash")?;
    programs(&mut archive, tree)?;
    for (name, file) in &groups {
        archive.program(&format!("tests/{name}"), file)?;
    }
    for (name, file) in &binaries.others {
        archive.program(&format!("tests/bin/{name}"), file)?;
        also_where_it_was_built(&mut archive, name, file)?;
    }
    archive.script("tests/groups.sh", script(&groups, arguments).as_bytes())?;
    archive.finish()
}

/// Tests may call a binary by the path that cargo has told them when they were compiled.
fn also_where_it_was_built(archive: &mut Archive<impl Write>, name: &str, file: &Path) -> Result<()> {
    let inside = |path: &Path| path.to_string_lossy().trim_start_matches('/').to_owned();
    let directories: Vec<_> = file
        .ancestors()
        .skip(1)
        .filter(|path| path.parent().is_some())
        .collect();
    for directory in directories.into_iter().rev() {
        archive.directory(&inside(directory))?;
    }
    archive.symlink(&inside(file), &format!("/tests/bin/{name}"))
}

/// Calls every group with the arguments, quoted for the shell.
fn script(groups: &[(String, PathBuf)], arguments: &[String]) -> String {
    let call = |name: &str| {
        let reduced = REDUCED.iter().find(|(group, _)| *group == name);
        let reduced = reduced.map_or(&[][..], |(_, arguments)| arguments);
        let arguments: Vec<&str> = match arguments {
            [] => reduced.to_vec(),
            given => given.iter().map(String::as_str).collect(),
        };
        let quoted = arguments
            .into_iter()
            .map(|argument| format!(" '{}'", argument.replace('\'', r"'\''")));
        format!("group {name} {GROUP_SECONDS}{}\n", quoted.collect::<String>())
    };
    groups.iter().map(|(name, _)| call(name)).collect()
}

/// Adds the programs that tests call, and the libraries that those need.
fn programs(archive: &mut Archive<impl Write>, tree: &Path) -> Result<()> {
    let mut libraries = BTreeSet::new();
    for name in PROGRAMS {
        let file = ["usr/bin", "usr/sbin"]
            .map(|directory| tree.join(directory).join(name))
            .into_iter()
            .find(|file| file.is_file())
            .with_context(|| format!("the packages have no program {name}"))?;
        archive.program(&format!("usr/bin/{name}"), &file)?;
        libraries.extend(libraries_of(tree, &file)?);
    }
    for library in libraries {
        let name = library.file_name().context("a library has no name")?.to_string_lossy();
        archive.program(&format!("usr/lib/{name}"), &library)?;
    }
    archive.program("usr/lib64/ld-linux-x86-64.so.2", &loader(tree))
}

/// The libraries that a program of the tree loads, as the tree's own loader finds them.
fn libraries_of(tree: &Path, program: &Path) -> Result<Vec<PathBuf>> {
    let listed = output(with_libraries(tree).arg("--list").arg(program))?;
    let path = |line: &str| {
        let path = line.split_once("=> ")?.1.split(" (").next()?;
        Some(PathBuf::from(path))
    };
    let libraries: Vec<_> = listed.lines().filter_map(path).collect();
    for library in &libraries {
        ensure!(
            library.starts_with(tree),
            "{} is not of the packages",
            library.display()
        );
    }
    Ok(libraries)
}

/// Runs a program of the tree with the tree's libraries: its loader takes the rest of the command line.
pub(crate) fn with_libraries(tree: &Path) -> Command {
    let mut command = Command::new(loader(tree));
    command.arg("--library-path").arg(tree.join("usr/lib/x86_64-linux-gnu"));
    command
}

fn loader(tree: &Path) -> PathBuf {
    tree.join("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(groups: &[&str], arguments: &[&str], expected: &str) {
        let groups: Vec<_> = groups.iter().map(|name| ((*name).to_owned(), PathBuf::new())).collect();
        let arguments: Vec<_> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        assert_eq!(script(&groups, &arguments), expected);
    }

    #[test]
    fn groups_get_their_arguments() {
        check(
            &["cli", "trees"],
            &[],
            "group cli 240\ngroup trees 240 'last_quarter'\n",
        );
        check(
            &["trees"],
            &["it's", "--exact"],
            "group trees 240 'it'\\''s' '--exact'\n",
        );
    }
}
