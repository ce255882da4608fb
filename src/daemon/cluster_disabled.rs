//! In the place of `cluster.rs`, in a build without etcd: this host shares nothing.

use super::server::Server;
use crate::proto::v2::{LeaseTerms, Party};
use crate::proto::{Key, LockId};
use crate::table::{ClientId, Millis};

impl Server {
    pub(super) fn is_sharing(&self) -> bool {
        false
    }

    pub(super) fn sharing_deadline(&self) -> Option<Millis> {
        None
    }

    pub(super) fn check_lease(&mut self) {}

    pub(super) fn sharing_ready(&mut self) {}

    pub(super) fn contend(&mut self) {}

    pub(super) fn lease_terms(&self) -> Option<LeaseTerms> {
        None
    }

    pub(super) fn holder_elsewhere(&self, _lock: LockId) -> Option<Party> {
        None
    }

    pub(super) fn stop_sharing(&mut self) {}

    pub(super) fn break_elsewhere(&mut self, _client: ClientId, _key: &Key) {}

    pub(super) fn list_cluster(&mut self, _client: ClientId) -> bool {
        true
    }

    pub(super) fn continue_listing(&mut self, _client: ClientId, _room: impl Fn(usize) -> bool) {}

    pub(super) fn has_listing_ready(&self, _client: ClientId) -> bool {
        false
    }

    pub(super) fn forget_listing(&mut self, _client: ClientId) {}
}
