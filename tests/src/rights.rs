//! What a process may do, as the kernel says.

use std::fs;

/// Capabilities of every thread of a process, each as `/proc` has it: effective, permitted and bounding set, and whether it can never
/// have more. By their numbers in capabilities(7).
///
/// # Panics
///
/// When the process is gone.
#[must_use]
pub fn of_threads(pid: u32) -> Vec<(Vec<u32>, Vec<u32>, Vec<u32>, bool)> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the process is there");
    let status = |thread: std::io::Result<fs::DirEntry>| {
        let status = thread.expect("threads can be listed").path().join("status");
        let text = fs::read_to_string(status).expect("the thread is there");
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.expect("the kernel says it").trim().to_owned()
        };
        let set = |name: &str| {
            let bits = u64::from_str_radix(&field(name), 16).expect("a set is in hexadecimal");
            (0..64).filter(|bit| bits & (1 << bit) != 0).collect()
        };
        (
            set("CapEff:"),
            set("CapPrm:"),
            set("CapBnd:"),
            field("NoNewPrivs:") == "1",
        )
    };
    threads.map(status).collect()
}
