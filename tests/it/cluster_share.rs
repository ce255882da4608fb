//! Results (`--share`) of runs on other hosts, which share their locks through etcd.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use kmutex::cluster::RunRecord;
use kmutex::etcd::{Op, Txn};
use kmutex::proto::{Key, Outcome, Token};
use nix::sys::signal::Signal;

use crate::cluster::{host, name, standing, steady_hosts, steady_options};
use crate::etcd_harness::Etcd;
use crate::harness::*;
use crate::other_user::OtherUser;

const FINISHED: i32 = 79;

/// What callers do in the folder of the first daemon.
struct Scene {
    folder: PathBuf,
    key: String,
}

/// A caller whose output goes to files.
struct Caller {
    process: Process,
    out: PathBuf,
    err: PathBuf,
}

impl Caller {
    fn output(&self) -> (Vec<u8>, Vec<u8>) {
        (fs::read(&self.out).unwrap(), fs::read(&self.err).unwrap())
    }

    /// Asserts that it ran nothing and said why.
    fn assert_none(&mut self, why: &str) {
        let status = self.process.wait();
        let (out, err) = self.output();
        let err = String::from_utf8(err).unwrap();
        assert_eq!((status, out.len()), (FINISHED, 0), "{err}");
        assert!(err.contains(why), "{err}");
    }
}

impl Scene {
    fn of(daemon: &Daemon) -> Scene {
        Scene { folder: daemon.folder().to_path_buf(), key: "k".into() }
    }

    fn caller(&self, daemon: &Daemon, name: &str, options: &[&str], script: &str) -> Caller {
        let mut command = daemon.run(&[options, &[&self.key, "--", "sh", "-c", script]].concat());
        let [out, err] = ["out", "err"].map(|stream| self.folder.join(format!("{name}.{stream}")));
        command.current_dir(&self.folder);
        command.stdout(fs::File::create(&out).unwrap()).stderr(fs::File::create(&err).unwrap());
        Caller { process: Process::spawn(&mut command), out, err }
    }

    /// A holder whose command runs `rest` when it is let go.
    fn holder(&self, daemon: &Daemon, options: &[&str], rest: &str) -> Caller {
        let script = format!("echo run >> runs; until test -e go; do sleep 0.01; done; rm go; {rest}");
        let before = self.runs();
        let holder = self.caller(daemon, "holder", options, &script);
        wait_until("the command runs", || self.runs() > before);
        holder
    }

    /// A caller that waits for the holder, and whose own command would say so.
    fn waiter(&self, daemon: &Daemon, name: &str, share: &str) -> Caller {
        let waiting = daemon.counts(&self.key).1;
        let caller = self.caller(daemon, name, &[share], "echo run >> runs; echo ran; exit 9");
        daemon.wait_for_counts(&self.key, 1, waiting + 1);
        // What the daemon answers now comes behind its decision about the caller.
        daemon.status();
        caller
    }

    fn go(&self) {
        fs::write(self.folder.join("go"), "").unwrap();
    }

    fn runs(&self) -> usize {
        fs::read_to_string(self.folder.join("runs")).unwrap_or_default().lines().count()
    }
}

fn restart(daemon: &mut Daemon, etcd: &Etcd) {
    let options = steady_options(etcd);
    daemon.restart(&options.iter().map(String::as_str).collect::<Vec<_>>());
}

/// What the result of a run that ended so is called.
fn result(key: &str, ending: &str) -> String {
    format!("{}.{ending}", name(key).replace("kmutex/", "kmutex/results/"))
}

/// How many results there are in etcd.
fn results(etcd: &Etcd) -> usize {
    etcd.ctl(&["get", "--prefix", "--keys-only", "kmutex/results/"]).split_whitespace().count()
}

