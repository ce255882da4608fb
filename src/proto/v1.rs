//! Protocol 1, as KeyedMutex 0.06 speaks it: 16 bytes lock, one byte answers.
//!
//! The protocol has no framing of its own: what a byte means depends on what its sender is at that moment, so the
//! caller passes that in, one message at a time.

use super::LockId;

/// The answer to a lock request: you are the owner.
pub const OWNER: u8 = b'O';
/// From the owner: I release. To a waiter: the owner has released.
pub const RELEASE: u8 = b'R';
/// The length of a lock request.
pub const KEY_BYTES: usize = 16;

/// What a client is to the daemon when its next byte arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It holds nothing and waits for nothing.
    Idle,
    /// It has the lock.
    Owner,
    /// It has asked for a lock and was not answered.
    Waiting,
}

/// One message from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// 16 bytes from an idle client: it wants this lock. (Or they are the preamble of protocol 2.)
    Lock(LockId),
    /// `R` from the owner.
    Release,
    /// What no client in this state may send; the connection is to be closed.
    Violation,
}

/// Another protocol, as browsers and misconfigured clients speak it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// An HTTP request.
    Http,
    /// The hello of a TLS client.
    Tls,
}

impl Foreign {
    /// What ends a TLS client: the fatal alert "unexpected message" (RFC 8446, 6).
    pub const TLS_ALERT: [u8; 7] = [21, 3, 3, 0, 2, 2, 10];
}

/// The methods of HTTP (RFC 9110, 5789, 9113), each with the blank behind it.
const HTTP_METHODS: [&[u8]; 10] = [
    b"GET ",
    b"POST ",
    b"PUT ",
    b"HEAD ",
    b"DELETE ",
    b"OPTIONS ",
    b"CONNECT ",
    b"TRACE ",
    b"PATCH ",
    b"PRI ",
];

/// Returns the other protocol that an idle client speaks. Of the identities of protocol 1, which are random, three in a
/// thousand million look like that; they are refused.
pub fn foreign(input: &[u8]) -> Option<Foreign> {
    match input {
        [b'A'..=b'Z', ..] if HTTP_METHODS.iter().any(|method| input.starts_with(method)) => {
            Some(Foreign::Http)
        }
        // A record of the handshake, of version 3.x, with a client hello in it (RFC 8446, 4 and 5.1).
        [22, 3, 0..=4, _, _, 1, ..] => Some(Foreign::Tls),
        _ => None,
    }
}

/// Takes one message off the front of `input`, which holds what has arrived and was not yet taken. `None`: there is no
/// whole message yet.
pub fn decode(state: State, input: &mut &[u8]) -> Option<Request> {
    match state {
        State::Idle => {
            let (key, rest) = input.split_first_chunk::<KEY_BYTES>()?;
            *input = rest;
            Some(Request::Lock(LockId(*key)))
        }
        State::Owner => {
            let (&byte, rest) = input.split_first()?;
            *input = rest;
            Some(if byte == RELEASE { Request::Release } else { Request::Violation })
        }
        State::Waiting => {
            input.first()?;
            Some(Request::Violation)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &[u8; 16] = b"0123456789abcdef";

    #[test]
    fn other_protocols_are_recognised() {
        for text in ["GET / HTTP/1.1\r\n", "POST /x HTTP/1.0", "PRI * HTTP/2.0\r\n", "OPTIONS * HTTP/1.1"] {
            assert_eq!(foreign(text.as_bytes()), Some(Foreign::Http), "{text}");
        }
        assert_eq!(foreign(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), Some(Foreign::Tls));
        for text in [b"GETTING-A-MUTEX!".as_slice(), b"GE", b"get / http/1.1", b"", &[22, 3, 1], KEY] {
            assert_eq!(foreign(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_key_may_come_in_pieces() {
        for cut in 0..KEY_BYTES {
            let mut input = &KEY[..cut];
            assert_eq!(decode(State::Idle, &mut input), None);
            assert_eq!(input.len(), cut, "an unfinished key stays where it is");
        }
    }

    #[test]
    fn a_release_and_the_next_key_may_come_glued() {
        let glued = [b"R".as_slice(), KEY, b"R"].concat();
        let mut input = glued.as_slice();
        assert_eq!(decode(State::Owner, &mut input), Some(Request::Release));
        assert_eq!(decode(State::Idle, &mut input), Some(Request::Lock(LockId(*KEY))));
        assert_eq!(decode(State::Owner, &mut input), Some(Request::Release));
        assert_eq!(decode(State::Idle, &mut input), None);
    }

    #[test]
    fn whatever_a_waiter_sends_is_a_violation() {
        for byte in 0..=u8::MAX {
            assert_eq!(decode(State::Waiting, &mut [byte].as_slice()), Some(Request::Violation));
        }
        assert_eq!(decode(State::Waiting, &mut [].as_slice()), None);
    }

    #[test]
    fn an_owner_may_send_nothing_but_r() {
        for byte in (0..=u8::MAX).filter(|&b| b != RELEASE) {
            assert_eq!(decode(State::Owner, &mut [byte].as_slice()), Some(Request::Violation));
        }
    }
}
