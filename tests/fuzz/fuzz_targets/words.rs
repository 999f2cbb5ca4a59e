//! Durations, signals, pids and addresses on command lines: what is understood must be understood again as it is printed.

#![no_main]

#[path = "../../../zinit-tracker/src/cli/parse.rs"]
mod parse;

use zinit_tracker::{rpc::HttpAddress, stop::signal_named};

libfuzzer_sys::fuzz_target!(init: zinit_fuzz::prepare(), |text: &str| {
    if let Ok(duration) = parse::duration(text) {
        let shown = humantime::format_duration(duration).to_string();
        assert_eq!(parse::duration(&shown), Ok(duration), "{shown}");
    }
    if let Ok(signal) = parse::signal(text) {
        let number = (signal as i32).to_string();
        for shown in [signal.as_str(), &signal.as_str().to_lowercase(), &number] {
            assert_eq!(signal_named(shown), Some(signal), "{shown}");
        }
    }
    if let Ok(pid) = parse::pid(text) {
        assert_eq!(parse::pid(&pid.to_string()), Ok(pid));
    }
    if let Ok(address) = text.parse::<HttpAddress>() {
        assert_eq!(address.to_string().parse(), Ok(address));
    }
});
