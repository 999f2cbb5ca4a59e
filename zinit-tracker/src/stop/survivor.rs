//! Who outlives a stop, and why.
//!
//! Decides what a condition means; [`process`](crate::process) reads it.

use std::fmt;

use serde::Serialize;

use crate::{
    process::{
        CgroupVersion, Frozen, PidfdError, ProcessKey,
        condition::{Condition, Related, Thread},
    },
    tracker::{Member, Tracker},
};

/// How many frames of a kernel stack are shown to people.
const SHOWN_FRAMES: usize = 3;

/// A process that is still there.
#[derive(Clone, Debug, Serialize)]
pub struct Survivor {
    /// Its unique name.
    #[serde(flatten)]
    pub key: ProcessKey,
    /// Its pid in the caller's pid namespace; 0 if that does not show it.
    pub pid: u32,
    /// Command name.
    pub comm: String,
    /// The state letter of `/proc/PID/stat`; `None`: `/proc` does not show it.
    pub state: Option<char>,
    /// Why it is still there.
    pub cause: Cause,
}

/// Why a process is still there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Cause {
    /// It is the process that stops the service, or an ancestor of it, and was not signalled.
    Caller,
    /// It was found by other signs than the books, which are full of others and cannot take it in.
    NoRoom,
    /// It was found by other signs than the books, whose lock another program holds, so that they cannot take it in.
    LockedOut,
    /// The kernel did not let the caller signal it: it is in a user namespace where the caller lacks `CAP_KILL`.
    OtherUserNamespace {
        /// Inode number of the namespace, as `/proc/PID/ns/user` shows it.
        namespace: u64,
        /// What the kernel answered.
        error: String,
    },
    /// The kernel did not let the caller signal it.
    Refused {
        /// What the kernel answered.
        error: String,
    },
    /// A cgroup is frozen. Version 1 keeps even those that were killed, until it is thawed.
    Frozen(Frozen),
    /// Its tracer has stopped it, say at its exit, or has yet to reap a thread. It ends when the tracer goes on or ends.
    Traced {
        /// Id of the thread that traces it; 0 if the caller's pid namespace does not show that.
        tracer: u32,
        /// The tracer's name; `None`: it is not shown, or has just ended.
        comm: Option<String>,
    },
    /// Its main thread has exited, other threads have not.
    ZombieLeader {
        /// How many.
        others: usize,
        /// The first few of them.
        threads: Vec<Held>,
    },
    /// It waits until a child that it created by vfork executes a program or exits. SIGKILL ends the wait.
    Vfork {
        /// The child's pid; `None`: it could not be found.
        child: Option<u32>,
        /// The child's name.
        comm: Option<String>,
    },
    /// It sleeps in the kernel in a way that nothing but the end of what it waits for ends, as for a disk or a server.
    Uninterruptible(Place),
    /// It is dying, and waits in the kernel on its way out, as the first process of a pid namespace does for the others.
    Exiting(Place),
    /// SIGKILL is pending, and it has not acted on it yet.
    Pending(Place),
    /// No SIGKILL has reached it.
    NotKilled(Place),
    /// The caller's pid namespace does not show it, so it cannot be signalled.
    OutOfSight,
    /// `/proc` does not show it, or it has just ended.
    Hidden,
}

/// Where in the kernel a thread is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The function in which it waits, where that is readable.
    pub wchan: Option<String>,
    /// The functions that it is in, innermost first; empty where they are not readable.
    pub stack: Vec<String>,
}

/// A thread that keeps a process whose main thread has exited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Held {
    /// Its thread id in the caller's pid namespace.
    pub tid: u32,
    /// Its name.
    pub comm: String,
    /// Its state letter; `Z`: it has exited, and its tracer has yet to reap it.
    pub state: char,
    /// What keeps it.
    pub cause: Cause,
}

/// Why a signal was not sent.
#[derive(Debug)]
pub(super) enum Refusal {
    /// It would have hit the caller or one of its ancestors.
    Caller,
    /// The books cannot take it in.
    NoRoom,
    /// Another program holds the lock of the books.
    LockedOut,
    /// The kernel refused.
    Kernel(PidfdError),
}

