//! Services whose daemon holds something that the next start of the service will want.

use std::convert::Infallible;
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context, Result};

use crate::acks::Acks;
use crate::{life, process, ready};

/// Has a daemon that listens on a TCP port of 127.0.0.1; 0 picks one. The fact `port` says which.
pub(crate) fn tcp(port: u16) -> Result<Infallible> {
    let acks = Acks::new()?;
    process::daemon(|| {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).context("failed to listen")?;
        acks.done_with(listener.local_addr()?.port().into())?;
        life::rest()
    })?;
    let port = acks.wait(1)?[0];
    ready::signal_with(&[("port", &port)])?;
    life::rest()
}

/// Has a daemon that holds an exclusive flock on a file, which it creates if need be.
pub(crate) fn flock(file: &str) -> Result<Infallible> {
    let acks = Acks::new()?;
    process::daemon(|| {
        let file = File::create(file).with_context(|| format!("failed to open {file}"))?;
        file.try_lock().context("failed to lock the file")?;
        acks.done()?;
        life::rest()
    })?;
    acks.wait(1)?;
    ready::signal()?;
    life::rest()
}
