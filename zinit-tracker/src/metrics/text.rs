//! A reading as text.

use std::{fmt, time::Duration};

use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeLabelValue, EncodeMetric, LabelValueEncoder, MetricEncoder, NoLabelSet, text::encode,
    },
    metrics::{MetricType, TypedMetric, counter::ConstCounter, gauge::ConstGauge, info::Info},
    registry::{Registry, Unit},
};
use zinit_ebpf::LAYOUT_VERSION;

use super::{
    accept::Format,
    reading::{Books, Reading, Service},
};
use crate::{
    stop::Doubt,
    tracker::{ServiceState, ServiceStops},
};

impl Reading {
    /// The whole exposition in this format.
    ///
    /// # Errors
    ///
    /// When a number is none that the format can express.
    pub fn text(self, format: Format) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(match format {
            Format::OpenMetrics => text,
            Format::Plain => plain(&text),
        })
    }
}

/// A label's value, which the encoder takes for escaped.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Value(String);

impl Value {
    fn new(text: &str) -> Self {
        Self(text.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n"))
    }
}

impl EncodeLabelValue for Value {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        self.0.encode(encoder)
    }
}

type Labels = Vec<(&'static str, Value)>;

fn labels<const N: usize>(labels: [(&'static str, &str); N]) -> Labels {
    labels.map(|(name, value)| (name, Value::new(value))).into()
}

/// How long the stops of a service took.
struct Durations<'a>(&'a ServiceStops);

impl EncodeMetric for Durations<'_> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bound = |bound: &Option<Duration>| bound.map_or(f64::MAX, |bound| bound.as_secs_f64());
        let took: Vec<_> = self.0.took.iter().map(|(most, count)| (bound(most), *count)).collect();
        encoder.encode_histogram::<NoLabelSet>(self.0.elapsed.as_secs_f64(), self.0.count, &took, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

impl TypedMetric for Durations<'_> {
    const TYPE: MetricType = MetricType::Histogram;
}

fn label_of_stops(stops: &ServiceStops) -> Labels {
    labels([("service", &format!("{}/{}", stops.instance, stops.name))])
}

/// Writes metric families.
struct Families<'a>(DescriptorEncoder<'a>);

impl Families<'_> {
    fn family<M: EncodeMetric + TypedMetric>(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        samples: impl IntoIterator<Item = (Labels, M)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, M::TYPE)?;
        for (labels, sample) in samples {
            sample.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn gauges(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, u64)>) -> fmt::Result {
        let samples = samples
            .into_iter()
            .map(|(labels, value)| (labels, ConstGauge::new(value)));
        self.family(name, help, None, samples)
    }

    fn counters(&mut self, name: &str, help: &str, samples: impl IntoIterator<Item = (Labels, u64)>) -> fmt::Result {
        let samples = samples
            .into_iter()
            .map(|(labels, value)| (labels, ConstCounter::new(value)));
        self.family(name, help, None, samples)
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(value).encode(family)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        ConstCounter::new(value).encode(family)
    }
}

impl Collector for Reading {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families(encoder);
        families.gauge(
            "zinit_loaded",
            "Whether programs and maps are loaded. 0: nothing is tracked, and there are no other metrics.",
            self.books.is_some().into(),
        )?;
        match &self.books {
            Some(books) => books.encode(&mut families),
            None => Ok(()),
        }
    }
}

impl Books {
    fn encode(&self, families: &mut Families<'_>) -> fmt::Result {
        let about = families.0.encode_descriptor(
            "zinit_tracking",
            "The tracking level: ebpf is exact. The version of the maps' layout, and of the program that reads them.",
            None,
            MetricType::Info,
        )?;
        Info::new(labels([
            ("level", &self.tracking.to_string()),
            ("layout", &LAYOUT_VERSION.to_string()),
            ("version", env!("CARGO_PKG_VERSION")),
        ]))
        .encode(about)?;
        self.encode_totals(families)?;
        self.encode_programs(families)?;
        self.encode_services(families)?;
        self.encode_escapes(families)?;
        self.encode_stops(families)?;
        self.encode_proof(families)
    }

