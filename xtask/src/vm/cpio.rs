//! Archives that the kernel unpacks as its first file system: cpio, format `newc` (initramfs-buffer-format.rst).

use anyhow::{Context as _, Result};
use std::{fs, io::Write, path::Path};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const SYMLINK: u32 = 0o120_777;
const DEVICE: u32 = 0o020_600;

/// An archive that is being written.
pub(crate) struct Archive<W> {
    to: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    /// Starts an archive.
    pub(crate) fn new(to: W) -> Self {
        Self { to, entries: 0 }
    }

    /// Adds a directory.
    ///
    /// # Errors
    ///
    /// As for all of these: writing fails.
    pub(crate) fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(name, DIRECTORY, &[], (0, 0))
    }

    /// Adds a program, with the contents of a file.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or writing fails.
    pub(crate) fn program(&mut self, name: &str, file: &Path) -> Result<()> {
        let contents = fs::read(file).with_context(|| format!("failed to read {}", file.display()))?;
        self.script(name, &contents)
    }

    /// Adds a program of these bytes.
    ///
    /// # Errors
    ///
    /// Writing fails.
    pub(crate) fn script(&mut self, name: &str, contents: &[u8]) -> Result<()> {
        self.entry(name, PROGRAM, contents, (0, 0))
    }

    /// Adds a file that cannot be executed.
    ///
    /// # Errors
    ///
    /// Writing fails.
    pub(crate) fn file(&mut self, name: &str, contents: &[u8]) -> Result<()> {
        self.entry(name, FILE, contents, (0, 0))
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    ///
    /// Writing fails.
    pub(crate) fn symlink(&mut self, name: &str, to: &str) -> Result<()> {
        self.entry(name, SYMLINK, to.as_bytes(), (0, 0))
    }

    /// Adds a character device.
    ///
    /// # Errors
    ///
    /// Writing fails.
    pub(crate) fn device(&mut self, name: &str, major: u32, minor: u32) -> Result<()> {
        self.entry(name, DEVICE, &[], (major, minor))
    }

    /// Ends the archive.
    ///
    /// # Errors
    ///
    /// Writing fails.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.entry("TRAILER!!!", 0, &[], (0, 0))?;
        self.to.flush().context("failed to write the archive")
    }

    fn entry(&mut self, name: &str, mode: u32, contents: &[u8], device: (u32, u32)) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(contents.len()).context("a file is too large for the archive")?;
        let name_size = u32::try_from(name.len() + 1).context("a name is too long for the archive")?;
        // Inode, mode, user, group, links, time, size, device, device that the file is, size of the name, check sum.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        let mut header = b"070701".to_vec();
        for field in fields {
            header.extend(format!("{field:08x}").bytes());
        }
        header.extend(name.bytes());
        header.push(0);
        header.resize(header.len().next_multiple_of(4), 0);
        let padding = contents.len().next_multiple_of(4) - contents.len();
        self.to
            .write_all(&header)
            .and_then(|()| self.to.write_all(contents))
            .and_then(|()| self.to.write_all(&[0; 3][..padding]))
            .context("failed to write the archive")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_contents_are_padded() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.script("a", b"hello").unwrap();
        archive.finish().unwrap();
        // A header has 110 bytes.
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[110..112], b"a\0");
        assert_eq!(&bytes[112..120], b"hello\0\0\0");
        assert_eq!(bytes.len(), 120 + 124);
    }
}
