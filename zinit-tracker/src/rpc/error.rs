//! Errors as clients see them: zinit's codes, and what helps to act on them.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{stop::StopReport, supervisor::SupervisorError};

/// The error of a JSON-RPC answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RpcError {
    /// What kind of error it is.
    pub code: i64,
    /// One line for people.
    pub message: String,
    /// Details: `code_name`, `service`, `action`, `retryable`, `cause_chain`, `hint`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
}

/// A kind of error that has to do with services: its code, its name, and what to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// The code.
    pub code: i64,
    /// The name of the code.
    pub name: &'static str,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// What to do about it.
    pub hint: &'static str,
}

macro_rules! kinds {
    ($($constant:ident = $code:literal, $name:literal, $retryable:literal, $hint:literal;)*) => {
        $(
            #[doc = concat!("`", $name, "`.")]
            pub(super) const $constant: Kind = Kind { code: $code, name: $name, retryable: $retryable, hint: $hint };
        )*
        /// Every kind, for the document of the interface.
        pub const KINDS: &[Kind] = &[$($constant),*];
    };
}

// -32009 to -32011 are zinit's names for errors that it never gives; so ours begin behind them.
kinds! {
    SERVICE_NOT_FOUND = -32000, "ServiceNotFound", false, "check the name: service_list has those that are monitored, service_monitor adds one";
    SERVICE_ALREADY_MONITORED = -32001, "ServiceAlreadyMonitored", true, "start or stop it, or service_forget it first";
    SERVICE_IS_UP = -32002, "ServiceIsUp", false, "stop it first";
    SERVICE_IS_DOWN = -32003, "ServiceIsDown", true, "start it first";
    INVALID_SIGNAL = -32004, "InvalidSignal", false, "name a signal, such as SIGTERM";
    CONFIG_ERROR = -32005, "ConfigError", false, "correct the definition: cause_chain says where it is wrong";
    SHUTTING_DOWN = -32006, "ShuttingDown", false, "wait until the supervisor has ended";
    SERVICE_ALREADY_EXISTS = -32007, "ServiceAlreadyExists", false, "choose another name, or service_delete the definition first";
    SERVICE_FILE_ERROR = -32008, "ServiceFileError", false, "check the configuration directory: permissions, space, what is in it";
    SERVICE_SURVIVORS = -32012, "ServiceSurvivors", true, "look at why these processes cannot die (report has the details), then stop the service again";
    INVALID_SERVICE_NAME = -32602, "InvalidServiceName", false, "a name has at most 64 bytes, and no slash, backslash, dot or control character";
    INTERNAL_ERROR = -32603, "InternalError", false, "see cause_chain and the supervisor's messages";
}

impl RpcError {
    fn plain(code: i64, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            data: None,
        }
    }

    /// What came is no JSON.
    pub(super) fn parse_error(error: &serde_json::Error) -> Self {
        Self::plain(-32700, format!("this is no JSON: {error}"))
    }

    /// What came is JSON, but no request.
    pub(super) fn invalid_request(message: &str) -> Self {
        Self::plain(-32600, message)
    }

    /// There is no such method.
    pub(super) fn method_not_found(method: &str) -> Self {
        // The name is the client's, and may be long.
        let method: String = method.chars().take(100).collect();
        Self::plain(
            -32601,
            format!("there is no method {method:?}: rpc.discover lists them"),
        )
    }

    /// The method takes other parameters.
    pub(super) fn invalid_params(message: impl Into<String>) -> Self {
        Self::plain(-32602, message)
    }

    /// The server has no room.
    pub(super) fn busy(message: &str) -> Self {
        Self::plain(-32603, message)
    }

    /// An error of a kind, met while doing something.
    pub(super) fn of_kind(kind: Kind, action: &str, service: Option<&str>, message: &str, causes: Vec<String>) -> Self {
        let causes = if causes.is_empty() { Value::Null } else { json!(causes) };
        Self {
            code: kind.code,
            message: format!("{action}: {message}"),
            data: Some(json!({
                "code_name": kind.name,
                "service": service,
                "action": action,
                "retryable": kind.retryable,
                "cause_chain": causes,
                "hint": kind.hint,
            })),
        }
    }

    /// A supervisor's error, met while doing something.
    pub(super) fn of_supervisor(error: &SupervisorError, action: &str) -> Self {
        let (kind, service) = kind(error);
        let mut answer = Self::of_kind(kind, action, service, &error.to_string(), causes(error));
        if let (SupervisorError::Survivors(report), Some(data)) = (error, &mut answer.data) {
            data["report"] = report_value(report);
        }
        answer
    }

    /// The message and its causes in one line, for people.
    #[must_use]
    pub fn line(&self) -> String {
        let causes = self.data.as_ref().and_then(|data| data["cause_chain"].as_array());
        let causes = causes.into_iter().flatten().filter_map(Value::as_str);
        let mut line = self.message.clone();
        for cause in causes {
            line.push_str(": ");
            line.push_str(cause);
        }
        line
    }
}

