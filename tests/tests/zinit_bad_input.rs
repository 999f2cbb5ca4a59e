//! What nobody should give to `zinit`, and everybody does: it says so in one line and goes on.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    ffi::OsStr,
    fs,
    io::{Read as _, Write as _},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{PermissionsExt as _, symlink},
        net::{UnixListener, UnixStream},
    },
    process::{Command, Output, Stdio},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustix::{
    fs::{FlockOperation, flock},
    process::Signal,
};
use serde_json::{Value, json};
use zinit_tests::daemon::{Daemon, wait_for};

const SLEEP: &str = "exec: sleep 3600";

#[test]
fn bad_service_files_are_reported_and_the_others_start() {
    let mut daemon = Daemon::prepare(&[
        ("good", SLEEP),
        ("unparsable", "exec: [a\n  b: {"),
        ("list", "- exec: sleep 1"),
        ("empty", ""),
        ("unknown", "exec: sleep 3600\nshutdown_timeot: 3"),
        ("signal", "exec: sleep 3600\nsignal: {stop: SIGBOGUS}"),
        ("types", "exec: sleep 3600\nshutdown_timeout: soon"),
        ("quotes", "exec: sh -c 'echo unbalanced"),
        ("dependency", "exec: sleep 3600\nafter: [../etc]"),
        ("dotted.name", SLEEP),
        ("new\nline", SLEEP),
        (&"x".repeat(200), SLEEP),
    ]);
    let config = daemon.config();
    fs::write(config.join(OsStr::from_bytes(b"\xff\xfe.yaml")), SLEEP).unwrap();
    fs::write(
        config.join("binary.yaml"),
        fs::read("/proc/self/exe").unwrap().get(..4096).unwrap(),
    )
    .unwrap();
    fs::write(
        config.join("huge.yaml"),
        "exec: sleep 1\n#".to_owned() + &"x".repeat(20_000_000),
    )
    .unwrap();
    fs::create_dir(config.join("directory.yaml")).unwrap();
    symlink(config.join("good.yaml"), config.join("link.yaml")).unwrap();
    symlink("nowhere", config.join("dangling.yaml")).unwrap();
    symlink("loop.yaml", config.join("loop.yaml")).unwrap();
    symlink("/dev/zero", config.join("device.yaml")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        config.join("pipe.yaml"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    daemon.run();
    daemon.wait_for_state("good", "Running");
    daemon.wait_for_state("link", "Running");
    daemon.wait_for_state("unknown", "Running");
    let states = daemon.json(&["list", "--json"]);
    let names: Vec<_> = states.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(names, ["good", "link", "quotes", "unknown"]);
    daemon.wait_for_state("quotes", "Failure");
    let log = daemon.log();
    for text in [
        "unparsable.yaml: line ",
        "list.yaml: line 1, column 1",
        "empty.yaml: exec is missing",
        "unknown.yaml: line 2, column 1: shutdown_timeot: unknown field: did you mean shutdown_timeout?",
        "signal.yaml: line 2, column 16: signal.stop",
        "types.yaml: line 2, column 19: shutdown_timeout",
        "quotes.yaml: line 1, column 7: exec: a quote is not closed",
        "dependency.yaml: line 2, column 9: after[0]",
        "binary.yaml is no text",
        "huge.yaml is larger than 1 MiB",
        "directory.yaml is no regular file",
        "dangling.yaml is no regular file",
        "loop.yaml",
        "device.yaml is no regular file",
        "pipe.yaml is no regular file",
        "a slash, a backslash or a dot",
        "a control character",
        "longer than 64 bytes",
        "no UTF-8",
    ] {
        assert!(log.contains(text), "{text}: {log}");
    }
    let check = daemon.command(&["check", config.to_str().unwrap()]).output().unwrap();
    assert_eq!(check.status.code(), Some(1));
    assert_eq!(
        check.stderr.iter().filter(|byte| **byte == b'\n').count(),
        19,
        "{}",
        stderr(&check)
    );
    daemon.shutdown();
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_service_that_cannot_run_fails_alone() {
    let daemon = Daemon::start(&[
        ("good", SLEEP),
        ("missing", "exec: /no/such/program"),
        ("nowhere", "exec: sleep 3600\ndir: /no/such/directory"),
        ("nobody", "exec: sleep 3600\nuser: no-such-user-here"),
        ("waits", "exec: sleep 3600\nafter: [never-defined]"),
        ("one", "exec: sleep 3600\nafter: [two]"),
        ("two", "exec: sleep 3600\nafter: [one]"),
    ]);
    for service in ["missing", "nowhere", "nobody"] {
        daemon.wait_for_state(service, "Failure");
    }
    daemon.wait_for_state("good", "Running");
    daemon.wait_for_state("waits", "Blocked");
    wait_for("the cycle is reported", || daemon.log().contains("cycle"));
    for service in ["one", "two"] {
        assert_eq!(daemon.pid(service), 0);
    }
    let status = daemon.json(&["status", "waits", "--json"]);
    assert_eq!(status["after"], json!({"never-defined": "Unknown"}));
    daemon.write("never-defined", SLEEP);
    daemon.does(&["monitor", "never-defined"]);
    daemon.wait_for_state("waits", "Running");
    daemon.shutdown();
}

#[test]
fn a_file_that_has_vanished_is_said_to_be_unknown() {
    let daemon = Daemon::start(&[("web", SLEEP)]);
    daemon.wait_for_state("web", "Running");
    fs::remove_file(daemon.config().join("web.yaml")).unwrap();
    assert_eq!(daemon.error("service_get", &json!(["web"]))["code"], -32000);
    assert_eq!(daemon.error("service_delete", &json!(["web"]))["code"], -32000);
    fs::remove_dir_all(daemon.config()).unwrap();
    assert_eq!(
        daemon.error("service_create", &json!(["new", {"exec": "true"}]))["code"],
        -32008
    );
    assert_eq!(daemon.prints(&["reload"]), "web: without a file now, left as it is\n");
    daemon.does(&["restart", "web"]);
    daemon.shutdown();
}

#[test]
fn bad_names_are_refused_whatever_is_done_with_them() {
    let daemon = Daemon::start(&[]);
    let long = "x".repeat(300);
    for name in ["..", "../web", "a/b", "a\\b", "a.b", "a\nb", "\u{1}", "", &long] {
        for method in ["service_monitor", "service_get", "service_delete"] {
            assert_eq!(
                daemon.error(method, &json!([name]))["code"],
                -32602,
                "{method} {name:?}"
            );
        }
        assert_eq!(
            daemon.error("service_create", &json!([name, {"exec": "true"}]))["code"],
            -32602,
            "{name:?}"
        );
        for method in [
            "service_status",
            "service_start",
            "service_stop",
            "service_forget",
            "service_stats",
        ] {
            assert_eq!(
                daemon.error(method, &json!([name]))["code"],
                -32000,
                "{method} {name:?}"
            );
        }
        if !name.contains('\n') {
            assert!(
                daemon.refuses(&["monitor", name]).contains("cannot be the name"),
                "{name:?}"
            );
        }
    }
    // A program can be given bytes that are no text.
    let output = daemon
        .command(&["monitor"])
        .arg(OsStr::from_bytes(b"\xff"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(fs::read_dir(daemon.config()).unwrap().count(), 0);
    daemon.shutdown();
}

#[test]
fn garbage_is_answered_and_the_connection_goes_on() {
    let daemon = Daemon::start(&[("web", SLEEP)]);
    let mut connection = daemon.connect();
    let deep = "[".repeat(100_000);
    for (line, code) in [
        ("garbage", -32700),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,", -32700),
        ("\u{0}\u{1}\u{2}", -32700),
        (&deep, -32700),
        ("null", -32600),
        ("[]", -32600),
        ("{}", -32600),
        ("{\"jsonrpc\":\"2.0\",\"id\":1}", -32600),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"nope\"}", -32601),
        ("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"service_start\"}", -32602),
        (
            "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"service_start\",\"params\":[1]}",
            -32602,
        ),
        (
            "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"service_start\",\"params\":{\"nome\":\"x\"}}",
            -32602,
        ),
        (
            "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"service_list\",\"params\":[1,2,3]}",
            -32602,
        ),
    ] {
        connection.send(&format!("{line}\n"));
        let answer = connection.message();
        assert_eq!(answer["error"]["code"], code, "{line:.80}: {answer}");
        assert!(
            answer.to_string().len() < 1000,
            "an answer does not repeat what was sent"
        );
    }
    connection.stream.write_all(b"\xff\xfe\xfd\n").unwrap();
    assert_eq!(connection.message()["error"]["code"], -32700);
    let batch: Vec<_> = (0..101)
        .map(|id| json!({"jsonrpc": "2.0", "id": id, "method": "service_list"}))
        .collect();
    connection.send(&format!("{}\n", json!(batch)));
    assert_eq!(connection.message()["error"]["code"], -32600);
    assert!(connection.call("service_list", &json!([]))["result"].is_object());
    daemon.shutdown();
}

/// The most memory that the daemon ever had, in bytes.
fn peak(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.process().as_raw_nonzero())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn a_line_of_ten_megabytes_is_refused_without_being_kept() {
    let daemon = Daemon::start(&[]);
    let before = peak(&daemon);
    let mut connection = daemon.connect();
    let block = "x".repeat(1_000_000);
    for _ in 0..20 {
        connection.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"");
        for _ in 0..10 {
            connection.send(&block);
        }
        connection.send("\"}\n");
        assert_eq!(connection.message()["error"]["code"], -32600);
    }
    assert!(connection.call("service_list", &json!([]))["result"].is_object());
    let grown = peak(&daemon) - before;
    assert!(grown < 8_000_000, "it has grown by {grown} bytes");
    daemon.shutdown();
}

#[test]
fn half_a_line_is_answered_at_its_end_and_a_client_may_hang_up_anywhere() {
    let daemon = Daemon::start(&[("web", SLEEP)]);
    daemon.wait_for_state("web", "Running");
    let mut connection = daemon.connect();
    connection.send("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"service_list\"}");
    connection.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(
        connection.message()["result"].is_object(),
        "the end of the stream ends the line"
    );
    assert_eq!(connection.line(), None);
    // It gets the lines that were there, and then its end, though further ones may come.
    let mut follower = daemon.connect();
    follower.request(1, "stream_subscribeLogs", &json!([null, true]));
    follower.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(follower.message()["result"].is_u64());
    while let Some(line) = follower.line() {
        assert!(line.contains("stream_subscribeLogs"), "{line}");
    }
    for text in [
        "",
        "{\"jsonrpc\":",
        "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"service_stop\",\"params\":[\"web\"]}\n",
    ] {
        let mut connection = daemon.connect();
        connection.send(text);
        drop(connection);
    }
    wait_for("the service is stopped although nobody waits for the answer", || {
        daemon.pid("web") == 0
    });
    daemon.shutdown();
}

#[test]
fn a_client_that_reads_nothing_holds_up_nobody() {
    let daemon = Daemon::prepare(&[]);
    let flood = daemon.script(
        "flood",
        "exec head -c 30000000 /dev/zero | tr '\\0' x | fold -w 1000; sleep 3600",
    );
    daemon.write("flood", &format!("exec: {flood}"));
    let mut daemon = daemon;
    daemon.run();
    // One subscribes to a flood, others ask for large answers and go in the middle of them, and none of them reads.
    let mut silent = daemon.connect();
    silent.request(1, "stream_subscribeLogs", &json!(["flood", true]));
    wait_for("the ring is full", || {
        daemon
            .call("stream_currentLogs", &json!(["flood"]))
            .as_array()
            .unwrap()
            .len()
            >= 1900
    });
    for _ in 0..5 {
        let mut leaving = daemon.connect();
        for id in 0..4 {
            leaving.request(id, "stream_currentLogs", &json!([]));
        }
        let mut some = [0; 100];
        leaving.stream.read_exact(&mut some).unwrap();
    }
    assert_eq!(daemon.json(&["status", "flood", "--json"])["target"], "Up");
    daemon.does(&["stop", "flood"]);
    // It has lost lines, and is told.
    daemon.does(&["start", "flood"]);
    let mut lost = false;
    while !lost {
        let message = silent.message();
        lost = message["params"]["result"]
            .as_str()
            .is_some_and(|line| line.contains("lines are lost"));
    }
    daemon.shutdown();
}

#[test]
fn a_thousand_idle_connections_harm_nobody() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if hard < 4096 {
        println!("SKIPPED: this process may have only {hard} descriptors");
        assert!(std::env::var_os("CI").is_none(), "CI must have 4096");
        return;
    }
    // The daemon inherits it, and has room for 1024 connections.
    setrlimit(Resource::RLIMIT_NOFILE, 4096, hard).unwrap();
    let daemon = Daemon::start(&[("web", SLEEP)]);
    daemon.wait_for_state("web", "Running");
    let mut idle: Vec<_> = (0..1000)
        .map(|_| UnixStream::connect(daemon.socket()).unwrap())
        .collect();
    assert_eq!(daemon.prints(&["list"]), "---\nweb: Running\n");
    daemon.does(&["restart", "web"]);
    daemon.wait_for_state("web", "Running");
    // The last of them is still served.
    idle[999]
        .write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"service_list\"}\n")
        .unwrap();
    let mut answer = [0; 20];
    idle[999].read_exact(&mut answer).unwrap();
    // More than there is room for: whoever was idle for longest is told to go.
    let more: Vec<_> = (0..200)
        .map(|_| UnixStream::connect(daemon.socket()).unwrap())
        .collect();
    assert_eq!(daemon.prints(&["list"]), "---\nweb: Running\n");
    let mut text = String::new();
    idle[0].read_to_string(&mut text).unwrap();
    assert!(text.contains("idle"), "{text:?}");
    drop((idle, more));
    daemon.shutdown();
}

/// The command that starts the daemon with so many descriptors, of which connections get a quarter.
fn init_with_descriptors(daemon: &Daemon, descriptors: u32) -> Command {
    let init = daemon.init(&[]);
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -n {descriptors} && exec \"$@\""), "sh"]);
    command.arg(init.get_program()).args(init.get_args());
    command.envs(init.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

#[test]
fn followers_that_read_nothing_make_room_and_hold_up_no_shutdown() {
    let mut daemon = Daemon::prepare(&[("web", SLEEP)]);
    let flood = daemon.script(
        "flood",
        "head -c 2000000 /dev/zero | tr '\\0' x | fold -w 1000; exec sleep 3600",
    );
    daemon.write("flood", &format!("exec: {flood}"));
    daemon.run_as(init_with_descriptors(&daemon, 256));
    wait_for("the ring is full", || {
        let lines = daemon.call("stream_currentLogs", &json!(["flood"]));
        lines.as_array().unwrap().len() >= 1900
    });
    let mut good = daemon.connect();
    assert!(good.call("stream_subscribeLogs", &json!(["web"]))["result"].is_u64());
    // Three times as many as there is room for.
    let silent: Vec<_> = (0..192)
        .map(|_| {
            let mut silent = daemon.connect();
            silent.request(1, "stream_subscribeLogs", &json!(["flood", true]));
            silent
        })
        .collect();
    for _ in 0..3 {
        assert!(daemon.call("service_list", &json!([])).is_object());
    }
    daemon.does(&["restart", "web"]);
    assert_eq!(
        good.message()["method"],
        "stream_subscribeLogs",
        "who reads is served on"
    );
    daemon.does(&["shutdown"]);
    daemon.assert_ends_well();
    let log = daemon.log();
    assert!(!log.contains("did not take their last answers"), "{log}");
    drop(silent);
}

#[test]
fn a_batch_is_answered_as_far_as_there_is_room() {
    let mut daemon = Daemon::prepare(&[]);
    let flood = daemon.script(
        "flood",
        "head -c 8000000 /dev/zero | tr '\\0' x | fold -w 4000; exec sleep 3600",
    );
    daemon.write("flood", &format!("exec: {flood}"));
    daemon.write("web", SLEEP);
    daemon.run();
    daemon.wait_for_state("web", "Running");
    wait_for("the ring is full", || {
        let lines = daemon.call("stream_currentLogs", &json!(["flood"]));
        lines.as_array().unwrap().len() >= 1900
    });
    let before = peak(&daemon);
    let request =
        |id: u32, method: &str, params: &Value| json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params});
    let mut batch: Vec<_> = (0..99)
        .map(|id| request(id, "stream_currentLogs", &json!([])))
        .collect();
    batch.push(request(99, "service_stop", &json!(["web"])));
    let mut connection = daemon.connect();
    connection.send(&format!("{}\n", json!(batch)));
    let answer = connection.message();
    let answers = answer.as_array().unwrap();
    assert_eq!(answers.len(), 100);
    assert!(answers[0]["result"].is_array());
    let refused = answers.iter().position(|answer| !answer["error"].is_null()).unwrap();
    assert!((1..10).contains(&refused), "{refused}");
    for answer in &answers[refused..] {
        assert_eq!(answer["error"]["code"], -32603);
    }
    let message = answers[99]["error"]["message"].as_str().unwrap();
    assert!(message.contains("was not done"), "{message}");
    assert_eq!(daemon.state("web"), "Running");
    let grown = peak(&daemon) - before;
    assert!(grown < 300_000_000, "it has grown by {grown} bytes");
    daemon.shutdown();
}

