//! The name and the secret of a client, from a file that no other user can read.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Error;
use crate::config_file;
use crate::proto::{SECRET_BYTES_MAX, Secret};

/// The longest file, in bytes.
const FILE_BYTES_MAX: u64 = 4 * SECRET_BYTES_MAX as u64;

/// A name and its secret.
#[derive(Clone, Debug)]
pub(super) struct Credentials {
    pub(super) name: String,
    pub(super) secret: Secret,
}

impl Credentials {
    /// Reads a file with one line `NAME SECRET`; empty lines and lines that begin with `#` do not count.
    pub(super) fn read(path: &Path) -> Result<Credentials, Error> {
        let bad = |why: &str| bad_file(path, io::Error::new(io::ErrorKind::InvalidData, why));
        let (bytes, metadata) = config_file::read(path, FILE_BYTES_MAX).map_err(|e| bad_file(path, e))?;
        let mode = metadata.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(Error::ExposedAuthFile { path: path.into(), mode });
        }
        let text = String::from_utf8(bytes).map_err(|_| bad("it is not UTF-8"))?;
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let line = lines.next().ok_or_else(|| bad("there is no line NAME SECRET in it"))?;
        if lines.next().is_some() {
            return Err(bad("there is more than one line NAME SECRET in it"));
        }
        let (name, secret) = line
            .split_once(char::is_whitespace)
            .ok_or_else(|| bad("the secret behind the name is missing"))?;
        Ok(Credentials { name: name.into(), secret: Secret::new(secret.trim()).map_err(bad)? })
    }
}

fn bad_file(path: &Path, error: io::Error) -> Error {
    Error::AuthFile { path: PathBuf::from(path), error }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn read(text: &str, mode: u32) -> Result<Credentials, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("auth");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        Credentials::read(&path)
    }

    #[test]
    fn a_file_has_a_name_and_a_secret() {
        let credentials = read("# mine\n\nci  open sesame \n", 0o600).unwrap();
        assert_eq!(credentials.name, "ci");
        assert_eq!(credentials.secret, Secret::new("open sesame").unwrap());
        assert!(!format!("{credentials:?}").contains("sesame"));
        for bad in ["", "# only a comment", "ci", "ci secret\nops secret", "ci a\u{1}b"] {
            let error = read(bad, 0o600).unwrap_err();
            assert_eq!(error.exit(), crate::exit::Exit::Usage, "{bad:?}");
            assert!(!error.to_string().contains("secret\n"), "{error}");
        }
    }

    #[test]
    fn a_file_that_other_users_may_read_or_write_is_refused() {
        for mode in [0o640, 0o604, 0o620, 0o644, 0o601] {
            let error = read("ci secret", mode).unwrap_err();
            assert!(error.to_string().contains("chmod 600"), "{mode:o}: {error}");
            assert_eq!(error.exit(), crate::exit::Exit::NotPermitted);
        }
        assert!(read("ci secret", 0o400).is_ok());
    }
}
