//! Every behaviour of the actor, without zinit-tracker: the oracle sees exactly its processes, and sees them gone.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getsid};
use zinit_tests::{
    Cleanup, Facts, Marker, Ready, Survivor, TestCgroup, actor_at, kill_all, lock_is_free, members, port_is_free,
    survivors,
};

/// A running behaviour, ready. Nothing of it is left when this is dropped.
struct Service {
    main: Child,
    marker: Marker,
    facts: Facts,
    _cleanup: Cleanup,
}

impl Service {
    fn start(behaviour: &str, args: &[&str]) -> Result<Self> {
        Self::start_marked(Marker::new(), behaviour, args)
    }

    fn start_marked(marker: Marker, behaviour: &str, args: &[&str]) -> Result<Self> {
        let cleanup = Cleanup::new(&marker);
        let mut ready = Ready::new()?;
        let mut command = actor_at(Path::new(env!("CARGO_BIN_EXE_actor")), behaviour, args, &marker);
        let main = ready
            .attach(&mut command)
            .spawn()
            .context("failed to start the actor")?;
        let mut service = Self {
            main,
            marker,
            facts: Facts::default(),
            _cleanup: cleanup,
        };
        service.facts = ready.wait().with_context(|| format!("{behaviour} {args:?}"))?;
        Ok(service)
    }

    fn survivors(&self) -> Vec<Survivor> {
        survivors(&self.marker)
    }

    fn main_pid(&self) -> i32 {
        self.main.id().cast_signed()
    }

    /// The processes apart from the main one.
    fn others(&self) -> Vec<Survivor> {
        self.survivors()
            .into_iter()
            .filter(|survivor| survivor.pid != self.main_pid())
            .collect()
    }

    fn terminate(&self) -> Result<()> {
        Ok(kill(Pid::from_raw(self.main_pid()), Signal::SIGTERM)?)
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        Ok(self.main.wait()?)
    }

    /// Kills all processes, each through its own pidfd, and sees that nothing is left.
    fn end(mut self) -> Result<()> {
        kill_all(&self.marker, Duration::from_secs(30))?;
        ensure!(
            self.survivors().is_empty(),
            "left after SIGKILL: {:?}",
            self.survivors()
        );
        self.wait()?;
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // The other processes are for `Cleanup`; the main one is a child of ours, so that somebody must wait for it.
        if let Err(error) = self.main.kill().and_then(|()| self.main.wait()) {
            eprintln!("failed to end the actor: {error}");
        }
    }
}

/// Starts a behaviour, expects exactly `count` processes, and ends them.
fn check(behaviour: &str, args: &[&str], count: usize) -> Result<()> {
    check_with(behaviour, args, count, |_| Ok(()))
}

/// Like [`check`], and looks closer while they rest.
fn check_with(
    behaviour: &str,
    args: &[&str],
    count: usize,
    look: impl FnOnce(&mut Service) -> Result<()>,
) -> Result<()> {
    let mut service = Service::start(behaviour, args)?;
    let found = service.survivors();
    ensure!(
        found.len() == count,
        "{behaviour} {args:?}: {count} processes expected: {found:#?}"
    );
    let found: BTreeSet<_> = found.iter().map(Survivor::member).collect();
    ensure!(members(&service.marker) == found, "{behaviour} {args:?} is not at rest");
    look(&mut service)?;
    service.end()
}

fn sessions(processes: &[Survivor]) -> Result<BTreeSet<Pid>> {
    processes
        .iter()
        .map(|process| Ok(getsid(Some(Pid::from_raw(process.pid)))?))
        .collect()
}

/// The value of a line of /proc/PID/status.
fn status_field(pid: i32, name: &str) -> Result<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(value
        .with_context(|| format!("no {name} in the status of {pid}"))?
        .trim()
        .to_owned())
}

fn ignores_term(pid: i32) -> Result<bool> {
    let ignored = u64::from_str_radix(&status_field(pid, "SigIgn")?, 16)?;
    Ok(ignored & 1 << (libc::SIGTERM - 1) != 0)
}

#[test]
fn rest_is_one_process() -> Result<()> {
    check("rest", &[], 1)
}

