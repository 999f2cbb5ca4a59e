//! Loads the embedded eBPF object into the running kernel.

use std::{
    io,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use aya::{
    Btf, Ebpf, EbpfError, EbpfLoader, Endianness,
    maps::MapError,
    programs::{BtfTracePoint, Iter, Lsm, ProgramError, RawTracePoint},
};
use nix::sys::{
    resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit},
    signal::{SigSet, SigmaskHow},
};
use zinit_ebpf::{map, program};

use super::{
    btf::{BtfError, KernelTypes},
    hooks::HOOKS,
    pins::PinDirectory,
    requirements::kernel_is_at_least,
};

/// Largest capacity of `processes`: 131,072 entries take about 17 MiB of kernel memory.
const MAX_PROCESSES: u32 = 131_072;

/// Held while the limit on locked memory is raised.
static MEMLOCK: Mutex<()> = Mutex::new(());

/// Why the programs could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A kernel structure is not as expected.
    #[error(transparent)]
    Types(#[from] BtfError),
    /// The object could not be parsed or its maps created.
    #[error("failed to load the eBPF object")]
    Object(#[from] EbpfError),
    /// aya could not read the kernel's types.
    #[error("failed to read the kernel's BTF")]
    Btf(#[from] aya::BtfError),
    /// The kernel refused a program.
    #[error("failed to {operation} the eBPF program {program}")]
    Program {
        /// What was attempted.
        operation: &'static str,
        /// The program.
        program: &'static str,
        /// What aya or the kernel answered.
        #[source]
        source: Box<ProgramError>,
    },
    /// The object lacks a program that the loader expects.
    #[error("the eBPF object has no program {0}")]
    NoProgram(&'static str),
    /// The object lacks a map that the loader expects.
    #[error("the eBPF object has no map {0}")]
    NoMap(&'static str),
    /// A map could not be opened as its type.
    #[error("failed to open the map {map}")]
    Map {
        /// The map.
        map: &'static str,
        /// What aya or the kernel answered.
        #[source]
        source: Box<MapError>,
    },
    /// A limit could not be read.
    #[error("failed to read {path}")]
    Limit {
        /// The file.
        path: PathBuf,
        /// What the kernel answered.
        source: io::Error,
    },
}

impl LoadError {
    /// Whether the kernel refused to attach a program where it is attached.
    pub(super) fn is_already_there(&self) -> bool {
        let Self::Program { source, .. } = self else {
            return false;
        };
        matches!(&**source, ProgramError::SyscallError(error) if error.io_error.kind() == io::ErrorKind::AlreadyExists)
    }
}

/// How the object is to be loaded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoadOptions {
    pub max_processes: Option<u32>,
    pub log: Option<aya_log::Level>,
    pub without_hook: Option<&'static str>,
    /// Called between the attachment of the hooks and the take-over of members.
    pub meanwhile: Option<fn()>,
    /// Programs of another build that are pinned are replaced.
    pub replace: bool,
    /// What the object passes for being built from.
    pub sources: [u8; 32],
}

/// Creates the maps, or takes those that are pinned in `reuse`, and loads every program; attaches none.
///
/// `sched_wakeup_new` is left out where the kernel lacks what it needs (before 5.11); those kernels lose no events.
///
/// With the directory of an `earlier` layout, the hooks also take members of that for members.
pub(super) fn load(
    options: LoadOptions,
    reuse: Option<&PinDirectory>,
    earlier: Option<&PinDirectory>,
) -> Result<(Ebpf, u32), LoadError> {
    let load_all = || load_all(options, reuse, earlier);
    if kernel_is_at_least((5, 11)) {
        return without_signals(load_all);
    }
    // Maps are charged to this limit of the whole process: who gives it back must not take it from another thread.
    let _turn = MEMLOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let limit = raise_memlock();
    let result = without_signals(load_all);
    // The services' processes get the caller's limit.
    if let Some((soft, hard)) = limit
        && let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard)
    {
        tracing::debug!(%error, "the limit on locked memory stays raised");
    }
    result
}

/// The verifier gives up with EAGAIN if its caller has a signal to handle, as a parent of a fork storm always has.
fn without_signals<R>(work: impl FnOnce() -> R) -> R {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK);
    let result = work();
    if let Ok(before) = before
        && let Err(error) = before.thread_set_mask()
    {
        tracing::warn!(%error, "signals stay blocked in this thread");
    }
    result
}

/// Returns the limits that were replaced.
fn raise_memlock() -> Option<(u64, u64)> {
    let before = getrlimit(Resource::RLIMIT_MEMLOCK).ok()?;
    setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY)
        .inspect_err(|error| tracing::debug!(%error, "the limit on locked memory stays as it is"))
        .ok()?;
    Some(before)
}

