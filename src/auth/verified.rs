//! Secrets that were verified already, so that a client that connects for every command is not made to wait each time.
//! Only a keyed hash of each is kept, under a key that exists in this process alone.

use std::collections::HashMap;
use std::io;

use blake2::Blake2sMac256;
use blake2::digest::{KeyInit, Mac};

use super::random;
use crate::proto::Secret;

pub(crate) struct Verified {
    key: [u8; 32],
    by_name: HashMap<Box<str>, Blake2sMac256>,
}

impl Verified {
    /// # Errors
    /// If the kernel gives no random bytes.
    pub(crate) fn new() -> io::Result<Verified> {
        let mut key = [0; 32];
        random::fill(&mut key)?;
        Ok(Verified { key, by_name: HashMap::new() })
    }

    /// Remembers that this is the secret of `name`. There are never more of them than names.
    pub(crate) fn insert(&mut self, name: &str, secret: &Secret) {
        self.by_name.insert(name.into(), self.mac(secret));
    }

    /// Returns `true` if this secret of `name` was verified. Compares in constant time.
    pub(crate) fn contains(&self, name: &str, secret: &Secret) -> bool {
        let known = self.by_name.get(name);
        known.is_some_and(|known| known.clone().verify(&self.mac(secret).finalize().into_bytes()).is_ok())
    }

    /// Forgets all of them: the file of names was read again.
    pub(crate) fn clear(&mut self) {
        self.by_name.clear();
    }

    fn mac(&self, secret: &Secret) -> Blake2sMac256 {
        let mut mac = Blake2sMac256::new_from_slice(&self.key).expect("BLAKE2s takes a key of 32 bytes");
        mac.update(secret.as_bytes());
        mac
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_verified_secret_of_a_name_is_known() {
        let mut verified = Verified::new().unwrap();
        let (good, bad) = (Secret::new("good").unwrap(), Secret::new("bad").unwrap());
        assert!(!verified.contains("ci", &good));
        verified.insert("ci", &good);
        assert!(verified.contains("ci", &good));
        assert!(!verified.contains("ci", &bad));
        assert!(!verified.contains("other", &good));
        verified.clear();
        assert!(!verified.contains("ci", &good));
    }
}
