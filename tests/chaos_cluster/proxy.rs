//! Between a host and etcd: a proxy for each member, in the host's network, which can be slow or lie.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use crate::etcd_harness::Place;

/// The port of the first proxy; the others have the next ones.
const PORT: u16 = 2400;
/// By how much a slow proxy delays each piece: a round trip takes twice as much, which is less than `--etcd-timeout`.
const DELAY: Duration = Duration::from_millis(300);
/// How much of an answer arrives before it is cut.
const CUT_AFTER: usize = 60;

/// What a proxy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// It passes on what it gets.
    Honest,
    Slow,
    /// It passes requests on, and answers with a web page: what was asked is done, and is not confirmed.
    WebPage,
    /// It passes requests on, and cuts the answers.
    Cuts,
    /// It answers as etcd does when the user has no permission (any more).
    Forbids,
}

const MANNERS: [Manner; 5] = [Manner::Honest, Manner::Slow, Manner::WebPage, Manner::Cuts, Manner::Forbids];

/// The proxies of a host.
#[derive(Clone, Default)]
pub struct Proxies(Arc<AtomicUsize>);

impl Proxies {
    /// Starts a proxy for each of these addresses, and returns where they are. They end with the test's process.
    pub fn start(place: &Place, addresses: Vec<String>) -> (Proxies, Vec<String>) {
        let proxies = Proxies::default();
        let urls = (PORT..).take(addresses.len()).map(|port| format!("http://127.0.0.1:{port}")).collect();
        let (own, namespace) = (proxies.clone(), format!("/run/netns/{}", place.namespace));
        // A thread can go into the namespace by itself, and what it starts is there too.
        let listening = thread::spawn(move || {
            setns(File::open(namespace).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            for (port, address) in (PORT..).zip(addresses) {
                let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
                let own = own.clone();
                thread::spawn(move || own.serve(&listener, &address));
            }
        });
        listening.join().unwrap();
        (proxies, urls)
    }

    pub fn set(&self, manner: Manner) {
        self.0.store(manner as usize, Ordering::SeqCst);
    }

    fn manner(&self) -> Manner {
        MANNERS[self.0.load(Ordering::SeqCst)]
    }

    fn serve(&self, listener: &TcpListener, address: &str) {
        for client in listener.incoming().map_while(Result::ok) {
            let (own, address) = (self.clone(), address.to_string());
            // A connection that breaks is nothing strange here.
            thread::spawn(move || drop(own.join(client, &address)));
        }
    }

    fn join(self, client: TcpStream, address: &str) -> std::io::Result<()> {
        let server = TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_secs(2))?;
        let (mut asked, mut passed) = (client.try_clone()?, server.try_clone()?);
        let own = self.clone();
        thread::spawn(move || {
            own.pass_requests(&mut asked, &mut passed);
            // Ends the other direction too.
            let _ = (asked.shutdown(Shutdown::Both), passed.shutdown(Shutdown::Both));
        });
        let (mut from, mut to) = (server, client);
        self.pass_answers(&mut from, &mut to);
        // The client may have hung up.
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
        Ok(())
    }

    fn pass_requests(&self, client: &mut TcpStream, server: &mut TcpStream) {
        while let Some(piece) = read_piece(client) {
            let manner = self.manner();
            if manner == Manner::Forbids {
                let body = r#"{"error":"etcdserver: permission denied","message":"etcdserver: permission denied","code":7}"#;
                answer(client, "403 Forbidden", "application/json", body);
                return;
            }
            if manner == Manner::Slow {
                thread::sleep(DELAY);
            }
            if server.write_all(&piece).is_err() {
                return;
            }
        }
    }

    fn pass_answers(&self, server: &mut TcpStream, client: &mut TcpStream) {
        while let Some(piece) = read_piece(server) {
            match self.manner() {
                Manner::WebPage => {
                    return answer(client, "200 OK", "text/html", "<html><body>Welcome!</body></html>");
                }
                Manner::Cuts => return drop(client.write_all(&piece[..piece.len().min(CUT_AFTER)])),
                Manner::Slow => thread::sleep(DELAY),
                Manner::Honest | Manner::Forbids => {}
            }
            if client.write_all(&piece).is_err() {
                return;
            }
        }
    }
}

fn read_piece(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut piece = vec![0; 64 * 1024];
    let length = stream.read(&mut piece).ok().filter(|&length| length > 0)?;
    piece.truncate(length);
    Some(piece)
}

/// The client may have hung up.
fn answer(client: &mut TcpStream, status: &str, kind: &str, body: &str) {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    let _ = client.write_all(format!("{head}{body}").as_bytes());
}
