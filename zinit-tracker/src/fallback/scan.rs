//! Looking at `/proc`: one pass, passes until nothing more is found, and the pursuit of those that are faster than a pass.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use zinit_ebpf::{process_flag, service_state};

use super::{
    books::Surroundings,
    error::{ProcfsError, failed, unreadable},
    reaper,
    signs::{Sign, Signs},
    state::{Environments, State, UNKNOWN_STATUS, comm},
};
use crate::process::{
    Machine, Matched, Pidfd, ProcessKey,
    table::{self, Row},
};

/// How many passes may find nobody while processes are being created, before a service counts as empty all the same.
const MOST_PASSES: usize = 5;
/// How many passes in a row that saw no creation must find nobody.
const QUIET_PASSES: usize = 2;
/// For how long a service counts as empty that was found so while processes were being created: asking again at once would
/// give the same answer.
const RESTLESS: Duration = Duration::from_millis(50);
/// For how long the newest processes are looked at, each at its birth.
const PURSUIT: Duration = Duration::from_millis(50);
/// The same where orphans tell that somebody creates them, and how often that is repeated at most.
const LONG_PURSUIT: Duration = Duration::from_millis(200);
const MOST_PURSUITS: usize = 5;

fn last_pid() -> Result<u32, ProcfsError> {
    table::last_pid().map_err(failed("read", Path::new("/proc/loadavg")))
}

/// One look at every process: takes in those that show a sign, and takes out those that are dead. Returns how many joined.
pub(super) fn pass(state: &mut State, surroundings: &Surroundings) -> Result<usize, ProcfsError> {
    let rows = table::rows().map_err(unreadable)?;
    let own_line = own_line(&rows, surroundings.me);
    bury_dead(state, &rows, surroundings)?;
    let mut bystanders = std::mem::take(&mut state.bystanders);
    bystanders.follow(&rows, |key| state.member(key).is_some());
    state.bystanders = bystanders;
    let orphans = orphans_service(state, surroundings);
    reap(state, &rows, orphans, surroundings)?;
    let keys: HashMap<u32, ProcessKey> = rows.iter().map(|row| (row.key.tgid, row.key)).collect();
    let mut joined = 0;
    loop {
        let signs = Signs::of(state, &rows, surroundings)?;
        let mut found = 0;
        for row in &rows {
            let known = state.member(row.key).is_some() || state.released.contains(&row.key);
            if known || row.dead || row.kernel_thread || own_line.contains(&row.key.tgid) {
                continue;
            }
            if state.released.iter().any(|released| released.tgid == row.parent) {
                state.released.insert(row.key);
                expel(state, row.key.tgid)?;
                continue;
            }
            let mut environments = std::mem::take(&mut state.environments);
            let sign = signs.find(state, row, &mut environments);
            state.environments = environments;
            if let Some((service, sign)) = sign? {
                let parent = keys.get(&row.parent).copied();
                found += usize::from(admit(state, surroundings, row.key, parent, service, sign)?);
            }
        }
        joined += found;
        if found == 0 {
            break;
        }
    }
    note_received(state, &rows, surroundings);
    look_for_unconfined(state)?;
    state.unknown_children =
        orphans.is_none() && (state.bystanders.blur_children() || has_unknown_child(state, &rows, surroundings));
    let present: HashSet<_> = rows.iter().map(|row| row.key).collect();
    state.environments.elsewhere.retain(|key, _| present.contains(key));
    for known in [
        &mut state.environments.strangers,
        &mut state.released,
        &mut state.received,
        &mut state.spawned,
    ] {
        known.retain(|key| present.contains(key));
    }
    state.unreaped.retain(|key, _| present.contains(key));
    Ok(joined)
}

/// Whether this process has a child of which it is not known what it is.
fn has_unknown_child(state: &State, rows: &[Row], surroundings: &Surroundings) -> bool {
    let is_known = |key| {
        state.member(key).is_some()
            || state.spawned.contains(&key)
            || state.unreaped.contains_key(&key)
            || state.bystanders.contains(key)
    };
    rows.iter()
        .any(|row| row.parent == surroundings.me && !is_known(row.key))
}

/// This process and its ancestors, which are nobody's members, and pid 1.
fn own_line(rows: &[Row], me: u32) -> HashSet<u32> {
    let parents: HashMap<u32, u32> = rows.iter().map(|row| (row.key.tgid, row.parent)).collect();
    let mut line = HashSet::from([1]);
    let mut next = Some(me);
    while let Some(pid) = next.filter(|pid| *pid != 0 && line.insert(*pid)) {
        next = parents.get(&pid).copied();
    }
    line
}

