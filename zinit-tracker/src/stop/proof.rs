//! The one place that decides whether an empty set is proof.

use std::fmt;

use serde::Serialize;

use crate::{
    fallback::{Blindness, Confinement, Sight},
    tracker::{ServiceInfo, Tracker, TrackerError},
};

/// A reason why the books may not tell everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Doubt {
    /// The kernel could not record members, because the map was full or the operation failed.
    LostOperations {
        /// How many operations failed.
        count: u64,
    },
    /// The kernel skipped the hooks that see creations.
    MissedCreations {
        /// How often, machine-wide since the service was registered.
        count: u64,
    },
    /// Members ran before tracking began: what they created and left before is unknown.
    Adopted,
    /// Hooks had been detached, or replaced by others, and were attached again: what happened in between is unknown.
    Unwatched,
    /// Hooks are not attached, and could not be attached again.
    DetachedHooks {
        /// Which.
        hooks: Vec<&'static str>,
    },
    /// Pinned maps are gone, or are not those that the hooks use: another client sees other books.
    ReplacedPins {
        /// Which.
        pins: Vec<&'static str>,
    },
    /// Its registrant is in another pid namespace, so the caller may not see all of its processes.
    OutOfSight,
    /// So many members died that exit records were evicted before their end could be observed.
    UnobservedDeaths {
        /// How many at least.
        count: u64,
    },
    /// The programs keep counters and entries in step, and they are not: another program has written to the maps.
    ContradictoryBooks {
        /// Entries that no counter or no service goes with, or that are missing.
        count: u64,
    },
    /// Members were found by looking at `/proc`, which cannot see everything.
    ProcfsTracking {
        /// What may have got away unseen.
        blind_to: Vec<Blindness>,
    },
}

impl Doubt {
    /// What the kernel's books can be doubted for at any time, by [`Doubt::reason`].
    pub const OF_BOOKS: [&str; 7] = [
        "lost-operations",
        "missed-creations",
        "adopted",
        "unwatched",
        "detached-hooks",
        "replaced-pins",
        "out-of-sight",
    ];

    /// Its name in reports.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::LostOperations { .. } => "lost-operations",
            Self::MissedCreations { .. } => "missed-creations",
            Self::Adopted => "adopted",
            Self::Unwatched => "unwatched",
            Self::DetachedHooks { .. } => "detached-hooks",
            Self::ReplacedPins { .. } => "replaced-pins",
            Self::OutOfSight => "out-of-sight",
            Self::UnobservedDeaths { .. } => "unobserved-deaths",
            Self::ContradictoryBooks { .. } => "contradictory-books",
            Self::ProcfsTracking { .. } => "procfs-tracking",
        }
    }
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LostOperations { count } => write!(f, "{count} operations of the kernel's books failed"),
            Self::MissedCreations { count } => write!(f, "the kernel skipped {count} process creations"),
            Self::Adopted => f.write_str("it was adopted, and what had left its tree before is unknown"),
            Self::Unwatched => f.write_str("hooks had been detached for a while"),
            Self::ReplacedPins { pins } => write!(f, "pinned maps are gone or replaced: {}", pins.join(", ")),
            Self::DetachedHooks { hooks } => write!(f, "hooks are not attached: {}", hooks.join(", ")),
            Self::OutOfSight => f.write_str("its processes may be out of sight of this pid namespace"),
            Self::UnobservedDeaths { count } => {
                write!(f, "{count} members died without their end being observed")
            }
            Self::ContradictoryBooks { count } => write!(
                f,
                "counters and entries of the kernel's books contradict each other by {count}: another program has written to the maps"
            ),
            Self::ProcfsTracking { blind_to } => {
                let blind_to: Vec<_> = blind_to.iter().map(ToString::to_string).collect();
                write!(f, "level procfs cannot see {}", blind_to.join(", "))
            }
        }
    }
}

