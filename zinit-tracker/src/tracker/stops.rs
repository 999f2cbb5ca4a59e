//! What came of stops: counted for each service by its name, with what the last one found.
//!
//! A record that whoever stops leaves for those who ask later. Nothing is decided by it.

use std::time::Duration;

use zinit_ebpf::{INSTANCE_LEN, NAME_LEN, STOP_BOUNDS_NS, ServiceName, Stops, stop_doubt, stop_flag};

use super::{
    Tracker, TrackerError,
    service::{ServiceId, ServiceInfo, padded, text},
};

/// The reasons of doubts, and how the record has them.
const DOUBTS: [(&str, u32); 9] = [
    ("lost-operations", stop_doubt::LOST_OPERATIONS),
    ("missed-creations", stop_doubt::MISSED_CREATIONS),
    ("adopted", stop_doubt::ADOPTED),
    ("unwatched", stop_doubt::UNWATCHED),
    ("detached-hooks", stop_doubt::DETACHED_HOOKS),
    ("replaced-pins", stop_doubt::REPLACED_PINS),
    ("out-of-sight", stop_doubt::OUT_OF_SIGHT),
    ("unobserved-deaths", stop_doubt::UNOBSERVED_DEATHS),
    ("contradictory-books", stop_doubt::CONTRADICTORY_BOOKS),
];

/// The stops of a service, by whatever client, under any id that it had; those that found nobody count as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceStops {
    /// Who manages the service.
    pub instance: String,
    /// Its name.
    pub name: String,
    /// How many came to an end, well or not.
    pub count: u64,
    /// Those in which members had to be killed.
    pub killed: u64,
    /// Those that left survivors.
    pub survived: u64,
    /// How many survivors those left.
    pub survivors: u64,
    /// Those that left nobody, without proof.
    pub unproven: u64,
    /// How long they took together.
    pub elapsed: Duration,
    /// How many took how long: no longer than this; `None`: longer than the longest bound. None counts twice.
    pub took: Vec<(Option<Duration>, u64)>,
    /// The last one.
    pub last: LastStop,
}

/// What came of a stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastStop {
    /// When it was requested, since boot.
    pub requested: Duration,
    /// The number that the service had.
    pub service: ServiceId,
    /// From the request to the end of verification.
    pub elapsed: Duration,
    /// From the end of the grace period; `None`: nobody had to be killed.
    pub killing: Option<Duration>,
    /// How often members were listed and killed.
    pub kill_rounds: u32,
    /// Whether a gate kept members from forking.
    pub gate: bool,
    /// Members that were alive during it.
    pub processes: u32,
    /// Members that are left.
    pub survivors: u32,
    /// Whether it is certain that nothing was left.
    pub proven: bool,
    /// What spoke against it, by [`Doubt::reason`](crate::stop::Doubt::reason).
    pub doubts: Vec<&'static str>,
}

impl Tracker {
    /// The stops of every service, the last that was stopped first. Of services that differ in name, the kernel keeps about 1,024, those
    /// that were stopped last, until nothing is tracked any more. At level `procfs` there are none.
    ///
    /// # Errors
    ///
    /// When the map cannot be read.
    pub fn stops(&self) -> Result<Vec<ServiceStops>, TrackerError> {
        let mut stops: Vec<_> = self.books.stops()?.iter().map(ServiceStops::new).collect();
        stops.sort_by(|a, b| b.last.requested.cmp(&a.last.requested).then(a.name.cmp(&b.name)));
        Ok(stops)
    }

    /// Leaves a record of a stop that has come to an end.
    pub(crate) fn record_stop(&self, info: &ServiceInfo, stop: &LastStop) {
        let name = ServiceName {
            instance: padded::<INSTANCE_LEN>(&info.instance),
            name: padded::<NAME_LEN>(&info.name),
        };
        if let Err(error) = self.books.change_stops(&name, |stops| stop.add_to(stops)) {
            tracing::debug!(
                error = &error as &dyn std::error::Error,
                service = info.name,
                "no record of its stop"
            );
        }
    }
}

impl LastStop {
    fn add_to(&self, stops: &mut Stops) {
        let elapsed_ns = nanoseconds(self.elapsed);
        let place = STOP_BOUNDS_NS.iter().position(|bound| elapsed_ns <= *bound);
        let counters = [
            (&mut stops.count, 1),
            (&mut stops.killed, self.killing.is_some().into()),
            (&mut stops.survived, (self.survivors > 0).into()),
            (&mut stops.survivors, self.survivors.into()),
            (&mut stops.unproven, (self.survivors == 0 && !self.proven).into()),
            (&mut stops.elapsed_ns, elapsed_ns),
            (&mut stops.took[place.unwrap_or(STOP_BOUNDS_NS.len())], 1),
        ];
        for (counter, more) in counters {
            // Whatever has been written there.
            *counter = counter.saturating_add(more);
        }
        let flag = |holds, flag| if holds { flag } else { 0 };
        let doubts = DOUBTS.iter().filter(|(reason, _)| self.doubts.contains(reason));
        *stops = Stops {
            last_boottime_ns: nanoseconds(self.requested),
            last_elapsed_ns: elapsed_ns,
            last_killing_ns: self.killing.map_or(0, |killing| nanoseconds(killing).max(1)),
            last_service: self.service.number(),
            last_processes: self.processes,
            last_survivors: self.survivors,
            last_kill_rounds: self.kill_rounds,
            last_flags: flag(self.proven, stop_flag::PROVEN) | flag(self.gate, stop_flag::GATE),
            last_doubts: doubts.fold(0, |bits, (_, bit)| bits | bit),
            ..*stops
        };
    }
}

