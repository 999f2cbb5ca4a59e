//! What single operations cost: `cargo bench --package zinit-tests`, as root, on a machine that does nothing else.
//!
//! `cargo xtask bench` compares with others; this is to see what a change to one operation does. With the tests each is tried once.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![allow(missing_docs, reason = "the macros make functions without")]

use std::{
    fs,
    hint::black_box,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use zinit_tests::sandbox::Sandbox;
use zinit_tracker::{
    StopPolicy,
    metrics::{Format, Reading},
    process::{Pidfd, stat::StartClock},
    stop,
    stop::signal_named,
    supervisor::config::ServiceDirectory,
};

/// Members of a service.
const SIZES: [u64; 3] = [1, 100, 1000];

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Reading a directory of service files.
fn files(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("files");
    for count in [1, 100] {
        let directory = TempDir::new().unwrap();
        for number in 0..count {
            let text = format!(
                "exec: /usr/bin/server --port {number} --name 'a b'\nafter: [network, disks]\nenv: {{HOME: /root, LANG: C}}\n\
                 test: curl -f localhost\nsignal: {{stop: SIGINT}}\nshutdown_timeout: 5\nlog: ring\n"
            );
            fs::write(directory.path().join(format!("service-{number}.yaml")), text).unwrap();
        }
        let opened = ServiceDirectory::open(directory.path()).unwrap();
        group.throughput(Throughput::Elements(count));
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| black_box(opened.entries().unwrap()));
        });
    }
}

/// What it takes to be sure of whom a signal would go to.
fn identity(criterion: &mut Criterion) {
    let me = std::process::id();
    let clock = StartClock::default();
    let mut group = criterion.benchmark_group("identity");
    group.bench_function("pidfd", |bencher| bencher.iter(|| black_box(Pidfd::open(me).unwrap())));
    group.bench_function("start", |bencher| {
        bencher.iter(|| black_box(clock.matches(me, 0).unwrap()))
    });
    group.bench_function("signal-name", |bencher| {
        bencher.iter(|| signal_named(black_box("sigrtmin+3")))
    });
}

/// Questions to the books, by the number of members.
fn books(criterion: &mut Criterion) {
    for size in SIZES {
        let sandbox = Sandbox::new();
        let runtime = runtime();
        let mut played = {
            let _inside = runtime.enter();
            sandbox.play("sessions", [size.to_string()])
        };
        let service = played.service.clone();
        let config = zinit_tracker::Config {
            pins: zinit_tracker::Pins::Shared(sandbox.pins().to_owned()),
            ..zinit_tracker::Config::default()
        };
        let mut group = criterion.benchmark_group("books");
        group.throughput(Throughput::Elements(size));
        group.bench_function(BenchmarkId::new("live", size), |bencher| {
            bencher.iter(|| sandbox.tracker.live(&service).unwrap());
        });
        group.bench_function(BenchmarkId::new("list", size), |bencher| {
            bencher.iter(|| black_box(sandbox.tracker.processes(&service).unwrap()));
        });
        group.bench_function(BenchmarkId::new("metrics", size), |bencher| {
            bencher.iter(|| Reading::take(&config).unwrap().text(Format::OpenMetrics).unwrap());
        });
        group.finish();
        let policy = StopPolicy {
            grace: Duration::ZERO,
            ..StopPolicy::default()
        };
        runtime.block_on(sandbox.stop(&mut played, &policy));
        sandbox.close();
    }
}

/// A service of one process: registered, spawned, stopped, unregistered; and of these the stop alone.
fn services(criterion: &mut Criterion) {
    let sandbox = Sandbox::new();
    let runtime = runtime();
    let _inside = runtime.enter();
    let mut round = || {
        let service = sandbox.tracker.register("one").unwrap();
        let mut command = Command::new("sleep");
        command.arg("600").stdin(Stdio::null());
        let mut child = sandbox.tracker.spawn(&service, &mut command.into()).unwrap();
        let began = Instant::now();
        let report = runtime
            .block_on(stop(&sandbox.tracker, &service, &StopPolicy::default()))
            .unwrap();
        let stopping = began.elapsed();
        assert!(report.proven, "{report:#?}");
        runtime.block_on(child.wait()).unwrap();
        sandbox.tracker.unregister(&service).unwrap();
        stopping
    };
    let mut group = criterion.benchmark_group("service");
    group.bench_function("life", |bencher| bencher.iter(&mut round));
    group.bench_function("stop", |bencher| {
        bencher.iter_custom(|rounds| (0..rounds).map(|_| round()).sum());
    });
    group.finish();
    sandbox.close();
}

criterion_group!(micro, files, identity, books, services);
criterion_main!(micro);
