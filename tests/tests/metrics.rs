//! `zinit-tracker metrics`: figures against what the test itself caused, the format against its specification, the server against
//! clients of every kind, and dashboard and alerts against Prometheus' own tool.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use aya::sys::{Stats, enable_stats};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use zinit_tests::{
    Cleanup, Marker, TestCgroup, actor,
    daemon::wait_for,
    holds::skipped,
    members,
    openmetrics::Exposition,
    oracle::{Place, place},
    rights::Rights,
    sandbox::{DEADLINE, PinDir, Sandbox},
    tool,
};
use zinit_tracker::StopPolicy;

fn command(pins: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(tool());
    command.arg("--pins").arg(pins).args(args).stdin(Stdio::null());
    command
}

fn output(pins: &Path, args: &[&str]) -> Output {
    command(pins, args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn printed(pins: &Path) -> Exposition {
    let output = output(pins, &["metrics"]);
    assert!(output.status.success(), "{output:?}");
    Exposition::parse(&text(&output.stdout)).unwrap()
}

/// Metrics that are served, until it is dropped.
struct Served {
    child: Child,
    address: SocketAddr,
}

impl Served {
    fn start(pins: &Path) -> Self {
        let mut command = command(pins, &["metrics", "--listen", "127.0.0.1:0"]);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line.split_once("http://").and_then(|(_, rest)| rest.split_once('/'));
        let address = address.unwrap_or_else(|| panic!("{line:?}")).0.parse().unwrap();
        Self { child, address }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream
    }

    /// Sends a head, and reads the answer to its end: its head and its body.
    fn ask(&self, head: &str) -> (String, String) {
        let mut stream = self.connect();
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer:?}"));
        (head.to_ascii_lowercase(), body.to_owned())
    }

    fn get(&self, path: &str, headers: &str) -> (String, String) {
        let address = self.address;
        self.ask(&format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n{headers}\r\n"))
    }

    fn scrape(&self) -> Exposition {
        let (head, body) = self.get("/metrics", "");
        assert!(head.starts_with("http/1.1 200 "), "{head}\n{body}");
        Exposition::parse(&body).unwrap()
    }

    /// Sends the signal, and returns the exit status.
    fn end(mut self, signal: Signal) -> Option<i32> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // One that was waited for is not killed again.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A service that has created three processes that ended, and rests.
fn play(sandbox: &Sandbox, name: &str, marker: &Marker) -> tokio::process::Child {
    let service = sandbox.tracker.register(name).unwrap();
    let mut command = tokio::process::Command::new("sh");
    let script = "for i in 1 2 3; do (exit 0); done; exec sleep 3651";
    command.args(["-c", script]).env(Marker::ENV, marker.as_str());
    let child = sandbox.tracker.spawn(&service, &mut command).unwrap();
    let line = format!("/proc/{}/cmdline", child.id().unwrap());
    wait_for("it rests", || std::fs::read(&line).unwrap() == b"sleep\x003651\0");
    child
}

async fn end(sandbox: Sandbox, mut child: tokio::process::Child) {
    let service = sandbox.tracker.services().unwrap().remove(0).handle();
    zinit_tracker::stop(&sandbox.tracker, &service, &StopPolicy::default())
        .await
        .unwrap();
    child.wait().await.unwrap();
    sandbox.close();
}

#[tokio::test]
async fn figures_are_those_of_what_has_happened() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    // Every character that a name may have and a label may not.
    let child = play(&sandbox, "a \"web\", {x=\"1\"}", &marker);
    let service = ("service", "test/a \"web\", {x=\"1\"}");
    let metrics = printed(sandbox.pins());
    let of_service = |name: &str| metrics.value(name, &[service]).unwrap();
    assert_eq!(members(&marker).len(), 1);
    assert_eq!(of_service("zinit_service_processes"), 1.0);
    assert_eq!(of_service("zinit_service_forks_total"), 4.0);
    assert_eq!(of_service("zinit_service_exits_total"), 3.0);
    assert_eq!(of_service("zinit_service_peak_processes"), 2.0);
    assert_eq!(of_service("zinit_service_main_process"), 1.0);
    assert_eq!(of_service("zinit_service_escaped_processes"), 0.0);
    assert_eq!(of_service("zinit_service_failed_operations_total"), 0.0);
    assert_eq!(of_service("zinit_service_provable"), 1.0);
    assert_eq!(metrics.sum("zinit_service_unproven"), 0.0);
    let state = |state| metrics.value("zinit_service_state", &[service, ("state", state)]);
    assert_eq!(
        ["up", "stopping", "killing"].map(state),
        [Some(1.0), Some(0.0), Some(0.0)]
    );
    let total = |name: &str| metrics.value(name, &[]).unwrap();
    assert_eq!(total("zinit_loaded"), 1.0);
    assert_eq!((total("zinit_services"), total("zinit_processes")), (1.0, 1.0));
    assert_eq!(total("zinit_capacity_processes"), 8192.0);
    assert_eq!(total("zinit_joined_processes_total"), 4.0);
    let (seen, ignored) = (total("zinit_creations_total"), total("zinit_ignored_creations_total"));
    assert!(seen >= 4.0 && ignored <= seen - 4.0, "{metrics:#?}");
    assert_eq!(metrics.sum("zinit_failed_operations_total"), 0.0);
    let level = [
        ("level", "ebpf"),
        ("layout", "2"),
        ("version", env!("CARGO_PKG_VERSION")),
    ];
    assert_eq!(metrics.value("zinit_tracking_info", &level), Some(1.0));
    assert_eq!(
        metrics.value("zinit_service_stop_duration_seconds_count", &[service]),
        None
    );

    let handle = sandbox.tracker.services().unwrap().remove(0).handle();
    let policy = StopPolicy::default();
    let report = zinit_tracker::stop(&sandbox.tracker, &handle, &policy).await.unwrap();
    let metrics = printed(sandbox.pins());
    let of_stops = |name: &str| metrics.value(&format!("zinit_service_{name}"), &[service]);
    assert_eq!(of_stops("stop_duration_seconds_count"), Some(1.0), "{metrics:#?}");
    let sum = of_stops("stop_duration_seconds_sum").unwrap();
    assert!((sum - report.elapsed.as_secs_f64()).abs() < 1e-6, "{sum}, {report:#?}");
    let bucket = |le| metrics.value("zinit_service_stop_duration_seconds_bucket", &[service, ("le", le)]);
    assert_eq!(
        (bucket("0.001"), bucket("60.0"), bucket("+Inf")),
        (Some(0.0), Some(1.0), Some(1.0))
    );
    for name in ["killed_stops", "survived_stops", "stop_survivors", "unproven_stops"] {
        assert_eq!(of_stops(&format!("{name}_total")), Some(0.0), "{name}");
    }
    end(sandbox, child).await;
}

#[tokio::test]
async fn those_who_escaped_are_counted_by_what_they_have_left() {
    let sandbox = Sandbox::new();
    let cgroup = TestCgroup::new(&format!("zinit-test-metrics-{}", std::process::id())).unwrap();
    let cgroup = cgroup.expect("the tests need a writable cgroup v2 hierarchy");
    for (behaviour, args) in [
        ("sessions", vec!["7"]),
        ("double-fork", vec![]),
        ("cgroup-move", vec![cgroup.path().to_str().unwrap()]),
    ] {
        let mut played = sandbox.play(behaviour, args);
        let main = i32::try_from(played.child.id().unwrap()).unwrap();
        let others: Vec<_> = members(&played.marker).iter().map(|member| member.pid).collect();
        let home = place(main).unwrap();
        let elsewhere = |of: fn(&Place) -> i32| {
            let away = others.iter().filter(|pid| of(&place(**pid).unwrap()) != of(&home));
            away.count() as f64
        };
        let metrics = printed(sandbox.pins());
        let name = format!("test/{behaviour}");
        let left = |left| {
            metrics.value(
                "zinit_service_departed_processes",
                &[("service", &name), ("left", left)],
            )
        };
        assert_eq!(left("group"), Some(elsewhere(|place| place.group)), "{behaviour}");
        assert_eq!(left("session"), Some(elsewhere(|place| place.session)), "{behaviour}");
        // The daemon alone is given to another process.
        let orphans = f64::from(u8::from(behaviour == "double-fork"));
        assert_eq!(left("parent"), Some(orphans), "{behaviour}");
        let moved = f64::from(u8::from(behaviour == "cgroup-move"));
        assert_eq!(left("cgroup"), Some(moved), "{behaviour}");
        assert_eq!(left("namespace"), Some(0.0), "{behaviour}");
        let escaped = metrics.value("zinit_service_escaped_processes", &[("service", &name)]);
        assert_eq!(escaped, Some(others.len() as f64 - 1.0), "{behaviour}");
        sandbox.stop(&mut played, &StopPolicy::default()).await;
    }
    sandbox.close();
}

#[tokio::test]
async fn whether_the_main_process_lives_is_shown_and_that_nobody_does() {
    let sandbox = Sandbox::new();
    let mut played = sandbox.play("spawn-and-exit", ["0"]);
    played.child.wait().await.unwrap();
    let service = ("service", "test/spawn-and-exit");
    let metrics = printed(sandbox.pins());
    let of_service = |name: &str| metrics.value(name, &[service]);
    assert_eq!(of_service("zinit_service_main_process"), Some(0.0));
    assert_eq!(of_service("zinit_service_processes"), Some(1.0));
    sandbox.stop(&mut played, &StopPolicy::default()).await;
    let metrics = printed(sandbox.pins());
    assert_eq!(metrics.value("zinit_service_processes", &[service]), Some(0.0));
    assert_eq!(metrics.value("zinit_service_exits_total", &[service]), Some(2.0));
    sandbox.close();
}

#[tokio::test]
async fn what_speaks_against_the_books_has_a_reason() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let mut command = actor("rest", [""; 0], &marker);
    let mut ready = zinit_tests::Ready::new().unwrap();
    let mut child = ready.attach(&mut command).spawn().unwrap();
    ready.wait().unwrap();
    let service = sandbox.tracker.register("taken").unwrap();
    sandbox.tracker.adopt(&service, child.id()).unwrap();
    let metrics = printed(sandbox.pins());
    let of = |name: &str, reason| {
        let labels = [("service", "test/taken"), ("reason", reason)];
        metrics.value(name, &labels[..if reason.is_empty() { 1 } else { 2 }])
    };
    assert_eq!(of("zinit_service_unproven", "adopted"), Some(1.0));
    assert_eq!(of("zinit_service_unproven", "lost-operations"), Some(0.0));
    assert_eq!(of("zinit_service_provable", ""), Some(0.0));
    assert_eq!(metrics.sum("zinit_service_unproven"), 1.0);
    zinit_tracker::stop(&sandbox.tracker, &service, &StopPolicy::default())
        .await
        .unwrap();
    child.wait().unwrap();
    sandbox.close();
}

#[test]
fn where_nothing_is_loaded_nothing_is_loaded_for_it() {
    let pins = PinDir::new();
    let metrics = output(pins.path(), &["metrics"]);
    let exposition = Exposition::parse(&text(&metrics.stdout)).unwrap();
    assert_eq!(exposition.names(), BTreeSet::from(["zinit_loaded"]));
    assert_eq!(exposition.value("zinit_loaded", &[]), Some(0.0));
    let ps = output(pins.path(), &["ps"]);
    assert_eq!((metrics.status, text(&metrics.stderr)), (ps.status, text(&ps.stderr)));
    let served = Served::start(pins.path());
    assert_eq!(served.scrape().value("zinit_loaded", &[]), Some(0.0));
    assert_eq!(served.end(Signal::SIGTERM), Some(0));
    assert!(!pins.path().exists());
}

#[test]
fn what_cannot_be_done_is_said_in_one_line() {
    let pins = PinDir::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (args, status, said) in [
        (
            vec!["--tracking", "procfs", "metrics"],
            1,
            "level procfs keeps its books in the process that runs",
        ),
        (
            vec!["metrics", "--listen", &address],
            1,
            "failed to listen on 127.0.0.1:",
        ),
        (
            vec!["metrics", "--listen", "http://x"],
            2,
            "is no address: write it like 127.0.0.1:8080",
        ),
    ] {
        let output = output(pins.path(), &args);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {stderr}");
        assert!(stderr.contains(said), "{args:?}: {stderr}");
        assert!(status == 2 || stderr.lines().count() == 1, "{args:?}: {stderr}");
        assert_eq!(text(&output.stdout), "", "{args:?}");
    }
}

#[tokio::test]
async fn a_server_answers_each_request_with_what_is_so_then_and_holds_nothing() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let pins = sandbox.pins().to_owned();
    let served = Served::start(&pins);
    assert_eq!(served.scrape().value("zinit_services", &[]), Some(0.0));
    let child = play(&sandbox, "web", &marker);
    let forks = |of: &Exposition| of.value("zinit_service_forks_total", &[("service", "test/web")]);
    assert_eq!(forks(&served.scrape()), Some(4.0));
    // The last client of the tracker removes the pins: the server is none.
    end(sandbox, child).await;
    assert_eq!(served.scrape().value("zinit_loaded", &[]), Some(0.0));
    assert_eq!(served.end(Signal::SIGINT), Some(0));
    assert!(!pins.exists());
}

