//! How a process of an actor lives: it rests, and it does not live for ever.

use std::time::Duration;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::alarm;

/// After this time a process ends by itself, even if the test that started it has crashed.
const LIFETIME: Duration = Duration::from_secs(300);

/// The exit status of a process that reached the end of its time.
const STATUS_TIMED_OUT: i32 = 124;

/// Starts the clock of this process. To be called in every new process, since fork does not inherit alarms.
pub(crate) fn begin() {
    end_after(LIFETIME);
}

/// Ends this process after `lifetime`, in whole seconds.
pub(crate) fn end_after(lifetime: Duration) {
    let seconds = u32::try_from(lifetime.as_secs()).expect("lifetimes are minutes");
    // A handler, because the first process of a pid namespace does not have default actions.
    let action = SigAction::new(SigHandler::Handler(on_alarm), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler only calls _exit, which is async-signal-safe.
    unsafe { sigaction(Signal::SIGALRM, &action) }.expect("SIGALRM can be handled");
    alarm::set(seconds);
}

extern "C" fn on_alarm(_signal: i32) {
    exit_now(STATUS_TIMED_OUT);
}

/// Ends this process with SIGKILL after its lifetime, even while it is stopped, when it would not see an alarm.
pub(crate) fn end_even_if_stopped() -> nix::Result<()> {
    // SAFETY: all zeroes is a valid sigevent and a valid itimerspec.
    let (mut event, mut time) = unsafe { std::mem::zeroed::<(libc::sigevent, libc::itimerspec)>() };
    event.sigev_notify = libc::SIGEV_SIGNAL;
    event.sigev_signo = libc::SIGKILL;
    time.it_value.tv_sec = LIFETIME.as_secs().cast_signed();
    let mut timer = std::ptr::null_mut();
    // SAFETY: both pointers are to live values of the right type.
    let created = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) };
    nix::errno::Errno::result(created)?;
    // SAFETY: the timer was just created, and the old value is not asked for.
    let set = unsafe { libc::timer_settime(timer, 0, &time, std::ptr::null_mut()) };
    nix::errno::Errno::result(set).map(drop)
}

/// Rests for ever. Only makes async-signal-safe calls.
pub(crate) fn rest() -> ! {
    loop {
        nix::unistd::pause();
    }
}

/// Ends this process without running anything that it has inherited, such as handlers of `atexit` or buffers.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: _exit is async-signal-safe, and no caller relies on anything that it skips.
    unsafe { libc::_exit(status) }
}

/// Ends the calling thread only, even the leader of the process. It must not be the last one.
pub(crate) fn exit_thread() -> ! {
    // SAFETY: the thread's stack is leaked along with all that it holds, so no other thread can see freed memory.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("exit returned");
}
