//! Who may ask: a web page can make a browser send requests to the machine it runs on, and a foreign name may be made to lead here.

use std::net::{IpAddr, SocketAddr};

use hyper::{
    HeaderMap, StatusCode,
    header::{HOST, HeaderValue, ORIGIN},
    http::uri::Authority,
};

use super::HttpAddress;

/// Who may ask.
#[derive(Debug)]
pub(crate) struct Guard {
    /// The host that the operator named, in lower case.
    name: String,
    /// Only the loopback address is listened on.
    local_only: bool,
}

/// What a request is answered with that is not let through.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    pub(crate) reason: &'static str,
}

impl Guard {
    /// For the address that the operator named, and what it came to.
    pub(crate) fn new(address: &HttpAddress, bound: SocketAddr) -> Self {
        Self {
            name: address.host.to_ascii_lowercase(),
            local_only: bound.ip().is_loopback(),
        }
    }

    /// Lets through what is for this machine, and that no page of another origin sends.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let refuse = |reason| {
            Err(Refusal {
                status: StatusCode::FORBIDDEN,
                reason,
            })
        };
        let mut hosts = headers.get_all(HOST).iter();
        let (Some(host), None) = (hosts.next(), hosts.next()) else {
            return refuse("a request names one host");
        };
        if !self.is_ours(host) {
            return refuse("this host is not ours: ask for the address that is listened on");
        }
        if headers.get_all(ORIGIN).iter().any(|origin| !is_same(origin, host)) {
            return refuse("web pages of another origin are not served");
        }
        Ok(())
    }

    /// Whether the request is for an address of this machine, rather than for a name that somebody made lead here.
    fn is_ours(&self, host: &HeaderValue) -> bool {
        let Some(authority) = host.to_str().ok().and_then(|text| text.parse::<Authority>().ok()) else {
            return false;
        };
        if authority.as_str().contains('@') {
            return false;
        }
        let name = authority.host().to_ascii_lowercase();
        let name = name.trim_start_matches('[').trim_end_matches(']');
        match name.parse::<IpAddr>() {
            Ok(address) => !self.local_only || address.is_loopback(),
            Err(_) => name == "localhost" || name == self.name,
        }
    }
}

/// Whether the origin is the host that is asked. We serve no pages, so this is a client that sets the header by itself.
fn is_same(origin: &HeaderValue, host: &HeaderValue) -> bool {
    let origin = origin.as_bytes().to_ascii_lowercase();
    let host = host.as_bytes().to_ascii_lowercase();
    origin.strip_prefix(b"http://") == Some(&*host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(guard: &Guard, headers: &[(&str, &str)]) -> Result<(), u16> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let name: hyper::header::HeaderName = name.parse().unwrap();
            map.append(name, value.parse().unwrap());
        }
        guard.check(&map).map_err(|refusal| refusal.status.as_u16())
    }

    #[test]
    fn only_requests_for_this_machine_that_no_foreign_page_sends_are_let_through() {
        let local = Guard {
            name: "127.0.0.1".to_owned(),
            local_only: true,
        };
        let ask = |headers: &[(&str, &str)]| check(&local, headers);
        for host in [
            "127.0.0.1:8080",
            "localhost",
            "LOCALHOST:8080",
            "127.9.9.9",
            "[::1]:8080",
        ] {
            assert_eq!(ask(&[("host", host)]), Ok(()), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8080",
            "192.168.0.1",
            "localhost.evil.example",
            "x@localhost",
            "",
            "[::2]",
        ] {
            assert_eq!(ask(&[("host", host)]), Err(403), "{host}");
        }
        assert_eq!(ask(&[]), Err(403));
        assert_eq!(ask(&[("host", "localhost"), ("host", "evil.example")]), Err(403));
        let host = ("host", "localhost:8080");
        assert_eq!(ask(&[host, ("origin", "http://localhost:8080")]), Ok(()));
        for origin in [
            "http://evil.example",
            "null",
            "http://localhost:3000",
            "https://localhost:8080",
            "http://localhost:8080.evil.example",
        ] {
            assert_eq!(ask(&[host, ("origin", origin)]), Err(403), "{origin}");
        }
    }

    #[test]
    fn on_an_address_of_the_network_names_that_the_operator_did_not_give_are_refused() {
        let open = Guard {
            name: "node1.example".to_owned(),
            local_only: false,
        };
        for (host, expected) in [
            ("node1.example:8080", Ok(())),
            ("10.0.0.5:8080", Ok(())),
            ("localhost", Ok(())),
            ("evil.example", Err(403)),
        ] {
            assert_eq!(check(&open, &[("host", host)]), expected, "{host}");
        }
    }
}
