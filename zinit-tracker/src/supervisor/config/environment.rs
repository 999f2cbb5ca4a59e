//! `/etc/environment`: what every service's environment has.

use std::{collections::BTreeMap, fs, io, path::Path};

/// Where it is.
pub const ENVIRONMENT_FILE: &str = "/etc/environment";

/// Reads a file of variables; there are none if there is no file.
///
/// # Errors
///
/// The file cannot be read.
pub fn read_environment(path: &Path) -> io::Result<BTreeMap<String, String>> {
    match fs::read(path) {
        Ok(bytes) => Ok(parse(&String::from_utf8_lossy(&bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(error),
    }
}

/// Lines `NAME=VALUE`, as pam_env(8) reads them: `export` may stand in front, quotes around the value; the rest is passed
/// over.
pub(super) fn parse(text: &str) -> BTreeMap<String, String> {
    let variable = |line: &str| {
        let line = line.trim();
        let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
        let (name, value) = line.split_once('=')?;
        let is_name = !name.is_empty() && !name.starts_with('#') && !name.contains(char::is_whitespace);
        (is_name && !line.contains('\0')).then(|| (name.to_owned(), unquoted(value).to_owned()))
    };
    text.lines().filter_map(variable).collect()
}

fn unquoted(value: &str) -> &str {
    let quoted = |quote| value.strip_prefix(quote)?.strip_suffix(quote);
    quoted('"').or_else(|| quoted('\'')).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_read_and_the_rest_is_passed_over() {
        let text = "# comment=1\n\nPATH=\"/usr/bin:/bin\"\nexport LANG=C.UTF-8\n A='b c' \nEMPTY=\nX=a=b\nnothing\n=x\nQ=\"\na b=c\n";
        let pairs: Vec<_> = parse(text)
            .into_iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        assert_eq!(
            pairs,
            ["A=b c", "EMPTY=", "LANG=C.UTF-8", "PATH=/usr/bin:/bin", "Q=\"", "X=a=b"]
        );
    }

    #[test]
    fn no_file_is_no_variables() {
        assert_eq!(read_environment(Path::new("/nonexistent")).unwrap(), BTreeMap::new());
    }
}
