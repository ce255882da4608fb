//! The layout of a journal: its header, and its records of one size, to bytes and back.

use std::num::NonZeroU32;
use std::sync::LazyLock;
use std::time::Duration;

use crc32fast::Hasher;

use super::{ClusterLease, Era, HoldRecord, Place, Process, RunRecord};
use crate::proto::{LockId, Nonce, Outcome, Pid, Protocol, Token};
use crate::table::{HoldState, RUN_BY_BYTES_MAX, Run, Terms, Timestamp};
use crate::timestamp::millis;

/// The length of a record, and of the header.
pub(super) const RECORD_BYTES: usize = 88;
/// The first bytes of the file. Another layout gets another number.
pub(super) const MAGIC: &[u8; 16] = b"kmutex journal1\n";

// All numbers are little endian; the checksum is the CRC-32 of everything that follows it.
//
//   header  16 magic | 16 boot id | 16 place | 8 pid namespace | 28 zero | 4 checksum of these
//   record   4 checksum | 1 kind | 1 protocol | 1 flags | 1 zero | 4 slots | 4 uid | 4 pid | 4 zero
//          | 8 token | 16 lock | 16 nonce | 8 granted | 8 until | 8 recorded
//   child    4 checksum | 1 kind | 11 zero | 4 pid | 4 zero | 8 token | 8 started | 48 zero; after the record of its hold
//   run      4 checksum | 1 kind | 1 zero | 1 flags | 1 exit status or signal | 4 zero | 4 uid | 8 counts for | 8 token
//          | 16 lock | 8 began | 8 began, since 1970 | 24 zero; and after it
//   run by   4 checksum | 1 kind | 19 zero | 8 token | 56 text
//   (88 bytes each; of a strike, only kind and token count; of a lease, only kind, and in the token's place its number,
//   or after 0, in the place of the lock, the end of a quarantine)

const GRANT: u8 = 1;
const END: u8 = 2;
const LEASE: u8 = 3;
const RUN: u8 = 4;
const RUN_BY: u8 = 5;
const RUN_FORGOTTEN: u8 = 6;
const CHILD: u8 = 7;
const SHARED: u8 = 1;
const EXEC: u8 = 2;
const INHERITS: u8 = 4;
const HAS_NONCE: u8 = 8;
const HAS_UID: u8 = 16;
const HAS_UNTIL: u8 = 32;
/// The field `until` is the weight.
const HAS_WEIGHT: u8 = 64;
const SIGNAL: u8 = 128;

