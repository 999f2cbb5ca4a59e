//! nginx: an upgrade by signals leaves a master that is the orphan of the one before.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use zinit_tests::{daemon::wait_for, oracle::place, sandbox::DEADLINE};

use super::{
    case::{Case, nobody_was_killed, program, set},
    document::Numbers,
};

const PROGRAM: &str = "/usr/sbin/nginx";
const PAGE: &str = "served by nginx";

/// An nginx of the test's own on a port of its own.
struct Nginx {
    case: Case,
    port: u16,
}

impl Nginx {
    /// `None`: nginx is not installed.
    fn start(file: usize) -> Option<Self> {
        program(PROGRAM, "nginx")?;
        let case = Case::prepare("nginx", "web");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        fs::write(case.path("index.html"), PAGE).unwrap();
        let directory = case.directory().display();
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
        let temporary = temporary.map(|kind| format!("{kind}_temp_path {directory}/{kind};"));
        let configuration = format!(
            "pid {directory}/pid;\nerror_log {directory}/error.log notice;\nworker_processes 2;\nevents {{}}\nhttp {{\n\
             access_log off;\n{}\nserver {{ listen 127.0.0.1:{port}; root {directory}; }}\n}}\n",
            temporary.join("\n")
        );
        let path = case.path("nginx.conf");
        fs::write(&path, configuration).unwrap();
        case.define(file, &[(PROGRAM, &format!("{PROGRAM} -c {path}"))]);
        let mut nginx = Self { case, port };
        nginx.case.start(&[]);
        wait_for("it serves", || nginx.get().is_ok());
        Some(nginx)
    }

    /// Asks for the page, which must be right.
    fn get(&self) -> io::Result<()> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.write_all(b"GET /index.html HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let right = answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with(PAGE);
        right.then_some(()).ok_or_else(|| io::Error::other(answer))
    }

    /// Stops it: nobody has to be killed, and nobody listens any more.
    fn stop(&self) {
        let report = self.case.stop();
        assert!(nobody_was_killed(&report), "{report:#}");
        let answer = self.get();
        assert!(answer.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused));
    }

    /// The master by nginx's own file, if it is there.
    fn master(&self, file: &str) -> Option<i32> {
        fs::read_to_string(self.case.path(file)).ok()?.trim().parse().ok()
    }

    /// Sends a master of the service's a signal.
    fn signal(&self, master: i32, signal: Signal) {
        assert!(self.case.present().contains(&master));
        kill(Pid::from_raw(master), signal).unwrap();
    }

    fn children(&self, of: i32) -> BTreeSet<i32> {
        let mut present = self.case.present();
        present.retain(|pid| place(*pid).is_some_and(|place| place.parent == of));
        present
    }

    fn error_log(&self) -> String {
        fs::read_to_string(self.case.path("error.log")).unwrap()
    }
}

/// USR2, WINCH and QUIT, as nginx's documentation has it; returns the old master and the new one.
fn upgrade(nginx: &Nginx) -> (i32, i32) {
    let old = nginx.master("pid").unwrap();
    let old_workers = nginx.children(old);
    assert_eq!(old_workers.len(), 2, "{old_workers:?}");
    nginx.signal(old, Signal::SIGUSR2);
    let mut new = None;
    wait_for("there is a new master with workers", || {
        new = nginx.master("pid").filter(|new| *new != old);
        new.is_some_and(|new| nginx.children(new).len() == 2)
    });
    let new = new.unwrap();
    assert_eq!(nginx.master("pid.oldbin"), Some(old));
    assert_eq!(
        place(new).unwrap().parent,
        old,
        "the new master is a child of the old one"
    );
    nginx.signal(old, Signal::SIGWINCH);
    wait_for("the old workers have gone", || {
        nginx.children(old) == BTreeSet::from([new])
    });
    nginx.signal(old, Signal::SIGQUIT);
    wait_for("the old master has gone", || !nginx.case.present().contains(&old));
    (old, new)
}

#[test]
fn nginx_is_upgraded_by_signals_and_stopped_with_the_master_that_outlived_the_old_one() {
    let Some(mut nginx) = Nginx::start(0) else {
        return;
    };
    nginx.case.daemon.wait_for_state("web", "Success");
    nginx.case.wait_until_tracked(|present| present.len() == 3);
    let first = nginx.master("pid").unwrap();
    let escapes = nginx.case.escapes();
    assert_eq!(escapes[&first], set(&["session", "group", "parent"]), "{escapes:?}");
    for worker in nginx.children(first) {
        assert_eq!(escapes[&worker], set(&["session", "group"]), "{escapes:?}");
    }

    // Requests all the while; none may fail.
    let (upgraded, requests) = (AtomicBool::new(false), &nginx);
    let (old, new) = thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut answers = 0;
            while !upgraded.load(Ordering::Relaxed) {
                requests.get().unwrap();
                answers += 1;
            }
            answers
        });
        let masters = upgrade(&nginx);
        upgraded.store(true, Ordering::Relaxed);
        println!("{} requests were answered during the upgrade", asking.join().unwrap());
        masters
    });
    nginx.get().unwrap();

    nginx.case.wait_until_tracked(|present| present.len() == 3);
    let supervisor = nginx.case.daemon.process().as_raw_nonzero().get();
    assert_eq!(place(new).unwrap().parent, supervisor);
    let escapes = nginx.case.escapes();
    assert!(escapes[&new].contains("parent"), "{escapes:?}");
    let listed = nginx.case.listed_escapes();
    let orphan = listed.iter().find(|escape| escape["pid"] == new).unwrap();
    let creator = &orphan["line"][1];
    assert_eq!(
        (&creator["pid"], &creator["alive"]),
        (&old.into(), &false.into()),
        "{orphan:#}"
    );
    assert_eq!(creator["fate"]["exited"], 0, "{orphan:#}");
    nginx.case.shows("zinit-tracker tree web", Numbers::Large);
    nginx.case.shows("zinit-tracker escapes web", Numbers::Large);
    nginx.case.shows(&format!("zinit-tracker why {new}"), Numbers::Large);

    nginx.stop();
    nginx.case.end();
}

#[test]
fn nginx_in_the_foreground_refuses_that_and_reloads() {
    let Some(nginx) = Nginx::start(1) else {
        return;
    };
    let main = nginx.case.main();
    assert_eq!(nginx.master("pid"), Some(main));
    nginx.case.wait_until_tracked(|present| present.len() == 3);
    assert_eq!(nginx.case.wait_for_departures(main).len(), 0);
    nginx.signal(main, Signal::SIGUSR2);
    wait_for("nginx refuses", || {
        nginx.error_log().contains("the changing binary signal is ignored")
    });

    let workers = nginx.children(main);
    nginx.case.daemon.does(&["kill", "web", "SIGHUP"]);
    wait_for("there are new workers only", || {
        let now = nginx.children(main);
        now.len() == 2 && now.is_disjoint(&workers)
    });
    nginx.get().unwrap();
    nginx.stop();
    nginx.case.end_of_a_part();
}
