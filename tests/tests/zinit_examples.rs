//! The examples of the repository, started for real: the unit below a systemd that is PID 1 of namespaces of its own, and the
//! container's files as the root of another, since no container engine is at hand.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::process::Signal;
use zinit_tests::{daemon::wait_for, namespaces::Namespaces, survivors, tool::zinit};

const SYSTEMD: &str = "/lib/systemd/systemd";

fn example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../zinit-tracker/examples")
        .join(path)
}

/// The shell's commands have the program as `$1` and the example as `$2`.
fn start(script: &str, example: &Path) -> Namespaces {
    Namespaces::start(script, [zinit(), example])
}

/// Waits until zinit has a service in this state.
fn wait_for_state(namespaces: &mut Namespaces, service: &str, state: &str) {
    let wanted = format!("{service}: {state}\n");
    wait_for(&wanted, || {
        assert!(namespaces.is_running(), "{}", namespaces.log());
        if namespaces.init().is_none() {
            return false;
        }
        let output = namespaces.run(&["zinit", "list"]);
        output.status.success() && String::from_utf8_lossy(&output.stdout).contains(&wanted)
    });
}

fn main_pid(namespaces: &Namespaces, service: &str) -> String {
    let status = namespaces.prints(&["zinit", "status", service]);
    let pid = status.lines().find_map(|line| line.strip_prefix("pid: "));
    pid.unwrap().to_owned()
}

#[test]
fn below_systemd_services_outlive_zinit_and_are_stopped_exactly() {
    if !Path::new(SYSTEMD).exists() {
        assert!(std::env::var_os("CI").is_none(), "CI must have systemd");
        println!("SKIPPED: systemd is not installed");
        return;
    }
    let script = r#"
touch usr/sbin/zinit && mount --bind "$1" usr/sbin/zinit
rm -rf etc/zinit && mkdir etc/zinit
printf '%s\n' 'exec: sh -c "setsid sleep 3601 & exec sleep 3600"' >etc/zinit/web.yaml
mkdir -p run/systemd/system/zinit.service.d
cp "$2" run/systemd/system/zinit.service
printf '%s\n' '[Service]' "Environment=ZINIT_TRACKER_PINS=$ZINIT_TRACKER_PINS ZINIT_TEST_MARKER=$ZINIT_TEST_MARKER" \
    >run/systemd/system/zinit.service.d/test.conf
printf '%s\n' '[Unit]' 'DefaultDependencies=no' 'AllowIsolate=yes' 'Wants=zinit.service' >run/systemd/system/test.target
export container=test
exec chroot . /lib/systemd/systemd --unit=test.target --log-target=console
"#;
    let mut namespaces = start(script, &example("zinit.service"));
    wait_for_state(&mut namespaces, "web", "Running");
    let pid = main_pid(&namespaces, "web");
    let show = ["systemctl", "show", "--value", "--property=MainPID", "zinit.service"];
    let main = namespaces.prints(&show);
    assert_eq!(
        namespaces.prints(&["zinit", "upgrade"]).split(' ').next(),
        Some("zinit")
    );
    assert_eq!(namespaces.prints(&show), main);
    namespaces.prints(&["kill", "-KILL", main.trim()]);
    wait_for("systemd starts it anew", || {
        let now = namespaces.prints(&show);
        now != main && now.trim() != "0"
    });
    wait_for_state(&mut namespaces, "web", "Running");
    assert_eq!(main_pid(&namespaces, "web"), pid, "{}", namespaces.log());
    namespaces.prints(&["systemctl", "reload", "zinit.service"]);

    namespaces.prints(&["systemctl", "stop", "zinit.service"]);
    let left = survivors(&namespaces.marker);
    let left: Vec<_> = left.iter().filter(|member| member.comm.contains("sleep")).collect();
    assert!(left.is_empty(), "{left:?}");
    let result = namespaces.prints(&["systemctl", "show", "--value", "--property=Result", "zinit.service"]);
    assert_eq!(result, "success\n", "{}", namespaces.log());
    assert!(!namespaces.pins().exists(), "pins are left: {}", namespaces.log());
    // PID 1 halts: in a pid namespace that ends it.
    namespaces.signal(Signal::from_named_raw(libc::SIGRTMIN() + 3).unwrap_or(Signal::KILL));
    namespaces.ends();
}

#[test]
fn the_containers_files_are_a_container() {
    let containerfile = fs::read_to_string(example("container/Containerfile")).unwrap();
    let entrypoint = containerfile.lines().find_map(|line| line.strip_prefix("ENTRYPOINT "));
    let entrypoint: Vec<String> = serde_json::from_str(entrypoint.unwrap()).unwrap();
    assert!(containerfile.contains("\nCOPY zinit /usr/sbin/zinit\nCOPY services /etc/zinit\n"));
    assert!(containerfile.contains("\nSTOPSIGNAL SIGTERM\n"));
    let script = format!(
        "touch usr/sbin/zinit && mount --bind \"$1\" usr/sbin/zinit\n\
         rm -rf etc/zinit && cp -r \"$2\" etc/zinit\n\
         exec chroot . {}\n",
        entrypoint.join(" ")
    );
    let mut namespaces = start(&script, &example("container/services"));
    wait_for_state(&mut namespaces, "clock", "Running");
    wait_for_state(&mut namespaces, "greet", "Success");
    let lines = namespaces.prints(&["zinit", "log", "--snapshot", "greet"]);
    assert!(lines.contains("hello from a container"), "{lines}");
    namespaces.signal(Signal::TERM);
    assert_eq!(namespaces.ends(), 0, "{}", namespaces.log());
}
