//! In place of `cluster.rs`, in a build without etcd: there is no clustering, so none of this is ever called.

use std::io;

use nix::sys::epoll::Epoll;

use super::connection::ConnectionId;
use super::remote::{RemoteReply, RemoteRequest, RemoteResult};
use crate::journal::ClusterLease;
use crate::proto::v2::{LeaseTerms, LockUser, ShortText};
use crate::proto::{LockId, Token};
use crate::table::{ClusterNotice, Effects, Table, Timestamp};

/// Has no value.
pub(super) enum Clustering {}

impl Clustering {
    pub(super) fn register(&self, _epoll: &Epoll) -> io::Result<()> {
        match *self {}
    }

    pub(super) fn deadline(&self) -> Option<Timestamp> {
        match *self {}
    }

    pub(super) fn notify(&mut self, _notice: ClusterNotice) {
        match *self {}
    }

    pub(super) fn poll(
        &mut self,
        _table: &mut Table,
        _now: Timestamp,
        _effects: &mut Effects,
    ) -> Option<Vec<RemoteReply>> {
        match *self {}
    }

    pub(super) fn take_results(&mut self) -> Vec<RemoteResult> {
        match *self {}
    }

    pub(super) fn keep_result(
        &mut self,
        _lock: LockId,
        _token: Token,
        _user: (Option<u32>, Option<&str>),
        _content: Result<Vec<u8>, ShortText>,
    ) {
        match *self {}
    }

    pub(super) fn lease_terms(&self) -> LeaseTerms {
        match *self {}
    }

    pub(super) fn remote_holder(&self, _lock: LockId) -> Option<LockUser> {
        match *self {}
    }

    pub(super) fn is_held_elsewhere(&self, _lock: LockId) -> bool {
        match *self {}
    }

    pub(super) fn who_says(&self, _lock: LockId, _slots: u32) -> Option<(String, Option<String>)> {
        match *self {}
    }

    pub(super) fn forget(&mut self, _client: ConnectionId) {
        match *self {}
    }

    pub(super) fn unavailable(&self) -> String {
        match *self {}
    }

    pub(super) fn request(&mut self, _from: ConnectionId, _request: RemoteRequest) {
        match *self {}
    }

    pub(super) fn stop(&mut self, _table: &Table) -> Option<ClusterLease> {
        match *self {}
    }
}
