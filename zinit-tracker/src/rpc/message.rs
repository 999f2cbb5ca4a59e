//! JSON-RPC 2.0 messages: what is a request, a batch, a notification, an answer.
//!
//! Pure: no sockets, and no knowledge of methods.

use serde::{Deserialize, Serialize, Serializer, ser::SerializeStruct as _};
use serde_json::{Map, Value, json};

use super::error::RpcError;

/// Requests that one batch may have.
pub const MAX_BATCH: usize = 100;

/// What names a request in its answer: text, a number or null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(super) enum Id {
    /// A number.
    Number(serde_json::Number),
    /// Text.
    Text(String),
    /// `null`: given as that, or not known.
    Null,
}

/// The parameters of a request.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Params {
    /// By position; empty if the request has none.
    Array(Vec<Value>),
    /// By name.
    Object(Map<String, Value>),
}

/// A request that is well formed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Request {
    /// Where its answer goes; `None`: a notification, which gets none.
    pub(super) id: Option<Id>,
    /// What is to be done.
    pub(super) method: String,
    /// With what.
    pub(super) params: Params,
}

/// One entry of a message: a request, or the answer to what is none.
pub(super) type Entry = Result<Request, Answer>;

/// What a client sends in one message.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Message {
    /// One request.
    Single(Entry),
    /// Several, whose answers go together. Never empty.
    Batch(Vec<Entry>),
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Answer {
    /// The request's.
    pub(super) id: Id,
    /// What came of it.
    pub(super) outcome: Result<Value, RpcError>,
}

impl Answer {
    /// The answer to something that is no request, or whose id is not known.
    pub(super) fn to_nobody(error: RpcError) -> Self {
        Self {
            id: Id::Null,
            outcome: Err(error),
        }
    }

    /// The answer as JSON, compact, as clients look for it.
    pub(super) fn to_json(&self) -> String {
        to_json(self)
    }
}

/// Compact JSON. Messages have no maps with keys other than text, so this does not fail.
pub(super) fn to_json<T: Serialize + ?Sized>(message: &T) -> String {
    serde_json::to_string(message).unwrap_or_default()
}

impl Serialize for Answer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Answer", 3)?;
        fields.serialize_field("jsonrpc", "2.0")?;
        fields.serialize_field("id", &self.id)?;
        match &self.outcome {
            Ok(result) => fields.serialize_field("result", result)?,
            Err(error) => fields.serialize_field("error", error)?,
        }
        fields.end()
    }
}

impl Message {
    /// Reads a message. What is wrong with it is part of it, as the answer to be given.
    pub(super) fn parse(text: &[u8]) -> Self {
        match serde_json::from_slice(text) {
            Ok(Value::Array(entries)) if entries.is_empty() => {
                Self::refused(RpcError::invalid_request("a batch has at least one request"))
            }
            Ok(Value::Array(entries)) if entries.len() > MAX_BATCH => {
                Self::refused(RpcError::invalid_request("a batch has at most 100 requests"))
            }
            Ok(Value::Array(entries)) => Self::Batch(entries.into_iter().map(Request::parse).collect()),
            Ok(value) => Self::Single(Request::parse(value)),
            Err(error) => Self::refused(RpcError::parse_error(&error)),
        }
    }

    fn refused(error: RpcError) -> Self {
        Self::Single(Err(Answer::to_nobody(error)))
    }
}

