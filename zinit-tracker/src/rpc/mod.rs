//! How clients reach a supervisor: zinit's JSON-RPC over a Unix socket, and over HTTP in front of it.
//!
//! Uses the supervisor through its [`Handle`](crate::supervisor::Handle) only. Whatever a client sends, or fails to read,
//! or leaves open, harms itself alone: lines, batches, requests under way, subscriptions and connections have a most.
//!
//! Deliberately not here: what a request means for a service.

mod client;
mod connection;
mod dispatch;
mod error;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod http;
mod lines;
mod lock;
mod message;
mod method;
mod openrpc;
mod plain;
mod room;
mod server;
mod shapes;
mod slots;

pub use client::{Client, ClientError};
pub use connection::MAX_REQUEST;
pub use dispatch::{Dispatcher, Upgrade};
pub use error::{KINDS, Kind, RpcError};
pub use lock::Holder;
pub use message::MAX_BATCH;
pub use room::MAX_BATCH_ANSWER;
pub use server::{Listener, Server, ServerError};
pub use shapes::{ServiceStats, ServiceStatus, Usage};

pub use crate::http::{AddressError, HttpAddress, HttpError, HttpServer};
