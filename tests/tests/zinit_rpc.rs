//! `zinit`'s interfaces for programs: the published client, JSON-RPC lines, and HTTP.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    process::Stdio,
};

use serde_json::{Value, json};
use zinit_client::{ServiceState, ServiceTarget, ZinitClient, ZinitError};
use zinit_tests::{
    daemon::{Daemon, wait_for},
    holds::{Freezer, skipped},
    rights::Rights,
    sandbox::DEADLINE,
};

const SLEEP: &str = "exec: sleep 3600";

fn code(error: ZinitError) -> i32 {
    match error {
        ZinitError::JsonRpcError { code, .. } => code,
        error => panic!("{error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_published_client_drives_the_daemon_through_its_whole_interface() {
    let mut daemon = Daemon::start(&[
        ("web", "exec: sh -c 'echo hello world; exec sleep 3600'"),
        ("once", "exec: 'true'\noneshot: true"),
    ]);
    daemon.wait_for_state("web", "Running");
    daemon.wait_for_state("once", "Success");
    let client = ZinitClient::new(daemon.socket());

    let list = client.list().await.unwrap();
    assert_eq!(list["web"], ServiceState::Running);
    assert_eq!(list["once"], ServiceState::Success);

    let status = client.status("web").await.unwrap();
    assert_eq!(
        (status.state, status.target),
        (ServiceState::Running, ServiceTarget::Up)
    );
    assert_eq!(u64::from(status.pid), daemon.pid("web"));
    assert_eq!(client.get_service("web").await.unwrap()["name"], "web");

    client.stop("web").await.unwrap();
    let status = client.status("web").await.unwrap();
    assert_eq!((status.pid, status.target), (0, ServiceTarget::Down));
    client.start("web").await.unwrap();
    daemon.wait_for_state("web", "Running");
    client.restart("web").await.unwrap();
    daemon.wait_for_state("web", "Running");
    let pid = daemon.pid("web");
    client.kill("web", "SIGKILL").await.unwrap();
    wait_for("it is started again", || ![0, pid].contains(&daemon.pid("web")));
    daemon.wait_for_state("web", "Running");

    let fields = json!({"exec": "sleep 3600", "after": ["web"], "env": {"PORT": "80"}, "log": "ring"});
    client.create_service("made", fields.clone()).await.unwrap();
    assert_eq!(daemon.call("service_get", &json!(["made"])), fields);
    client.monitor("made").await.unwrap();
    daemon.wait_for_state("made", "Running");
    let stats = daemon.call("service_stats", &json!(["made"]));
    assert_eq!(stats["name"], "made");
    client.stop("made").await.unwrap();
    client.forget("made").await.unwrap();
    client.monitor("made").await.unwrap();
    daemon.wait_for_state("made", "Running");
    client.delete_service("made").await.unwrap();
    assert!(!daemon.config().join("made.yaml").exists());
    assert_eq!(code(client.status("made").await.unwrap_err()), -32000);
    assert_eq!(code(client.monitor("web").await.unwrap_err()), -32001);
    assert_eq!(code(client.forget("web").await.unwrap_err()), -32002);
    assert_eq!(code(client.kill("once", "SIGTERM").await.unwrap_err()), -32003);
    assert_eq!(code(client.kill("web", "SIGNOPE").await.unwrap_err()), -32004);

    use futures_util::StreamExt as _;
    let mut logs = client.logs(false, Some("web")).await.unwrap();
    let entry = loop {
        let entry = logs.next().await.unwrap().unwrap();
        if entry.message.contains("hello") {
            break entry;
        }
    };
    assert_eq!(
        (entry.service.as_str(), entry.message.as_str()),
        ("web", "[INFO] hello world")
    );
    while logs.next().await.is_some() {}
    let mut logs = client.logs(true, Some("web")).await.unwrap();
    client.restart("web").await.unwrap();
    let mut hellos = 0;
    while hellos < 5 {
        let entry = tokio::time::timeout(DEADLINE, logs.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        hellos += usize::from(entry.message == "[INFO] hello world");
    }

    client.shutdown().await.unwrap();
    daemon.assert_ends_well();
}

#[test]
fn results_have_zinits_shapes_and_parameters_come_either_way() {
    let daemon = Daemon::start(&[("db", SLEEP), ("web", "exec: sleep 3600\nafter: [db]")]);
    daemon.wait_for_state("web", "Running");
    let pid = daemon.pid("web");
    assert_eq!(
        daemon.call("service_list", &json!([])),
        json!({"db": "Running", "web": "Running"})
    );
    for params in [json!(["web"]), json!({"name": "web"})] {
        assert_eq!(
            daemon.call("service_status", &params),
            json!({"name": "web", "pid": pid, "state": "Running", "target": "Up", "after": {"db": "Running"}, "tracking": "ebpf"})
        );
    }
    let stats = daemon.call("service_stats", &json!(["web"]));
    assert!(stats["memory_usage"].as_u64().unwrap() > 0, "{stats}");
    assert!(stats["cpu_usage"].is_f64(), "{stats}");
    assert_eq!(stats["children"], json!([]));
    let created = daemon.call(
        "service_create",
        &json!({"name": "made", "content": {"exec": "sleep 1"}}),
    );
    assert!(created.is_string());
    assert_eq!(daemon.call("service_get", &json!(["made"])), json!({"exec": "sleep 1"}));
    assert!(daemon.call("service_delete", &json!(["made"])).is_string());
    for (method, params) in [
        ("service_kill", json!(["web", "SIGCONT"])),
        ("service_stop", json!(["web"])),
        ("service_start", json!(["web"])),
        ("service_stop", json!({"name": "web"})),
        ("service_forget", json!(["web"])),
        ("service_monitor", json!(["web"])),
        ("service_restart", json!(["web"])),
    ] {
        assert_eq!(daemon.call(method, &params), Value::Null, "{method}");
    }
    assert_eq!(daemon.call("service_stop", &json!(["web", true]))["proven"], true);
    assert!(
        daemon
            .call("stream_currentLogs", &json!([null]))
            .as_array()
            .unwrap()
            .len()
            >= 2
    );
    assert_eq!(daemon.call("stream_currentLogs", &json!(["nobody"])), json!([]));
    let changes = json!({"added": [], "changed": [], "missing": [], "failed": {}});
    assert_eq!(daemon.call("system_reload", &json!([])), changes);
    let document: Value = serde_json::from_str(daemon.call("rpc.discover", &json!([])).as_str().unwrap()).unwrap();
    assert_eq!(document["openrpc"], "1.2.6");
    assert_eq!(daemon.call("system_shutdown", &json!([])), Value::Null);
    let mut daemon = daemon;
    daemon.assert_ends_well();
}

#[test]
fn errors_say_what_is_wrong_and_what_to_do() {
    let daemon = Daemon::start(&[("web", SLEEP), ("bad", "exec: 'a")]);
    daemon.wait_for_state("web", "Running");
    for (method, params, code, name) in [
        ("service_status", json!(["nope"]), -32000, "ServiceNotFound"),
        ("service_monitor", json!(["nope"]), -32000, "ServiceNotFound"),
        ("service_monitor", json!(["web"]), -32001, "ServiceAlreadyMonitored"),
        ("service_forget", json!(["web"]), -32002, "ServiceIsUp"),
        ("service_kill", json!(["web", "SIGNOPE"]), -32004, "InvalidSignal"),
        ("service_monitor", json!(["bad"]), -32005, "ConfigError"),
        (
            "service_create",
            json!(["new", {"exec": "a 'b"}]),
            -32005,
            "ConfigError",
        ),
        (
            "service_create",
            json!(["web", {"exec": "a"}]),
            -32007,
            "ServiceAlreadyExists",
        ),
        (
            "service_create",
            json!(["../web", {"exec": "a"}]),
            -32602,
            "InvalidServiceName",
        ),
        ("service_delete", json!(["../web"]), -32602, "InvalidServiceName"),
        ("service_get", json!(["a/b"]), -32602, "InvalidServiceName"),
        ("service_monitor", json!(["a.b"]), -32602, "InvalidServiceName"),
        ("system_stop_http_server", json!([]), -32603, "InternalError"),
    ] {
        let error = daemon.error(method, &params);
        assert_eq!(error["code"], code, "{method}: {error}");
        let data = &error["data"];
        assert_eq!(data["code_name"], name, "{method}: {error}");
        assert!(
            data["action"].is_string() && data["hint"].is_string() && data["retryable"].is_boolean(),
            "{error}"
        );
        assert!(
            data.get("cause_chain").is_some() && data.get("service").is_some(),
            "{error}"
        );
        if method != "system_stop_http_server" {
            assert_eq!(data["service"], params[0], "{error}");
        }
    }
    let error = daemon.error("service_monitor", &json!(["bad"]));
    let cause = error["data"]["cause_chain"][0].as_str().unwrap();
    assert!(cause.contains("bad.yaml: line 1, column 7"), "{cause}");
    daemon.does(&["stop", "web"]);
    assert_eq!(daemon.error("service_kill", &json!(["web", "SIGTERM"]))["code"], -32003);
    assert_eq!(daemon.error("service_stats", &json!(["web"]))["code"], -32003);
    daemon.shutdown();
}

#[test]
fn a_connection_takes_several_requests_batches_and_notifications() {
    let daemon = Daemon::start(&[("web", SLEEP)]);
    daemon.wait_for_state("web", "Running");
    let mut connection = daemon.connect();
    connection.send("{\"jsonrpc\":\"2.0\",\"id\":\"a\",\"method\":\"service_list\"}\n");
    let line = connection.line().unwrap();
    assert_eq!(
        line, "{\"jsonrpc\":\"2.0\",\"id\":\"a\",\"result\":{\"web\":\"Running\"}}\n",
        "compact, and one line"
    );

    let notification = json!({"jsonrpc": "2.0", "method": "service_stop", "params": ["web"]});
    let list = |id| json!({"jsonrpc": "2.0", "id": id, "method": "service_list", "params": []});
    let bad = json!({"jsonrpc": "2.0", "id": 3, "method": "nope"});
    connection.send(&format!("{}\n", json!([list(1), notification, bad, 4, list(5)])));
    let answers = connection.message();
    let ids: Vec<_> = answers
        .as_array()
        .unwrap()
        .iter()
        .map(|answer| answer["id"].clone())
        .collect();
    assert_eq!(ids, [json!(1), json!(3), json!(null), json!(5)], "{answers}");
    assert_eq!(answers[1]["error"]["code"], -32601);
    assert_eq!(answers[2]["error"]["code"], -32600);
    assert_eq!(daemon.pid("web"), 0, "the notification was carried out");

    // Neither a notification nor a batch of them is answered; the next answer is that of the request behind them.
    connection.send(&format!("{notification}\n{}\n\n", json!([notification, notification])));
    assert_eq!(connection.call("service_list", &json!([]))["id"], 1);
    daemon.shutdown();
}

#[test]
fn requests_are_begun_in_their_order_and_one_that_takes_long_holds_up_no_other() {
    let daemon = Daemon::prepare(&[]);
    let deaf = daemon.script("deaf", "trap '' TERM\necho ready\nwhile :; do sleep 1; done");
    daemon.write("deaf", &format!("exec: {deaf}\nshutdown_timeout: 30"));
    daemon.write("web", SLEEP);
    let mut daemon = daemon;
    daemon.run();
    daemon.wait_for_state("web", "Running");
    wait_for("it is deaf", || daemon.prints(&["log", "-s", "deaf"]).contains("ready"));
    let mut connection = daemon.connect();
    connection.request(1, "service_stop", &json!(["deaf"]));
    connection.request(2, "service_stop", &json!(["web"]));
    connection.request(3, "service_start", &json!(["web"]));
    connection.request(4, "service_status", &json!(["web"]));
    let mut answers: Vec<_> = (0..3).map(|_| connection.message()["id"].as_u64().unwrap()).collect();
    answers.sort_unstable();
    assert_eq!(answers, [2, 3, 4]);
    assert_eq!(
        daemon.json(&["status", "web", "--json"])["target"],
        "Up",
        "first stop, then start"
    );
    // SIGKILL to the main process; its sleep has got SIGTERM and is gone.
    connection.request(5, "service_kill", &json!(["deaf", "SIGKILL"]));
    let mut answers = [
        connection.message()["id"].as_u64().unwrap(),
        connection.message()["id"].as_u64().unwrap(),
    ];
    answers.sort_unstable();
    assert_eq!(answers, [1, 5]);
    daemon.shutdown();
}

#[test]
fn lines_are_sent_to_those_who_subscribe() {
    let daemon = Daemon::start(&[
        ("web", "exec: sh -c 'echo hello; exec sleep 3600'"),
        ("other", "exec: sh -c 'echo other; exec sleep 3600'"),
    ]);
    daemon.wait_for_state("web", "Running");
    wait_for("it has said hello", || {
        daemon.prints(&["log", "-s"]).contains("[+] web: hello")
    });
    let mut connection = daemon.connect();
    let all = connection.call("stream_subscribeLogs", &json!([null]))["result"].clone();
    let one = connection.call("stream_subscribeLogs", &json!(["web", true]))["result"].clone();
    assert_ne!(all, one);
    let mut next = |subscription: &Value, text: &str| loop {
        let message = connection.message();
        assert_eq!(message["method"], "stream_subscribeLogs", "{message}");
        let params = &message["params"];
        if params["subscription"] == *subscription && params["result"] == text {
            return;
        }
    };
    next(&one, "[+] web: hello");
    daemon.does(&["restart", "web"]);
    next(&all, "[+] web: hello");
    daemon.does(&["restart", "other"]);
    next(&all, "[+] other: other");
    let mut answer = |method: &str, params: &Value| {
        connection.request(9, method, params);
        loop {
            let message = connection.message();
            if message["id"] == 9 {
                return message["result"].clone();
            }
        }
    };
    assert_eq!(answer("stream_unsubscribeLogs", &json!([all])), true);
    assert_eq!(answer("stream_unsubscribeLogs", &json!([all])), false);
    assert_eq!(answer("stream_unsubscribeLogs", &json!([one])), true);
    daemon.shutdown();
}

#[test]
fn the_socket_is_for_root_and_the_daemons_own_user() {
    let daemon = Daemon::start(&[]);
    let mode = std::fs::metadata(daemon.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    // Somebody who reaches the socket all the same is told by the kernel to be somebody else.
    std::fs::set_permissions(daemon.socket(), PermissionsExt::from_mode(0o666)).unwrap();
    std::fs::set_permissions(daemon.scratch(), PermissionsExt::from_mode(0o755)).unwrap();
    let socket = daemon.socket();
    let answer = std::thread::spawn(move || {
        // Of this thread only: what connect(2) notes for the peer.
        rustix::thread::set_thread_res_uid(
            rustix::process::Uid::from_raw(65534),
            rustix::process::Uid::from_raw(65534),
            rustix::process::Uid::from_raw(65534),
        )
        .unwrap();
        let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    let answer = answer.join().unwrap();
    assert!(answer.contains("only root"), "{answer:?}");
    daemon.shutdown();
}

/// Sends a request as it is, and returns the status and the body.
fn http(address: &str, request: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer
        .split(' ')
        .nth(1)
        .unwrap_or_else(|| panic!("{answer:?}"))
        .parse()
        .unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1.to_owned();
    (status, body)
}

fn post(address: &str, headers: &str, body: &str) -> (u16, String) {
    let length = body.len();
    http(
        address,
        &format!("POST / HTTP/1.1\r\n{headers}Content-Length: {length}\r\n\r\n{body}"),
    )
}

const LIST: &str = "{\"jsonrpc\": \"2.0\", \"id\": 1,\n \"method\": \"service_list\"}";
const JSON: &str = "Content-Type: application/json\r\n";

fn check_http(address: &str) {
    let port = address.rsplit_once(':').unwrap().1;
    let local = format!("Host: {address}\r\n{JSON}");
    assert_eq!(
        post(address, &local, LIST),
        (
            200,
            "{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"web\":\"Running\"}}".to_owned()
        )
    );
    let (status, body) = post(address, &local, &format!("[{LIST},{LIST}]"));
    assert_eq!(
        (
            status,
            serde_json::from_str::<Value>(&body).unwrap().as_array().unwrap().len()
        ),
        (200, 2)
    );
    let notification = "{\"jsonrpc\":\"2.0\",\"method\":\"service_list\"}";
    assert_eq!(post(address, &local, notification), (204, String::new()));
    for (body, code) in [
        ("{", "-32700"),
        ("[]", "-32600"),
        ("{}", "-32600"),
        (
            "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"stream_subscribeLogs\"}",
            "-32600",
        ),
    ] {
        let (status, answer) = post(address, &local, body);
        assert!(status == 200 && answer.contains(code), "{body}: {status} {answer}");
    }
    let create =
        "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"service_create\",\"params\":[\"evil\",{\"exec\":\"true\"}]}";
    for headers in [
        format!("Host: evil.example:{port}\r\n{JSON}"),
        format!("Host: {address}\r\nOrigin: http://evil.example\r\n{JSON}"),
        format!("Host: {address}\r\nOrigin: null\r\n{JSON}"),
        format!("Host: localhost:{port}\r\nOrigin: http://localhost:1\r\n{JSON}"),
        JSON.to_owned(),
    ] {
        let (status, body) = post(address, &headers, create);
        assert!(status == 403 || status == 400, "{headers}: {status} {body}");
    }
    assert_eq!(
        post(
            address,
            &format!("Host: {address}\r\nContent-Type: text/plain\r\n"),
            create
        )
        .0,
        415
    );
    assert_eq!(
        http(address, &format!("GET / HTTP/1.1\r\nHost: {address}\r\n\r\n")).0,
        405
    );
    assert_eq!(
        http(
            address,
            &format!("OPTIONS / HTTP/1.1\r\nHost: {address}\r\nOrigin: http://evil.example\r\n\r\n")
        )
        .0,
        403
    );
    let large = format!("POST / HTTP/1.1\r\n{local}Content-Length: 10000000\r\n\r\n");
    assert_eq!(http(address, &large).0, 413);
    let head = format!("POST / HTTP/1.1\r\n{local}X: {}\r\n\r\n", "x".repeat(100_000));
    let mut stream = TcpStream::connect(address).unwrap();
    // It may be refused before it has been sent.
    drop(stream.write_all(head.as_bytes()));
    let mut answer = String::new();
    drop(stream.read_to_string(&mut answer));
    assert!(answer.is_empty() || answer.contains(" 431 "), "{answer}");
}

#[test]
fn http_is_served_to_this_machine_and_refused_to_web_pages() {
    let daemon = Daemon::start(&[("web", SLEEP)]);
    daemon.wait_for_state("web", "Running");
    let message = daemon.call("system_start_http_server", &json!([":0"]));
    let address = message
        .as_str()
        .unwrap()
        .strip_prefix("HTTP/RPC server started at ")
        .unwrap()
        .to_owned();
    assert!(address.starts_with("127.0.0.1:"), "{address}");
    check_http(&address);
    assert!(
        daemon.error("system_start_http_server", &json!([":0"]))["message"]
            .as_str()
            .unwrap()
            .contains("runs already")
    );
    assert_eq!(
        daemon.error("system_start_http_server", &json!(["no address"]))["code"],
        -32602
    );
    assert_eq!(daemon.call("system_stop_http_server", &json!([])), Value::Null);
    wait_for("nobody listens", || TcpStream::connect(&address).is_err());

    let mut proxy = daemon
        .command(&["proxy", "-a", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = std::io::BufReader::new(proxy.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
    let address = line
        .trim()
        .strip_prefix("HTTP/RPC server started at ")
        .unwrap()
        .to_owned();
    check_http(&address);
    assert!(!daemon.config().join("evil.yaml").exists());
    // CAP_NET_BIND_SERVICE.
    for thread in Rights::of_threads(proxy.id()) {
        assert_eq!(thread, Rights::only(&[10]));
    }
    // A client that sends nothing holds up nobody.
    let _silent: Vec<_> = (0..20).map(|_| TcpStream::connect(&address).unwrap()).collect();
    check_http(&address);
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(proxy.id()).unwrap()),
        nix::sys::signal::Signal::SIGINT,
    )
    .unwrap();
    let mut status = None;
    wait_for("the proxy ends", || {
        status = proxy.try_wait().unwrap();
        status.is_some()
    });
    assert!(status.unwrap().success());
    daemon.shutdown();
}

#[test]
fn a_shutdown_under_way_refuses_starts() {
    let mut daemon = Daemon::start(&[
        (
            "deaf",
            "exec: sh -c \"trap '' TERM; exec sleep 3600\"\nshutdown_timeout: 600",
        ),
        ("web", SLEEP),
    ]);
    daemon.wait_for_state("deaf", "Running");
    let mut connection = daemon.connect();
    connection.request(1, "system_shutdown", &json!([]));
    let mut refused = Value::Null;
    wait_for("starts are refused", || {
        let answer = daemon.connect().call("service_start", &json!(["web"]));
        refused = answer["error"].clone();
        refused.is_object()
    });
    assert_eq!(refused["code"], -32006, "{refused}");
    assert_eq!(refused["data"]["code_name"], "ShuttingDown", "{refused}");
    daemon.does(&["kill", "deaf", "SIGKILL"]);
    assert_eq!(connection.message()["result"], Value::Null);
    daemon.assert_ends_well();
}

#[test]
fn survivors_are_an_error_that_names_them() {
    let Some(freezer) = Freezer::v1() else {
        return skipped("there is no cgroup v1 freezer");
    };
    let daemon = Daemon::start(&[("web", "exec: sleep 3600\nshutdown_timeout: 0\nkill_after: 0.5")]);
    daemon.wait_for_state("web", "Running");
    let pid = u32::try_from(daemon.pid("web")).unwrap();
    freezer.add(pid);
    freezer.freeze();
    let error = daemon.error("service_stop", &json!(["web", true]));
    assert_eq!(
        (&error["code"], &error["data"]["service"]),
        (&json!(-32012), &json!("web")),
        "{error}"
    );
    assert_eq!(error["data"]["code_name"], "ServiceSurvivors", "{error}");
    assert_eq!(error["data"]["report"]["survivors"][0]["pid"], pid, "{error}");
    let line = daemon.refuses(&["stop", "web"]);
    assert!(line.contains(&pid.to_string()) && line.contains("frozen"), "{line}");
    let state = daemon.state("web");
    assert!(
        state.starts_with("Error") && state.contains(&pid.to_string()),
        "{state}"
    );
    freezer.thaw();
    daemon.does(&["stop", "web"]);
    daemon.shutdown();
}