/// What speaks against books that were kept by looking: everything that cannot be seen, unless the kernel says of a cgroup
/// that nobody is in it, and nobody was ever seen outside. Then only who was orphaned in another pid namespace can have got away:
/// all others that left the cgroup would be children of this process.
pub(super) fn doubt_of_level(sight: Sight) -> Option<Doubt> {
    let mut blind_to = sight.blind_to;
    if sight.confinement == Confinement::Empty {
        blind_to.retain(|blindness| *blindness == Blindness::OtherPidNamespaces);
        if blind_to.is_empty() {
            return None;
        }
    }
    Some(Doubt::ProcfsTracking { blind_to })
}

/// What is known of the books as a whole when a service is judged.
#[derive(Debug, Default)]
pub struct Evidence {
    /// Creations that the kernel has skipped since the hooks were loaded.
    pub(super) missed_creations: u64,
    /// Hooks that are not attached.
    pub(super) loose_hooks: Vec<&'static str>,
    /// Maps whose pins are gone or are other maps'.
    pub(super) replaced_pins: Vec<&'static str>,
}

impl Evidence {
    /// As it is now.
    ///
    /// # Errors
    ///
    /// When the counters cannot be read.
    pub fn gather(tracker: &Tracker) -> Result<Self, TrackerError> {
        Ok(Self {
            missed_creations: tracker.missed_creations()?,
            loose_hooks: tracker.loose_hooks(),
            replaced_pins: tracker.replaced_pins(),
        })
    }

    /// Everything that speaks against the kernel's books of one service now, those nested in it left out. What only a stop finds out is
    /// not among it: [`Doubt::UnobservedDeaths`] and [`Doubt::ContradictoryBooks`].
    #[must_use]
    pub fn against(&self, tracker: &Tracker, service: &ServiceInfo) -> Vec<Doubt> {
        doubts(service, self, tracker.is_out_of_sight(service))
    }
}

/// Everything that speaks against the books of one service; `out_of_sight`: the caller may not see all of its processes.
fn doubts(service: &ServiceInfo, evidence: &Evidence, out_of_sight: bool) -> Vec<Doubt> {
    let mut doubts = Vec::new();
    if service.lost > 0 {
        doubts.push(Doubt::LostOperations { count: service.lost });
    }
    if evidence.missed_creations > service.missed_before {
        doubts.push(Doubt::MissedCreations {
            count: evidence.missed_creations - service.missed_before,
        });
    }
    if service.adopted {
        doubts.push(Doubt::Adopted);
    }
    if service.unwatched {
        doubts.push(Doubt::Unwatched);
    }
    if !evidence.loose_hooks.is_empty() {
        doubts.push(Doubt::DetachedHooks {
            hooks: evidence.loose_hooks.clone(),
        });
    }
    if !evidence.replaced_pins.is_empty() {
        doubts.push(Doubt::ReplacedPins {
            pins: evidence.replaced_pins.clone(),
        });
    }
    if out_of_sight {
        doubts.push(Doubt::OutOfSight);
    }
    doubts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubt_is_called_in_metrics_what_it_is_called_in_reports() {
        let of_books = [
            Doubt::LostOperations { count: 1 },
            Doubt::MissedCreations { count: 1 },
            Doubt::Adopted,
            Doubt::Unwatched,
            Doubt::DetachedHooks { hooks: Vec::new() },
            Doubt::ReplacedPins { pins: Vec::new() },
            Doubt::OutOfSight,
        ];
        assert_eq!(of_books.each_ref().map(Doubt::reason), Doubt::OF_BOOKS);
        let others = [
            Doubt::UnobservedDeaths { count: 1 },
            Doubt::ContradictoryBooks { count: 1 },
            Doubt::ProcfsTracking { blind_to: Vec::new() },
        ];
        for doubt in of_books.iter().chain(&others) {
            assert_eq!(serde_json::to_value(doubt).unwrap()["reason"], doubt.reason());
        }
    }
}
