//! What `tests/fuzz` feeds with arbitrary bytes: a function a target, which panics if something is not as it must be.
//!
//! No part of the library's interface: it is there with the feature `fuzzing` only.

pub use crate::{
    kernel::fuzzing::kernel_types,
    rpc::fuzzing::{http_request, request_lines, requests},
    supervisor::{
        config::fuzzing::{created_file, environment, service_file},
        fuzzing::state_file,
    },
    tracker::fuzzing::records,
};