fn load_all(
    options: LoadOptions,
    reuse: Option<&PinDirectory>,
    earlier: Option<&PinDirectory>,
) -> Result<(Ebpf, u32), LoadError> {
    let types = KernelTypes::running()?;
    // The kernel gives out its megabytes a page at a time: once is enough.
    let btf = Btf::parse(types.bytes(), Endianness::default())?;
    let offsets = offsets(&types)?;
    let has_task_btf = types.has_typedef("btf_bpf_get_current_task_btf");
    let max_processes = match options.max_processes {
        Some(capacity) => capacity,
        None => capacity()?,
    };
    let log_level = options.log.map_or(0, |level| level as u8);
    let mut loader = EbpfLoader::new();
    loader.btf(Some(&btf));
    for (name, offset) in &offsets {
        loader.override_global(name, offset, true);
    }
    loader.override_global("AYA_LOG_LEVEL", &log_level, true);
    let moving = u64::from(earlier.is_some());
    loader.override_global("MOVING", &moving, true);
    loader.map_max_entries(map::PROCESSES, max_processes);
    if let Some(pins) = reuse {
        for name in map::ALL {
            loader.map_pin_path(name, pins.map(name));
        }
    }
    if let Some(pins) = earlier {
        loader.map_pin_path(map::EARLIER, pins.map(map::PROCESSES));
    }
    let mut ebpf = loader.load(zinit_ebpf::OBJECT)?;

    for (name, tracepoint) in HOOKS.into_iter().chain([(program::GATE, "sys_enter")]) {
        if (name == program::WAKEUP_NEW && !has_task_btf) || options.without_hook == Some(name) {
            continue;
        }
        let hook: &mut BtfTracePoint = get(&mut ebpf, name)?;
        hook.load(tracepoint, &btf)
            .map_err(|source| failed("load", name, source))?;
    }
    // Where the machine is locked down, or the kernel has no BPF LSM, the other gate has to do.
    let deny: &mut Lsm = get(&mut ebpf, program::DENY)?;
    if let Err(error) = deny.load("task_alloc", &btf) {
        tracing::debug!(error = &error as &dyn std::error::Error, "no gate at task_alloc");
    }
    for name in [program::SPAWN, program::STATE, program::RELEASE] {
        let command: &mut RawTracePoint = get(&mut ebpf, name)?;
        command.load().map_err(|source| failed("load", name, source))?;
    }
    for name in [program::TASKS, program::ADOPT] {
        let iterator: &mut Iter = get(&mut ebpf, name)?;
        iterator
            .load("task", &btf)
            .map_err(|source| failed("load", name, source))?;
    }
    // Nothing depends on the table that it prints (early 5.10 refuses what it prints texts with).
    let text: &mut Iter = get(&mut ebpf, program::TEXT)?;
    if let Err(error) = text.load("task", &btf) {
        tracing::debug!(error = &error as &dyn std::error::Error, "no table of members");
    }
    Ok((ebpf, max_processes))
}

pub(super) fn failed(operation: &'static str, program: &'static str, source: ProgramError) -> LoadError {
    LoadError::Program {
        operation,
        program,
        source: Box::new(source),
    }
}

/// The program of that name and type.
pub(super) fn get<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, LoadError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or(LoadError::NoProgram(name))?
        .try_into()
        .map_err(|source| failed("find", name, source))
}

/// What the programs of any build are given of the running kernel, so that tests can load those of an earlier one.
///
/// # Errors
///
/// When the kernel has no BTF, or not these structures.
#[doc(hidden)]
pub fn kernel_offsets() -> Result<Vec<(&'static str, u64)>, BtfError> {
    offsets(&KernelTypes::running()?)
}

/// What the programs call `TASK_PID` and so on, found in the running kernel.
pub(super) fn offsets(types: &KernelTypes) -> Result<Vec<(&'static str, u64)>, BtfError> {
    const MEMBERS: [(&str, &str, &str); 20] = [
        ("TASK_PID", "task_struct", "pid"),
        ("TASK_TGID", "task_struct", "tgid"),
        ("TASK_START_BOOTTIME", "task_struct", "start_boottime"),
        ("TASK_GROUP_LEADER", "task_struct", "group_leader"),
        ("TASK_REAL_PARENT", "task_struct", "real_parent"),
        ("TASK_SIGNAL", "task_struct", "signal"),
        ("TASK_THREAD_PID", "task_struct", "thread_pid"),
        ("TASK_EXIT_CODE", "task_struct", "exit_code"),
        ("TASK_EXIT_STATE", "task_struct", "exit_state"),
        ("TASK_COMM", "task_struct", "comm"),
        ("SIGNAL_LIVE", "signal_struct", "live"),
        ("SIGNAL_NR_THREADS", "signal_struct", "nr_threads"),
        ("SIGNAL_FLAGS", "signal_struct", "flags"),
        ("SIGNAL_GROUP_EXIT_CODE", "signal_struct", "group_exit_code"),
        ("SIGNAL_PIDS", "signal_struct", "pids"),
        ("PID_LEVEL", "pid", "level"),
        ("PID_NUMBERS", "pid", "numbers"),
        ("UPID_NR", "upid", "nr"),
        ("UPID_NS", "upid", "ns"),
        ("NS_COMMON_INUM", "ns_common", "inum"),
    ];
    let mut offsets = Vec::with_capacity(MEMBERS.len() + 3);
    for (name, structure, member) in MEMBERS {
        offsets.push((name, types.offset_of(structure, member)?));
    }
    let common = offsets.pop().map_or(0, |(_, offset)| offset);
    offsets.push(("NAMESPACE_INUM", types.offset_of("pid_namespace", "ns")? + common));
    offsets.push(("UPID_SIZE", types.size_of("upid")?));
    offsets.push(("PID_NUMBERS_FLEXIBLE", u64::from(types.is_flexible("pid", "numbers")?)));
    offsets.push((
        "HAS_TASK_BTF",
        u64::from(types.has_typedef("btf_bpf_get_current_task_btf")),
    ));
    Ok(offsets)
}

/// As many processes as can exist, up to [`MAX_PROCESSES`].
fn capacity() -> Result<u32, LoadError> {
    let limit = |path: &str| -> Result<u32, LoadError> {
        let read = || {
            std::fs::read_to_string(path)?
                .trim()
                .parse()
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
        };
        read().map_err(|source| LoadError::Limit {
            path: path.into(),
            source,
        })
    };
    let pid_max = limit("/proc/sys/kernel/pid_max")?;
    let threads_max = limit("/proc/sys/kernel/threads-max")?;
    Ok(pid_max.min(threads_max).min(MAX_PROCESSES))
}
