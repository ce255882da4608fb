//! The daemon's certificates: read at the start, and again when their files have changed.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};

use super::pem::{authorities, bad, certificates, key};
use super::{Error, ServerSession, VERSIONS, error, provider};
use crate::config_file::Stamp;

const CERT: &str = "--tls-cert";
const KEY: &str = "--tls-key";
const CLIENT_CA: &str = "--tls-client-ca";

/// The PEM files of a daemon.
#[derive(Clone, Debug)]
pub struct ServerFiles {
    /// Its certificate, and behind it those between it and the authority.
    pub cert: PathBuf,
    /// The key of that certificate.
    pub key: PathBuf,
    /// The authorities that may have signed the clients' certificates. `None`: clients are not asked for one.
    pub client_ca: Option<PathBuf>,
}

/// What becomes of a client that shows no certificate, where the daemon asks for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientCertificates {
    /// The handshake fails.
    Required,
    /// The client may make itself known in another way.
    Optional,
}

/// What a daemon needs to begin TLS sessions.
#[derive(Debug)]
pub struct ServerTls {
    files: ServerFiles,
    clients: ClientCertificates,
    config: Arc<ServerConfig>,
    stamps: [Stamp; 3],
}

impl ServerTls {
    /// Reads the files.
    ///
    /// # Errors
    /// When one cannot be read or used; the error names the option and the file.
    pub fn load(files: ServerFiles, clients: ClientCertificates) -> Result<ServerTls, Error> {
        let stamps = stamps(&files);
        let config = Arc::new(config(&files, clients)?);
        Ok(ServerTls { files, clients, config, stamps })
    }

    /// Reads the files again, if one has changed since they were read. Returns `true` if they are in use now. What has begun
    /// goes on with the files before.
    ///
    /// # Errors
    /// When they cannot be used: those before stay in use, and the error comes once for each change.
    pub fn reload_if_changed(&mut self) -> Result<bool, Error> {
        let stamps = stamps(&self.files);
        if stamps == self.stamps {
            return Ok(false);
        }
        // Taken before the files are read, so that a change meanwhile is seen the next time.
        self.stamps = stamps;
        self.reload()?;
        Ok(true)
    }

    /// Reads the files again.
    ///
    /// # Errors
    /// When they cannot be used: those before stay in use.
    pub fn reload(&mut self) -> Result<(), Error> {
        self.config = Arc::new(config(&self.files, self.clients)?);
        Ok(())
    }

    /// Begins a session with a client that has just connected.
    ///
    /// # Errors
    /// When rustls refuses its configuration, which it does not once that is loaded.
    pub fn begin(&self) -> Result<ServerSession, Error> {
        ServerSession::new(self.config.clone())
    }
}

fn stamps(files: &ServerFiles) -> [Stamp; 3] {
    let client_ca = files.client_ca.as_deref().map_or(Stamp::default(), Stamp::of);
    [Stamp::of(&files.cert), Stamp::of(&files.key), client_ca]
}

fn config(files: &ServerFiles, clients: ClientCertificates) -> Result<ServerConfig, Error> {
    let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(VERSIONS)?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(authorities(CLIENT_CA, path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
            let verifier = match clients {
                ClientCertificates::Required => verifier,
                ClientCertificates::Optional => verifier.allow_unauthenticated(),
            };
            builder.with_client_cert_verifier(verifier.build().map_err(|e| bad(CLIENT_CA, path, e))?)
        }
    };
    let chain = certificates(CERT, &files.cert)?;
    let key = key(KEY, &files.key)?;
    let built = builder.with_single_cert(chain, key);
    let mut config = built.map_err(|e| bad(KEY, &files.key, error::describe(&e)))?;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}
