//! That what one side writes is what the other reads, and that nothing a client sends can do worse than be refused.

use std::num::NonZeroU32;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;
use crate::proto::{KEY_BYTES_MAX, Key, Nonce, Outcome, Pid, Protocol, Token};

fn any_outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        any::<u8>().prop_map(Outcome::Exit),
        any::<u8>().prop_map(Outcome::Signal),
        Just(Outcome::Unknown),
        Just(Outcome::Vanished),
    ]
}

fn any_string(chars: impl Into<proptest::collection::SizeRange>) -> impl Strategy<Value = String> {
    vec(any::<char>(), chars).prop_map(String::from_iter)
}

fn any_key() -> impl Strategy<Value = Key> {
    any_string(1..=KEY_BYTES_MAX / 4).prop_map(|text| Key::new(text).unwrap())
}

fn any_text() -> impl Strategy<Value = ShortText> {
    any_string(0..=ShortText::BYTES_MAX).prop_map(ShortText::from)
}

fn any_who() -> impl Strategy<Value = ClientInfo> {
    (any::<u32>(), any_text(), any_text(), any_text(), any_text()).prop_map(
        |(pid, host, user, command, note)| ClientInfo { pid: Pid::new(pid), host, user, command, note },
    )
}

fn any_mode() -> impl Strategy<Value = Mode> {
    select(&[Mode::Once, Mode::Queue, Mode::Coalesce])
}

fn any_lock_request() -> impl Strategy<Value = LockRequest> {
    let slots = prop_oneof![Just((true, 1)), (1..=SLOTS_MAX).prop_map(|slots| (false, slots))];
    let nonce = option::of(any::<u128>().prop_map(Nonce));
    let resumed = (vec(option::of(any_token()), 2), option::of(any::<u32>()), option::of(any::<u64>()));
    let share = option::of(select(&[Share::Whole, Share::Live]));
    let flight =
        (any::<u64>(), any::<u64>(), any::<[bool; 2]>(), option::of(any::<u64>()), any::<u32>(), share);
    (any_key(), nonce, any_mode(), slots, any::<[bool; 4]>(), any_who(), resumed, flight).prop_map(
        |(key, nonce, mode, (shared, slots), flags, who, (tokens, child, place), flight)| {
            let [nowait, exec, inherits, offers] = flags;
            let (fresh_ms, fresh_failure_ms, [newest, no_replace], replace_after_ms, weight, share) = flight;
            let is_single = !shared && slots == 1;
            let mode = if is_single || mode != Mode::Coalesce { mode } else { Mode::Once };
            let share = share.filter(|_| is_single && !exec);
            let newest = newest && is_single && mode == Mode::Queue;
            LockRequest {
                key,
                nonce,
                mode,
                shared,
                slots,
                nowait,
                exec,
                offers,
                inherits,
                within: tokens[0],
                holds: tokens[1],
                child: child.and_then(Pid::new),
                place,
                fresh_ms: if is_single { fresh_ms } else { 0 },
                fresh_failure_ms: if is_single { fresh_failure_ms } else { 0 },
                newest,
                replace_after_ms: replace_after_ms.filter(|_| newest),
                no_replace,
                weight: NonZeroU32::new(weight % (slots + 1)),
                share,
                stale_ms: if share.is_some() { fresh_ms } else { 0 },
                sharer: 0,
                who,
            }
        },
    )
}

