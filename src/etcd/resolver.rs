//! The addresses of the endpoints' hosts, for ureq. [`crate::lookup`] finds them, because a static program cannot use the C
//! library. They are cached, because each lookup takes a process and ureq asks before every request.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

use crate::lookup;

/// A name is looked up again after this time. Until that succeeds, its old addresses are used.
const FRESH: Duration = Duration::from_secs(10);
/// How many addresses of a host are tried; ureq has room for no more.
const ADDRS_MAX: usize = 16;

/// The addresses of hosts, as far as they are known. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct HostResolver(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// One for each name among the endpoints.
    hosts: Mutex<HashMap<String, Host>>,
    looked_up: Condvar,
}

#[derive(Debug, Default)]
struct Host {
    addrs: Vec<IpAddr>,
    /// When it was looked up last.
    asked: Option<Instant>,
    /// One thread at the most looks it up, however long that takes.
    is_being_looked_up: bool,
}

impl HostResolver {
    /// Returns the addresses of a host; none if they are not known within `within`.
    fn of(&self, name: &str, within: Duration) -> io::Result<Vec<IpAddr>> {
        if let Ok(addr) = name.parse() {
            return Ok(vec![addr]);
        }
        let mut hosts = self.0.hosts();
        let host = hosts.entry(name.into()).or_default();
        let is_fresh = host.asked.is_some_and(|asked| asked.elapsed() < FRESH) && !host.addrs.is_empty();
        if !is_fresh && !host.is_being_looked_up {
            self.look_up(name)?;
            host.is_being_looked_up = true;
        }
        let is_waiting = |hosts: &mut HashMap<String, Host>| {
            hosts.get(name).is_some_and(|host| host.addrs.is_empty() && host.is_being_looked_up)
        };
        let waited = self.0.looked_up.wait_timeout_while(hosts, within, is_waiting);
        let (hosts, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Ok(hosts.get(name).map(|host| host.addrs.clone()).unwrap_or_default())
    }

    fn look_up(&self, name: &str) -> io::Result<()> {
        let shared = Arc::clone(&self.0);
        let name = name.to_string();
        let look_up = move || {
            let found = lookup::host(&name, None);
            let mut hosts = shared.hosts();
            let host = hosts.entry(name).or_default();
            match found {
                Ok(addrs) => host.addrs = addrs,
                Err(e) => log::debug!("the address of an etcd endpoint: {e}"),
            }
            host.asked = Some(Instant::now());
            host.is_being_looked_up = false;
            shared.looked_up.notify_all();
        };
        thread::Builder::new().name("etcd-names".into()).spawn(look_up).map(drop)
    }
}

impl Shared {
    fn hosts(&self) -> MutexGuard<'_, HashMap<String, Host>> {
        // Each change is one assignment, so a thread that panicked has left it whole.
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Resolver for HostResolver {
    fn resolve(
        &self,
        uri: &Uri,
        _: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let (Some(host), Some(port)) = (uri.host(), uri.port_u16()) else {
            return Err(ureq::Error::HostNotFound);
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let within = timeout.not_zero().map_or(Duration::MAX, |left| *left);
        let mut found = self.empty();
        for ip in self.of(host, within)?.into_iter().take(ADDRS_MAX) {
            found.push(SocketAddr::new(ip, port));
        }
        if found.is_empty() { Err(ureq::Error::HostNotFound) } else { Ok(found) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(30);

    #[test]
    fn a_name_is_looked_up_once_and_a_number_never() {
        let resolver = HostResolver::default();
        assert_eq!(resolver.of("::1", TIMEOUT).unwrap(), ["::1".parse::<IpAddr>().unwrap()]);
        assert!(resolver.0.hosts().is_empty());
        let found = resolver.of("localhost", TIMEOUT).unwrap();
        assert!(!found.is_empty());
        let asked = resolver.0.hosts()["localhost"].asked;
        assert_eq!(resolver.of("localhost", TIMEOUT).unwrap(), found);
        assert_eq!(resolver.0.hosts()["localhost"].asked, asked);
    }

    #[test]
    fn a_name_that_is_stale_goes_on_being_used_while_it_is_looked_up() {
        let resolver = HostResolver::default();
        let old = vec!["192.0.2.1".parse().unwrap()];
        let host = Host { addrs: old.clone(), asked: None, is_being_looked_up: false };
        resolver.0.hosts().insert("localhost".into(), host);
        assert_eq!(resolver.of("localhost", TIMEOUT).unwrap(), old);
    }

    #[test]
    fn a_name_that_is_not_known_has_no_address() {
        assert!(HostResolver::default().of("no.such.host.invalid", TIMEOUT).unwrap().is_empty());
    }
}
