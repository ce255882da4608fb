//! Certificates and keys from PEM files.

use std::fmt::Display;
use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::Error;
use crate::config_file;

/// The longest PEM file, in bytes. The bundle of all public authorities has a tenth of that.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Reads all certificates of a file; there is at least one. `option` names the file in errors.
pub(super) fn certificates(option: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let pem = read(option, path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err(bad(option, path, "there is no certificate in it")),
        Ok(found) => Ok(found),
        Err(e) => Err(bad(option, path, format_args!("it is not PEM: {e}"))),
    }
}

/// Reads a private key that is not encrypted.
pub(super) fn key(option: &'static str, path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    let pem = read(option, path)?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|_| {
        let is_encrypted = pem.windows(9).any(|window| window == b"ENCRYPTED");
        bad(option, path, if is_encrypted { "the key in it is encrypted" } else { "there is no key in it" })
    })
}

/// Reads the certificates of authorities.
pub(super) fn authorities(option: &'static str, path: &Path) -> Result<RootCertStore, Error> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(option, path)? {
        store.add(certificate).map_err(|e| bad(option, path, super::error::describe(&e)))?;
    }
    Ok(store)
}

fn read(option: &'static str, path: &Path) -> Result<Vec<u8>, Error> {
    let read = config_file::read(path, FILE_BYTES_MAX);
    let (bytes, _) = read.map_err(|error| Error::Unreadable { option, path: path.into(), error })?;
    Ok(bytes)
}

pub(super) fn bad(option: &'static str, path: &Path, why: impl Display) -> Error {
    Error::Bad { option, path: path.into(), why: why.to_string() }
}