impl Survivor {
    /// What a report would say of this member if it survived now: what keeps, or would keep, it from ending.
    ///
    /// Before a SIGKILL this is no verdict: of what it names, only a version 1 freezer, a tracer, uninterruptible sleep and
    /// a refusal outlast one.
    #[must_use]
    pub fn examine(tracker: &Tracker, member: &Member) -> Self {
        let condition = tracker.condition(member.pid, member.key);
        Self::new(member.key, member.pid, member.comm.clone(), condition, None)
    }

    pub(super) fn new(
        key: ProcessKey,
        pid: u32,
        comm: String,
        condition: Option<Condition>,
        refused: Option<&Refusal>,
    ) -> Self {
        let state = condition.as_ref().map(|condition| condition.main.state);
        // A process can have changed its name since it joined.
        let comm = condition.as_ref().map_or(comm, |condition| condition.main.comm.clone());
        Self {
            key,
            pid,
            comm,
            state,
            cause: Cause::new(pid, condition, refused),
        }
    }
}

impl Cause {
    fn new(pid: u32, condition: Option<Condition>, refused: Option<&Refusal>) -> Self {
        match (refused, condition) {
            (Some(Refusal::Caller), _) => Self::Caller,
            (Some(Refusal::NoRoom), _) => Self::NoRoom,
            (Some(Refusal::LockedOut), _) => Self::LockedOut,
            (Some(Refusal::Kernel(error)), condition) => {
                let error = chain(error);
                match condition.and_then(|condition| condition.other_user_namespace) {
                    Some(namespace) => Self::OtherUserNamespace { namespace, error },
                    None => Self::Refused { error },
                }
            }
            (None, None) if pid == 0 => Self::OutOfSight,
            (None, None) => Self::Hidden,
            (None, Some(condition)) => Self::of_process(condition),
        }
    }

    fn of_process(condition: Condition) -> Self {
        if !condition.main.is_dead() || condition.others == 0 {
            return Self::of_thread(condition.main);
        }
        Self::ZombieLeader {
            others: condition.others,
            threads: condition.threads.into_iter().map(Held::new).collect(),
        }
    }

    /// What keeps a thread; if several things do, the one whose end is needed first.
    ///
    /// A tracing stop comes first: where its tracer holds a killed thread, thawing changes nothing. A version 1 freezer
    /// holds those in state D or S, not one that still runs; version 2 does not hold what was killed, so whatever else
    /// there is explains more.
    fn of_thread(thread: Thread) -> Self {
        let traced = thread.tracer.is_some() && thread.is_dead();
        if thread.state == 't' || traced {
            return Self::traced(thread.tracer);
        }
        let waits_for_vfork = thread.waits_for_vfork();
        let place = Place {
            wchan: thread.wchan,
            stack: thread.stack,
        };
        match (thread.state, thread.frozen) {
            ('D' | 'S', Some(frozen)) if frozen.version == CgroupVersion::V1 => Self::Frozen(frozen),
            ('D', _) if waits_for_vfork => Self::vfork(thread.newest_child),
            ('D', _) => Self::Uninterruptible(place),
            _ if thread.exiting => Self::Exiting(place),
            ('S', Some(frozen)) => Self::Frozen(frozen),
            _ if thread.kill_pending => Self::Pending(place),
            _ => Self::NotKilled(place),
        }
    }

    fn traced(tracer: Option<Related>) -> Self {
        let (tracer, comm) = tracer.map_or((0, None), |tracer| (tracer.pid, tracer.comm));
        Self::Traced { tracer, comm }
    }

    fn vfork(child: Option<Related>) -> Self {
        let (child, comm) = child.map_or((None, None), |child| (Some(child.pid), child.comm));
        Self::Vfork { child, comm }
    }
}

impl Held {
    fn new(thread: Thread) -> Self {
        Self {
            tid: thread.tid,
            comm: thread.comm.clone(),
            state: thread.state,
            cause: Cause::of_thread(thread),
        }
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(&format!(": {source}"));
        next = source.source();
    }
    text
}

