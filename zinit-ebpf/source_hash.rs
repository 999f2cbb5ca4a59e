//! The hash that ties the committed BPF object to the sources it was built from.
//!
//! A module of both `build.rs`, which refuses a stale object, and `cargo xtask build-ebpf`, which makes a fresh one: with
//! one definition the two cannot disagree.

use sha2::{Digest as _, Sha256};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// SHA-256 of the manifest and of every file under `src` of the package at `package`.
///
/// Files are taken in the order of their paths. Of each are hashed: length of the path relative to the package, the path,
/// length of the contents, the contents; lengths are 64-bit little endian. So neither a rename nor a move of bytes from
/// one file to the next goes unseen.
///
/// # Errors
///
/// A file or directory that cannot be read; the message names it.
pub(crate) fn source_hash(package: &Path) -> io::Result<[u8; 32]> {
    let mut files = vec![package.join("Cargo.toml")];
    collect(&package.join("src"), &mut files)?;
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let relative = file.strip_prefix(package).unwrap_or(&file).as_os_str();
        let contents = fs::read(&file).map_err(|error| naming(&file, &error))?;
        for bytes in [relative.as_encoded_bytes(), &contents] {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
    }
    Ok(hash.finalize().into())
}

/// Lower-case hexadecimal digits, as `sources.sha256` holds them.
pub(crate) fn hex(hash: &[u8; 32]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory).map_err(|error| naming(directory, &error))? {
        let entry = entry.map_err(|error| naming(directory, &error))?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

fn naming(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
