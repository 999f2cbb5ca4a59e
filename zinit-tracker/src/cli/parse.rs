//! Values as people write them.

use std::time::Duration;

use nix::sys::signal::Signal;
use zinit_tracker::stop::signal_named;

/// A duration such as `500ms`, `10s`, `2m` or `1m30s`; `0` needs no unit.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    humantime::parse_duration(text).map_err(|error| format!("{error}; write it like 500ms, 10s or 2m"))
}

/// A signal by name, with or without `SIG` and in any case, or by number.
pub(super) fn signal(text: &str) -> Result<Signal, String> {
    signal_named(text).ok_or_else(|| format!("unknown signal {text:?}; write it like TERM, SIGINT or 15"))
}

/// A pid that can be meant: a positive number.
pub(super) fn pid(text: &str) -> Result<u32, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is no pid; a pid is a positive number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_as_people_write_them() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        for bad in ["", "10", "-1s", "1 parsec", "99999999999999999999s"] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }
}
