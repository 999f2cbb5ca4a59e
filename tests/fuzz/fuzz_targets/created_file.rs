#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| zinit_tracker::fuzzing::created_file(data));
