//! The document of the interface (OpenRPC), made from the table of methods.

use serde_json::{Value, json};

use super::{
    error::KINDS,
    method::{METHODS, Method, Param, Type},
};

/// The OpenRPC document.
pub(super) fn document() -> Value {
    let errors: Vec<_> = KINDS
        .iter()
        .map(|kind| json!({"code": kind.code, "message": kind.name, "data": {"hint": kind.hint}}))
        .collect();
    let methods: Vec<_> = METHODS.iter().map(|method| describe(method, &errors)).collect();
    json!({
        "openrpc": "1.2.6",
        "info": {
            "title": "zinit",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Controls the services of the zinit supervisor. One JSON object a line over the Unix socket, or one a request over HTTP. A request has at most 1 MiB, a batch 100 requests, and their answers 32 MiB together: what has no room in it is an error (-32603) that says whether it was done.",
            "license": {"name": "Apache-2.0"},
        },
        "methods": methods,
    })
}

fn describe(method: &Method, errors: &[Value]) -> Value {
    let params: Vec<_> = method.params.iter().map(describe_param).collect();
    let (name, schema) = method.result;
    json!({
        "name": method.name,
        "summary": method.about,
        "paramStructure": "either",
        "params": params,
        "result": {"name": name, "schema": schema()},
        "errors": errors,
    })
}

fn describe_param(param: &Param) -> Value {
    let schema = match param.r#type {
        Type::Text => json!({"type": "string"}),
        Type::Bool => json!({"type": "boolean"}),
        Type::Object => json!({"type": "object"}),
        Type::Any => json!({}),
    };
    json!({"name": param.name, "summary": param.about, "required": param.required, "schema": schema})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_every_method_of_the_interface() {
        let document = document();
        let methods = document["methods"].as_array().unwrap();
        let names: Vec<_> = methods.iter().map(|method| method["name"].as_str().unwrap()).collect();
        for name in [
            "rpc.discover",
            "service_list",
            "service_status",
            "service_start",
            "service_stop",
            "service_monitor",
            "service_forget",
            "service_kill",
            "service_create",
            "service_delete",
            "service_get",
            "service_stats",
            "system_shutdown",
            "system_reboot",
            "system_start_http_server",
            "system_stop_http_server",
            "stream_currentLogs",
            "stream_subscribeLogs",
            "stream_unsubscribeLogs",
        ] {
            assert!(names.contains(&name), "{name}");
        }
        for method in methods {
            assert!(method["result"]["schema"].is_object(), "{method}");
            assert!(!method["summary"].as_str().unwrap().is_empty());
        }
    }
}
