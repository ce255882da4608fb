//! The names in a certificate.

use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// The longest name that is taken, in bytes.
const NAME_BYTES_MAX: usize = 256;

/// Returns the names in a certificate that was verified, given as DER: the common name of its subject, then its alternative names
/// (DNS, mail, URI) in their order. Names with control characters, and long ones, are left out.
pub(super) fn of_certificate(der: &[u8]) -> Vec<String> {
    let Ok(certificate) = Certificate::from_der(der) else { return Vec::new() };
    let tbs = certificate.tbs_certificate();
    let common = tbs.subject().common_name().ok().flatten().map(|name| name.value().to_string());
    let alternative = match tbs.get_extension::<SubjectAltName>() {
        Ok(Some((_, names))) => names.0,
        _ => Vec::new(),
    };
    let alternative = alternative.into_iter().filter_map(|name| match name {
        GeneralName::DnsName(name)
        | GeneralName::Rfc822Name(name)
        | GeneralName::UniformResourceIdentifier(name) => Some(name.as_str().to_string()),
        _ => None,
    });
    common.into_iter().chain(alternative).filter(|name| is_fit(name)).collect()
}

fn is_fit(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.contains(char::is_control)
}
