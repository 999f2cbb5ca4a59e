//! What a guest is made of: test binaries that need no libraries, the programs that tests call, and an init.

use super::{
    cpio::Archive,
    groups::{self, Call},
};
use crate::workspace::{cargo, output, root};
use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Every machine has root and nobody.
const USERS: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n";
const GROUPS: &[u8] = b"root:x:0:\nnogroup:x:65534:\n";
const INIT: &[u8] = include_bytes!("init.sh");

/// Packages whose programs the tests call.
pub(crate) const PACKAGES: [&str; 6] = ["busybox-static", "dash", "coreutils", "util-linux", "mount", "bpftool"];

/// Those programs. Whatever else a script wants comes from busybox, which gives its processes other names.
const PROGRAMS: [&str; 24] = [
    "bpftool", "cat", "chmod", "cp", "cut", "dash", "env", "false", "head", "ls", "mkdir", "mount", "nsenter", "rm",
    "rmdir", "setpriv", "setsid", "sleep", "timeout", "touch", "true", "umount", "unshare", "wc",
];

/// Packages whose work an emulated processor feels, with how much they are optimised: what loads a BPF object, reads the kernel's
/// types and looks at /proc. To optimise the rest takes longer than it saves.
const OPTIMISED: [(&str, u8); 9] = [
    ("aya", 1),
    ("aya-obj", 3),
    ("object", 3),
    ("procfs", 1),
    ("procfs-core", 1),
    ("rustix", 1),
    ("tokio", 1),
    ("zinit-tests", 1),
    ("zinit-tracker", 1),
];

/// Packages of ours, which are to notice when they are wrong; of others that is known.
const OURS: [&str; 3] = ["zinit-ebpf", "zinit-tests", "zinit-tracker"];

/// How long one test binary may take in the guest, for each round.
const GROUP_SECONDS: u32 = 400;

/// How a guest calls the test binaries.
#[derive(Clone, Copy)]
pub(crate) struct Calls<'a> {
    /// For all of them; if there are none, each gets the arguments that its group has of its own.
    pub(crate) arguments: &'a [String],
    /// How often a test repeats what may go wrong once in many times. Repetition finds what is rare, at the pace of a real
    /// machine; in a guest it is the kernels that differ.
    pub(crate) rounds: u32,
}

/// What `cargo` has built.
pub(crate) struct Binaries {
    /// Test binaries by the name of their group.
    groups: Vec<(String, PathBuf)>,
    /// `actor`, `zinit-tracker` and `zinit`.
    others: Vec<(String, PathBuf)>,
}

impl Binaries {
    /// The names of the groups, in their order.
    pub(crate) fn group_names(&self) -> Vec<&str> {
        self.groups.iter().map(|(name, _)| name.as_str()).collect()
    }
}

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
    let mut arguments = [
        "--package",
        "zinit-tests",
        "--package",
        "zinit-tracker",
        "--bin",
        "actor",
        "--bin",
        "zinit-tracker",
        "--bin",
        "zinit",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.extend(
        wanted_groups()?
            .into_iter()
            .flat_map(|group| ["--test".to_owned(), group]),
    );
    let built = artifacts(directory, &arguments)?;
    let (groups, others): (Vec<_>, Vec<_>) = built.into_iter().partition(|artifact| artifact.test);
    let named = |artifact: Artifact| (artifact.name, artifact.path);
    let mut groups: Vec<_> = groups.into_iter().map(named).collect();
    groups.sort();
    Ok(Binaries {
        groups,
        others: others.into_iter().map(named).collect(),
    })
}

/// The files of `tests/tests` that are not left out.
fn wanted_groups() -> Result<Vec<String>> {
    let directory = root().join("tests/tests");
    let failed = || format!("failed to list {}", directory.display());
    let mut groups = Vec::new();
    for entry in fs::read_dir(&directory).with_context(failed)? {
        let path = entry.with_context(failed)?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(group) = path.file_stem().and_then(|stem| stem.to_str())
            && !groups::LEFT_OUT.contains(&group)
        {
            groups.push(group.to_owned());
        }
    }
    groups.sort();
    Ok(groups)
}

