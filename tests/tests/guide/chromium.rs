//! A headless Chromium: processes in user, pid and network namespaces of their own, and crash handlers that daemonise.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    os::unix::fs::chown,
};

use nix::unistd::User;
use serde_json::Value;
use zinit_tests::{daemon::wait_for, sandbox::DEADLINE};

use super::{
    case::{Case, nobody_was_killed, program},
    document::Numbers,
};

/// Whose title is the script's, if it was executed.
const PAGE: &str = "<!doctype html><title>raw</title><script>document.title = 'rendered ' + 6 * 7</script>";

/// The pages that the browser shows, as its debugging interface lists them.
fn pages(case: &Case) -> io::Result<Value> {
    let port = fs::read_to_string(case.path("profile/DevToolsActivePort"))?;
    let port = port.lines().next().and_then(|port| port.parse().ok());
    let port: u16 = port.ok_or_else(|| io::Error::other("the port is not there yet"))?;
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    write!(
        stream,
        "GET /json/list HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
    )?;
    let mut stream = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let line = line.trim().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(serde_json::from_slice(&body)?)
}

fn has_rendered(case: &Case) -> bool {
    let pages = pages(case).unwrap_or_default();
    let mut pages = pages.as_array().into_iter().flatten();
    pages.any(|page| page["type"] == "page" && page["title"] == "rendered 42")
}

/// Whose pid namespace, by `/proc`, is not that of the process.
fn in_other_pid_namespaces(case: &Case, main: i32) -> BTreeSet<i32> {
    let of = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let mut present = case.present();
    present.retain(|pid| of(*pid).is_some_and(|namespace| Some(namespace) != of(main)));
    present
}

#[test]
fn a_headless_chromium_is_tracked_through_its_namespaces_and_stopped() {
    if program("/usr/bin/chromium", "chromium").is_none() {
        return;
    }
    let mut case = Case::prepare("Chromium", "browser");
    let user = User::from_name("nobody").unwrap().unwrap();
    chown(case.directory(), Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
    fs::write(case.path("page.html"), PAGE).unwrap();
    let page = format!("file://{}", case.path("page.html"));
    let home = case.directory().display().to_string();
    case.define(
        0,
        &[
            ("/var/lib/browser", &home),
            ("https://example.com/", &page),
            ("port=9222", "port=0"),
            ("user: browser", "user: nobody"),
        ],
    );
    // Where it makes a directory that it leaves.
    case.start(&[("TMPDIR", &home)]);
    let main = case.main();
    wait_for("the page is rendered", || has_rendered(&case));
    case.wait_until_tracked(|present| present.len() > 5);
    let departures = case.wait_for_departures(main);
    let sandboxed = in_other_pid_namespaces(&case, main);
    assert!(sandboxed.len() >= 2, "{departures:?}");
    for pid in &sandboxed {
        let left = &departures[pid];
        assert!(
            left.contains("user namespace") && left.contains("pid namespace"),
            "{departures:?}"
        );
    }
    let handlers = case.with_command(|line| line.contains("chrome_crashpad_handler"));
    assert!(!handlers.is_empty());
    for pid in &handlers {
        assert!(
            departures[pid].contains("parent") && departures[pid].contains("session"),
            "{departures:?}"
        );
    }
    println!(
        "{} processes, {} of them in other pid namespaces",
        case.present().len(),
        sandboxed.len()
    );
    case.shows("zinit-tracker tree browser", Numbers::All);
    case.shows("zinit-tracker escapes browser", Numbers::All);
    case.shows("zinit-tracker diff browser", Numbers::All);

    let report = case.stop();
    assert!(nobody_was_killed(&report), "{report:#}");
    let browser = report["processes"]
        .as_array()
        .unwrap()
        .iter()
        .find(|death| death["pid"] == main);
    assert_eq!(browser.unwrap()["fate"]["exited"], 0, "{report:#}");
    let preferences = fs::read_to_string(case.path("profile/Default/Preferences")).unwrap();
    let preferences: Value = serde_json::from_str(&preferences).unwrap();
    assert_ne!(
        preferences["profile"]["exit_type"], "Crashed",
        "{}",
        preferences["profile"]
    );
    case.end();
}
