//! The file of names: a line `NAME SECRET [PATTERN...]` for each.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::patterns::Patterns;
use super::{NAME_BYTES_MAX, StoredSecret};
use crate::addr::Reason;
use crate::config_file::{self, Stamp};
use crate::proto::{Key, LockId};

/// The longest file, in bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// Stands where a secret would: the name is for certificates only.
const NO_SECRET: &str = "-";

/// The names that a daemon knows, as its file has them.
#[derive(Debug)]
pub struct AuthFile {
    path: PathBuf,
    stamp: Stamp,
    names: HashMap<Box<str>, Name>,
    /// What the secret of an unknown name is verified against, so that it takes as long as for one that is known.
    decoy: Option<StoredSecret>,
}

/// What a name may do.
#[derive(Clone, Debug)]
pub struct Name {
    secret: Option<StoredSecret>,
    patterns: Patterns,
}

impl AuthFile {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read, other users may write to it, or a line of it is wrong.
    pub fn load(path: &Path) -> Result<AuthFile, Error> {
        let mut file =
            AuthFile { path: path.into(), stamp: Stamp::default(), names: HashMap::new(), decoy: None };
        file.reload()?;
        Ok(file)
    }

    /// Reads the file again if it has changed since it was read. Returns `true` if the new one is in use.
    ///
    /// # Errors
    /// As [`AuthFile::load`]: the names before stay in use, and the error comes once for each change.
    pub fn reload_if_changed(&mut self) -> Result<bool, Error> {
        if Stamp::of(&self.path) == self.stamp {
            return Ok(false);
        }
        self.reload()?;
        Ok(true)
    }

