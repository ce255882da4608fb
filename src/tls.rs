//! TLS 1.3, by rustls: certificates from PEM files, the daemon's end of a connection without its socket, and the client's
//! end with it. Knows nothing of locks, protocols, or the daemon's loop.
//!
//! Only TLS 1.3 is spoken: it has no renegotiation, and every TLS library of the last years has it. There are no session
//! tickets either, since each `kmutex run` is a process of its own.

mod client;
mod error;
mod names;
mod pem;
mod server;
mod session;
#[cfg(test)]
mod tests;

pub use client::{ClientFiles, ClientStream};
pub use error::Error;
pub use server::{ClientCertificates, ServerFiles, ServerTls};
pub use session::{HANDSHAKE_BYTES_MAX, ServerSession, Stream, is_hello};

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;

/// The TLS versions that are spoken.
static VERSIONS: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

/// The cryptography of every TLS connection.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Returns the certificates of the authorities that the system trusts, as OpenSSL finds them; `SSL_CERT_FILE` and
/// `SSL_CERT_DIR` name others. One that cannot be read is left out.
pub(crate) fn system_certificates() -> Vec<CertificateDer<'static>> {
    rustls_native_certs::load_native_certs().certs
}
