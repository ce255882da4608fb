//! Protocol 2, as docs/protocol.md describes it, and both protocols on the same keys.

use serde_json::json;

use crate::harness::{Daemon, PREAMBLE, Wire};

/// The identity of the key `hello`: what `printf hello | md5sum` prints.
const HELLO: [u8; 16] = 0x5d41402abc4b2a76b9719d911017c592_u128.to_be_bytes();

const ONCE: &str = r#"{"type":"lock","key":"hello"}"#;
const QUEUE: &str = r#"{"type":"lock","key":"hello","mode":"queue"}"#;
const NOWAIT: &str = r#"{"type":"lock","key":"hello","nowait":true}"#;
const RELEASE: &str = r#"{"type":"release","outcome":{"exit":0}}"#;
const PING: &str = r#"{"type":"ping"}"#;

#[test]
fn the_greeting_and_the_first_answer_come_in_one_write() {
    let daemon = Daemon::start();
    let mut client = daemon.wire();
    client.send([PREAMBLE, ONCE.as_bytes(), b"\n"].concat());
    let both = client.read_once();
    let lines: Vec<serde_json::Value> =
        both.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2, "{both}");
    assert_eq!(lines[0]["type"], "hello");
    assert_eq!(lines[0]["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(lines[0]["pid"], daemon.pid().as_raw());
    assert_eq!(lines[1]["type"], "granted");
}

#[test]
fn the_preamble_and_a_line_may_come_byte_by_byte() {
    let daemon = Daemon::start();
    let mut client = daemon.wire();
    for byte in [PREAMBLE, PING.as_bytes(), b"\n"].concat() {
        client.send([byte]);
    }
    client.answer_of("hello");
    client.answer_of("pong");
}

#[test]
fn a_lock_is_granted_released_and_granted_with_a_larger_token() {
    let daemon = Daemon::start();
    let mut client = daemon.wire();
    let first = client.open(ONCE).answer_of("granted")["token"].as_u64().unwrap();
    client.request(RELEASE).answer_of("released");
    let second = client.request(QUEUE).answer_of("granted")["token"].as_u64().unwrap();
    assert!(second > first);
    assert!(second < 1 << 53, "every reader of JSON can hold it");
}

#[test]
fn a_once_waiter_is_told_the_outcome() {
    let daemon = Daemon::start();
    for outcome in [json!({"exit": 0}), json!({"exit": 255}), json!({"signal": 9}), json!("unknown")] {
        let (mut holder, mut waiter) = (daemon.wire(), daemon.wire());
        let token = holder.open(ONCE).answer_of("granted")["token"].clone();
        waiter.open(ONCE).answer_of("waiting");
        holder.request(&json!({"type": "release", "outcome": outcome}).to_string()).answer_of("released");
        assert_eq!(waiter.answer(), json!({"type": "finished", "outcome": outcome, "token": token}));
        // It is idle again, and may ask again.
        waiter.request(ONCE).answer_of("granted");
    }
}

#[test]
fn a_waiter_hears_who_holds_and_how_many_are_ahead() {
    let daemon = Daemon::start();
    let mut holder = daemon.wire();
    let who = r#"{"type":"lock","key":"hello","who":{"host":"h","user":"u","command":"c","note":"n"}}"#;
    holder.open(who).answer_of("granted");
    let mut first = daemon.wire();
    let waiting = first.open(QUEUE).answer_of("waiting");
    assert_eq!(waiting["ahead"], 0);
    let party = &waiting["holders"][0];
    assert_eq!(party["pid"], std::process::id(), "the kernel's");
    for (field, value) in [("host", "h"), ("user", "u"), ("command", "c"), ("note", "n")] {
        assert_eq!(party[field], value);
    }
    let mut second = daemon.wire();
    assert_eq!(second.open(QUEUE).answer_of("waiting")["ahead"], 1);
}

#[test]
fn no_client_of_this_machine_passes_for_another_process() {
    let daemon = Daemon::start();
    let here = nix::unistd::gethostname().unwrap().to_string_lossy().into_owned();
    for (pid, host, shown) in
        [(1, here.as_str(), 0), (1, "", 0), (std::process::id(), "", std::process::id())]
    {
        let mut holder = daemon.wire();
        let who = json!({"pid": pid, "host": host});
        holder.open(&json!({"type": "lock", "key": "k", "who": who}).to_string()).answer_of("granted");
        assert_eq!(daemon.status()[0]["holders"][0]["pid"], shown, "{pid} {host:?}");
        holder.request(RELEASE).answer_of("released");
    }
}

#[test]
fn the_queue_is_served_in_order() {
    let daemon = Daemon::start();
    let mut holder = daemon.wire();
    holder.open(ONCE).answer_of("granted");
    let mut waiters: Vec<_> = (0..5).map(|_| daemon.wire()).collect();
    for waiter in &mut waiters {
        waiter.open(QUEUE).answer_of("waiting");
    }
    holder.request(RELEASE).answer_of("released");
    for waiter in &mut waiters {
        waiter.answer_of("granted");
        waiter.request(RELEASE).answer_of("released");
    }
}

#[test]
fn who_does_not_wait_is_told_who_holds() {
    let daemon = Daemon::start();
    let (mut holder, mut other) = (daemon.wire(), daemon.wire());
    holder.open(ONCE).answer_of("granted");
    let busy = other.open(NOWAIT).answer_of("busy");
    assert_eq!(busy["holders"].as_array().unwrap().len(), 1);
    holder.request(RELEASE).answer_of("released");
    other.request(NOWAIT).answer_of("granted");
}

/// Whatever was written to the daemon first has happened first, on whichever connections it was written.
#[test]
fn no_client_is_refused_because_of_a_hold_that_has_ended() {
    let daemon = Daemon::start();
    let (mut one, mut two) = (daemon.wire(), daemon.wire());
    one.open(PING).answer_of("pong");
    two.open(PING).answer_of("pong");
    for request in [NOWAIT, ONCE] {
        for _ in 0..1000 {
            one.request(request).answer_of("granted");
            // Sent and not waited for: both are there when the daemon looks.
            one.request(RELEASE);
            two.request(request).answer_of("granted");
            one.answer_of("released");
            two.request(RELEASE).answer_of("released");
        }
    }
}

#[test]
fn a_holder_that_vanishes_leaves_the_lock_to_the_oldest_waiter_alone() {
    let daemon = Daemon::start();
    let mut holder = daemon.wire();
    holder.open(ONCE).answer_of("granted");
    let mut waiters: Vec<_> = (0..3).map(|_| daemon.wire()).collect();
    for waiter in &mut waiters {
        waiter.open(ONCE).answer_of("waiting");
    }
    drop(holder);
    waiters[0].answer_of("granted");
    waiters[0].request(RELEASE).answer_of("released");
    for waiter in &mut waiters[1..] {
        assert_eq!(waiter.answer_of("finished")["outcome"], json!({"exit": 0}), "of the second holder");
    }
}

#[test]
fn the_end_of_a_client_that_became_the_command_is_an_outcome() {
    let daemon = Daemon::start();
    let (mut holder, mut waiter) = (daemon.wire(), daemon.wire());
    holder.open(r#"{"type":"lock","key":"hello","exec":true}"#).answer_of("granted");
    waiter.open(ONCE).answer_of("waiting");
    drop(holder);
    assert_eq!(waiter.answer_of("finished")["outcome"], "unknown");
}

#[test]
fn both_protocols_mean_the_same_lock() {
    let daemon = Daemon::start();
    let (mut old, mut new) = (daemon.wire(), daemon.wire());
    old.send(HELLO).expect("O");
    assert_eq!(new.open(ONCE).answer_of("waiting")["holders"][0]["protocol"], 1);
    old.send("R");
    assert_eq!(new.answer_of("finished")["outcome"], "unknown");

    new.request(ONCE).answer_of("granted");
    old.send(HELLO);
    daemon.wait_for_logs("wait: ", 2);
    new.request(RELEASE).answer_of("released");
    old.expect("R");

    old.send(HELLO).expect("O");
    new.request(ONCE).answer_of("waiting");
    drop(old);
    new.answer_of("granted");
}

#[test]
fn a_vanished_holder_is_gone_for_waiters_of_protocol_1() {
    let daemon = Daemon::start();
    let (mut holder, mut old, mut new) = (daemon.wire(), daemon.wire(), daemon.wire());
    holder.open(ONCE).answer_of("granted");
    old.send(HELLO);
    daemon.wait_for_log("wait: ");
    new.open(ONCE).answer_of("waiting");
    drop(holder);
    old.expect("R");
    new.answer_of("granted");
}

#[test]
fn requests_that_do_not_fit_the_state_are_errors_and_change_nothing() {
    let daemon = Daemon::start();
    let (mut holder, mut waiter) = (daemon.wire(), daemon.wire());
    holder.open(RELEASE);
    assert_eq!(holder.answer_of("error")["code"], "wrong_state");
    holder.request(ONCE).answer_of("granted");
    holder.request(QUEUE);
    assert_eq!(holder.answer_of("error")["code"], "wrong_state");
    waiter.open(QUEUE).answer_of("waiting");
    waiter.request(RELEASE);
    assert_eq!(waiter.answer_of("error")["code"], "wrong_state");
    holder.request(RELEASE).answer_of("released");
    waiter.answer_of("granted");
}

#[test]
fn bad_requests_are_errors_and_the_connection_goes_on() {
    let daemon = Daemon::start();
    let mut client = daemon.wire();
    client.open(PING).answer_of("pong");
    let long = format!(r#"{{"type":"lock","key":"{}"}}"#, "k".repeat(1025));
    for (request, code) in [
        (r#"{"type":"dance"}"#, "unknown_type"),
        (r#"{"key":"hello"}"#, "bad_request"),
        (r#"{"type":"lock"}"#, "bad_request"),
        (r#"{"type":"lock","key":7}"#, "bad_request"),
        (r#"{"type":"lock","key":"hello","mode":"twice"}"#, "bad_request"),
        (r#"{"type":"lock","key":"hello","slots":0}"#, "bad_request"),
        (r#"{"type":"lock","key":"hello","slots":2,"shared":true}"#, "bad_request"),
        (r#"{"type":"lock","key":"hello","nonce":"xyz"}"#, "bad_request"),
        (r#"{"type":"lock","key":""}"#, "bad_key"),
        (&long, "bad_key"),
        (r#"{"type":"break"}"#, "bad_request"),
        (r#"{"type":"child"}"#, "bad_request"),
    ] {
        client.request(request);
        assert_eq!(client.answer_of("error")["code"], code, "{request}");
    }
    client.request(r#"{"type":"ping","colour":{"a":[1]}}"#).answer_of("pong");
    client.request(r#" {"type":"lock","key":"hello","later":1} "#).answer_of("granted");
}

/// The daemon closes a client that sends `frame`, and no other client notices.
fn is_closed_for(frame: &[u8], code: &str) {
    let daemon = Daemon::start();
    let (mut holder, mut waiter, mut client) = (daemon.wire(), daemon.wire(), daemon.wire());
    holder.open(ONCE).answer_of("granted");
    waiter.open(ONCE).answer_of("waiting");
    client.open(PING).answer_of("pong");
    client.send(frame);
    assert_eq!(client.answer_of("error")["code"], code);
    client.expect_closed();
    holder.request(RELEASE).answer_of("released");
    waiter.answer_of("finished");
}

#[test]
fn what_is_no_json_object_ends_the_connection() {
    for frame in
        ["hello\n", "\n", "[]\n", "\"lock\"\n", "{\"type\":\n", "\0\0\0\n", "{\"type\":\"ping\"}{}\n"]
    {
        is_closed_for(frame.as_bytes(), "bad_frame");
    }
}

#[test]
fn a_line_may_have_64_kib_and_not_a_byte_more() {
    let daemon = Daemon::start();
    let mut client = daemon.wire();
    let padded = |bytes: usize| {
        let (head, tail) = (r#"{"type":"ping","x":""#, "\"}\n");
        format!("{head}{}{tail}", "x".repeat(bytes - head.len() - tail.len()))
    };
    client.open(PING).answer_of("pong");
    client.send(padded(65536)).answer_of("pong");
    is_closed_for(padded(65537).as_bytes(), "bad_frame");
    is_closed_for("x".repeat(70_000).as_bytes(), "bad_frame");
}

#[test]
#[ignore = "takes many seconds"]
fn a_client_that_does_not_read_for_ten_seconds_is_disconnected() {
    let daemon = Daemon::start();
    let mut deaf = std::os::unix::net::UnixStream::connect(daemon.sock()).unwrap();
    use std::io::Write;
    deaf.write_all(PREAMBLE).unwrap();
    // Until the daemon closes: 64 MiB of answers would be far more than it may keep.
    let pings = format!("{PING}\n").repeat(4096);
    let cut_off = (0..1024).any(|_| deaf.write_all(pings.as_bytes()).is_err());
    assert!(cut_off);
    daemon.wait_for_log("does not read its answers");
    daemon.wire().open(ONCE).answer_of("granted");
}

#[test]
fn a_status_of_thousands_reaches_a_slow_reader_whole() {
    const LOCKS: usize = 3_000;
    let daemon = Daemon::start();
    let mut holders: Vec<Wire<_>> = (0..LOCKS).map(|_| daemon.wire()).collect();
    for (number, holder) in holders.iter_mut().enumerate() {
        let note = "n".repeat(200);
        holder
            .open(&format!(r#"{{"type":"lock","key":"key {number}","who":{{"note":"{note}"}}}}"#))
            .answer_of("granted");
    }
    let mut reader = daemon.wire();
    reader.open(r#"{"type":"status"}"#);
    // The daemon has said what fits; it goes on for others, and then for this one.
    daemon.wire().open(PING).answer_of("pong");
    reader.request(r#"{"type":"status"}"#);
    let mut keys = std::collections::BTreeSet::new();
    let mut refused = false;
    loop {
        let answer = reader.answer();
        match answer["type"].as_str().unwrap() {
            "lock" => assert!(keys.insert(answer["key"].as_str().unwrap().to_string()), "{answer}"),
            "error" => refused = answer["code"] == "wrong_state",
            "end" => break,
            other => panic!("{other}"),
        }
    }
    assert_eq!(keys.len(), LOCKS);
    assert!(refused, "one status at a time");
}

#[test]
fn a_status_may_be_of_one_key() {
    let daemon = Daemon::start();
    let (mut holder, mut reader) = (daemon.wire(), daemon.wire());
    holder.open(ONCE).answer_of("granted");
    let lock = reader.open(r#"{"type":"status","key":"hello"}"#).answer_of("lock");
    assert_eq!(lock["key"], "hello");
    assert_eq!(lock["id"], "5d41402abc4b2a76b9719d911017c592");
    assert_eq!((&lock["holding"], &lock["waiting"]), (&json!(1), &json!(0)));
    reader.answer_of("end");
    reader.request(r#"{"type":"status","key":"other"}"#).answer_of("end");
}

#[test]
fn a_lock_can_be_shared_and_an_exclusive_request_is_not_overtaken() {
    const SHARED: &str = r#"{"type":"lock","key":"hello","mode":"queue","shared":true}"#;
    let daemon = Daemon::start();
    let [mut one, mut two, mut alone, mut late] = std::array::from_fn(|_| daemon.wire());
    one.open(SHARED).answer_of("granted");
    two.open(SHARED).answer_of("granted");
    alone.open(QUEUE).answer_of("waiting");
    late.open(SHARED).answer_of("waiting");
    one.request(RELEASE).answer_of("released");
    two.request(RELEASE).answer_of("released");
    alone.answer_of("granted");
    alone.request(RELEASE).answer_of("released");
    late.answer_of("granted");
}
