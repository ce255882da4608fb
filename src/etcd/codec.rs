//! The JSON of etcd's gateway: encodes requests, and decodes answers. Knows no sockets.
//!
//! It is proto3's mapping to JSON: 64-bit numbers are strings, bytes are base64, and whatever is zero or empty is left
//! out. Unknown fields are skipped; an answer without the required fields is refused.

#[cfg(test)]
mod tests;

use std::fmt;

use base64::prelude::{BASE64_STANDARD, Engine};
use serde::de::{self, DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::error::{Failure, one_line};
use super::kv::{
    Compare, Event, KeptAlive, KeyValue, Lease, LeaseId, Op, Range, RangeReply, Sort, TimeToLive, Txn,
    TxnReply, WatchReply,
};
use super::store::Header;

/// `/v3/auth/authenticate`
pub(super) fn authenticate(name: &str, password: &str) -> String {
    json!({ "name": name, "password": password }).to_string()
}

/// `/v3/lease/grant`
pub(super) fn grant_lease(ttl_secs: u64) -> String {
    json!({ "TTL": ttl_secs.to_string() }).to_string()
}

/// `/v3/lease/keepalive` and `/v3/lease/revoke`
pub(super) fn lease(id: LeaseId) -> String {
    json!({ "ID": id.0.to_string() }).to_string()
}

/// `/v3/lease/timetolive`
pub(super) fn lease_keys(id: LeaseId) -> String {
    json!({ "ID": id.0.to_string(), "keys": true }).to_string()
}

/// `/v3/lease/timetolive`, without the keys
pub(super) fn time_to_live(id: LeaseId) -> String {
    json!({ "ID": id.0.to_string() }).to_string()
}

/// `/v3/kv/range`
pub(super) fn range(range: &Range) -> String {
    range_value(range).to_string()
}

/// `/v3/kv/txn`
pub(super) fn txn(txn: &Txn) -> String {
    let ops = |ops: &[Op]| ops.iter().map(op).collect::<Vec<_>>();
    json!({
        "compare": txn.compare.iter().map(compare).collect::<Vec<_>>(),
        "success": ops(&txn.then),
        "failure": ops(&txn.or_else),
    })
    .to_string()
}

/// `/v3/watch`
pub(super) fn watch(key: &[u8], end: &[u8], from_revision: i64) -> String {
    let create = json!({
        "key": base64(key),
        "range_end": base64(end),
        "start_revision": from_revision.to_string(),
        "progress_notify": true,
    });
    json!({ "create_request": create }).to_string()
}

fn compare(compare: &Compare) -> Value {
    let (target, key, end, revision) = match compare {
        Compare::CreateRevision { key, revision } => ("CREATE", key, &[][..], *revision),
        Compare::ModRevision { key, revision } => ("MOD", key, &[][..], *revision),
        Compare::Empty { key, end } => ("CREATE", key, &end[..], 0),
    };
    let field = if target == "MOD" { "mod_revision" } else { "create_revision" };
    json!({
        "target": target,
        "result": "EQUAL",
        "key": base64(key),
        "range_end": base64(end),
        field: revision.to_string(),
    })
}

fn op(op: &Op) -> Value {
    match op {
        Op::Put { key, value, lease } => json!({ "request_put": {
            "key": base64(key),
            "value": base64(value),
            "lease": lease.unwrap_or_default().0.to_string(),
        }}),
        Op::Delete { key } => json!({ "request_delete_range": { "key": base64(key) } }),
        Op::Range(range) => json!({ "request_range": range_value(range) }),
    }
}

fn range_value(range: &Range) -> Value {
    json!({
        "key": base64(&range.key),
        "range_end": base64(&range.end),
        "limit": range.limit.to_string(),
        "revision": range.revision.to_string(),
        "sort_order": "ASCEND",
        "sort_target": match range.sort {
            Sort::Key => "KEY",
            Sort::CreateRevision => "CREATE",
        },
    })
}

fn base64(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

/// The token for the header `Authorization`.
pub(super) fn read_token(body: &[u8]) -> Result<String, Failure> {
    let reply: TokenWire = read(body)?;
    // It goes into a header, in which not everything may stand.
    let is_token = !reply.token.is_empty() && reply.token.bytes().all(|b| b.is_ascii_graphic());
    if is_token { Ok(reply.token) } else { Err(bad("that is no token")) }
}

pub(super) fn read_lease(body: &[u8]) -> Result<Lease, Failure> {
    let reply: LeaseWire = read(body)?;
    match (reply.id.0, u64::try_from(reply.ttl.0)) {
        (id, Ok(ttl_secs)) if id != 0 && ttl_secs > 0 => Ok(Lease { id: LeaseId(id), ttl_secs }),
        _ => Err(bad("the lease has no ID or no TTL")),
    }
}

/// The answer about the lease `asked`, which etcd streams, as it does those of a watch.
pub(super) fn read_kept_alive(body: &[u8], asked: LeaseId) -> Result<KeptAlive, Failure> {
    let reply: LeaseWire = read_streamed(body)?;
    if reply.id.0 != asked.0 {
        return Err(bad("it is about another lease"));
    }
    let ttl_secs = u64::try_from(reply.ttl.0).map_err(|_| bad("the TTL is negative"))?;
    Ok(KeptAlive { ttl_secs, revision: reply.header.revision()?, is_behind: false })
}

/// The keys of a lease; none, if it has ended.
pub(super) fn read_lease_keys(body: &[u8]) -> Result<Vec<Vec<u8>>, Failure> {
    let reply: LeaseKeysWire = read(body)?;
    Ok(reply.keys.into_iter().map(|key| key.0).collect())
}

/// What is left of a lease's time.
pub(super) fn read_time_to_live(body: &[u8]) -> Result<Option<TimeToLive>, Failure> {
    let reply: TimeToLiveWire = read(body)?;
    let (left, granted) = (u64::try_from(reply.ttl.0), u64::try_from(reply.granted_ttl.0));
    // etcd says -1 of a lease that has ended.
    Ok(left.ok().zip(granted.ok()).map(|(left_secs, granted_secs)| TimeToLive { granted_secs, left_secs }))
}

/// Nothing is told but that it was done.
pub(super) fn read_revoked(body: &[u8]) -> Result<(), Failure> {
    let reply: Headed = read(body)?;
    reply.header.revision().map(drop)
}

pub(super) fn read_range(body: &[u8]) -> Result<RangeReply, Failure> {
    let reply: RangeWire = read(body)?;
    let revision = reply.header.unwrap_or_default().revision()?;
    Ok(RangeReply { revision, kvs: key_values(reply.kvs)?, more: reply.more })
}

/// The answer to `asked`, with as many parts as the list has that was carried out.
pub(super) fn read_txn(body: &[u8], asked: &Txn) -> Result<TxnReply, Failure> {
    let reply: TxnWire = read(body)?;
    let ops = if reply.succeeded { &asked.then } else { &asked.or_else };
    if ops.len() != reply.responses.len() {
        return Err(bad(&format!("{} answers to {} operations", reply.responses.len(), ops.len())));
    }
    let mut ranges = Vec::new();
    for (op, response) in ops.iter().zip(reply.responses) {
        match (op, response.response_range) {
            (Op::Range(_), Some(range)) => ranges.push(key_values(range.kvs)?),
            (Op::Range(_), None) | (_, Some(_)) => return Err(bad("the answer to another operation")),
            (_, None) => {}
        }
    }
    Ok(TxnReply { revision: reply.header.revision()?, succeeded: reply.succeeded, ranges })
}

/// One line of a watch.
pub(super) fn read_watch(line: &[u8]) -> Result<WatchReply, Failure> {
    let reply: WatchWire = read_streamed(line)?;
    // Only the message that says that the past is forgotten comes without a revision.
    let revision = if reply.canceled { reply.header.revision.0 } else { reply.header.revision()? };
    let events = reply.events.into_iter().map(event).collect::<Result<_, _>>()?;
    Ok(WatchReply {
        revision,
        created: reply.created,
        canceled: reply.canceled.then(|| one_line(&reply.cancel_reason)),
        compact_revision: reply.compact_revision.0,
        events,
    })
}

/// What an answer says about the store, whatever else is in it.
pub(super) fn read_header(body: &[u8]) -> Header {
    let wire: AnyWire = serde_json::from_slice(body).unwrap_or_default();
    let header = wire.result.map_or(wire.header, |result| result.header);
    Header { cluster_id: header.cluster_id.0, revision: header.revision.0 }
}

/// What etcd says is wrong: gRPC's code, and a message. `None`: this is not of etcd.
///
/// Calls and streams have different shapes, and those of etcd 3.6 are different again.
pub(super) fn read_refusal(body: &[u8]) -> Option<(i64, String)> {
    if let Ok(RefusalWire { code: Some(code), message }) = serde_json::from_slice(body) {
        return Some((code.0, message));
    }
    let StreamRefusalWire { error } = serde_json::from_slice(body).ok()?;
    Some((error.grpc_code.or(error.code)?.0, error.message))
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|e| bad(&e.to_string()))
}

fn read_streamed<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    match read::<Streamed<T>>(body)?.result {
        Some(result) => Ok(result),
        None => Err(match read_refusal(body) {
            Some((code, message)) => Failure::from_etcd(code, &message),
            None => bad("neither a result nor an error"),
        }),
    }
}