#[test]
#[ignore = "needs etcd"]
fn waiters_of_all_hosts_get_the_bytes_and_the_status_of_one_run() {
    let etcd = Etcd::single();
    let daemons: [Daemon; 3] = steady_hosts(&etcd);
    let scene = Scene::of(&daemons[0]);
    let noise = "head -c 30000 /dev/urandom; head -c 20000 /dev/urandom >&2; printf 'a\\0b\\n'";
    for (round, (end, status)) in [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137)].into_iter().enumerate()
    {
        let mut holder = scene.holder(&daemons[round], &["--share"], &format!("{noise}; {end}"));
        let mut waiters: Vec<Caller> = (0..6)
            .map(|number| {
                let share = if number < 3 { "--share" } else { "--share=live" };
                scene.waiter(&daemons[number % 3], &format!("waiter-{number}"), share)
            })
            .collect();
        scene.go();
        assert_eq!(holder.process.wait(), status);
        let (out, err) = holder.output();
        assert_eq!((out.len(), err.len()), (30_004, 20_000));
        for waiter in &mut waiters {
            assert_eq!(waiter.process.wait(), status);
            assert!(waiter.output() == (out.clone(), err.clone()), "{:?}", waiter.out);
        }
        assert_eq!(scene.runs(), round + 1);
        wait_until("nothing stands in line", || standing(&etcd, "k") == 0);
    }
}

#[test]
#[ignore = "needs etcd"]
fn a_result_of_64_kib_travels_and_a_longer_one_is_79_with_the_reason() {
    let etcd = Etcd::single();
    let [a, b]: [Daemon; 2] = steady_hosts(&etcd);
    let scene = Scene::of(&a);
    for (bytes, is_short) in [(65_536, true), (65_537, false)] {
        let rest = format!("head -c 1000 /dev/urandom >&2; head -c {} /dev/urandom; exit 4", bytes - 1000);
        let mut holder = scene.holder(&a, &["--share"], &rest);
        let mut near = scene.waiter(&a, "near", "--share");
        let mut far = scene.waiter(&b, "far", "--share");
        scene.go();
        assert_eq!((holder.process.wait(), near.process.wait()), (4, 4));
        assert!(near.output() == holder.output());
        if is_short {
            assert_eq!(far.process.wait(), 4);
            assert!(far.output() == holder.output());
        } else {
            far.assert_none("longer than 64 KiB");
        }
        wait_until("nothing stands in line", || standing(&etcd, "k") == 0);
    }
    let mut holder = scene.holder(&a, &["--share", "--share-max", "10"], "echo 0123456789");
    let mut far = scene.waiter(&b, "far", "--share");
    scene.go();
    assert_eq!(holder.process.wait(), 0);
    far.assert_none("longer than --share-max");
}

#[test]
#[ignore = "needs etcd"]
fn runs_without_share_put_no_result_into_etcd_and_their_waiters_are_told() {
    let etcd = Etcd::single();
    let [a, b]: [Daemon; 2] = steady_hosts(&etcd);
    let scene = Scene::of(&a);
    // The record of a run before it has another token.
    finish(&mut a.run(&["--share", "k", "true"])).assert_silent(0);
    wait_until("the result to be there", || results(&etcd) == 1);
    let mut holder = scene.holder(&a, &[], "exit 0");
    let mut far = scene.waiter(&b, "far", "--share");
    let mut plain = Process::spawn(&mut b.run(&["k", "false"]));
    b.wait_for_counts("k", 1, 2);
    etcd.ctl(&["del", "--prefix", "kmutex/results/"]);
    scene.go();
    assert_eq!((holder.process.wait(), plain.wait()), (0, FINISHED));
    far.assert_none("without --share");
    for options in [&["--fresh", "1h"][..], &["--fresh-failure", "1h"], &["--queue"], &[]] {
        let code = finish(&mut a.run(&[options, &["other", "true"]].concat())).code;
        assert!(matches!(code, 0 | FINISHED), "{code}");
    }
    wait_until("nothing stands in line", || standing(&etcd, "other") == 0 && standing(&etcd, "k") == 0);
    assert_eq!(results(&etcd), 0);
}

