//! What the kernel and the caller must have before anything is loaded, checked one by one so that each gets its own words.

use std::fmt;

use super::btf::{BtfError, KernelTypes};

/// Oldest kernel that has every call the tracker needs; the youngest of them is `BPF_PROG_TEST_RUN` for raw tracepoints.
const MINIMUM_KERNEL: (u32, u32) = (5, 10);

/// A capability that the tracker needs, by its number in `capabilities(7)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// To signal processes of other users.
    Kill = 5,
    /// To mount and write bpffs.
    SysAdmin = 21,
    /// To load tracing programs.
    Perfmon = 38,
    /// To use bpf(2).
    Bpf = 39,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "CAP_KILL",
            Self::SysAdmin => "CAP_SYS_ADMIN",
            Self::Perfmon => "CAP_PERFMON",
            Self::Bpf => "CAP_BPF",
        })
    }
}

/// A requirement that is not met.
#[derive(Debug, thiserror::Error)]
pub enum RequirementError {
    /// Nothing tells who the caller is.
    #[error("/proc is not mounted: mount it (mount -t proc proc /proc)")]
    NoProc,
    /// The caller may not use BPF.
    #[error("missing {}: run as root, or grant the capabilities", join(.0))]
    Capabilities(Vec<Capability>),
    /// The kernel lacks calls.
    #[error("kernel {0} is too old: exact tracking needs {major}.{minor} or later", major = MINIMUM_KERNEL.0, minor = MINIMUM_KERNEL.1)]
    KernelTooOld(String),
    /// The kernel publishes no types.
    #[error(transparent)]
    Types(#[from] BtfError),
    /// The kernel was built without bpf(2).
    #[error("this kernel has no bpf(2): it needs CONFIG_BPF_SYSCALL, CONFIG_BPF_JIT and CONFIG_BPF_EVENTS")]
    NoBpf,
}

fn join(capabilities: &[Capability]) -> String {
    let names: Vec<_> = capabilities.iter().map(ToString::to_string).collect();
    names.join(", ")
}

/// One requirement and whether it is met, for `doctor`.
#[derive(Debug)]
pub struct Requirement {
    /// What is required.
    pub name: &'static str,
    /// What was found, or why it is not met.
    pub outcome: Result<String, RequirementError>,
}

/// Checks every requirement and reports each.
#[must_use]
pub fn requirements() -> Vec<Requirement> {
    vec![
        Requirement {
            name: "capabilities",
            outcome: capabilities().map(|()| "CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, CAP_KILL".to_owned()),
        },
        Requirement {
            name: "kernel",
            outcome: kernel(),
        },
        Requirement {
            name: "bpf(2)",
            outcome: bpf().map(|()| "present".to_owned()),
        },
        Requirement {
            name: "/proc",
            outcome: procfs::process::Process::myself()
                .map(|_| "mounted".to_owned())
                .map_err(|_| RequirementError::NoProc),
        },
        Requirement {
            name: "bpffs",
            // Not having it is no failure, so there is something to say either way.
            outcome: Ok(super::pins::bpffs().to_owned()),
        },
        Requirement {
            name: "kernel BTF",
            outcome: KernelTypes::are_published()
                .map(|()| "/sys/kernel/btf/vmlinux".to_owned())
                .map_err(Into::into),
        },
    ]
}

/// Checks every requirement; the first that is not met is the error.
pub(crate) fn check() -> Result<(), RequirementError> {
    requirements()
        .into_iter()
        .try_for_each(|requirement| requirement.outcome.map(drop))
}

/// As [`check`], for who only reads: no signal is sent.
pub(crate) fn check_to_read() -> Result<(), RequirementError> {
    requirements()
        .into_iter()
        .try_for_each(|requirement| match requirement.outcome {
            Err(RequirementError::Capabilities(missing)) if missing == [Capability::Kill] => Ok(()),
            outcome => outcome.map(drop),
        })
}

fn capabilities() -> Result<(), RequirementError> {
    let effective = procfs::process::Process::myself()
        .and_then(|process| process.status())
        .map_err(|_| RequirementError::NoProc)?
        .capeff;
    let missing: Vec<_> = [
        Capability::Bpf,
        Capability::Perfmon,
        Capability::SysAdmin,
        Capability::Kill,
    ]
    .into_iter()
    .filter(|capability| effective & (1 << *capability as u32) == 0)
    .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(RequirementError::Capabilities(missing))
    }
}

/// Whether the kernel is of this version or later.
pub(super) fn kernel_is_at_least(wanted: (u32, u32)) -> bool {
    version(&release()).is_some_and(|found| found >= wanted)
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn kernel() -> Result<String, RequirementError> {
    let release = release();
    match version(&release) {
        Some(found) if found >= MINIMUM_KERNEL => Ok(release),
        _ => Err(RequirementError::KernelTooOld(release)),
    }
}

/// Major and minor version of a release name such as `6.12.117+deb13-cloud-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn bpf() -> Result<(), RequirementError> {
    // SAFETY: command -1 does not exist; the kernel answers EINVAL or EPERM without reading the attribute, or ENOSYS.
    let result = unsafe { libc::syscall(libc::SYS_bpf, -1, std::ptr::null::<u8>(), 0) };
    if result < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS) {
        return Err(RequirementError::NoBpf);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_names_of_all_kinds_are_understood() {
        assert_eq!(version("5.10.0-35-cloud-amd64"), Some((5, 10)));
        assert_eq!(version("6.18.44-fc-v657"), Some((6, 18)));
        assert_eq!(version("7.3+deb13"), Some((7, 3)));
        assert_eq!(version("linux"), None);
    }
}
