//! What a readiness event is about, packed into the 64 bits that the kernel keeps with each descriptor (epoll_ctl(2)).

use super::connection::ConnectionId;
use crate::proto::Token;
use crate::table::ClientId;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The pipe that signals are written to.
    Signals,
    /// A listening socket, by its index in the acceptor.
    Listener(usize),
    Connection(ConnectionId),
    /// The process of a holder that is not connected, by the token of its lock.
    Orphan(Token),
    /// The watch on the daemon's own files.
    Files,
    /// The threads that talk to etcd, or the alarm of the lease.
    Cluster,
    /// The pipe that the signal to read files again is written to.
    Reload,
    /// The thread that verifies secrets.
    Verifier,
    /// The threads that look up users.
    Users,
    /// The thread that searches for commands.
    Search,
}

impl Source {
    const ORPHAN: u64 = 1 << 63;
    const CLUSTER: u32 = u32::MAX;
    const FILES: u32 = u32::MAX - 1;
    const RELOAD: u32 = u32::MAX - 2;
    const VERIFIER: u32 = u32::MAX - 3;
    const USERS: u32 = u32::MAX - 4;
    const SEARCH: u32 = u32::MAX - 5;

    /// Generation 0 marks everything that is not a connection. Generations and tokens never reach the highest bit.
    pub(super) fn pack(self) -> u64 {
        match self {
            Source::Signals => 0,
            Source::Cluster => u64::from(Source::CLUSTER),
            Source::Files => u64::from(Source::FILES),
            Source::Reload => u64::from(Source::RELOAD),
            Source::Verifier => u64::from(Source::VERIFIER),
            Source::Users => u64::from(Source::USERS),
            Source::Search => u64::from(Source::SEARCH),
            Source::Listener(index) => index as u64 + 1,
            Source::Connection(id) => u64::from(id.generation) << 32 | u64::from(id.client.0),
            Source::Orphan(token) => Source::ORPHAN | token.0,
        }
    }

    pub(super) fn unpack(bits: u64) -> Source {
        let (generation, low) = ((bits >> 32) as u32, bits as u32);
        match (generation, low) {
            _ if bits & Source::ORPHAN != 0 => Source::Orphan(Token(bits & !Source::ORPHAN)),
            (0, 0) => Source::Signals,
            (0, Source::CLUSTER) => Source::Cluster,
            (0, Source::FILES) => Source::Files,
            (0, Source::RELOAD) => Source::Reload,
            (0, Source::VERIFIER) => Source::Verifier,
            (0, Source::USERS) => Source::Users,
            (0, Source::SEARCH) => Source::Search,
            (0, number) => Source::Listener(number as usize - 1),
            _ => Source::Connection(ConnectionId { client: ClientId(low), generation }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_survives_packing() {
        let connection =
            |client, generation| Source::Connection(ConnectionId { client: ClientId(client), generation });
        for source in [
            Source::Signals,
            Source::Cluster,
            Source::Files,
            Source::Reload,
            Source::Verifier,
            Source::Users,
            Source::Search,
            Source::Listener(0),
            Source::Listener(7),
            connection(0, 1),
            connection(u32::MAX, u32::MAX / 2),
            Source::Orphan(Token(0)),
            Source::Orphan(Token((1 << 53) - 1)),
        ] {
            assert_eq!(Source::unpack(source.pack()), source);
        }
    }
}
