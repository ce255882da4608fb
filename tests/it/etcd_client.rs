//! The client of etcd against etcd itself: each call, members that hang or die, certificates, users.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use kmutex::etcd::{
    Client, Compare, Config, Error, Event, KeyValue, LeaseId, Op, Range, Sort, Txn, TxnReply, User, Watch,
    WatchReply,
};

use crate::etcd_harness::Etcd;
use crate::harness::{TIMEOUT, wait_for, wait_until};

fn put(key: &str, value: &str) -> Op {
    Op::Put { key: key.into(), value: value.into(), lease: None }
}

fn range(key: &str, end: &str) -> Range {
    Range { key: key.into(), end: end.into(), ..Range::default() }
}

fn delete(key: &str) -> Op {
    Op::Delete { key: key.into() }
}

/// Carries these out, whatever there is.
fn apply(client: &Client, ops: &[Op]) -> Result<TxnReply, Error> {
    client.txn(&Txn { then: ops.to_vec(), ..Txn::default() })
}

fn keys(kvs: &[KeyValue]) -> Vec<&str> {
    kvs.iter().map(|kv| str::from_utf8(&kv.key).unwrap()).collect()
}

/// A watch that another thread reads, so that a test can give up.
struct Reader(Receiver<Result<WatchReply, Error>>);

impl Reader {
    fn new(mut watch: Watch) -> Reader {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            loop {
                let reply = watch.next();
                let is_over = reply.is_err();
                // The test may have ended.
                if sender.send(reply).is_err() || is_over {
                    break;
                }
            }
        });
        Reader(receiver)
    }

    /// Opens a watch, and waits until it has begun.
    fn open(client: &Client, key: &str, end: &str, from_revision: i64) -> Reader {
        let reader = Reader::new(client.watch(key.as_bytes(), end.as_bytes(), from_revision).unwrap());
        assert!(reader.next().unwrap().created);
        reader
    }

    fn next(&self) -> Result<WatchReply, Error> {
        self.0.recv_timeout(TIMEOUT).expect("the watch says nothing")
    }

    fn events(&self) -> Vec<Event> {
        self.next().unwrap().events
    }
}

#[test]
#[ignore = "needs etcd"]
fn a_lease_is_granted_kept_and_revoked_and_gone_then() {
    let etcd = Etcd::single();
    let client = etcd.client();
    let lease = client.grant_lease(60).unwrap();
    assert_eq!(lease.ttl_secs, 60);
    let kept = client.keep_alive(lease.id).unwrap();
    assert_eq!((kept.ttl_secs, kept.revision), (60, 1));
    let with_lease = |lease| Op::Put { key: b"k".into(), value: b"\0v\xff".into(), lease: Some(lease) };
    let revision = apply(&client, &[with_lease(lease.id)]).unwrap().revision;
    let reply = client.range(&range("k", "")).unwrap();
    let (key, value) = (b"k".to_vec(), b"\0v\xff".to_vec());
    let kv = KeyValue { key, value, create_revision: revision, mod_revision: revision, lease: lease.id };
    assert_eq!((reply.kvs, reply.more, reply.revision), (vec![kv], false, revision));
    client.revoke(lease.id).unwrap();
    assert!(client.range(&range("k", "")).unwrap().kvs.is_empty());
    client.revoke(lease.id).unwrap();
    client.revoke(LeaseId(77)).unwrap();
    assert_eq!(client.keep_alive(lease.id).unwrap().ttl_secs, 0);
    let error = apply(&client, &[with_lease(lease.id)]).unwrap_err();
    assert!(error.is_lease_gone(), "{error:?}");
    assert_eq!(error.to_string(), "etcd refused: etcdserver: requested lease not found");
}

#[test]
#[ignore = "needs etcd"]
fn a_key_ends_with_its_lease_and_the_watch_tells() {
    let etcd = Etcd::single();
    let client = etcd.client();
    let lease = client.grant_lease(1).unwrap();
    let op = Op::Put { key: b"k".into(), value: b"v".into(), lease: Some(lease.id) };
    let put_revision = apply(&client, &[op]).unwrap().revision;
    let reader = Reader::open(&client, "k", "", put_revision + 1);
    let [Event::Delete { key, mod_revision }] = &reader.events()[..] else { panic!() };
    assert_eq!((key.as_slice(), *mod_revision), (&b"k"[..], put_revision + 1));
    assert_eq!(client.keep_alive(lease.id).unwrap().ttl_secs, 0);
}

