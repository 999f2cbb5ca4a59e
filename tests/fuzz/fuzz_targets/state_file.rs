#![no_main]

libfuzzer_sys::fuzz_target!(init: zinit_fuzz::prepare(), |data: &[u8]| zinit_tracker::fuzzing::state_file(data));
