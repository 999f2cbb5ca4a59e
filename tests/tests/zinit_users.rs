//! Services of other users.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use zinit_tests::daemon::{Daemon, wait_for};

#[test]
fn a_service_of_another_user_can_open_its_output_by_name() {
    let mut daemon = Daemon::prepare(&[]);
    daemon.write(
        "web",
        "exec: sh -c 'id -u >/dev/stdout; echo trouble >/dev/stderr; echo more >>/proc/self/fd/1; exec sleep 300'\n\
         user: '65534'\ngroup: '65534'\n",
    );
    daemon.run();
    for line in ["[+] web: 65534", "[-] web: trouble", "[+] web: more"] {
        wait_for(line, || {
            daemon
                .prints(&["log", "--snapshot", "web"])
                .lines()
                .any(|it| it == line)
        });
    }
    daemon.shutdown();
}
