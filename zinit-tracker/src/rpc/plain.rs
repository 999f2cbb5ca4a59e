//! The few commands of zinit's older line protocol that the published client `zinit-client` still sends to servers that
//! speak JSON-RPC: `log`, `log snapshot`, `shutdown` and `reboot`.

use serde_json::json;

use super::{
    dispatch::Dispatcher,
    error::RpcError,
    message::{Params, Request},
};
use crate::supervisor::{LogLine, Stream};

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Log { follow: bool },
    Shutdown,
    Reboot,
}

/// The command that a line is; JSON is none.
pub(super) fn parse(line: &[u8]) -> Option<Command> {
    match line {
        b"log" => Some(Command::Log { follow: true }),
        b"log snapshot" => Some(Command::Log { follow: false }),
        b"shutdown" => Some(Command::Shutdown),
        b"reboot" => Some(Command::Reboot),
        _ => None,
    }
}

/// Does what a command says, other than to print lines.
pub(super) async fn run(dispatcher: &Dispatcher, command: Command) -> Result<(), RpcError> {
    let method = match command {
        Command::Log { .. } => return Ok(()),
        Command::Shutdown => "system_shutdown",
        Command::Reboot => "system_reboot",
    };
    let request = Request {
        id: None,
        method: method.to_owned(),
        params: Params::Array(Vec::new()),
    };
    dispatcher.call(&request).await.map(|_| ())
}

/// The answer to a command.
pub(super) fn write(result: &Result<(), RpcError>) -> String {
    let answer = match result {
        Ok(()) => json!({"state": "ok", "body": null}),
        Err(error) => json!({"state": "error", "body": error.line()}),
    };
    format!("{answer}\n")
}

/// A line as the client reads it: level, service, text.
pub(super) fn write_line(line: &LogLine) -> String {
    let level = match line.stream {
        Stream::Out => "INFO",
        Stream::Err => "WARN",
    };
    format!("zinit: {level} ({}) {}\n", line.service, line.text)
}

/// That lines are missing here.
pub(super) fn write_lost(count: u64) -> String {
    format!("zinit: WARN (zinit) {count} lines are lost: they came faster than they were read\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_commands_themselves_are_commands() {
        assert_eq!(parse(b"log"), Some(Command::Log { follow: true }));
        assert_eq!(parse(b"shutdown"), Some(Command::Shutdown));
        for line in [&b"list"[..], b"shutdown now", b"\"shutdown\"", b"{}", b""] {
            assert_eq!(parse(line), None);
        }
    }
}
