//! What tracking costs whoever creates processes, one after the other.

use std::{cell::RefCell, process::Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use zinit_tracker::Tracker;

use crate::{
    figure::{Contestant, Row, Series, Target, Unit, alternate},
    load::{Load, Open, Pinned},
};

const NOTE: &str = "One processor for the loop, the programs loaded and removed in turn. Processor time is that of the loop and its \
                    processes; what else ran on the machine disturbs it less.";

/// By the clock, and of processor time, in ns.
type Times = (f64, f64);

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let (rounds, forks) = load.pick((4, 500), (60, 2000));
    let forks = forks.to_string();
    let arguments = ["forks", forks.as_str()];
    let _pinned = Pinned::to_one_cpu()?;
    // Contestants return the time by the clock; processor time is noted beside it.
    let cpu = RefCell::new([Vec::new(), Vec::new(), Vec::new()]);
    let each = |times: Times, who: usize| {
        let count: f64 = forks.parse().expect("it was a number");
        cpu.borrow_mut()[who].push(times.1 / count);
        times.0 / count
    };
    let contestants: Vec<Contestant<'_>> = vec![
        (
            "tracking, bystander".to_owned(),
            Box::new(|| {
                let open = Open::load(None)?;
                let times = run(load, &arguments)?;
                open.close()?;
                Ok(each(times, 0))
            }),
        ),
        (
            "no tracking".to_owned(),
            Box::new(|| Ok(each(run(load, &arguments)?, 1))),
        ),
        (
            "tracking, tracked".to_owned(),
            Box::new(|| {
                let open = Open::load(None)?;
                let times = run_tracked(load, &open.tracker, &arguments)?;
                open.close()?;
                Ok(each(times, 2))
            }),
        ),
    ];
    let by_clock = alternate(rounds, contestants)?;
    let by_processor = by_clock.iter().zip(cpu.into_inner()).map(|(series, values)| Series {
        name: series.name.clone(),
        values,
    });
    let by_processor: Vec<Series> = by_processor.collect();
    let mut rows = Vec::new();
    for (times, kind) in [(by_clock, "time"), (by_processor, "processor time")] {
        for (who, name, target) in [(0, "bystander", 1.01), (2, "tracked", 1.03)] {
            let what = format!("fork, exit and wait, {name}, {kind}");
            let row = Row::ratio(what, Unit::Nanoseconds, times[who].clone(), times[1].clone());
            rows.push(row.target(Target::Times(target)).note(NOTE));
        }
    }
    Ok(rows)
}

fn run(load: &Load, arguments: &[&str]) -> Result<Times> {
    let output = load.command(arguments).output()?;
    ensure!(output.status.success(), "the loop failed: {}", output.status);
    times(&output.stdout)
}

/// Runs the loop as a service.
pub(super) fn run_tracked(load: &Load, tracker: &Tracker, arguments: &[&str]) -> Result<Times> {
    let service = tracker.register("forks")?;
    let mut command = load.command(arguments);
    command.stdout(Stdio::piped());
    let output = load.runtime.block_on(async {
        let child = tracker.spawn(&service, &mut command.into())?;
        let output = child.wait_with_output().await?;
        tracker.wait_empty(&service).await?;
        anyhow::Ok(output)
    })?;
    tracker.unregister(&service)?;
    ensure!(output.status.success(), "the loop failed: {}", output.status);
    times(&output.stdout)
}

fn times(output: &[u8]) -> Result<Times> {
    let text = str::from_utf8(output)?;
    let Some((clock, cpu)) = text.trim().split_once(' ') else {
        bail!("the loop says {text:?}");
    };
    let number = |text: &str| text.parse().with_context(|| format!("the loop says {text:?}"));
    Ok((number(clock)?, number(cpu)?))
}