/// A report as JSON. It has no maps with keys other than text, so this cannot fail.
pub(super) fn report_value(report: &StopReport) -> Value {
    serde_json::to_value(report).unwrap_or(Value::Null)
}

/// What kind an error is of, and the service it is about.
fn kind(error: &SupervisorError) -> (Kind, Option<&str>) {
    match error {
        SupervisorError::ServiceNotFound { service } => (SERVICE_NOT_FOUND, Some(service)),
        SupervisorError::ServiceAlreadyMonitored { service } => (SERVICE_ALREADY_MONITORED, Some(service)),
        SupervisorError::ServiceIsUp { service } => (SERVICE_IS_UP, Some(service)),
        SupervisorError::ServiceIsDown { service } => (SERVICE_IS_DOWN, Some(service)),
        SupervisorError::InvalidSignal { service, .. } => (INVALID_SIGNAL, Some(service)),
        SupervisorError::BadName { service, .. } => (INVALID_SERVICE_NAME, Some(service)),
        SupervisorError::Config { service, .. } => (CONFIG_ERROR, Some(service)),
        SupervisorError::ShuttingDown { service } => (SHUTTING_DOWN, service.as_deref()),
        SupervisorError::ServiceAlreadyExists { service } => (SERVICE_ALREADY_EXISTS, Some(service)),
        SupervisorError::ServiceFile { service, .. } => (SERVICE_FILE_ERROR, Some(service)),
        SupervisorError::Survivors(report) => (SERVICE_SURVIVORS, Some(&report.service)),
        SupervisorError::Failed { service } => (INTERNAL_ERROR, service.as_deref()),
        SupervisorError::Stop { service, .. }
        | SupervisorError::Signal { service, .. }
        | SupervisorError::Tracker { service, .. } => (INTERNAL_ERROR, Some(service)),
    }
}

/// The causes of an error, nearest first.
pub(super) fn causes(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(error.source(), |error| error.source())
        .map(ToString::to_string)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_says_what_why_and_what_to_do() {
        let error = SupervisorError::ServiceFile {
            service: "web".to_owned(),
            source: "disk full".into(),
        };
        let answer = RpcError::of_supervisor(&error, "creating service");
        assert_eq!(answer.code, -32008);
        let data = answer.data.as_ref().unwrap();
        assert_eq!(data["code_name"], "ServiceFileError");
        assert_eq!(data["service"], "web");
        assert_eq!(data["action"], "creating service");
        assert_eq!(data["retryable"], false);
        assert_eq!(data["cause_chain"], json!(["disk full"]));
        assert!(!data["hint"].as_str().unwrap().is_empty());
        assert_eq!(
            answer.line(),
            r#"creating service: failed to use the file of service "web": disk full"#
        );
    }

    #[test]
    fn an_error_without_a_cause_has_no_chain() {
        let error = SupervisorError::ServiceNotFound {
            service: "web".to_owned(),
        };
        let answer = RpcError::of_supervisor(&error, "getting status");
        assert_eq!(answer.data.as_ref().unwrap()["cause_chain"], Value::Null);
    }

    #[test]
    fn codes_are_not_shared() {
        for (index, kind) in KINDS.iter().enumerate() {
            assert!(KINDS[..index].iter().all(|other| other.code != kind.code), "{kind:?}");
        }
    }
}
