//! Fuzzing: service files, as people and clients write them, and `/etc/environment`.

use std::path::Path;

use super::{
    Complaint, ServiceDirectory,
    document::{parse, parse_value},
    environment,
};
use crate::supervisor::Definition;

/// Reads the text as a service file. What is wrong must be somewhere in the file, and what is good must outlive the
/// supervisor, and can be shown.
pub fn service_file(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else {
        return;
    };
    if let Err(complaint) = parse_value(text) {
        check(&complaint, text);
    }
    match parse(text, Path::new("/etc/zinit")) {
        Err(complaint) => check(&complaint, text),
        Ok(document) => {
            for complaint in &document.warnings {
                check(complaint, text);
            }
            let saved = serde_json::to_string(&document.definition).expect("a definition can be written");
            let read: Definition = serde_json::from_str(&saved).expect("what was written can be read");
            assert_eq!(read, document.definition);
            // Fields that nobody knows may have what JSON has not, such as lists as keys.
            if document.warnings.is_empty() {
                parse_value(text).expect("a file that can be loaded can be shown");
            }
        }
    }
}

/// Reads the bytes as the fields that a client gives. If they are taken, the file must have exactly these.
pub fn created_file(data: &[u8]) {
    let Ok(fields) = serde_json::from_slice(data) else {
        return;
    };
    if let Ok(text) = ServiceDirectory::expect(Path::new("/etc/zinit")).text_of("service", &fields) {
        let read = parse_value(&text).expect("what was written can be shown");
        assert_eq!(read, fields, "{text}");
    }
}

/// Reads the text as `/etc/environment`.
pub fn environment(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    for (name, value) in environment::parse(&text) {
        assert!(!name.is_empty() && !name.contains(['=', '\0', '\n']), "{name:?}");
        assert!(!value.contains(['\0', '\n']), "{value:?}");
    }
}

fn check(complaint: &Complaint, text: &str) {
    let shown = complaint.to_string();
    assert!(!shown.contains(char::is_control), "{shown:?}");
    if complaint.line == 0 {
        return;
    }
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let lines: Vec<_> = text.split('\n').collect();
    let line = usize::try_from(complaint.line).expect("lines fit") - 1;
    let length = lines.get(line).map(|line| line.chars().count());
    let column = usize::try_from(complaint.column).expect("columns fit");
    assert!(
        length.is_some_and(|length| (1..=length + 1).contains(&column)),
        "{shown:?}"
    );
}
