//! Offsets of kernel structure members, from the running kernel's BTF.
//!
//! Reads just what the loader needs: the offset of a member, found by name, also inside anonymous structures and unions.
//! Format: `Documentation/bpf/btf.rst` in the kernel tree. Source: `/sys/kernel/btf/vmlinux` (5.4 and later).

use std::{
    collections::{HashMap, HashSet},
    io::Read as _,
    path::Path,
};

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_TYPEDEF: u32 = 8;
/// Where the kernel publishes its types.
const RUNNING: &str = "/sys/kernel/btf/vmlinux";
/// enum64
const LAST_KNOWN_KIND: u32 = 19;

/// Why an offset could not be found.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// The kernel publishes no type information.
    #[error("failed to read {path} (the kernel needs CONFIG_DEBUG_INFO_BTF)")]
    Read {
        /// The file.
        path: String,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// The file is not BTF as this program understands it.
    #[error("the kernel's BTF is malformed at byte {0}")]
    Malformed(usize),
    /// This kernel has no such structure.
    #[error("the kernel's BTF has no structure {0:?}")]
    NoStructure(&'static str),
    /// This kernel's structure has no such member.
    #[error("the kernel's structure {structure:?} has no member {member:?}")]
    NoMember {
        /// The structure.
        structure: &'static str,
        /// The member.
        member: &'static str,
    },
}

/// The kernel's type information.
pub(super) struct KernelTypes {
    data: Vec<u8>,
    strings: usize,
    /// Where each type begins, by type id; id 0 is `void`.
    types: Vec<usize>,
    structures: HashMap<String, u32>,
    typedefs: HashSet<String>,
}

impl KernelTypes {
    /// Reads the type information of the running kernel.
    pub(super) fn running() -> Result<Self, BtfError> {
        Self::from_file(Path::new(RUNNING))
    }

    /// Whether the running kernel publishes type information, without reading its megabytes.
    pub(super) fn are_published() -> Result<(), BtfError> {
        let mut magic = [0; 2];
        std::fs::File::open(RUNNING)
            .and_then(|mut file| file.read_exact(&mut magic))
            .map_err(|source| BtfError::Read {
                path: RUNNING.to_owned(),
                source,
            })?;
        if u16::from_ne_bytes(magic) == MAGIC {
            Ok(())
        } else {
            Err(BtfError::Malformed(0))
        }
    }

    fn from_file(path: &Path) -> Result<Self, BtfError> {
        let data = std::fs::read(path).map_err(|source| BtfError::Read {
            path: path.display().to_string(),
            source,
        })?;
        Self::parse(data)
    }

    /// The type information as the kernel gives it, for other readers.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.data
    }

    pub(super) fn parse(data: Vec<u8>) -> Result<Self, BtfError> {
        let mut this = Self {
            data,
            strings: 0,
            types: vec![0],
            structures: HashMap::new(),
            typedefs: HashSet::new(),
        };
        if this.u32(0)? as u16 != MAGIC {
            return Err(BtfError::Malformed(0));
        }
        let header = this.u32(4)? as usize;
        let begin = header + this.u32(8)? as usize;
        let end = begin + this.u32(12)? as usize;
        this.strings = header + this.u32(16)? as usize;
        let mut at = begin;
        while at < end {
            // What newer kernels have invented since cannot be skipped, since its size is unknown; structures come first.
            if this.kind(at)? > LAST_KNOWN_KIND {
                break;
            }
            let id = u32::try_from(this.types.len()).map_err(|_| BtfError::Malformed(at))?;
            this.types.push(at);
            let kind = this.kind(at)?;
            if kind == KIND_STRUCT {
                let name = this.name(at)?.to_owned();
                if !name.is_empty() {
                    this.structures.entry(name).or_insert(id);
                }
            }
            if kind == KIND_TYPEDEF {
                let name = this.name(at)?.to_owned();
                this.typedefs.insert(name);
            }
            at += 12 + this.trailer(kind, at)?;
        }
        Ok(this)
    }

    /// Size of what follows the common part of a type.
    fn trailer(&self, kind: u32, at: usize) -> Result<usize, BtfError> {
        let count = (self.u32(at + 4)? & 0xffff) as usize;
        Ok(match kind {
            // int, var, decl_tag
            1 | 14 | 17 => 4,
            // array
            3 => 12,
            KIND_STRUCT | KIND_UNION => 12 * count,
            // enum, func_proto
            6 | 13 => 8 * count,
            // datasec, enum64
            15 | 19 => 12 * count,
            // pointer, fwd, typedef, volatile, const, restrict, func, float, type_tag
            2 | 7..=12 | 16 | 18 => 0,
            _ => return Err(BtfError::Malformed(at)),
        })
    }

    fn u32(&self, at: usize) -> Result<u32, BtfError> {
        let bytes = self.data.get(at..at + 4).ok_or(BtfError::Malformed(at))?;
        Ok(u32::from_ne_bytes(
            bytes.try_into().map_err(|_| BtfError::Malformed(at))?,
        ))
    }

    fn kind(&self, at: usize) -> Result<u32, BtfError> {
        Ok((self.u32(at + 4)? >> 24) & 0x1f)
    }

    /// The name whose string offset stands at `at`.
    fn name(&self, at: usize) -> Result<&str, BtfError> {
        let begin = self.strings + self.u32(at)? as usize;
        let rest = self.data.get(begin..).ok_or(BtfError::Malformed(at))?;
        let end = rest.iter().position(|byte| *byte == 0).ok_or(BtfError::Malformed(at))?;
        std::str::from_utf8(&rest[..end]).map_err(|_| BtfError::Malformed(at))
    }

    fn structure(&self, name: &'static str) -> Result<usize, BtfError> {
        let id = self.structures.get(name).ok_or(BtfError::NoStructure(name))?;
        Ok(self.types[*id as usize])
    }

    /// Whether the kernel has a type definition of this name. Every BPF helper has one: `btf_` and its name.
    pub(super) fn has_typedef(&self, name: &str) -> bool {
        self.typedefs.contains(name)
    }

    /// The size of a structure in bytes.
    pub(super) fn size_of(&self, structure: &'static str) -> Result<u64, BtfError> {
        Ok(u64::from(self.u32(self.structure(structure)? + 8)?))
    }

    /// The offset of a member in bytes.
    pub(super) fn offset_of(&self, structure: &'static str, member: &'static str) -> Result<u64, BtfError> {
        self.find(self.structure(structure)?, member)?
            .map(|(offset, _)| offset)
            .ok_or(BtfError::NoMember { structure, member })
    }

    /// Whether the member is an array without a fixed number of elements.
    pub(super) fn is_flexible(&self, structure: &'static str, member: &'static str) -> Result<bool, BtfError> {
        let (_, kind) = self
            .find(self.structure(structure)?, member)?
            .ok_or(BtfError::NoMember { structure, member })?;
        let at = *self.types.get(kind as usize).ok_or(BtfError::Malformed(0))?;
        // The third word of an array's trailer is its number of elements.
        Ok(self.kind(at)? == 3 && self.u32(at + 12 + 8)? == 0)
    }

    /// Finds a member's offset in bytes and its type, in the structure that begins at `at`, also in anonymous ones that it has.
    fn find(&self, at: usize, wanted: &str) -> Result<Option<(u64, u32)>, BtfError> {
        // No recursion, and each structure once: what is malformed may be nested without an end.
        let mut open = vec![(at, 0)];
        let mut seen = HashSet::from([at]);
        while let Some((at, base)) = open.pop() {
            let info = self.u32(at + 4)?;
            let has_bitfields = info >> 31 == 1;
            for index in 0..(info & 0xffff) as usize {
                let member = at + 12 + 12 * index;
                let mut bits = self.u32(member + 8)?;
                if has_bitfields {
                    bits &= 0x00ff_ffff;
                }
                let offset = base + u64::from(bits / 8);
                let kind = self.u32(member + 4)?;
                let name = self.name(member)?;
                if name == wanted {
                    return Ok(Some((offset, kind)));
                }
                if !name.is_empty() {
                    continue;
                }
                let inner = *self.types.get(kind as usize).ok_or(BtfError::Malformed(member))?;
                if matches!(self.kind(inner)?, KIND_STRUCT | KIND_UNION) && seen.insert(inner) {
                    open.push((inner, offset));
                }
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Types given as words, strings as one zero-separated text.
    fn btf(types: &[u32], strings: &[u8]) -> Vec<u8> {
        let mut data = Vec::new();
        let length = u32::try_from(types.len() * 4).unwrap();
        for word in [
            u32::from(MAGIC) | 1 << 16,
            24,
            0,
            length,
            length,
            u32::try_from(strings.len()).unwrap(),
        ] {
            data.extend(word.to_ne_bytes());
        }
        for word in types {
            data.extend(word.to_ne_bytes());
        }
        data.extend(strings);
        data
    }

    #[test]
    fn members_of_anonymous_structures_are_found() {
        // 1: int; 2: struct { int b at 32 bits }; 3: struct a { int c at 0; struct 2 at 64 bits }
        let types = [
            1,
            1 << 24,
            4,
            32, //
            0,
            4 << 24 | 1,
            8,
            5,
            1,
            32, //
            7,
            4 << 24 | 2,
            16,
            9,
            1,
            0,
            0,
            2,
            64,
        ];
        let types = KernelTypes::parse(btf(&types, b"\0int\0b\0a\0c\0")).unwrap();
        assert_eq!(types.size_of("a").unwrap(), 16);
        assert_eq!(types.offset_of("a", "c").unwrap(), 0);
        assert_eq!(types.offset_of("a", "b").unwrap(), 12);
        assert!(matches!(types.offset_of("a", "d"), Err(BtfError::NoMember { .. })));
        assert!(matches!(types.offset_of("e", "d"), Err(BtfError::NoStructure("e"))));
    }

    #[test]
    fn structures_that_contain_themselves_have_an_end() {
        // 1: struct a { struct 2; struct 2 }; 2: struct { struct 1; struct 2 }
        let types = [
            1,
            4 << 24 | 2,
            8,
            0,
            2,
            0,
            0,
            2,
            32,
            0,
            4 << 24 | 2,
            8,
            0,
            1,
            0,
            0,
            2,
            0,
        ];
        let types = KernelTypes::parse(btf(&types, b"\0a\0")).unwrap();
        assert!(matches!(types.offset_of("a", "b"), Err(BtfError::NoMember { .. })));
    }

    #[test]
    fn structures_may_be_nested_deeper_than_the_stack() {
        const DEPTH: u32 = 100_000;
        let nested = (0..DEPTH).flat_map(|depth| [u32::from(depth == 0), 4 << 24 | 1, 4, 0, depth + 2, 32]);
        let innermost = [0, 4 << 24 | 1, 4, 3, 0, 0];
        let types: Vec<_> = nested.chain(innermost).collect();
        let types = KernelTypes::parse(btf(&types, b"\0a\0b\0")).unwrap();
        assert_eq!(types.offset_of("a", "b").unwrap(), u64::from(4 * DEPTH));
    }

    #[test]
    fn truncated_data_is_an_error_at_every_length() {
        let types = [1, 1 << 24, 4, 32, 5, 4 << 24 | 1, 8, 5, 1, 32];
        let whole = btf(&types, b"\0int\0b\0");
        for length in 0..whole.len() {
            let result = KernelTypes::parse(whole[..length].to_vec());
            if let Ok(types) = result {
                assert!(types.offset_of("b", "b").is_err(), "at {length}");
            }
        }
    }
}
