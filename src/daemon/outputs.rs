//! The outputs of runs, for the clients that share their results (`--share`): of holders, and of runs that are over and still
//! count. The daemon passes on descriptors of files that clients have made; it reads none of them but what is sent to other
//! hosts, where no descriptor can be passed.
//!
//! How many there are is bounded, and how long those are that are kept. They go with the daemon.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use super::connection::ConnectionId;
use super::remote::RemoteResult;
use crate::output::{self, HEAD_BYTES, Output, OutputFile, PIECES_MAX, Piece, SENT_BYTES_MAX, Unusable};
use crate::proto::v2::{Answer, OutputAt, ShortText};
use crate::proto::{LockId, Token};
use crate::table::{self, Run, Timestamp};

/// The longest piece that is sent through a connection, in bytes.
const PIECE_BYTES_MAX: usize = 16 * 1024;
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

/// The output of a run that is over.
struct Kept {
    lock: LockId,
    is_success: bool,
    given: Given,
    bytes: u64,
    until: Timestamp,
}

/// What a client is sent of an output.
pub(super) struct Delivery {
    /// Where it is.
    pub(super) at: OutputAt,
    /// What comes before that.
    pub(super) pieces: Vec<Answer>,
    /// What comes with it.
    pub(super) descriptor: Option<Rc<OwnedFd>>,
}

impl Delivery {
    fn withheld(why: &str) -> Delivery {
        Delivery { at: OutputAt::Withheld(why.into()), pieces: Vec::new(), descriptor: None }
    }
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

    /// Returns `true` if no output of a run that is over is kept.
    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty()
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

    /// A run that is over is remembered: keeps its output, if it has one. Returns what had to go.
    pub(super) fn keep(&mut self, run: &Run, now: Timestamp) -> Vec<Dropped> {
        let Some(running) = self.running.get(&run.token).filter(|running| running.is_over) else {
            return Vec::new();
        };
        let bytes = match &running.given {
            Given::Withheld(_) => return Vec::new(),
            Given::Bytes(bytes, _) => bytes.len() as u64,
            Given::File(file) => output::sealed_size(file).unwrap_or(u64::MAX),
        };
        let left = run.counts_for.saturating_sub(run.age(now));
        let kept = Kept {
            lock: run.lock,
            is_success: run.is_success(),
            given: running.given.clone(),
            bytes,
            until: now.plus(left),
        };
        let is_old = |kept: &Kept| kept.lock == run.lock && kept.is_success == run.is_success();
        let old = self.kept.iter().find(|(_, kept)| is_old(kept)).map(|(&token, _)| token);
        let mut dropped: Vec<Dropped> = old.into_iter().filter_map(|token| self.drop_kept(token)).collect();
        if bytes > self.bytes_max {
            dropped.push((run.lock, run.token));
            return dropped;
        }
        while self.kept_bytes > self.bytes_max - bytes
            && let Some(oldest) = self.drop_oldest()
        {
            dropped.push(oldest);
        }
        self.kept_bytes += bytes;
        self.ends.insert((kept.until, run.token));
        self.kept.insert(run.token, kept);
        dropped
    }

    /// The runs of a lock are forgotten.
    pub(super) fn forget(&mut self, lock: LockId) -> Vec<Dropped> {
        let tokens: Vec<Token> =
            self.kept.iter().filter(|(_, kept)| kept.lock == lock).map(|(&token, _)| token).collect();
        tokens.into_iter().filter_map(|token| self.drop_kept(token)).collect()
    }

