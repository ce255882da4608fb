//! Where a member of etcd is: reading it and writing it out, nothing else.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

/// etcd's port for clients.
const PORT: u16 = 2379;

/// `http://HOST:PORT` or `https://HOST:PORT`, as etcd's `--advertise-client-urls` has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    is_tls: bool,
    /// A name or a number, without brackets.
    host: String,
    port: u16,
}

impl Endpoint {
    /// Returns `true` for https.
    pub fn is_tls(&self) -> bool {
        self.is_tls
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    /// Reads `http://HOST`, `http://HOST:PORT` or `http://[V6]:PORT`, and the same with https. A slash may follow.
    fn from_str(text: &str) -> Result<Endpoint, EndpointError> {
        let bad = |why: &'static str| EndpointError { text: text.into(), why };
        let (scheme, rest) =
            text.split_once("://").ok_or(bad("it begins with neither http:// nor https://"))?;
        let is_tls = match scheme {
            "http" => false,
            "https" => true,
            _ => return Err(bad("it is neither http nor https")),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains(['/', '?', '#']) {
            return Err(bad("an endpoint has no path"));
        }
        if authority.contains('@') {
            return Err(bad("user and password do not belong here"));
        }
        let (host, port) = split(authority).map_err(bad)?;
        let port = match port {
            None => PORT,
            Some(digits) => number(digits).ok_or(bad("the port is not from 1 to 65535"))?,
        };
        Ok(Endpoint { is_tls, host: host.into(), port })
    }
}

/// The host, without brackets, and the text of the port.
fn split(authority: &str) -> Result<(&str, Option<&str>), &'static str> {
    if let Some(rest) = authority.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or("the bracket is not closed")?;
        if host.parse::<Ipv6Addr>().is_err() {
            return Err("only an IPv6 address stands in brackets");
        }
        return match rest.strip_prefix(':') {
            None if !rest.is_empty() => Err("only a port may follow the bracket"),
            port => Ok((host, port)),
        };
    }
    let (host, port) = match authority.split_once(':') {
        Some((_, port)) if port.contains(':') => return Err("an IPv6 address stands in brackets"),
        Some((host, port)) => (host, Some(port)),
        None => (authority, None),
    };
    match host {
        "" => Err("the host is missing"),
        _ if host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) => Ok((host, port)),
        _ => Err("that is no name of a host"),
    }
}

fn number(digits: &str) -> Option<u16> {
    let is_number = digits.bytes().all(|b| b.is_ascii_digit());
    digits.parse().ok().filter(|&port| is_number && port > 0)
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_tls { "https" } else { "http" };
        match self.host.contains(':') {
            true => write!(f, "{scheme}://[{}]:{}", self.host, self.port),
            false => write!(f, "{scheme}://{}:{}", self.host, self.port),
        }
    }
}

/// What is wrong with an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointError {
    text: String,
    why: &'static str,
}

impl fmt::Display for EndpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bad etcd endpoint {:?}: {}", self.text, self.why)
    }
}

impl std::error::Error for EndpointError {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_endpoint_is_written_out_in_full() {
        for (text, full) in [
            ("http://127.0.0.1:2379", "http://127.0.0.1:2379"),
            ("http://db-1.example/", "http://db-1.example:2379"),
            ("https://db_1:1", "https://db_1:1"),
            ("https://[::1]", "https://[::1]:2379"),
            ("http://[fe80::1]:65535/", "http://[fe80::1]:65535"),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), full);
            assert_eq!(full.parse(), Ok(endpoint));
        }
    }

    #[test]
    fn a_bad_endpoint_is_named_with_what_is_wrong() {
        for (text, why) in [
            ("", "begins with neither"),
            ("127.0.0.1:2379", "begins with neither"),
            ("unix:///run/etcd", "neither http nor https"),
            ("HTTP://a", "neither http nor https"),
            ("http://", "host is missing"),
            ("http:///", "host is missing"),
            ("http://:2379", "host is missing"),
            ("http://a:0", "port is not from 1 to 65535"),
            ("http://a:65536", "port is not from 1 to 65535"),
            ("http://a:", "port is not from 1 to 65535"),
            ("http://a:+1", "port is not from 1 to 65535"),
            ("http://a/v3", "no path"),
            ("http://a//", "no path"),
            ("http://a?x", "no path"),
            ("http://root:secret@a", "user and password"),
            ("http://::1:2379", "in brackets"),
            ("http://[::1", "not closed"),
            ("http://[a]:1", "only an IPv6"),
            ("http://[::1]2379", "only a port"),
            ("http://a b", "no name of a host"),
            ("http://a\n", "no name of a host"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains(&format!("{text:?}")), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_read_again_from_what_is_written(text in "(https?://)?[\\[\\]a-c0-9.:/@]{0,12}") {
            if let Ok(endpoint) = text.parse::<Endpoint>() {
                prop_assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
            }
        }
    }
}