fn bad(why: &str) -> Failure {
    Failure::BadReply(format!("bad answer: {}", one_line(why)))
}

fn key_values(wire: Vec<KeyValueWire>) -> Result<Vec<KeyValue>, Failure> {
    wire.into_iter().map(key_value).collect()
}

fn key_value(wire: KeyValueWire) -> Result<KeyValue, Failure> {
    if wire.key.0.is_empty() || wire.create_revision.0 <= 0 || wire.mod_revision.0 <= 0 {
        return Err(bad("a key without its name or its revisions"));
    }
    Ok(KeyValue {
        key: wire.key.0,
        value: wire.value.0,
        create_revision: wire.create_revision.0,
        mod_revision: wire.mod_revision.0,
        lease: LeaseId(wire.lease.0),
    })
}

fn event(wire: EventWire) -> Result<Event, Failure> {
    match wire.kind {
        EventKind::Put => key_value(wire.kv).map(Event::Put),
        EventKind::Delete if wire.kv.key.0.is_empty() || wire.kv.mod_revision.0 <= 0 => {
            Err(bad("the end of a key without its name or its revision"))
        }
        EventKind::Delete => Ok(Event::Delete { key: wire.kv.key.0, mod_revision: wire.kv.mod_revision.0 }),
    }
}

// The answers as they are written. The names are etcd's (rpc.proto, kv.proto).