/// Builds `zinit`, without debug information and linked statically.
///
/// # Errors
///
/// The build fails.
pub(crate) fn build_zinit(directory: &Path) -> Result<PathBuf> {
    let built = artifacts(
        directory,
        &["--package", "zinit-tracker", "--bin", "zinit"].map(str::to_owned),
    )?;
    let zinit = built.into_iter().find(|artifact| artifact.name == "zinit");
    Ok(zinit.context("cargo has built no zinit")?.path)
}

struct Artifact {
    name: String,
    path: PathBuf,
    test: bool,
}

fn artifacts(directory: &Path, arguments: &[String]) -> Result<Vec<Artifact>> {
    let mut cargo = cargo();
    cargo
        .arg("build")
        .args(arguments)
        .args([
            "--quiet",
            "--message-format=json-render-diagnostics",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(directory)
        .args(["--config", "profile.dev.debug=false"])
        .args(["--config", "profile.dev.strip=true"])
        .args(["--config", "profile.dev.debug-assertions=false"]);
    for (package, level) in OPTIMISED {
        cargo.args(["--config", &format!("profile.dev.package.{package}.opt-level={level}")]);
    }
    for package in OURS {
        for checks in ["debug-assertions", "overflow-checks"] {
            cargo.args(["--config", &format!("profile.dev.package.{package}.{checks}=true")]);
        }
    }
    cargo
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

/// Writes the first file system of a guest, which runs these groups.
///
/// # Errors
///
/// A program is not in the tree, or writing fails.
pub(crate) fn pack(path: &Path, tree: &Path, binaries: &Binaries, groups: &[Call<'_>], calls: Calls<'_>) -> Result<()> {
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
    archive.file("etc/passwd", USERS)?;
    archive.file("etc/group", GROUPS)?;
    archive.program("bin/busybox", &tree.join("usr/bin/busybox"))?;
    archive.symlink("bin/sh", "/usr/bin/dash")?;
    archive.symlink("usr/bin/sh", "dash")?;
    programs(&mut archive, tree)?;
    for (name, file) in binaries
        .groups
        .iter()
        .filter(|(name, _)| groups.iter().any(|call| call.group == name))
    {
        archive.program(&format!("tests/{name}"), file)?;
    }
    for (name, file) in &binaries.others {
        archive.program(&format!("tests/bin/{name}"), file)?;
        also_where_it_was_built(&mut archive, name, file)?;
    }
    archive.script("tests/groups.sh", script(groups, calls).as_bytes())?;
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

/// Calls every group with its arguments, quoted for the shell.
fn script(groups: &[Call<'_>], calls: Calls<'_>) -> String {
    let seconds = GROUP_SECONDS.saturating_mul(calls.rounds);
    let call = |call: &Call<'_>| {
        let name = call.group;
        let arguments: Vec<&str> = match calls.arguments {
            [] => call.arguments.to_vec(),
            given => given.iter().map(String::as_str).collect(),
        };
        let quoted = arguments
            .into_iter()
            .map(|argument| format!(" '{}'", argument.replace('\'', r"'\''")));
        format!("group {name} {seconds}{}\n", quoted.collect::<String>())
    };
    let rounds = format!("export ZINIT_TEST_ROUNDS={}\n", calls.rounds);
    rounds + &groups.iter().map(call).collect::<String>()
}

/// Adds the programs that tests call, and the libraries that those need.
///
/// # Errors
///
/// The packages lack one, or writing fails.
pub(crate) fn programs(archive: &mut Archive<impl Write>, tree: &Path) -> Result<()> {
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

    fn check(groups: &[Call<'_>], arguments: &[&str], rounds: u32, expected: &str) {
        let arguments: Vec<_> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let calls = Calls {
            arguments: &arguments,
            rounds,
        };
        assert_eq!(script(groups, calls), expected);
    }

    #[test]
    fn groups_get_their_arguments() {
        let call = |group, arguments| Call { group, arguments };
        check(
            &[call("cli", &[]), call("trees", &["last_quarter"])],
            &[],
            1,
            "export ZINIT_TEST_ROUNDS=1\ngroup cli 400\ngroup trees 400 'last_quarter'\n",
        );
        check(
            &[call("trees", &["last_quarter"])],
            &["it's", "--exact"],
            2,
            "export ZINIT_TEST_ROUNDS=2\ngroup trees 800 'it'\\''s' '--exact'\n",
        );
    }
}
