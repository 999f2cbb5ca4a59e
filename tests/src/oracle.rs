//! Finds the processes of a test by scanning /proc, knowing nothing of what zinit-tracker believes.
//!
//! A process belongs to a test if its marker is in the environment it was started with or in its arguments. Both are kept in
//! the process's own memory and inherited by fork; exec keeps the environment unless the program clears it, and the actors
//! that clear it carry the marker in their arguments.
//!
//! What this cannot see: a process that has lost its memory map and hangs on its way out (state D in exit). It still has a
//! pid, but nothing in /proc says whose it was.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Read;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// `PF_KTHREAD` of linux/sched.h: the task is a kernel thread.
const PF_KTHREAD: u64 = 0x0020_0000;

/// How long a process may show neither environment nor arguments: exec and exit pass through that state in microseconds.
const UNREADABLE_LIMIT: Duration = Duration::from_secs(1);

/// For how long the processes that are being created are looked at, each at its birth, when a scan cannot be certain.
const PURSUIT: Duration = Duration::from_millis(200);

/// How often that is repeated before nothing is taken for an answer.
const PURSUITS: usize = 10;

/// More than any environment or argument list of a test.
const ENVIRONMENT_SIZE: usize = 256 * 1024;

/// A string that no other test, of this run or another, uses.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Marker(String);

impl Marker {
    /// The environment variable that carries the marker.
    pub const ENV: &'static str = "ZINIT_TEST_MARKER";

    /// A new marker: the pid of this process, a counter, and 64 random bits.
    #[expect(
        clippy::new_without_default,
        reason = "each call gives another value, which no default should"
    )]
    pub fn new() -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let counter = COUNTER.fetch_add(1, Ordering::Relaxed);
        let random = RandomState::new().build_hasher().finish();
        Self(format!("{}{counter}-{random:016x}", Self::every_of(std::process::id())))
    }

    /// What every marker contains that the process with that pid has made or makes: passes for a marker of all their processes.
    pub fn every_of(pid: u32) -> Self {
        Self(format!("zinit-test-{pid}-"))
    }

    /// The marker itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Marker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A process, told from a later one with the same pid by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// The pid of the thread group, in the namespace of /proc.
    pub pid: i32,
    /// Start time since boot in clock ticks (10 ms): field 22 of /proc/PID/stat.
    pub start_time_ticks: u64,
}

/// A living process with the marker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survivor {
    /// The pid of the thread group, in the namespace of /proc.
    pub pid: i32,
    /// Start time since boot in clock ticks (10 ms).
    pub start_time_ticks: u64,
    /// The parent's pid, 0 if that is outside the namespace of /proc.
    pub ppid: i32,
    /// The state letter of the leading thread; `Z` means that it has exited while others live on.
    pub state: char,
    /// The name of the leading thread.
    pub comm: String,
}

impl Survivor {
    /// Which process it is.
    pub fn member(&self) -> Member {
        Member {
            pid: self.pid,
            start_time_ticks: self.start_time_ticks,
        }
    }
}

/// Every living process with the marker, in the order of their pids, without the calling process.
///
/// An empty answer is certain if nothing was created during the last scan. If something was, a chain of processes, each of
/// which forks the next and exits, may have stayed a step ahead of it, as it does nearly always. So the newest processes of
/// the machine are then looked at, each at its birth, for a fifth of a second, and all is repeated, up to ten times. The
/// member of such a chain that is found so comes last, and may have exited by now; the scan behind it may meet a later
/// member of the same chain as well. Beside other survivors it may be missing.
pub fn survivors(marker: &Marker) -> Vec<Survivor> {
    for _ in 0..PURSUITS {
        let before = last_created_pid();
        let found = scan(marker);
        if before == last_created_pid() {
            return found;
        }
        let newest = pursue(marker);
        // Whatever was created in the meantime and stays is found now.
        let mut found = scan(marker);
        found.extend(newest.filter(|newest| found.iter().all(|survivor| survivor.pid != newest.pid)));
        if !found.is_empty() {
            return found;
        }
    }
    Vec::new()
}