fn any_request() -> impl Strategy<Value = Request> {
    prop_oneof![
        4 => any_lock_request().prop_map(|asked| Request::Lock(Box::new(asked))),
        1 => Just(Request::Take),
        1 => any_outcome().prop_map(|outcome| Request::Release { outcome }),
        1 => (option::of(any_key()), any::<bool>()).prop_map(|(key, cluster)| Request::Status { key, cluster }),
        1 => (1..=u32::MAX).prop_map(|pid| Request::Child { pid: Pid::new(pid).unwrap() }),
        1 => any_key().prop_map(|key| Request::Break { key }),
        1 => any_key().prop_map(|key| Request::Forget { key }),
        1 => any::<u64>().prop_map(|held_ms| Request::Overdue { held_ms }),
        1 => (any_key(), 1..=u32::MAX, any_outcome())
            .prop_map(|(key, pid, outcome)| Request::Unlock { key, pid: Pid::new(pid).unwrap(), outcome }),
        1 => Just(Request::Ping),
        1 => Just(Request::Output),
        1 => Just(Request::Grown),
        1 => (1..=2_u8, any_string(0..20)).prop_map(|(stream, data)| Request::Piece { stream, data }),
        1 => any_text().prop_map(|why| Request::Withhold { why }),
    ]
}

fn any_token() -> impl Strategy<Value = Token> {
    (0..1_u64 << 53).prop_map(Token)
}

fn any_protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::V1), Just(Protocol::V2)]
}

fn any_party() -> impl Strategy<Value = LockUser> {
    let token = option::of(any_token());
    let mode = option::of(any_mode());
    (
        any_protocol(),
        option::of(any::<u32>()),
        any_who(),
        any::<u64>(),
        token,
        mode,
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(protocol, uid, who, for_ms, token, mode, shared, orphan)| LockUser {
            protocol,
            uid,
            who,
            for_ms,
            token,
            mode,
            shared,
            orphan,
        })
}

fn any_lease() -> impl Strategy<Value = LeaseTerms> {
    (any::<u64>(), any::<u64>()).prop_map(|(good_ms, margin_ms)| LeaseTerms { good_ms, margin_ms })
}

fn any_status() -> impl Strategy<Value = LockStatus> {
    let parties = || vec(any_party(), 0..3);
    (option::of(any_key()), parties(), any::<u32>(), parties(), any::<u32>()).prop_map(
        |(key, holders, holding, waiters, waiting)| LockStatus {
            id: key.as_ref().map(|key| key.id().to_string()).unwrap_or_default(),
            key: key.map(String::from),
            holders,
            holding,
            waiters,
            waiting,
            last_success: None,
            last_failure: None,
        },
    )
}

fn any_output() -> impl Strategy<Value = OutputAt> {
    prop_oneof![Just(OutputAt::Descriptor), Just(OutputAt::Pieces), any_text().prop_map(OutputAt::Withheld),]
}

fn any_run() -> impl Strategy<Value = RunStatus> {
    (any_outcome(), any_token(), any::<u64>(), any_text())
        .prop_map(|(outcome, token, age_ms, by)| RunStatus { outcome, token, age_ms, by })
}

fn any_stale() -> impl Strategy<Value = Box<Stale>> {
    (any_run(), any_output()).prop_map(|(run, output)| Box::new(Stale { run, output }))
}

fn any_answer() -> impl Strategy<Value = Answer> {
    use ErrorCode::*;
    let parties = || vec(any_party(), 0..3);
    let code = select(&[
        BadFrame,
        UnknownType,
        BadRequest,
        BadKey,
        WrongState,
        NotPermitted,
        CannotRecord,
        Unavailable,
        PerHost,
        Other,
    ]);
    prop_oneof![
        (any_string(0..20), any::<u32>(), any::<Option<u64>>())
            .prop_map(|(version, pid, peer_timeout_ms)| { Answer::Hello { version, pid, peer_timeout_ms } }),
        (any_token(), option::of(any_lease()), option::of(any_stale()))
            .prop_map(|(token, lease, stale)| Answer::Granted { token, lease, stale }),
        (any_run(), option::of(any_output())).prop_map(|(run, output)| Answer::Fresh { run, output }),
        any_token().prop_map(|token| Answer::Output { token }),
        select(&[Answer::Grown, Answer::Torn, Answer::Followed]),
        (1..=2_u8, any_string(0..20)).prop_map(|(stream, data)| Answer::Piece { stream, data }),
        (parties(), any::<u32>(), any::<u64>()).prop_map(|(holders, ahead, place)| Answer::Waiting {
            holders,
            ahead,
            place
        }),
        any_text().prop_map(|why| Answer::Lost { why }),
        Just(Answer::Broken),
        (any_outcome(), any_token(), option::of(any_output()))
            .prop_map(|(outcome, token, output)| Answer::Finished { outcome, token, output }),
        parties().prop_map(|holders| Answer::Busy { holders }),
        Just(Answer::Released),
        any_status().prop_map(Answer::Lock),
        Just(Answer::End),
        option::of(any_lease()).prop_map(|lease| Answer::Pong { lease }),
        (code, any_string(0..100)).prop_map(|(code, message)| Answer::Error { code, message }),
    ]
}