#[test]
#[ignore = "needs etcd"]
fn a_remembered_result_is_replayed_on_all_hosts_until_one_forgets_it() {
    let etcd = Etcd::single();
    let [a, mut b, c, late]: [Daemon; 4] = steady_hosts(&etcd);
    let scene = Scene::of(&a);
    let script = "echo run >> runs; printf 'a\\0b'; wc -l < runs; echo error >&2; exit $(cat status)";
    let ask = |daemon: &Daemon, options: &[&str]| {
        let mut caller = scene.caller(daemon, "caller", &[&["--share"], options].concat(), script);
        let status = caller.process.wait();
        let (out, err) = caller.output();
        (status, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
    };
    let of_run = |status: i32, number: usize| (status, format!("a\0b{number}\n"), "error\n".to_string());
    fs::write(scene.folder.join("status"), "0").unwrap();
    let fresh = ["--fresh", "1h"];
    for daemon in [&a, &b, &c, &b, &c] {
        assert_eq!(ask(daemon, &fresh), of_run(0, 1));
    }
    finish(&mut c.run(&["--fresh", "1h", "k", "false"])).assert_silent(FINISHED);
    // A daemon keeps no result that it has lost, and etcd does.
    b.kill();
    restart(&mut b, &etcd);
    b.wait_for_log("clustering locks under lease");
    assert_eq!(ask(&b, &fresh), of_run(0, 1));
    // A failure does not undo a success, nor its result.
    fs::write(scene.folder.join("status"), "3").unwrap();
    let failure = ["--fresh-failure", "1h"];
    assert_eq!(ask(&c, &failure), of_run(3, 2));
    for daemon in [&a, &late] {
        assert_eq!(ask(daemon, &failure), of_run(3, 2));
        assert_eq!(ask(daemon, &fresh), of_run(0, 1));
    }
    assert_eq!(results(&etcd), 2);
    fs::write(scene.folder.join("status"), "0").unwrap();
    finish(&mut late.kmutex(&["forget", "k"])).assert_silent(0);
    assert_eq!(results(&etcd), 0);
    assert_eq!(ask(&late, &fresh), of_run(0, 3));
    for daemon in [&a, &b, &c] {
        wait_until("the host to know", || ask(daemon, &fresh) == of_run(0, 3));
    }
    wait_until("nothing stands in line", || standing(&etcd, "k") == 0);
}

#[test]
#[ignore = "needs etcd"]
fn an_older_result_of_another_host_is_given_while_one_caller_of_all_hosts_runs_anew() {
    let etcd = Etcd::single();
    let [a, b, c]: [Daemon; 3] = steady_hosts(&etcd);
    let scene = Scene::of(&a);
    let stale = ["--share", "--fresh", "0.001", "--stale", "1h"];
    let script =
        "echo run >> runs; n=$(wc -l < runs); test $n = 1 || until test -e go; do sleep 0.01; done; echo $n";
    let ask_with = |daemon: &Daemon, name: &str, options: &[&str]| {
        let mut caller = scene.caller(daemon, name, options, script);
        (caller.process.wait(), String::from_utf8(caller.output().0).unwrap())
    };
    let ask = |daemon: &Daemon, name: &str| ask_with(daemon, name, &stale);
    assert_eq!(ask(&a, "first"), (0, "1\n".into()));
    wait_until("nothing stands in line", || standing(&etcd, "k") == 0);
    // One host begins to run anew in the background, and all callers have the older result meanwhile.
    assert_eq!(ask(&b, "second"), (0, "1\n".into()));
    wait_until("the second run", || scene.runs() == 2);
    assert_eq!((ask(&c, "third"), ask(&a, "fourth")), ((0, "1\n".into()), (0, "1\n".into())));
    assert_eq!(scene.runs(), 2);
    scene.go();
    wait_until("the second run to end", || standing(&etcd, "k") == 0);
    // The newer result is the one that is given, though the first host had kept the older one.
    for (number, daemon) in [&a, &b, &c].into_iter().enumerate() {
        let fresh = ["--share", "--fresh", "1h"];
        assert_eq!(ask_with(daemon, &format!("later-{number}"), &fresh), (0, "2\n".into()));
    }
    assert_eq!(scene.runs(), 2);
}

#[test]
#[ignore = "needs etcd"]
fn requests_of_all_hosts_get_the_result_of_the_run_that_began_after_them() {
    let etcd = Etcd::single();
    let [a, b, c]: [Daemon; 3] = steady_hosts(&etcd);
    let scene = Scene::of(&a);
    let mut first = scene.holder(&a, &["--share", "--coalesce"], "echo first");
    let script = "echo run >> runs; wc -l < runs; exit 5";
    let coalesce = ["--share", "--coalesce"];
    let mut others = Vec::new();
    for (number, daemon) in [&b, &c].into_iter().enumerate() {
        others.push(scene.caller(daemon, &format!("other-{number}"), &coalesce, script));
        wait_until("its place", || standing(&etcd, "k") == number + 2);
        daemon.wait_for_log("wait: ");
    }
    scene.go();
    assert_eq!(first.process.wait(), 0);
    for other in &mut others {
        assert_eq!((other.process.wait(), other.output().0), (5, b"2\n".to_vec()));
    }
    assert_eq!(scene.runs(), 2);
}

#[test]
#[ignore = "needs etcd, and acts as two users, which only root can"]
fn a_result_is_for_the_same_user_and_roots_for_all_only_if_both_hosts_say_so() {
    let etcd = Etcd::single();
    let endpoint = etcd.endpoints()[0].to_string();
    let user = OtherUser::new();
    let host = |options: &[&str]| {
        let daemon =
            Daemon::with(&[&["--etcd", &endpoint, "--etcd-ttl", "10", "--mode", "666"], options].concat());
        daemon.wait_for_log("clustering locks under lease");
        open_to_all(daemon.folder());
        daemon
    };
    let across = ["--share-across-users"];
    let [strict, other_strict, open, other_open] = [host(&[]), host(&[]), host(&across), host(&across)];
    let pairs = [
        (&strict, &other_strict, false),
        (&strict, &open, false),
        (&open, &strict, false),
        (&open, &other_open, true),
    ];
    for (number, (from, to, is_given)) in pairs.into_iter().enumerate() {
        let scene = Scene { key: format!("k-{number}"), ..Scene::of(from) };
        let mut holder = scene.holder(from, &["--share", "--fresh", "1h"], "echo of root; exit 0");
        let other = |then: &str| -> Command {
            let mut command = user.command(user.kmutex());
            command.args([
                "run",
                "--trust-uid",
                "0",
                "--share",
                "--fresh",
                "1h",
                &scene.key,
                "sh",
                "-c",
                then,
            ]);
            command.env("KMUTEX_SOCK", to.sock());
            command
        };
        let mut own = scene.waiter(to, "own", "--share");
        let its = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| finish(&mut other("exit 9")));
            to.wait_for_counts(&scene.key, 1, 2);
            to.status();
            scene.go();
            assert_eq!((holder.process.wait(), own.process.wait()), (0, 0), "{:?}", holder.output());
            waiter.join().unwrap()
        });
        assert_eq!(own.output().0, b"of root\n");
        match is_given {
            true => assert_eq!((its.code, its.stdout.as_str()), (0, "of root\n")),
            false => its.assert_error(FINISHED, &["another user's"]),
        }
        // Nor does the other user find what root's run has left.
        let later = finish(&mut other("echo its own; exit 9"));
        let expected = if is_given { (0, "of root\n") } else { (9, "its own\n") };
        assert_eq!((later.code, later.stdout.as_str()), expected);
    }
}

