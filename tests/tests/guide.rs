//! The guide `zinit-tracker/guide.md`: its five cases, each with the real program from Debian's packages, the service files that the
//! guide has, and what it shows compared with what the tools print.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "guide/case.rs"]
mod case;
#[path = "guide/chromium.rs"]
mod chromium;
#[path = "guide/daemoniser.rs"]
mod daemoniser;
#[path = "guide/document.rs"]
mod document;
#[path = "guide/nginx.rs"]
mod nginx;
#[path = "guide/postgresql.rs"]
mod postgresql;
#[path = "guide/tmux.rs"]
mod tmux;