/// Enters the process if it certainly shows the sign. Returns whether it does.
///
/// The pidfd is opened first. If it is not dead at the end, the pid was this process's all the time, and so is all that was
/// read of it.
fn admit(
    state: &mut State,
    surroundings: &Surroundings,
    key: ProcessKey,
    parent: Option<ProcessKey>,
    service: u32,
    sign: Sign,
) -> Result<bool, ProcfsError> {
    let Some(pidfd) = Pidfd::open(key.tgid)? else {
        return Ok(false);
    };
    let Some(row) = Row::read(key.tgid).map_err(unreadable)? else {
        return Ok(false);
    };
    if row.key != key || row.dead || !sign.holds(state, &row, service)? || pidfd.is_dead() {
        return Ok(false);
    }
    let record = state.services.get(&service).map(|entry| &entry.record);
    let killing = record.is_some_and(|record| record.state == service_state::KILLING);
    let adopting = record.is_some_and(|record| record.adopting_boottime_ns != 0);
    let flags = if adopting { process_flag::ADOPTED } else { 0 };
    let parent = match sign {
        Sign::Parent(parent) => Some(parent),
        _ => parent,
    };
    let unknown = ProcessKey {
        tgid: row.parent,
        start_boottime_ns: 0,
    };
    state.join(
        service,
        &row,
        parent.unwrap_or(unknown),
        flags,
        pidfd,
        surroundings.holdable,
    );
    if killing && let Some(matched) = Matched::member(&Newborn { state, key }, key.tgid, key)? {
        // As the kernel's hooks do: whoever is born into a service that is being killed need not wait for the next round.
        matched.signal(Signal::SIGKILL)?;
    }
    Ok(true)
}

/// The machine, for matching a process that has just become a member.
struct Newborn<'a> {
    state: &'a State,
    key: ProcessKey,
}

impl Machine for Newborn<'_> {
    type Handle = Pidfd;
    type Error = ProcfsError;

    fn open(&self, pid: u32) -> Result<Option<Pidfd>, ProcfsError> {
        let opened = Pidfd::open(pid)?;
        Ok(opened.filter(|pidfd| self.state.is_held_by(self.key, pidfd)))
    }

    fn has_start_of(&self, pid: u32, wanted: ProcessKey) -> Result<bool, ProcfsError> {
        let row = Row::read(pid).map_err(unreadable)?;
        Ok(row.is_some_and(|row| row.key == wanted))
    }

    fn is_recorded(&self, wanted: ProcessKey) -> Result<bool, ProcfsError> {
        Ok(self.state.member(wanted).is_some())
    }
}

/// Takes out the members that are dead, as the table or their pidfds show, and follows the names of the others.
fn bury_dead(state: &mut State, rows: &[Row], surroundings: &Surroundings) -> Result<(), ProcfsError> {
    let by_pid: HashMap<u32, &Row> = rows.iter().map(|row| (row.key.tgid, row)).collect();
    let mut dead = Vec::new();
    for member in state.members.values_mut() {
        let key = member.key();
        let row = by_pid.get(&key.tgid).filter(|row| row.key == key);
        let gone = match (&member.handle.pidfd, row) {
            (Some(pidfd), _) => pidfd.is_dead(),
            (None, Some(row)) => row.dead,
            // Another process has the pid.
            (None, None) if by_pid.contains_key(&key.tgid) => true,
            // Gone, or hidden since it took on another user's rights.
            (None, None) => {
                Pidfd::open(key.tgid)?.is_none_or(|pidfd| pidfd.is_dead() || !member.handle.is_alike(&pidfd))
            }
        };
        match row {
            Some(row) if !gone => member.process.comm = comm(&row.comm),
            _ if gone => dead.push(key),
            _ => {}
        }
    }
    for key in dead {
        bury(state, key, surroundings)?;
    }
    Ok(())
}