#[test]
#[ignore = "needs etcd"]
fn a_txn_does_one_list_or_the_other() {
    let etcd = Etcd::single();
    let client = etcd.client();
    let create = |revision| Txn {
        compare: vec![Compare::CreateRevision { key: b"a/1".into(), revision }],
        then: vec![put("a/1", "new"), Op::Range(range("a/", "a0")), Op::Range(range("b", ""))],
        or_else: vec![Op::Range(range("a/1", ""))],
    };
    let first = client.txn(&create(0)).unwrap();
    assert!(first.succeeded);
    assert_eq!(first.ranges.iter().map(|kvs| keys(kvs)).collect::<Vec<_>>(), [vec!["a/1"], vec![]]);
    let second = client.txn(&create(0)).unwrap();
    assert_eq!((second.succeeded, second.revision), (false, first.revision));
    assert_eq!(second.ranges[0][0].create_revision, first.revision);
    assert!(client.txn(&create(first.revision)).unwrap().succeeded);

    let if_put_at = |key: &str, revision: i64| {
        let compare = vec![Compare::ModRevision { key: key.into(), revision }];
        client.txn(&Txn { compare, ..Txn::default() }).unwrap().succeeded
    };
    let put_again = apply(&client, &[put("a/1", "newer")]).unwrap().revision;
    assert!(if_put_at("a/1", put_again) && !if_put_at("a/1", first.revision));
    assert!(if_put_at("b/1", 0) && !if_put_at("a/1", 0));

    let if_empty = |key: &str, end: &str| {
        let compare = vec![Compare::Empty { key: key.into(), end: end.into() }];
        client.txn(&Txn { compare, ..Txn::default() }).unwrap().succeeded
    };
    assert!(!if_empty("a/", "a0"));
    assert!(if_empty("b/", "b0"));
    apply(&client, &[delete("a/1")]).unwrap();
    assert!(if_empty("a/", "a0"));
    let error = apply(&client, &[put("k", "1"), put("k", "2")]).unwrap_err();
    assert!(
        matches!(&error, Error::Refused { code: 3, message } if message.contains("duplicate key")),
        "{error:?}"
    );
}

#[test]
#[ignore = "needs etcd"]
fn a_range_is_in_the_order_that_was_asked_for_and_says_if_there_is_more() {
    let etcd = Etcd::single();
    let client = etcd.client();
    for key in ["k/b", "k/c", "k/a", "other"] {
        apply(&client, &[put(key, "")]).unwrap();
    }
    let get = |limit, sort| client.range(&Range { limit, sort, ..range("k/", "k0") }).unwrap();
    assert_eq!(keys(&get(0, Sort::Key).kvs), ["k/a", "k/b", "k/c"]);
    assert_eq!(keys(&get(0, Sort::CreateRevision).kvs), ["k/b", "k/c", "k/a"]);
    let first = get(1, Sort::CreateRevision);
    assert_eq!((keys(&first.kvs), first.more), (vec!["k/b"], true));
    assert!(!get(3, Sort::Key).more);
}

#[test]
#[ignore = "needs etcd"]
fn a_watch_sees_what_happens_with_its_revisions_and_a_txn_as_one() {
    let etcd = Etcd::single();
    let client = etcd.client();
    let first = apply(&client, &[put("k/1", "v")]).unwrap().revision;
    let second = apply(&client, &[delete("k/1"), put("k/2", "w"), put("other", "")]).unwrap().revision;
    let reader = Reader::open(&client, "k/", "k0", first);
    let put_event = |key: &str, value: &str, revision| {
        let (key, value) = (key.into(), value.into());
        Event::Put(KeyValue {
            key,
            value,
            create_revision: revision,
            mod_revision: revision,
            lease: LeaseId(0),
        })
    };
    let deleted = |key: &str, mod_revision| Event::Delete { key: key.into(), mod_revision };
    // The past may come in one message; what follows comes as it happens.
    let past = [put_event("k/1", "v", first), deleted("k/1", second), put_event("k/2", "w", second)];
    assert_eq!(reader.events(), past);
    let third = apply(&client, &[put("k/3", ""), delete("k/2"), put("k/4", "")]).unwrap().revision;
    let reply = reader.next().unwrap();
    assert_eq!((reply.revision, reply.canceled), (third, None));
    assert_eq!(
        reply.events,
        [put_event("k/3", "", third), deleted("k/2", third), put_event("k/4", "", third)]
    );
}

