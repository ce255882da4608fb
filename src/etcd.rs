//! The blocking client of etcd, for what a lock service needs of it: leases, transactions, ranges, watches.
//!
//! It uses the JSON gateway that every member of etcd has beside gRPC (`/v3/...`), over HTTP/1.1 with [`ureq`]. It knows
//! nothing of locks: its caller decides which keys there are, and what they mean.
//!
//! A call is tried at each endpoint in turn ([`Config::timeout`] each at the most), beginning with the one that answered
//! last. It goes on after an attempt whose effect is unknown, so a caller must not ask for anything that must not be done
//! twice: a transaction has a comparison that fails once it was done.
//!
//! Every answer is compared with what was seen of the store before (`store`), so that no answer of a store that went back
//! is taken for the truth.

mod auth;
mod codec;
mod config;
mod endpoint;
mod error;
mod http;
mod kv;
mod resolver;
mod store;
#[cfg(test)]
mod tests;
mod watch;

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ureq::Agent;

use auth::Tokens;
pub use config::{Config, ConfigError, TIMEOUT_DEFAULT, User};
pub use endpoint::{Endpoint, EndpointError};
use error::Failure;
pub use error::{Error, Kind};
use http::{Agents, Leaderless, Request};
pub use kv::{
    Compare, Event, KeptAlive, KeyValue, Lease, LeaseId, Op, Range, RangeReply, Sort, TimeToLive, Txn,
    TxnReply, WatchReply,
};
use resolver::HostResolver;
use store::{Currency, Finding, Header, Seen, Store};
pub use watch::Watch;

/// A client of one cluster of etcd. Threads may share it; each call blocks the one that makes it.
pub struct Client {
    endpoints: Vec<Endpoint>,
    /// Which of them has answered last.
    current: AtomicUsize,
    store: Arc<Store>,
    tokens: Arc<Tokens>,
    agents: Agents,
    requests: Agent,
    /// Of its own, so that [`Client::hang_up`] ends nothing but watches; and how often it did.
    watches: Mutex<(Agent, u64)>,
}

impl Client {
    /// Reads the certificates. Does not connect yet.
    ///
    /// # Errors
    /// If the configuration cannot work.
    pub fn new(config: &Config) -> Result<Client, ConfigError> {
        if config.endpoints.is_empty() {
            return Err(ConfigError::NoEndpoint);
        }
        let (tls, resolver) = (config::tls(config)?, HostResolver::default());
        let agents = Agents { tls, resolver, timeout: config.timeout };
        Ok(Client {
            endpoints: config.endpoints.clone(),
            current: AtomicUsize::new(0),
            store: Arc::default(),
            tokens: Arc::new(Tokens::new(config.user.clone())),
            requests: agents.for_requests(),
            watches: Mutex::new((agents.for_watches(), 0)),
            agents,
        })
    }

    /// Gets a lease of `ttl_secs` seconds, or longer if etcd says so. [`Client::keep_alive`] renews it.
    ///
    /// # Errors
    /// As [`Client::txn`]. If etcd granted the lease and the answer was lost, the lease ends by itself.
    pub fn grant_lease(&self, ttl_secs: u64) -> Result<Lease, Error> {
        let body = codec::grant_lease(ttl_secs);
        self.call("/v3/lease/grant", &body, Currency::Local, codec::read_lease).map(|(lease, _)| lease)
    }

    /// Renews a lease. If the lease is gone, the answer says so; that is no error.
    ///
    /// # Errors
    /// As [`Client::txn`].
    pub fn keep_alive(&self, lease: LeaseId) -> Result<KeptAlive, Error> {
        let read = |body: &[u8]| codec::read_kept_alive(body, lease);
        let reply = self.call("/v3/lease/keepalive", &codec::lease(lease), Currency::Local, read);
        reply.map(|(kept, finding)| KeptAlive { is_behind: finding == Finding::Behind, ..kept })
    }

