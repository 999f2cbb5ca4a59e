//! The built BPF object, embedded.
//!
//! Owns the bytes and the proof of where they come from; loading them is the tracker's business. `build.rs` has compared
//! [`SOURCES`] with what the object was built from, so a program that has been compiled carries a fresh object.

/// The BPF object for a little-endian kernel, with BTF and without DWARF; aligned to 8 bytes, as its parsers want it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/object/zinit-ebpf.o"));

/// SHA-256 of the sources that [`OBJECT`] was built from: equal for two builds with the same programs and records.
pub const SOURCES: [u8; 32] = *include_bytes!(concat!(env!("OUT_DIR"), "/sources"));