#[derive(Default, Deserialize)]
#[serde(default)]
struct HeaderWire {
    cluster_id: Unsigned,
    revision: Int,
}

impl HeaderWire {
    /// The first revision of a store is 1, so that it is never left out.
    fn revision(&self) -> Result<i64, Failure> {
        if self.revision.0 > 0 { Ok(self.revision.0) } else { Err(bad("there is no revision")) }
    }
}

#[derive(Default, Deserialize)]
struct Headed {
    #[serde(default)]
    header: HeaderWire,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AnyWire {
    header: HeaderWire,
    result: Option<Headed>,
}

#[derive(Deserialize)]
struct TokenWire {
    token: String,
}

#[derive(Deserialize)]
struct LeaseWire {
    header: HeaderWire,
    #[serde(rename = "ID")]
    id: Int,
    /// Left out for a lease that is gone.
    #[serde(rename = "TTL", default)]
    ttl: Int,
}

#[derive(Deserialize)]
struct TimeToLiveWire {
    #[serde(rename = "TTL", default)]
    ttl: Int,
    #[serde(rename = "grantedTTL", default)]
    granted_ttl: Int,
}

#[derive(Deserialize)]
struct LeaseKeysWire {
    #[serde(default)]
    keys: Vec<Bytes>,
}

#[derive(Deserialize)]
struct RangeWire {
    header: Option<HeaderWire>,
    #[serde(default)]
    kvs: Vec<KeyValueWire>,
    #[serde(default)]
    more: bool,
}

#[derive(Deserialize)]
struct TxnWire {
    header: HeaderWire,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<ResponseWire>,
}

#[derive(Deserialize)]
struct ResponseWire {
    response_range: Option<RangeWire>,
}

#[derive(Deserialize)]
struct Streamed<T> {
    result: Option<T>,
}

#[derive(Deserialize)]
struct WatchWire {
    header: HeaderWire,
    #[serde(default)]
    created: bool,
    #[serde(default)]
    canceled: bool,
    #[serde(default)]
    cancel_reason: String,
    #[serde(default)]
    compact_revision: Int,
    #[serde(default)]
    events: Vec<EventWire>,
}

#[derive(Deserialize)]
struct EventWire {
    #[serde(rename = "type", default)]
    kind: EventKind,
    kv: KeyValueWire,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum EventKind {
    #[default]
    Put,
    Delete,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct KeyValueWire {
    key: Bytes,
    value: Bytes,
    create_revision: Int,
    mod_revision: Int,
    lease: Int,
}

#[derive(Deserialize)]
struct RefusalWire {
    code: Option<Int>,
    message: String,
}

#[derive(Deserialize)]
struct StreamRefusalWire {
    error: StreamErrorWire,
}

#[derive(Deserialize)]
struct StreamErrorWire {
    grpc_code: Option<Int>,
    code: Option<Int>,
    message: String,
}

/// A 64-bit number, which is a string, or else a number.
#[derive(Clone, Copy, Default)]
struct Int(i64);

impl<'de> Deserialize<'de> for Int {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Int, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = Int;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a 64-bit number")
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Int, E> {
                Ok(Int(number))
            }
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Int, E> {
                number.try_into().map(Int).map_err(E::custom)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Int, E> {
                text.parse().map(Int).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// An unsigned 64-bit number, as the ids of clusters are.
#[derive(Clone, Copy, Default)]
struct Unsigned(u64);

impl<'de> Deserialize<'de> for Unsigned {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Unsigned, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::String(text) => text.parse().map(Unsigned).map_err(de::Error::custom),
            other => {
                other.as_u64().map(Unsigned).ok_or_else(|| de::Error::custom("no unsigned 64-bit number"))
            }
        }
    }
}

/// Bytes, in base64.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text).map(Bytes).map_err(de::Error::custom)
    }
}