/// Every living process with the marker, as a set, without the calling process. Exact for a tree at rest; one scan.
pub fn members(marker: &Marker) -> BTreeSet<Member> {
    scan(marker).iter().map(Survivor::member).collect()
}

/// When the process with that pid was started, if there is one: field 22 of /proc/PID/stat, in clock ticks since boot.
pub fn start_time_ticks(pid: i32) -> Option<u64> {
    Stat::read(&format!("/proc/{pid}")).map(|stat| stat.start_time_ticks)
}

/// Where a process stands, by which some look for it. Ids are those of the namespace of /proc, 0 if they are outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The parent's pid.
    pub parent: i32,
    /// The process group.
    pub group: i32,
    /// The session.
    pub session: i32,
}

/// Where the process with that pid stands now, if there is one: fields 4 to 6 of /proc/PID/stat.
pub fn place(pid: i32) -> Option<Place> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let (_, fields) = stat.rsplit_once(')')?;
    let mut numbers = fields.split_whitespace().skip(1).map_while(|field| field.parse().ok());
    Some(Place {
        parent: numbers.next()?,
        group: numbers.next()?,
        session: numbers.next()?,
    })
}

/// The cgroup of version 2 of the process with that pid, if there is one.
pub fn cgroup(pid: i32) -> Option<String> {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    Some(path.to_owned())
}

/// The pid that was given out last, in the namespace of the caller: it changes with every new process and thread.
fn last_created_pid() -> i32 {
    let load = fs::read_to_string("/proc/loadavg").expect("/proc is mounted wherever the tests run");
    load.split_whitespace()
        .last()
        .and_then(|pid| pid.parse().ok())
        .expect("/proc/loadavg ends with the last pid")
}

/// The first process with the marker in its environment among those that are created from now on, if there is one before long.
///
/// It may have exited again when this returns; its state then says so.
fn pursue(marker: &Marker) -> Option<Survivor> {
    let started = Instant::now();
    let mut environment = vec![0; ENVIRONMENT_SIZE];
    while started.elapsed() < PURSUIT {
        // The one after the last may exist by the time that it is looked at, and the one before it may live on.
        let last = last_created_pid();
        for pid in [last + 1, last, last - 1] {
            let length = read_into(&format!("/proc/{pid}/environ"), &mut environment);
            if contains(&environment[..length], marker) && is_process(pid) {
                return Some(match Stat::read(&format!("/proc/{pid}")) {
                    Some(stat) => stat.into_survivor(pid),
                    None => Survivor {
                        pid,
                        start_time_ticks: 0,
                        ppid: 0,
                        state: 'X',
                        comm: String::new(),
                    },
                });
            }
        }
    }
    None
}

/// Whether a pid is that of a process, not of a thread that does not lead one: /proc does not list those, but opens them.
fn is_process(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    // One that has gone in the meantime is taken for a process.
    status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:"))
        .is_none_or(|tgid| tgid.trim() == pid.to_string())
}

fn scan(marker: &Marker) -> Vec<Survivor> {
    let own_pid = std::process::id().cast_signed();
    let entries = fs::read_dir("/proc").expect("/proc is mounted wherever the tests run");
    let mut found: Vec<_> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own_pid)
        .filter_map(|pid| inspect(pid, marker))
        .collect();
    found.sort_by_key(|survivor| survivor.pid);
    found
}

