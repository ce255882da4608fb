//! The client against a server that does what a test wants, also what no etcd would do.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::*;

/// How long anything may take before a test fails. Far more than it needs, even on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(30);
const RANGE: &str = r#"{"header":{"revision":"7"}}"#;
const REFUSAL: &str = r#"{"error":"m","message":"m","code":3}"#;

/// A server on a port of its own. It serves each connection in a thread.
struct Fake {
    addr: SocketAddr,
    connections: Arc<AtomicUsize>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    fn new(serve: impl Fn(&mut Connection) + Send + Sync + 'static) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (connections, is_over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, over, serve) = (Arc::clone(&connections), Arc::clone(&is_over), Arc::new(serve));
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    break;
                }
                let number = count.fetch_add(1, Ordering::SeqCst);
                let (serve, stream) = (Arc::clone(&serve), BufReader::new(stream.unwrap()));
                thread::spawn(move || serve(&mut Connection { number, stream }));
            }
        });
        Fake { addr, connections, is_over, thread: Some(thread) }
    }

    /// One that answers every request with this.
    fn answering(status: &'static str, body: &'static str) -> Fake {
        Fake::new(move |connection| {
            while connection.request().is_some() {
                connection.answer(status, body);
            }
        })
    }

    /// One that does this with the first request, and nothing more.
    fn sending(bytes: impl Into<Vec<u8>>) -> Fake {
        let bytes = bytes.into();
        Fake::new(move |connection| {
            connection.request();
            connection.send(&bytes);
        })
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.addr)
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.addr);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Connection {
    number: usize,
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Waits for a request, and returns its head. `None`: the client has closed.
    fn request(&mut self) -> Option<String> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.stream.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let length =
            head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap()];
        self.stream.read_exact(&mut body).ok()?;
        Some(head)
    }

    fn answer(&mut self, status: &str, body: &str) {
        self.send(format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes());
    }

    /// The client may have gone.
    fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.get_mut().write_all(bytes);
    }

    fn chunk(&mut self, text: &str) {
        self.send(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes());
    }

    fn begin_watch(&mut self) {
        self.request();
        self.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
    }

    fn until_closed(&mut self) {
        let _ = self.stream.read_to_end(&mut Vec::new());
    }
}

fn client(endpoints: &[&str]) -> Client {
    let endpoints = endpoints.iter().map(|text| text.parse().unwrap()).collect();
    Client::new(&Config { endpoints, ca: None, cert: None, key: None, user: None, timeout: TIMEOUT_DEFAULT })
        .unwrap()
}

fn range(client: &Client) -> Result<RangeReply, Error> {
    client.range(&Range { key: b"k".to_vec(), ..Range::default() })
}

/// What comes of asking a server that does this.
fn range_at(fake: &Fake) -> Error {
    range(&client(&[&fake.endpoint()])).unwrap_err()
}

/// An endpoint where no process listens, nor can listen while the stream is open: it is the stream's own.
fn unused_endpoint() -> (TcpStream, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let endpoint = format!("http://{}", stream.local_addr().unwrap());
    (stream, endpoint)
}

#[test]
fn where_no_process_listens_nothing_was_done() {
    let (_stream, endpoint) = unused_endpoint();
    let error = range(&client(&[&endpoint])).unwrap_err();
    assert_eq!(error, Error::Unreachable { why: format!("{endpoint}: connection refused") });
    let error = range(&client(&["http://no.such.host.invalid"])).unwrap_err();
    let why = "http://no.such.host.invalid:2379: there is no such host".into();
    assert_eq!(error, Error::Unreachable { why });
}

#[test]
fn who_never_answers_may_have_done_it() {
    let fake = Fake::new(Connection::until_closed);
    let begun = Instant::now();
    let error = range_at(&fake);
    assert_eq!(error, Error::Unknown { why: format!("{}: no answer within 1s", fake.endpoint()) });
    assert!(begun.elapsed() < TIMEOUT);
}