/// Enters the death of a member. Its status is known if it is not reaped yet, or it is for this process to reap.
pub(super) fn bury(state: &mut State, key: ProcessKey, surroundings: &Surroundings) -> Result<(), ProcfsError> {
    let Some(member) = state.member(key) else {
        return Ok(());
    };
    let row = Row::read(key.tgid).map_err(unreadable)?;
    let row = row.filter(|row| row.key == key && row.dead && !state.spawned.contains(&key));
    let (status, is_reaped) = match row {
        None if state.spawned.contains(&key) => (status_of(key, surroundings)?, true),
        None => (None, true),
        Some(row) if row.parent == surroundings.me => (member.handle.reap(key.tgid)?, true),
        Some(_) => (status_of(key, surroundings)?, false),
    };
    let handle = state.leave(key, Some(status.unwrap_or(UNKNOWN_STATUS)));
    if let Some(mut handle) = handle.filter(|_| !is_reaped) {
        if state.unreaped.len() >= surroundings.holdable {
            handle.pidfd = None;
        }
        state.unreaped.insert(key, handle);
    }
    Ok(())
}

/// The wait status of a dead process that is not reaped, if the caller may know it.
fn status_of(key: ProcessKey, surroundings: &Surroundings) -> Result<Option<u32>, ProcfsError> {
    let row = Row::read(key.tgid).map_err(unreadable)?;
    let row = row.filter(|row| row.key == key && row.dead && surroundings.may_know_status(key.tgid));
    Ok(row.map(|row| row.status))
}

/// Remembers who was given to this process as an orphan, other than the members: nobody else will reap them.
fn note_received(state: &mut State, rows: &[Row], surroundings: &Surroundings) {
    let elsewhere = std::mem::take(&mut state.elsewhere);
    let is_member = |row: &&Row| state.member(row.key).is_some() || state.unreaped.contains_key(&row.key);
    let others: Vec<_> = rows.iter().filter(|row| !is_member(row)).collect();
    for row in others {
        if row.parent != surroundings.me {
            state.elsewhere.insert(row.key);
        } else if elsewhere.contains(&row.key) {
            state.received.insert(row.key);
        }
    }
}

/// Reaps dead orphans: those that are known to be orphans, and all where every orphan is of one service.
fn reap(state: &mut State, rows: &[Row], orphans: Option<u32>, surroundings: &Surroundings) -> Result<(), ProcfsError> {
    let mut unclaimed = HashSet::new();
    for row in rows.iter().filter(|row| row.dead && row.parent == surroundings.me) {
        let is_for_others = state.bystanders.are_reaped_by_others(row.key, surroundings.sole_parent);
        if state.member(row.key).is_some() || state.spawned.contains(&row.key) || is_for_others {
            continue;
        }
        if let Some(handle) = state.unreaped.get(&row.key) {
            handle.reap(row.key.tgid)?;
            continue;
        }
        let known = state.received.contains(&row.key);
        if let (false, Some(entry)) = (known, orphans.and_then(|id| state.services.get_mut(&id)))
            && let Some(cgroup) = &entry.cgroup
        {
            // It lived and died unseen, but not without a trace.
            let path = table::cgroup(row.key.tgid).map_err(unreadable)?;
            entry.unconfined |= path.is_some_and(|path| !cgroup.holds(&path));
        }
        if !known {
            unclaimed.insert(row.key);
        }
        // Of a process that creates children through its tracker only, others are orphans, whosever.
        if (known || surroundings.sole_parent)
            && let Some(pidfd) = Pidfd::open(row.key.tgid)?
        {
            reaper::reap(&pidfd);
        }
    }
    state.died_unseen = !unclaimed.is_subset(&state.unclaimed);
    state.unclaimed = unclaimed;
    Ok(())
}

/// The one service that orphans can come from: this process creates children through the tracker only, and for one service, and
/// is given nobody else's.
pub(super) fn orphans_service(state: &State, surroundings: &Surroundings) -> Option<u32> {
    let (id, entry) = state.services.first_key_value()?;
    let creates_others = !surroundings.sole_parent || state.bystanders.may_have_orphans();
    let only = !creates_others && state.services.len() == 1 && !entry.has_released;
    (only && entry.record.forks > 0).then_some(*id)
}

/// Moves a process that was released out of the service's cgroup, which it would keep from being removed.
pub(super) fn expel(state: &State, pid: u32) -> Result<(), ProcfsError> {
    let Some(path) = table::cgroup(pid).map_err(unreadable)? else {
        return Ok(());
    };
    let cgroups = state.services.values().filter_map(|entry| entry.cgroup.as_ref());
    for cgroup in cgroups.filter(|cgroup| cgroup.holds(&path)) {
        cgroup.expel(pid)?;
    }
    Ok(())
}

