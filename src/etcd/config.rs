//! Where etcd is, and how kmutex identifies itself there: the options as the user gave them, and the certificates that they
//! name.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig};

use super::Endpoint;
use super::error::lower;
use crate::addr::Reason;
use crate::tls;

const CA: &str = "--etcd-ca";
const CERT: &str = "--etcd-cert";
const KEY: &str = "--etcd-key";
const PASSWORD_FILE: &str = "--etcd-password-file";

/// How long one attempt at one endpoint takes at most, unless the user says otherwise.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(1);

/// Where etcd is, and how the client identifies itself there.
#[derive(Clone, Debug)]
pub struct Config {
    /// The members, any of which may answer.
    pub endpoints: Vec<Endpoint>,
    /// A PEM file with the certificates of the authorities that may have signed the members'. `None`: those of the system.
    pub ca: Option<PathBuf>,
    /// A PEM file with the client certificate, followed by the intermediate certificates.
    pub cert: Option<PathBuf>,
    /// A PEM file with the key of that certificate.
    pub key: Option<PathBuf>,
    /// The etcd user. `None`: etcd has no users.
    pub user: Option<User>,
    /// How long one attempt at one endpoint may take ([`TIMEOUT_DEFAULT`]).
    pub timeout: Duration,
}

/// A user of etcd's.
#[derive(Clone)]
pub struct User {
    /// The name.
    pub name: String,
    /// The password.
    pub password: String,
}

impl User {
    /// Returns the user `name`, whose password is the first line of a file.
    ///
    /// # Errors
    /// [`ConfigError::Unreadable`].
    pub fn with_password_file(name: String, path: &Path) -> Result<User, ConfigError> {
        let text = fs::read_to_string(path).map_err(|error| ConfigError::Unreadable {
            option: PASSWORD_FILE,
            path: path.into(),
            error,
        })?;
        Ok(User { name, password: text.lines().next().unwrap_or_default().into() })
    }
}

impl fmt::Debug for User {
    /// Leaves out the password, because debug output ends up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Reads the certificates. Refuses a configuration that could not work later.
pub(super) fn tls(config: &Config) -> Result<TlsConfig, ConfigError> {
    let files = [(CA, &config.ca), (CERT, &config.cert), (KEY, &config.key)];
    let given = files.iter().find(|(_, path)| path.is_some());
    if !config.endpoints.iter().any(Endpoint::is_tls) {
        return match given {
            Some((option, _)) => Err(ConfigError::NothingEncrypted { option }),
            None => Ok(TlsConfig::default()),
        };
    }
    let roots = match &config.ca {
        Some(path) => authorities(path)?,
        None => system_authorities()?,
    };
    let mut tls = TlsConfig::builder().root_certs(roots).unversioned_rustls_crypto_provider(tls::provider());
    match (&config.cert, &config.key) {
        (Some(cert), Some(key)) => tls = tls.client_cert(Some(client_cert(cert, key)?)),
        (Some(_), None) => return Err(ConfigError::Missing { option: CERT, missing: KEY }),
        (None, Some(_)) => return Err(ConfigError::Missing { option: KEY, missing: CERT }),
        (None, None) => {}
    }
    Ok(tls.build())
}

fn authorities(path: &Path) -> Result<RootCerts, ConfigError> {
    let ders = certificates(CA, path)?;
    let mut store = RootCertStore::empty();
    for der in &ders {
        store.add(der.clone()).map_err(|e| bad(CA, path, e))?;
    }
    Ok(RootCerts::from(ders.iter().map(certificate)))
}

fn system_authorities() -> Result<RootCerts, ConfigError> {
    let ders = tls::system_certificates();
    if ders.is_empty() {
        Err(ConfigError::NoAuthorities)
    } else {
        Ok(RootCerts::from(ders.iter().map(certificate)))
    }
}

fn client_cert(cert: &Path, key: &Path) -> Result<ClientCert, ConfigError> {
    let ders = certificates(CERT, cert)?;
    let chain: Vec<Certificate<'static>> = ders.iter().map(certificate).collect();
    let pem = read(KEY, key)?;
    let der = PrivateKeyDer::from_pem_slice(&pem).map_err(|_| bad(KEY, key, "there is no key in it"))?;
    // ureq panics at the first connection if the key does not belong to the certificate.
    CertifiedKey::from_der(ders, der, &tls::provider()).map_err(|e| bad(KEY, key, e))?;
    let key = PrivateKey::from_pem(&pem).map_err(|e| bad(KEY, key, e))?;
    Ok(ClientCert::new_with_certs(&chain, key))
}

fn certificates(option: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let pem = read(option, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err(bad(option, path, "there is no certificate in it")),
        Ok(found) => Ok(found),
        Err(e) => Err(bad(option, path, e)),
    }
}

fn certificate(der: &CertificateDer<'_>) -> Certificate<'static> {
    Certificate::from_der(der).to_owned()
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, ConfigError> {
    fs::read(path).map_err(|error| ConfigError::Unreadable { option, path: path.into(), error })
}

fn bad(option: &'static str, path: &Path, why: impl fmt::Display) -> ConfigError {
    ConfigError::Bad { option, path: path.into(), why: why.to_string() }
}

/// What is wrong with a [`Config`].
#[derive(Debug)]
pub enum ConfigError {
    /// There is no endpoint.
    NoEndpoint,
    /// The system has no authorities, and no file of them was named.
    NoAuthorities,
    /// A file cannot be read.
    Unreadable {
        /// The option that names it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file does not contain what it should.
    Bad {
        /// The option that names it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A certificate without a key, or a key without a certificate.
    Missing {
        /// The option that was given.
        option: &'static str,
        /// The one that it needs.
        missing: &'static str,
    },
    /// An option for https without an https endpoint: the user believes that the connection is encrypted, and it is not.
    NothingEncrypted {
        /// The option.
        option: &'static str,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConfigError::NoEndpoint => f.write_str("there is no etcd endpoint"),
            ConfigError::NoAuthorities => {
                f.write_str("this system has no certificates of authorities: name some with --etcd-ca")
            }
            ConfigError::Unreadable { option, path, error } => {
                let why = lower(&Reason(error).to_string());
                write!(f, "cannot read {option} {}: {why}", path.display())
            }
            ConfigError::Bad { option, path, why } => {
                write!(f, "cannot use {option} {}: {why}", path.display())
            }
            ConfigError::Missing { option, missing } => write!(f, "{option} needs {missing}"),
            ConfigError::NothingEncrypted { option } => {
                write!(f, "{option} needs an https endpoint, and there is none")
            }
        }
    }
}

impl std::error::Error for ConfigError {}
