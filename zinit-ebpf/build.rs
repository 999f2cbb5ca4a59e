//! Refuses to embed a BPF object that was not built from the sources beside it.
//!
//! The object is committed so that users need no BPF toolchain; whoever changes the sources must build it again, and an
//! object that was forgotten would run old programs against new records.

mod source_hash;

use source_hash::{hex, source_hash};
use std::{
    env, fs,
    path::{Path, PathBuf},
};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=source_hash.rs");
    // The programs themselves, and records without their user-space half, embed nothing.
    if env::var_os("CARGO_FEATURE_USER").is_none() || variable("CARGO_CFG_TARGET_ARCH") == "bpf" {
        return;
    }
    for input in ["Cargo.toml", "src", "object"] {
        println!("cargo::rerun-if-changed={input}");
    }
    let package = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    match fresh(&package) {
        Ok(hash) => {
            let sources = Path::new(&variable("OUT_DIR")).join("sources");
            if let Err(error) = fs::write(&sources, hash) {
                println!("cargo::error={}: {error}", sources.display());
            }
        }
        Err(reason) => println!("cargo::error={reason}; run `cargo xtask build-ebpf`"),
    }
}

/// The hash of the sources, if the committed object was built from them.
fn fresh(package: &Path) -> Result<[u8; 32], String> {
    let hash = source_hash(package).map_err(|error| format!("cannot hash the sources of the BPF object: {error}"))?;
    let object = package.join("object/zinit-ebpf.o");
    if !object.is_file() {
        return Err(format!("the BPF object {} is missing", object.display()));
    }
    let record = package.join("object/sources.sha256");
    let built = fs::read_to_string(&record).map_err(|error| format!("{}: {error}", record.display()))?;
    if built.trim_end() == hex(&hash) {
        Ok(hash)
    } else {
        Err(format!(
            "the BPF object {} is stale: zinit-ebpf/src or zinit-ebpf/Cargo.toml has changed since it was built",
            object.display()
        ))
    }
}

/// A variable that cargo sets for every build script.
fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("cargo sets {name}: {error}"))
}
