//! Gives up rights that a process has and does not need, for good.

use std::io;

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// What it takes to read the books, and to find out about all processes: `CAP_BPF`, `CAP_PERFMON`, `CAP_SYS_ADMIN`,
/// `CAP_SYS_PTRACE`, `CAP_DAC_READ_SEARCH`.
pub const TO_READ: CapabilitySet = CapabilitySet::BPF
    .union(CapabilitySet::PERFMON)
    .union(CapabilitySet::SYS_ADMIN)
    .union(CapabilitySet::SYS_PTRACE)
    .union(CapabilitySet::DAC_READ_SEARCH);

/// What it takes to listen at any port.
pub const TO_LISTEN: CapabilitySet = CapabilitySet::NET_BIND_SERVICE;

/// Keeps those of the calling thread's capabilities that are named, also for the threads that it creates from now on; no program that is
/// executed has more. The user stays who it is.
///
/// For a process that has one thread, and executes no program that needs more.
///
/// # Errors
///
/// When the kernel refuses it: of the steps, some may have been taken.
pub fn keep_only(kept: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    let now = capabilities(None)?;
    // Without it the bounding set stays as it is, and matters no more: nothing that is executed gets new rights.
    if now.effective.contains(CapabilitySet::SETPCAP) {
        for capability in (CapabilitySet::all() - kept).iter().filter(is_known) {
            remove_capability_from_bounding_set(capability)?;
        }
    }
    set_capabilities(
        None,
        CapabilitySets {
            effective: now.effective & kept,
            permitted: now.permitted & kept,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}

/// Whether it is in the bounding set of a kernel that knows it.
fn is_known(capability: &CapabilitySet) -> bool {
    capability_is_in_bounding_set(*capability).unwrap_or(false)
}
