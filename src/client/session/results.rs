//! The results of runs that the daemon passes on: the output comes as a descriptor, or in pieces.

use super::{Session, WaitObserver};
use crate::client::shared::SharedRun;
use crate::client::{Error, LockReply};
use crate::output::{self, Output};
use crate::proto::v2::{Answer, OutputAt, RunStatus, Stale};
use crate::proto::{Outcome, Token};

impl Session {
    /// Takes in what concerns the output of a run that has not ended.
    pub(super) fn output_answer(
        &mut self,
        answer: Answer,
        observer: &mut dyn WaitObserver,
    ) -> Result<(), Error> {
        match answer {
            Answer::Output { token } => match self.input.descriptors.pop_front() {
                Some(descriptor) => observer.on_output(token, Output::from_descriptor(descriptor)),
                None => Ok(()),
            },
            Answer::Grown => observer.on_grown(),
            Answer::Torn => observer.on_torn(),
            Answer::Piece { stream, data } => self.add_piece(stream, &data),
            other => Err(Error::unexpected(other)),
        }
    }

    /// Returns the result of a run, or that it is not given.
    pub(super) fn result(
        &mut self,
        outcome: Outcome,
        token: Token,
        past: Option<RunStatus>,
        at: Option<OutputAt>,
    ) -> LockReply {
        match self.output(at) {
            Ok(output) => LockReply::Shared(SharedRun { outcome, token, past, output }),
            Err(why) => LockReply::Withheld { outcome, token, why },
        }
    }

    /// Returns the output that came with an answer, or why there is none.
    fn output(&mut self, at: Option<OutputAt>) -> Result<Output, String> {
        let pieces = std::mem::take(&mut self.pieces);
        match at {
            None => Err("the daemon cannot share results".into()),
            Some(OutputAt::Withheld(why)) => Err(why.as_str().into()),
            Some(OutputAt::Pieces) => Ok(Output::from_bytes(pieces)),
            Some(OutputAt::Descriptor) => match self.input.descriptors.pop_front() {
                Some(descriptor) => Ok(Output::from_descriptor(descriptor)),
                None => Err("its descriptor did not arrive: there are too many open files".into()),
            },
        }
    }

    pub(super) fn shared_run(&mut self, stale: Stale) -> Option<Box<SharedRun>> {
        let output = self.output(Some(stale.output)).ok()?;
        let (outcome, token) = (stale.run.outcome, stale.run.token);
        Some(Box::new(SharedRun { outcome, token, past: Some(stale.run), output }))
    }

    /// Takes the result to use while this session holds the lock and its caller runs anew, if the daemon gave one.
    pub fn take_stale(&mut self) -> Option<SharedRun> {
        self.stale.take().map(|stale| *stale)
    }

    fn add_piece(&mut self, stream: u8, data: &str) -> Result<(), Error> {
        let piece = output::encode_piece(stream, data);
        let piece = piece.ok_or_else(|| Error::Protocol("a piece of an output is wrong".into()))?;
        if self.pieces.len() + piece.len() > 2 * output::SENT_BYTES_MAX {
            return Err(Error::Protocol("an output is longer than it may be".into()));
        }
        self.pieces.extend_from_slice(&piece);
        Ok(())
    }
}