    /// Reads the file again.
    ///
    /// # Errors
    /// As [`AuthFile::load`]: the names before stay in use.
    pub fn reload(&mut self) -> Result<(), Error> {
        // The stamp is taken before the file is read, so that a change meanwhile is seen the next time.
        self.stamp = Stamp::of(&self.path);
        let error = |why| Error { path: self.path.clone(), why };
        let unreadable = |e: io::Error| error(Why::Unreadable(e));
        let (bytes, metadata) = config_file::read(&self.path, FILE_BYTES_MAX).map_err(unreadable)?;
        if metadata.mode() & 0o002 != 0 {
            return Err(error(Why::Writable));
        }
        let text = String::from_utf8(bytes)
            .map_err(|_| unreadable(io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8")))?;
        let names = parse(&text).map_err(|(line, why)| error(Why::Line(line, why)))?;
        self.decoy = names.values().find_map(|name| name.secret.as_ref()).map(StoredSecret::decoy);
        self.names = names;
        Ok(())
    }

    /// Returns what a name may do; `None`: there is no such name.
    pub fn find(&self, name: &str) -> Option<&Name> {
        self.names.get(name)
    }

    /// Returns what to verify the secret of `name` against, which no secret fits if there is no such name. `None`: no name in
    /// the file has a secret.
    pub(crate) fn stored_secret(&self, name: &str) -> Option<&StoredSecret> {
        self.find(name).and_then(|name| name.secret.as_ref()).or(self.decoy.as_ref())
    }
}

impl Name {
    /// Returns `true` if the name may lock this key.
    pub fn may_lock(&self, key: &Key) -> bool {
        self.patterns.admit(key)
    }

    /// Returns `true` if the name may use this lock, of which only the identity is known. That is so if it may lock every key,
    /// or one of its patterns is the key itself.
    pub fn may_lock_by_id(&self, lock: LockId) -> bool {
        self.patterns.admit_lock(lock)
    }

    /// Returns `true` if the name may break every lock.
    pub fn is_admin(&self) -> bool {
        self.patterns.is_admin()
    }
}

fn parse(text: &str) -> Result<HashMap<Box<str>, Name>, (usize, String)> {
    let mut names = HashMap::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (name, rights) = parse_line(line).map_err(|why| (index + 1, why))?;
        if names.insert(name.into(), rights).is_some() {
            return Err((index + 1, format!("the name {name:?} is there twice")));
        }
    }
    Ok(names)
}

fn parse_line(line: &str) -> Result<(&str, Name), String> {
    let mut words = line.split_whitespace();
    let name = words.next().unwrap_or_default();
    if name.len() > NAME_BYTES_MAX || name.contains(char::is_control) {
        return Err(format!("a name has at most {NAME_BYTES_MAX} bytes and no control characters"));
    }
    let secret = match words.next() {
        None => return Err("the secret is missing (`-`: the name is for certificates only)".into()),
        Some(NO_SECRET) => None,
        // The line has a secret in it, so the message must not quote it.
        Some(text) => Some(StoredSecret::parse(text)?),
    };
    Ok((name, Name { secret, patterns: Patterns::parse(words)? }))
}

/// Why the file of names cannot be used.
#[derive(Debug)]
pub struct Error {
    path: PathBuf,
    why: Why,
}

#[derive(Debug)]
enum Why {
    Unreadable(io::Error),
    Writable,
    Line(usize, String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match &self.why {
            Why::Unreadable(error) => write!(f, "cannot read --auth-file {path}: {}", Reason(error)),
            Why::Writable => write!(f, "not using --auth-file {path}: every user may write to it"),
            Why::Line(line, why) => write!(f, "cannot use --auth-file {path}: line {line}: {why}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.why {
            Why::Unreadable(error) => Some(error),
            Why::Writable | Why::Line(..) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::auth::hash;
    use crate::proto::Secret;

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("auth");
        fs::write(&path, text).unwrap();
        (folder, path)
    }

    fn error_of(text: &str) -> String {
        let (_folder, path) = file(text);
        AuthFile::load(&path).unwrap_err().to_string()
    }

    #[test]
    fn each_line_gives_a_name_its_secret_and_its_keys() {
        let secret = Secret::new("s3cret").unwrap();
        let hashed = hash(&secret).unwrap();
        let (_folder, path) = file(&format!("# comment\n\n  ci {hashed} deploy/* \nops - !admin\n"));
        let file = AuthFile::load(&path).unwrap();
        let ci = file.find("ci").unwrap();
        assert!(ci.may_lock(&Key::new("deploy/x").unwrap()) && !ci.may_lock(&Key::new("x").unwrap()));
        assert!(!ci.is_admin() && file.find("ops").unwrap().is_admin());
        assert!(file.find("stranger").is_none());
        assert!(file.stored_secret("ci").unwrap().verify(&secret));
        for other in ["ops", "stranger"] {
            assert!(!file.stored_secret(other).unwrap().verify(&secret), "{other}");
        }
    }

    #[test]
    fn a_bad_line_is_named_without_its_secret() {
        assert!(error_of("ci").contains("line 1: the secret is missing"));
        let error = error_of("# x\nci hunter2");
        assert!(error.contains("line 2: ") && !error.contains("hunter2"), "{error}");
        assert!(error_of("ci - !boss").contains("!admin"));
        assert!(error_of("a -\na -").contains("line 2: the name \"a\" is there twice"));
        assert!(error_of(&format!("{} -", "n".repeat(257))).contains("at most 256 bytes"));
    }

    #[test]
    fn a_file_that_every_user_may_write_is_refused() {
        let (_folder, path) = file("ci -");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o646)).unwrap();
        assert!(AuthFile::load(&path).unwrap_err().to_string().contains("every user may write"));
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_bad_one_changes_nothing() {
        let (_folder, path) = file("old -");
        let mut file = AuthFile::load(&path).unwrap();
        assert!(!file.reload_if_changed().unwrap());
        fs::write(&path, "newer -").unwrap();
        assert!(file.reload_if_changed().unwrap());
        assert!(file.find("newer").is_some() && file.find("old").is_none());
        fs::write(&path, "broken").unwrap();
        assert!(file.reload_if_changed().is_err());
        assert!(!file.reload_if_changed().unwrap(), "the error comes once");
        assert!(file.find("newer").is_some());
    }
}
