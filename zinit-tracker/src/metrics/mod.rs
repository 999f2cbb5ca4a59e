//! Metrics: what the kernel's books say now, in the text format of OpenMetrics 1.0, printed or served.
//!
//! Reads and counts nothing by itself: there is no daemon, and what the books do not keep has no metric. So there is none of how long stops
//! took and of what survived them: only the report of a stop says that.

mod accept;
mod reading;
mod server;
mod text;

pub use accept::Format;
pub use reading::Reading;