#[test]
fn a_child_stays_in_the_session() -> Result<()> {
    check_with("child", &[], 2, |service| {
        assert_eq!(sessions(&service.survivors())?.len(), 1);
        Ok(())
    })
}

#[test]
fn a_child_leaves_the_session() -> Result<()> {
    check_with("setsid", &[], 2, |service| {
        assert_eq!(sessions(&service.survivors())?.len(), 2);
        Ok(())
    })
}

#[test]
fn a_child_leaves_the_process_group() -> Result<()> {
    check_with("setpgid", &[], 2, |service| {
        let child = Pid::from_raw(service.others()[0].pid);
        assert_eq!(nix::unistd::getpgid(Some(child))?, child);
        Ok(())
    })
}

#[test]
fn a_daemon_loses_its_parent() -> Result<()> {
    check_with("double-fork", &[], 2, |service| {
        assert_ne!(service.others()[0].ppid, service.main_pid());
        assert_eq!(sessions(&service.survivors())?.len(), 2);
        Ok(())
    })
}

#[test]
fn a_daemon_outlives_the_main_process() -> Result<()> {
    let mut service = Service::start("double-fork-orphan", &[])?;
    assert!(service.wait()?.success());
    assert_eq!(service.survivors().len(), 1);
    service.end()
}

#[test]
fn a_child_outlives_the_main_process_and_its_status() -> Result<()> {
    let mut service = Service::start("spawn-and-exit", &["3"])?;
    assert_eq!(service.wait()?.code(), Some(3));
    assert_eq!(service.survivors().len(), 1);
    service.end()
}

#[test]
fn the_main_process_exits_on_term_with_its_status() -> Result<()> {
    let mut service = Service::start("exit-on-term", &["7"])?;
    service.terminate()?;
    assert_eq!(service.wait()?.code(), Some(7));
    assert_eq!(service.survivors(), []);
    Ok(())
}

#[test]
fn the_main_process_takes_its_time_on_term() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("done");
    let mut service = Service::start("slow-term", &[file.to_str().context("the path is text")?, "300"])?;
    let terminated = Instant::now();
    service.terminate()?;
    assert!(service.wait()?.success());
    assert!(terminated.elapsed() >= Duration::from_millis(300));
    let ended_ns: u128 = fs::read_to_string(&file)?.parse()?;
    let now = Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Monotonic))?;
    let since = Duration::from_nanos_u128(now.as_nanos() - ended_ns);
    assert!(since < Duration::from_secs(5), "ended {since:?} ago");
    Ok(())
}

#[test]
fn term_is_ignored() -> Result<()> {
    check_with("ignore-term", &[], 2, |service| {
        for process in service.survivors() {
            assert!(ignores_term(process.pid)?, "{process:?}");
        }
        Ok(())
    })
}

#[test]
fn term_is_ignored_by_grandchildren_in_sessions_of_their_own() -> Result<()> {
    check_with("ignore-term-grandchildren", &[], 5, |service| {
        let processes = service.survivors();
        assert_eq!(sessions(&processes)?.len(), 4);
        let ignoring = processes
            .iter()
            .map(|process| ignores_term(process.pid))
            .collect::<Result<Vec<_>>>()?;
        assert_eq!(ignoring.into_iter().filter(|ignores| *ignores).count(), 3);
        Ok(())
    })
}

#[test]
fn a_stopped_child_still_ends_by_itself() -> Result<()> {
    check_with("stopped", &[], 2, |service| {
        let child = &service.others()[0];
        assert_eq!(child.state, 'T');
        assert_eq!(service.facts.number::<i32>("stopped_pid")?, child.pid);
        let timers = fs::read_to_string(format!("/proc/{}/timers", child.pid))?;
        assert!(timers.contains("signal: 9/"), "{timers}");
        Ok(())
    })
}

#[test]
fn children_in_as_many_sessions() -> Result<()> {
    check_with("sessions", &["200"], 201, |service| {
        assert_eq!(sessions(&service.others())?.len(), 200);
        Ok(())
    })
}

#[test]
fn a_chain_of_generations() -> Result<()> {
    check_with("chain", &["100"], 101, |service| {
        let parents: BTreeSet<_> = service.others().iter().map(|process| process.ppid).collect();
        assert_eq!(parents.len(), 100, "each has a parent of its own");
        Ok(())
    })
}

