//! What this level sees of a service, and what it cannot see.

use std::fmt;

use serde::Serialize;

/// Something that level `procfs` cannot see: a process may have got away by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Blindness {
    /// A process that shows no sign any more: without the environment that it was given, outside of the sessions and groups
    /// of the members that are left, and without a parent among them.
    SignsCleared,
    /// A process whose ancestors were born and dead between two looks at `/proc`.
    BetweenLooks,
    /// A process that joined another pid namespace, whose init adopts its children.
    OtherPidNamespaces,
    /// Processes of other users, which `/proc` is mounted to hide (`hidepid`).
    HiddenUsers,
    /// The environment of processes of other users, which only CAP_SYS_PTRACE may read.
    ForeignEnvironments,
    /// Processes that carry the service's cookie, but may have been handed it (at(1), `systemctl import-environment`): none is a
    /// child of a member or where its orphans go.
    CookieElsewhere,
    /// Processes were created on this machine during each of the last looks, so that none of them was complete.
    NeverAtRest,
    /// Members were or may have been outside of the service's cgroup, whose emptiness then proves nothing.
    LeftCgroup,
    /// Children of this process that no sign attributes to a service: each may be an orphan of this one.
    UnknownChildren,
    /// Members were released: orphans look like theirs, and are left alone.
    Released,
}

impl fmt::Display for Blindness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SignsCleared => "orphans without the environment, session and group that they had",
            Self::BetweenLooks => "children of processes that lived between two looks",
            Self::OtherPidNamespaces => "children in pid namespaces that were joined",
            Self::HiddenUsers => "processes of other users, which /proc hides",
            Self::ForeignEnvironments => "the environment of other users' processes",
            Self::CookieElsewhere => "where processes elsewhere have the service's cookie from",
            Self::NeverAtRest => "what was created during the last look",
            Self::LeftCgroup => "what left the service's cgroup",
            Self::UnknownChildren => "whose children other children of this process are",
            Self::Released => "orphans that may be of released processes",
        })
    }
}

/// What the service's cgroup says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Confinement {
    /// It has none.
    None,
    /// Somebody is in it.
    Populated,
    /// Nobody is in it, but a member was or may be outside.
    Left,
    /// Nobody is in it, nobody was ever seen outside, and no child of this process can be an orphan of the service: one that
    /// had left the cgroup unseen would be among them by now.
    Empty,
}

/// What speaks for and against the books of a service at this level.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sight {
    pub confinement: Confinement,
    pub blind_to: Vec<Blindness>,
}
