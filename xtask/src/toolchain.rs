//! Finds a Rust that can build for `bpfel-unknown-none`, or says what to install.
//!
//! The target has no prebuilt `core`: it takes a compiler with the library sources that belong to it, and a bpf-linker
//! made with the same LLVM. Nothing is installed or downloaded here.

use crate::workspace::{cargo_home, output};
use anyhow::{Result, bail};
use std::{
    env,
    ffi::OsString,
    fmt,
    path::{Path, PathBuf},
    process::Command,
};

/// The bpf-linker that is known to work.
const LINKER_VERSION: &str = "0.13.0";

/// Settings that the cargo which runs us was given, or has set for us: with them, another Rust would build, or otherwise.
const CLEARED: [&str; 14] = [
    "CARGO",
    "CARGO_BUILD_RUSTC",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_INCREMENTAL",
    "CARGO_TARGET_DIR",
    "LD_LIBRARY_PATH",
    "RUSTC",
    "RUSTC_BOOTSTRAP",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// Where a Rust comes from.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Debian's packages: `/usr/bin/rustc` with rust-web-src or rust-src.
    Debian,
    /// rustup's nightly with the component rust-src.
    Rustup,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Debian => "Debian's Rust",
            Self::Rustup => "rustup's nightly",
        })
    }
}

/// A Rust that is complete.
pub(crate) struct Toolchain {
    /// Where it comes from.
    pub(crate) kind: Kind,
    /// What `rustc --version` prints.
    pub(crate) version: String,
    /// The library sources.
    pub(crate) library: PathBuf,
    /// `PATH` with bpf-linker in it.
    path: OsString,
}

impl Toolchain {
    /// Its cargo, in a clean environment.
    pub(crate) fn cargo(&self) -> Command {
        let mut cargo = command(self.kind, "cargo");
        cargo.env("PATH", &self.path);
        cargo
    }
}

/// The first Rust that is complete, or the wanted one.
///
/// # Errors
///
/// None is; the message lists for each what is missing, and the commands that install it.
pub(crate) fn find(wanted: Option<Kind>) -> Result<Toolchain> {
    let kinds = wanted.map_or_else(|| vec![Kind::Debian, Kind::Rustup], |kind| vec![kind]);
    let mut missing = Vec::new();
    for kind in kinds {
        match complete(kind) {
            Ok(toolchain) => return Ok(toolchain),
            Err(what) => missing.push(format!("with {kind}:\n    {}", what.join("\n    "))),
        }
    }
    bail!(
        "no complete toolchain for the BPF target\n\n{}",
        missing.join("\n\nor ")
    );
}

/// The toolchain, or the lines that tell how to complete it.
fn complete(kind: Kind) -> Result<Toolchain, Vec<String>> {
    let mut missing = Vec::new();
    let library = library(kind);
    if library.is_none() {
        missing.push(match kind {
            Kind::Debian => "apt-get install -y --no-install-recommends rustc-web cargo-web rust-web-src".to_owned(),
            Kind::Rustup => "rustup toolchain install nightly --component rust-src".to_owned(),
        });
    }
    let path = linker();
    if path.is_none() {
        missing.extend(linker_advice(kind));
    }
    match (library, path) {
        (Some(library), Some(path)) => Ok(Toolchain {
            kind,
            version: output(command(kind, "rustc").arg("--version")).map_err(|error| vec![format!("{error:#}")])?,
            library,
            path,
        }),
        _ => Err(missing),
    }
}

/// The library sources of a Rust that has a compiler, cargo and those.
fn library(kind: Kind) -> Option<PathBuf> {
    let sysroot = output(command(kind, "rustc").args(["--print", "sysroot"])).ok()?;
    output(command(kind, "cargo").arg("--version")).ok()?;
    let library = Path::new(sysroot.trim_end()).join("lib/rustlib/src/rust/library");
    library.join("core/src/lib.rs").is_file().then_some(library)
}

/// `PATH`, with cargo's own directory for binaries at its end, if bpf-linker is found there and runs.
fn linker() -> Option<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let installed = cargo_home().ok().map(|home| home.join("bin"));
    let path = env::join_paths(env::split_paths(&path).chain(installed)).ok()?;
    let linker = env::split_paths(&path)
        .map(|directory| directory.join("bpf-linker"))
        .find(|linker| linker.is_file())?;
    output(Command::new(linker).arg("--version")).ok()?;
    Some(path)
}

/// How to install a bpf-linker with the LLVM of this Rust.
fn linker_advice(kind: Kind) -> Vec<String> {
    let Some(llvm) = llvm_major(kind) else {
        return vec!["then run this command again: it will name the bpf-linker that matches the compiler".to_owned()];
    };
    vec![
        format!("apt-get install -y --no-install-recommends llvm-{llvm}-dev"),
        format!(
            "PATH=/usr/lib/llvm-{llvm}/bin:$PATH LLVM_PREFIX=/usr/lib/llvm-{llvm} cargo install bpf-linker \
             --version {LINKER_VERSION} --locked --no-default-features --features llvm-{llvm}"
        ),
    ]
}

/// The LLVM that this Rust's compiler uses.
fn llvm_major(kind: Kind) -> Option<u32> {
    let version = output(command(kind, "rustc").arg("-vV")).ok()?;
    let llvm = version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    llvm.split('.').next()?.parse().ok()
}

/// A program of this Rust, in a clean environment.
fn command(kind: Kind, program: &str) -> Command {
    let mut command = match kind {
        Kind::Debian => Command::new(Path::new("/usr/bin").join(program)),
        Kind::Rustup => {
            let mut rustup = Command::new("rustup");
            rustup.args(["run", "nightly", program]);
            rustup
        }
    };
    for (name, _) in env::vars_os() {
        let profile = name.as_encoded_bytes().starts_with(b"CARGO_PROFILE_");
        if profile || CLEARED.iter().any(|cleared| name == *cleared) {
            command.env_remove(name);
        }
    }
    if kind == Kind::Debian {
        // Lets a stable compiler take the unstable options; RUSTC, because a rustup's may come first in PATH.
        command.env("RUSTC_BOOTSTRAP", "1").env("RUSTC", "/usr/bin/rustc");
    }
    command
}
