//! Protocol 2: one JSON object a line, after a preamble that stands where protocol 1 has a key.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `v2/request.rs` | what a client asks |
//! | `v2/decode_request.rs` | reading that from a line, and refusing what is wrong |
//! | `v2/proof.rs` | the proof that a request comes from the client itself |
//! | `v2/answer.rs` | what the daemon answers |
//! | `v2/status.rs` | what a status says of locks |
//! | `v2/client_info.rs` | who asks, as the client tells it |

mod answer;
mod client_info;
mod decode_request;
mod proof;
mod request;
mod status;

use std::io::Write;

use serde::Serialize;

pub use super::text::ShortText;
pub use answer::{Answer, ErrorCode, LeaseTerms, OutputAt, Stale, decode_answer, encode_answer, error};
pub use client_info::ClientInfo;
pub use decode_request::decode_request;
pub use proof::{encode_proven, proof};
pub use request::{LockRequest, Mode, Request, Share};
pub use status::{LockStatus, LockUser, RunStatus};

/// What a client sends first, in place of a protocol 1 key.
pub const PREAMBLE: [u8; 16] = *b"\0kmutex proto 2\n";
/// The longest frame, in bytes, its newline included.
pub const FRAME_BYTES_MAX: usize = 64 * 1024;
/// How many holders, and how many waiters, one frame lists at the most: as many as fit in it however long their texts
/// are. The counts beside the lists are always whole.
pub const LISTED_MAX: usize = 12;
/// The most holders that `slots` can ask for.
pub const SLOTS_MAX: u32 = 1_000_000;

/// Appends a message and its newline to a buffer in memory.
pub fn encode(message: &impl Serialize, mut buffer: impl Write) {
    serde_json::to_writer(&mut buffer, message).expect("a message has no part that JSON lacks");
    buffer.write_all(b"\n").expect("memory takes what is written");
}

#[cfg(test)]
mod tests;
