use proptest::prelude::*;
use serde_json::Value;

use super::*;

const HEADER: &str = r#""header":{"cluster_id":"1","member_id":"2","revision":"7","raft_term":"2"}"#;

fn is_bad<T: fmt::Debug>(reply: Result<T, Failure>) -> bool {
    matches!(reply, Err(Failure::BadReply(_)))
}

fn parsed(request: &str) -> Value {
    serde_json::from_str(request).unwrap()
}

/// The txn that the answers here are about: a put and a range, or else a range.
fn example_txn() -> Txn {
    let range =
        Range { key: b"a".into(), end: b"b".into(), limit: 3, revision: 4, sort: Sort::CreateRevision };
    Txn {
        compare: vec![
            Compare::CreateRevision { key: b"a".into(), revision: i64::MAX },
            Compare::ModRevision { key: b"a".into(), revision: 7 },
            Compare::Empty { key: b"a".into(), end: b"b".into() },
        ],
        then: vec![
            Op::Put { key: b"a".into(), value: b"\0\xff".into(), lease: Some(LeaseId(9)) },
            Op::Range(range.clone()),
            Op::Delete { key: b"d".into() },
        ],
        or_else: vec![Op::Range(range)],
    }
}

#[test]
fn requests_are_as_the_gateway_reads_them() {
    assert_eq!(parsed(&grant_lease(10)), json!({ "TTL": "10" }));
    assert_eq!(parsed(&lease(LeaseId(i64::MAX))), json!({ "ID": "9223372036854775807" }));
    let range = json!({ "key": "YQ==", "range_end": "Yg==", "limit": "3", "revision": "4", "sort_order": "ASCEND", "sort_target": "CREATE" });
    assert_eq!(
        parsed(&txn(&example_txn())),
        json!({
            "compare": [
                { "target": "CREATE", "result": "EQUAL", "key": "YQ==", "range_end": "", "create_revision": "9223372036854775807" },
                { "target": "MOD", "result": "EQUAL", "key": "YQ==", "range_end": "", "mod_revision": "7" },
                { "target": "CREATE", "result": "EQUAL", "key": "YQ==", "range_end": "Yg==", "create_revision": "0" },
            ],
            "success": [
                { "request_put": { "key": "YQ==", "value": "AP8=", "lease": "9" } },
                { "request_range": range },
                { "request_delete_range": { "key": "ZA==" } },
            ],
            "failure": [{ "request_range": range }],
        })
    );
    let create = json!({ "key": "YQ==", "range_end": "", "start_revision": "5", "progress_notify": true });
    assert_eq!(parsed(&watch(b"a", b"", 5)), json!({ "create_request": create }));
}

#[test]
fn a_lease_is_read_with_its_numbers_as_strings_or_not() {
    for numbers in [r#""ID":"23","TTL":"5""#, r#""ID":23,"TTL":5,"error":"","more":[{}]"#] {
        let reply = format!("{{{HEADER},{numbers}}}");
        assert_eq!(read_lease(reply.as_bytes()), Ok(Lease { id: LeaseId(23), ttl_secs: 5 }));
    }
    for numbers in [
        r#""ID":"0","TTL":"5""#,
        r#""TTL":"5""#,
        r#""ID":"23""#,
        r#""ID":"23","TTL":"-5""#,
        r#""ID":"9223372036854775808","TTL":"5""#,
        r#""ID":9223372036854775808,"TTL":"5""#,
        r#""ID":"2 3","TTL":"5""#,
        r#""ID":2.5,"TTL":"5""#,
        r#""ID":null,"TTL":"5""#,
        r#""ID":"23","ID":"23","TTL":"5""#,
    ] {
        assert!(is_bad(read_lease(format!("{{{HEADER},{numbers}}}").as_bytes())), "{numbers}");
    }
}

