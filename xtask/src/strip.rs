//! Takes DWARF out of a BPF object.
//!
//! DWARF is two thirds of the object and only the linker needs it, to make BTF from. BTF stays: the kernel wants it, and
//! `bpftool` prints field names by it.

use anyhow::{Context as _, Result};
use object::{
    build::elf::{Builder, SectionData},
    elf::SHT_STRTAB,
};

/// The object without its `.debug_*` sections, the relocations of those and the symbols that lead nowhere but there.
///
/// # Errors
///
/// `elf` is not an ELF file, or one that cannot be written again.
pub(crate) fn strip(elf: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(elf).context("failed to read the built object")?;
    let debug: Vec<_> = builder
        .sections
        .iter()
        .filter(|section| section.name.starts_with(b".debug_"))
        .map(|section| section.id())
        .collect();
    for section in &mut builder.sections {
        let describes_debug = matches!(
            section.data,
            SectionData::Relocation(_) | SectionData::DynamicRelocation(_)
        ) && section
            .sh_info_section
            .is_some_and(|described| debug.contains(&described));
        section.delete = debug.contains(&section.id()) || describes_debug;
    }
    builder.delete_orphans();
    // LLVM keeps all names in one table, which the builder takes for that of the symbols.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = SectionData::SectionString;
    builder.set_section_sizes();
    let mut stripped = Vec::new();
    builder
        .write(&mut stripped)
        .context("failed to write the stripped object")?;
    Ok(stripped)
}
