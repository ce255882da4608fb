//! Who a client over TCP is, as far as it has shown that, and the TLS session that carries its bytes.

use std::net::{IpAddr, Ipv6Addr};

use crate::timestamp::Timestamp;
#[cfg(feature = "tls")]
use crate::tls::ServerSession;

/// What is kept of a client that must show who it is, or that speaks TLS. All others have no identity and may do everything
/// that a client may do.
pub(super) struct Identity {
    pub(super) origin: Origin,
    pub(super) standing: Standing,
    /// Until when the client must have said who it is; [`Timestamp::NEVER`] if it has.
    pub(super) deadline: Timestamp,
    #[cfg(feature = "tls")]
    pub(super) tls: Option<ServerSession>,
}

/// How far a client has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// The TLS handshake is not over.
    #[cfg(feature = "tls")]
    Handshaking,
    /// The client has not said who it is, and the daemon wants to know.
    Unknown,
    /// The daemon is verifying the client's secret. Nothing is read from the client meanwhile.
    Verifying,
    /// The client may make requests, as this name if it has one.
    Admitted(Option<Box<str>>),
}

impl Identity {
    /// Returns the name that the client has shown to be its own.
    pub(super) fn name(&self) -> Option<&str> {
        match &self.standing {
            Standing::Admitted(name) => name.as_deref(),
            _ => None,
        }
    }

    /// Returns `true` if the client may make requests.
    pub(super) fn is_admitted(&self) -> bool {
        matches!(self.standing, Standing::Admitted(_))
    }
}

/// Where clients come from that the daemon must suspect to be one: an IPv4 address, or the half of an IPv6 address that a
/// provider assigns to one customer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Origin(u64);

impl From<IpAddr> for Origin {
    fn from(address: IpAddr) -> Origin {
        let to_v6 = |address: IpAddr| match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let v6: Ipv6Addr = to_v6(address);
        let bits = v6.to_bits();
        // Addresses of IPv4, which the upper half does not tell apart, count whole.
        Origin(if v6.to_ipv4_mapped().is_some() { bits as u64 } else { (bits >> 64) as u64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(text: &str) -> Origin {
        Origin::from(text.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn addresses_of_one_customer_are_one_origin() {
        assert_ne!(origin("192.0.2.1"), origin("192.0.2.2"));
        assert_eq!(origin("192.0.2.1"), origin("::ffff:192.0.2.1"));
        assert_eq!(origin("2001:db8::1"), origin("2001:db8::2:1"));
        assert_ne!(origin("2001:db8::1"), origin("2001:db8:0:1::1"));
    }
}
