//! `zinit-tracker`: run, list, adopt and stop services whose descendants the kernel keeps track of.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
