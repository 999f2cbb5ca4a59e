//! From a pid to a signal: the only way there is.
//!
//! A pid comes to mean another process as soon as its owner is reaped. A pidfd does not, so it is opened first and compared
//! afterwards; only what was found to be the wanted process can be sent a signal.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::Signal;

use super::{Death, Pidfd, PidfdError, ProcessKey};

/// What a match asks of the machine.
pub trait Machine {
    /// Holds on to one process.
    type Handle;
    /// Why the machine does not answer.
    type Error;

    /// Opens the process that has the pid at this moment. `None`: there is none.
    ///
    /// # Errors
    ///
    /// When it cannot be opened for another reason than that.
    fn open(&self, pid: u32) -> Result<Option<Self::Handle>, Self::Error>;

    /// Whether the process that has the pid at this moment started when the wanted one did, as exactly as can be told.
    ///
    /// # Errors
    ///
    /// When that cannot be told.
    fn has_start_of(&self, pid: u32, wanted: ProcessKey) -> Result<bool, Self::Error>;

    /// Whether the books have the wanted process at this moment.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    fn is_recorded(&self, wanted: ProcessKey) -> Result<bool, Self::Error>;
}

/// A handle of the process that has this name, which was seen with this pid; `None` if it is gone.
///
/// The order is what makes it right. If the wanted process had been reaped before the handle was opened, another start is
/// read after that. If the other process started within the same tick, which takes somebody who chooses pids, the entry is
/// gone: it goes when a process exits, or shortly after it was reaped where the kernel has skipped its exit.
///
/// # Errors
///
/// As for the methods of the machine.
pub fn matching<M: Machine>(machine: &M, pid: u32, wanted: ProcessKey) -> Result<Option<M::Handle>, M::Error> {
    let Some(handle) = machine.open(pid)? else {
        return Ok(None);
    };
    let matches = machine.has_start_of(pid, wanted)? && machine.is_recorded(wanted)?;
    Ok(matches.then_some(handle))
}

/// A process that was found to be the one that is meant, for as long as this lives.
#[derive(Debug)]
pub struct Matched(Pidfd);

impl Matched {
    /// A member of a service; see [`matching`].
    ///
    /// # Errors
    ///
    /// As for [`matching`].
    pub fn member<M: Machine<Handle = Pidfd>>(
        machine: &M,
        pid: u32,
        wanted: ProcessKey,
    ) -> Result<Option<Self>, M::Error> {
        Ok(matching(machine, pid, wanted)?.map(Self))
    }

    /// A child of the caller that it has not waited for, whose pid is therefore not given to another process. `None`: it
    /// was waited for.
    ///
    /// # Errors
    ///
    /// When no descriptor can be had.
    pub fn child(child: &tokio::process::Child) -> Result<Option<Self>, PidfdError> {
        match child.id() {
            Some(pid) => Ok(Pidfd::open(pid)?.map(Self)),
            None => Ok(None),
        }
    }

    /// Sends a signal. Returns whether the process was there to receive it.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<bool, PidfdError> {
        self.0.signal(signal)
    }

    /// What tells when it is dead, in a Tokio runtime.
    ///
    /// # Errors
    ///
    /// Descriptors are used up.
    ///
    /// # Panics
    ///
    /// Outside a Tokio runtime.
    pub fn death(&self) -> std::io::Result<Death> {
        Death::new(self.0.as_fd())
    }

    /// As [`Pidfd::is_dead`].
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.0.is_dead()
    }
}

