//! What it takes to build, check and test zinit-tracker, as `cargo xtask COMMAND`.
//!
//! One file a subcommand, each with its `Options` and its `run`.

mod bench;
mod build_ebpf;
mod ci;
mod fuzz;
mod leftovers;
mod lint;
mod soak;
mod strip;
mod test;
mod toolchain;
mod vm;
mod workspace;

use anyhow::Result;
use clap::Parser;
use std::process::ExitCode;

/// Build, check and test zinit-tracker.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    Bench(bench::Options),
    BuildEbpf(build_ebpf::Options),
    Ci(ci::Options),
    Fuzz(fuzz::Options),
    Lint(lint::Options),
    Soak(soak::Options),
    Test(test::Options),
    Vm(vm::Options),
}

fn main() -> ExitCode {
    match run(&Command::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> Result<()> {
    match command {
        Command::Bench(options) => bench::run(options),
        Command::BuildEbpf(options) => build_ebpf::run(options),
        Command::Ci(options) => ci::run(options),
        Command::Fuzz(options) => fuzz::run(options),
        Command::Lint(options) => lint::run(options),
        Command::Soak(options) => soak::run(options),
        Command::Test(options) => test::run(options),
        Command::Vm(options) => vm::run(options),
    }
}
