//! One reading of the books.

use std::{collections::BTreeMap, fs};

use zinit_ebpf::Stats;

use crate::{
    kernel::ProgramRuns,
    stop::{Doubt, Evidence},
    tracker::{Config, Departure, Escape, ServiceInfo, ServiceStops, Tracker, TrackerError, Tracking},
};

/// What the books say at some moment, each number read at its own.
#[derive(Clone, Debug)]
pub struct Reading {
    /// `None`: nothing is loaded.
    pub(super) books: Option<Books>,
}

#[derive(Clone, Debug)]
pub(super) struct Books {
    pub(super) tracking: Tracking,
    pub(super) capacity: u32,
    pub(super) stats: Stats,
    pub(super) missed_creations: u64,
    pub(super) programs: Vec<ProgramRuns>,
    /// Whether the kernel measures programs; `None`: it does not say.
    pub(super) programs_are_measured: Option<bool>,
    pub(super) services: Vec<Service>,
    /// Of services that were stopped, registered or not.
    pub(super) stops: Vec<ServiceStops>,
}

#[derive(Clone, Debug)]
pub(super) struct Service {
    pub(super) info: ServiceInfo,
    pub(super) main_lives: bool,
    pub(super) doubts: Vec<Doubt>,
    /// Members that have left something.
    pub(super) escaped: u64,
    /// How many have left what, by [`Departure::name`].
    pub(super) departed: BTreeMap<&'static str, u64>,
}

impl Reading {
    /// Reads the books that are pinned, as [`Tracker::open_existing`] does. Loads nothing and leaves nothing behind; removes the pins if
    /// no service is registered and nobody uses them.
    ///
    /// # Errors
    ///
    /// As for [`Tracker::open_existing`], or when the books cannot be read.
    pub fn take(config: &Config) -> Result<Self, TrackerError> {
        let Some(tracker) = Tracker::open_to_read(config)? else {
            return Ok(Self { books: None });
        };
        let books = Books::read(&tracker);
        if let Err(error) = tracker.close() {
            tracing::warn!(error = &error as &dyn std::error::Error, "failed to remove the pins");
        }
        Ok(Self { books: Some(books?) })
    }

    /// Whether programs and maps are loaded.
    #[must_use]
    pub fn is_loaded(&self) -> bool {
        self.books.is_some()
    }
}

impl Books {
    fn read(tracker: &Tracker) -> Result<Self, TrackerError> {
        let evidence = Evidence::gather(tracker)?;
        let mut services = Vec::new();
        for (info, escapes) in tracker.all_escapes()? {
            services.push(Service {
                main_lives: match info.main {
                    Some(main) => tracker.is_recorded_alive(main)?,
                    None => false,
                },
                doubts: evidence.against(tracker, &info),
                escaped: escapes.len() as u64,
                departed: count(&escapes),
                info,
            });
        }
        Ok(Self {
            tracking: tracker.tracking(),
            capacity: tracker.capacity(),
            stats: tracker.stats()?,
            missed_creations: tracker.missed_creations()?,
            programs: tracker.program_runs()?,
            programs_are_measured: fs::read_to_string("/proc/sys/kernel/bpf_stats_enabled")
                .ok()
                .map(|text| text.trim() != "0"),
            services,
            stops: tracker.stops()?,
        })
    }
}

/// Each member counts once for each kind of thing that it has left; of namespaces it may have left several.
fn count(escapes: &[Escape]) -> BTreeMap<&'static str, u64> {
    let mut departed: BTreeMap<_, _> = Departure::NAMES.into_iter().map(|name| (name, 0)).collect();
    for escape in escapes {
        for name in Departure::NAMES {
            let has_left = escape.left.iter().any(|departure| departure.name() == name);
            *departed.entry(name).or_default() += u64::from(has_left);
        }
    }
    departed
}