#[test]
#[ignore = "needs etcd"]
fn if_the_holders_daemon_and_the_holder_are_killed_a_waiter_of_another_host_takes_over() {
    let etcd = Etcd::single();
    // Its lease is over soon.
    let mut a = host(&etcd);
    let [b]: [Daemon; 1] = steady_hosts(&etcd);
    let scene = Scene::of(&a);
    let mut holder = scene.holder(&a, &["--share", "--close"], "echo of the holder");
    let mut far = scene.waiter(&b, "far", "--share");
    a.kill();
    holder.process.signal(Signal::SIGKILL);
    holder.process.wait();
    assert_eq!((far.process.wait(), far.output().0), (9, b"ran\n".to_vec()));
    assert_eq!(results(&etcd), 1, "of that run");
    scene.go();
}

#[test]
#[ignore = "needs etcd"]
fn a_release_that_the_daemon_did_not_survive_is_one_without_a_result() {
    let mut etcd = Etcd::single();
    let [mut a, b]: [Daemon; 2] = steady_hosts(&etcd);
    let scene = Scene::of(&a);
    let mut holder = scene.holder(&a, &["--share", "--fresh", "1h"], "echo first");
    let mut far = scene.waiter(&b, "far", "--share");
    etcd.stop(0);
    scene.go();
    assert_eq!(holder.process.wait(), 0);
    a.kill();
    etcd.cont(0);
    restart(&mut a, &etcd);
    far.assert_none("its result is not in etcd");
    let again = finish(&mut b.run(&["--share", "--fresh", "1h", "k", "echo", "anew"]));
    assert_eq!((again.code, again.stdout.as_str()), (0, "anew\n"), "{}", again.stderr);
}

