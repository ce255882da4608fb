//! Who may use the TCP ports, and as whom: the daemon's certificates and its file of names, and the clients that have not yet
//! shown who they are.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use log::{info, warn};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::attempts::{Attempt, Attempts};
use super::connection::ConnectionId;
use super::identity::{Identity, Origin, Standing};
use super::source::Source;
use super::verifier::Verifier;
use super::{Config, Error};
use crate::auth::{AuthFile, Name, Verified};
use crate::proto::{Key, LockId, Secret};
use crate::table::{ClientId, Timestamp};
#[cfg(feature = "tls")]
use crate::tls::{ClientCertificates, ServerTls};

/// How long a client may take for the TLS handshake and to say who it is.
const STRANGER_WAIT: Duration = Duration::from_secs(10);
/// How many clients that have not said who they are the daemon serves at a time. The oldest yields.
const STRANGERS_MAX: usize = 1024;
/// How often the daemon looks whether its files have changed, while clients connect.
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub(super) struct Gate {
    auth: Option<Auth>,
    #[cfg(feature = "tls")]
    tls: Option<ServerTls>,
    /// Clients that have not said who they are, by when they must have.
    strangers: BTreeSet<(Timestamp, ClientId)>,
    look_at: Timestamp,
}

/// The names that are known, and the attempts to be one of them.
struct Auth {
    file: AuthFile,
    verified: Verified,
    attempts: Attempts,
    verifier: Option<Verifier>,
    /// What the verifier is verifying.
    current: Option<Current>,
    /// How often the file was read again.
    edition: u64,
}

struct Current {
    origin: Origin,
    attempt: Attempt,
    /// The edition of the file that it is verified against.
    edition: u64,
}

/// What became of an attempt to be a name.
pub(super) enum Verdict {
    Admitted,
    /// [`Gate::poll`] returns it later.
    Pending,
    /// Too many attempts of the client's address wait.
    Crowded,
}

/// Which ports beyond loopback are protected, or are meant not to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Exposure {
    pub(super) plain: bool,
    pub(super) tls: bool,
}

impl Exposure {
    /// No port beyond loopback is protected.
    pub(super) const NONE: Exposure = Exposure { plain: false, tls: false };

    pub(super) fn of(config: &Config) -> Exposure {
        let plain = config.open || config.auth_file.is_some();
        #[cfg(feature = "tls")]
        let tls = plain || config.tls.as_ref().is_some_and(|files| files.client_ca.is_some());
        #[cfg(not(feature = "tls"))]
        let tls = plain;
        Exposure { plain, tls }
    }
}

impl Gate {
    /// Reads the files.
    ///
    /// # Errors
    /// When one of them cannot be used.
    pub(super) fn load(config: &Config) -> Result<Gate, Error> {
        let auth = config.auth_file.as_deref().map(Auth::load).transpose()?;
        #[cfg(feature = "tls")]
        let tls = config.tls.clone().map(|files| {
            let certificates =
                if auth.is_some() { ClientCertificates::Optional } else { ClientCertificates::Required };
            ServerTls::load(files, certificates).map_err(Error::Tls)
        });
        Ok(Gate {
            auth,
            #[cfg(feature = "tls")]
            tls: tls.transpose()?,
            strangers: BTreeSet::new(),
            look_at: Timestamp(0),
        })
    }