#[tokio::test]
async fn a_server_has_given_up_what_it_does_not_need() {
    // CAP_DAC_READ_SEARCH, CAP_NET_BIND_SERVICE, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF.
    let kept = [2, 10, 19, 21, 38, 39];
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let child = play(&sandbox, "web", &marker);
    let served = Served::start(sandbox.pins());
    assert_eq!(served.scrape().value("zinit_services", &[]), Some(1.0));
    for thread in Rights::of_threads(served.child.id()) {
        assert_eq!(thread, Rights::only(&kept));
    }
    assert_eq!(served.end(Signal::SIGTERM), Some(0));
    end(sandbox, child).await;
}

#[test]
fn clients_get_the_format_that_they_ask_for_and_nothing_else() {
    let sandbox = Sandbox::new();
    let served = Served::start(sandbox.pins());
    let open_metrics = "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8";
    let prometheus = "Accept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1\r\n";
    for accept in ["", "Accept: */*\r\n", prometheus] {
        let (head, body) = served.get("/metrics", accept);
        assert!(head.contains(open_metrics), "{accept:?}: {head}");
        Exposition::parse(&body).unwrap();
    }
    let (head, body) = served.get("/metrics?x=y", "Accept: text/plain\r\n");
    assert!(
        head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"),
        "{head}"
    );
    assert!(
        body.contains("# TYPE zinit_creations_total counter\nzinit_creations_total "),
        "{body}"
    );
    assert!(!body.contains("# EOF"), "{body}");
    assert!(
        served
            .get("/metrics", "Accept: application/json\r\n")
            .0
            .starts_with("http/1.1 406 ")
    );
    assert!(served.get("/", "").0.starts_with("http/1.1 404 "));
    let address = served.address;
    let post = format!("POST /metrics HTTP/1.1\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n");
    let (head, _) = served.ask(&post);
    assert!(
        head.starts_with("http/1.1 405 ") && head.contains("allow: get, head"),
        "{head}"
    );
    let (head, body) = served.ask(&post.replace("POST", "HEAD"));
    assert!(
        head.starts_with("http/1.1 200 ") && head.contains(open_metrics),
        "{head}"
    );
    assert_eq!(body, "");
    // A page that a browser shows must not read what is on its machine.
    let foreign = "GET /metrics HTTP/1.1\r\nHost: evil.example\r\n\r\n";
    assert!(served.ask(foreign).0.starts_with("http/1.1 403 "));
    let (head, _) = served.get("/metrics", "Origin: http://evil.example\r\n");
    assert!(head.starts_with("http/1.1 403 "), "{head}");
    assert_eq!(served.end(Signal::SIGTERM), Some(0));
    sandbox.close();
}

