//! What is wrong with etcd at the moment, for the log and for clients that are refused. The log says each kind of trouble
//! once when it begins, and once when it is over.

use std::collections::BTreeMap;

use log::{info, warn};

use crate::etcd::{Error, Kind};

/// Which requests failed. Some may fail while others succeed, so each is asked whether the trouble is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    Lease,
    Watch,
    Reads,
    Writes,
}

#[derive(Debug, Default)]
pub(super) struct Troubles {
    /// What each source ran into last.
    now: BTreeMap<Source, (Kind, String)>,
}

impl Troubles {
    /// A request failed.
    pub(super) fn began(&mut self, source: Source, error: &Error) {
        let kind = error.kind();
        let is_new = !self.now.values().any(|(other, _)| *other == kind);
        let before = self.now.insert(source, (kind, error.to_string()));
        if is_new {
            warn!("etcd: {error}; {}", consequence(kind));
        }
        self.log_end(before);
    }

    /// A request succeeded.
    pub(super) fn ended(&mut self, source: Source) {
        let before = self.now.remove(&source);
        self.log_end(before);
    }

    /// Returns `true` if there is trouble of this kind.
    pub(super) fn has(&self, kind: Kind) -> bool {
        self.now.values().any(|(other, _)| *other == kind)
    }

    /// Returns why locks are not granted. `None`: there is no trouble.
    pub(super) fn reason(&self) -> Option<(Kind, &str)> {
        self.now.values().map(|(kind, text)| (*kind, text.as_str())).min_by_key(|(kind, _)| *kind)
    }

    fn log_end(&self, before: Option<(Kind, String)>) {
        if let Some((kind, _)) = before
            && !self.has(kind)
        {
            info!("etcd: {}", end(kind));
        }
    }
}

fn consequence(kind: Kind) -> &'static str {
    match kind {
        Kind::Unreachable | Kind::NoEtcd => "new locks wait until it answers",
        Kind::NoLeader => "new locks wait until it has a leader",
        Kind::NoPermission => "new locks wait until the user has the permission",
        Kind::NoSpace => "new locks wait until it has space (etcdctl alarm disarm); locks can be released",
        Kind::Refused => "new locks wait until it accepts them",
        Kind::StoreChanged => "what was held is lost",
    }
}

fn end(kind: Kind) -> &'static str {
    match kind {
        Kind::Unreachable | Kind::NoEtcd => "it answers again",
        Kind::NoLeader => "it has a leader again",
        Kind::NoPermission => "the user has the permission again",
        Kind::NoSpace => "it has space again",
        Kind::Refused => "it accepts requests again",
        Kind::StoreChanged => "the store is used from now on",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(message: &str) -> Error {
        Error::Refused { code: 7, message: message.into() }
    }

    fn unreachable() -> Error {
        Error::Unreachable { why: "http://e:1: connection refused".into() }
    }

    #[test]
    fn a_kind_of_trouble_is_over_when_no_source_has_it_any_more() {
        let mut troubles = Troubles::default();
        troubles.began(Source::Watch, &refused("etcdserver: permission denied"));
        troubles.ended(Source::Lease);
        assert!(troubles.has(Kind::NoPermission));
        troubles.began(Source::Writes, &refused("etcdserver: permission denied"));
        troubles.ended(Source::Watch);
        assert!(troubles.has(Kind::NoPermission));
        troubles.ended(Source::Writes);
        assert_eq!(troubles.reason(), None);
    }

    #[test]
    fn the_reason_is_the_trouble_that_explains_the_others() {
        let mut troubles = Troubles::default();
        troubles.began(Source::Writes, &refused("etcdserver: permission denied"));
        troubles.began(Source::Lease, &unreachable());
        let (kind, text) = troubles.reason().unwrap();
        assert_eq!((kind, text), (Kind::Unreachable, "cannot reach etcd: http://e:1: connection refused"));
        // Another kind of the same source replaces the first one.
        troubles.began(Source::Lease, &refused("etcdserver: permission denied"));
        assert!(!troubles.has(Kind::Unreachable));
    }
}