#[test]
fn a_subreaper_gets_its_orphan() -> Result<()> {
    check_with("subreaper", &[], 3, |service| {
        let parents: BTreeSet<_> = service.others().iter().map(|process| process.ppid).collect();
        assert_eq!(parents.len(), 2);
        assert!(!parents.contains(&1));
        Ok(())
    })
}

#[test]
fn a_thread_forks_after_the_leader_has_exited() -> Result<()> {
    check_with("thread-fork", &[], 2, |service| {
        let leader = service
            .survivors()
            .into_iter()
            .find(|process| process.pid == service.main_pid());
        assert_eq!(
            leader
                .context("the oracle sees a process whose leader is a zombie")?
                .state,
            'Z'
        );
        Ok(())
    })
}

#[test]
fn a_child_is_created_by_vfork() -> Result<()> {
    check("vfork", &[], 2)
}

#[test]
fn a_child_is_created_by_posix_spawn() -> Result<()> {
    check("posix-spawn", &[], 2)
}

#[test]
fn a_grandchild_is_created_as_a_sibling() -> Result<()> {
    check_with("clone-parent", &[], 3, |service| {
        assert!(
            service
                .others()
                .iter()
                .all(|process| process.ppid == service.main_pid())
        );
        Ok(())
    })
}

#[test]
fn a_child_moves_to_another_cgroup() -> Result<()> {
    let Some(cgroup) = TestCgroup::new(Marker::new().as_str())? else {
        eprintln!("skipped: no writable cgroup version 2 hierarchy is mounted");
        return Ok(());
    };
    let dir = cgroup.path().to_str().context("the path is text")?.to_owned();
    check_with("cgroup-move", &[&dir], 2, |service| {
        let inside = fs::read_to_string(cgroup.path().join("cgroup.procs"))?;
        assert_eq!(inside.trim().parse::<i32>()?, service.others()[0].pid);
        Ok(())
    })?;
    drop(cgroup);
    assert!(!Path::new(&dir).exists());
    Ok(())
}

#[test]
fn a_child_opens_a_pid_namespace() -> Result<()> {
    check_with("pid-namespace", &[], 4, |service| {
        for process in service.others() {
            let pids = status_field(process.pid, "NSpid")?;
            let pids: Vec<_> = pids.split_whitespace().collect();
            assert!(pids.len() > 1, "{pids:?}");
        }
        Ok(())
    })
}

#[test]
fn a_child_opens_other_namespaces() -> Result<()> {
    check_with("namespaces", &[], 3, |service| {
        for process in service.others() {
            for kind in ["user", "mnt", "uts", "ipc"] {
                let theirs = fs::read_link(format!("/proc/{}/ns/{kind}", process.pid))?;
                assert_ne!(theirs, fs::read_link(format!("/proc/self/ns/{kind}"))?);
            }
        }
        Ok(())
    })
}

#[test]
fn a_child_has_no_environment() -> Result<()> {
    let marker = Marker::new();
    let service = Service::start_marked(marker.clone(), "clear-env", &[marker.as_str()])?;
    let others = service.others();
    assert_eq!(others.len(), 1, "{others:?}");
    assert_eq!(fs::read(format!("/proc/{}/environ", others[0].pid))?, b"");
    service.end()
}

#[test]
fn a_child_is_born_on_term() -> Result<()> {
    let mut service = Service::start("fork-on-term", &[])?;
    assert_eq!(service.survivors().len(), 1);
    service.terminate()?;
    assert!(service.wait()?.success());
    assert_eq!(service.survivors().len(), 1);
    service.end()
}

#[test]
fn a_chain_forks_itself_again_and_again_and_is_not_missed() -> Result<()> {
    let mut service = Service::start("refork-chain", &["8"])?;
    service.main.kill()?;
    service.wait()?;
    let mut seen = BTreeSet::new();
    let started = Instant::now();
    let lasts = |seconds| started.elapsed() < Duration::from_secs(seconds);
    // A busy machine may need seconds to look through its processes a few times.
    while lasts(2) || (seen.len() <= 3 && lasts(6)) {
        let found = service.survivors();
        assert!(!found.is_empty(), "missed after {} were seen", seen.len());
        seen.extend(found.iter().map(|survivor| survivor.pid));
    }
    assert!(seen.len() > 3, "the chain stands still at {seen:?}");
    service.end()
}