    /// Starts the thread that verifies secrets, if there are any.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn start(&mut self, epoll: &Epoll) -> io::Result<()> {
        let Some(auth) = &mut self.auth else { return Ok(()) };
        let verifier = Verifier::start()?;
        epoll.add(&verifier, EpollEvent::new(EpollFlags::EPOLLIN, Source::Verifier.pack()))?;
        auth.verifier = Some(verifier);
        Ok(())
    }

    /// Begins with a client that has just connected. Returns `None` for a client that may do everything at once.
    ///
    /// # Errors
    /// When no TLS session can begin.
    pub(super) fn admit(
        &mut self,
        client: ClientId,
        from: IpAddr,
        is_tls: bool,
        now: Timestamp,
    ) -> Result<Option<Box<Identity>>, String> {
        self.look(now);
        if !is_tls && self.auth.is_none() {
            return Ok(None);
        }
        let deadline = now.plus(STRANGER_WAIT);
        #[cfg(feature = "tls")]
        let tls = match &self.tls {
            Some(tls) if is_tls => Some(tls.begin().map_err(|e| e.to_string())?),
            _ => None,
        };
        #[cfg(feature = "tls")]
        let standing = if tls.is_some() { Standing::Handshaking } else { Standing::Unknown };
        #[cfg(not(feature = "tls"))]
        let standing = Standing::Unknown;
        self.strangers.insert((deadline, client));
        Ok(Some(Box::new(Identity {
            origin: Origin::from(from),
            standing,
            deadline,
            #[cfg(feature = "tls")]
            tls,
        })))
    }

    /// Decides about a client whose TLS handshake is over, by the names in its certificate, if it has shown one.
    #[cfg(feature = "tls")]
    pub(super) fn handshake_over(&mut self, client: ClientId, identity: &mut Identity) {
        let names = identity.tls.as_ref().and_then(crate::tls::ServerSession::names);
        let name = match &self.auth {
            None => Some(names.into_iter().flatten().next().map(String::into_boxed_str)),
            Some(auth) => {
                let known = names.into_iter().flatten().find(|name| auth.file.find(name).is_some());
                known.map(|name| Some(name.into_boxed_str()))
            }
        };
        match name {
            Some(name) => self.admitted(client, identity, name),
            None => identity.standing = Standing::Unknown,
        }
    }

    /// Takes a client's attempt to be a name.
    pub(super) fn authenticate(
        &mut self,
        id: ConnectionId,
        identity: &mut Identity,
        name: String,
        secret: Secret,
    ) -> Verdict {
        let Some(auth) = &mut self.auth else {
            self.admitted(id.client, identity, None);
            return Verdict::Admitted;
        };
        if auth.verified.contains(&name, &secret) {
            self.admitted(id.client, identity, Some(name.into()));
            return Verdict::Admitted;
        }
        let attempt = Attempt { client: id, name: name.into(), secret };
        if !auth.attempts.push(identity.origin, attempt) {
            return Verdict::Crowded;
        }
        identity.standing = Standing::Verifying;
        self.known(id.client, identity);
        self.verify_next();
        Verdict::Pending
    }

    /// Marks a client as one that may make requests.
    pub(super) fn admitted(&mut self, client: ClientId, identity: &mut Identity, name: Option<Box<str>>) {
        identity.standing = Standing::Admitted(name);
        self.known(client, identity);
    }

    /// The client needs no deadline any more.
    fn known(&mut self, client: ClientId, identity: &mut Identity) {
        self.strangers.remove(&(identity.deadline, client));
        identity.deadline = Timestamp::NEVER;
    }

    /// Forgets a client whose connection is closed.
    pub(super) fn closed(&mut self, id: ConnectionId, identity: &mut Identity) {
        self.known(id.client, identity);
        if let Some(auth) = &mut self.auth {
            auth.attempts.cancel(identity.origin, id);
        }
    }

    /// Returns the next attempt that is decided: whose it is, and the name if the secret was right.
    pub(super) fn poll(&mut self, now: Timestamp) -> Option<(ConnectionId, Option<Box<str>>)> {
        let auth = self.auth.as_mut()?;
        let mut decided = auth.attempts.pop_failed(now).map(|client| (client, None));
        if decided.is_none()
            && let Some(is_good) = auth.verifier.as_mut().and_then(Verifier::result)
            && let Some(Current { origin, attempt, edition }) = auth.current.take()
        {
            if edition != auth.edition {
                auth.verify(origin, attempt);
                return None;
            }
            let Attempt { client, name, secret } = attempt;
            auth.attempts.verified(origin, client, now, is_good);
            if is_good {
                auth.verified.insert(&name, &secret);
                decided = Some((client, Some(name)));
            }
        }
        self.verify_next();
        decided
    }

    fn verify_next(&mut self) {
        if let Some(auth) = &mut self.auth
            && auth.current.is_none()
            && let Some((origin, attempt)) = auth.attempts.next()
        {
            auth.verify(origin, attempt);
        }
    }

    /// Takes the bytes by which the verifier woke the loop.
    pub(super) fn verifier_ready(&mut self) {
        if let Some(verifier) = self.auth.as_mut().and_then(|auth| auth.verifier.as_mut()) {
            verifier.drain();
        }
    }

    /// Returns when [`Gate::poll`] or [`Gate::pop_overdue`] is next needed.
    pub(super) fn next_deadline(&self) -> Option<Timestamp> {
        let stranger = self.strangers.first().map(|&(deadline, _)| deadline);
        let failure = self.auth.as_ref().and_then(|auth| auth.attempts.next_deadline());
        stranger.into_iter().chain(failure).min()
    }

    /// Returns a client that has not said in time who it is, or is one too many of those, once.
    pub(super) fn pop_overdue(&mut self, now: Timestamp) -> Option<ClientId> {
        let is_overdue = |&(deadline, _): &(Timestamp, ClientId)| deadline <= now;
        let must_go = self.strangers.len() > STRANGERS_MAX || self.strangers.first().is_some_and(is_overdue);
        let (_, client) = must_go.then(|| self.strangers.pop_first())??;
        Some(client)
    }

    /// Checks whether the client may lock this key.
    ///
    /// # Errors
    /// Why it may not.
    pub(super) fn may_lock(&self, identity: &Identity, key: &Key) -> Result<(), String> {
        let (Some(auth), Some(name)) = (&self.auth, identity.name()) else { return Ok(()) };
        match auth.file.find(name) {
            None => Err(format!("the daemon no longer knows the name {name:?}")),
            Some(rights) if rights.may_lock(key) => Ok(()),
            Some(_) => Err(format!("the name {name:?} may not lock {:?}", key.as_str())),
        }
    }

    /// Returns `true` if a client that sends no key may use the lock with this identity.
    pub(super) fn may_lock_by_id(&self, identity: &Identity, lock: LockId) -> bool {
        let Some(auth) = &self.auth else { return true };
        let rights = identity.name().and_then(|name| auth.file.find(name));
        rights.is_some_and(|rights| rights.may_lock_by_id(lock))
    }

    /// Returns `true` if clients over TCP may have this name.
    pub(super) fn is_name(&self, name: &str) -> bool {
        self.auth.as_ref().is_some_and(|auth| auth.file.find(name).is_some())
    }

    /// Returns `true` if the client may break every lock.
    pub(super) fn is_admin(&self, identity: &Identity) -> bool {
        let rights = identity.name().zip(self.auth.as_ref()).and_then(|(name, auth)| auth.file.find(name));
        rights.is_some_and(Name::is_admin)
    }

    /// Reads the files that have changed.
    fn look(&mut self, now: Timestamp) {
        if now < self.look_at {
            return;
        }
        self.look_at = now.plus(LOOK_EVERY);
        if let Some(auth) = &mut self.auth {
            let read = auth.file.reload_if_changed();
            auth.note(read);
        }
        #[cfg(feature = "tls")]
        if let Some(tls) = &mut self.tls {
            note_certificates(tls.reload_if_changed());
        }
    }

    /// Reads all files again.
    pub(super) fn reload(&mut self) {
        if let Some(auth) = &mut self.auth {
            let read = auth.file.reload().map(|()| true);
            auth.note(read);
        }
        #[cfg(feature = "tls")]
        if let Some(tls) = &mut self.tls {
            note_certificates(tls.reload().map(|()| true));
        }
    }
}

