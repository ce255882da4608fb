//! The outputs of runs, for the clients that share their results (`--share`): of holders, and of runs that are over and still
//! count. The daemon passes on descriptors of files that clients have made; it reads none of them but what is sent to other
//! hosts, where no descriptor can be passed.
//!
//! How many there are is bounded, and how long those are that are kept. They go with the daemon.
//!
//! | file | what it owns |
//! | --- | --- |
//! | `outputs/kept.rs` | outputs of runs that are over and still count |
//! | `outputs/delivery.rs` | what a client is sent of an output |

mod delivery;
mod kept;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::connection::ConnectionId;
use super::remote::RemoteResult;
use crate::output::{self, HEAD_BYTES, OutputFile, PIECES_MAX, SENT_BYTES_MAX, Unusable};
use crate::proto::v2::ShortText;
use crate::proto::{LockId, Token};
use crate::table::{self, Timestamp};
pub(super) use delivery::Delivery;
use delivery::{deliver, pieces};
pub(super) use kept::Dropped;
use kept::Kept;

/// Why there is no result, if a holder passed anything else.
const NO_OUTPUT: &str = "the holder's file has not the format of an output";

/// The output of one run.
#[derive(Clone, Debug)]
pub(super) enum Given {
    /// In a file of the holder's.
    File(Rc<OwnedFd>),
    /// As it came through the connection, in the form that the file would have, and as how many pieces.
    Bytes(Vec<u8>, usize),
    /// The clients do not get it.
    Withheld(ShortText),
}

/// The output of a holder.
struct Running {
    given: Given,
    /// Stands for the user who may have it.
    sharer: u64,
    /// The clients that read it as it comes.
    followers: Vec<ConnectionId>,
    /// Its run is over.
    is_over: bool,
}

/// All outputs.
pub(super) struct Outputs {
    running: BTreeMap<Token, Running>,
    /// The ones among them whose runs are over, until their waiters have been told.
    over: Vec<Token>,
    kept: BTreeMap<Token, Kept>,
    /// When those end.
    ends: BTreeSet<(Timestamp, Token)>,
    kept_bytes: u64,
    bytes_max: u64,
    descriptors_max: usize,
}

impl Outputs {
    /// `bytes_max`: how long all outputs that are kept may be. `descriptors_max`: how many outputs there may be.
    pub(super) fn new(bytes_max: u64, descriptors_max: usize) -> Outputs {
        Outputs {
            running: BTreeMap::new(),
            over: Vec::new(),
            kept: BTreeMap::new(),
            ends: BTreeSet::new(),
            kept_bytes: 0,
            bytes_max,
            descriptors_max,
        }
    }

    /// A holder gives its output in a file.
    pub(super) fn add_file(
        &mut self,
        token: Token,
        sharer: u64,
        descriptor: Option<OwnedFd>,
    ) -> Vec<Dropped> {
        let (given, dropped) = match descriptor {
            None => (withheld("its descriptor did not reach the daemon"), Vec::new()),
            Some(descriptor) => match output::size(&descriptor) {
                Err(Unusable::NoMemoryFile | Unusable::NotSealed) => {
                    (withheld("the holder sent no file in memory"), Vec::new())
                }
                Ok(_) => self.room_for(Given::File(Rc::new(descriptor))),
            },
        };
        self.insert(token, sharer, given);
        dropped
    }

    /// A holder gives a part of its output.
    pub(super) fn add_piece(&mut self, token: Token, sharer: u64, stream: u8, data: &str) -> Vec<Dropped> {
        let mut dropped = Vec::new();
        if !self.running.contains_key(&token) {
            let (given, others) = self.room_for(Given::Bytes(Vec::new(), 0));
            self.insert(token, sharer, given);
            dropped = others;
        }
        let Some(Running { given, .. }) = self.running.get_mut(&token) else { return dropped };
        if let Given::Bytes(bytes, pieces) = given {
            match output::encode_piece(stream, data) {
                Some(piece) if may_add(bytes.len(), piece.len(), *pieces) => {
                    bytes.extend_from_slice(&piece);
                    *pieces += 1;
                }
                Some(_) => *given = withheld("the output is longer than 64 KiB"),
                None => *given = withheld("its output did not reach the daemon"),
            }
        }
        dropped
    }

    /// A holder has come back, and gives again what came through its connection.
    pub(super) fn resumed(&mut self, token: Token) {
        if self.running.get(&token).is_some_and(|running| matches!(running.given, Given::Bytes(..))) {
            self.running.remove(&token);
        }
    }

    /// A holder does not give its output.
    pub(super) fn withhold(&mut self, token: Token, sharer: u64, why: ShortText) {
        self.insert(token, sharer, Given::Withheld(why));
    }

    fn insert(&mut self, token: Token, sharer: u64, given: Given) {
        let followers = self.running.remove(&token).map(|running| running.followers).unwrap_or_default();
        self.running.insert(token, Running { given, sharer, followers, is_over: false });
    }

    /// Makes room for one more output; says which ones had to go, the oldest first.
    fn room_for(&mut self, given: Given) -> (Given, Vec<Dropped>) {
        let mut dropped = Vec::new();
        while self.running.len() + self.kept.len() >= self.descriptors_max {
            match self.drop_oldest() {
                Some(oldest) => dropped.push(oldest),
                None => return (withheld("the daemon has as many outputs as it can"), dropped),
            }
        }
        (given, dropped)
    }

