//! Debian's packages without installing any: apt with lists, sources and a state of its own.
//!
//! The machine's apt says where its mirror is and how to get there; nothing of the machine's is changed. Packages are
//! unpacked into trees below our directory, and stay there until the archive has newer ones.

use crate::workspace::{call, output};
use anyhow::{Context as _, Result, bail, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

/// Suites that have the kernels and tools we want, and whether they are on the security mirror.
const SUITES: [(&str, bool); 6] = [
    ("bullseye-security", true),
    ("bookworm", false),
    ("bookworm-security", true),
    ("trixie", false),
    ("trixie-security", true),
    ("trixie-backports", false),
];

/// What Debian signs its archive with.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// How long the archive's lists are taken to be current.
const LISTS_ARE_CURRENT_FOR: Duration = Duration::from_hours(24);

/// An apt of our own.
pub(crate) struct Apt {
    directory: PathBuf,
}

impl Apt {
    /// Configures apt below this directory, and gets the archive's lists if they are missing or old.
    ///
    /// # Errors
    ///
    /// There is no apt, it knows no Debian mirror, or the mirror cannot be reached and there are no earlier lists.
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        let apt = Self {
            directory: directory.to_owned(),
        };
        apt.configure()?;
        apt.update()?;
        Ok(apt)
    }

    /// The names of packages that match an extended regular expression.
    ///
    /// # Errors
    ///
    /// apt fails.
    pub(crate) fn names(&self, pattern: &str) -> Result<Vec<String>> {
        let listed = output(self.command("apt-cache").args(["search", "--names-only", pattern]))?;
        let name = |line: &str| line.split_once(" - ").map(|(name, _)| name.to_owned());
        Ok(listed.lines().filter_map(name).collect())
    }

    /// These packages and all that they depend on.
    ///
    /// # Errors
    ///
    /// One is not in the archive.
    pub(crate) fn closure(&self, packages: &[&str]) -> Result<Vec<String>> {
        let mut simulation = self.command("apt-get");
        simulation.args(["--simulate", "--no-install-recommends", "install"]);
        let simulated = output(simulation.args(packages))?;
        let name = |line: &str| {
            line.strip_prefix("Inst ")?
                .split_whitespace()
                .next()
                .map(ToOwned::to_owned)
        };
        Ok(simulated.lines().filter_map(name).collect())
    }

    /// The tree that these packages unpack to, passed through `reduce` when it is new.
    ///
    /// # Errors
    ///
    /// A package cannot be downloaded or unpacked, or `reduce` fails.
    pub(crate) fn tree(
        &self,
        name: &str,
        packages: &[String],
        reduce: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let tree = self.directory.join("trees").join(name);
        let listed = output(
            self.command("apt-get")
                .args(["--print-uris", "download"])
                .args(packages),
        )?;
        // 'URI' FILE SIZE HASH: the file is named after package and version.
        let files: Vec<&str> = listed
            .lines()
            .filter_map(|line| line.split_whitespace().nth(1))
            .collect();
        ensure!(
            files.len() == packages.len(),
            "the archive has not all of {}",
            packages.join(" ")
        );
        let record = tree.with_extension("packages");
        let contents = files.join("\n");
        if tree.is_dir() && fs::read_to_string(&record).is_ok_and(|recorded| recorded == contents) {
            return Ok(tree);
        }
        let downloads = fresh(&self.directory.join("downloads"))?;
        fresh(&tree)?;
        eprintln!("fetching {name}: {} packages", files.len());
        let mut download = self.command("apt-get");
        download
            .args(["--quiet=2", "download"])
            .args(packages)
            .current_dir(&downloads);
        output(&mut download)?;
        for entry in fs::read_dir(&downloads).context("failed to list the downloads")? {
            let package = entry.context("failed to list the downloads")?.path();
            output(Command::new("dpkg").arg("--extract").arg(package).arg(&tree))?;
        }
        remove(&downloads)?;
        reduce(&tree)?;
        fs::write(&record, contents).with_context(|| format!("failed to write {}", record.display()))?;
        Ok(tree)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.configuration()).env("LC_ALL", "C");
        command
    }

    fn configuration(&self) -> PathBuf {
        self.directory.join("apt.conf")
    }

    fn configure(&self) -> Result<()> {
        let state = self.directory.join("apt");
        for directory in ["lists/partial", "cache/archives/partial"] {
            let directory = state.join(directory);
            fs::create_dir_all(&directory).with_context(|| format!("failed to create {}", directory.display()))?;
        }
        // No package counts as installed, so that what is downloaded needs nothing of the machine's.
        write(&state.join("status"), "")?;
        write(&state.join("sources.list"), &sources(&mirror()?))?;
        let state = state.display();
        let network = output(Command::new("apt-config").args(["dump", "Acquire"]))?;
        let mut settings: Vec<String> = network
            .lines()
            .filter(|line| line.starts_with("Acquire::http") || line.starts_with("Acquire::Retries"))
            .map(ToOwned::to_owned)
            .collect();
        settings.extend([
            // The machine's other settings may run commands after an update.
            "Dir::Etc::main \"/dev/null\";".to_owned(),
            "Dir::Etc::parts \"/dev/null\";".to_owned(),
            "Dir::Etc::sourceparts \"/dev/null\";".to_owned(),
            format!("Dir::Etc::sourcelist \"{state}/sources.list\";"),
            format!("Dir::State \"{state}\";"),
            format!("Dir::State::lists \"{state}/lists\";"),
            format!("Dir::State::status \"{state}/status\";"),
            format!("Dir::Cache \"{state}/cache\";"),
            "APT::Architecture \"amd64\";".to_owned(),
            "APT::Architectures \"amd64\";".to_owned(),
            // Our directory may be closed to apt's own user.
            "APT::Sandbox::User \"root\";".to_owned(),
            "Acquire::Languages \"none\";".to_owned(),
            // The suites of old releases are no longer renewed.
            "Acquire::Check-Valid-Until \"false\";\n".to_owned(),
        ]);
        write(&self.configuration(), &settings.join("\n"))
    }

    fn update(&self) -> Result<()> {
        let stamp = self.directory.join("apt/updated");
        let age = fs::metadata(&stamp)
            .ok()
            .and_then(|stamp| stamp.modified().ok()?.elapsed().ok());
        if age.is_some_and(|age| age < LISTS_ARE_CURRENT_FOR) {
            return Ok(());
        }
        match call(self.command("apt-get").args(["--quiet=2", "update"])) {
            Ok(()) => write(&stamp, ""),
            Err(error) if age.is_some() => {
                eprintln!("WARNING: using earlier lists of the archive: {error:#}");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// Debian's main and security mirrors as the machine's apt knows them.
struct Mirror {
    main: String,
    security: String,
}

fn mirror() -> Result<Mirror> {
    let listed = output(Command::new("apt-get").args(["indextargets", "--format", "$(REPO_URI)"]))
        .context("the kernels are Debian's packages, which takes apt")?;
    let find = |end: &str| {
        let uri = |line: &&str| line.trim_end_matches('/').ends_with(end);
        listed
            .lines()
            .find(uri)
            .map(|line| line.trim_end_matches('/').to_owned())
    };
    let Some(main) = find("/debian") else {
        bail!("apt names no Debian mirror: there is nowhere to get Debian's kernels from");
    };
    let security = find("/debian-security").unwrap_or_else(|| format!("{main}-security"));
    Ok(Mirror { main, security })
}

fn sources(mirror: &Mirror) -> String {
    SUITES
        .iter()
        .map(|(suite, security)| {
            let uri = if *security { &mirror.security } else { &mirror.main };
            format!("deb [arch=amd64 signed-by={KEYRING}] {uri} {suite} main\n")
        })
        .collect()
}

/// An empty directory in place of what may be there.
fn fresh(directory: &Path) -> Result<PathBuf> {
    if directory.exists() {
        remove(directory)?;
    }
    fs::create_dir_all(directory).with_context(|| format!("failed to create {}", directory.display()))?;
    Ok(directory.to_owned())
}

fn remove(directory: &Path) -> Result<()> {
    fs::remove_dir_all(directory).with_context(|| format!("failed to remove {}", directory.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("failed to write {}", path.display()))
}
