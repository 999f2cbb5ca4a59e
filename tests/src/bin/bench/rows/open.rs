//! From nothing to a tracker that tracks, and to one that is there.

use std::time::Instant;

use anyhow::{Context as _, Result};
use zinit_tracker::Tracker;

use crate::{
    figure::{Contestant, Row, Target, Unit, alternate},
    load::{Load, Open, config},
};

pub(crate) fn measure(load: &Load) -> Result<Vec<Row>> {
    let standing = Open::load(None)?;
    let contestants: Vec<Contestant<'_>> = vec![
        (
            "join".to_owned(),
            Box::new(|| {
                let began = Instant::now();
                let joined = Tracker::open(&config(standing.pins.path()))?;
                let took = began.elapsed();
                drop(joined);
                Ok(took.as_nanos() as f64)
            }),
        ),
        (
            "load".to_owned(),
            Box::new(|| {
                let began = Instant::now();
                let open = Open::load(None)?;
                let took = began.elapsed();
                open.close()?;
                Ok(took.as_nanos() as f64)
            }),
        ),
    ];
    let mut series = alternate(load.pick(5, 31), contestants)?.into_iter();
    let (join, load) = (series.next().context("join")?, series.next().context("load")?);
    standing.close()?;
    Ok(vec![
        Row::figure("`Tracker::open`, nothing is loaded", Unit::Nanoseconds, load.clone())
            .target(Target::Figure(100e6)),
        Row::ratio("`Tracker::open`, pinned", Unit::Nanoseconds, join, load).target(Target::Figure(5e6)),
    ])
}
