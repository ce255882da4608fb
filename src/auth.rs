//! Names, secrets and patterns: which client over TCP is who, and which locks it may use. Knows nothing of sockets or of the
//! daemon's loop.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `auth/file.rs` | the file of names: reading it, and reading it again |
//! | `auth/patterns.rs` | which keys a name may lock |
//! | `auth/random.rs` | random bytes |
//! | `auth/secret.rs` | hashing and verifying secrets, which is slow |
//! | `auth/verified.rs` | secrets that were verified, which is quick |

mod file;
mod patterns;
mod random;
mod secret;
mod verified;

pub use file::{AuthFile, Error, Name};
pub(crate) use secret::StoredSecret;
pub use secret::hash;
pub(crate) use verified::Verified;

/// The longest name, in bytes. A certificate's name may be as long.
pub const NAME_BYTES_MAX: usize = 256;
