//! `soak SECONDS`: a daemon works for so long on what chance asks for, and what it and the kernel keep for it is looked at the while.
//!
//! Every look is a line; the end is an error if something has grown, if the books ever said anything else than `/proc` does, or if
//! a service was not what it was wanted to be. `ZINIT_TEST_SEED` chooses what is done.

#![allow(clippy::unwrap_used, reason = "it fails by panicking, as tests do")]

mod sample;
mod work;

use std::time::{Duration, Instant};

use sample::{Sample, grown};
use work::Workshop;
use zinit_tests::random::Random;

/// Looks in all: so many that medians of parts of them mean something, and so few that there is work in between.
const LOOKS: std::ops::RangeInclusive<u64> = 4..=60;

/// What a look takes, with what it compares, is less by far.
const SECONDS_PER_LOOK: u64 = 20;

fn main() {
    let seconds = std::env::args().nth(1).and_then(|seconds| seconds.parse().ok());
    let Some(seconds) = seconds.filter(|seconds| *seconds > 0) else {
        eprintln!("usage: soak SECONDS");
        std::process::exit(2);
    };
    let Random(seed) = Random::seeded(1);
    println!("seed {seed}, {seconds} s");
    let began = Instant::now();
    let whole = Duration::from_secs(seconds);
    let mut random = Random(seed);
    let mut workshop = Workshop::open();
    let mut samples = Vec::new();
    println!("{}", Sample::HEADER);
    let looks = u32::try_from((seconds / SECONDS_PER_LOOK).clamp(*LOOKS.start(), *LOOKS.end())).unwrap();
    for look in 1..=looks {
        while began.elapsed() < whole / looks * look {
            workshop.work(&mut random);
        }
        workshop.compare();
        let sample = Sample::take(began.elapsed(), &workshop);
        println!("{sample}");
        samples.push(sample);
    }
    let done = workshop.close();
    println!("{done}");
    let grown = grown(&samples);
    if !grown.is_empty() {
        eprintln!("soak: it grows: {}", grown.join(", "));
        std::process::exit(1);
    }
    println!("nothing has grown, no counter has drifted, no service was lost");
}
