//! Guests whose init is `zinit` itself: whether it brings the machine up, keeps it clean, and ends it as it is told.
//!
//! Nothing here runs test binaries: the services of the image look around in `/proc` and say what they see (`pid1.sh`).

use super::{
    apt::Apt,
    cpio::Archive,
    guest,
    kernels::{self, Boot},
    qemu::{self, Ended, Machine},
    report::TROUBLE,
};
use anyhow::{Context as _, Result, bail, ensure};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::BufWriter,
    path::Path,
    time::Duration,
};

/// The kernels that are booted unless others are asked for, by their names in the matrix.
const KERNELS: [&str; 2] = ["6.12", "7.x"];

/// What zinit mounts.
const MOUNTS: [&str; 6] = ["/proc", "/sys", "/dev", "/run", "/sys/fs/cgroup", "/sys/fs/bpf"];

/// Daemons that get away from their service.
const ESCAPED: &str = "4";

/// Processes that the flood creates at least: an orphan's parent and the orphan, 500 times.
const FORKS: u32 = 1000;

/// The services that must go down, dependants first.
const ORDER: [&str; 3] = ["user", "daemons", "base"];

const SCRIPT: &[u8] = include_bytes!("pid1.sh");

/// The services, but for the driver: name and file.
const SERVICES: [(&str, &str); 4] = [
    (
        "base",
        "exec: pid1 base\nlog: stdout\ntest: sh -c '[ -e /ready-base ]'\n",
    ),
    (
        "daemons",
        "exec: pid1 daemons\nlog: stdout\nafter: [base]\nshutdown_timeout: 3\ntest: sh -c '[ -e /ready-daemons ]'\n",
    ),
    ("user", "exec: pid1 user\nlog: stdout\nafter: [daemons]\n"),
    ("flood", "exec: pid1 flood\nlog: stdout\noneshot: true\nafter: [user]\n"),
];

/// How a guest is started and ended.
struct Plan {
    /// The command of `zinit` that ends it.
    command: &'static str,
    /// What the kernel starts.
    init: &'static str,
    /// What the kernel says in the end.
    last_words: &'static str,
}

/// Once as the kernel's own init, and once after a script that has mounted some things, as initramfs's do.
const PLANS: [Plan; 2] = [
    Plan {
        command: "shutdown",
        init: "rdinit=/usr/bin/zinit -- init -c /etc/zinit",
        last_words: "reboot: Power down",
    },
    Plan {
        command: "reboot",
        init: "rdinit=/usr/local/bin/pid1 -- premount init -c /etc/zinit",
        last_words: "reboot: Restarting system",
    },
];

/// Boots every plan on every kernel that matches (the two of [`KERNELS`], if there are no patterns), and says what came of it.
///
/// # Errors
///
/// Something is not as it should be in a guest, or fewer than two kernels could be had and there are no patterns.
pub(crate) fn run(apt: &Apt, tools: &Path, directory: &Path, patterns: &[String]) -> Result<()> {
    let wanted = match patterns {
        [] => KERNELS.map(ToOwned::to_owned).to_vec(),
        given => given.to_vec(),
    };
    let mut boots = kernels::boots(apt, &wanted, None)?;
    boots.retain(|boot| boot.arguments.is_empty());
    let zinit = guest::build_zinit(&directory.join("build"))?;
    let (mut kernels, mut wrong) = (0, Vec::new());
    for boot in &boots {
        let image = match &boot.image {
            Ok(image) => image,
            Err(error) => {
                println!("== {} with zinit as PID 1: SKIPPED: {error:#}\n", boot.label());
                continue;
            }
        };
        kernels += 1;
        for plan in &PLANS {
            if !try_out(boot, image, plan, tools, &zinit, &directory.join("logs"))? {
                wrong.push(format!("{} of {}", plan.command, boot.label()));
            }
        }
    }
    let least = if patterns.is_empty() { KERNELS.len() } else { 1 };
    ensure!(
        kernels >= least,
        "zinit was PID 1 on {kernels} kernels, fewer than {least}"
    );
    if !wrong.is_empty() {
        bail!("not right with zinit as PID 1: {}", wrong.join("; "));
    }
    println!(
        "zinit as PID 1: {} boots of {kernels} kernels, all right",
        kernels * PLANS.len()
    );
    Ok(())
}

/// Boots one guest and prints what came of it; whether all was right.
fn try_out(boot: &Boot, image: &Path, plan: &Plan, tools: &Path, zinit: &Path, logs: &Path) -> Result<bool> {
    let name = format!("pid1-{}-{}", plan.command, boot.label().replace(['.', ' '], "_"));
    let log = logs.join(name);
    let initramfs = log.with_extension("initramfs");
    pack(&initramfs, tools, zinit, plan)?;
    let mut said = Said::default();
    let machine = Machine {
        tree: tools,
        image,
        initramfs: &initramfs,
        arguments: plan.init,
        limit_seconds: qemu::LIMIT_SECONDS,
        log: &log,
    };
    let ended = qemu::watch(&machine, |line, elapsed| said.hear(line, elapsed))?;
    fs::remove_file(&initramfs).with_context(|| format!("failed to remove {}", initramfs.display()))?;
    println!("== {} with zinit as PID 1: {}", boot.label(), plan.command);
    println!("   {}", said.figures(ended.duration));
    for line in decisive(&ended.console, plan) {
        println!("   console: {}", plain(line));
    }
    let faults = said.faults(&ended, plan);
    for fault in &faults {
        println!("   FAULT: {fault}");
    }
    println!();
    Ok(faults.is_empty())
}

