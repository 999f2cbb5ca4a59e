//! What `zinit` finds where the system has it: in a mount namespace of the test's own, so that the machine's stays as it is.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    process::{Command, Output, Stdio},
};

use zinit_tests::{
    daemon::{Daemon, wait_for},
    tool::zinit,
};

#[test]
fn the_default_socket_and_the_environment_file_are_where_zinit_has_them() {
    let mut daemon = Daemon::prepare(&[]);
    let seen = daemon.scratch().join("seen");
    let show = daemon.script(
        "show",
        &format!("env >{0}.new; mv {0}.new {0}; exec sleep 300", seen.display()),
    );
    daemon.write(
        "show",
        &format!("exec: {show}\nenv: {{FROM_SERVICE: service, BOTH: service}}\n"),
    );
    let etc = daemon.scratch().join("etc");
    let text = "# a comment\nFROM_FILE='in quotes'\nexport EXPORTED=yes\nBOTH=file\n\nno assignment\n";
    fs::write(daemon.scratch().join("environment"), text).unwrap();
    let script = format!(
        "cp -a /etc {etc}; cp {scratch}/environment {etc}/environment; mount --bind {etc} /etc; \
         mkdir -p /var/run; mount -t tmpfs tmpfs \"$(readlink -f /var/run)\"; exec \"$@\"",
        etc = etc.display(),
        scratch = daemon.scratch().display(),
    );
    let init = daemon.init(&[]);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &script, "sh"]).arg(zinit());
    // Without `--socket PATH`, which comes first.
    command.args(init.get_args().skip(2));
    command.envs(init.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    daemon.spawn(command);
    let namespace = format!("--mount=/proc/{}/ns/mnt", daemon.process().as_raw_nonzero());
    let client = |arguments: &[&str]| -> Output {
        let mut command = Command::new("nsenter");
        command.arg(&namespace).arg(zinit()).args(arguments);
        command.env_remove("RUST_LOG").stdin(Stdio::null()).output().unwrap()
    };
    wait_for("the daemon answers at the default socket", || {
        client(&[]).status.success()
    });
    for socket in ["/var/run/zinit.sock", "/run/zinit.sock"] {
        if socket.starts_with("/var") || fs::canonicalize("/var/run").unwrap() == fs::canonicalize("/run").unwrap() {
            assert!(client(&["-s", socket, "list"]).status.success(), "{socket}");
        }
    }
    wait_for("the service has shown its environment", || seen.exists());
    let seen = fs::read_to_string(&seen).unwrap();
    let lines: Vec<_> = seen.lines().collect();
    for line in [
        "FROM_FILE=in quotes",
        "EXPORTED=yes",
        "FROM_SERVICE=service",
        "BOTH=service",
    ] {
        assert!(lines.contains(&line), "{line} is missing: {seen}");
    }
    assert!(!seen.contains("no assignment"), "{seen}");
    assert!(client(&["shutdown"]).status.success());
    daemon.assert_ends_well();
}
