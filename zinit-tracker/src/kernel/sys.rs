//! The bpf(2) calls that aya 0.14 lacks.

use std::{
    io, mem,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
};

use aya::Pod;
use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_prog_info};

fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: the attribute outlives the call, has the size that is passed, and what it points to is kept alive by the
    // callers below.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as u32, attr, size_of::<bpf_attr>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn zeroed_attr() -> bpf_attr {
    // SAFETY: a union of plain C structures, for which all zeros is a value.
    unsafe { mem::zeroed() }
}

fn fd(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

/// Every entry of a hash map. An entry that is present throughout the call is in the result exactly once.
///
/// `BPF_MAP_LOOKUP_BATCH`, kernel 5.6.
pub(crate) fn entries<K: Pod, V: Pod>(map: BorrowedFd<'_>, max_entries: u32) -> io::Result<Vec<(K, V)>> {
    // A chunk must hold the largest bucket, or the kernel answers ENOSPC; then the chunk grows.
    let mut chunk = 256_usize;
    let mut result = Vec::new();
    let mut position = 0_u32;
    let mut begun = false;
    loop {
        let mut keys: Vec<K> = Vec::with_capacity(chunk);
        let mut values: Vec<V> = Vec::with_capacity(chunk);
        let mut next = 0_u32;
        let mut attr = zeroed_attr();
        attr.batch.map_fd = fd(map);
        attr.batch.in_batch = if begun { (&raw const position) as u64 } else { 0 };
        attr.batch.out_batch = (&raw mut next) as u64;
        attr.batch.keys = keys.as_mut_ptr() as u64;
        attr.batch.values = values.as_mut_ptr() as u64;
        attr.batch.count = chunk as u32;
        let outcome = bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr);
        // SAFETY: the kernel wrote the number of entries that it copied, also on ENOENT.
        let count = unsafe { attr.batch.count } as usize;
        let last = match outcome {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && chunk < max_entries as usize => {
                chunk = (chunk * 4).min(max_entries as usize).max(chunk + 1);
                continue;
            }
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
            Err(error) => return Err(error),
        };
        let count = count.min(chunk);
        // SAFETY: the kernel filled the first `count` elements, which lie within the capacity; the types are plain data.
        unsafe { keys.set_len(count) };
        // SAFETY: as above.
        unsafe { values.set_len(count) };
        result.extend(keys.into_iter().zip(values));
        if last {
            return Ok(result);
        }
        position = next;
        begun = true;
    }
}

/// What the kernel says of a program. `recursion_misses` is how often it was skipped because it was already running on that
/// CPU: 0 on 5.10, which never skips.
///
/// `BPF_OBJ_GET_INFO_BY_FD`; that field is in kernel 5.12 and later.
pub(crate) fn program_info(program: impl AsFd) -> io::Result<bpf_prog_info> {
    // SAFETY: a plain C structure, for which all zeros is a value.
    let mut info: bpf_prog_info = unsafe { mem::zeroed() };
    let mut attr = zeroed_attr();
    attr.info.bpf_fd = fd(program.as_fd());
    attr.info.info_len = size_of::<bpf_prog_info>() as u32;
    attr.info.info = (&raw mut info) as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// Returns when every program that a tracepoint was running has ended; false: the kernel does not say (`nohz_full`, or refused).
pub(super) fn wait_for_hooks() -> bool {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: without pointers; it waits for a grace period.
    unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) == 0 }
}
