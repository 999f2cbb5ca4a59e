//! The eBPF programs that keep the books of every service.
//!
//! This file has the entry points, `task` reads kernel structures, `books` changes the maps. A creation is recorded in
//! the context of the process that forks, before the child runs its first instruction; a death when the last thread of
//! a process exits. The programs touch members of tracked services and nothing else.
//!
//! Built for the `bpf` target by `cargo xtask build-ebpf`; on any other target this is an empty program, so that the
//! workspace builds with stable Rust.

#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod books;
#[cfg(target_arch = "bpf")]
mod programs;
#[cfg(target_arch = "bpf")]
mod task;
#[cfg(target_arch = "bpf")]
mod text;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Most helpers that the programs need are reserved for GPL-compatible programs; this text is what the kernel reads.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