/// The process with that pid, if it lives and carries the marker.
fn inspect(pid: i32, marker: &Marker) -> Option<Survivor> {
    let started = Instant::now();
    let mut stranger = Stranger::default();
    loop {
        let stat = Stat::read(&format!("/proc/{pid}"))?;
        if stat.flags & PF_KTHREAD != 0 {
            return None;
        }
        let dir = match stat.is_dead() {
            true => living_thread(pid)?,
            false => format!("/proc/{pid}"),
        };
        let environment = read_at_once(&format!("{dir}/environ"));
        let arguments = read_at_once(&format!("{dir}/cmdline"));
        if contains(&environment, marker) || contains(&arguments, marker) {
            return Some(stat.into_survivor(pid));
        }
        if stranger.is_certain(&stat, &environment, &arguments) || started.elapsed() > UNREADABLE_LIMIT {
            return None;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Tells a process without the marker from one that is in the middle of exec or exit, whose marker cannot be read.
///
/// Both are empty for a while then, the bounds of the arguments are set a moment before those of the environment, and a
/// process that executes one program after another can be met in such a moment again and again. Each program has a stack
/// of its own, at a random address: what is seen again at the same address, and not empty, is what there is.
#[derive(Default)]
struct Stranger {
    arguments_address: u64,
    times: usize,
}

impl Stranger {
    /// How often a process with arguments and no environment must be seen: some are started that way.
    const TIMES_WITHOUT_ENVIRONMENT: usize = 5;

    fn is_certain(&mut self, stat: &Stat, environment: &[u8], arguments: &[u8]) -> bool {
        if arguments.is_empty() || stat.arguments_address != self.arguments_address {
            *self = Self {
                arguments_address: stat.arguments_address,
                times: 0,
            };
        }
        self.times += usize::from(!arguments.is_empty());
        self.times
            >= if environment.is_empty() {
                Self::TIMES_WITHOUT_ENVIRONMENT
            } else {
                2
            }
    }
}

/// The directory of a thread that lives on after the leader of its group has exited.
fn living_thread(pid: i32) -> Option<String> {
    fs::read_dir(format!("/proc/{pid}/task"))
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path().to_str()?.to_owned()))
        .find(|dir| Stat::read(dir).is_some_and(|stat| !stat.is_dead()))
}

/// The contents of a file of /proc; empty if the process has gone or is not ours to read, which no process of a test is.
fn read_at_once(path: &str) -> Vec<u8> {
    let mut bytes = vec![0; ENVIRONMENT_SIZE];
    let length = read_into(path, &mut bytes);
    bytes.truncate(length);
    bytes
}

/// One read, since a program that is replaced between two of them leaves the end of its environment unread.
fn read_into(path: &str, bytes: &mut [u8]) -> usize {
    fs::File::open(path).and_then(|mut file| file.read(bytes)).unwrap_or(0)
}

fn contains(bytes: &[u8], marker: &Marker) -> bool {
    String::from_utf8_lossy(bytes).contains(marker.as_str())
}

/// What /proc/PID/stat says about a process or a thread.
struct Stat {
    comm: String,
    state: char,
    ppid: i32,
    flags: u64,
    start_time_ticks: u64,
    arguments_address: u64,
}

impl Stat {
    /// Reads the stat file in a directory of /proc, unless the process has gone.
    fn read(dir: &str) -> Option<Self> {
        let bytes = fs::read(format!("{dir}/stat")).ok()?;
        Self::parse(&String::from_utf8_lossy(&bytes))
    }

    /// The name stands in parentheses and may contain some itself, so the fields are counted from the last one.
    fn parse(line: &str) -> Option<Self> {
        let (head, tail) = line.rsplit_once(')')?;
        let (_, comm) = head.split_once('(')?;
        let fields: Vec<_> = tail.split_whitespace().collect();
        Some(Self {
            comm: comm.to_owned(),
            state: fields.first()?.chars().next()?,
            ppid: fields.get(1)?.parse().ok()?,
            flags: fields.get(6)?.parse().ok()?,
            start_time_ticks: fields.get(19)?.parse().ok()?,
            arguments_address: fields.get(45)?.parse().ok()?,
        })
    }

    fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }

    fn into_survivor(self, pid: i32) -> Survivor {
        let Self {
            comm,
            state,
            ppid,
            start_time_ticks,
            ..
        } = self;
        Survivor {
            pid,
            start_time_ticks,
            ppid,
            state,
            comm,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::cleanup::{Cleanup, kill_all};

    /// A process that rests until it is killed, or for a minute.
    fn sleeper() -> Command {
        let mut command = Command::new("sleep");
        command.arg("60").stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn pids(marker: &Marker) -> Vec<i32> {
        survivors(marker).iter().map(|survivor| survivor.pid).collect()
    }

    fn end(mut child: Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn markers_differ() {
        assert_ne!(Marker::new(), Marker::new());
    }

    #[test]
    fn what_all_markers_of_a_process_have_finds_the_processes_of_each() {
        let marker = Marker::new();
        let _cleanup = Cleanup::new(&marker);
        let child = sleeper().env(Marker::ENV, marker.as_str()).spawn().unwrap();
        assert!(pids(&Marker::every_of(std::process::id())).contains(&child.id().cast_signed()));
        assert!(!pids(&Marker::every_of(u32::MAX)).contains(&child.id().cast_signed()));
        end(child);
    }

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let line = "12 (a) R (b) S 3 12 12 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 23 24 25 26 27 28 29 30 31 32 33 \
                    34 35 36 37 38 39 40 41 42 43 44 45 46 47 4711 49 50 51 52";
        let stat = Stat::parse(line).unwrap();
        assert_eq!((stat.comm.as_str(), stat.state, stat.ppid), ("a) R (b", 'S', 3));
        assert_eq!(
            (stat.flags, stat.start_time_ticks, stat.arguments_address),
            (4_194_560, 98_765, 4_711)
        );
    }

    #[test]
    fn a_process_is_found_by_its_environment_and_no_other_is() {
        let (marker, other) = (Marker::new(), Marker::new());
        let _cleanup = (Cleanup::new(&marker), Cleanup::new(&other));
        let child = sleeper().env(Marker::ENV, marker.as_str()).spawn().unwrap();
        let stranger = sleeper().env(Marker::ENV, other.as_str()).spawn().unwrap();

        let found = survivors(&marker);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].pid, child.id().cast_signed());
        assert_eq!(found[0].ppid, std::process::id().cast_signed());
        assert_eq!(found[0].comm, "sleep");
        assert_eq!(members(&marker), BTreeSet::from([found[0].member()]));
        end(child);
        end(stranger);
        assert_eq!(survivors(&marker), []);
    }

    #[test]
    fn a_process_with_a_cleared_environment_is_found_by_its_arguments() {
        let marker = Marker::new();
        let _cleanup = Cleanup::new(&marker);
        // The name of the program is an argument like any other, and sleep does not look at it.
        let child = sleeper().env_clear().arg0(marker.as_str()).spawn().unwrap();
        assert_eq!(fs::read(format!("/proc/{}/environ", child.id())).unwrap(), b"");
        assert_eq!(pids(&marker), [child.id().cast_signed()]);
        end(child);
    }

    #[test]
    fn a_zombie_is_no_survivor() {
        let marker = Marker::new();
        let mut child = sleeper().env(Marker::ENV, marker.as_str()).spawn().unwrap();
        assert_eq!(kill_all(&marker, Duration::from_secs(10)).unwrap(), 1);
        assert!(
            Stat::read(&format!("/proc/{}", child.id())).unwrap().is_dead(),
            "not waited for, so a zombie"
        );
        assert_eq!(survivors(&marker), []);
        assert_eq!(members(&marker), BTreeSet::new());
        child.wait().unwrap();
    }

    #[test]
    fn a_descendant_that_left_its_session_and_parent_is_found() {
        let marker = Marker::new();
        let _cleanup = Cleanup::new(&marker);
        let status = Command::new("sh")
            .args(["-c", "setsid sleep 60 </dev/null >/dev/null 2>&1 &"])
            .env(Marker::ENV, marker.as_str())
            .status()
            .unwrap();
        assert!(status.success());
        let found = survivors(&marker);
        assert_eq!(found.len(), 1, "{found:?}");
        kill_all(&marker, Duration::from_secs(10)).unwrap();
        assert_eq!(survivors(&marker), []);
    }

    #[test]
    fn nothing_is_missed_while_a_process_keeps_changing_its_program() {
        let marker = Marker::new();
        let _cleanup = Cleanup::new(&marker);
        let again = "n=$1; [ $n = 0 ] && exec sleep 60; exec sh -c \"$0\" \"$0\" $((n - 1))";
        let mut command = Command::new("sh");
        command
            .args(["-c", again, again, "500"])
            .env(Marker::ENV, marker.as_str());
        let child = command.spawn().unwrap();
        while survivors(&marker).iter().all(|survivor| survivor.comm != "sleep") {
            assert_eq!(pids(&marker), [child.id().cast_signed()]);
        }
        end(child);
    }
}
