//! Diagnostics of the programs, through aya-log.

use std::io;

use aya::Ebpf;
use aya_log::EbpfLogger;

use crate::process::readable;

/// What the programs log. Off unless the loader asked for it, and then only the loader can read it.
pub struct ProgramLog(EbpfLogger<&'static dyn log::Log>);

impl std::fmt::Debug for ProgramLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProgramLog").finish_non_exhaustive()
    }
}

impl ProgramLog {
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, aya_log::Error> {
        EbpfLogger::init(ebpf).map(Self)
    }

    /// Passes on the lines that are there now.
    pub fn flush(&mut self) {
        self.0.flush();
    }

    /// Passes every line to this process's logger (the `log` crate), for ever. Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// When the ring buffer cannot be watched.
    pub async fn forward(&mut self) -> io::Result<()> {
        let ready = readable(std::os::fd::AsFd::as_fd(&self.0).try_clone_to_owned()?)?;
        loop {
            self.flush();
            ready.readable().await?.clear_ready();
        }
    }
}
