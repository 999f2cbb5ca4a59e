//! The members of a service among other processes.

use std::{
    collections::{HashMap, HashSet},
    fs,
    hint::black_box,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use zinit_tests::Ready;
use zinit_tracker::{Service, Tracker, stop};

use super::kill::{at_once, kill};
use crate::{
    figure::{Contestant, Row, Target, Unit, alternate},
    load::{Load, Open},
};

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let size = load.pick(500, 10_000);
    let open = Open::load(None)?;
    let mut ready = Ready::new()?;
    let mut command = load.command(&["sessions", &size.to_string()]);
    let mut others = ready.attach(&mut command).spawn()?;
    ready.wait()?;
    let (service, child) = load.tracked_sessions(&open.tracker, size)?;
    let root = child.id().context("it has not been waited for")?;
    let contestants: Vec<Contestant<'_>> = vec![
        (
            "library".to_owned(),
            Box::new(|| Ok(listed(&open.tracker, &service, size)?.as_nanos() as f64)),
        ),
        (
            "/proc walk".to_owned(),
            Box::new(|| {
                let began = Instant::now();
                let found = black_box(descendants(root)?);
                let took = began.elapsed();
                ensure!(found.len() == size + 1, "/proc shows {} descendants", found.len());
                Ok(took.as_nanos() as f64)
            }),
        ),
    ];
    let mut series = alternate(load.pick(5, 21), contestants)?.into_iter();
    let (ours, theirs) = (series.next().context("ours")?, series.next().context("theirs")?);
    kill(load, &open.tracker, &service, child, size)?;
    // A member of nothing: its descendants go as those of a service that takes them in.
    let adopted = open.tracker.register("others")?;
    open.tracker.adopt(&adopted, others.id())?;
    load.runtime.block_on(stop(&open.tracker, &adopted, &at_once()))?;
    others.wait()?;
    load.reap()?;
    open.tracker.unregister(&adopted)?;
    open.close()?;
    let what = format!("list {size} members among {} processes", 2 * size);
    Ok(vec![
        Row::ratio(what, Unit::Nanoseconds, ours, theirs).target(Target::Times(0.02)),
    ])
}

/// How long it takes to list the members of the service, which are so many and the one that created them.
pub(super) fn listed(tracker: &Tracker, service: &Service, size: usize) -> Result<Duration> {
    let began = Instant::now();
    let members = black_box(tracker.processes(service)?);
    let took = began.elapsed();
    ensure!(members.len() == size + 1, "{} members are listed", members.len());
    Ok(took)
}

/// The process and its descendants, by who is whose parent now: an orphan would be missed.
fn descendants(root: u32) -> Result<HashSet<u32>> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // One that is gone by now is nobody's child.
        let Ok(stat) = fs::read(format!("/proc/{pid}/stat")) else {
            continue;
        };
        // Behind the name in parentheses: the state, and the parent.
        let end = stat
            .iter()
            .rposition(|byte| *byte == b')')
            .context("a name has an end")?;
        let mut fields = stat[end + 1..].split(|byte| *byte == b' ').skip(2);
        let parent = fields.next().and_then(|field| str::from_utf8(field).ok()?.parse().ok());
        children
            .entry(parent.context("a process has a parent")?)
            .or_default()
            .push(pid);
    }
    let mut found = HashSet::from([root]);
    let mut open = vec![root];
    while let Some(parent) = open.pop() {
        for child in children.get(&parent).into_iter().flatten() {
            if found.insert(*child) {
                open.push(*child);
            }
        }
    }
    Ok(found)
}
