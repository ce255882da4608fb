//! What can be wrong with certificates, and with the other end.

use std::fmt;
use std::io;
use std::path::PathBuf;

use rustls::{AlertDescription, CertificateError};

use crate::addr::Reason;
use crate::exit::Exit;

/// Why there is no TLS, or no more of it.
#[derive(Debug)]
pub enum Error {
    /// A file cannot be read.
    Unreadable {
        /// The option that names it.
        option: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file has not in it what it should have.
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
    /// The system has no authorities, and no file of them was named.
    NoAuthorities,
    /// The host of an address is neither a name nor a number that a certificate could have.
    BadHost(String),
    /// The certificate of the other end is not to be trusted.
    Untrusted(String),
    /// The other end does not take our certificate, or wants one.
    Refused(String),
    /// The other end does not speak TLS, or not as it should.
    Protocol(String),
    /// The other end closed the connection before it was secure.
    Closed,
    /// It was not secure in time.
    TimedOut,
    /// The kernel refused something.
    Io(io::Error),
}

impl Error {
    /// Returns `true` if a file or an option of this end is at fault, and the error names it.
    pub fn is_local(&self) -> bool {
        matches!(
            self,
            Error::Unreadable { .. } | Error::Bad { .. } | Error::Missing { .. } | Error::NoAuthorities
        )
    }

    /// Returns `true` if another attempt may succeed: the other end may just have been restarted.
    pub fn is_passing(&self) -> bool {
        matches!(self, Error::Closed | Error::TimedOut | Error::Io(_))
    }

    /// Returns the exit code for this error.
    pub fn exit(&self) -> Exit {
        match self {
            Error::Unreadable { .. } | Error::Bad { .. } | Error::Missing { .. } => Exit::Usage,
            Error::NoAuthorities | Error::BadHost(_) => Exit::Usage,
            Error::Untrusted(_) | Error::Refused(_) => Exit::NotPermitted,
            Error::Protocol(_) => Exit::Protocol,
            Error::Closed | Error::TimedOut => Exit::Unavailable,
            Error::Io(_) => Exit::Os,
        }
    }
}

impl From<rustls::Error> for Error {
    fn from(error: rustls::Error) -> Error {
        match &error {
            rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => {
                Error::Untrusted(describe(&error))
            }
            rustls::Error::AlertReceived(alert) if is_about_certificates(*alert) => {
                Error::Refused(describe(&error))
            }
            _ => Error::Protocol(describe(&error)),
        }
    }
}

/// The alerts by which the other end says what it thinks of our certificate (RFC 8446, 6.2).
fn is_about_certificates(alert: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(
        alert,
        A::BadCertificate
            | A::UnsupportedCertificate
            | A::CertificateRevoked
            | A::CertificateExpired
            | A::CertificateUnknown
            | A::UnknownCA
            | A::AccessDenied
            | A::DecryptError
            | A::CertificateRequired
    )
}

/// An error of rustls in the words of a user.
pub(super) fn describe(error: &rustls::Error) -> String {
    use rustls::Error as E;
    match error {
        E::InvalidCertificate(error) => describe_certificate(error),
        E::AlertReceived(AlertDescription::CertificateRequired) => "it wants a certificate".into(),
        E::AlertReceived(AlertDescription::CertificateExpired) => "the certificate has expired".into(),
        E::AlertReceived(AlertDescription::UnknownCA) => {
            "the certificate is signed by no authority that it knows".into()
        }
        E::AlertReceived(AlertDescription::DecryptError) => {
            "the certificate is not signed by the authority that it names".into()
        }
        E::AlertReceived(AlertDescription::ProtocolVersion) => "it does not speak TLS 1.3".into(),
        E::AlertReceived(AlertDescription::UnexpectedMessage) => "it does not speak TLS".into(),
        E::AlertReceived(alert) => format!("it says {alert:?}"),
        E::InvalidMessage(_) | E::InappropriateMessage { .. } => "it does not speak TLS".into(),
        E::PeerIncompatible(_) => "it does not speak TLS 1.3".into(),
        E::InconsistentKeys(_) => "the key does not belong to the certificate".into(),
        E::NoCertificatesPresented => "it has no certificate".into(),
        other => one_line(&other.to_string()),
    }
}

fn describe_certificate(error: &CertificateError) -> String {
    use CertificateError as C;
    match error {
        C::Expired | C::ExpiredContext { .. } => "its certificate has expired".into(),
        C::NotValidYet | C::NotValidYetContext { .. } => "its certificate is not valid yet".into(),
        C::UnknownIssuer => "its certificate is signed by no authority that is trusted here".into(),
        C::BadSignature => "its certificate is not signed by the authority that it names".into(),
        C::NotValidForName => "its certificate is for another host".into(),
        C::NotValidForNameContext { expected, presented } => {
            let presented = one_line(&presented.join(", "));
            let expected = expected.to_str();
            match presented.is_empty() {
                true => format!("its certificate names no host, and not {expected}"),
                false => format!("its certificate is not for {expected}, but for {presented}"),
            }
        }
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => {
            "its certificate is for another purpose (extendedKeyUsage)".into()
        }
        C::Revoked => "its certificate is revoked".into(),
        C::Other(other) => match other.to_string() {
            why if why.contains("CaUsedAsEndEntity") => {
                "its certificate is that of an authority (CA:TRUE), which may sign others and nothing else"
                    .into()
            }
            why if why.contains("UnsupportedCertVersion") => {
                "its certificate is not of version 3 (it needs a subjectAltName)".into()
            }
            why => one_line(&why),
        },
        other => one_line(&other.to_string()),
    }
}

/// What the other end has a part in goes to a terminal or a log: as one line, and not a long one.
fn one_line(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unreadable { option, path, error } => {
                write!(f, "cannot read {option} {}: {}", path.display(), Reason(error))
            }
            Error::Bad { option, path, why } => write!(f, "cannot use {option} {}: {why}", path.display()),
            Error::Missing { option, missing } => write!(f, "{option} needs {missing}"),
            Error::NoAuthorities => {
                f.write_str("this system has no certificates of authorities: name some with --tls-ca")
            }
            Error::BadHost(host) => write!(f, "no certificate can be for the host {host:?}"),
            Error::Untrusted(why) | Error::Refused(why) | Error::Protocol(why) => f.write_str(why),
            Error::Closed => f.write_str("it closed the connection in the TLS handshake"),
            Error::TimedOut => f.write_str("it did not finish the TLS handshake in time"),
            Error::Io(error) => Reason(error).fmt(f),
        }
    }
}

impl std::error::Error for Error {}
