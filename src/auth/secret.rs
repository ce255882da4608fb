//! Secrets: hashed by Argon2id (RFC 9106), which takes tens of milliseconds and megabytes by design.

use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Argon2, Params};

use super::random;
use crate::addr::Reason;
use crate::proto::Secret;

/// The most memory that one verification may take, in KiB.
const MEMORY_KIB_MAX: u32 = 256 * 1024;
/// The most work that one verification may take, in passes over that memory.
const PASSES_MAX: u32 = 32;

/// Returns the hash of a secret, with a random salt, as a line of the file of names has it.
///
/// # Errors
/// If the kernel gives no random bytes.
pub fn hash(secret: &Secret) -> Result<String, String> {
    let mut salt = [0; 16];
    random::fill(&mut salt).map_err(|e| Reason(&e).to_string())?;
    let hash = Argon2::default().hash_password_with_salt(secret.as_bytes(), &salt);
    Ok(hash.map_err(|e| e.to_string())?.to_string())
}

/// The hash of a secret, as the file of names has it.
#[derive(Clone, Debug)]
pub(crate) struct StoredSecret(PasswordHash);

impl StoredSecret {
    /// # Errors
    /// Why the text is not such a hash.
    pub(super) fn parse(text: &str) -> Result<StoredSecret, &'static str> {
        const BAD: &str = "the secret is not a hash of kmutex hash-secret";
        let hash = PasswordHash::new(text).map_err(|_| BAD)?;
        if !hash.algorithm.as_str().starts_with("argon2") || hash.salt.is_none() || hash.hash.is_none() {
            return Err(BAD);
        }
        let params = Params::try_from(&hash).map_err(|_| BAD)?;
        if params.m_cost() > MEMORY_KIB_MAX || params.t_cost() > PASSES_MAX {
            return Err("the hash of the secret takes more than 256 MiB or 32 passes to verify");
        }
        Ok(StoredSecret(hash))
    }

    /// Returns a hash that belongs to no secret and takes as long to verify as this one.
    pub(super) fn decoy(&self) -> StoredSecret {
        let mut decoy = self.clone();
        let length = decoy.0.hash.as_ref().map_or(32, |hash| hash.len());
        // Zeros are the hash of no secret that could be found.
        decoy.0.hash = argon2::password_hash::phc::Output::new(&vec![0; length]).ok();
        decoy
    }

    /// Returns `true` if it is the hash of this secret. Slow.
    pub(crate) fn verify(&self, secret: &Secret) -> bool {
        Argon2::default().verify_password(secret.as_bytes(), &self.0).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> Secret {
        Secret::new(text).unwrap()
    }

    #[test]
    fn a_hash_fits_its_secret_and_no_other() {
        let text = hash(&secret("open sesame")).unwrap();
        assert_ne!(text, hash(&secret("open sesame")).unwrap(), "the salt is random");
        assert!(!text.contains(' ') && !text.contains("sesame"));
        let stored = StoredSecret::parse(&text).unwrap();
        assert!(stored.verify(&secret("open sesame")));
        assert!(!stored.verify(&secret("open Sesame")));
        assert!(!stored.decoy().verify(&secret("open sesame")));
    }

    #[test]
    fn what_hash_secret_does_not_make_is_refused() {
        let good = hash(&secret("x")).unwrap();
        let costly = good.replace("m=19456", "m=1000000");
        let slow = good.replace("t=2", "t=1000");
        for bad in ["", "secret", "$1$salt$hash", "$argon2id$v=19$m=19456,t=2,p=1", &costly, &slow] {
            assert!(StoredSecret::parse(bad).is_err(), "{bad}");
        }
    }
}
