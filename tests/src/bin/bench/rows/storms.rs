//! Services whose processes are others again and again, killed and known to be gone.

use std::{
    fs,
    os::fd::AsFd as _,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tempfile::TempDir;
use zinit_tests::Marker;
use zinit_tracker::stop;

use super::kill::at_once;
use crate::{
    figure::{Contestant, Row, Target, Unit, alternate_with_peers},
    load::{Load, Open},
    peers::{
        fifo::Fifo,
        systemd::{SYSTEMD, Systemd},
    },
};

/// Longer than any stop; then they end by themselves.
const SECONDS: &str = "40";

const NOTE: &str = "From the order to kill until the last process is gone. That to systemd goes by a whole `systemctl stop` (compare \
                    `command`), of a unit with `KillSignal=SIGKILL`. The kernel refuses a pid namespace that is being killed new \
                    processes, which no other one does.";

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let sizes = load.pick([50, 200], [500, 2000]);
    let rows: Result<Vec<_>> = sizes.into_iter().map(|size| of_size(load, size)).collect();
    Ok(rows?.concat())
}

fn of_size(load: &Load, size: usize) -> Result<Vec<Row>> {
    let what = format!("a storm of {size} processes killed");
    let size = size.to_string();
    let open = Open::load(None)?;
    let mut contestants: Vec<Contestant<'_>> = vec![
        ("library".to_owned(), Box::new(|| of_service(load, &open, &size))),
        ("pid namespace".to_owned(), Box::new(|| of_namespace(load, &size))),
    ];
    if Systemd::missing().is_none() {
        contestants.push((
            SYSTEMD.to_owned(),
            Box::new(|| {
                let systemd = Systemd::start(load, 1, &format!("storm {size} {SECONDS}"), true)?;
                Ok(systemd.stop()?.as_nanos() as f64)
            }),
        ));
    }
    let mut measured = alternate_with_peers(load.pick(1, 7), contestants).into_iter();
    open.close()?;
    let ours = measured.next().context("ours")?.series()?;
    let mut rows: Vec<_> = measured
        .map(|other| {
            let is_systemd = other.name == SYSTEMD;
            let row = other.beside(&what, Unit::Nanoseconds, &ours).note(NOTE);
            if is_systemd {
                row.target(Target::Times(1.0))
            } else {
                row
            }
        })
        .collect();
    if let Some(reason) = Systemd::missing() {
        rows.push(Row::skipped(format!("{what}, {SYSTEMD}"), reason).target(Target::Times(1.0)));
    }
    Ok(rows)
}

fn of_service(load: &Load, open: &Open, size: &str) -> Result<f64> {
    let (tracker, directory) = (&open.tracker, TempDir::new_in("/var/tmp")?);
    let fifo = Fifo::new_in(directory.path())?;
    let mut command = load.command(&["storm", size, SECONDS]);
    command.env(Fifo::ENV, fifo.path());
    let service = tracker.register("storm")?;
    let mut child = {
        let _runtime = load.runtime.enter();
        tracker.spawn(&service, &mut command.into())?
    };
    fifo.wait_for(1, || Ok(()))?;
    let began = Instant::now();
    load.runtime.block_on(stop(tracker, &service, &at_once()))?;
    let took = began.elapsed();
    fifo.wait_until_closed()?;
    load.runtime.block_on(child.wait())?;
    load.reap()?;
    ensure!(tracker.live(&service)? == 0, "there are members left");
    tracker.unregister(&service)?;
    Ok(took.as_nanos() as f64)
}

fn of_namespace(load: &Load, size: &str) -> Result<f64> {
    let directory = TempDir::new_in("/var/tmp")?;
    let fifo = Fifo::new_in(directory.path())?;
    let mut unshare = Command::new("unshare")
        .args(["--fork", "--pid", "--kill-child"])
        .arg(&load.subject)
        .args(["storm", size, SECONDS])
        .env(Fifo::ENV, fifo.path())
        .env(Marker::ENV, load.marker.as_str())
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("failed to start unshare")?;
    fifo.wait_for(1, || Ok(()))?;
    let pid = unshare.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let Some(init) = children.trim().parse().ok().and_then(Pid::from_raw) else {
        bail!("unshare has the children {children:?}");
    };
    let init = pidfd_open(init, PidfdFlags::empty())?;
    let began = Instant::now();
    pidfd_send_signal(&init, Signal::KILL)?;
    // It ends as the last one of its namespace.
    poll(&mut [PollFd::from_borrowed_fd(init.as_fd(), PollFlags::IN)], None)?;
    let took = began.elapsed();
    fifo.wait_until_closed()?;
    unshare.wait()?;
    load.reap()?;
    Ok(took.as_nanos() as f64)
}