#[test]
fn a_client_can_only_hold_up_itself() {
    /// As many as are served at a time.
    const PLACES: usize = 64;
    let pins = PinDir::new();
    let served = Served::start(pins.path());
    // A head without end is not waited for.
    let mut endless = served.connect();
    let mut head = b"GET /metrics HTTP/1.1\r\nX: ".to_vec();
    head.resize(1024 * 1024, b'x');
    // It may be cut off before it has sent all.
    drop(endless.write_all(&head));
    let mut answer = Vec::new();
    drop(endless.read_to_end(&mut answer));
    assert!(!text(&answer).starts_with("HTTP/1.1 200"), "{}", text(&answer));
    // Who says nothing has to go, and then there is room for others.
    let mut silent: Vec<_> = (0..PLACES).map(|_| served.connect()).collect();
    served.scrape();
    let mut nothing = Vec::new();
    for stream in &mut silent {
        stream.read_to_end(&mut nothing).unwrap();
    }
    assert!(!text(&nothing).contains(" 200 "), "{}", text(&nothing));
    assert_eq!(served.end(Signal::SIGTERM), Some(0));
}

#[test]
fn who_holds_the_lock_of_the_books_holds_up_neither_clients_nor_the_end() {
    let sandbox = Sandbox::new();
    let served = Served::start(sandbox.pins());
    let lock = std::fs::File::open(sandbox.pins()).unwrap();
    lock.lock().unwrap();
    let (head, body) = served.get("/metrics", "");
    assert!(
        head.starts_with("http/1.1 503 ") && body.contains("lslocks"),
        "{head}\n{body}"
    );
    lock.unlock().unwrap();
    assert_eq!(served.scrape().value("zinit_loaded", &[]), Some(1.0));
    lock.lock().unwrap();
    let mut waiting = served.connect();
    waiting
        .write_all(format!("GET /metrics HTTP/1.1\r\nHost: {}\r\n\r\n", served.address).as_bytes())
        .unwrap();
    // The lock is held until the server has ended.
    assert_eq!(served.end(Signal::SIGTERM), Some(0));
    lock.unlock().unwrap();
    sandbox.close();
}

