//! Times since boot as the wall clock shows them.

use std::time::{Duration, SystemTime};

use zinit_tracker::Tracker;

/// The time that the wall clock, as it is set now, had then: RFC 3339, UTC, to the millisecond.
pub(super) fn wall(boottime: Duration) -> String {
    let ago = Tracker::now().saturating_sub(boottime);
    let then = SystemTime::now().checked_sub(ago).unwrap_or(SystemTime::UNIX_EPOCH);
    humantime::format_rfc3339_millis(then).to_string()
}

/// As the records and JSON have times and durations.
pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
