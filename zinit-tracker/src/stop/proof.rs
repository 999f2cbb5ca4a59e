//! The one place that decides whether an empty set is proof.

use std::fmt;

use serde::Serialize;

use crate::tracker::ServiceInfo;

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
    /// Hooks are not attached any more: somebody has removed their links.
    DetachedHooks {
        /// Which.
        hooks: Vec<&'static str>,
    },
    /// Its registrant is in another pid namespace, so the caller may not see all of its processes.
    OutOfSight,
    /// So many members died that exit records were evicted before their end could be observed.
    UnobservedDeaths {
        /// How many at least.
        count: u64,
    },
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LostOperations { count } => write!(f, "{count} operations of the kernel's books failed"),
            Self::MissedCreations { count } => write!(f, "the kernel skipped {count} process creations"),
            Self::Adopted => f.write_str("it was adopted, and what had left its tree before is unknown"),
            Self::DetachedHooks { hooks } => write!(f, "hooks are not attached: {}", hooks.join(", ")),
            Self::OutOfSight => f.write_str("its processes may be out of sight of this pid namespace"),
            Self::UnobservedDeaths { count } => {
                write!(f, "{count} members died without their end being observed")
            }
        }
    }
}

/// Everything that speaks against the books of one service.
pub(super) fn doubts(
    service: &ServiceInfo,
    missed_creations: u64,
    detached: &[&'static str],
    out_of_sight: bool,
) -> Vec<Doubt> {
    let mut doubts = Vec::new();
    if service.lost > 0 {
        doubts.push(Doubt::LostOperations { count: service.lost });
    }
    if missed_creations > service.missed_before {
        doubts.push(Doubt::MissedCreations {
            count: missed_creations - service.missed_before,
        });
    }
    if service.adopted {
        doubts.push(Doubt::Adopted);
    }
    if !detached.is_empty() {
        doubts.push(Doubt::DetachedHooks {
            hooks: detached.to_vec(),
        });
    }
    if out_of_sight {
        doubts.push(Doubt::OutOfSight);
    }
    doubts
}
