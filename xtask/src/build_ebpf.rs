//! `cargo xtask build-ebpf`: the BPF object that every other build embeds.

#[path = "../../zinit-ebpf/source_hash.rs"]
mod source_hash;

use crate::{
    strip::strip,
    toolchain::{self, Kind, Toolchain},
    workspace::{call, cargo_home, root, target},
};
use anyhow::{Context as _, Result, bail, ensure};
use std::{
    env, fs,
    path::{Path, PathBuf},
};

const TARGET: &str = "bpfel-unknown-none";

/// Build the BPF programs into zinit-ebpf/object
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Rust to build with; by default the first that is complete
    #[arg(long)]
    toolchain: Option<Kind>,
    /// Write nothing; fail if the committed object was built from other sources, and say whether its bytes are the same
    #[arg(long)]
    check: bool,
}

/// Builds, then compares or writes.
///
/// # Errors
///
/// No toolchain is complete, the build fails or its result is not what the tracker loads; with `--check`, a stale object.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.check {
        check_sources()?;
    }
    let built = build(options.toolchain)?;
    if options.check {
        println!("{}", comparison(&built, fs::read(object_path()).ok().as_deref()));
        return Ok(());
    }
    write(&built)
}

/// The object, built from source, stripped and looked over.
pub(crate) fn build(wanted: Option<Kind>) -> Result<Vec<u8>> {
    let toolchain = toolchain::find(wanted)?;
    println!("building with {}: {}", toolchain.kind, toolchain.version.trim_end());
    let directory = target().join("ebpf");
    let mut cargo = toolchain.cargo();
    cargo
        .args([
            "build",
            "--quiet",
            "--release",
            "--package",
            "zinit-ebpf",
            "--bin",
            "zinit-ebpf",
        ])
        .args(["--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(&directory)
        .env("CARGO_ENCODED_RUSTFLAGS", flags(&toolchain)?)
        .current_dir(root());
    call(&mut cargo)
        .context("if bpf-linker complains of bitcode, it was made with an older LLVM than this compiler")?;
    let elf = directory.join(TARGET).join("release/zinit-ebpf");
    let elf = fs::read(&elf).with_context(|| format!("failed to read {}", elf.display()))?;
    let object = strip(&elf)?;
    look_over(&object)?;
    Ok(object)
}

/// Puts the object and the hash of its sources where builds look for them.
pub(crate) fn write(object: &[u8]) -> Result<()> {
    let hash = source_hash::source_hash(&package()).context("failed to hash the sources")?;
    fs::create_dir_all(package().join("object")).context("failed to create zinit-ebpf/object")?;
    fs::write(object_path(), object).context("failed to write the object")?;
    fs::write(record_path(), format!("{}\n", source_hash::hex(&hash))).context("failed to write the hash")?;
    println!("zinit-ebpf/object/zinit-ebpf.o: {} bytes", object.len());
    Ok(())
}

/// The committed object.
pub(crate) fn object_path() -> PathBuf {
    package().join("object/zinit-ebpf.o")
}

/// The hash of the sources that the committed object was built from.
pub(crate) fn record_path() -> PathBuf {
    package().join("object/sources.sha256")
}

/// Says whether the committed object is what the sources give. A difference is no fault: compilers differ.
pub(crate) fn comparison(built: &[u8], committed: Option<&[u8]>) -> String {
    match committed {
        Some(committed) if committed == built => {
            format!(
                "the fresh build and the committed object are the same {} bytes",
                built.len()
            )
        }
        Some(committed) => format!(
            "the fresh build ({} bytes) differs from the committed object ({} bytes): another compiler or bpf-linker",
            built.len(),
            committed.len()
        ),
        None => "there is no committed object to compare with".to_owned(),
    }
}

fn package() -> PathBuf {
    root().join("zinit-ebpf")
}

/// Fails if the committed object was built from other sources.
fn check_sources() -> Result<()> {
    let hash = source_hash::source_hash(&package()).context("failed to hash the sources")?;
    let recorded = fs::read_to_string(record_path()).context("failed to read zinit-ebpf/object/sources.sha256")?;
    ensure!(
        recorded.trim_end() == source_hash::hex(&hash),
        "the committed object was built from other sources: run `cargo xtask build-ebpf`"
    );
    Ok(())
}

/// The compiler's flags, separated as cargo wants them.
///
/// Paths are remapped because BTF names source files: the object must not depend on where it was built. The workspace
/// becomes `.`, where the linker runs, so that it finds our sources and BTF keeps their lines for the verifier's log.
fn flags(toolchain: &Toolchain) -> Result<String> {
    let architecture = match env::consts::ARCH {
        known @ ("x86_64" | "aarch64") => known,
        other => bail!("the programs are not made for {other}"),
    };
    let mut flags = vec![
        format!("--cfg=bpf_target_arch=\"{architecture}\""),
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
    ];
    let mut remap = |from: &Path, to: &str| flags.push(format!("--remap-path-prefix={}={to}", from.display()));
    for registry in registries()? {
        remap(&registry, "registry");
    }
    remap(&toolchain.library, "library");
    remap(root(), ".");
    Ok(flags.join("\x1f"))
}

/// Where cargo unpacks dependencies: a directory for each registry, named after it. They exist, since we were built.
fn registries() -> Result<Vec<PathBuf>> {
    let sources = cargo_home()?.join("registry/src");
    fs::read_dir(&sources)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
        .with_context(|| format!("failed to list {}", sources.display()))
}

/// Reads the object as the loader will, and misses what is not there.
fn look_over(object: &[u8]) -> Result<()> {
    let parsed = aya_obj::Object::parse(object).context("the stripped object does not parse")?;
    ensure!(parsed.btf.is_some(), "the object has no BTF");
    ensure!(!parsed.programs.is_empty(), "the object has no programs");
    for map in zinit_ebpf::map::ALL.into_iter().chain([zinit_ebpf::map::EARLIER]) {
        ensure!(parsed.maps.contains_key(map), "the object has no map {map}");
    }
    for (name, program) in &parsed.programs {
        let function = parsed.functions.get(&program.function_key());
        let function = function.with_context(|| format!("program {name} has no code"))?;
        let calls = function
            .instructions
            .iter()
            .filter(|instruction| is_call_of_ours(instruction));
        let calls = calls.count();
        ensure!(
            calls == 0,
            "program {name} calls {calls} functions of ours or the compiler's (memset, say): before Linux 6.5 and its stable \
             relatives, 5.10 for ever, the load of a null pointer in a program with functions is an oops"
        );
    }
    Ok(())
}

/// Whether it calls code in the object rather than a helper of the kernel.
///
/// None may. A kernel without "bpf: ensure main program has an extable" (0108a4e9f358) keeps the table of loads that may fault
/// with only one of the two entries that it has for such a program, and looks it up in the other. Our loads do meet null pointers: a
/// process that has been reaped has no `thread_pid`.
fn is_call_of_ours(instruction: &aya_obj::generated::bpf_insn) -> bool {
    use aya_obj::generated::{BPF_CALL, BPF_JMP, BPF_PSEUDO_CALL};
    u32::from(instruction.code) == BPF_JMP | BPF_CALL && u32::from(instruction.src_reg()) == BPF_PSEUDO_CALL
}