#[test]
fn runs_of_programs_are_counted_while_the_kernel_measures_them() {
    let sandbox = Sandbox::new();
    let fork = [("program", "zinit_fork")];
    let of = |metrics: &Exposition, name: &str| metrics.value(name, &fork).unwrap();
    let before = printed(sandbox.pins());
    let measured = enable_stats(Stats::RunTime).unwrap();
    for _ in 0..10 {
        assert!(Command::new("true").status().unwrap().success());
    }
    let after = printed(sandbox.pins());
    drop(measured);
    let runs = of(&after, "zinit_program_runs_total") - of(&before, "zinit_program_runs_total");
    assert!(runs >= 10.0, "{runs}");
    let seconds = of(&after, "zinit_program_run_seconds_total") - of(&before, "zinit_program_run_seconds_total");
    assert!(seconds > 0.0 && seconds < DEADLINE.as_secs_f64(), "{seconds}");
    assert_eq!(after.names(), before.names());
    sandbox.close();
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../zinit-tracker/metrics")
        .join(name)
}

/// Runs Prometheus' tool; `None`: it is not there.
fn promtool(args: &[&str], stdin: &str) -> Option<Output> {
    let mut command = Command::new("promtool");
    command
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let Ok(mut child) = command.spawn() else {
        skipped("promtool is not installed: it is in Debian's package prometheus");
        return None;
    };
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    Some(child.wait_with_output().unwrap())
}