/// Writes the first file system of a guest. It lacks `/proc` and `/sys`, as a bare machine may.
fn pack(path: &Path, tools: &Path, zinit: &Path, plan: &Plan) -> Result<()> {
    let file = File::create(path).with_context(|| format!("failed to create {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    for directory in [
        "dev",
        "etc",
        "etc/zinit",
        "usr",
        "usr/bin",
        "usr/lib",
        "usr/lib64",
        "usr/local",
        "usr/local/bin",
    ] {
        archive.directory(directory)?;
    }
    archive.symlink("lib64", "usr/lib64")?;
    archive.symlink("bin", "usr/bin")?;
    // The kernel gives its init this for a standard output.
    archive.device("dev/console", 5, 1)?;
    archive.symlink("usr/bin/sh", "dash")?;
    guest::programs(&mut archive, tools)?;
    archive.program("usr/bin/busybox", &tools.join("usr/bin/busybox"))?;
    for applet in ["readlink", "sed", "uname"] {
        archive.symlink(&format!("usr/bin/{applet}"), "busybox")?;
    }
    archive.program("usr/bin/zinit", zinit)?;
    archive.script("usr/local/bin/pid1", SCRIPT)?;
    for (name, definition) in SERVICES {
        archive.script(&format!("etc/zinit/{name}.yaml"), definition.as_bytes())?;
    }
    archive.script("etc/zinit/driver.yaml", driver(plan).as_bytes())?;
    archive.finish()
}

/// The service that looks at the rest and ends the machine.
fn driver(plan: &Plan) -> String {
    format!(
        "exec: pid1 driver {}\nlog: stdout\noneshot: true\nafter: [user, flood]\n",
        plan.command
    )
}

/// The lines of the console that show the end.
fn decisive<'a>(console: &'a str, plan: &Plan) -> impl Iterator<Item = &'a str> {
    let marks = ["supervising", "shutting down", REPORT, "survives", plan.last_words];
    let wanted = move |line: &&str| marks.iter().any(|mark| line.contains(mark));
    console.lines().map(str::trim).filter(wanted)
}

/// Without the colours that zinit gives a terminal.
fn plain(line: &str) -> String {
    let mut parts = line.split('\u{1b}');
    let first = parts.next().unwrap_or("");
    let rest = parts.map(|part| part.split_once('m').map_or(part, |(_, text)| text));
    std::iter::once(first).chain(rest).collect()
}

/// What zinit says before it ends the machine.
const REPORT: &str = "nothing is left";

/// What the services have said.
#[derive(Default)]
struct Said {
    /// From the start of QEMU until the last of the services that depend on each other has started.
    services: Option<Duration>,
    /// From the start of QEMU until the end was asked for.
    ending: Option<Duration>,
    facts: BTreeMap<String, String>,
    /// How often something is mounted, by place.
    mounts: BTreeMap<String, u32>,
    /// The services that were asked to end, in their order.
    down: Vec<String>,
    /// What was there that should not have been, and was not that should have been.
    wrong: Vec<String>,
    /// Whether the last service has looked for others.
    alone: bool,
}

impl Said {
    /// Takes in a line.
    fn hear(&mut self, line: &str, elapsed: Duration) {
        let Some(said) = line.strip_prefix("@@ ") else {
            return;
        };
        let (word, rest) = said.split_once(' ').unwrap_or((said, ""));
        match word {
            "services" => self.services = Some(elapsed),
            "ending" => self.ending = Some(elapsed),
            "fact" => {
                let (name, value) = rest.split_once(' ').unwrap_or((rest, ""));
                self.facts.insert(name.to_owned(), value.to_owned());
            }
            "mount" => *self.mounts.entry(rest.to_owned()).or_default() += 1,
            "down" => self.down.push(rest.to_owned()),
            "left" | "missing" => self.wrong.push(said.to_owned()),
            "alone" => self.alone = true,
            _ => {}
        }
    }

    fn fact(&self, name: &str) -> &str {
        self.facts.get(name).map_or("", String::as_str)
    }

    /// How long it took, and how much there was to do.
    fn figures(&self, duration: Duration) -> String {
        let seconds =
            |time: Option<Duration>| time.map_or("?".to_owned(), |time| format!("{:.1} s", time.as_secs_f64()));
        format!(
            "Linux {}: services after {}, off {} after it was asked for; {} processes flooded, {} daemons had escaped",
            self.fact("release"),
            seconds(self.services),
            seconds(self.ending.map(|ending| duration.saturating_sub(ending))),
            self.fact("forks"),
            self.fact("escaped"),
        )
    }

