//! Which kernels are booted, and how.

use super::apt::Apt;
use anyhow::{Context as _, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A kernel that the matrix wants, by the first versions that will do, best first.
struct Wanted {
    name: &'static str,
    versions: &'static [&'static [u32]],
    /// The command lines that it is booted with.
    arguments: &'static [&'static str],
}

/// The matrix. `preempt=full` exposes events that get lost; Debian's 5.10 is the one whose LSM list lacks `bpf`.
const MATRIX: [Wanted; 5] = [
    Wanted {
        name: "5.10",
        versions: &[&[5, 10]],
        arguments: &["", "lsm=lockdown,yama,apparmor,bpf"],
    },
    Wanted {
        name: "6.1",
        versions: &[&[6, 1]],
        arguments: &[""],
    },
    Wanted {
        name: "6.12",
        versions: &[&[6, 12]],
        arguments: &["", "preempt=full"],
    },
    Wanted {
        name: "6.18",
        versions: &[&[6, 18], &[6, 17], &[6, 19], &[6, 16]],
        arguments: &[""],
    },
    Wanted {
        name: "7.x",
        versions: &[&[7]],
        arguments: &["", "preempt=full", "lockdown=confidentiality"],
    },
];

/// A kernel and the command line that it is booted with.
pub(crate) struct Boot {
    /// As the matrix has it, whatever version the archive has: `7.x preempt=full`.
    pub(crate) name: String,
    /// As in the archive, or as in the matrix if the archive has none.
    pub(crate) version: String,
    /// What the command line has beside what every guest's has.
    pub(crate) arguments: String,
    /// Why there is no kernel, or its image.
    pub(crate) image: Result<PathBuf>,
}

impl Boot {
    /// As it is shown, and as patterns match it.
    pub(crate) fn label(&self) -> String {
        with_arguments(&self.version, &self.arguments)
    }
}

fn with_arguments(kernel: &str, arguments: &str) -> String {
    format!("{kernel} {arguments}").trim_end().to_owned()
}

/// The names of all boots of the matrix.
pub(crate) fn names() -> Vec<String> {
    let of = |wanted: &'static Wanted| {
        let arguments = wanted.arguments.iter();
        arguments.map(|arguments| with_arguments(wanted.name, arguments))
    };
    MATRIX.iter().flat_map(of).collect()
}

/// The boots that are asked for: of the kernels that match a pattern (all, if there is none), with their command lines or
/// only with this preemption.
///
/// # Errors
///
/// The archive's lists cannot be read. A kernel that cannot be fetched is no error here but in its [`Boot::image`].
pub(crate) fn boots(apt: &Apt, patterns: &[String], preempt: Option<&str>) -> Result<Vec<Boot>> {
    let available = available(apt)?;
    let mut boots = Vec::new();
    for wanted in &MATRIX {
        let package = newest(&available, wanted.versions);
        let version = package.map_or(wanted.name, |package| package.version.as_str());
        let with_preempt = preempt.map(|mode| format!("preempt={mode}"));
        let command_lines = match &with_preempt {
            Some(only) => vec![only.as_str()],
            None => wanted.arguments.to_vec(),
        };
        for arguments in command_lines {
            let names = [version, wanted.name].map(|kernel| with_arguments(kernel, arguments));
            let matches = |pattern: &String| names.iter().any(|name| name.contains(pattern.as_str()));
            if !patterns.is_empty() && !patterns.iter().any(matches) {
                continue;
            }
            boots.push(Boot {
                name: with_arguments(wanted.name, arguments),
                version: version.to_owned(),
                arguments: arguments.to_owned(),
                image: match package {
                    Some(package) => fetch(apt, &package.name),
                    None => bail_missing(wanted.name),
                },
            });
        }
    }
    Ok(boots)
}

fn bail_missing(name: &str) -> Result<PathBuf> {
    bail!("the archive has no cloud kernel {name} any more")
}

/// A package with a kernel in it.
struct Package {
    name: String,
    version: String,
}

