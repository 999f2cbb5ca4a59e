//! What makes a process a member: signs that only descent leaves, each with a witness that makes it certain.
//!
//! - **Parent**: its parent is a live member. Reparenting goes to ancestors only, so it descends from the service.
//! - **Session**: a session passes by fork alone, so whoever is in one that a member made descends from that member. A
//!   session that a live member is in and that the service was not started in is such a one.
//! - **Group**: a process group that a live member leads or has led. Others can join it on purpose, within its session.
//! - **Cookie**: the variable that the tracker sets for what it spawns, of a process that is no older than the first that was
//!   given it, and a child of those whom orphans are given to: this process, or the init of a pid namespace below. Elsewhere it
//!   may have been handed on: at(1), `systemctl import-environment` and the like forward environments to strangers.
//! - **Cgroup**: it is in the service's own.
//! - **Orphan**: it is a child of this process, which creates children through the tracker only, has one service, and is given
//!   the orphans of nobody else.
//!
//! Children that this process had before it began to track, and their descendants, show no sign but the parent, which only adoption
//! gives them.
//!
//! An adopted service has had a life before: its groups, and sessions that no live member leads, say nothing. When
//! a member was released, the children that it lost look like the service's own, so from then on only the parent counts.

use std::collections::HashMap;

use super::{
    books::Surroundings,
    error::{ProcfsError, unreadable},
    namespaces, scan,
    state::{Entry, Environments, State},
};
use crate::process::{
    ProcessKey,
    table::{self, Row},
};
use zinit_ebpf::service_flag;

/// Why a process is taken for a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sign {
    /// This member is its parent.
    Parent(ProcessKey),
    /// It is in this member's session.
    Session(ProcessKey),
    /// It is in this member's process group.
    Group(ProcessKey),
    Cookie,
    Cgroup,
    Orphan,
}

/// The signs that the members of one look at `/proc` give.
pub(super) struct Signs {
    sessions: HashMap<u32, (u32, ProcessKey)>,
    groups: HashMap<u32, (u32, ProcessKey)>,
    cgroups: HashMap<u32, u32>,
    cookies: HashMap<Vec<u8>, u32>,
    /// The one service that orphans can come from.
    orphans: Option<u32>,
}

/// The variable in an environment that names a service.
fn cookie<'a>(environment: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    environment
        .split(|byte| *byte == 0)
        .find(|entry| entry.starts_with(name))
}

/// `NAME=` of a cookie.
fn variable(cookie: &[u8]) -> &[u8] {
    let end = cookie.iter().position(|byte| *byte == b'=').map_or(0, |at| at + 1);
    &cookie[..end]
}

fn is_adopted(entry: &Entry) -> bool {
    entry.record.flags & service_flag::ADOPTED != 0
}

impl Signs {
    /// Collects them from the members in the table, and from their cgroups.
    pub(super) fn of(state: &mut State, rows: &[Row], surroundings: &Surroundings) -> Result<Self, ProcfsError> {
        let mut signs = Self {
            sessions: HashMap::new(),
            groups: HashMap::new(),
            cgroups: HashMap::new(),
            cookies: HashMap::new(),
            orphans: None,
        };
        signs.collect_sessions_and_groups(state, rows);
        for (id, entry) in state.services.iter().filter(|(_, entry)| !entry.has_released) {
            if let Some(cgroup) = &entry.cgroup {
                signs.cgroups.extend(cgroup.pids()?.into_iter().map(|pid| (pid, *id)));
            }
            signs.cookies.extend(entry.cookie.clone().map(|cookie| (cookie, *id)));
        }
        signs.orphans = scan::orphans_service(state, surroundings);
        Ok(signs)
    }

    fn collect_sessions_and_groups(&mut self, state: &mut State, rows: &[Row]) {
        let mut present = Vec::new();
        for row in rows {
            let Some(member) = state.member(row.key) else {
                continue;
            };
            let id = member.process.service;
            let Some(entry) = state.services.get(&id).filter(|entry| !entry.has_released) else {
                continue;
            };
            let leads_session = row.session == row.key.tgid;
            let made = row.session != 0 && !is_adopted(entry) && !entry.foreign_sessions.contains(&row.session);
            if made || leads_session {
                self.sessions.insert(row.session, (id, row.key));
            }
            if !is_adopted(entry) {
                if row.group == row.key.tgid {
                    self.groups.insert(row.group, (id, row.key));
                }
                present.push((row, id));
            }
        }
        // A group outlives its leader. It is still the service's while a member that was in it then has not left it: so long
        // the number can come to mean nothing else.
        for (row, id) in &present {
            if let Some(member) = state.members.get(&row.key.tgid)
                && member.own_group == Some(row.group)
            {
                self.groups.entry(row.group).or_insert((*id, row.key));
            }
        }
        for (row, _) in present {
            let own = self.groups.contains_key(&row.group).then_some(row.group);
            if let Some(member) = state.members.get_mut(&row.key.tgid) {
                member.own_group = own;
            }
        }
    }