pub(super) enum Entry<'a> {
    Grant(&'a HoldRecord),
    Child(Token, Process),
    End(Token),
    Lease(ClusterLease),
    Run(&'a RunRecord),
    RunBy(&'a RunRecord),
    RunForgotten(Token),
}

pub(super) enum Decoded {
    Grant(HoldRecord),
    Child(Token, Process),
    End(Token),
    Lease(ClusterLease),
    Run(RunRecord),
    RunBy(Token, String),
    RunForgotten(Token),
}

/// Appends what there is to record of a hold.
pub(super) fn put_hold(hold: &HoldRecord, bytes: &mut Vec<u8>) {
    encode(Entry::Grant(hold), bytes);
    if let Some(child) = hold.child {
        encode(Entry::Child(hold.held.token, child), bytes);
    }
}

pub(super) fn header(era: &Era, place: &Place) -> [u8; RECORD_BYTES] {
    let mut bytes = [0; RECORD_BYTES];
    bytes[..16].copy_from_slice(MAGIC);
    bytes[16..32].copy_from_slice(&era.boot);
    bytes[32..48].copy_from_slice(place);
    bytes[48..56].copy_from_slice(&era.namespace.to_le_bytes());
    let sum = checksum(&bytes[..84]);
    bytes[84..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

pub(super) fn namespace_in(header: &[u8; RECORD_BYTES]) -> u64 {
    u64::from_le_bytes(header[48..56].try_into().expect("eight bytes"))
}

pub(super) fn is_whole(header: &[u8; RECORD_BYTES]) -> bool {
    header[84..] == checksum(&header[..84]).to_le_bytes()
}

fn checksum(bytes: &[u8]) -> u32 {
    // What the processor can do for this is found out once.
    static FRESH: LazyLock<Hasher> = LazyLock::new(Hasher::new);
    let mut hasher = FRESH.clone();
    hasher.update(bytes);
    hasher.finalize()
}

/// Writes a record behind `records`.
pub(super) fn encode(entry: Entry<'_>, records: &mut Vec<u8>) {
    let start = records.len();
    records.resize(start + RECORD_BYTES, 0);
    let bytes = records[start..].first_chunk_mut::<RECORD_BYTES>().expect("it was made room for");
    match entry {
        Entry::Grant(record) => encode_grant(record, bytes),
        Entry::Run(record) => encode_run(record, bytes),
        Entry::RunBy(RunRecord { run, .. }) => {
            let by = run.by.as_str();
            let by = &by.as_bytes()[..by.floor_char_boundary(RUN_BY_BYTES_MAX)];
            encode_mark(RUN_BY, run.token.0, bytes);
            bytes[32..32 + by.len()].copy_from_slice(by);
        }
        Entry::Child(token, Process { pid, started }) => {
            encode_mark(CHILD, token.0, bytes);
            put(bytes, 16, pid.get().to_le_bytes());
            put(bytes, 32, started.0.to_le_bytes());
        }
        Entry::End(token) => encode_mark(END, token.0, bytes),
        Entry::RunForgotten(token) => encode_mark(RUN_FORGOTTEN, token.0, bytes),
        Entry::Lease(lease) => {
            encode_mark(LEASE, lease.number().unwrap_or(0), bytes);
            if let ClusterLease::Quarantine(until) = lease {
                put(bytes, 32, until.0.to_le_bytes());
            }
        }
    }
    let sum = checksum(&bytes[4..]);
    put(bytes, 0, sum.to_le_bytes());
}

/// Inlined, so that it is one store: it is the hottest part of a grant's record.
#[inline(always)]
fn put<const N: usize>(bytes: &mut [u8; RECORD_BYTES], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}

fn encode_mark(kind: u8, number: u64, bytes: &mut [u8; RECORD_BYTES]) {
    bytes[4] = kind;
    put(bytes, 24, number.to_le_bytes());
}

fn encode_grant(record: &HoldRecord, bytes: &mut [u8; RECORD_BYTES]) {
    let HoldRecord { held, pid, child: _, granted, recorded } = record;
    let flag = |is_set: bool, bit: u8| if is_set { bit } else { 0 };
    let flags = flag(held.terms.shared, SHARED)
        | flag(held.terms.exec, EXEC)
        | flag(held.terms.inherits, INHERITS)
        | flag(held.nonce.is_some(), HAS_NONCE)
        | flag(held.uid.is_some(), HAS_UID)
        | flag(held.until.is_some(), HAS_UNTIL)
        | flag(held.terms.weight.is_some(), HAS_WEIGHT);
    put(bytes, 4, [GRANT, held.terms.protocol.into(), flags]);
    put(bytes, 8, held.terms.slots.to_le_bytes());
    put(bytes, 12, held.uid.unwrap_or(0).to_le_bytes());
    put(bytes, 16, Pid::number(*pid).to_le_bytes());
    put(bytes, 24, held.token.0.to_le_bytes());
    put(bytes, 32, held.lock.0);
    put(bytes, 48, held.nonce.map_or(0, |nonce| nonce.0).to_le_bytes());
    put(bytes, 64, granted.0.to_le_bytes());
    // Only protocol 1 has a limit, and only protocol 2 a weight.
    let weight = held.terms.weight.map_or(0, |weight| weight.get().into());
    put(bytes, 72, held.until.map_or(weight, |until| until.0).to_le_bytes());
    put(bytes, 80, recorded.0.to_le_bytes());
}

fn encode_run(record: &RunRecord, bytes: &mut [u8; RECORD_BYTES]) {
    let RunRecord { run, began_unix_ms } = record;
    let (signal, number) = match run.outcome {
        Outcome::Exit(number) => (0, number),
        Outcome::Signal(number) => (SIGNAL, number),
        Outcome::Unknown | Outcome::Vanished => unreachable!("only what is known to be done counts"),
    };
    let has_uid = if run.uid.is_some() { HAS_UID } else { 0 };
    put(bytes, 4, [RUN, 0, signal | has_uid, number]);
    put(bytes, 12, run.uid.unwrap_or(0).to_le_bytes());
    put(bytes, 16, millis(run.counts_for).to_le_bytes());
    put(bytes, 24, run.token.0.to_le_bytes());
    put(bytes, 32, run.lock.0);
    put(bytes, 48, run.began_ms.to_le_bytes());
    put(bytes, 56, began_unix_ms.to_le_bytes());
}

pub(super) fn decode(bytes: &[u8; RECORD_BYTES]) -> Option<Decoded> {
    if bytes[..4] != checksum(&bytes[4..]).to_le_bytes() {
        return None;
    }
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let token = Token(u64_at(24));
    let flag = |bit: u8| bytes[6] & bit != 0;
    match bytes[4] {
        END => Some(Decoded::End(token)),
        CHILD => {
            let process = Process { pid: Pid::new(u32_at(16))?, started: Timestamp(u64_at(32)) };
            Some(Decoded::Child(token, process))
        }
        RUN => {
            let number = bytes[7];
            let run = Run {
                lock: LockId(bytes[32..48].try_into().expect("sixteen bytes")),
                token,
                began_ms: u64_at(48) as i64,
                counts_for: Duration::from_millis(u64_at(16)),
                outcome: if flag(SIGNAL) { Outcome::Signal(number) } else { Outcome::Exit(number) },
                uid: flag(HAS_UID).then(|| u32_at(12)),
                by: "".into(),
            };
            Some(Decoded::Run(RunRecord { run, began_unix_ms: u64_at(56) }))
        }
        RUN_BY => {
            let text = String::from_utf8_lossy(&bytes[32..]);
            Some(Decoded::RunBy(token, text.trim_end_matches('\0').into()))
        }
        RUN_FORGOTTEN => Some(Decoded::RunForgotten(token)),
        LEASE => Some(Decoded::Lease(match (token.0, u64_at(32)) {
            (0, 0) => ClusterLease::None,
            (0, until) => ClusterLease::Quarantine(Timestamp(until)),
            (number, _) => ClusterLease::Id(number),
        })),
        GRANT => {
            let protocol = Protocol::try_from(bytes[5]).ok()?;
            let terms = Terms {
                protocol,
                shared: flag(SHARED),
                exec: flag(EXEC),
                inherits: flag(INHERITS),
                slots: u32_at(8).max(1),
                weight: NonZeroU32::new(u64_at(72) as u32).filter(|_| flag(HAS_WEIGHT)),
            };
            let held = HoldState {
                lock: LockId(bytes[32..48].try_into().expect("sixteen bytes")),
                token,
                terms,
                nonce: flag(HAS_NONCE)
                    .then(|| Nonce(u128::from_le_bytes(bytes[48..64].try_into().expect("sixteen bytes")))),
                uid: flag(HAS_UID).then(|| u32_at(12)),
                until: flag(HAS_UNTIL).then(|| Timestamp(u64_at(72))),
            };
            let (granted, recorded) = (Timestamp(u64_at(64)), Timestamp(u64_at(80)));
            let pid = Pid::new(u32_at(16));
            Some(Decoded::Grant(HoldRecord { held, pid, child: None, granted, recorded }))
        }
        _ => None,
    }
}