/// Every cloud kernel in the archive. From 6.19 on the kernel is in `linux-binary-*`, and `linux-image-*` is a stub.
fn available(apt: &Apt) -> Result<Vec<Package>> {
    let names = apt.names("^linux-(image|binary)-[0-9][^-]*(-[0-9][^-]*)?-cloud-amd64$")?;
    let version = |name: &str, prefix: &str| {
        let version = name.strip_prefix(prefix)?.strip_suffix("-cloud-amd64")?;
        Some(version.to_owned())
    };
    let of = |prefix| {
        names.iter().filter_map(move |name| {
            Some(Package {
                name: name.clone(),
                version: version(name, prefix)?,
            })
        })
    };
    let mut packages: Vec<Package> = of("linux-binary-").collect();
    let stubs: Vec<String> = packages.iter().map(|package| package.version.clone()).collect();
    packages.extend(of("linux-image-").filter(|package| !stubs.contains(&package.version)));
    // `linux-image-6.12-cloud-amd64` has no kernel, it depends on the newest.
    packages.retain(|package| numbers(&package.version).len() > 2);
    Ok(packages)
}

/// The newest package of the first of these versions that there is.
fn newest<'a>(available: &'a [Package], versions: &[&[u32]]) -> Option<&'a Package> {
    versions.iter().find_map(|wanted| {
        available
            .iter()
            .filter(|package| numbers(&package.version).starts_with(wanted))
            .max_by_key(|package| numbers(&package.version))
    })
}

/// The numbers in a version, in their order: 6.12.90+deb13.1 is 6, 12, 90, 13, 1.
fn numbers(version: &str) -> Vec<u32> {
    version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// The kernel's image; of the package nothing else is kept.
fn fetch(apt: &Apt, package: &str) -> Result<PathBuf> {
    let tree = apt.tree(package, &[package.to_owned()], keep_the_image)?;
    Ok(tree.join("vmlinuz"))
}

fn keep_the_image(tree: &Path) -> Result<()> {
    let image = find_image(tree)?.with_context(|| format!("{} has no kernel", tree.display()))?;
    let kept = tree.with_extension("vmlinuz");
    fs::rename(&image, &kept).context("failed to move the kernel")?;
    fs::remove_dir_all(tree).context("failed to remove the rest of the package")?;
    fs::create_dir(tree).context("failed to create the kernel's directory")?;
    fs::rename(&kept, tree.join("vmlinuz")).context("failed to move the kernel")
}

fn find_image(directory: &Path) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(directory).with_context(|| format!("failed to list {}", directory.display()))? {
        let entry = entry.with_context(|| format!("failed to list {}", directory.display()))?;
        let kind = entry.file_type().context("failed to look at a file of the package")?;
        let found = if kind.is_dir() {
            find_image(&entry.path())?
        } else {
            let is_image = kind.is_file() && entry.file_name().to_string_lossy().starts_with("vmlinuz");
            is_image.then(|| entry.path())
        };
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(available: &[&str], versions: &[&[u32]], expected: Option<&str>) {
        let package = |version: &&str| Package {
            name: String::new(),
            version: (*version).to_owned(),
        };
        let available: Vec<_> = available.iter().map(package).collect();
        let found = newest(&available, versions).map(|package| package.version.as_str());
        assert_eq!(found, expected);
    }

    #[test]
    fn the_newest_is_found_by_number() {
        check(&["5.10.0-9", "5.10.0-46", "5.10.0-30"], &[&[5, 10]], Some("5.10.0-46"));
        check(
            &["6.12.95+deb13", "6.12.117+deb12", "6.12.117+deb13", "6.1.0-56"],
            &[&[6, 12]],
            Some("6.12.117+deb13"),
        );
        check(
            &["6.1.0-0.deb11.52", "6.1.0-56", "6.12.1+deb13"],
            &[&[6, 1]],
            Some("6.1.0-56"),
        );
    }

    #[test]
    fn the_next_best_is_taken() {
        check(
            &["6.16.12+deb13", "6.19.6+deb13"],
            &[&[6, 18], &[6, 19]],
            Some("6.19.6+deb13"),
        );
        check(&["6.16.12+deb13"], &[&[7]], None);
    }
}