    /// The service that a process shows a sign of. Remembers what environments say: one of a stranger need not be read again.
    pub(super) fn find(
        &self,
        state: &State,
        row: &Row,
        environments: &mut Environments,
    ) -> Result<Option<(u32, Sign)>, ProcfsError> {
        if let Some(parent) = state.members.get(&row.parent) {
            return Ok(Some((parent.process.service, Sign::Parent(parent.key()))));
        }
        if state.bystanders.contains(row.key) {
            return Ok(None);
        }
        if let Some(id) = self.cgroups.get(&row.key.tgid) {
            return Ok(Some((*id, Sign::Cgroup)));
        }
        if let Some((id, witness)) = self.sessions.get(&row.session) {
            return Ok(Some((*id, Sign::Session(*witness))));
        }
        if let Some((id, witness)) = self.groups.get(&row.group) {
            return Ok(Some((*id, Sign::Group(*witness))));
        }
        if let Some(id) = self.orphans.filter(|_| row.parent == std::process::id()) {
            return Ok(Some((id, Sign::Orphan)));
        }
        self.find_cookie(state, row, environments)
    }

    /// As [`Signs::find`], by the environment alone.
    fn find_cookie(
        &self,
        state: &State,
        row: &Row,
        environments: &mut Environments,
    ) -> Result<Option<(u32, Sign)>, ProcfsError> {
        let Some(name) = self.cookies.keys().next().map(|cookie| variable(cookie)) else {
            return Ok(None);
        };
        if environments.strangers.contains(&row.key) {
            return Ok(None);
        }
        let environment = table::environment(row.key.tgid)
            .map_err(unreadable)?
            .unwrap_or_default();
        environments.elsewhere.remove(&row.key);
        let service = cookie(&environment, name).and_then(|found| self.cookies.get(found));
        let Some(service) = service.copied() else {
            if !environment.is_empty() {
                environments.strangers.insert(row.key);
            }
            return Ok(None);
        };
        if state.services.get(&service).is_some_and(|entry| entry.is_as_young(row)) && is_orphan(row)? {
            return Ok(Some((service, Sign::Cookie)));
        }
        environments.elsewhere.insert(row.key, service);
        Ok(None)
    }
}

/// Whether its parent is one that orphans of what this process has spawned are given to. Pid 1 and subreapers above this process
/// are none: this one is nearer.
fn is_orphan(row: &Row) -> Result<bool, ProcfsError> {
    Ok(row.parent == std::process::id() || namespaces::is_init_below(row.parent).map_err(unreadable)?)
}

impl Sign {
    /// Whether the process that has the pid now shows the sign. The caller holds a pidfd and asks afterwards whether that is
    /// dead; the witness is asked last, so that it lived while the sign was read.
    pub(super) fn holds(self, state: &State, row: &Row, service: u32) -> Result<bool, ProcfsError> {
        let lives = |witness: ProcessKey| match state.member(witness) {
            Some(member) => member.lives(),
            None => Ok(false),
        };
        let entry = state.services.get(&service);
        match self {
            Self::Parent(witness) => Ok(row.parent == witness.tgid && lives(witness)?),
            Self::Session(witness) | Self::Group(witness) => {
                let shared = |of: &Row| {
                    if matches!(self, Self::Session(_)) {
                        of.session
                    } else {
                        of.group
                    }
                };
                let theirs = Row::read(witness.tgid).map_err(unreadable)?;
                Ok(theirs.is_some_and(|theirs| shared(&theirs) == shared(row)) && lives(witness)?)
            }
            Self::Cookie => {
                if !entry.is_some_and(|entry| entry.is_as_young(row)) || !is_orphan(row)? {
                    return Ok(false);
                }
                let environment = table::environment(row.key.tgid)
                    .map_err(unreadable)?
                    .unwrap_or_default();
                let wanted = entry.and_then(|entry| entry.cookie.as_deref());
                Ok(wanted.is_some_and(|wanted| cookie(&environment, variable(wanted)) == Some(wanted)))
            }
            Self::Cgroup => {
                let path = table::cgroup(row.key.tgid).map_err(unreadable)?;
                let cgroup = entry.and_then(|entry| entry.cgroup.as_ref());
                Ok(path.zip(cgroup).is_some_and(|(path, cgroup)| cgroup.holds(&path)))
            }
            Self::Orphan => Ok(row.parent == std::process::id()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_is_found_whole_or_not_at_all() {
        let environment = b"A=1\0COOKIE=web/1\0B=COOKIE=other\0";
        assert_eq!(variable(b"COOKIE=web/1"), b"COOKIE=");
        assert_eq!(cookie(environment, b"COOKIE="), Some(&b"COOKIE=web/1"[..]));
        assert_eq!(cookie(b"XCOOKIE=web/1\0", b"COOKIE="), None);
    }

    #[test]
    fn orphans_of_what_was_spawned_are_not_given_to_pid_1() {
        let mut row = Row::read(std::process::id()).unwrap().unwrap();
        for (parent, orphan) in [
            (1, false),
            (std::os::unix::process::parent_id(), false),
            (std::process::id(), true),
        ] {
            row.parent = parent;
            assert_eq!(is_orphan(&row).unwrap(), orphan, "{parent}");
        }
    }
}
