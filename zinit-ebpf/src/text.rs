//! The books as a table for people: a line for each member that is there.

use aya_ebpf::helpers::{bpf_ktime_get_boot_ns, bpf_seq_printf};
use core::ffi::c_void;
use zinit_ebpf::{COMM_LEN, INSTANCE_LEN, NAME_LEN, process_flag};

use crate::{books, programs::iterated};

/// A text that the kernel reads: without a terminator it would read on.
macro_rules! text {
    ($name:ident, $text:literal) => {
        #[unsafe(no_mangle)]
        static $name: [u8; $text.len()] = *$text;
    };
}

text!(
    TABLE_HEADER,
    b"    PID    PPID SESSION   GROUP    AGE_S JOINED  COMMAND         SERVICE\n\0"
);
text!(TABLE_LINE, b"%7u %7u %7u %7u %8llu %-7s %-15s %s/%s\n\0");
text!(TABLE_FORKED, b"forked\0");
text!(TABLE_SPAWNED, b"spawned\0");
text!(TABLE_ADOPTED, b"adopted\0");

const NS_PER_S: u64 = 1_000_000_000;

/// Over tasks, as an iterator over the entries of a map is refused by some kernels (`EPERM`, seen with 6.18).
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
fn zinit_text(ctx: *mut c_void) -> i32 {
    let Some((meta, task)) = iterated(ctx) else {
        return 0;
    };
    // SAFETY: `meta` has the `struct seq_file *`, the session, and how many tasks came before.
    let (seq, before) = unsafe {
        (
            core::ptr::read_volatile(meta as *const u64),
            core::ptr::read_volatile((meta + 16) as *const u64),
        )
    };
    if before == 0 {
        print(seq, &TABLE_HEADER, &[0; 0]);
    }
    if task.tid() != task.tgid() {
        return 0;
    }
    let key = task.key();
    let Some(entry) = books::member(key) else {
        return 0;
    };
    // SAFETY: the reference is copied from before any map operation.
    let Some(books) = (unsafe { books::SERVICES.get(entry.service) }) else {
        return 0;
    };
    let instance: [u64; INSTANCE_LEN / 8 + 1] = terminated(books.instance.as_ptr());
    let name: [u64; NAME_LEN / 8 + 1] = terminated(books.name.as_ptr());
    let comm = printable(task.comm());
    let signal = task.signal();
    // SAFETY: a helper without arguments.
    let age = unsafe { bpf_ktime_get_boot_ns() }.saturating_sub(key.start_boottime_ns) / NS_PER_S;
    let joined = match entry.flags & (process_flag::SPAWNED | process_flag::ADOPTED) {
        0 => TABLE_FORKED.as_ptr(),
        process_flag::SPAWNED => TABLE_SPAWNED.as_ptr(),
        _ => TABLE_ADOPTED.as_ptr(),
    };
    let columns = [
        u64::from(key.tgid),
        u64::from(task.real_parent().tgid()),
        u64::from(signal.session()),
        u64::from(signal.group()),
        age,
        joined as u64,
        comm.as_ptr() as u64,
        instance.as_ptr() as u64,
        name.as_ptr() as u64,
    ];
    print(seq, &TABLE_LINE, &columns);
    0
}

/// If the reader's buffer is full, the kernel runs the program again for the same task.
#[inline(always)]
fn print(seq: u64, format: &'static [u8], columns: &[u64]) {
    let data = match columns {
        [] => core::ptr::null(),
        columns => columns.as_ptr().cast(),
    };
    // SAFETY: the format ends in 0 and has a column for each value; texts among these do, too, and live on until the call returns.
    unsafe {
        bpf_seq_printf(
            seq as *mut _,
            format.as_ptr().cast(),
            format.len() as u32,
            data,
            size_of_val(columns) as u32,
        )
    };
}

/// A text of the books, which need not end in 0 if it is as long as it may be; `WORDS` is one more than it has, each of eight bytes.
#[inline(always)]
fn terminated<const WORDS: usize>(text: *const u8) -> [u64; WORDS] {
    let text = text.cast::<u64>();
    let mut copy = [0; WORDS];
    for (index, word) in copy.iter_mut().take(WORDS - 1).enumerate() {
        // SAFETY: within the text. The verifier demands that it is aligned, which every text of the books is.
        *word = unsafe { text.add(index).read() };
    }
    copy
}

/// A command name as it is safe to show: a process may give itself any. What is no printable ASCII is shown as `?`.
///
/// Eight bytes at a time and without branches, of which the verifier would follow every combination.
#[inline(always)]
fn printable(comm: [u8; COMM_LEN]) -> [u64; COMM_LEN / 8 + 1] {
    const fn each(byte: u8) -> u64 {
        u64::from_ne_bytes([byte; 8])
    }
    let mut copy = [0; COMM_LEN / 8 + 1];
    for (word, bytes) in copy.iter_mut().zip(comm.as_chunks::<8>().0) {
        let text = u64::from_ne_bytes(*bytes);
        let low = text & each(0x7f);
        // The highest bit of each byte says what is asked; sums stay within their bytes.
        let from_space = low + each(0x80 - b' ');
        let not_zero = (low + each(0x7f)) | text;
        let delete = low + each(1);
        let bad = ((!from_space & not_zero) | delete | text) & each(0x80);
        let mask = (bad >> 7) * 0xff;
        *word = (text & !mask) | (each(b'?') & mask);
    }
    copy
}