impl AsFd for Matched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        cell::{Cell, RefCell},
        collections::HashMap,
        convert::Infallible,
    };

    use proptest::prelude::*;

    use super::*;

    const TICK_NS: u64 = 10_000_000;
    const PID: u32 = 7;

    /// What happens on the machine between two steps of a match.
    #[derive(Clone, Copy, Debug)]
    enum Happening {
        /// The process with the pid exits. Its hook may be skipped, and then its entry goes with the next of these.
        Exit { skipped: bool },
        /// It is reaped, and the pid is free.
        Reap,
        /// What a skipped hook left is found.
        Heal,
        /// The pids wrap around and another process gets it, so many ticks later; a member's child is entered.
        Reuse { ticks: u8, member: bool },
        /// The process that has the pid is taken out of its service.
        Release,
        /// Nothing that concerns the pid.
        Rest,
    }

    fn happening() -> impl Strategy<Value = Happening> {
        prop_oneof![
            any::<bool>().prop_map(|skipped| Happening::Exit { skipped }),
            Just(Happening::Reap),
            Just(Happening::Heal),
            (0_u8..3, any::<bool>()).prop_map(|(ticks, member)| Happening::Reuse { ticks, member }),
            Just(Happening::Release),
            Just(Happening::Rest),
        ]
    }

    /// One pid and those that have it, one after the other.
    struct Simulation {
        /// The start of the process that has the pid.
        owner: Cell<Option<u64>>,
        exited: Cell<bool>,
        now: Cell<u64>,
        /// The books: tgid → start.
        books: RefCell<HashMap<u32, u64>>,
        script: RefCell<Vec<Happening>>,
    }

    impl Simulation {
        fn happen(&self, happening: Happening) {
            match happening {
                Happening::Exit { skipped } if self.owner.get().is_some() && !self.exited.get() => {
                    self.exited.set(true);
                    if !skipped && self.books.borrow().get(&PID) == self.owner.get().as_ref() {
                        self.books.borrow_mut().remove(&PID);
                    }
                }
                Happening::Reap if self.exited.get() => self.owner.set(None),
                Happening::Heal if self.owner.get().is_none() => {
                    self.books.borrow_mut().remove(&PID);
                }
                Happening::Reuse { ticks, member } if self.owner.get().is_none() => {
                    // A whole turn of the pids within a tick does not happen before a skipped exit is found.
                    let ticks = if self.books.borrow().is_empty() {
                        ticks
                    } else {
                        ticks.max(1)
                    };
                    self.now.set(self.now.get() + u64::from(ticks) * TICK_NS + 1);
                    self.owner.set(Some(self.now.get()));
                    self.exited.set(false);
                    if member {
                        self.books.borrow_mut().insert(PID, self.now.get());
                    }
                }
                Happening::Release => {
                    self.books.borrow_mut().remove(&PID);
                }
                _ => {}
            }
        }

        fn step(&self) {
            let next = self.script.borrow_mut().pop();
            next.into_iter().for_each(|happening| self.happen(happening));
        }
    }

    impl Machine for &Simulation {
        /// The start of the process that was opened.
        type Handle = u64;
        type Error = Infallible;

        fn open(&self, _pid: u32) -> Result<Option<u64>, Infallible> {
            self.step();
            Ok(self.owner.get())
        }

        fn has_start_of(&self, _pid: u32, wanted: ProcessKey) -> Result<bool, Infallible> {
            self.step();
            let ticks = |start: u64| start / TICK_NS;
            let same = |start| ticks(start) == ticks(wanted.start_boottime_ns);
            Ok(self.owner.get().is_some_and(same))
        }

        fn is_recorded(&self, wanted: ProcessKey) -> Result<bool, Infallible> {
            self.step();
            Ok(self.books.borrow().get(&wanted.tgid) == Some(&wanted.start_boottime_ns))
        }
    }

    /// Matches the member that the books had at first while the script happens. Returns whom the match holds, if anyone.
    fn matched(script: Vec<Happening>) -> (u64, Option<u64>) {
        let start = 5 * TICK_NS;
        let simulation = Simulation {
            owner: Cell::new(Some(start)),
            exited: Cell::new(false),
            now: Cell::new(start),
            books: RefCell::new(HashMap::from([(PID, start)])),
            script: RefCell::new(script),
        };
        // What happens between the list and the match.
        for _ in 0..6 {
            simulation.step();
        }
        let wanted = ProcessKey {
            tgid: PID,
            start_boottime_ns: start,
        };
        let Ok(held) = matching(&&simulation, PID, wanted);
        (start, held)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn a_match_never_holds_a_stranger(script in prop::collection::vec(happening(), 0..12)) {
            let (wanted, held) = matched(script);
            prop_assert!(held.is_none_or(|held| held == wanted));
        }
    }

    #[test]
    fn a_member_that_stays_is_matched() {
        assert_eq!(matched(vec![Happening::Rest; 9]), (50_000_000, Some(50_000_000)));
    }

    #[test]
    fn a_pid_that_has_wrapped_around_is_not() {
        let script = [
            Happening::Rest,
            Happening::Rest,
            Happening::Rest,
            Happening::Reuse { ticks: 0, member: true },
            Happening::Reap,
            Happening::Exit { skipped: false },
        ];
        let reversed: Vec<_> = script.to_vec();
        assert_eq!(matched(reversed).1, None);
    }
}