#[test]
fn who_answers_byte_by_byte_has_no_more_time() {
    let fake = Fake::new(|connection| {
        connection.request();
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n");
        let one_byte = |stream: &mut TcpStream| stream.write_all(b" ").is_ok();
        while one_byte(connection.stream.get_mut()) {
            thread::sleep(Duration::from_millis(10));
        }
    });
    assert!(matches!(range_at(&fake), Error::Unknown { why } if why.ends_with("no answer within 1s")));
}

#[test]
fn an_answer_that_breaks_off_may_have_been_an_answer() {
    for part in [
        "",
        "HTTP/1.1 200",
        "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"header\":{\"revision\":\"7\"}}",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1b\r\n{\"header\":{\"revision\":\"7\"}}\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        "SSH-2.0-OpenSSH_9.2\r\n",
        "\0\0\0\0",
    ] {
        let error = range_at(&Fake::sending(part));
        assert!(matches!(error, Error::Unknown { .. }), "{part:?}: {error:?}");
    }
}

#[test]
fn an_answer_that_makes_no_sense_is_none() {
    for (status, body) in [
        ("200 OK", ""),
        ("200 OK", "hello"),
        ("200 OK", "{}"),
        ("404 Not Found", "404 page not found"),
        ("302 Found\r\nLocation: http://127.0.0.1:1/", ""),
        ("204 No Content", ""),
        ("201 Created", RANGE),
    ] {
        let error = range_at(&Fake::answering(status, body));
        assert!(matches!(error, Error::BadReply { .. }), "{status} {body:?}: {error:?}");
    }
    let error = range_at(&Fake::answering("503 Service Unavailable", "<html>"));
    assert!(matches!(error, Error::Unknown { .. }), "{error:?}");
}

#[test]
fn an_answer_without_end_is_not_kept() {
    let fake = Fake::new(|connection| {
        connection.request();
        connection.send(b"HTTP/1.1 200 OK\r\n\r\n");
        let megabyte = vec![b' '; 1 << 20];
        while connection.stream.get_mut().write_all(&megabyte).is_ok() {}
    });
    // On a busy machine the second may be over first.
    match range_at(&fake) {
        Error::BadReply { why } => assert!(why.contains("longer than 16777216 bytes"), "{why}"),
        Error::Unknown { why } => assert!(why.contains("no answer within"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_one_that_answered_is_asked_first_from_then_on() {
    let (bad, good) = (Fake::answering("503 Service Unavailable", ""), Fake::answering("200 OK", RANGE));
    let (_stream, unused) = unused_endpoint();
    let client = client(&[&unused, &bad.endpoint(), &good.endpoint()]);
    for _ in 0..3 {
        assert_eq!(range(&client).unwrap().revision, 7);
    }
    assert_eq!((bad.connections(), good.connections()), (1, 1));
}

#[test]
fn a_refusal_is_final_unless_another_may_have_done_it() {
    let refusing = Fake::answering("400 Bad Request", REFUSAL);
    let (_stream, unused) = unused_endpoint();
    let refused = Error::Refused { code: 3, message: "m".into() };
    assert_eq!(range(&client(&[&unused, &refusing.endpoint()])), Err(refused.clone()));
    let closing = Fake::new(|connection| drop(connection.request()));
    let client = client(&[&closing.endpoint(), &refusing.endpoint()]);
    let why =
        format!("{}: the connection was closed; {}: refused: m", closing.endpoint(), refusing.endpoint());
    assert_eq!(range(&client), Err(Error::Unknown { why }));
    assert_eq!(range(&client), Err(refused));
}

#[test]
fn a_connection_that_was_closed_while_it_waited_is_replaced() {
    let fake = Fake::new(|connection| {
        connection.request();
        connection.answer("200 OK", RANGE);
        // The request is on its way when this one closes, as if the two had crossed.
        connection.request();
    });
    let client = client(&[&fake.endpoint()]);
    for connections in 1..4 {
        assert_eq!(range(&client).unwrap().revision, 7);
        assert_eq!(fake.connections(), connections);
    }
}

#[test]
fn https_to_one_who_does_not_speak_it_sends_nothing() {
    let fake = Fake::sending("HTTP/1.1 400 Bad Request\r\n\r\n");
    let error = range(&client(&[&fake.endpoint().replace("http:", "https:")])).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
}

#[test]
fn a_watch_is_opened_in_time_or_not_at_all() {
    let fake = Fake::new(Connection::until_closed);
    let error = client(&[&fake.endpoint()]).watch(b"k", b"", 1).unwrap_err();
    assert!(matches!(&error, Error::Unknown { why } if why.ends_with("no answer within 1s")), "{error:?}");
}

#[test]
fn a_watch_has_its_messages_one_by_one_and_then_the_end() {
    let fake = Fake::new(|connection| {
        connection.begin_watch();
        connection.chunk("{\"result\":{\"header\":{\"revision\":\"7\"},\"created\":true}}\n{\"result\"");
        connection.chunk(":{\"header\":{\"revision\":\"8\"}}}\n{\"result\":");
    });
    let mut watch = client(&[&fake.endpoint()]).watch(b"k", b"", 1).unwrap();
    assert!(watch.next().unwrap().created);
    assert_eq!(watch.next().unwrap().revision, 8);
    let why = format!("{}: the connection was closed", fake.endpoint());
    assert_eq!(watch.next(), Err(Error::Unknown { why }));
}

#[test]
fn an_error_ends_a_watch_without_ending_its_line() {
    let fake = Fake::new(|connection| {
        connection.begin_watch();
        connection.chunk("{\"error\":{\"grpc_code\":14,\"message\":\"etcdserver: no leader\"}}");
        connection.chunk("");
    });
    let mut watch = client(&[&fake.endpoint()]).watch(b"k", b"", 1).unwrap();
    let unknown = |why: &str| Err(Error::Unknown { why: format!("{}: {why}", fake.endpoint()) });
    assert_eq!(watch.next(), unknown("etcdserver: no leader"));
    assert_eq!(watch.next(), unknown("the watch has ended"));
}

#[test]
fn a_message_of_a_watch_without_end_is_not_kept() {
    let fake = Fake::new(|connection| {
        connection.begin_watch();
        let megabyte = " ".repeat(1 << 20);
        (0..20).for_each(|_| connection.chunk(&megabyte));
        connection.until_closed();
    });
    let error = client(&[&fake.endpoint()]).watch(b"k", b"", 1).unwrap().next().unwrap_err();
    assert!(matches!(&error, Error::BadReply { why } if why.contains("longer than")), "{error:?}");
}

#[test]
fn hanging_up_ends_the_watches_and_only_those() {
    let fake = Fake::new(|connection| match connection.number {
        0 => {
            connection.request();
            connection.answer("200 OK", RANGE);
            connection.request();
            connection.answer("200 OK", RANGE);
        }
        _ => {
            connection.begin_watch();
            connection.chunk("{\"result\":{\"header\":{\"revision\":\"7\"},\"created\":true}}\n");
            connection.until_closed();
        }
    });
    let client = client(&[&fake.endpoint()]);
    range(&client).unwrap();
    for _ in 0..2 {
        let mut watch = client.watch(b"k", b"", 1).unwrap();
        let (sender, replies) = mpsc::channel();
        thread::spawn(move || (0..2).try_for_each(|_| sender.send(watch.next())));
        assert!(replies.recv_timeout(TIMEOUT).unwrap().unwrap().created);
        client.hang_up();
        let error = replies.recv_timeout(TIMEOUT).expect("it goes on").unwrap_err();
        assert!(matches!(error, Error::Unknown { .. }), "{error:?}");
    }
    range(&client).unwrap();
    assert_eq!(fake.connections(), 3);
}

#[test]
fn a_watch_that_was_hung_up_before_it_is_read_ends_as_well() {
    let fake = Fake::new(|connection| {
        connection.begin_watch();
        connection.until_closed();
    });
    let client = client(&[&fake.endpoint()]);
    let mut watch = client.watch(b"k", b"", 1).unwrap();
    client.hang_up();
    assert!(matches!(watch.next(), Err(Error::Unknown { .. })));
}