#[test]
fn a_chain_that_forks_itself_ends_in_time() -> Result<()> {
    let service = Service::start("refork-chain", &["1"])?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while !service.others().is_empty() {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(service.survivors().len(), 1);
    service.end()
}

#[test]
fn a_storm_replaces_what_is_killed() -> Result<()> {
    let service = Service::start("storm", &["30", "5"])?;
    let before = service.others();
    assert_eq!(before.len(), 29);
    let killed = before[0].member();
    assert!(zinit_tests::cleanup::kill(&killed)?);
    let deadline = Instant::now() + Duration::from_secs(4);
    while service.others().len() < 29 || service.others().iter().any(|process| process.member() == killed) {
        assert!(Instant::now() < deadline, "the killed process was not replaced");
    }
    service.end()
}

#[test]
fn a_storm_of_500_ends_in_time() -> Result<()> {
    let mut service = Service::start("storm", &["500", "4"])?;
    let count = service.survivors().len();
    assert!((490..=520).contains(&count), "{count} processes");
    assert!(service.wait()?.success());
    let deadline = Instant::now() + Duration::from_secs(10);
    while !service.survivors().is_empty() {
        assert!(Instant::now() < deadline);
    }
    Ok(())
}

#[test]
fn a_storm_of_500_can_be_killed() -> Result<()> {
    Service::start("storm", &["500"])?.end()
}

#[test]
fn a_daemon_holds_a_port() -> Result<()> {
    let service = Service::start("tcp", &["0"])?;
    let port = service.facts.number("port")?;
    assert_eq!(service.survivors().len(), 2);
    assert!(!port_is_free(port)?);
    service.end()?;
    assert!(port_is_free(port)?);
    check_with("tcp", &[&port.to_string()], 2, |_| {
        assert!(!port_is_free(port)?);
        Ok(())
    })
}

#[test]
fn a_daemon_holds_a_lock() -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    check_with("flock", &[file.path().to_str().context("the path is text")?], 2, |_| {
        assert!(!lock_is_free(file.path())?);
        Ok(())
    })?;
    assert!(lock_is_free(file.path())?);
    Ok(())
}

#[test]
fn the_oracle_and_random_trees_agree_on_how_many_live() -> Result<()> {
    let mut kinds = BTreeSet::new();
    for seed in 0..25 {
        let max = (20 + seed * 37 % 200).to_string();
        let service = Service::start("tree", &[&seed.to_string(), &max])?;
        let (created, alive) = (service.facts.get("created"), service.facts.number::<usize>("alive")?);
        assert_eq!(created, Some(max.as_str()));
        let found = service.survivors();
        assert_eq!(
            found.len(),
            alive,
            "seed {seed}, {max} processes: {:?}, {found:#?}",
            service.facts
        );
        kinds.extend(service.facts.iter().map(|(name, _)| name.to_owned()));
        service.end()?;
    }
    assert_eq!(kinds.len(), 16 + 2, "some kind of process never occurred: {kinds:?}");
    Ok(())
}

#[test]
fn a_random_tree_of_2000_comes_to_rest() -> Result<()> {
    let service = Service::start("tree", &["4711", "2000"])?;
    assert_eq!(service.survivors().len(), service.facts.number::<usize>("alive")?);
    service.end()
}

#[test]
fn a_random_tree_has_the_same_shape_every_time() -> Result<()> {
    let facts = || -> Result<Facts> { Ok(Service::start("tree", &["3", "80"])?.facts.clone()) };
    assert_eq!(facts()?, facts()?);
    Ok(())
}

#[test]
fn an_unknown_behaviour_is_reported_at_once() -> Result<()> {
    let marker = Marker::new();
    let mut ready = Ready::new()?;
    let mut command = actor_at(Path::new(env!("CARGO_BIN_EXE_actor")), "dance", [""; 0], &marker);
    let mut main = ready.attach(&mut command).spawn()?;
    let error = ready.wait().expect_err("the actor cannot dance");
    assert!(format!("{error:#}").contains("dance"), "{error:#}");
    assert_eq!(main.wait()?.into_raw(), 1 << 8);
    Ok(())
}