impl Request {
    fn parse(value: Value) -> Entry {
        let refused = |id: Option<Id>, message| {
            Err(Answer {
                id: id.unwrap_or(Id::Null),
                outcome: Err(RpcError::invalid_request(message)),
            })
        };
        let Value::Object(mut fields) = value else {
            return refused(None, "a request is an object");
        };
        let id = match fields.remove("id") {
            None => None,
            Some(Value::Null) => Some(Id::Null),
            Some(Value::String(text)) => Some(Id::Text(text)),
            Some(Value::Number(number)) => Some(Id::Number(number)),
            Some(_) => return refused(None, "an id is text, a number or null"),
        };
        if fields.get("jsonrpc") != Some(&json!("2.0")) {
            return refused(id, r#"a request has "jsonrpc":"2.0""#);
        }
        let Some(Value::String(method)) = fields.remove("method") else {
            return refused(id, "a request names its method");
        };
        let params = match fields.remove("params") {
            None | Some(Value::Null) => Params::Array(Vec::new()),
            Some(Value::Array(values)) => Params::Array(values),
            Some(Value::Object(values)) => Params::Object(values),
            Some(_) => return refused(id, "params are an array or an object"),
        };
        Ok(Self { id, method, params })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn single(text: &str) -> Entry {
        match Message::parse(text.as_bytes()) {
            Message::Single(entry) => entry,
            Message::Batch(_) => panic!("{text} is one request"),
        }
    }

    fn refusal(text: &str) -> String {
        single(text).expect_err(text).to_json()
    }

    #[test]
    fn requests_have_an_id_and_notifications_have_none() {
        for (id, expected) in [
            (r#""id":1,"#, Some(Id::Number(1.into()))),
            (r#""id":"a","#, Some(Id::Text("a".to_owned()))),
            (r#""id":null,"#, Some(Id::Null)),
            ("", None),
        ] {
            let request = single(&format!(r#"{{"jsonrpc":"2.0",{id}"method":"m"}}"#)).unwrap();
            assert_eq!(request.id, expected);
            assert_eq!(request.params, Params::Array(Vec::new()));
        }
    }

    #[test]
    fn an_id_is_the_same_each_time_it_is_passed_on() {
        let id = |text: &str| {
            single(&format!(r#"{{"jsonrpc":"2.0","id":{text},"method":"m"}}"#))
                .unwrap()
                .id
        };
        for text in [
            "184467440718547758080",
            "1.7976931348623157e308",
            "0.1",
            "-0.0",
            "18446744073709551615",
        ] {
            let first = id(text);
            assert_eq!(id(&json!(first).to_string()), first, "{text}");
        }
    }

    #[test]
    fn what_is_no_request_is_refused_with_the_id_if_that_is_known() {
        for (text, code, id) in [
            ("{", -32700, "null"),
            ("\u{0}", -32700, "null"),
            ("{}{}", -32700, "null"),
            ("[]", -32600, "null"),
            ("1", -32600, "null"),
            ("\"shutdown\"", -32600, "null"),
            (r#"{"id":7}"#, -32600, "7"),
            (r#"{"jsonrpc":"1.0","id":7,"method":"m"}"#, -32600, "7"),
            (r#"{"jsonrpc":"2.0","id":7}"#, -32600, "7"),
            (r#"{"jsonrpc":"2.0","id":7,"method":1}"#, -32600, "7"),
            (r#"{"jsonrpc":"2.0","id":[],"method":"m"}"#, -32600, "null"),
            (r#"{"jsonrpc":"2.0","id":7,"method":"m","params":"x"}"#, -32600, "7"),
        ] {
            let answer = refusal(text);
            assert!(answer.contains(&format!(r#""code":{code},"#)), "{text}: {answer}");
            assert!(answer.contains(&format!(r#""id":{id},"#)), "{text}: {answer}");
            assert!(answer.contains(r#""jsonrpc":"2.0""#), "{text}: {answer}");
        }
        refusal(&"[".repeat(100_000));
        refusal(&format!("[{}1]", "1,".repeat(MAX_BATCH)));
    }

    #[test]
    fn a_batch_keeps_its_order_and_what_is_wrong_with_its_entries() {
        let Message::Batch(entries) =
            Message::parse(br#"[{"jsonrpc":"2.0","id":1,"method":"a"},1,{"jsonrpc":"2.0","method":"b"}]"#)
        else {
            panic!("it is a batch");
        };
        assert_eq!(entries[0].as_ref().unwrap().method, "a");
        assert!(entries[1].is_err());
        assert_eq!(entries[2].as_ref().unwrap().id, None);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::arbitrary::any::<u8>(), 0..200)) {
            drop(Message::parse(&bytes));
        }
    }
}
