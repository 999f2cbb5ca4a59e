//! Where to listen, as people write it.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
};

/// The port if an address names none.
const DEFAULT_PORT: u16 = 8080;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpAddress {
    /// A name or an address; the loopback address if none was given.
    pub(super) host: String,
    pub(super) port: u16,
}

/// Text that is no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address: write it like 127.0.0.1:8080, localhost:8080, [::1]:8080 or :8080")]
pub struct AddressError(String);

impl FromStr for HttpAddress {
    type Err = AddressError;

    /// Reads `HOST:PORT`, `HOST`, `:PORT` or `PORT`.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(text.to_owned());
        let port = |text: &str| text.parse::<u16>().map_err(|_| wrong());
        let loopback = Ipv4Addr::LOCALHOST.to_string();
        let (host, port) = if text.bytes().all(|byte| byte.is_ascii_digit()) {
            (loopback, port(text)?)
        } else if let Ok(address) = text.parse::<SocketAddr>() {
            (address.ip().to_string(), address.port())
        } else if let Ok(address) = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            (address.to_string(), DEFAULT_PORT)
        } else if let Some(port_text) = text.strip_prefix(':') {
            (loopback, port(port_text)?)
        } else {
            let (host, port) = match text.rsplit_once(':') {
                Some((host, port_text)) => (host, port(port_text)?),
                None => (text, DEFAULT_PORT),
            };
            let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
            if host.is_empty() || !host.chars().all(is_plain) {
                return Err(wrong());
            }
            (host.to_owned(), port)
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for HttpAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> String {
        text.parse::<HttpAddress>()
            .map_or_else(|error| error.to_string(), |address| address.to_string())
    }

    #[test]
    fn addresses_are_on_the_loopback_unless_another_is_named() {
        for (text, expected) in [
            ("8081", "127.0.0.1:8081"),
            (":8081", "127.0.0.1:8081"),
            ("localhost", "localhost:8080"),
            ("localhost:1", "localhost:1"),
            ("127.0.0.1:8080", "127.0.0.1:8080"),
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("[::1]:80", "[::1]:80"),
            ("::1", "[::1]:8080"),
            ("[::1]", "[::1]:8080"),
        ] {
            assert_eq!(address(text), expected, "{text:?}");
        }
        for bad in [
            "",
            ":",
            "a:b",
            "a:99999",
            "99999",
            "http://localhost:80",
            "a b:80",
            "[::1]:x",
            "user@host:1",
            // Without brackets, where the address ends is anybody's guess.
            "e:::0",
        ] {
            assert!(bad.parse::<HttpAddress>().is_err(), "{bad:?}");
        }
    }
}