#[test]
fn a_keep_alive_without_a_ttl_is_of_a_lease_that_is_gone() {
    let read = |result: &str| read_kept_alive(format!(r#"{{"result":{result}}}"#).as_bytes(), LeaseId(23));
    let kept = |ttl_secs| Ok(KeptAlive { ttl_secs, revision: 7, is_behind: false });
    assert_eq!(read(&format!(r#"{{{HEADER},"ID":"23","TTL":"5"}}"#)), kept(5));
    assert_eq!(read(&format!(r#"{{{HEADER},"ID":"23"}}"#)), kept(0));
    for result in [
        format!(r#"{{{HEADER},"ID":"24","TTL":"5"}}"#),
        format!(r#"{{{HEADER},"ID":"23","TTL":"-1"}}"#),
        r#"{"ID":"23","TTL":"5"}"#.into(),
        r#"{"header":{},"ID":"23","TTL":"5"}"#.into(),
        "null".into(),
    ] {
        assert!(is_bad(read(&result)), "{result}");
    }
}

#[test]
fn a_txn_is_read_with_the_ranges_that_were_carried_out() {
    let kv =
        r#"{"key":"YQ==","create_revision":"2","mod_revision":"6","version":"1","value":"AP8=","lease":"9"}"#;
    let read = |rest: &str| read_txn(format!("{{{HEADER}{rest}}}").as_bytes(), &example_txn());
    let done = format!(
        r#","succeeded":true,"responses":[{{"response_put":{{}}}},{{"response_range":{{"kvs":[{kv}],"count":"1"}}}},{{"response_delete_range":{{}}}}]"#
    );
    let (key, value) = (b"a".to_vec(), b"\0\xff".to_vec());
    let kv = KeyValue { key, value, create_revision: 2, mod_revision: 6, lease: LeaseId(9) };
    assert_eq!(read(&done), Ok(TxnReply { revision: 7, succeeded: true, ranges: vec![vec![kv]] }));
    let not_done = r#","responses":[{"response_range":{}}]"#;
    assert_eq!(read(not_done), Ok(TxnReply { revision: 7, succeeded: false, ranges: vec![vec![]] }));
    for rest in [
        "",
        r#","succeeded":true"#,
        r#","responses":[{"response_put":{}}]"#,
        r#","responses":[{}]"#,
        r#","responses":[{"response_range":{"kvs":[{}]}}]"#,
        r#","responses":[{"response_range":{"kvs":[{"key":"YQ==","create_revision":"2"}]}}]"#,
        r#","responses":[{"response_range":{"kvs":[{"key":"Y","create_revision":"2","mod_revision":"2"}]}}]"#,
        r#","responses":[{"response_range":{}},{"response_range":{}}]"#,
    ] {
        assert!(is_bad(read(rest)), "{rest}");
    }
}

#[test]
fn a_range_is_read() {
    let read = |rest: &str| read_range(format!("{{{HEADER}{rest}}}").as_bytes());
    assert_eq!(read(""), Ok(RangeReply { revision: 7, kvs: Vec::new(), more: false }));
    assert!(read(r#","more":true,"count":"9""#).unwrap().more);
    assert!(is_bad(read_range(b"{}")));
}

#[test]
fn a_watch_is_read_line_by_line() {
    let read = |rest: &str| read_watch(format!(r#"{{"result":{{{HEADER}{rest}}}}}"#).as_bytes());
    let nothing =
        WatchReply { revision: 7, created: false, canceled: None, compact_revision: 0, events: Vec::new() };
    assert_eq!(read(""), Ok(nothing.clone()));
    assert_eq!(read(r#","created":true"#), Ok(WatchReply { created: true, ..nothing.clone() }));
    let events = r#","events":[{"kv":{"key":"YQ==","create_revision":"2","mod_revision":"6"}},{"type":"DELETE","kv":{"key":"YQ==","mod_revision":"7"}}]"#;
    let put = KeyValue {
        key: b"a".to_vec(),
        value: Vec::new(),
        create_revision: 2,
        mod_revision: 6,
        lease: LeaseId(0),
    };
    let events_read = vec![Event::Put(put), Event::Delete { key: b"a".to_vec(), mod_revision: 7 }];
    assert_eq!(read(events), Ok(WatchReply { events: events_read, ..nothing }));
    for rest in [
        r#","events":[{}]"#,
        r#","events":[{"type":"MOVE","kv":{"key":"YQ==","create_revision":"2","mod_revision":"6"}}]"#,
        r#","events":[{"type":"DELETE","kv":{"key":"YQ=="}}]"#,
        r#","events":[{"type":"DELETE","kv":{"mod_revision":"7"}}]"#,
        r#","events":{}"#,
    ] {
        assert!(is_bad(read(rest)), "{rest}");
    }
}

#[test]
fn a_watch_from_a_forgotten_past_is_canceled_without_a_revision_or_a_reason() {
    let line = br#"{"result":{"header":{"raft_term":"2"},"canceled":true,"compact_revision":"5"}}"#;
    let reply = read_watch(line).unwrap();
    assert_eq!((reply.canceled.as_deref(), reply.compact_revision, reply.revision), (Some(""), 5, 0));
}

#[test]
fn a_refusal_is_read_in_each_of_its_shapes() {
    for text in [
        r#"{"error":"e","message":"m","code":5}"#,
        r#"{"code":5,"message":"m","details":[]}"#,
        r#"{"error":{"grpc_code":5,"http_code":404,"message":"m","http_status":"Not Found"}}"#,
        r#"{"error":{"code":5,"message":"m","details":[]}}"#,
    ] {
        assert_eq!(read_refusal(text.as_bytes()), Some((5, "m".into())), "{text}");
    }
    for text in
        ["", "Not Found", "{}", r#"{"error":"e"}"#, r#"{"error":{"message":"m"}}"#, r#"{"message":"m"}"#]
    {
        assert_eq!(read_refusal(text.as_bytes()), None, "{text}");
    }
    let streamed = br#"{"error":{"grpc_code":14,"message":"etcdserver: no leader"}}"#;
    assert_eq!(read_watch(streamed), Err(Failure::no_answer("etcdserver: no leader")));
}

#[test]
fn a_token_is_fit_for_a_header() {
    let read = |token: &str| read_token(json!({ "token": token }).to_string().as_bytes());
    assert_eq!(read("abc.17"), Ok("abc.17".into()));
    for token in ["", "a b", "a\r\nHost: x", "é"] {
        assert!(is_bad(read(token)), "{token:?}");
    }
}

/// Gives one text to each reader, and returns why each one refuses it.
fn failures_of_all_readers(text: &[u8]) -> [Option<Failure>; 7] {
    [
        read_token(text).err(),
        read_lease(text).err(),
        read_kept_alive(text, LeaseId(23)).err(),
        read_revoked(text).err(),
        read_range(text).err(),
        read_txn(text, &example_txn()).err(),
        read_watch(text).err(),
    ]
}

/// Gives one text to each reader. What a reader makes of the text does not matter here.
fn read_all(text: &[u8]) {
    for failure in failures_of_all_readers(text).into_iter().flatten() {
        assert!(failure.to_string().len() < 2000);
    }
    let _ = read_refusal(text);
}

fn any_json() -> impl Strategy<Value = Value> {
    let name = prop::sample::select(vec![
        "header",
        "revision",
        "result",
        "error",
        "code",
        "grpc_code",
        "message",
        "ID",
        "TTL",
        "token",
        "kvs",
        "kv",
        "key",
        "value",
        "create_revision",
        "mod_revision",
        "lease",
        "more",
        "succeeded",
        "responses",
        "response_range",
        "events",
        "type",
        "created",
        "canceled",
        "cancel_reason",
        "compact_revision",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<i64>().prop_map(|number| Value::from(number.to_string())),
        "[A-Za-z0-9+/]{0,6}={0,2}".prop_map(Value::from),
        Just(Value::from("DELETE")),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(name.clone().prop_map(String::from), inner, 0..8)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn no_json_makes_it_panic(value in any_json()) {
        read_all(value.to_string().as_bytes());
        read_all(json!({ "result": value }).to_string().as_bytes());
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        read_all(&bytes);
    }

    #[test]
    fn no_damage_to_a_good_answer_makes_it_panic(at in 0usize..200, byte in any::<u8>(), cut in 0usize..200) {
        let kv = r#"{"key":"YQ==","create_revision":"2","mod_revision":"6","value":"AP8="}"#;
        let mut text = format!(r#"{{"result":{{{HEADER},"events":[{{"type":"DELETE","kv":{kv}}},{{"kv":{kv}}}]}}}}"#).into_bytes();
        prop_assert!(read_watch(&text).is_ok());
        text[at] = byte;
        read_all(&text);
        text.truncate(cut);
        read_all(&text);
    }
}

#[test]
fn what_is_nested_too_deeply_is_refused_by_each_reader() {
    // Far deeper than a stack of 2 MiB has room for, if a reader called itself for each level.
    const DEPTH: usize = 100_000;
    let nested = [("[", "]"), (r#"{"result":"#, "}"), (r#"{"header":"#, "}"), (r#"{"a":"#, "}")];
    for (open, close) in nested {
        let text = [open.repeat(DEPTH), "0".into(), close.repeat(DEPTH)].concat();
        for (reader, failure) in failures_of_all_readers(text.as_bytes()).into_iter().enumerate() {
            assert!(failure.is_some(), "reader {reader} takes {open}...");
        }
        assert_eq!(read_refusal(text.as_bytes()), None, "{open}");
    }
}