#[test]
#[ignore = "needs etcd"]
fn a_watch_of_many_large_values_is_whole() {
    let etcd = Etcd::single();
    let client = etcd.client();
    let value = "x".repeat(100_000);
    for number in 0..20 {
        apply(&client, &[put(&format!("k/{number}"), &value)]).unwrap();
    }
    let reader = Reader::open(&client, "k/", "k0", 2);
    let mut seen = 0;
    while seen < 20 {
        for event in reader.events() {
            assert!(matches!(event, Event::Put(kv) if kv.value == value.as_bytes()));
            seen += 1;
        }
    }
}

#[test]
#[ignore = "needs etcd"]
fn a_watch_from_a_past_that_is_forgotten_says_so() {
    let etcd = Etcd::single();
    let client = etcd.client();
    let revisions: Vec<i64> =
        (0..3).map(|number| apply(&client, &[put("k", &number.to_string())]).unwrap().revision).collect();
    etcd.ctl(&["compaction", &revisions[2].to_string()]);
    let reader = Reader::open(&client, "k", "", revisions[0]);
    let reply = reader.next().unwrap();
    assert!(reply.canceled.is_some(), "{reply:?}");
    assert_eq!(reply.compact_revision, revisions[2]);
}

fn hanging_up_ends_a_watch(etcd: &Etcd) {
    let client = etcd.client();
    let reader = Reader::open(&client, "k", "", 0);
    client.hang_up();
    let error = reader.next().unwrap_err();
    assert!(matches!(error, Error::Unknown { .. }), "{error:?}");
    let reader = Reader::open(&client, "k", "", 0);
    apply(&client, &[put("k", "v")]).unwrap();
    assert_eq!(reader.events().len(), 1);
}

#[test]
#[ignore = "needs etcd"]
fn hanging_up_ends_a_watch_and_the_next_one_lives() {
    hanging_up_ends_a_watch(&Etcd::single());
}

#[test]
#[ignore = "needs etcd"]
fn hanging_up_ends_a_watch_over_tls_too() {
    hanging_up_ends_a_watch(&Etcd::tls());
}

