//! What every target does first.

use std::{mem, ptr};

/// Room for libFuzzer to write down the input.
const STACK: usize = 256 * 1024;

/// Lets an input be written down whose parser has used up the stack: libFuzzer's own handler would have none to run on.
pub fn prepare() {
    let stack = libc::stack_t {
        ss_sp: Box::leak(vec![0_u8; STACK].into_boxed_slice()).as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: STACK,
    };
    // SAFETY: the stack is never given back.
    assert_eq!(unsafe { libc::sigaltstack(&stack, ptr::null_mut()) }, 0);
    // SAFETY: a plain C structure, for which all zeros is a value.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = abort as *const () as usize;
    action.sa_flags = libc::SA_ONSTACK;
    // SAFETY: the handler calls what handlers may call only.
    assert_eq!(unsafe { libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut()) }, 0);
}

/// libFuzzer handles SIGABRT on the stack that there is.
extern "C" fn abort(_: libc::c_int) {
    // SAFETY: abort(3) may be called from handlers.
    unsafe { libc::abort() };
}