    /// Everything that is wrong, a line each.
    fn faults(&self, ended: &Ended, plan: &Plan) -> Vec<String> {
        let mut faults = self.wrong.clone();
        let mut demand = |holds: bool, fault: &str| {
            if !holds {
                faults.push(fault.to_owned());
            }
        };
        demand(!ended.timed_out(), "the guest was ended at its limit");
        demand(ended.status == Some(0), "QEMU failed");
        demand(self.services.is_some(), "the services did not start");
        demand(self.ending.is_some(), "the end was not asked for");
        demand(self.fact("init") == "/usr/bin/zinit", "PID 1 is not zinit");
        demand(self.fact("escaped") == ESCAPED, "not all daemons have escaped");
        let forks = self.fact("forks").parse::<u32>().unwrap_or(0);
        demand(forks >= FORKS, "the flood was none");
        for place in MOUNTS {
            let count = self.mounts.get(place).copied().unwrap_or(0);
            demand(count == 1, &format!("{place} is mounted {count} times"));
        }
        let order = self.down.join(", ");
        demand(self.down == ORDER, &format!("went down in this order: {order}"));
        demand(self.alone, "nobody has looked for what is left");
        demand(
            ended.console.contains(REPORT),
            "zinit does not say that nothing is left",
        );
        let last_words = format!("the kernel does not say {:?}", plan.last_words);
        demand(ended.console.contains(plan.last_words), &last_words);
        let troubled = |line: &&str| TROUBLE.iter().any(|mark| line.contains(mark));
        for line in ended.console.lines().filter(troubled) {
            demand(false, &format!("the kernel says: {}", line.trim()));
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: [&str; 16] = [
        "@@ services",
        "@@ fact forks 1003",
        "@@ fact escaped 4",
        "@@ fact release 6.12.1",
        "@@ fact init /usr/bin/zinit",
        "@@ mount /",
        "@@ mount /proc",
        "@@ mount /sys",
        "@@ mount /dev",
        "@@ mount /run",
        "@@ mount /sys/fs/cgroup",
        "@@ mount /sys/fs/bpf",
        "@@ ending",
        "@@ down user",
        "@@ down daemons",
        "@@ down base",
    ];

    fn heard(lines: &[&str]) -> Said {
        let mut said = Said::default();
        for line in lines {
            said.hear(line, Duration::from_secs(7));
        }
        said
    }

    fn faults(lines: &[&str], status: i32, console: &str) -> Vec<String> {
        let ended = Ended {
            status: Some(status),
            duration: Duration::from_secs(9),
            console: console.to_owned(),
        };
        heard(lines).faults(&ended, &PLANS[0])
    }

    #[test]
    fn a_guest_is_right_only_if_everything_is() {
        let console = "INFO nothing is left\n[    1.2] reboot: Power down\n";
        let good = [&LINES[..], &["@@ alone"]].concat();
        assert_eq!(faults(&good, 0, console), [""; 0]);
        assert_eq!(faults(&LINES, 0, console), ["nobody has looked for what is left"]);
        let stray = [&good[..], &["@@ left 70 sleep S 1", "noise", "@@ mount /proc"]].concat();
        assert_eq!(
            faults(&stray, 0, console),
            ["left 70 sleep S 1", "/proc is mounted 2 times"]
        );
        assert_eq!(
            faults(&good, 124, "Kernel panic - not syncing"),
            [
                "the guest was ended at its limit",
                "QEMU failed",
                "zinit does not say that nothing is left",
                "the kernel does not say \"reboot: Power down\"",
                "the kernel says: Kernel panic - not syncing"
            ]
        );
    }

    #[test]
    fn dependants_go_first() {
        let mut lines = LINES.to_vec();
        lines.extend(["@@ alone"]);
        let user = lines.iter().position(|line| *line == "@@ down user").unwrap();
        lines.swap(user, user + 1);
        let console = "nothing is left\nreboot: Power down";
        assert_eq!(
            faults(&lines, 0, console),
            ["went down in this order: daemons, user, base"]
        );
    }

    #[test]
    fn the_figures_are_told() {
        assert_eq!(
            heard(&LINES).figures(Duration::from_secs(9)),
            "Linux 6.12.1: services after 7.0 s, off 2.0 s after it was asked for; 1003 processes flooded, 4 daemons had escaped"
        );
    }

    #[test]
    fn colours_are_taken_away() {
        assert_eq!(plain("\u{1b}[32m INFO\u{1b}[0m the rest"), " INFO the rest");
    }

    #[test]
    fn only_what_decides_is_shown() {
        let console = " INFO starting\n INFO nothing is left\n[ 1.2] reboot: Power down\n";
        let lines: Vec<_> = decisive(console, &PLANS[0]).collect();
        assert_eq!(lines, ["INFO nothing is left", "[ 1.2] reboot: Power down"]);
    }
}
