//! What a client is sent of an output: its descriptor, or its bytes in pieces, or why it gets neither.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::{Given, NO_OUTPUT};
use crate::output::{self, Output, Piece};
use crate::proto::v2::{Answer, OutputAt};

/// The longest piece that is sent through a connection, in bytes.
const PIECE_BYTES_MAX: usize = 16 * 1024;

/// What a client is sent of an output.
pub(in crate::daemon) struct Delivery {
    /// Where it is.
    pub(in crate::daemon) at: OutputAt,
    /// What comes before that.
    pub(in crate::daemon) pieces: Vec<Answer>,
    /// What comes with it.
    pub(in crate::daemon) descriptor: Option<Rc<OwnedFd>>,
}

impl Delivery {
    pub(super) fn withheld(why: &str) -> Delivery {
        Delivery { at: OutputAt::Withheld(why.into()), pieces: Vec::new(), descriptor: None }
    }
}

pub(super) fn deliver(given: &Given, passes: bool) -> Delivery {
    let output = match given {
        Given::Withheld(why) => return Delivery::withheld(why.as_str()),
        Given::File(file) if passes => {
            let descriptor = Some(Rc::clone(file));
            return Delivery { at: OutputAt::Descriptor, pieces: Vec::new(), descriptor };
        }
        Given::File(file) => output::read_short(file),
        Given::Bytes(bytes, _) => Ok(Some(Output::from_bytes(bytes.clone()))),
    };
    match pieces(output) {
        Ok(Some(pieces)) => {
            let answer = |(stream, bytes): Piece| Answer::Piece {
                stream: stream.number(),
                data: output::to_base64(&bytes),
            };
            Delivery {
                at: OutputAt::Pieces,
                pieces: pieces.into_iter().map(answer).collect(),
                descriptor: None,
            }
        }
        Ok(None) => Delivery::withheld(
            "the output is longer than 64 KiB, and this client is not on the daemon's host",
        ),
        Err(_) => Delivery::withheld(NO_OUTPUT),
    }
}

/// Divides an output into the pieces that are sent. `None`: it is too long.
pub(super) fn pieces(output: io::Result<Option<Output>>) -> io::Result<Option<Vec<Piece>>> {
    output?.map_or(Ok(None), |output| output::pieces(&output, PIECE_BYTES_MAX))
}