#[test]
fn alerts_fire_for_what_they_are_about_and_for_nothing_else() {
    for args in [["check", "rules"], ["test", "rules"]] {
        let name = if args[0] == "check" {
            "alerts.yml"
        } else {
            "alerts.test.yml"
        };
        let path = file(name);
        let Some(output) = promtool(&[args[0], args[1], path.to_str().unwrap()], "") else {
            return;
        };
        assert!(
            output.status.success(),
            "{}{}",
            text(&output.stdout),
            text(&output.stderr)
        );
    }
}

/// Every query of the dashboard, with its variables replaced as Grafana does it.
fn queries() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(file("dashboard.json")).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    let queries = targets.map(|target| {
        let query = target["expr"].as_str().unwrap();
        let query = query.replace("$instance", ".*").replace("$service", ".*");
        query.replace("$__rate_interval", "1m").replace("$__range", "1h")
    });
    queries.collect()
}

#[test]
fn the_queries_of_the_dashboard_are_queries() {
    let queries = queries();
    assert!(
        queries.len() > 20 && queries.iter().all(|query| !query.contains('$')),
        "{queries:#?}"
    );
    // As rules, which every version of the tool checks. JSON is YAML.
    let rule = |(index, query)| serde_json::json!({"record": format!("query:{index}"), "expr": query});
    let rules: Vec<_> = queries.iter().enumerate().map(rule).collect();
    let rules = serde_json::json!({"groups": [{"name": "dashboard", "rules": rules}]});
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dashboard.yml");
    std::fs::write(&path, rules.to_string()).unwrap();
    let Some(output) = promtool(&["check", "rules", path.to_str().unwrap()], "") else {
        return;
    };
    assert!(
        output.status.success(),
        "{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}

#[tokio::test]
async fn dashboard_and_alerts_name_metrics_that_there_are_and_forget_none() {
    let sandbox = Sandbox::new();
    let marker = Marker::new();
    let _cleanup = Cleanup::new(&marker);
    let child = play(&sandbox, "web", &marker);
    let stopped = sandbox.tracker.register("stopped").unwrap();
    zinit_tracker::stop(&sandbox.tracker, &stopped, &StopPolicy::default())
        .await
        .unwrap();
    sandbox.tracker.unregister(&stopped).unwrap();
    let metrics = printed(sandbox.pins());
    let there: BTreeSet<String> = metrics.names().into_iter().map(ToOwned::to_owned).collect();
    let named = |text: &str| -> BTreeSet<String> {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        words
            .filter(|word| word.starts_with("zinit_"))
            .map(ToOwned::to_owned)
            .collect()
    };
    let mut on_dashboard = named(&queries().join("\n"));
    assert!(on_dashboard.is_subset(&there), "{:?}", on_dashboard.difference(&there));
    let alerts = named(&std::fs::read_to_string(file("alerts.yml")).unwrap());
    assert!(alerts.is_subset(&there), "{:?}", alerts.difference(&there));
    on_dashboard.extend(alerts);
    assert_eq!(there, on_dashboard, "metrics (left) that nobody looks at");

    // The older format passes Prometheus' own checks of style, too.
    let served = Served::start(sandbox.pins());
    let (_, plain) = served.get("/metrics", "Accept: text/plain\r\n");
    assert_eq!(served.end(Signal::SIGTERM), Some(0));
    if let Some(output) = promtool(&["check", "metrics"], &plain) {
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{said}");
    }
    end(sandbox, child).await;
}