    /// Returns the file of a holder's output for a client that reads it as it comes, and notes that the client does.
    /// `true`: it is the first such client.
    pub(super) fn follow(
        &mut self,
        token: Token,
        sharer: u64,
        client: ConnectionId,
    ) -> Option<(Rc<OwnedFd>, bool)> {
        let running = self.running.get_mut(&token)?;
        let Given::File(file) = &running.given else { return None };
        if !table::is_result_for(running.sharer, sharer) || running.followers.contains(&client) {
            return None;
        }
        let is_first = running.followers.is_empty();
        running.followers.push(client);
        Some((Rc::clone(file), is_first))
    }

    /// Returns the clients that read a holder's output as it comes.
    pub(super) fn followers(&self, token: Token) -> &[ConnectionId] {
        self.running.get(&token).map_or(&[], |running| &running.followers)
    }

    /// Keeps of the clients that read a holder's output only the ones that are still there.
    pub(super) fn retain_followers(&mut self, token: Token, is_there: impl FnMut(&ConnectionId) -> bool) {
        if let Some(running) = self.running.get_mut(&token) {
            running.followers.retain(is_there);
        }
    }

    /// A holder releases its lock. Returns `true` if others can have its result.
    pub(super) fn complete(&mut self, token: Token) -> bool {
        let Some(running) = self.running.get_mut(&token) else { return false };
        running.is_over = true;
        self.over.push(token);
        if let Given::File(file) = &running.given
            && output::sealed_size(file).is_err()
        {
            running.given = withheld("its output is not complete");
        }
        !matches!(running.given, Given::Withheld(_))
    }

    /// A hold has ended. Returns the clients that read its output as it came, if that will never be complete.
    pub(super) fn hold_ended(&mut self, token: Token) -> Vec<ConnectionId> {
        match self.running.get(&token) {
            // Its waiters are told first.
            Some(running) if running.is_over => Vec::new(),
            _ => self.running.remove(&token).map(|running| running.followers).unwrap_or_default(),
        }
    }

    /// All waiters of runs that are over have been told.
    pub(super) fn all_told(&mut self) {
        for token in self.over.drain(..) {
            self.running.remove(&token);
        }
    }

    /// Returns the output of a holder that releases its lock, as it is told to other hosts, or why there is none. `None`: it gave
    /// none.
    pub(super) fn for_other_hosts(&self, token: Token) -> Option<Result<Vec<u8>, ShortText>> {
        let output = match &self.running.get(&token)?.given {
            Given::Withheld(why) => return Some(Err(why.clone())),
            Given::Bytes(row, _) => return Some(Ok(row.clone())),
            Given::File(file) => output::read_short(file),
        };
        Some(match pieces(output) {
            Ok(Some(pieces)) => Ok(output::row(&pieces)),
            Ok(None) => Err("the output is longer than 64 KiB, and that run was on another host".into()),
            Err(_) => Err(NO_OUTPUT.into()),
        })
    }

    /// A run on another host is over, and clients wait for its result, or it counts for one that is about to be told.
    pub(super) fn add_remote(&mut self, result: RemoteResult, now: Timestamp) -> Vec<Dropped> {
        let RemoteResult { token, sharer, content, run } = result;
        // What stands in etcd may name any token.
        if self.running.get(&token).is_some_and(|running| !running.is_over)
            || self.kept.get(&token).is_some_and(|kept| run.as_ref().is_some_and(|run| run.lock != kept.lock))
        {
            return Vec::new();
        }
        let (given, mut dropped) = match content {
            Err(why) => (Given::Withheld(why), Vec::new()),
            Ok(row) => self.room_for(match OutputFile::of_row(&row) {
                Ok(file) => Given::File(Rc::new(file)),
                // Without /proc.
                Err(_) => Given::Bytes(row.to_vec(), PIECES_MAX),
            }),
        };
        self.insert(token, sharer, given);
        self.running.get_mut(&token).expect("it was inserted").is_over = true;
        self.over.push(token);
        run.into_iter().for_each(|run| dropped.extend(self.keep(&run, now)));
        dropped
    }

    /// Returns what a client is sent of the result of a run that it has waited for. `passes`: a descriptor can be passed to it.
    /// `follows`: it has the descriptor, if the run's holder gave one.
    pub(super) fn of_run(&self, token: Token, sharer: u64, passes: bool) -> Delivery {
        match self.running.get(&token) {
            None => Delivery::withheld("that run was without --share"),
            Some(running) if !table::is_result_for(running.sharer, sharer) => {
                Delivery::withheld("that run was another user's")
            }
            Some(running) => deliver(&running.given, passes),
        }
    }

    /// Returns what a client is sent of a result that is kept.
    pub(super) fn of_kept(&self, lock: LockId, token: Token, sharer: u64, passes: bool) -> Delivery {
        let kept = self.kept.get(&token).filter(|kept| kept.lock == lock).map(|kept| &kept.given);
        // One that has just come from another host, and for which there is no room.
        let passing =
            || self.running.get(&token).filter(|running| table::is_result_for(running.sharer, sharer));
        match kept.or_else(|| passing().map(|running| &running.given)) {
            None => Delivery::withheld("that result is not kept any more"),
            Some(given) => deliver(given, passes),
        }
    }
}

fn withheld(why: &str) -> Given {
    Given::Withheld(why.into())
}

fn may_add(length: usize, more: usize, pieces: usize) -> bool {
    pieces < PIECES_MAX && length + more <= SENT_BYTES_MAX + HEAD_BYTES * (pieces + 1)
}

#[cfg(test)]
mod tests;