/// An object of the fields that requests have, with values that they should not have, or should.
fn odd_object() -> impl Strategy<Value = String> {
    const NAMES: &str = "type key nonce mode shared slots nowait exec who outcome pid note ?";
    const VALUES: &str = r#"
        "lock" "release" "status" "queue" "ff" "" "\ud800" null true 0 2 -1 1e99 99999999999999999999 [] {}
        ["a",1] {"exit":3} {"exit":256} {"pid":1,"note":"\u0007\ud83d\ude00"}
    "#;
    let one_of = |words: &'static str| select(words.split_whitespace().collect::<Vec<_>>());
    let field = (one_of(NAMES), one_of(VALUES)).prop_map(|(name, value)| format!("\"{name}\":{value}"));
    let kind = select(&["lock", "release", "status", "ping", "break"]);
    (kind, vec(field, 0..6)).prop_map(|(kind, fields)| {
        let fields: String = fields.into_iter().map(|field| format!(",{field}")).collect();
        format!("{{\"type\":\"{kind}\"{fields}}}")
    })
}

fn line(message: &impl Serialize) -> Vec<u8> {
    let mut line = Vec::new();
    encode(message, &mut line);
    line
}

/// Whatever it is: it is read, and then it is a request in order, or it is answered with an error that fits a frame.
fn check_decoding(bytes: &[u8]) {
    match decode_request(bytes) {
        Ok(request) => assert_eq!(decode_request(&line(&request)), Ok(request)),
        Err(answer @ Answer::Error { .. }) => assert!(line(&answer).len() < 1024, "an endless error"),
        Err(answer) => panic!("{answer:?} is no error"),
    }
}

proptest! {
    #[test]
    fn every_request_is_read_as_it_was_written(request in any_request()) {
        let line = line(&request);
        prop_assert!(line.len() <= FRAME_BYTES_MAX);
        prop_assert_eq!(line.iter().position(|&byte| byte == b'\n'), Some(line.len() - 1));
        prop_assert_eq!(decode_request(&line), Ok(request.clone()));
        prop_assert_eq!(decode_request(&line[..line.len() - 1]), Ok(request));
    }

    #[test]
    fn every_answer_is_read_as_it_was_written(answer in any_answer()) {
        let line = line(&answer);
        prop_assert_eq!(line.iter().position(|&byte| byte == b'\n'), Some(line.len() - 1));
        prop_assert_eq!(decode_answer(&line), Ok(answer));
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..200)) {
        check_decoding(&bytes);
        check_decoding(&[b"{", bytes.as_slice()].concat());
        let _ = decode_answer(&bytes); // Either is right, as long as it returns.
    }

    #[test]
    fn a_damaged_request_is_read_or_refused(
        request in any_request(),
        damage in vec((any::<Index>(), 0..4_usize, vec(any::<u8>(), 0..4)), 1..4),
    ) {
        let mut line = line(&request);
        for (from, cut, bytes) in damage {
            let from = from.index(line.len() + 1);
            line.splice(from..(from + cut).min(line.len()), bytes);
        }
        check_decoding(&line);
    }

    #[test]
    fn an_odd_object_is_read_or_refused(object in odd_object()) {
        check_decoding(object.as_bytes());
    }
}

