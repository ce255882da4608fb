//! The proof that a request comes from the client, and not from a command that has inherited its connection.

use serde::Deserialize;

use super::{Request, encode};
use crate::proto::Nonce;

/// Returns the proof in a request: the nonce of the lock request on the same connection.
pub fn proof(line: &[u8]) -> Option<Nonce> {
    #[derive(Deserialize)]
    struct Proof {
        proof: Option<Nonce>,
    }
    serde_json::from_slice::<Proof>(line).ok()?.proof
}

/// Appends a request with its proof, which [`proof`] returns, and a newline to a buffer in memory.
pub fn encode_proven(request: &Request, nonce: Nonce, buffer: &mut Vec<u8>) {
    encode(request, &mut *buffer);
    // In the place of the closing brace and the newline.
    buffer.truncate(buffer.len() - 2);
    buffer.extend_from_slice(format!(",\"proof\":\"{}\"}}\n", String::from(nonce)).as_bytes());
}