    fn encode_totals(&self, families: &mut Families<'_>) -> fmt::Result {
        let stats = &self.stats;
        let live = self.services.iter().map(|service| service.info.live).sum();
        families.gauge(
            "zinit_services",
            "Services that are registered.",
            self.services.len() as u64,
        )?;
        families.gauge("zinit_processes", "Living processes of all services.", live)?;
        families.gauge(
            "zinit_capacity_processes",
            "How many processes can be tracked at a time.",
            self.capacity.into(),
        )?;
        families.counter(
            "zinit_creations",
            "Process creations that the hook at sched_process_fork saw, of everybody.",
            stats.seen,
        )?;
        families.counter(
            "zinit_ignored_creations",
            "Those of them by processes that belong to no service.",
            stats.ignored,
        )?;
        families.counter(
            "zinit_joined_processes",
            "Processes that joined a service, also one that is not registered any more.",
            stats.tracked,
        )?;
        families.counter(
            "zinit_missed_creations",
            "Process creations that the kernel kept from all hooks.",
            self.missed_creations,
        )?;
        families.counters(
            "zinit_failed_operations",
            "Operations on the maps that failed: a process could not be entered, taken out, or its end be recorded.",
            [
                (labels([("operation", "insert")]), stats.insert_failures),
                (labels([("operation", "delete")]), stats.delete_failures),
                (labels([("operation", "record-exit")]), stats.exit_failures),
            ],
        )?;
        families.counter(
            "zinit_dropped_events",
            "Events that found the ring buffer full, as they do while nobody reads them. No decision depends on an event.",
            stats.event_drops,
        )?;
        families.counter(
            "zinit_replaced_entries",
            "Entries of an earlier process with the same pid that were replaced.",
            stats.stale_replaced,
        )?;
        families.counter(
            "zinit_healed_deaths",
            "Deaths that the hook at sched_process_exit did not see and that were found later.",
            stats.healed,
        )?;
        families.counter(
            "zinit_killed_forkers",
            "Processes that a program killed because they forked, or entered a system call, while their service was being killed.",
            stats.kills,
        )
    }

    fn encode_programs(&self, families: &mut Families<'_>) -> fmt::Result {
        if let Some(measured) = self.programs_are_measured {
            families.gauge(
                "zinit_program_statistics_enabled",
                "Whether the sysctl kernel.bpf_stats_enabled is set, so that the kernel counts and measures runs of programs.",
                measured.into(),
            )?;
        }
        let programs = |value: fn(&crate::ProgramRuns) -> u64| {
            let samples = self.programs.iter();
            samples.map(move |runs| (labels([("program", runs.program)]), value(runs)))
        };
        let seconds = self.programs.iter().map(|runs| {
            let program = labels([("program", runs.program)]);
            (program, ConstCounter::new(runs.run_time.as_secs_f64()))
        });
        families.family(
            "zinit_program_run",
            "How long the eBPF program ran, on all processors together. Grows only while kernel.bpf_stats_enabled is 1.",
            Some(&Unit::Seconds),
            seconds,
        )?;
        families.counters(
            "zinit_program_runs",
            "How often the eBPF program ran. Grows only while kernel.bpf_stats_enabled is 1.",
            programs(|runs| runs.runs),
        )?;
        families.counters(
            "zinit_program_recursion_misses",
            "How often the kernel skipped the eBPF program because it was running on that processor. Always 0 before Linux 5.12.",
            programs(|runs| runs.recursion_misses),
        )
    }

    fn encode_services(&self, families: &mut Families<'_>) -> fmt::Result {
        let services = |value: fn(&Service) -> u64| {
            self.services
                .iter()
                .map(move |service| (service.label(), value(service)))
        };
        families.gauges(
            "zinit_service_processes",
            "Living processes of the service. 0 is proof that there are none, unless something speaks against the books.",
            services(|service| service.info.live),
        )?;
        families.gauges(
            "zinit_service_peak_processes",
            "Most processes that the service had at a time.",
            services(|service| service.info.peak),
        )?;
        families.counters(
            "zinit_service_forks",
            "Processes that joined the service: created by it, started for it, or taken in while they ran.",
            services(|service| service.info.forks),
        )?;
        families.counters(
            "zinit_service_exits",
            "Processes of the service that died.",
            services(|service| service.info.exits),
        )?;
        families.counters(
            "zinit_service_failed_operations",
            "Failed operations that concern the service: its books are no longer proof.",
            services(|service| service.info.lost),
        )?;
        families.gauges(
            "zinit_service_main_process",
            "Whether the main process of the service lives: the first that was started for it or taken in.",
            services(|service| service.main_lives.into()),
        )?;
        let states = [ServiceState::Up, ServiceState::Stopping, ServiceState::Killing];
        let samples = self.services.iter().flat_map(|service| {
            states.map(|state| {
                let holds = u64::from(service.info.state == state);
                (service.labelled("state", state.name()), holds)
            })
        });
        families.gauges(
            "zinit_service_state",
            "1 for the state that the service is in: up, stopping (asked to end), or killing.",
            samples,
        )
    }