    /// A result of a lock is not to be kept any more.
    pub(super) fn drop_result(&mut self, lock: LockId, token: Token) {
        if self.kept.get(&token).is_some_and(|kept| kept.lock == lock) {
            self.drop_kept(token);
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

    /// When [`Outputs::expire`] is next needed.
    pub(super) fn next_deadline(&self) -> Option<Timestamp> {
        self.ends.first().map(|&(until, _)| until)
    }

    /// Drops the outputs whose time is over.
    pub(super) fn expire(&mut self, now: Timestamp) -> Vec<Dropped> {
        let mut dropped = Vec::new();
        while let Some(&(until, token)) = self.ends.first()
            && until <= now
        {
            dropped.extend(self.drop_kept(token));
        }
        dropped
    }

    fn drop_oldest(&mut self) -> Option<Dropped> {
        let (&token, _) = self.kept.first_key_value()?;
        self.drop_kept(token)
    }

    fn drop_kept(&mut self, token: Token) -> Option<Dropped> {
        let kept = self.kept.remove(&token)?;
        self.kept_bytes -= kept.bytes;
        self.ends.remove(&(kept.until, token));
        Some((kept.lock, token))
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

/// A result that is not kept any more.
pub(super) type Dropped = (LockId, Token);

fn withheld(why: &str) -> Given {
    Given::Withheld(why.into())
}

fn may_add(length: usize, more: usize, pieces: usize) -> bool {
    pieces < PIECES_MAX && length + more <= SENT_BYTES_MAX + HEAD_BYTES * (pieces + 1)
}

fn deliver(given: &Given, passes: bool) -> Delivery {
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
fn pieces(output: io::Result<Option<Output>>) -> io::Result<Option<Vec<Piece>>> {
    output?.map_or(Ok(None), |output| output::pieces(&output, PIECE_BYTES_MAX))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;

    use super::*;
    use crate::output::Stream;
    use crate::proto::Outcome;
    use crate::table::EVERY_USER;

    fn outputs(bytes_max: u64, descriptors_max: usize) -> Outputs {
        Outputs::new(bytes_max, descriptors_max)
    }

    fn file(bytes: &[u8], is_sealed: bool) -> OwnedFd {
        let mut file = OutputFile::new().unwrap();
        file.append(Stream::Stdout, bytes).unwrap();
        if is_sealed {
            file.seal().unwrap();
        }
        file.for_readers().unwrap()
    }

    fn run(lock: u8, token: u64) -> Run {
        Run {
            lock: LockId([lock; 16]),
            token: Token(token),
            began_ms: 0,
            counts_for: Duration::from_millis(100),
            outcome: Outcome::Exit(0),
            uid: Some(5),
            by: "".into(),
        }
    }

    /// A run that ends at 10 with so long an output.
    fn ran(outputs: &mut Outputs, lock: u8, token: u64, bytes: usize) -> Vec<Dropped> {
        let mut dropped = outputs.add_file(Token(token), 6, Some(file(&vec![0; bytes], true)));
        assert!(outputs.complete(Token(token)));
        assert_eq!(outputs.hold_ended(Token(token)), []);
        dropped.extend(outputs.keep(&run(lock, token), Timestamp(10)));
        outputs.all_told();
        dropped
    }

    fn is_kept(outputs: &Outputs, token: u64) -> bool {
        let kept = outputs.kept.get(&Token(token));
        kept.is_some_and(|kept| outputs.of_kept(kept.lock, Token(token), 6, true).descriptor.is_some())
    }

    #[test]
    fn the_oldest_goes_when_there_are_too_many_bytes_or_descriptors() {
        let mut outputs = outputs(250, 4);
        assert_eq!(ran(&mut outputs, 1, 1, 92), []);
        assert_eq!(ran(&mut outputs, 2, 2, 92), []);
        assert_eq!(ran(&mut outputs, 3, 3, 92), [(LockId([1; 16]), Token(1))]);
        assert!(!is_kept(&outputs, 1) && is_kept(&outputs, 2) && is_kept(&outputs, 3));
        assert_eq!(ran(&mut outputs, 4, 4, 300), [(LockId([4; 16]), Token(4))], "it is too long by itself");
        assert!(is_kept(&outputs, 2) && is_kept(&outputs, 3));
        assert_eq!(ran(&mut outputs, 5, 5, 0), []);
        assert_eq!(ran(&mut outputs, 6, 6, 0), []);
        assert_eq!(ran(&mut outputs, 7, 7, 0), [(LockId([2; 16]), Token(2))]);
    }

    #[test]
    fn holders_alone_are_bounded_too() {
        let mut outputs = outputs(1000, 2);
        for token in 1..=3 {
            outputs.add_file(Token(token), 6, Some(file(b"x", true)));
        }
        assert!(outputs.complete(Token(2)));
        assert!(!outputs.complete(Token(3)), "there is no descriptor for it");
    }

    #[test]
    fn a_kept_output_ends_with_its_time_or_with_a_newer_one() {
        let mut outputs = outputs(1000, 9);
        ran(&mut outputs, 1, 1, 5);
        ran(&mut outputs, 2, 2, 5);
        assert_eq!(ran(&mut outputs, 1, 3, 5), [(LockId([1; 16]), Token(1))]);
        assert!(!is_kept(&outputs, 1) && is_kept(&outputs, 3));
        assert_eq!(outputs.next_deadline(), Some(Timestamp(100)));
        assert_eq!(outputs.expire(Timestamp(99)), []);
        assert!(is_kept(&outputs, 2));
        assert_eq!(outputs.expire(Timestamp(100)).len(), 2);
        assert!(outputs.is_empty() && outputs.kept_bytes == 0 && outputs.next_deadline().is_none());
    }

    #[test]
    fn only_a_sealed_file_in_memory_is_a_result() {
        let mut outputs = outputs(1000, 9);
        outputs.add_file(Token(1), 6, Some(file(b"x", false)));
        outputs.add_file(Token(2), 6, Some(std::io::pipe().unwrap().0.into()));
        outputs.add_file(Token(3), 6, Some(std::fs::File::open("/").unwrap().into()));
        outputs.add_file(Token(4), 6, None);
        for token in 1..=4 {
            assert!(!outputs.complete(Token(token)), "{token}");
            assert!(matches!(outputs.of_run(Token(token), 6, true).at, OutputAt::Withheld(_)));
        }
    }

    #[test]
    fn a_result_is_its_users_own() {
        let mut outputs = outputs(1000, 9);
        let (root, user, other) = (EVERY_USER, 6, 8);
        outputs.add_file(Token(1), user, Some(file(b"x", true)));
        outputs.add_file(Token(2), root, Some(file(b"x", true)));
        let gets = |outputs: &Outputs, token, sharer| {
            outputs.of_run(Token(token), sharer, true).descriptor.is_some()
        };
        assert!(gets(&outputs, 1, user) && !gets(&outputs, 1, other) && !gets(&outputs, 1, root));
        assert!(gets(&outputs, 2, user) && gets(&outputs, 2, other), "root gives its results to all");
    }

    fn from_elsewhere(token: u64, run: Option<Run>) -> RemoteResult {
        let content = Ok(output::row(&[(Stream::Stdout, vec![7; 100])]).into());
        RemoteResult { token: Token(token), sharer: 6, content, run }
    }

    #[test]
    fn a_result_of_another_host_is_there_until_the_waiters_are_told_or_its_run_counts_no_more() {
        let mut outputs = outputs(1000, 9);
        let now = Timestamp(10);
        outputs.add_remote(from_elsewhere(1, None), now);
        assert!(outputs.of_run(Token(1), 6, true).descriptor.is_some());
        assert_eq!(outputs.of_run(Token(1), 6, false).pieces.len(), 1);
        assert!(outputs.of_run(Token(1), 7, true).descriptor.is_none());
        outputs.all_told();
        assert!(matches!(outputs.of_run(Token(1), 6, true).at, OutputAt::Withheld(_)));
        outputs.add_remote(from_elsewhere(2, Some(run(1, 2))), now);
        outputs.all_told();
        assert!(is_kept(&outputs, 2));
        outputs.drop_result(LockId([2; 16]), Token(2));
        assert!(is_kept(&outputs, 2), "that is another lock");
        outputs.drop_result(LockId([1; 16]), Token(2));
        assert!(outputs.is_empty());
    }

    #[test]
    fn a_result_for_which_there_is_no_room_is_given_once() {
        let mut outputs = outputs(50, 9);
        let dropped = outputs.add_remote(from_elsewhere(2, Some(run(1, 2))), Timestamp(10));
        assert_eq!(dropped, [(LockId([1; 16]), Token(2))]);
        assert!(outputs.of_kept(LockId([1; 16]), Token(2), 6, true).descriptor.is_some());
        assert!(outputs.of_kept(LockId([1; 16]), Token(2), 7, true).descriptor.is_none());
        outputs.all_told();
        assert!(outputs.of_kept(LockId([1; 16]), Token(2), 6, true).descriptor.is_none());
    }

    #[test]
    fn a_result_that_names_the_token_of_another_run_takes_the_place_of_none() {
        let mut outputs = outputs(1000, 9);
        outputs.add_file(Token(1), 6, Some(file(b"holder's", true)));
        outputs.add_remote(from_elsewhere(1, None), Timestamp(10));
        assert_eq!(outputs.for_other_hosts(Token(1)).unwrap().unwrap().len(), 8 + 8);
        ran(&mut outputs, 2, 5, 30);
        outputs.add_remote(from_elsewhere(5, Some(run(3, 5))), Timestamp(10));
        assert_eq!(outputs.kept[&Token(5)].bytes, 38);
        assert!(outputs.of_kept(LockId([3; 16]), Token(5), 6, true).descriptor.is_none());
    }

    #[test]
    fn other_hosts_are_given_short_outputs_and_the_reasons_why_not() {
        let mut outputs = outputs(1000, 9);
        let given = |outputs: &Outputs, token| outputs.for_other_hosts(Token(token));
        outputs.add_file(Token(1), 6, Some(file(&vec![7; SENT_BYTES_MAX], true)));
        outputs.add_file(Token(2), 6, Some(file(&vec![7; SENT_BYTES_MAX + 1], true)));
        outputs.add_file(Token(3), 6, Some(file(&vec![7; 20 * SENT_BYTES_MAX], true)));
        outputs.withhold(Token(4), 6, "because".into());
        let row = given(&outputs, 1).unwrap().unwrap();
        assert_eq!(Output::from_bytes(row).read(Stream::Stdout).unwrap(), vec![7; SENT_BYTES_MAX]);
        for token in [2, 3] {
            assert!(given(&outputs, token).unwrap().unwrap_err().as_str().contains("longer than 64 KiB"));
        }
        assert_eq!(given(&outputs, 4).unwrap().unwrap_err().as_str(), "because");
        assert_eq!(given(&outputs, 5), None);
    }

    #[test]
    fn what_comes_through_a_connection_is_bounded() {
        let mut outputs = outputs(1 << 20, 9);
        let data = STANDARD.encode(vec![7; SENT_BYTES_MAX / 4]);
        for _ in 0..4 {
            outputs.add_piece(Token(1), 6, 1, &data);
        }
        assert!(outputs.complete(Token(1)));
        let delivery = outputs.of_run(Token(1), 6, false);
        assert_eq!((delivery.at, delivery.pieces.len()), (OutputAt::Pieces, 4));
        outputs.add_piece(Token(1), 6, 2, "AA==");
        assert!(!outputs.complete(Token(1)));
        outputs.add_piece(Token(2), 6, 1, "no base64!");
        assert!(!outputs.complete(Token(2)));
        for _ in 0..=PIECES_MAX {
            outputs.add_piece(Token(3), 6, 1, "AA==");
        }
        assert!(!outputs.complete(Token(3)));
    }
}
