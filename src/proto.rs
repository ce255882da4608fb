//! Both wire protocols: bytes to messages and back, and the words that they share (key, token, nonce, outcome).
//!
//! Pure: nothing here knows of sockets, files, clocks, processes or randomness. The code that reads from a
//! socket passes in the bytes; the code that writes to one takes them from here. `docs/protocol.md` is for
//! implementers of clients.

mod secret;
pub mod text;
pub mod v1;
pub mod v2;

use std::fmt;
use std::num::NonZeroU32;

use md5::{Digest, Md5};
use serde::{Deserialize, Serialize};

pub use secret::{SECRET_BYTES_MAX, Secret};
/// The protocol that a client speaks: that of KeyedMutex 0.06, or kmutex's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
#[non_exhaustive]
pub enum Protocol {
    /// Protocol 1.
    V1,
    /// Protocol 2.
    #[default]
    V2,
}

impl From<Protocol> for u8 {
    fn from(protocol: Protocol) -> u8 {
        match protocol {
            Protocol::V1 => 1,
            Protocol::V2 => 2,
        }
    }
}

impl TryFrom<u8> for Protocol {
    type Error = &'static str;
    fn try_from(number: u8) -> Result<Protocol, &'static str> {
        match number {
            1 => Ok(Protocol::V1),
            2 => Ok(Protocol::V2),
            _ => Err("the protocol is neither 1 nor 2"),
        }
    }
}

/// A process id. (Never 0, which is no process.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Pid(NonZeroU32);

impl Pid {
    /// Returns the process id, or `None` for 0, which stands for "unknown" on the wire and in the journal.
    pub fn new(number: u32) -> Option<Pid> {
        NonZeroU32::new(number).map(Pid)
    }

    /// Returns the number.
    pub fn get(self) -> u32 {
        self.0.get()
    }

    /// Returns the number that stands for `pid` on the wire and in the journal: 0 if it is unknown.
    pub fn number(pid: Option<Pid>) -> u32 {
        pid.map_or(0, Pid::get)
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 1024;

/// What a lock is called: 1 to [`KEY_BYTES_MAX`] bytes of UTF-8.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Key {
    text: Box<str>,
    is_reserved: bool,
}

impl Key {
    /// Takes the text as it is: no trimming, no normal form.
    ///
    /// # Errors
    /// When it is empty or longer than [`KEY_BYTES_MAX`] bytes.
    pub fn new(text: impl Into<Box<str>>) -> Result<Key, KeyError> {
        let text = text.into();
        match text.len() {
            0 => Err(KeyError::Empty),
            1..=KEY_BYTES_MAX => {
                let is_reserved = owner(&text).is_some();
                Ok(Key { text, is_reserved })
            }
            bytes => Err(KeyError::TooLong(bytes)),
        }
    }

    /// The key as it was given.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Returns the user to whom the key belongs by its name: `NAME` of a key that begins with `@NAME/`.
    pub fn owner(&self) -> Option<&str> {
        owner(&self.text)
    }

    /// Notes that the key belongs to some users only (`kmutex serve --reserve`), or that it does not, which changes its
    /// identity. A key with an [owner](Key::owner) always belongs to that.
    #[doc(hidden)]
    pub fn set_reserved(&mut self, is_reserved: bool) {
        self.is_reserved = is_reserved || self.owner().is_some();
    }

    /// The lock's identity: the MD5 of the key's bytes, in both protocols. The identity of a reserved key is one that protocol 1
    /// cannot name ([`LockId::is_reserved`]).
    pub fn id(&self) -> LockId {
        let mut bytes: [u8; 16] = Md5::digest(self.text.as_bytes()).into();
        if self.is_reserved {
            bytes[..LockId::RESERVED.len()].copy_from_slice(&LockId::RESERVED);
        }
        LockId(bytes)
    }
}

fn owner(text: &str) -> Option<&str> {
    Some(text.strip_prefix('@')?.split_once('/')?.0)
}

impl TryFrom<String> for Key {
    type Error = KeyError;
    fn try_from(text: String) -> Result<Key, KeyError> {
        Key::new(text)
    }
}

impl From<Key> for String {
    fn from(key: Key) -> String {
        key.text.into()
    }
}

/// Why a text is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyError {
    /// It has no bytes.
    Empty,
    /// It has this many bytes, which is more than [`KEY_BYTES_MAX`].
    TooLong(usize),
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyError::Empty => write!(f, "the key is empty"),
            KeyError::TooLong(bytes) => {
                write!(f, "the key has {bytes} bytes, the most is {KEY_BYTES_MAX}")
            }
        }
    }
}

impl std::error::Error for KeyError {}

/// The identity of a lock: the MD5 of its key. Protocol 1 sends no more of a key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LockId(pub [u8; 16]);

impl LockId {
    /// What the identity of a reserved key begins with. Behind it are the last twelve bytes of the key's MD5.
    const RESERVED: [u8; 4] = *b"\0km@";

    /// Returns `true` for the identity of a reserved key. Protocol 1, which sends no key, cannot lock it: of the other keys, one
    /// in four thousand million has such an identity.
    pub fn is_reserved(&self) -> bool {
        self.0.starts_with(&LockId::RESERVED)
    }
}

