//! PostgreSQL: every process of it leads a session of its own, and a clean shutdown takes its time.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, chown},
    path::Path,
    process::{Child, Command, Stdio},
};

use nix::{
    sys::stat::Mode,
    unistd::{User, mkfifo},
};
use serde_json::Value;
use zinit_tests::{Marker, daemon::wait_for};

use super::{
    case::{Case, nobody_was_killed, program, set},
    document::Numbers,
};

const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";

/// A cluster of the test's own, and the guide's service for it.
struct Cluster {
    case: Case,
    data: String,
}

impl Cluster {
    /// Makes the cluster, with these settings, and the service; `None`: PostgreSQL is not installed.
    fn new(file: usize, settings: &str) -> Option<Self> {
        program(&format!("{PROGRAMS}/postgres"), "postgresql-15")?;
        let case = Case::prepare("PostgreSQL", "db");
        let data = case.path("data");
        fs::create_dir(&data).unwrap();
        let user = User::from_name("postgres").unwrap().unwrap();
        for directory in [Path::new(&data), case.directory()] {
            chown(directory, Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
        }
        let output = Command::new("setpriv")
            .args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"])
            .arg(format!("{PROGRAMS}/initdb"))
            .args([
                "--auth=trust",
                "--no-locale",
                "--encoding=UTF8",
                "--no-sync",
                "-D",
                &data,
            ])
            .env(Marker::ENV, case.daemon.marker.as_str())
            .current_dir(case.directory())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let cluster = Self { case, data };
        let directory = cluster.case.directory().display();
        cluster.configure(&format!(
            "listen_addresses = ''\nunix_socket_directories = '{directory}'\nautovacuum_naptime = 1d\n{settings}"
        ));
        cluster.define(file);
        Some(cluster)
    }

    fn define(&self, file: usize) {
        self.case.define(file, &[("/etc/postgresql/15/main", &self.data)]);
    }

    fn configure(&self, settings: &str) {
        let path = Path::new(&self.data).join("postgresql.conf");
        let mut file = fs::File::options().append(true).open(path).unwrap();
        writeln!(file, "{settings}").unwrap();
    }

    fn psql(&self, query: &str) -> Command {
        let mut command = Command::new(format!("{PROGRAMS}/psql"));
        command
            .args([
                "--no-psqlrc",
                "--tuples-only",
                "--no-align",
                "--username=postgres",
                "--host",
            ])
            .arg(self.case.directory())
            .args(["--command", query])
            .env(Marker::ENV, self.case.daemon.marker.as_str())
            .stdin(Stdio::null());
        command
    }

    /// What a query yields, once the server answers.
    fn answer(&self, query: &str) -> String {
        let mut answer = String::new();
        wait_for("PostgreSQL answers", || {
            let output = self.psql(query).output().unwrap();
            answer = String::from_utf8(output.stdout).unwrap();
            output.status.success()
        });
        answer.trim().to_owned()
    }

    /// A client in the middle of a query that takes an hour.
    fn client(&self) -> Child {
        self.answer("select 1");
        let mut client = self.psql("select pg_sleep(3600)");
        let client = client.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let busy = "select count(*) from pg_stat_activity where query like 'select pg_sleep%'";
        wait_for("the query runs", || self.answer(busy) == "1");
        client
    }

    /// The state of the cluster by PostgreSQL's own tool.
    fn state(&self) -> String {
        let output = Command::new(format!("{PROGRAMS}/pg_controldata"))
            .args(["-D", &self.data])
            .env("LC_ALL", "C")
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let state = text
            .lines()
            .find_map(|line| line.strip_prefix("Database cluster state:"));
        state.unwrap().trim().to_owned()
    }
}

fn has_died(client: Child) -> String {
    let output = client.wait_with_output().unwrap();
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn postgresql_shuts_down_cleanly_because_it_is_given_its_time() {
    // The last step of a shutdown is to archive what was written, which takes as long as the test lets it.
    let archive = "archive_mode = on\narchive_command = 'read word <../archive'";
    let Some(mut cluster) = Cluster::new(0, archive) else {
        return;
    };
    let fifo = cluster.case.directory().join("archive");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    fs::set_permissions(&fifo, fs::Permissions::from_mode(0o644)).unwrap();
    cluster.case.start(&[]);
    let client = cluster.client();
    let case = &mut cluster.case;

    let main = case.main();
    // checkpointer, background writer, WAL writer, autovacuum launcher, archiver, logical replication launcher, and the client's
    let present = case.wait_until_tracked(|present| present.len() == 8);
    let departures = case.wait_for_departures(main);
    for pid in present.iter().filter(|pid| **pid != main) {
        assert_eq!(departures[pid], set(&["session", "group"]), "{departures:?}");
    }
    case.shows("zinit-tracker escapes db", Numbers::Large);
    case.shows("zinit-tracker diff db", Numbers::Large);

    let mut stop = case.daemon.command(&["stop", "db", "--json"]);
    let mut stop = stop.stdout(Stdio::piped()).spawn().unwrap();
    let archiving = |line: &str| line == "sh -c read word <../archive";
    wait_for("it archives", || !case.with_command(archiving).is_empty());
    case.wait_until_tracked(|present| present.contains(&main));
    assert_eq!(stop.try_wait().unwrap(), None, "it is stopped before it has shut down");
    let log = case.printed();
    assert!(log.contains("shutting down"), "{log}");
    assert!(!log.contains("database system is shut down\n"), "{log}");
    fs::write(&fifo, "go on\n").unwrap();
    let report: Value = serde_json::from_slice(&stop.wait_with_output().unwrap().stdout).unwrap();
    case.assert_stopped(&report);
    assert!(nobody_was_killed(&report), "{report:#}");
    for death in report["processes"].as_array().unwrap() {
        let asked = death["signals"]
            .as_array()
            .unwrap()
            .iter()
            .any(|sent| sent["signal"] == "SIGINT");
        assert_eq!(asked, death["pid"] == main, "{report:#}");
        if asked {
            assert_eq!(death["fate"]["exited"], 0, "{report:#}");
        }
    }
    case.shows("zinit log --snapshot db", Numbers::All);
    let log = case.printed();
    for line in ["received fast shutdown request", "database system is shut down\n"] {
        assert!(log.contains(line), "{line}: {log}");
    }
    assert!(has_died(client).contains("terminating connection due to administrator command"));
    assert_eq!(cluster.state(), "shut down");

    // Its next start has nothing to repair.
    cluster.configure("archive_mode = off");
    cluster.case.daemon.does(&["start", "db"]);
    cluster.answer("select 1");
    let log = cluster.case.printed();
    assert!(!log.contains("recovery"), "{log}");
    cluster.case.end();
}

#[test]
fn postgresql_that_waits_for_its_clients_until_it_is_killed_has_to_recover() {
    let Some(cluster) = Cluster::new(0, "") else {
        return;
    };
    let case = &cluster.case;
    // SIGTERM to the main process alone is what the guide warns of.
    let file = fs::read_to_string(case.daemon.config().join("db.yaml")).unwrap();
    let file = file
        .replace("SIGINT", "SIGTERM")
        .replace("shutdown_timeout: 300", "shutdown_timeout: 0.5");
    assert!(file.contains("SIGTERM") && file.contains("0.5"), "{file}");
    case.daemon.write("db", &file);
    let mut cluster = cluster;
    cluster.case.start(&[]);
    let client = cluster.client();
    let report = cluster.case.stop();
    assert!(!nobody_was_killed(&report), "{report:#}");
    has_died(client);
    assert_eq!(cluster.state(), "in production");

    cluster.define(0);
    cluster.case.start_anew();
    cluster.answer("select 1");
    let log = cluster.case.printed();
    assert!(log.contains("received smart shutdown request"), "{log}");
    assert!(log.contains("automatic recovery in progress"), "{log}");
    let report = cluster.case.stop();
    assert!(nobody_was_killed(&report), "{report:#}");
    assert_eq!(cluster.state(), "shut down");
    cluster.case.end_of_a_part();
}