#[test]
#[ignore = "needs etcd"]
fn threads_share_a_client() {
    let etcd = Etcd::single();
    let client = Arc::new(etcd.client());
    let threads: Vec<_> = (0..8)
        .map(|thread| {
            let client = Arc::clone(&client);
            thread::spawn(move || {
                for number in 0..25 {
                    apply(&client, &[put(&format!("k/{thread}/{number}"), "")]).unwrap();
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert_eq!(client.range(&range("k/", "k0")).unwrap().kvs.len(), 200);
}

#[test]
#[ignore = "needs etcd"]
fn an_etcd_that_was_restarted_is_gone_for_a_while_and_then_as_before() {
    let mut etcd = Etcd::single();
    let client = etcd.client();
    apply(&client, &[put("k", "v")]).unwrap();
    let reader = Reader::open(&client, "k", "", 0);
    etcd.kill(0);
    assert!(matches!(reader.next(), Err(Error::Unknown { .. })));
    let error = apply(&client, &[put("k", "w")]).unwrap_err();
    let why = format!("{}: connection refused", etcd.endpoints()[0]);
    assert_eq!(error, Error::Unreachable { why });
    etcd.restart(0);
    assert_eq!(client.range(&range("k", "")).unwrap().kvs[0].value, b"v");
}

#[test]
#[ignore = "needs etcd"]
fn calls_go_on_with_the_others_when_a_member_hangs_and_when_the_leader_dies() {
    let mut etcd = Etcd::cluster(3);
    let leader = etcd.leader();
    let follower = (leader + 1) % 3;
    let all = etcd.config();
    // The one that will hang is the one that is asked first.
    let endpoints = [follower, leader, (leader + 2) % 3].map(|index| all.endpoints[index].clone());
    let client = Client::new(&Config { endpoints: endpoints.to_vec(), ..all }).unwrap();
    apply(&client, &[put("k", "1")]).unwrap();
    etcd.stop(follower);
    apply(&client, &[put("k", "2")]).unwrap();
    let reader = Reader::open(&client, "k", "", 0);
    apply(&client, &[put("k", "3")]).unwrap();
    assert_eq!(reader.events().len(), 1);
    etcd.cont(follower);

    wait_until("the follower to be back", || {
        etcd.etcdctl(&["endpoint", "health"]).output().unwrap().status.success()
    });
    let leader = etcd.leader();
    etcd.kill(leader);
    let revision = wait_for("the others to agree", || Some(apply(&client, &[put("k", "4")]).ok()?.revision));
    let kv = &client.range(&range("k", "")).unwrap().kvs[0];
    assert_eq!(kv.value, b"4");
    assert!(kv.mod_revision >= revision);
}

#[test]
#[ignore = "needs etcd"]
fn a_member_that_is_alone_ends_its_watches_and_gives_no_answer() {
    let mut etcd = Etcd::cluster(3);
    let follower = (etcd.leader() + 1) % 3;
    let endpoints = vec![etcd.endpoints()[follower].clone()];
    let client = Client::new(&Config { endpoints, ..etcd.config() }).unwrap();
    let reader = Reader::open(&client, "k", "", 0);
    for other in (0..3).filter(|&other| other != follower) {
        etcd.stop(other);
    }
    let error = reader.next().unwrap_err();
    assert!(matches!(&error, Error::Unknown { why } if why.contains("no leader")), "{error:?}");
    let error = apply(&client, &[put("k", "v")]).unwrap_err();
    assert!(matches!(error, Error::Unknown { .. }), "{error:?}");
}

#[test]
#[ignore = "needs etcd"]
fn certificates_are_shown_and_asked_for() {
    let etcd = Etcd::tls();
    apply(&etcd.client(), &[put("k", "v")]).unwrap();

    let without = Config { cert: None, key: None, ..etcd.config() };
    let error = apply(&Client::new(&without).unwrap(), &[put("k", "v")]).unwrap_err();
    // With TLS 1.3 the server has seen no certificate yet when the first request is on its way. It says what is wrong and
    // closes; if the request comes after that, what it has said is lost.
    let is_about_it = |why: &str| {
        let is_alert = why.contains("received fatal alert: ") && why.contains("Certificate");
        is_alert || why.contains("broken pipe") || why.contains("connection reset")
    };
    // Whether the request was on its way by then depends on the server.
    let (Error::Unknown { why } | Error::Unreachable { why }) = &error else { panic!("{error:?}") };
    assert!(is_about_it(why), "{error:?}");

    let other = Config { ca: Some(etcd.file("other.pem")), ..etcd.config() };
    let error = apply(&Client::new(&other).unwrap(), &[put("k", "v")]).unwrap_err();
    assert!(matches!(&error, Error::Unreachable { why } if why.contains("UnknownIssuer")), "{error:?}");
}

#[test]
#[ignore = "needs etcd"]
fn what_cannot_work_is_refused_before_anything_is_sent() {
    let etcd = Etcd::tls();
    let config = || etcd.config();
    let named = |name: &str| Some(etcd.file(name));
    let plain = vec!["http://127.0.0.1:2379".parse().unwrap()];
    for (config, words) in [
        (Config { endpoints: Vec::new(), ..config() }, vec!["no etcd endpoint"]),
        (
            Config { ca: named("none"), ..config() },
            vec!["cannot read --etcd-ca ", "/none: no such file or directory"],
        ),
        (
            Config { ca: named("ca.key"), ..config() },
            vec!["--etcd-ca ", "/ca.key: there is no certificate in it"],
        ),
        (Config { cert: named("client.key"), ..config() }, vec!["--etcd-cert ", "no certificate"]),
        (Config { key: named("client.pem"), ..config() }, vec!["--etcd-key ", "there is no key in it"]),
        (Config { key: named("server.key"), ..config() }, vec!["--etcd-key ", "server.key: "]),
        (Config { cert: None, ..config() }, vec!["--etcd-key needs --etcd-cert"]),
        (Config { key: None, ..config() }, vec!["--etcd-cert needs --etcd-key"]),
        (Config { endpoints: plain, ..config() }, vec!["--etcd-ca needs an https endpoint"]),
    ] {
        let error = Client::new(&config).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} is missing: {error}");
        }
    }
}

fn user(password: &str) -> Option<User> {
    Some(User { name: "kmutex".into(), password: password.into() })
}

fn a_user_may_do_what_the_role_says(mut etcd: Etcd) {
    etcd.enable_auth("kmutex", "secret", "k/");
    let client = Client::new(&Config { user: user("secret"), ..etcd.config() }).unwrap();
    apply(&client, &[put("k/1", "v")]).unwrap();
    let reader = Reader::open(&client, "k/", "k0", 0);
    let denied = apply(&client, &[put("other", "v")]).unwrap_err();
    assert!(matches!(&denied, Error::Refused { code: 7, .. }), "{denied:?}");
    let lease = client.grant_lease(60).unwrap();
    assert_eq!(client.keep_alive(lease.id).unwrap().ttl_secs, 60);
    apply(&client, &[put("k/2", "v")]).unwrap();
    assert_eq!(reader.events().len(), 1);

    let wrong = Client::new(&Config { user: user("wrong"), ..etcd.config() }).unwrap();
    let error = apply(&wrong, &[put("k/1", "v")]).unwrap_err();
    assert!(
        matches!(&error, Error::Refused { message, .. } if message.contains("authentication failed")),
        "{error:?}"
    );
    let error = apply(&etcd.client(), &[put("k/1", "v")]).unwrap_err();
    assert!(matches!(&error, Error::Refused { .. }), "{error:?}");
}

#[test]
#[ignore = "needs etcd"]
fn a_user_may_do_what_the_role_says_and_no_more() {
    a_user_may_do_what_the_role_says(Etcd::single());
}

#[test]
#[ignore = "needs etcd"]
fn a_user_with_a_certificate_may_do_what_the_role_says() {
    a_user_may_do_what_the_role_says(Etcd::tls());
}

#[test]
#[ignore = "needs etcd"]
fn a_token_that_etcd_takes_no_more_is_renewed() {
    let mut etcd = Etcd::single();
    // There are no users at first, so that no token is needed.
    let client = Client::new(&Config { user: user("secret"), ..etcd.config() }).unwrap();
    apply(&client, &[put("k/1", "v")]).unwrap();
    etcd.enable_auth("kmutex", "secret", "k/");
    apply(&client, &[put("k/2", "v")]).unwrap();
    // What a token may do is not looked up again when roles change.
    etcd.ctl(&["role", "grant-permission", "kmutex", "readwrite", "extra"]);
    apply(&client, &[put("extra", "v")]).unwrap();
    // Tokens are in the memory of etcd.
    etcd.kill(0);
    etcd.restart(0);
    apply(&client, &[put("k/3", "v")]).unwrap();

    etcd.kill(0);
    etcd.restart(0);
    // A watch may be told by its first message that it is not permitted; the one after that has a new token.
    let reader = wait_for("a watch with a new token", || {
        let reader = Reader::new(client.watch(b"k/", b"k0", 0).unwrap());
        reader.next().unwrap().canceled.is_none().then_some(reader)
    });
    apply(&client, &[put("k/4", "v")]).unwrap();
    assert_eq!(reader.events().len(), 1);
}

#[test]
#[ignore = "needs etcd"]
fn a_history_that_is_not_what_was_seen_is_a_store_that_went_back() {
    let etcd = Etcd::single();
    let client = etcd.client();
    let revision = apply(&client, &[put("k", "1")]).unwrap().revision;
    let later = apply(&client, &[put("k", "2")]).unwrap().revision;
    client.check_history(b"k", revision).unwrap();
    client.check_history(b"k", later).unwrap();
    let went_back = |key: &str, revision| {
        let error = etcd.client().check_history(key.as_bytes(), revision).unwrap_err();
        assert!(matches!(error, Error::StoreChanged { .. }), "{error:?}");
    };
    went_back("other", revision);
    went_back("k", later + 1);
    etcd.ctl(&["compaction", &later.to_string()]);
    // What is compacted cannot be checked.
    client.check_history(b"other", revision).unwrap();
}

#[test]
#[ignore = "needs etcd"]
fn answers_of_another_cluster_are_rejected_once() {
    let [first, second] = [Etcd::single(), Etcd::single()];
    let endpoints = [first.endpoints(), second.endpoints()].concat();
    let mut first = first;
    let client = Client::new(&Config { endpoints, ..second.config() }).unwrap();
    client.range(&range("k", "")).unwrap();
    first.kill(0);
    let error = client.range(&range("k", "")).unwrap_err();
    assert!(matches!(&error, Error::StoreChanged { why } if why.contains("cluster")), "{error:?}");
    client.range(&range("k", "")).unwrap();
    assert_eq!(client.generation(), 1);
}
