//! What can be the name of a service.

use super::super::SupervisorError;

/// The longest name in bytes.
pub const MAX_NAME: usize = 64;

/// Checks a service's name, which becomes the stem of a file's name and part of log lines.
///
/// # Errors
///
/// [`SupervisorError::BadName`] with what is wrong.
pub fn check_name(name: &str) -> Result<(), SupervisorError> {
    match fault(name) {
        None => Ok(()),
        Some(reason) => Err(SupervisorError::BadName {
            service: name.to_owned(),
            reason,
        }),
    }
}

/// What is wrong with a name.
pub(super) fn fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("it is empty")
    } else if name.len() > MAX_NAME {
        Some("it is longer than 64 bytes")
    } else if name.contains(['/', '\\', '.']) {
        Some("it has a slash, a backslash or a dot")
    } else if name.contains(char::is_control) {
        Some("it has a control character")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_file_name_stems_without_surprises() {
        for good in ["web", "web-1", "a b", "ü", "@x", "-x", &"x".repeat(64)] {
            assert_eq!(fault(good), None, "{good:?}");
        }
        let long = "x".repeat(65);
        for bad in [
            "", ".", "..", "../x", "a/b", "a\\b", "a.b", "a\nb", "a\0b", "a\u{85}", &long,
        ] {
            assert!(fault(bad).is_some(), "{bad:?}");
            assert!(check_name(bad).is_err());
        }
    }
}
