//! Signals as people write them.

use nix::sys::signal::Signal;

/// The signal of this name, with or without `SIG` and in any case, or of this number.
#[must_use]
pub fn signal_named(text: &str) -> Option<Signal> {
    if let Ok(number) = text.parse::<i32>() {
        return Signal::try_from(number).ok();
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    format!("SIG{name}").parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_name_and_number() {
        for text in ["TERM", "term", "SIGTERM", "sigterm", "15"] {
            assert_eq!(signal_named(text), Some(Signal::SIGTERM), "{text:?}");
        }
        for bad in ["", "0", "-1", "999", "SIG", "TERMINATE", "SIGSIGTERM"] {
            assert_eq!(signal_named(bad), None, "{bad:?}");
        }
    }
}