/// What it is and, where somebody can lift it, how.
impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Caller => f.write_str("it is the process that stops the service, or an ancestor of it"),
            Self::OtherUserNamespace { namespace, error } => write!(
                f,
                "in another user namespace (user:[{namespace}]), where the caller lacks CAP_KILL: {error}"
            ),
            Self::Refused { error } => f.write_str(error),
            Self::Frozen(frozen) => write!(f, "frozen by {frozen}, thaw to end it"),
            Self::Traced { tracer: 0, .. } => {
                f.write_str("stopped by a tracer outside the caller's pid namespace, detach to end it")
            }
            Self::Traced { tracer, comm } => {
                write!(
                    f,
                    "stopped by its tracer, pid {}, detach to end it",
                    named(*tracer, comm)
                )
            }
            Self::ZombieLeader { others, threads } => zombie_leader(*others, threads, f),
            Self::Vfork { child: None, .. } => f.write_str("waiting for a child that it created by vfork"),
            Self::Vfork {
                child: Some(child),
                comm,
            } => write!(f, "waiting for its vfork child, pid {}", named(*child, comm)),
            Self::Uninterruptible(place) => write!(f, "uninterruptible{place}"),
            Self::Exiting(place) => write!(f, "dying, not yet dead{place}"),
            Self::Pending(place) => write!(f, "SIGKILL is pending, it has not ended yet{place}"),
            Self::NotKilled(place) => write!(f, "no SIGKILL has reached it{place}"),
            Self::NoRoom => f.write_str("not in the books, which have no room for it"),
            Self::LockedOut => f.write_str("not in the books, whose lock another program holds (`lslocks` names it)"),
            Self::OutOfSight => f.write_str("not visible in the caller's pid namespace"),
            Self::Hidden => f.write_str("/proc does not show it, or it has just ended"),
        }
    }
}

fn named(pid: u32, comm: &Option<String>) -> String {
    match comm {
        Some(comm) => format!("{pid} ({comm})"),
        None => pid.to_string(),
    }
}