impl fmt::Display for LockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for LockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The fencing token: a number that grows with every grant of a daemon, across its restarts. It stays below 2^53, so
/// that every reader of JSON can hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(pub u64);

impl Token {
    /// The environment variable that tells a command the token of its lock.
    pub const VARIABLE: &str = "KMUTEX_TOKEN";
    /// The one that tells it those of all its locks, with spaces between them, if it has several.
    pub const LIST_VARIABLE: &str = "KMUTEX_TOKENS";
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names one lock request. Sent again, it resumes that request. On the wire: 1 to 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Nonce(pub u128);

impl Nonce {
    /// Returns the nonce under which a daemon keeps the request of a client with this name: sent by a client with another name,
    /// the same nonce means another request.
    pub fn of(self, name: &str) -> Nonce {
        let digest = Md5::new().chain_update(self.0.to_be_bytes()).chain_update(name).finalize();
        Nonce(u128::from_be_bytes(digest.into()))
    }
}

impl TryFrom<String> for Nonce {
    type Error = String;
    fn try_from(text: String) -> Result<Nonce, String> {
        // `from_str_radix` takes a leading sign, the wire does not.
        match u128::from_str_radix(&text, 16) {
            Ok(number) if text.bytes().all(|b| b.is_ascii_hexdigit()) => Ok(Nonce(number)),
            _ => Err("a nonce is 1 to 32 hexadecimal digits".into()),
        }
    }
}

impl From<Nonce> for String {
    fn from(nonce: Nonce) -> String {
        format!("{:032x}", nonce.0)
    }
}

/// How a holder ended, as its waiters are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Outcome {
    /// The command ended with this status.
    Exit(u8),
    /// The command died of this signal.
    Signal(u8),
    /// It is done, and did not say how: a protocol 1 release, or the end of a `kmutex run --no-fork`.
    Unknown,
    /// It went away without releasing: the work may be half done.
    Vanished,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Exit(status) => write!(f, "exit {status}"),
            Outcome::Signal(number) => write!(f, "signal {number}"),
            Outcome::Unknown => f.write_str("unknown"),
            Outcome::Vanished => f.write_str("vanished"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_of_a_key_is_its_md5() {
        // RFC 1321, appendix A.5.
        let key = Key::new("message digest").unwrap();
        assert_eq!(key.id().to_string(), "f96b697d7cb7938d525a2f31aaf161d0");
    }

    #[test]
    fn a_reserved_key_has_an_identity_of_its_own() {
        let id = |text: &str| Key::new(text).unwrap().id();
        for text in ["@bob/backup", "@bob/", "@/x", "@1000/a/b"] {
            assert!(id(text).is_reserved(), "{text}");
            assert_eq!(id(text).0[4..], Md5::digest(text.as_bytes())[4..], "{text}");
        }
        assert_ne!(id("@bob/backup"), id("@bob/restore"));
        for text in ["@bob", "bob/x", "a@bob/x", "message digest"] {
            assert_eq!(id(text).0[..], Md5::digest(text.as_bytes())[..], "{text}");
            let mut key = Key::new(text).unwrap();
            key.set_reserved(true);
            assert!(key.id().is_reserved(), "{text}");
        }
        let mut owned = Key::new("@bob/x").unwrap();
        owned.set_reserved(false);
        assert!(owned.id().is_reserved());
        assert!(!LockId(v2::PREAMBLE).is_reserved());
    }

    #[test]
    fn the_owner_of_a_key_stands_before_the_first_slash() {
        let owner = |text: &str| Key::new(text).unwrap().owner().map(String::from);
        assert_eq!(owner("@bob/a/b").as_deref(), Some("bob"));
        assert_eq!(owner("@/x").as_deref(), Some(""));
        assert_eq!([owner("@bob"), owner("bob/x"), owner(" @bob/x")], [None, None, None]);
    }

    #[test]
    fn a_key_has_1_to_1024_bytes() {
        assert_eq!(Key::new(""), Err(KeyError::Empty));
        assert!(Key::new("k".repeat(1024)).is_ok());
        assert_eq!(Key::new("k".repeat(1025)), Err(KeyError::TooLong(1025)));
        assert_eq!(Key::new("é".repeat(513)), Err(KeyError::TooLong(1026)));
    }

    #[test]
    fn a_nonce_is_another_one_for_each_name() {
        let nonce = Nonce(7);
        assert_eq!(nonce.of("ci"), nonce.of("ci"));
        assert_ne!(nonce.of("ci"), nonce.of("ops"));
        assert_ne!(nonce.of("ci"), Nonce(8).of("ci"));
        assert_ne!(nonce.of(""), nonce);
    }

    #[test]
    fn a_nonce_is_hexadecimal_digits_only() {
        assert_eq!(Nonce::try_from("00ff".to_string()), Ok(Nonce(255)));
        for bad in ["", "+1", "-1", "x", &"1".repeat(33)] {
            assert!(Nonce::try_from(bad.to_string()).is_err(), "{bad:?}");
        }
    }
}