impl Auth {
    fn load(path: &Path) -> Result<Auth, Error> {
        Ok(Auth {
            file: AuthFile::load(path).map_err(Error::Auth)?,
            verified: Verified::new().map_err(|e| Error::Os("draw random bytes", e))?,
            attempts: Attempts::default(),
            verifier: None,
            current: None,
            edition: 0,
        })
    }

    fn verify(&mut self, origin: Origin, attempt: Attempt) {
        let stored = self.file.stored_secret(&attempt.name).cloned();
        if let Some(verifier) = &mut self.verifier {
            verifier.begin(stored, attempt.secret.clone());
        }
        self.current = Some(Current { origin, attempt, edition: self.edition });
    }

    /// Notes that the file of names was read again.
    fn note(&mut self, read: Result<bool, crate::auth::Error>) {
        match read {
            Ok(false) => {}
            Ok(true) => {
                self.verified.clear();
                self.edition += 1;
                info!("read the file of names again");
            }
            Err(e) => warn!("{e}; the names before stay in use"),
        }
    }
}

#[cfg(feature = "tls")]
fn note_certificates(read: Result<bool, crate::tls::Error>) {
    match read {
        Ok(false) => {}
        Ok(true) => info!("read the certificates again"),
        Err(e) => warn!("{e}; the certificates before stay in use"),
    }
}
