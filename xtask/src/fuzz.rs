//! `cargo xtask fuzz`: feeds what reads foreign bytes with what nobody would write, guided by which code that reaches.
//!
//! The targets are in `tests/fuzz`, one a file, with a corpus each. libFuzzer's instrumentation is part of every stable Rust;
//! libFuzzer itself is built by the crate `libfuzzer-sys`, which takes a C++ compiler. What is found and what was learned stays in
//! `target/fuzz`.

use crate::workspace::{call, cargo, output, root, target};
use anyhow::{Context as _, Result, bail, ensure};
use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    num::NonZero,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
    thread,
};

/// Counters at every edge, a table of where they are, and the operands of comparisons.
const INSTRUMENTATION: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    // Counters of parts that are compiled apart would count twice.
    "-Ccodegen-units=1",
];

/// What libFuzzer says once it has found the counters; without them it only guesses.
const GUIDED: &str = "inline 8-bit counters";

/// How long each target runs.
const SECONDS: u32 = 60;

/// Run the fuzz targets, each from its corpus
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Which; all if none is named
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// How long each runs
    #[arg(long, value_name = "N", default_value_t = SECONDS, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
    /// How many run at a time; as many as there are processors if not given
    #[arg(long, value_name = "N")]
    jobs: Option<NonZero<usize>>,
}

impl Default for Options {
    /// All targets for the usual time.
    fn default() -> Self {
        Self {
            targets: Vec::new(),
            seconds: SECONDS,
            jobs: None,
        }
    }
}

/// Builds the targets, and runs them.
///
/// # Errors
///
/// There is no such target, it cannot be built, or one has found something, which the message says how to see again.
pub(crate) fn run(options: &Options) -> Result<()> {
    let known = targets()?;
    if let Some(unknown) = options.targets.iter().find(|name| !known.contains(name)) {
        bail!("there is no fuzz target {unknown:?}, there is: {}", known.join(", "));
    }
    let wanted = if options.targets.is_empty() {
        &known
    } else {
        &options.targets
    };
    let binaries = build(wanted)?;
    let jobs = match options.jobs {
        Some(jobs) => jobs,
        None => thread::available_parallelism().context("how many processors are there?")?,
    };
    let waiting = Mutex::new(wanted.iter());
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || -> Result<Vec<String>> {
        let mut findings = Vec::new();
        while let Some(name) = next() {
            findings.extend(fuzz(name, &binaries.join(name), options.seconds)?);
        }
        Ok(findings)
    };
    let findings: Vec<String> = thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.get().min(wanted.len())).map(|_| scope.spawn(work)).collect();
        let results = workers.into_iter().map(|worker| match worker.join() {
            Ok(result) => result,
            Err(_) => bail!("a thread that runs fuzz targets has panicked"),
        });
        results.collect::<Result<Vec<_>>>()
    })?
    .concat();
    ensure!(
        findings.is_empty(),
        "fuzzing found something\n\n{}",
        findings.join("\n\n")
    );
    Ok(())
}

fn package() -> PathBuf {
    root().join("tests/fuzz")
}

/// The names of the targets in order.
fn targets() -> Result<Vec<String>> {
    let directory = package().join("fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("failed to list {}", directory.display()))? {
        let path = entry?.path();
        names.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
    }
    names.sort();
    Ok(names)
}

/// Builds targets, and returns the directory that they are in.
fn build(names: &[String]) -> Result<PathBuf> {
    let compiler = env::var_os("CXX").unwrap_or_else(|| "c++".into());
    output(Command::new(compiler).arg("--version"))
        .context("libFuzzer takes a C++ compiler: `apt-get install -y --no-install-recommends g++`")?;
    let version = output(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.context("`rustc -vV` names no host")?;
    let directory = target().join("fuzz");
    let mut build = cargo();
    build
        .args(["build", "--release", "--manifest-path"])
        .arg(package().join("Cargo.toml"))
        // Naming the target keeps the instrumentation from build scripts.
        .args(["--target", host, "--target-dir"])
        .arg(&directory)
        .args(names.iter().flat_map(|name| ["--bin", name]))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", INSTRUMENTATION.join(" "));
    call(&mut build)?;
    Ok(directory.join(host).join("release"))
}

/// Runs a target; what it has found, if anything, and how to see it again.
fn fuzz(name: &str, binary: &Path, seconds: u32) -> Result<Option<String>> {
    let directory = target().join("fuzz");
    let (learned, found) = (directory.join("corpus").join(name), directory.join("found").join(name));
    let corpus = package().join("corpus").join(name);
    ensure!(
        corpus.is_dir(),
        "{} has to be there, with an input to begin with",
        corpus.display()
    );
    let log = directory.join(format!("{name}.log"));
    for path in [&learned, &found] {
        fs::create_dir_all(path).with_context(|| format!("failed to create {}", path.display()))?;
    }
    let file = File::create(&log).with_context(|| format!("failed to create {}", log.display()))?;
    let mut prefix = OsString::from("-artifact_prefix=");
    prefix.push(found.join(""));
    let mut dictionary = OsString::from("-dict=");
    let words = package().join("dictionaries").join(format!("{name}.dict"));
    dictionary.push(&words);
    let status = Command::new(binary)
        .args(words.is_file().then_some(dictionary))
        .arg(format!("-max_total_time={seconds}"))
        .args(["-timeout=10", "-rss_limit_mb=1024", "-print_final_stats=1"])
        .arg(prefix)
        // What is new goes into the first one.
        .arg(&learned)
        .arg(&corpus)
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("failed to start {}", binary.display()))?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    ensure!(
        text.contains(GUIDED),
        "the fuzz target {name} is not guided by coverage: see {}",
        log.display()
    );
    println!("{name}: {}", summary(&text));
    if status.success() {
        return Ok(None);
    }
    let is_cause = |line: &&str| line.contains("panicked at ") || line.contains("ERROR: libFuzzer");
    let cause: Vec<_> = text.lines().skip_while(|line| !is_cause(line)).take(2).collect();
    let cause: String = cause.join(" ").chars().take(400).collect();
    let again = match text.lines().find_map(|line| line.split_once("Test unit written to ")) {
        Some((_, input)) => format!("to see it again: {} {input}", binary.display()),
        None => format!("the input is not known ({status})"),
    };
    Ok(Some(format!(
        "{name}: {cause}\n    {again}\n    all that was said: {}",
        log.display()
    )))
}

/// How many inputs were tried, and what they reached.
fn summary(log: &str) -> String {
    let number = |name: &str| {
        let line = log.lines().rev().find_map(|line| line.split_once(name));
        line.and_then(|(_, rest)| rest.split_whitespace().next()).unwrap_or("?")
    };
    format!(
        "{} inputs, {} edges reached, {} inputs worth keeping",
        number("stat::number_of_executed_units:"),
        number(" cov: "),
        number(" corp: ").split('/').next().unwrap_or("?")
    )
}
