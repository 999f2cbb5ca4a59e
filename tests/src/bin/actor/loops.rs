//! Services that create very many processes, one after the other, each of which exits at once.

use std::convert::Infallible;

use anyhow::Result;

use crate::signals::wait_for_term;
use crate::{life, process};

/// Has `loops` children, each of which creates `count` processes; exits with status 0 when all have ended.
pub(crate) fn fork_loops(loops: usize, count: usize) -> Result<Infallible> {
    let children: Vec<_> = (0..loops)
        .map(|_| {
            process::fork(|| {
                fork_loop(count)?;
                life::exit_now(0)
            })
        })
        .collect::<Result<_>>()?;
    for child in children {
        process::wait(child)?;
    }
    life::exit_now(0)
}

fn fork_loop(count: usize) -> Result<()> {
    for _ in 0..count {
        process::wait(process::fork(|| life::exit_now(0))?)?;
    }
    Ok(())
}

/// Creates `count` processes on SIGTERM, and exits.
pub(crate) fn loop_on_term(count: usize) -> Result<Infallible> {
    wait_for_term()?;
    fork_loop(count)?;
    life::exit_now(0)
}