#[test]
fn nobody_else_can_lock_a_daemon_out() {
    let mut daemon = Daemon::prepare(&[("web", SLEEP)]);
    // Whoever may look at the directory may do this.
    let directory = fs::File::open(daemon.scratch()).unwrap();
    flock(&directory, FlockOperation::LockExclusive).unwrap();
    daemon.run();
    daemon.wait_for_state("web", "Running");
    let mode = fs::metadata(daemon.socket_lock()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    daemon.shutdown();
}

#[test]
fn a_daemon_whose_socket_was_removed_keeps_its_place() {
    let mut daemon = Daemon::start(&[("web", SLEEP)]);
    daemon.wait_for_state("web", "Running");
    let pid = daemon.process().as_raw_nonzero();
    fs::remove_file(daemon.socket()).unwrap();
    let second = daemon.init(&[]).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr(&second).contains(&format!("(pid {pid})")), "{}", stderr(&second));
    assert!(stderr(&second).contains("nobody listens"), "{}", stderr(&second));
    assert_eq!(stderr(&second).lines().count(), 1, "{}", stderr(&second));
    assert!(!daemon.socket().exists());
    daemon.signal(Signal::TERM);
    daemon.assert_ends_well();
}

#[test]
fn a_live_daemons_socket_is_left_alone_and_a_stale_one_is_replaced() {
    let mut daemon = Daemon::start(&[("web", SLEEP)]);
    daemon.wait_for_state("web", "Running");
    let second = daemon.init(&[]).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(stderr(&second).contains("listening on"), "{}", stderr(&second));
    let pid = daemon.process().as_raw_nonzero();
    assert!(stderr(&second).contains(&format!("(pid {pid})")), "{}", stderr(&second));
    assert_eq!(stderr(&second).lines().count(), 1, "{}", stderr(&second));
    assert_eq!(daemon.state("web"), "Running", "the first one serves on");
    daemon.does(&["shutdown"]);
    daemon.assert_ends_well();

    // A socket that nobody listens on, as a killed daemon leaves it.
    drop(UnixListener::bind(daemon.socket()).unwrap());
    daemon.run();
    daemon.wait_for_state("web", "Running");
    daemon.signal(Signal::TERM);
    daemon.assert_ends_well();

    fs::write(daemon.socket(), "precious").unwrap();
    let refused = daemon.init(&[]).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("no socket"), "{}", stderr(&refused));
    assert_eq!(fs::read_to_string(daemon.socket()).unwrap(), "precious");
    fs::remove_file(daemon.socket()).unwrap();
}

