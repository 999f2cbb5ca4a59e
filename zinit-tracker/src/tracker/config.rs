//! How a tracker is opened.

use std::path::PathBuf;

/// Where the machine's tracker is pinned.
pub const DEFAULT_PINS: &str = "/sys/fs/bpf/zinit";

/// Where maps, programs and links live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pins {
    /// In this directory on a bpf file system: tracking outlives the process and everyone can see it.
    Shared(PathBuf),
    /// With this process only.
    Private,
    /// In this directory if it can be, else with this process only, and a warning says so.
    SharedOrPrivate(PathBuf),
}

/// How well descendants must be known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Level {
    /// Exactly if that is possible here; else as well as `/proc` shows them, and a warning says why.
    #[default]
    Auto,
    /// Exactly, or not at all.
    Ebpf,
    /// As well as `/proc` shows them.
    Procfs,
}

/// How a tracker is opened.
#[derive(Clone, Debug)]
pub struct Config {
    /// How well descendants must be known.
    pub level: Level,
    /// This process creates children through this tracker only. Then level `procfs` can tell orphans that were given to it from
    /// children of its own, and loses nobody of a single service that way.
    pub sole_parent: bool,
    /// Where maps, programs and links live.
    pub pins: Pins,
    /// Who manages the services that this tracker registers; service names are unique within an instance.
    pub instance: String,
    /// Capacity in processes; `None`: the smaller of `pid_max`, `threads-max` and 131,072. Only the loader decides.
    pub max_processes: Option<u32>,
    /// Diagnostics of the programs through aya-log; `None`: off, at no cost. Only the loader decides.
    pub program_log: Option<aya_log::Level>,
    /// Programs that are pinned and are of another build are replaced by this build's, on the same maps and without a gap: what a
    /// supervisor wants that was upgraded. Else they are used as they are. If the kernel refuses this build's, a warning says so.
    pub replace_programs: bool,
    /// A hook that is left out, by its program's name, so that tests see what it is for. Only the loader decides.
    #[doc(hidden)]
    pub without_hook: Option<&'static str>,
    /// Called while the books of an earlier layout are taken over: the hooks are attached, and no member is in yet.
    #[doc(hidden)]
    pub meanwhile: Option<fn()>,
    /// What this build passes for being built from, so that tests see one replace another.
    #[doc(hidden)]
    pub sources: [u8; 32],
}

impl Default for Config {
    fn default() -> Self {
        Self {
            level: Level::Auto,
            sole_parent: false,
            pins: Pins::SharedOrPrivate(DEFAULT_PINS.into()),
            instance: "tool".to_owned(),
            max_processes: None,
            program_log: None,
            replace_programs: false,
            without_hook: None,
            meanwhile: None,
            sources: zinit_ebpf::SOURCES,
        }
    }
}