    /// Returns the keys that were put with a lease.
    ///
    /// # Errors
    /// As [`Client::txn`].
    pub fn lease_keys(&self, lease: LeaseId) -> Result<Vec<Vec<u8>>, Error> {
        let body = codec::lease_keys(lease);
        self.call("/v3/lease/timetolive", &body, Currency::Local, codec::read_lease_keys)
            .map(|(keys, _)| keys)
    }

    /// Returns how much of a lease's time is left. `None`: it has ended.
    ///
    /// # Errors
    /// As [`Client::txn`].
    pub fn time_to_live(&self, lease: LeaseId) -> Result<Option<TimeToLive>, Error> {
        let body = codec::time_to_live(lease);
        self.call("/v3/lease/timetolive", &body, Currency::Local, codec::read_time_to_live)
            .map(|(left, _)| left)
    }

    /// Ends a lease, and deletes all keys that were put with it. Succeeds if the lease has ended before.
    ///
    /// # Errors
    /// As [`Client::txn`].
    pub fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        let body = codec::lease(lease);
        self.each_endpoint(|endpoint| match self.attempt(endpoint, "/v3/lease/revoke", &body) {
            Err(failure) if failure.is_lease_gone() => Ok(()),
            reply => codec::read_revoked(&reply?),
        })
    }

    /// Carries out a transaction.
    ///
    /// # Errors
    /// [`Error::Unknown`] and [`Error::BadReply`] when it may have been done; [`Error::Unreachable`] and
    /// [`Error::Refused`] when it was not.
    pub fn txn(&self, txn: &Txn) -> Result<TxnReply, Error> {
        let read = |body: &[u8]| codec::read_txn(body, txn);
        self.call("/v3/kv/txn", &codec::txn(txn), Currency::Linearizable, read).map(|(reply, _)| reply)
    }

    /// Reads keys as they are now. Every change that etcd confirmed before this call is in the reply (etcd's linearizable
    /// read).
    ///
    /// # Errors
    /// As [`Client::txn`].
    pub fn range(&self, range: &Range) -> Result<RangeReply, Error> {
        let body = codec::range(range);
        self.call("/v3/kv/range", &body, Currency::Linearizable, codec::read_range).map(|(reply, _)| reply)
    }

    /// Checks that a key was put at a revision, as a watch has reported. A history that is compacted passes.
    ///
    /// # Errors
    /// [`Error::StoreChanged`] if it was not: the store went back, and has reached that revision again. Otherwise as
    /// [`Client::range`].
    pub fn check_history(&self, key: &[u8], revision: i64) -> Result<(), Error> {
        let before = self.store.seen();
        match self.range(&Range { key: key.into(), revision, ..Range::default() }) {
            Ok(reply) if reply.kvs.iter().any(|key| key.mod_revision == revision) => Ok(()),
            Err(Error::Refused { message, .. }) if message.contains("compacted") => Ok(()),
            Ok(reply) => {
                let header = Header { cluster_id: 0, revision: reply.revision };
                Err(self.store.went_back(before, header).into())
            }
            Err(Error::Refused { message, .. }) if message.contains("future revision") => {
                Err(self.store.went_back(before, Header::default()).into())
            }
            Err(e) => Err(e),
        }
    }

    /// Counts the changes of the store that were found. What was read under another count is not true any more.
    pub fn generation(&self) -> u64 {
        self.store.seen().generation
    }

    /// Returns the index of the endpoint that answered last.
    pub fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// Returns how long a call may take at the most: an attempt at each endpoint.
    pub fn call_max(&self) -> Duration {
        self.agents.timeout * u32::try_from(self.endpoints.len()).unwrap_or(u32::MAX)
    }

    /// Watches the keys from `key` up to `end`, without `end` itself (empty: `key` alone). The events begin at
    /// `from_revision`; 0 means with the next one.
    ///
    /// # Errors
    /// If no endpoint opens it. If etcd refuses this watch, its first message says so.
    pub fn watch(&self, key: &[u8], end: &[u8], from_revision: i64) -> Result<Watch, Error> {
        let body = codec::watch(key, end, from_revision);
        let (agent, hang_ups) = self.watches().clone();
        self.each_endpoint(|endpoint| {
            let open = |token: Option<&str>| {
                let (path, leaderless, timeout) = ("/v3/watch", Leaderless::GivesUp, self.agents.timeout);
                let request = Request { endpoint, path, body: &body, token, leaderless, timeout };
                let response = http::open(&agent, request)?;
                let (tokens, token) = (Arc::clone(&self.tokens), token.map(String::from));
                let store = (Arc::clone(&self.store), self.store.seen());
                Ok(Watch::new(endpoint.clone(), response.into_body(), (tokens, token), store, hang_ups))
            };
            self.tokens.with_token(|user| self.authenticate(endpoint, user), open)
        })
    }

    /// Ends all watches at once, also watches that are being opened: their readers get an error. Watches that are
    /// opened afterwards are not touched. Returns how often it was called, which those watches return as
    /// [`Watch::hang_ups`].
    pub fn hang_up(&self) -> u64 {
        let (new, mut watches) = (self.agents.for_watches(), self.watches());
        let hang_ups = watches.1 + 1;
        let (old, _) = std::mem::replace(&mut *watches, (new, hang_ups));
        drop(watches);
        old.shutdown();
        hang_ups
    }

    /// Returns how often [`Client::hang_up`] was called.
    pub fn hang_ups(&self) -> u64 {
        self.watches().1
    }

    fn call<T>(
        &self,
        path: &str,
        body: &str,
        currency: Currency,
        read: impl Fn(&[u8]) -> Result<T, Failure>,
    ) -> Result<(T, Finding), Error> {
        let before: Seen = self.store.seen();
        let (header, reply) = self.each_endpoint(|endpoint| {
            let body = self.attempt(endpoint, path, body)?;
            Ok((codec::read_header(&body), read(&body)?))
        })?;
        let finding = self.store.check(before, header, currency)?;
        Ok((reply, finding))
    }

    /// Tries the endpoints in turn until one answers.
    fn each_endpoint<T>(&self, attempt: impl Fn(&Endpoint) -> Result<T, Failure>) -> Result<T, Error> {
        let first = self.current.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for turn in 0..self.endpoints.len() {
            let index = (first + turn) % self.endpoints.len();
            let endpoint = &self.endpoints[index];
            let failure = match attempt(endpoint) {
                Ok(reply) => {
                    self.current.store(index, Ordering::Relaxed);
                    return Ok(reply);
                }
                Err(failure) => failure,
            };
            if matches!(failure, Failure::Refused { .. }) {
                self.current.store(index, Ordering::Relaxed);
                // What one refuses, another may have done, or may do still.
                if failures.iter().all(|(_, failure)| matches!(failure, Failure::NotSent(_))) {
                    return Err(failure.into_error(endpoint));
                }
                failures.push((endpoint, failure));
                break;
            }
            log::debug!("etcd: {endpoint}: {failure}");
            failures.push((endpoint, failure));
        }
        Err(Error::of(&failures))
    }

    fn attempt(&self, endpoint: &Endpoint, path: &str, body: &str) -> Result<Vec<u8>, Failure> {
        let call = |token: Option<&str>| self.post(endpoint, path, body, token);
        self.tokens.with_token(|user| self.authenticate(endpoint, user), call)
    }

    fn authenticate(&self, endpoint: &Endpoint, user: &User) -> Result<String, Failure> {
        let body = codec::authenticate(&user.name, &user.password);
        codec::read_token(&self.post(endpoint, "/v3/auth/authenticate", &body, None)?)
    }

    fn post(
        &self,
        endpoint: &Endpoint,
        path: &str,
        body: &str,
        token: Option<&str>,
    ) -> Result<Vec<u8>, Failure> {
        let timeout = self.agents.timeout;
        let request = Request { endpoint, path, body, token, leaderless: Leaderless::Waits, timeout };
        http::call(&self.requests, request)
    }

    fn watches(&self) -> MutexGuard<'_, (Agent, u64)> {
        // Each change is one assignment, so a thread that panicked has left it whole.
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("endpoints", &self.endpoints).finish_non_exhaustive()
    }
}
