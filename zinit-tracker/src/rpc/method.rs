//! The methods: one table that requests are checked against and that the document of the interface is made from.

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{
    error::{INVALID_SIGNAL, RpcError},
    message::{Params, Request},
};
use crate::stop::signal_named;

/// A request whose method is known and whose parameters are of the right types.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Call {
    Discover,
    List,
    Status(String),
    Start(String),
    Stop { name: String, report: bool },
    Restart { name: String, report: bool },
    Monitor(String),
    Forget(String),
    Kill(String, Signal),
    Create(String, Value),
    Delete(String),
    Get(String),
    Stats(String),
    Shutdown,
    Reboot,
    Reload,
    Upgrade(Option<String>),
    Info,
    StartHttp(String),
    StopHttp,
    CurrentLogs(Option<String>),
    SubscribeLogs { filter: Option<String>, recent: bool },
    UnsubscribeLogs(Value),
}

/// What a parameter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Type {
    Text,
    Bool,
    Object,
    Any,
}

/// A parameter.
#[derive(Clone, Copy, Debug)]
pub(super) struct Param {
    pub(super) name: &'static str,
    pub(super) r#type: Type,
    pub(super) required: bool,
    pub(super) about: &'static str,
}

/// A method.
pub(super) struct Method {
    pub(super) name: &'static str,
    pub(super) about: &'static str,
    pub(super) params: &'static [Param],
    /// The name of the result and its JSON schema.
    pub(super) result: (&'static str, fn() -> Value),
    bind: fn(&mut Arguments) -> Result<Call, RpcError>,
}

const NAME: Param = Param {
    name: "name",
    r#type: Type::Text,
    required: true,
    about: "the service",
};

const REPORT: Param = Param {
    name: "report",
    r#type: Type::Bool,
    required: false,
    about: "answer with the report of the stop instead of null",
};

const FILTER: Param = Param {
    name: "filter",
    r#type: Type::Text,
    required: false,
    about: "only lines of this service",
};

fn null() -> Value {
    json!({"type": "null"})
}

fn text() -> Value {
    json!({"type": "string"})
}

fn object() -> Value {
    json!({"type": "object"})
}

fn states() -> Value {
    json!({"type": "object", "additionalProperties": text()})
}

fn lines() -> Value {
    json!({"type": "array", "items": text()})
}

fn names() -> Value {
    json!({"type": "array", "items": {"type": "string"}})
}

fn integer() -> Value {
    json!({"type": "integer", "minimum": 0})
}

fn fields(properties: Value) -> Value {
    json!({"type": "object", "properties": properties})
}

fn status() -> Value {
    fields(json!({
        "name": text(), "pid": integer(), "state": text(), "target": text(), "after": states(),
        "tracking": text(), "fallback_reason": text(),
    }))
}

fn stats() -> Value {
    let usage = json!({"pid": integer(), "memory_usage": integer(), "cpu_usage": {"type": "number"}});
    let mut service = usage.clone();
    service["name"] = text();
    service["children"] = json!({"type": "array", "items": fields(usage)});
    fields(service)
}

fn reloaded() -> Value {
    fields(json!({"added": names(), "changed": names(), "missing": names(), "failed": states()}))
}

fn info() -> Value {
    fields(json!({"pid": integer(), "version": text(), "upgrades": integer()}))
}

fn null_or_report() -> Value {
    json!({"oneOf": vec![null(), object()]})
}

/// Every method, by namespace.
pub(super) static METHODS: &[Method] = &[
    Method {
        name: "rpc.discover",
        about: "this document",
        params: &[],
        result: ("document", text),
        bind: |_| Ok(Call::Discover),
    },
    Method {
        name: "service_list",
        about: "every monitored service and its state",
        params: &[],
        result: ("states", states),
        bind: |_| Ok(Call::List),
    },
    Method {
        name: "service_status",
        about: "what a service is, is wanted to be, and waits for",
        params: &[NAME],
        result: ("status", status),
        bind: |arguments| Ok(Call::Status(arguments.text()?)),
    },
    Method {
        name: "service_start",
        about: "wants a service up; no effect if it is",
        params: &[NAME],
        result: ("nothing", null),
        bind: |arguments| Ok(Call::Start(arguments.text()?)),
    },
    Method {
        name: "service_stop",
        about: "brings a service down, and answers when nothing of it is left; with survivors that is an error",
        params: &[NAME, REPORT],
        result: ("nothing or the report", null_or_report),
        bind: |arguments| {
            Ok(Call::Stop {
                name: arguments.text()?,
                report: arguments.flag()?,
            })
        },
    },
    Method {
        name: "service_restart",
        about: "brings a service down, as service_stop does, and then up again",
        params: &[NAME, REPORT],
        result: ("nothing or the report", null_or_report),
        bind: |arguments| {
            Ok(Call::Restart {
                name: arguments.text()?,
                report: arguments.flag()?,
            })
        },
    },
    Method {
        name: "service_monitor",
        about: "reads the definition of a service, monitors it, and wants it up",
        params: &[NAME],
        result: ("nothing", null),
        bind: |arguments| Ok(Call::Monitor(arguments.text()?)),
    },
    Method {
        name: "service_forget",
        about: "monitors a service that is down no longer",
        params: &[NAME],
        result: ("nothing", null),
        bind: |arguments| Ok(Call::Forget(arguments.text()?)),
    },
    Method {
        name: "service_kill",
        about: "sends one signal to the main process of a service",
        params: &[
            NAME,
            Param {
                name: "signal",
                r#type: Type::Text,
                required: false,
                about: "name or number; SIGTERM if it is left out",
            },
        ],
        result: ("nothing", null),
        bind: |arguments| {
            let name = arguments.text()?;
            let signal = signal(
                &name,
                &arguments.optional_text()?.unwrap_or_else(|| "SIGTERM".to_owned()),
            )?;
            Ok(Call::Kill(name, signal))
        },
    },
    Method {
        name: "service_create",
        about: "writes the definition of a service, which is not monitored for that",
        params: &[
            NAME,
            Param {
                name: "content",
                r#type: Type::Object,
                required: true,
                about: "the fields of a service file",
            },
        ],
        result: ("message", text),
        bind: |arguments| Ok(Call::Create(arguments.text()?, arguments.value()?)),
    },
    Method {
        name: "service_delete",
        about: "removes the definition of a service, which stays monitored if it is",
        params: &[NAME],
        result: ("message", text),
        bind: |arguments| Ok(Call::Delete(arguments.text()?)),
    },
    Method {
        name: "service_get",
        about: "the fields of the definition of a service",
        params: &[NAME],
        result: ("fields", object),
        bind: |arguments| Ok(Call::Get(arguments.text()?)),
    },
    Method {
        name: "service_stats",
        about: "what the main process of a service and all its others use: memory in bytes, processor time in percent of one processor",
        params: &[NAME],
        result: ("usage", stats),
        bind: |arguments| Ok(Call::Stats(arguments.text()?)),
    },
    Method {
        name: "system_shutdown",
        about: "stops every service and powers off, or ends in container mode; answers when the services are down",
        params: &[],
        result: ("nothing", null),
        bind: |_| Ok(Call::Shutdown),
    },
    Method {
        name: "system_reboot",
        about: "stops every service and restarts the machine, or ends in container mode; answers when the services are down",
        params: &[],
        result: ("nothing", null),
        bind: |_| Ok(Call::Reboot),
    },
    Method {
        name: "system_reload",
        about: "reads every definition again, monitors new services and takes over what has changed",
        params: &[],
        result: ("changes", reloaded),
        bind: |_| Ok(Call::Reload),
    },
    Method {
        name: "system_upgrade",
        about: "lets another program take the supervisor's place in the same process; answers before that with what it calls itself",
        params: &[Param {
            name: "binary",
            r#type: Type::Text,
            required: false,
            about: "the absolute path of the program; if it is left out, what is now where the supervisor's was",
        }],
        result: ("version", text),
        bind: |arguments| Ok(Call::Upgrade(arguments.optional_text()?)),
    },
    Method {
        name: "system_info",
        about: "the supervisor's pid and version, and how often it has been upgraded since it was started",
        params: &[],
        result: ("info", info),
        bind: |_| Ok(Call::Info),
    },
    Method {
        name: "system_start_http_server",
        about: "answers JSON-RPC over HTTP POST too",
        params: &[Param {
            name: "address",
            r#type: Type::Text,
            required: true,
            about: "address and port; without an address, the loopback one",
        }],
        result: ("message", text),
        bind: |arguments| Ok(Call::StartHttp(arguments.text()?)),
    },
    Method {
        name: "system_stop_http_server",
        about: "ends what system_start_http_server started",
        params: &[],
        result: ("nothing", null),
        bind: |_| Ok(Call::StopHttp),
    },
    Method {
        name: "stream_currentLogs",
        about: "the newest lines of one service or of all",
        params: &[Param { name: "name", ..FILTER }],
        result: ("lines", lines),
        bind: |arguments| Ok(Call::CurrentLogs(arguments.optional_text()?)),
    },
    Method {
        name: "stream_subscribeLogs",
        about: "sends lines as they come, as notifications of the same name with params {subscription, result}",
        params: &[
            FILTER,
            Param {
                name: "recent",
                r#type: Type::Bool,
                required: false,
                about: "begin with the newest lines that are there already",
            },
        ],
        result: ("subscription", integer),
        bind: |arguments| {
            Ok(Call::SubscribeLogs {
                filter: arguments.optional_text()?,
                recent: arguments.flag()?,
            })
        },
    },
    Method {
        name: "stream_unsubscribeLogs",
        about: "ends a subscription of the same connection; false: there is none",
        params: &[Param {
            name: "subscription",
            r#type: Type::Any,
            required: true,
            about: "what stream_subscribeLogs answered",
        }],
        result: ("whether there was one", || json!({"type": "boolean"})),
        bind: |arguments| Ok(Call::UnsubscribeLogs(arguments.value()?)),
    },
];

fn signal(service: &str, text: &str) -> Result<Signal, RpcError> {
    let short: String = text.chars().take(100).collect();
    let message = format!("{short:?} is no signal");
    signal_named(text)
        .ok_or_else(|| RpcError::of_kind(INVALID_SIGNAL, "sending signal", Some(service), &message, Vec::new()))
}

/// Finds the method of a request and checks its parameters.
pub(super) fn bind(request: &Request) -> Result<Call, RpcError> {
    let Some(method) = METHODS.iter().find(|method| method.name == request.method) else {
        return Err(RpcError::method_not_found(&request.method));
    };
    (method.bind)(&mut Arguments::new(method.params, &request.params)?)
}

/// The parameters of a request in the order of the method's, taken one after the other.
struct Arguments<'a> {
    params: std::slice::Iter<'static, Param>,
    values: std::vec::IntoIter<Option<&'a Value>>,
}