/// Notes services of which a member is outside of the cgroup.
fn look_for_unconfined(state: &mut State) -> Result<(), ProcfsError> {
    for (id, entry) in &mut state.services {
        let Some(cgroup) = entry.cgroup.as_ref().filter(|_| !entry.unconfined) else {
            continue;
        };
        for member in state.members.values().filter(|member| member.process.service == *id) {
            let path = table::cgroup(member.key().tgid).map_err(unreadable)?;
            entry.unconfined |= path.is_some_and(|path| !cgroup.holds(&path));
        }
    }
    Ok(())
}

/// How many members the service has; looks until it is as certain as it gets if the known ones are dead.
pub(super) fn settle(state: &mut State, id: u32, surroundings: &Surroundings) -> Result<u64, ProcfsError> {
    if any_holds(state, id) {
        return Ok(live(state, id));
    }
    let entry = state.services.get(&id);
    let restless_since = entry.and_then(|entry| entry.restless_since);
    if restless_since.is_some_and(|since| since.elapsed() < RESTLESS) && !populated(state, id)? {
        return Ok(0);
    }
    let mut quiet = 0;
    for _ in 0..MOST_PASSES {
        let before = last_pid()?;
        let empty_at = state.services.get(&id).and_then(|entry| entry.empty_at);
        if empty_at == Some(before) {
            // Nobody has been created since.
            return Ok(0);
        }
        pass(state, surroundings)?;
        let live = live(state, id);
        let Some(entry) = state.services.get_mut(&id) else {
            return Ok(0);
        };
        if live > 0 {
            return Ok(live);
        }
        let confined = entry.cgroup.is_some() && !entry.unconfined && !state.unknown_children;
        quiet = if last_pid()? == before { quiet + 1 } else { 0 };
        if quiet == QUIET_PASSES {
            entry.restless_since = None;
            let populated = populated(state, id)?;
            if !populated && let Some(entry) = state.services.get_mut(&id) {
                entry.empty_at = Some(before);
            }
            return Ok(populated.into());
        }
        if confined && !populated(state, id)? {
            return Ok(0);
        }
    }
    for _ in 0..MOST_PURSUITS {
        let orphaned = state.died_unseen;
        pursue(state, surroundings, if orphaned { LONG_PURSUIT } else { PURSUIT })?;
        if !orphaned || live(state, id) > 0 {
            break;
        }
        pass(state, surroundings)?;
    }
    let live = live(state, id).max(populated(state, id)?.into());
    if live == 0
        && let Some(entry) = state.services.get_mut(&id)
    {
        entry.restless_since = Some(Instant::now());
    }
    Ok(live)
}

/// Whether a held pidfd shows that a member of the service lives: one is enough, and costs no pass.
fn any_holds(state: &State, id: u32) -> bool {
    let mut members = state.members.values().filter(|member| member.process.service == id);
    members.any(|member| member.handle.pidfd.as_ref().is_some_and(|pidfd| !pidfd.is_dead()))
}

fn live(state: &State, id: u32) -> u64 {
    state.services.get(&id).map_or(0, |entry| entry.record.live)
}

/// Whether the service's cgroup has somebody in it; `false` if it has none, or one that was released may be there.
fn populated(state: &State, id: u32) -> Result<bool, ProcfsError> {
    let entry = state.services.get(&id).filter(|entry| !entry.has_released);
    let cgroup = entry.and_then(|entry| entry.cgroup.as_ref());
    cgroup.map_or(Ok(false), |cgroup| cgroup.is_populated())
}

/// Looks at the processes that are being created, each at its birth: one of a chain, each of which creates the next and
/// exits, stays a step ahead of a pass.
fn pursue(state: &mut State, surroundings: &Surroundings, time: Duration) -> Result<(), ProcfsError> {
    let signs = Signs::of(state, &[], surroundings)?;
    let started = Instant::now();
    let mut seen = last_pid()?;
    while started.elapsed() < time {
        let last = last_pid()?;
        if last == seen {
            std::hint::spin_loop();
            continue;
        }
        seen = last;
        // The one before the last may live on.
        for pid in [last, last.saturating_sub(1)] {
            let Some(row) = Row::read(pid).map_err(unreadable)? else {
                continue;
            };
            // A thread has a pid, but is no process.
            if row.dead || state.member(row.key).is_some() || state.released.contains(&row.key) {
                continue;
            }
            if let Some((service, sign)) = signs.find(state, &row, &mut Environments::default())?
                && admit(state, surroundings, row.key, None, service, sign)?
            {
                return Ok(());
            }
        }
    }
    Ok(())
}