#[test]
#[ignore = "needs etcd"]
fn a_result_that_etcd_refuses_does_not_hold_up_the_release() {
    let etcd = Etcd::with(&["--max-request-bytes=20000"]);
    let [a, b]: [Daemon; 2] = steady_hosts(&etcd);
    let scene = Scene::of(&a);
    for (bytes, is_stored) in [(1_000, true), (60_000, false)] {
        let mut holder = scene.holder(&a, &["--share"], &format!("head -c {bytes} /dev/zero; exit 3"));
        let mut plain = Process::spawn(&mut b.run(&["--on-peer-failure", "adopt", "k", "true"]));
        b.wait_for_counts("k", 1, 1);
        let mut far = scene.waiter(&b, "far", "--share");
        scene.go();
        assert_eq!((holder.process.wait(), plain.wait()), (3, 3), "the outcome is there");
        match is_stored {
            true => assert_eq!((far.process.wait(), far.output().0.len()), (3, bytes)),
            false => far.assert_none("etcd refused to store it"),
        }
        wait_until("nothing stands in line", || standing(&etcd, "k") == 0);
    }
    finish(&mut a.run(&["-n", "k", "true"])).assert_silent(0);
}

#[test]
#[ignore = "needs etcd"]
fn when_the_store_went_back_no_result_of_before_is_given() {
    let mut etcd = Etcd::single();
    let [a, b] = [host(&etcd), host(&etcd)];
    let scene = Scene::of(&a);
    let ask = |daemon: &Daemon| {
        let mut caller =
            scene.caller(daemon, "caller", &["--share", "--fresh", "1h"], "echo run >> runs; wc -l < runs");
        (caller.process.wait(), String::from_utf8(caller.output().0).unwrap())
    };
    assert_eq!([ask(&a), ask(&b)], [(0, "1\n".into()), (0, "1\n".into())]);
    etcd.replace_data(|data| fs::remove_dir_all(data).unwrap());
    for daemon in [&a, &b] {
        daemon.wait_for_log("the store went back");
    }
    // A run in the new store, of which both hosts hear, has no result.
    finish(&mut a.run(&["--fresh", "1h", "k", "true"])).assert_silent(0);
    wait_until("the run to be known", || {
        finish(&mut b.kmutex(&["status", "k"])).stdout.contains("last success: done")
    });
    assert_eq!(ask(&b), (0, "2\n".into()));
    assert_eq!(ask(&a), (0, "2\n".into()));
}

#[test]
#[ignore = "needs etcd"]
fn callers_over_tcp_share_among_themselves_on_all_hosts() {
    let etcd = Etcd::single();
    let endpoint = etcd.endpoints()[0].to_string();
    let [(a, to_a), (b, to_b)] = [(), ()].map(|()| {
        let addr = crate::share::free_addr();
        let daemon = Daemon::with(&["--sock", &addr, "--etcd", &endpoint, "--etcd-ttl", "10"]);
        daemon.wait_for_log("clustering locks under lease");
        (daemon, addr)
    });
    let scene = Scene::of(&a);
    let mut holder = scene.holder(&a, &["--share", "--sock", &to_a], "printf 'a\\0b'; exit 3");
    let script = "echo ran; exit 9";
    let mut over_tcp = scene.caller(&b, "tcp", &["--share", "--sock", &to_b], script);
    let mut local = scene.caller(&b, "local", &["--share"], script);
    b.wait_for_counts("k", 1, 2);
    b.status();
    scene.go();
    assert_eq!((holder.process.wait(), over_tcp.process.wait()), (3, 3));
    assert_eq!(over_tcp.output().0, b"a\0b");
    local.assert_none("another user's");
}

