//! YAML to the byte as zinit prints it, which scripts may rely on: with `---`, and strings quoted where it quotes them.
//!
//! Its library is archived, and current ones quote and indent differently.

use std::collections::BTreeMap;

use zinit_tracker::rpc::{ServiceStats, ServiceStatus};

/// Services and their states.
pub(super) fn states(states: &BTreeMap<String, String>) -> String {
    if states.is_empty() {
        return "---\n{}\n".to_owned();
    }
    let lines: String = states.iter().map(|(name, state)| entry("", name, state)).collect();
    format!("---\n{lines}")
}

/// A service.
pub(super) fn status(status: &ServiceStatus) -> String {
    let mut text = format!("---\nname: {}\npid: {}\n", scalar(&status.name), status.pid);
    text.push_str(&entry("", "state", &status.state));
    text.push_str(&entry("", "target", &status.target));
    if status.after.is_empty() {
        text.push_str("after: {}\n");
    } else {
        text.push_str("after:\n");
        text.extend(status.after.iter().map(|(name, state)| entry("  ", name, state)));
    }
    text.push_str(&entry("", "tracking", &status.tracking.to_string()));
    if let Some(reason) = &status.fallback_reason {
        text.push_str(&entry("", "fallback_reason", reason));
    }
    text
}

/// What a service uses.
pub(super) fn stats(stats: &ServiceStats) -> String {
    let mut text = format!(
        "---\nname: {}\npid: {}\nmemory_usage: {}\ncpu_usage: {:?}\n",
        scalar(&stats.name),
        stats.pid,
        stats.memory_usage,
        stats.cpu_usage
    );
    if stats.children.is_empty() {
        text.push_str("children: []\n");
        return text;
    }
    text.push_str("children:\n");
    for child in &stats.children {
        text.push_str(&format!(
            "  - pid: {}\n    memory_usage: {}\n    cpu_usage: {:?}\n",
            child.pid, child.memory_usage, child.cpu_usage
        ));
    }
    text
}

fn entry(indent: &str, key: &str, value: &str) -> String {
    format!("{indent}{}: {}\n", scalar(key), scalar(value))
}

fn scalar(text: &str) -> String {
    if is_plain(text) {
        return text.to_owned();
    }
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_ascii_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Whether the text is written as it is: it could be taken for nothing but text.
fn is_plain(text: &str) -> bool {
    const WORDS: [&str; 22] = [
        "yes", "Yes", "YES", "no", "No", "NO", "True", "TRUE", "true", "False", "FALSE", "false", "on", "On", "ON",
        "off", "Off", "OFF", "null", "Null", "NULL", "~",
    ];
    let special = |c: char| {
        matches!(c, ':' | '{' | '}' | '[' | ']' | ',' | '#' | '`' | '"' | '\'' | '\\') || c.is_ascii_control()
    };
    !text.is_empty()
        && !text.starts_with([' ', '&', '*', '?', '|', '-', '<', '>', '=', '!', '%', '@', '.'])
        && !text.starts_with("0x")
        && !text.ends_with(' ')
        && !text.contains(special)
        && !WORDS.contains(&text)
        && text.parse::<i64>().is_err()
        && text.parse::<f64>().is_err()
}

#[cfg(test)]
mod tests {
    use zinit_tracker::{Tracking, rpc::Usage};

    use super::*;

    /// What serde_yaml 0.8.26, which zinit 0.2 prints with, makes of these strings.
    #[test]
    fn strings_are_quoted_where_zinit_quotes_them() {
        for text in ["Running", "a b", "1_000", "é", "n", "Error", "web-1", "a-b_c", "(x)"] {
            assert_eq!(scalar(text), text);
        }
        for text in [
            " lead",
            "!x",
            "%x",
            "*a",
            "+1",
            "-x",
            ".5",
            "0x1f",
            "1",
            "1.5",
            "1e3",
            "<<",
            "=",
            "@x",
            "[x",
            "a#b",
            "a'b",
            "a,b",
            "a:b",
            "",
            "null",
            "on",
            "trail ",
            "true",
            "yes",
            "~",
            "123",
            "a: b",
            "Error(Exited(Pid(12), 1))",
        ] {
            assert_eq!(scalar(text), format!("\"{text}\""));
        }
        assert_eq!(scalar("a\"b"), "\"a\\\"b\"");
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(name, state)| ((*name).to_owned(), (*state).to_owned()))
            .collect()
    }

    #[test]
    fn documents_look_like_zinits() {
        assert_eq!(states(&map(&[])), "---\n{}\n");
        assert_eq!(
            states(&map(&[("web", "Running"), ("1", "Blocked")])),
            "---\n\"1\": Blocked\nweb: Running\n"
        );
        let mut shown = ServiceStatus {
            name: "web".to_owned(),
            pid: 12,
            state: "Running".to_owned(),
            target: "Up".to_owned(),
            after: map(&[]),
            tracking: Tracking::Ebpf,
            fallback_reason: None,
        };
        assert_eq!(
            status(&shown),
            "---\nname: web\npid: 12\nstate: Running\ntarget: Up\nafter: {}\ntracking: ebpf\n"
        );
        shown.after = map(&[("db", "Success")]);
        shown.tracking = Tracking::Procfs;
        shown.fallback_reason = Some("it was asked for".to_owned());
        assert!(
            status(&shown).ends_with("\nafter:\n  db: Success\ntracking: procfs\nfallback_reason: it was asked for\n")
        );
        let mut used = ServiceStats {
            name: "web".to_owned(),
            pid: 12,
            memory_usage: 4096,
            cpu_usage: 0.0,
            children: Vec::new(),
        };
        assert_eq!(
            stats(&used),
            "---\nname: web\npid: 12\nmemory_usage: 4096\ncpu_usage: 0.0\nchildren: []\n"
        );
        used.children.push(Usage {
            pid: 13,
            memory_usage: 1,
            cpu_usage: 12.345,
        });
        assert!(stats(&used).ends_with("children:\n  - pid: 13\n    memory_usage: 1\n    cpu_usage: 12.345\n"));
    }
}
