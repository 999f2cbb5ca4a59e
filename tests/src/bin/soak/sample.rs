//! What the daemon, and the kernel for it, keep at one moment.

use std::{fmt, fs, time::Duration};

use crate::work::Workshop;

/// One look.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    at: Duration,
    operations: u64,
    forks: u64,
    /// Resident memory of the daemon in bytes.
    resident: u64,
    descriptors: u64,
    threads: u64,
    /// What the kernel accounts to the maps and programs that the daemon holds, in bytes.
    kernel: u64,
    /// Processes in the books.
    live: u64,
}

impl Sample {
    pub(crate) const HEADER: &str = "     s  operations      forks   RSS KiB  descriptors  threads  kernel KiB  live";

    pub(crate) fn take(at: Duration, workshop: &Workshop) -> Self {
        let process = format!("/proc/{}", workshop.daemon.process().as_raw_nonzero());
        let status = fs::read_to_string(format!("{process}/status")).unwrap();
        let field = |name: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let mut descriptors = 0;
        let mut kernel = 0;
        for entry in fs::read_dir(format!("{process}/fdinfo")).unwrap() {
            // It may be closed by now.
            let Ok(info) = fs::read_to_string(entry.unwrap().path()) else {
                continue;
            };
            descriptors += 1;
            let memory = info.lines().find_map(|line| line.strip_prefix("memlock:"));
            kernel += memory.map_or(0, |bytes| bytes.trim().parse::<u64>().unwrap());
        }
        Self {
            at,
            operations: workshop.operations(),
            forks: workshop.forks(),
            resident: field("VmRSS:") * 1024,
            descriptors,
            threads: field("Threads:"),
            kernel,
            live: workshop.live(),
        }
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:6}  {:10} {:10}  {:8}  {:11}  {:7}  {:10}  {:4}",
            self.at.as_secs(),
            self.operations,
            self.forks,
            self.resident / 1024,
            self.descriptors,
            self.threads,
            self.kernel / 1024,
            self.live
        )
    }
}

type Figure = fn(&Sample) -> u64;

/// What has grown from the second quarter of the time to the last: in the first there may still be caches to fill.
pub(crate) fn grown(samples: &[Sample]) -> Vec<String> {
    let quarter = samples.len() / 4;
    let (early, late) = (&samples[quarter..2 * quarter], &samples[samples.len() - quarter..]);
    // Memory comes in pages and arenas, descriptors and threads are held for as long as something is under way.
    let figures: [(&str, Figure, u64); 5] = [
        ("resident memory", |sample| sample.resident, 1024 * 1024),
        ("descriptors", |sample| sample.descriptors, 4),
        ("threads", |sample| sample.threads, 4),
        ("memory of maps and programs", |sample| sample.kernel, 0),
        ("processes in the books", |sample| sample.live, 8),
    ];
    let grows = figures.into_iter().filter_map(|(name, figure, slack)| {
        let (early, late) = (median(early, figure), median(late, figure));
        (late > early + early / 20 + slack).then(|| format!("{name} from {early} to {late}"))
    });
    grows.collect()
}

fn median(samples: &[Sample], figure: Figure) -> u64 {
    let mut figures: Vec<_> = samples.iter().map(figure).collect();
    figures.sort_unstable();
    figures[figures.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(resident: impl Fn(u64) -> u64) -> Vec<Sample> {
        let sample = |number| Sample {
            at: Duration::from_secs(number),
            operations: number,
            forks: 10 * number,
            resident: resident(number),
            descriptors: 30,
            threads: 5,
            kernel: 7,
            live: 20,
        };
        (0..40).map(sample).collect()
    }

    #[test]
    fn what_grows_is_told_from_what_came_at_the_beginning() {
        assert_eq!(
            grown(&samples(|number| 20_000_000 + number.min(9) * 3_000_000)),
            [""; 0]
        );
        assert_eq!(grown(&samples(|number| 20_000_000 + number % 7 * 100_000)), [""; 0]);
        let grown = grown(&samples(|number| 20_000_000 + number * 200_000));
        assert_eq!(grown, ["resident memory from 23000000 to 27000000"]);
    }
}