/// A row of one piece of standard output.
fn row(bytes: &[u8]) -> Vec<u8> {
    [&[1, 0, 0, 0], &(bytes.len() as u32).to_be_bytes()[..], bytes].concat()
}

#[test]
#[ignore = "needs etcd"]
fn what_other_programs_put_there_as_a_result_is_none_and_harms_nothing() {
    let etcd = Etcd::single();
    let b = steady_hosts::<1>(&etcd).into_iter().next().unwrap();
    let (client, scene) = (etcd.client(), Scene::of(&b));
    let put = |key: String, value: Vec<u8>| Op::Put { key: key.into(), value, lease: None };
    let uid = nix::unistd::Uid::effective().as_raw();
    let value = move |token: u64, row: &[u8]| {
        [format!("{{\"token\":{token},\"uid\":{uid}}}\n").as_bytes(), row].concat()
    };
    type Make = Box<dyn Fn(u64) -> Vec<u8>>;
    let values: [(Make, bool); 9] = [
        (Box::new(move |token| value(token, &row(b"good"))), true),
        (Box::new(|_| Vec::new()), false),
        (Box::new(|_| vec![0xff; 1_400_000]), false),
        (Box::new(move |token| value(token + 1, &row(b"of another"))), false),
        (Box::new(move |token| value(token, &row(b"cut")[..9])), false),
        (Box::new(move |token| value(token, b"\x01\0\0\0\xff\xff\xff\xffx")), false),
        (Box::new(move |token| value(token, &row(&[0; 65_537]))), false),
        (Box::new(move |token| value(token, &row(b"").repeat(65))), false),
        (Box::new(|token| format!("{{\"token\":{token},\"uid\":\"me\"}}\n").into()), false),
    ];
    for (value, is_good) in values {
        // Another program's hold, and its end with a record.
        let place = format!("{}/by-hand", name("k"));
        etcd.ctl(&["put", &place, ""]);
        let mut far = scene.waiter(&b, "far", "--share");
        let holder = client.range(&kmutex::etcd::Range { key: place.clone().into(), ..Default::default() });
        let token = holder.unwrap().kvs[0].create_revision as u64;
        let record = format!("{{\"token\":{token},\"outcome\":{{\"exit\":6}}}}");
        let then = vec![
            put(result("k", "done"), value(token)),
            Op::Delete { key: place.into() },
            put(format!("{}.done", name("k")), record.into()),
        ];
        client.txn(&Txn { then, ..Txn::default() }).unwrap();
        match is_good {
            true => assert_eq!((far.process.wait(), far.output().0), (6, b"good".to_vec())),
            false => far.assert_none("its result is not in etcd"),
        }
        // The same as the result of a run that counts.
        let run = RunRecord {
            token: Token(token),
            outcome: Outcome::Exit(0),
            age_ms: 0,
            counts_for_ms: 3_600_000,
            by: "".into(),
        };
        let record = serde_json::to_vec(&run).unwrap();
        let key = if is_good { "good" } else { "bad" };
        let then =
            vec![put(result(key, "success"), value(token)), put(format!("{}.success", name(key)), record)];
        client.txn(&Txn { then, ..Txn::default() }).unwrap();
        let mut fresh = b.run(&["--share", "--fresh", "1h", key, "echo", "anew"]);
        let expected = if is_good { "good" } else { "anew\n" };
        assert_eq!(finish(&mut fresh).assert_silent(0), expected);
        etcd.ctl(&["del", "--prefix", &name(key)]);
        finish(&mut b.kmutex(&["forget", key])).assert_silent(0);
    }
    // Under other names, and for a lock without waiters.
    for key in ["results/", "results/x.done", &format!("results/{}", Key::new("k").unwrap().id())] {
        etcd.ctl(&["put", &format!("kmutex/{key}"), "x"]);
    }
    finish(&mut b.run(&["-n", "k", "true"])).assert_silent(0);
    let listed = finish(&mut b.kmutex(&["status", "--cluster"])).assert_silent(0);
    assert!(!listed.contains("results"), "{listed}");
}