#[test]
fn what_init_cannot_use_it_names_in_one_line() {
    let daemon = Daemon::prepare(&[]);
    let long = format!("/tmp/{}", "x".repeat(200));
    for (arguments, text) in [
        (
            vec!["--socket", "/tmp/z.sock", "init", "-c", "/no/such/directory"],
            "/no/such/directory is no directory",
        ),
        (
            vec!["--socket", "/no/such/directory/z.sock", "init", "-c", "/tmp"],
            "/no/such/directory",
        ),
        (vec!["--socket", &long, "init", "-c", "/tmp"], "too long"),
    ] {
        let mut command = Command::new(zinit_tests::zinit());
        let output = command
            .args(&arguments)
            .env("ZINIT_TRACKER_PINS", daemon.scratch())
            .env(zinit_tests::Marker::ENV, daemon.marker.as_str())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(stderr(&output).contains(text), "{arguments:?}: {}", stderr(&output));
        assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    }
    for bad in [
        &["init", "-b", "-1"][..],
        &["init", "-b", "many"],
        &["nope"],
        &["status"],
        &["kill"],
        &["proxy", "-a", "x:y"],
    ] {
        assert_eq!(daemon.zinit(bad).status.code(), Some(1), "{bad:?}");
    }
}

#[test]
fn services_that_misbehave_with_their_output_harm_nobody() {
    let daemon = Daemon::prepare(&[("good", SLEEP)]);
    let files = [
        ("closes", "exec 1>&- 2>&-; exec sleep 3600"),
        ("binary", "head -c 100000 /dev/urandom; exec sleep 3600"),
        ("endless", "head -c 100000 /dev/zero | tr '\\0' y; exec sleep 3600"),
        (
            "bytewise",
            "i=0; while [ $i -lt 200 ]; do printf x; i=$((i+1)); done; echo; exec sleep 3600",
        ),
    ];
    for (name, script) in files {
        let path = daemon.script(&format!("{name}.sh"), script);
        daemon.write(name, &format!("exec: {path}"));
    }
    let mut daemon = daemon;
    daemon.run();
    let lines = |service: &str| -> Vec<String> {
        let lines = daemon.call("stream_currentLogs", &json!([service]));
        lines
            .as_array()
            .unwrap()
            .iter()
            .map(|line| line.as_str().unwrap().to_owned())
            .collect()
    };
    wait_for("all of it is there", || {
        let endless: usize = lines("endless").iter().map(|line| line.matches('y').count()).sum();
        // The last piece has no end, and comes when the service is down.
        endless >= 12 * 8192 && lines("bytewise").iter().any(|line| line.ends_with(&"x".repeat(200)))
    });
    daemon.wait_for_state("closes", "Running");
    for service in ["closes", "binary", "endless", "bytewise"] {
        daemon.does(&["stop", service]);
    }
    let endless: usize = lines("endless")
        .iter()
        .skip(1)
        .map(|line| line.split_once(": ").unwrap().1.len())
        .sum();
    assert_eq!(endless, 100_000);
    assert!(matches!(daemon.call("service_list", &json!([])), Value::Object(_)));
    daemon.shutdown();
}