impl ServiceStops {
    fn new((name, stops): &(ServiceName, Stops)) -> Self {
        let bounds = STOP_BOUNDS_NS.iter().map(|bound| Some(Duration::from_nanos(*bound)));
        let has = |bit| stops.last_flags & bit != 0;
        let doubts = DOUBTS.iter().filter(|(_, bit)| stops.last_doubts & bit != 0);
        Self {
            instance: text(&name.instance),
            name: text(&name.name),
            count: stops.count,
            killed: stops.killed,
            survived: stops.survived,
            survivors: stops.survivors,
            unproven: stops.unproven,
            elapsed: Duration::from_nanos(stops.elapsed_ns),
            took: bounds.chain([None]).zip(stops.took).collect(),
            last: LastStop {
                requested: Duration::from_nanos(stops.last_boottime_ns),
                service: ServiceId(stops.last_service),
                elapsed: Duration::from_nanos(stops.last_elapsed_ns),
                killing: (stops.last_killing_ns > 0).then(|| Duration::from_nanos(stops.last_killing_ns)),
                kill_rounds: stops.last_kill_rounds,
                gate: has(stop_flag::GATE),
                processes: stops.last_processes,
                survivors: stops.last_survivors,
                proven: has(stop_flag::PROVEN),
                doubts: doubts.map(|(reason, _)| *reason).collect(),
            },
        }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stop::Doubt;

    fn stop(millis: u64, survivors: u32, doubts: &[&'static str]) -> LastStop {
        LastStop {
            requested: Duration::from_secs(millis),
            service: ServiceId(7),
            elapsed: Duration::from_millis(millis),
            killing: (millis > 100).then_some(Duration::ZERO),
            kill_rounds: 2,
            gate: survivors > 0,
            processes: 3,
            survivors,
            proven: survivors == 0 && doubts.is_empty(),
            doubts: doubts.to_vec(),
        }
    }

    #[test]
    fn stops_add_up_and_the_last_is_remembered() {
        let mut stops = Stops::default();
        for stop in [
            stop(1, 0, &[]),
            stop(2, 0, &["adopted"]),
            stop(70_000, 4, &["unwatched", "unobserved-deaths"]),
        ] {
            stop.add_to(&mut stops);
            let name = ServiceName {
                instance: padded("test"),
                name: padded("web"),
            };
            let mut last = ServiceStops::new(&(name, stops)).last;
            // A record without a grace period has some.
            last.killing = last.killing.map(|_| Duration::ZERO);
            assert_eq!(last, stop);
        }
        let name = ServiceName {
            instance: padded("test"),
            name: padded("web"),
        };
        let all = ServiceStops::new(&(name, stops));
        assert_eq!((all.instance.as_str(), all.name.as_str()), ("test", "web"));
        assert_eq!(
            (all.count, all.killed, all.survived, all.survivors, all.unproven),
            (3, 1, 1, 4, 1)
        );
        assert_eq!(all.elapsed, Duration::from_millis(70_003));
        let counted: Vec<_> = all.took.iter().filter(|(_, count)| *count > 0).cloned().collect();
        let millis = |bound| Some(Duration::from_micros(bound));
        assert_eq!(counted, [(millis(1_000), 1), (millis(2_500), 1), (None, 1)]);
    }

    #[test]
    fn whatever_was_written_there_is_read_and_added_to() {
        let mut stops = Stops {
            count: u64::MAX,
            elapsed_ns: u64::MAX,
            took: [u64::MAX; _],
            last_flags: u32::MAX,
            last_doubts: u32::MAX,
            ..Stops::default()
        };
        stop(1, 0, &[]).add_to(&mut stops);
        assert_eq!((stops.count, stops.last_doubts), (u64::MAX, 0));
    }

    #[test]
    fn every_doubt_of_the_kernels_books_has_a_bit() {
        let of_stops = [
            Doubt::UnobservedDeaths { count: 1 },
            Doubt::ContradictoryBooks { count: 1 },
        ];
        for reason in Doubt::OF_BOOKS.into_iter().chain(of_stops.iter().map(Doubt::reason)) {
            assert!(DOUBTS.iter().any(|(known, _)| *known == reason), "{reason}");
        }
    }
}