impl<'a> Arguments<'a> {
    fn new(params: &'static [Param], given: &'a Params) -> Result<Self, RpcError> {
        let values: Vec<_> = match given {
            Params::Array(given) if given.len() > params.len() => {
                let most = params.len();
                return Err(RpcError::invalid_params(format!(
                    "too many parameters: there are at most {most}"
                )));
            }
            Params::Array(given) => (0..params.len()).map(|index| given.get(index)).collect(),
            Params::Object(given) => {
                if let Some(name) = given
                    .keys()
                    .find(|name| params.iter().all(|param| param.name != **name))
                {
                    let known: Vec<_> = params.iter().map(|param| param.name).collect();
                    let name: String = name.chars().take(100).collect();
                    let message = format!("there is no parameter {name:?}, there is: {}", known.join(", "));
                    return Err(RpcError::invalid_params(message));
                }
                params.iter().map(|param| given.get(param.name)).collect()
            }
        };
        let mut arguments = Self {
            params: params.iter(),
            values: values.into_iter(),
        };
        arguments.check(params)?;
        Ok(arguments)
    }

    /// Refuses values of other types, and the lack of those that are required.
    fn check(&mut self, params: &[Param]) -> Result<(), RpcError> {
        for (param, value) in params.iter().zip(self.values.as_slice()) {
            let fits = match (value, param.r#type) {
                (None | Some(Value::Null), _) => !param.required,
                (Some(value), Type::Text) => value.is_string(),
                (Some(value), Type::Bool) => value.is_boolean(),
                (Some(value), Type::Object) => value.is_object(),
                (Some(_), Type::Any) => true,
            };
            if !fits {
                let expected = match param.r#type {
                    Type::Text => "text",
                    Type::Bool => "true or false",
                    Type::Object => "an object",
                    Type::Any => "a value",
                };
                let message = format!("parameter {} is {expected}: {}", param.name, param.about);
                return Err(RpcError::invalid_params(message));
            }
        }
        Ok(())
    }

    /// The next parameter, which has been checked; a missing one is null.
    fn value(&mut self) -> Result<Value, RpcError> {
        match (self.params.next(), self.values.next()) {
            (Some(_), Some(value)) => Ok(value.cloned().unwrap_or(Value::Null)),
            _ => Err(RpcError::busy(
                "the method takes a parameter that the table does not have",
            )),
        }
    }

    fn optional_text(&mut self) -> Result<Option<String>, RpcError> {
        Ok(self.value()?.as_str().map(ToOwned::to_owned))
    }

    fn text(&mut self) -> Result<String, RpcError> {
        Ok(self.optional_text()?.unwrap_or_default())
    }

    fn flag(&mut self) -> Result<bool, RpcError> {
        Ok(self.value()?.as_bool().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: &str, params: Value) -> Result<Call, RpcError> {
        let params = match params {
            Value::Array(values) => Params::Array(values),
            Value::Object(values) => Params::Object(values),
            _ => panic!("params are structured"),
        };
        bind(&Request {
            id: None,
            method: method.to_owned(),
            params,
        })
    }

    #[test]
    fn parameters_come_by_position_or_by_name() {
        for params in [json!(["web", "SIGHUP"]), json!({"signal": "hup", "name": "web"})] {
            let call = request("service_kill", params).unwrap();
            assert_eq!(call, Call::Kill("web".to_owned(), Signal::SIGHUP));
        }
        let call = request("service_kill", json!(["web"])).unwrap();
        assert_eq!(call, Call::Kill("web".to_owned(), Signal::SIGTERM));
        for params in [json!([]), json!([null]), json!({}), json!({"name": null})] {
            assert_eq!(request("stream_currentLogs", params).unwrap(), Call::CurrentLogs(None));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_parameters_name() {
        for (method, params, code, text) in [
            ("service_nope", json!([]), -32601, "service_nope"),
            ("service_start", json!([]), -32602, "parameter name is text"),
            ("service_start", json!([1]), -32602, "parameter name is text"),
            ("service_start", json!([null]), -32602, "parameter name is text"),
            ("service_start", json!(["a", "b"]), -32602, "too many"),
            (
                "service_start",
                json!({"nam": "a"}),
                -32602,
                "no parameter \"nam\", there is: name",
            ),
            (
                "service_stop",
                json!(["a", "yes"]),
                -32602,
                "parameter report is true or false",
            ),
            (
                "service_create",
                json!(["a", "exec: b"]),
                -32602,
                "parameter content is an object",
            ),
            ("service_kill", json!(["a", "SIGNOPE"]), -32004, "SIGNOPE"),
            (
                "stream_unsubscribeLogs",
                json!([]),
                -32602,
                "parameter subscription is a value",
            ),
        ] {
            let error = request(method, params).unwrap_err();
            assert_eq!(error.code, code, "{error:?}");
            assert!(error.message.contains(text), "{error:?}");
        }
    }

    #[test]
    fn every_method_takes_exactly_the_parameters_of_the_table() {
        for method in METHODS {
            let values = method.params.iter().map(|param| match (param.name, param.r#type) {
                ("signal", _) => json!("SIGTERM"),
                (_, Type::Text | Type::Any) => json!("x"),
                (_, Type::Bool) => json!(true),
                (_, Type::Object) => json!({}),
            });
            let params = Params::Array(values.collect());
            let mut arguments = Arguments::new(method.params, &params).unwrap();
            (method.bind)(&mut arguments).unwrap();
            assert_eq!(arguments.params.len(), 0, "{} leaves a parameter", method.name);
            // Optional ones come last, or they could not be left out.
            assert!(
                method.params.is_sorted_by_key(|param| !param.required),
                "{}",
                method.name
            );
        }
    }
}
