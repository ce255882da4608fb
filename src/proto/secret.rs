//! The secret of a name.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The longest secret, in bytes.
pub const SECRET_BYTES_MAX: usize = 1024;

/// A secret as a client gives it. It is never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Secret(Box<str>);

impl Secret {
    /// Takes a secret of 1 to [`SECRET_BYTES_MAX`] bytes, without control characters and without blanks at its ends (a file
    /// could not tell them from its own).
    ///
    /// # Errors
    /// Why the text is not a secret.
    pub fn new(text: &str) -> Result<Secret, &'static str> {
        match text.len() {
            0 => Err("the secret is empty"),
            1..=SECRET_BYTES_MAX if text.contains(char::is_control) => {
                Err("the secret has a control character")
            }
            1..=SECRET_BYTES_MAX if text.trim() != text => Err("the secret begins or ends with a blank"),
            1..=SECRET_BYTES_MAX => Ok(Secret(text.into())),
            _ => Err("the secret has more than 1024 bytes"),
        }
    }

    #[cfg(feature = "daemon")]
    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl TryFrom<String> for Secret {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Secret, &'static str> {
        Secret::new(&text)
    }
}

impl From<Secret> for String {
    fn from(secret: Secret) -> String {
        secret.0.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_one_line_without_blanks_around_it() {
        for bad in ["", " x", "x ", "a\nb", "a\0b", &"x".repeat(1025)] {
            assert!(Secret::new(bad).is_err(), "{bad:?}");
        }
        assert!(Secret::new("with blanks inside, ünïcode").is_ok());
        assert_eq!(format!("{:?}", Secret::new("hidden").unwrap()), "Secret(…)");
    }
}