fn zombie_leader(others: usize, threads: &[Held], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let noun = if others == 1 { "thread has" } else { "threads have" };
    write!(f, "its main thread is a zombie, {others} other {noun} not ended")?;
    for (index, held) in threads.iter().enumerate() {
        let separator = if index == 0 { ":" } else { ";" };
        write!(
            f,
            "{separator} thread {} ({}) in state {}, {}",
            held.tid, held.comm, held.state, held.cause
        )?;
    }
    Ok(())
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(wchan) = &self.wchan {
            write!(f, " in {wchan}")?;
        }
        if !self.stack.is_empty() {
            let shown: Vec<_> = self.stack.iter().take(SHOWN_FRAMES).map(String::as_str).collect();
            write!(f, " (kernel stack: {})", shown.join(" < "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(state: char) -> Thread {
        Thread {
            tid: 7,
            comm: "worker".to_owned(),
            state,
            exiting: false,
            kill_pending: true,
            wchan: None,
            stack: Vec::new(),
            tracer: None,
            frozen: None,
            newest_child: None,
        }
    }

    fn frozen(version: CgroupVersion) -> Option<Frozen> {
        let cgroups = vec!["/cg/a".to_owned()];
        Some(Frozen { version, cgroups })
    }

    fn tracer() -> Option<Related> {
        let comm = Some("gdb".to_owned());
        Some(Related { pid: 12, comm })
    }

    /// What the thread's cause is called in JSON.
    fn kind(thread: Thread) -> String {
        let json = serde_json::to_value(Cause::of_thread(thread)).unwrap();
        json["kind"].as_str().unwrap().to_owned()
    }

    #[test]
    fn a_freezer_of_version_1_wins_over_state_d_and_a_tracing_stop_over_both() {
        let held = Thread {
            frozen: frozen(CgroupVersion::V1),
            tracer: tracer(),
            ..thread('D')
        };
        assert_eq!(kind(held.clone()), "frozen");
        assert_eq!(
            kind(Thread {
                state: 't',
                ..held.clone()
            }),
            "traced"
        );
        // One that runs is not frozen, whatever its cgroup says; it is about to be.
        assert_eq!(kind(Thread { state: 'R', ..held }), "pending");
    }

    #[test]
    fn a_freezer_of_version_2_wins_only_over_nothing() {
        let held = Thread {
            frozen: frozen(CgroupVersion::V2),
            ..thread('S')
        };
        assert_eq!(kind(held.clone()), "frozen");
        assert_eq!(
            kind(Thread {
                state: 'D',
                ..held.clone()
            }),
            "uninterruptible"
        );
        assert_eq!(kind(Thread { exiting: true, ..held }), "exiting");
    }

    #[test]
    fn a_thread_that_is_traced_and_hangs_elsewhere_is_not_held_by_its_tracer() {
        let held = Thread {
            tracer: tracer(),
            ..thread('D')
        };
        assert_eq!(kind(held.clone()), "uninterruptible");
        assert_eq!(
            kind(Thread {
                state: 'S',
                ..held.clone()
            }),
            "pending"
        );
        assert_eq!(
            kind(Thread { state: 'Z', ..held }),
            "traced",
            "its tracer has yet to reap it"
        );
    }

    #[test]
    fn a_wait_for_a_vfork_names_the_child() {
        let waiting = Thread {
            wchan: Some("kernel_clone".to_owned()),
            newest_child: Some(Related {
                pid: 8,
                comm: Some("sh".to_owned()),
            }),
            ..thread('D')
        };
        let cause = Cause::of_thread(waiting.clone());
        assert_eq!(cause.to_string(), "waiting for its vfork child, pid 8 (sh)");
        let unknown = Thread {
            newest_child: None,
            ..waiting
        };
        assert_eq!(
            Cause::of_thread(unknown).to_string(),
            "waiting for a child that it created by vfork"
        );
    }

    #[test]
    fn a_slow_death_is_told_from_one_that_was_not_ordered() {
        let running = thread('R');
        assert_eq!(kind(running.clone()), "pending");
        let unasked = Thread {
            kill_pending: false,
            ..running
        };
        assert_eq!(kind(unasked), "not-killed");
    }

    #[test]
    fn a_zombie_leader_names_the_threads_that_hold_it() {
        let condition = Condition {
            main: thread('Z'),
            others: 2,
            threads: vec![Thread {
                frozen: frozen(CgroupVersion::V1),
                ..thread('D')
            }],
            other_user_namespace: None,
        };
        let cause = Cause::new(1, Some(condition), None);
        assert_eq!(
            cause.to_string(),
            "its main thread is a zombie, 2 other threads have not ended: thread 7 (worker) in state D, frozen by cgroup \
             v1 /cg/a, thaw to end it"
        );
        let json = serde_json::to_value(&cause).unwrap();
        assert_eq!(json["kind"], "zombie-leader");
        assert_eq!(json["threads"][0]["cause"]["kind"], "frozen");
        assert_eq!(json["threads"][0]["cause"]["version"], 1);
    }

    #[test]
    fn a_refusal_tells_a_foreign_user_namespace_from_other_reasons() {
        let refusal = || {
            Refusal::Kernel(PidfdError::Signal {
                pid: 7,
                signal: nix::sys::signal::Signal::SIGKILL,
                source: rustix::io::Errno::PERM,
            })
        };
        let condition = |other_user_namespace| Condition {
            main: thread('S'),
            others: 0,
            threads: Vec::new(),
            other_user_namespace,
        };
        let foreign = Cause::new(7, Some(condition(Some(42))), Some(&refusal()));
        assert!(
            matches!(&foreign, Cause::OtherUserNamespace { namespace: 42, .. }),
            "{foreign:?}"
        );
        assert!(foreign.to_string().contains("Operation not permitted"), "{foreign}");
        let own = Cause::new(7, Some(condition(None)), Some(&refusal()));
        assert!(matches!(own, Cause::Refused { .. }));
        assert_eq!(
            Cause::new(7, Some(condition(Some(42))), Some(&Refusal::Caller)),
            Cause::Caller
        );
    }

    #[test]
    fn what_proc_does_not_show_is_said_to_be_so() {
        assert_eq!(Cause::new(0, None, None), Cause::OutOfSight);
        assert_eq!(Cause::new(7, None, None), Cause::Hidden);
    }
}
