//! Fuzzing: BTF, and bytes as maps, rings and iterators give them.

pub(crate) use aya::Pod;
use zinit_ebpf::{Event, Stats, Task};

use super::{books, btf::KernelTypes, events, load};

/// Reads the bytes as BTF, and finds in it what the programs need.
pub fn kernel_types(data: &[u8]) {
    if let Ok(types) = KernelTypes::parse(data.to_vec())
        && let Ok(offsets) = load::offsets(&types)
    {
        // A member lies within 2^32 bits, and so does what is added to it.
        assert!(offsets.iter().all(|(_, offset)| *offset <= u64::from(u32::MAX)));
    }
}

/// Takes a key or a value of a map off the front.
pub(crate) fn take<T: Pod>(data: &mut &[u8]) -> Option<T> {
    let (bytes, rest) = data.split_at_checked(size_of::<T>())?;
    *data = rest;
    // SAFETY: the bytes are as many as a `T` has, which is plain data; the read needs no alignment.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// What the task iterator's reader makes of the bytes.
pub(crate) fn tasks(data: &[u8]) -> Vec<Task> {
    books::decoded(data)
}

/// What the ring's reader makes of an item.
pub(crate) fn event(item: &[u8]) -> Option<Event> {
    events::decoded(item)
}

/// Counters of all CPUs as one.
pub(crate) fn stats(cpus: &[Stats]) -> Stats {
    books::sum(cpus.iter())
}