    fn encode_escapes(&self, families: &mut Families<'_>) -> fmt::Result {
        families.gauges(
            "zinit_service_escaped_processes",
            "Living processes of the service that are outside of its session, process group, parents, cgroup or a namespace now. \
             A stop ends them all the same.",
            self.services.iter().map(|service| (service.label(), service.escaped)),
        )?;
        let samples = self.services.iter().flat_map(|service| {
            let departed = service.departed.iter();
            departed.map(|(name, count)| (service.labelled("left", name), *count))
        });
        families.gauges(
            "zinit_service_departed_processes",
            "Those of them by what they have left; one may have left several things.",
            samples,
        )
    }

    fn encode_stops(&self, families: &mut Families<'_>) -> fmt::Result {
        let stops = |value: fn(&ServiceStops) -> u64| {
            let samples = self.stops.iter();
            samples.map(move |stops| (label_of_stops(stops), value(stops)))
        };
        families.family(
            "zinit_service_stop_duration",
            "How long stops of the service took that came to an end, from the request to the end of verification: by any client, also while \
             it was registered under other ids, and those that found nobody.",
            Some(&Unit::Seconds),
            self.stops.iter().map(|stops| (label_of_stops(stops), Durations(stops))),
        )?;
        families.counters(
            "zinit_service_killed_stops",
            "Those stops of the service in which processes had to be killed.",
            stops(|stops| stops.killed),
        )?;
        families.counters(
            "zinit_service_survived_stops",
            "Those stops of the service that left survivors.",
            stops(|stops| stops.survived),
        )?;
        families.counters(
            "zinit_service_stop_survivors",
            "How many survivors they left.",
            stops(|stops| stops.survivors),
        )?;
        families.counters(
            "zinit_service_unproven_stops",
            "Those stops of the service that left nobody, without proof of it.",
            stops(|stops| stops.unproven),
        )
    }

    fn encode_proof(&self, families: &mut Families<'_>) -> fmt::Result {
        families.gauges(
            "zinit_service_provable",
            "Whether a stop can prove that nothing of the service is left: nothing speaks against its books now.",
            self.services
                .iter()
                .map(|service| (service.label(), service.doubts.is_empty().into())),
        )?;
        let samples = self.services.iter().flat_map(|service| {
            Doubt::OF_BOOKS.map(|reason| {
                let holds = service.doubts.iter().any(|doubt| doubt.reason() == reason);
                (service.labelled("reason", reason), u64::from(holds))
            })
        });
        families.gauges(
            "zinit_service_unproven",
            "1 for each reason that speaks against the books of the service.",
            samples,
        )
    }
}

impl Service {
    fn name(&self) -> String {
        format!("{}/{}", self.info.instance, self.info.name)
    }

    fn label(&self) -> Labels {
        labels([("service", &self.name())])
    }

    fn labelled(&self, label: &'static str, value: &str) -> Labels {
        labels([("service", &self.name()), (label, value)])
    }
}

/// The same in the older text format, version 0.0.4: there, families are named as their samples, have no unit and no end, and
/// what is new in OpenMetrics is a gauge.
fn plain(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = "";
    for line in open_metrics.lines() {
        let mut words = line.split(' ');
        match (words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), _) => help = line,
            (Some("#"), Some("TYPE"), Some(name)) => {
                let (suffix, kind) = match words.next() {
                    Some("counter") => ("_total", "counter"),
                    Some("info") => ("_info", "gauge"),
                    Some("histogram") => ("", "histogram"),
                    _ => ("", "gauge"),
                };
                let help = help.splitn(4, ' ').nth(3).unwrap_or_default();
                text.push_str(&format!("# HELP {name}{suffix} {help}\n# TYPE {name}{suffix} {kind}\n"));
            }
            (Some("#"), ..) => {}
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_of_a_label_does_not_end_its_string() {
        assert_eq!(Value::new("a\"b\\c\nd").0, r#"a\"b\\c\nd"#);
    }

    #[test]
    fn without_books_there_is_only_that() {
        let text = Reading { books: None }.text(Format::OpenMetrics).unwrap();
        assert!(
            text.ends_with("# TYPE zinit_loaded gauge\nzinit_loaded 0\n# EOF\n"),
            "{text}"
        );
    }

    #[test]
    fn the_older_format_names_families_as_their_samples() {
        let text = "# HELP a_seconds A b.\n# TYPE a_seconds counter\n# UNIT a_seconds seconds\na_seconds_total{x=\"# y\"} 1.0\n\
                    # HELP c C.\n# TYPE c info\nc_info{} 1\n# HELP d D.\n# TYPE d gauge\nd 2\n# EOF\n";
        let expected = "# HELP a_seconds_total A b.\n# TYPE a_seconds_total counter\na_seconds_total{x=\"# y\"} 1.0\n\
                        # HELP c_info C.\n# TYPE c_info gauge\nc_info{} 1\n# HELP d D.\n# TYPE d gauge\nd 2\n";
        assert_eq!(plain(text), expected);
    }
}