fn refused(line: &str) -> ErrorCode {
    match decode_request(line.as_bytes()) {
        Err(Answer::Error { code, .. }) => code,
        other => panic!("{line}: {other:?}"),
    }
}

fn lock_request(line: &str) -> LockRequest {
    match decode_request(line.as_bytes()) {
        Ok(Request::Lock(asked)) => *asked,
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn a_lock_request_needs_no_more_than_a_key() {
    let asked = lock_request(r#"{"type":"lock","key":"k"}"#);
    assert_eq!(asked, LockRequest::new(Key::new("k").unwrap(), Mode::Once));
    assert_eq!(refused(r#"{"type":"lock"}"#), ErrorCode::BadRequest);
}

#[test]
fn an_array_is_not_an_object() {
    assert_eq!(refused(r#"["ping"]"#), ErrorCode::BadFrame);
    assert_eq!(refused(r#" ["lock","k"]"#), ErrorCode::BadFrame);
    assert_eq!(refused(r#""ping""#), ErrorCode::BadFrame);
    assert_eq!(refused(""), ErrorCode::BadFrame);
}

#[test]
fn a_line_holds_one_whole_object() {
    assert_eq!(refused(r#"{"type":"ping""#), ErrorCode::BadFrame);
    assert_eq!(refused(r#"{"type":"ping"}{"type":"ping"}"#), ErrorCode::BadFrame);
    assert_eq!(decode_request(b" {\"type\":\"ping\"} \r\n"), Ok(Request::Ping));
}

#[test]
fn unknown_fields_are_ignored() {
    let asked = lock_request(r#"{"colour":[{}],"type":"lock","who":{"pid":1,"shoe":42},"key":"k"}"#);
    assert_eq!(asked.who.pid, Pid::new(1));
    assert_eq!(decode_request(br#"{"type":"ping","key":"","slots":0}"#), Ok(Request::Ping));
}

#[test]
fn an_unknown_type_is_told_apart_from_a_missing_one() {
    assert_eq!(refused(r#"{"type":"Lock","key":"k"}"#), ErrorCode::UnknownType);
    assert_eq!(refused(r#"{"type":""}"#), ErrorCode::UnknownType);
    assert_eq!(refused(r#"{"key":"k"}"#), ErrorCode::BadRequest);
    assert_eq!(refused(r#"{"type":1}"#), ErrorCode::BadRequest);
}

#[test]
fn slots_are_from_1_to_a_million() {
    let slots = |slots| format!(r#"{{"type":"lock","key":"k","slots":{slots}}}"#);
    for bad in ["0", "1000001", "-1", "1.5", "4294967297", r#""2""#] {
        assert_eq!(refused(&slots(bad)), ErrorCode::BadRequest, "{bad}");
    }
    assert_eq!(lock_request(&slots("1000000")).slots, SLOTS_MAX);
}

#[test]
fn shared_and_slots_exclude_each_other() {
    assert_eq!(refused(r#"{"type":"lock","key":"k","shared":true,"slots":2}"#), ErrorCode::BadRequest);
    assert!(lock_request(r#"{"type":"lock","key":"k","shared":true,"slots":1}"#).shared);
}

#[test]
fn a_key_that_is_none_is_refused_as_such() {
    for kind in ["lock", "status"] {
        let request = |key: &str| format!(r#"{{"type":"{kind}","key":"{key}"}}"#);
        assert_eq!(refused(&request("")), ErrorCode::BadKey);
        assert_eq!(refused(&request(&"k".repeat(KEY_BYTES_MAX + 1))), ErrorCode::BadKey);
        assert!(decode_request(request(&"k".repeat(KEY_BYTES_MAX)).as_bytes()).is_ok());
    }
}

#[test]
fn a_release_without_an_outcome_has_an_unknown_one() {
    let outcome = Outcome::Unknown;
    assert_eq!(decode_request(br#"{"type":"release"}"#), Ok(Request::Release { outcome }));
    assert_eq!(refused(r#"{"type":"release","outcome":{"exit":256}}"#), ErrorCode::BadRequest);
}

#[test]
fn an_error_does_not_send_the_whole_line_back() {
    let long = "\\\"\\u0007".repeat(FRAME_BYTES_MAX / 10);
    for field in ["type", "slots", "mode", "nonce", "outcome"] {
        check_decoding(format!(r#"{{"type":"lock","key":"k","{field}":"{long}"}}"#).as_bytes());
        check_decoding(format!(r#"{{"{field}":"{long}","key":"k"}}"#).as_bytes());
    }
}

#[test]
fn a_text_is_cut_between_characters() {
    let fits = "é".repeat(128);
    assert_eq!(ShortText::from(fits.as_str()).as_str(), fits);
    let cut = ShortText::from("é".repeat(129).as_str());
    assert_eq!(cut.as_str(), format!("{}…", "é".repeat(126)));
    assert!(cut.as_str().len() <= ShortText::BYTES_MAX);
}

#[test]
fn a_text_has_no_control_characters() {
    assert_eq!(ShortText::from("a\x1b[2J\u{9b}31m\r\n\0b\x7f").as_str(), "a?[2J?31m???b?");
    let asked = lock_request(r#"{"type":"lock","key":"k","who":{"note":"\u001b]0;x\u0007"}}"#);
    assert_eq!(asked.who.note.as_str(), "?]0;x?");
}

#[test]
fn the_longest_status_line_fits_a_frame() {
    let worst = || ShortText::from("\"".repeat(ShortText::BYTES_MAX).as_str());
    let party = LockUser {
        protocol: Protocol::V2,
        uid: Some(u32::MAX),
        who: ClientInfo {
            pid: Pid::new(u32::MAX),
            host: worst(),
            user: worst(),
            command: worst(),
            note: worst(),
        },
        for_ms: u64::MAX,
        token: Some(Token(u64::MAX)),
        mode: Some(Mode::Queue),
        shared: true,
        orphan: true,
    };
    let key = Key::new("\u{1}".repeat(KEY_BYTES_MAX)).unwrap();
    let run = RunStatus {
        outcome: Outcome::Signal(u8::MAX),
        token: Token(u64::MAX),
        age_ms: u64::MAX,
        by: "\"".repeat(56).into(),
    };
    let status = LockStatus {
        id: key.id().to_string(),
        key: Some(key.into()),
        holders: vec![party.clone(); LISTED_MAX],
        holding: u32::MAX,
        waiters: vec![party; LISTED_MAX],
        waiting: u32::MAX,
        last_success: Some(Box::new(run.clone())),
        last_failure: Some(Box::new(run)),
    };
    let bytes = line(&Answer::Lock(status)).len();
    assert!(bytes <= FRAME_BYTES_MAX, "{bytes}");
}

#[test]
fn a_newer_daemons_error_is_still_an_error() {
    let answer = decode_answer(br#"{"type":"error","code":"too_hot","message":"m","since":1}"#);
    assert_eq!(answer, Ok(error(ErrorCode::Other, "m")));
}

#[test]
fn the_most_frequent_answers_are_written_as_serde_writes_them() {
    let lease = Some(LeaseTerms { good_ms: 1, margin_ms: 2 });
    for answer in [
        Answer::Released,
        Answer::Granted { token: Token(0), lease: None, stale: None },
        Answer::Granted { token: Token(u64::MAX), lease: None, stale: None },
        Answer::Granted { token: Token(7), lease, stale: None },
        Answer::Offered,
    ] {
        let mut written = b"before it\n".to_vec();
        encode_answer(&answer, &mut written);
        assert_eq!(written.strip_prefix(b"before it\n"), Some(&*line(&answer)));
    }
}
