//! Locks over TCP and over TLS, beside redis: `SET NX` and `DEL`, as programs use it for locks. Both servers run at the same time, and
//! are measured by turns.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kmutex::tls::{ClientFiles, ClientStream};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::commands::{Environment, Timed, alternate};
use crate::report::{Row, Target};
use crate::servers::{Server, pin_load, unpin_load};
use crate::{Result, fail, median};

const CONNECTIONS: u64 = 64;
const ROUNDS: u64 = 100_000;
const TURNS: usize = 7;
const RUNS: usize = 500;

/// A server's ports.
struct Ports {
    plain: u16,
    tls: u16,
}

/// All rows.
pub fn measure(program: &Path) -> Result<Vec<Row>> {
    let folder = tempfile::tempdir()?;
    certificate(folder.path())?;
    let ports =
        [Ports { plain: free_port()?, tls: free_port()? }, Ports { plain: free_port()?, tls: free_port()? }];
    let daemon = Server::started(|sock| kmutex(program, sock, folder.path(), &ports[0]))?;
    let redis = Server::started(|sock| self::redis(sock, folder.path(), &ports[1]))?;
    let mut rows = rates(&ports, [&daemon, &redis], folder.path())?;
    drop(redis);
    unpin_load()?;
    daemon.unpin()?;
    rows.push(commands(program, &ports[0], folder.path())?);
    pin_load()?;
    Ok(rows)
}

fn rates(ports: &[Ports; 2], servers: [&Server; 2], folder: &Path) -> Result<Vec<Row>> {
    let [kmutex, redis] = ports;
    let mut rates: [Vec<f64>; 4] = Default::default();
    let before = [servers[0].processor_time()?, servers[1].processor_time()?];
    for _ in 0..TURNS {
        for (rates, (port, is_tls, talk)) in rates.iter_mut().zip([
            (kmutex.plain, false, Talk::Kmutex),
            (redis.plain, false, Talk::Redis),
            (kmutex.tls, true, Talk::Kmutex),
            (redis.tls, true, Talk::Redis),
        ]) {
            rates.push(saturate(port, is_tls.then_some(folder), talk)?);
        }
    }
    let rounds = (2 * TURNS as u64 * ROUNDS) as f64;
    let time = |server: usize| {
        Ok::<_, crate::Failure>((servers[server].processor_time()? - before[server]) / rounds)
    };
    let (ours, theirs) = (time(0)?, time(1)?);
    let [tcp, redis_tcp, tls, redis_tls] = rates.map(|rates| median(&rates));
    let row = |what: &str, ours, theirs| Row::new(what, ours, Some(theirs), "a second", Target::AtLeast(1.5));
    Ok(vec![
        row("lock and release over TCP, 64 connections / redis `SET NX` and `DEL`", tcp, redis_tcp),
        row("the same over TLS / redis over TLS", tls, redis_tls),
        Row::new(
            "processor time of the server in both, for one lock and release",
            ours,
            Some(theirs),
            "µs",
            Target::Open,
        ),
    ])
}

/// One command over TLS, and one over TCP.
fn commands(program: &Path, ports: &Ports, folder: &Path) -> Result<Row> {
    let ca = folder.join("ca.pem");
    let command = |sock: &str| {
        let words = [
            &*program.to_string_lossy(),
            "run",
            "--tls-ca",
            &ca.to_string_lossy(),
            "--sock",
            sock,
            "k",
            "true",
        ];
        Timed::new(&words, 0, Environment::Cron)
    };
    let tls = command(&format!("tls://127.0.0.1:{}", ports.tls))?;
    let plain = command(&format!("127.0.0.1:{}", ports.plain))?;
    let [tls, plain] = alternate(RUNS, &tls, &plain)?;
    let what = "`kmutex run K true` over TLS / over TCP";
    Ok(Row::new(what, median(&tls), Some(median(&plain)), "µs", Target::AtMost(1.6)))
}

fn kmutex(program: &Path, sock: &Path, folder: &Path, ports: &Ports) -> Command {
    let mut command = Command::new(program);
    command.args(["serve", "--sock"]).arg(sock);
    command.args(["--sock", &format!("127.0.0.1:{}", ports.plain)]);
    command.args(["--sock", &format!("tls://127.0.0.1:{}", ports.tls)]);
    command.arg("--tls-cert").arg(folder.join("server.pem")).arg("--tls-key").arg(folder.join("server.key"));
    command
}

/// Without persistence; kmutex writes its journal.
fn redis(sock: &Path, folder: &Path, ports: &Ports) -> Command {
    let mut command = Command::new("redis-server");
    command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--tls-auth-clients", "no"]);
    command.args(["--port", &ports.plain.to_string(), "--tls-port", &ports.tls.to_string()]);
    command.arg("--tls-cert-file").arg(folder.join("server.pem"));
    command.arg("--tls-key-file").arg(folder.join("server.key"));
    command.arg("--tls-ca-cert-file").arg(folder.join("ca.pem"));
    command.arg("--unixsocket").arg(sock).arg("--dir").arg(folder).stdout(Stdio::null());
    command
}

/// A port that nothing listens on now.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Makes an authority and a certificate for this machine, as docs/tcp.md says.
fn certificate(folder: &Path) -> Result<()> {
    let curve = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    let authority = format!("req -x509 {curve} -subj /CN=authority -keyout ca.key -out ca.pem");
    let server = format!(
        "req -x509 {curve} -CA ca.pem -CAkey ca.key -addext basicConstraints=critical,CA:FALSE -subj /CN=server \
         -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout server.key -out server.pem"
    );
    for args in [authority, server] {
        let output = Command::new("openssl").args(args.split_whitespace()).current_dir(folder).output()?;
        if !output.status.success() {
            return fail(format!("openssl {args}: {}", String::from_utf8_lossy(&output.stderr)));
        }
    }
    Ok(())
}

/// What clients say: two requests in one write, and two lines are the answer to them.
#[derive(Clone, Copy)]
enum Talk {
    Kmutex,
    Redis,
}

impl Talk {
    fn first(self, number: u64) -> String {
        match self {
            // The greeting is the other line.
            Talk::Kmutex => format!("\0kmutex proto 2\n{{\"type\":\"lock\",\"key\":\"{number}\"}}\n"),
            Talk::Redis => self.again(number),
        }
    }

    fn again(self, number: u64) -> String {
        match self {
            Talk::Kmutex => format!("{{\"type\":\"release\"}}\n{{\"type\":\"lock\",\"key\":\"{number}\"}}\n"),
            Talk::Redis => format!("DEL {number}\r\nSET {number} 1 NX\r\n"),
        }
    }
}

/// A connection, encrypted or not.
enum Wire {
    Plain(TcpStream),
    Tls(Box<ClientStream>),
}

impl Wire {
    fn connect(port: u16, ca: Option<PathBuf>) -> Result<Wire> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        let Some(ca) = ca else {
            stream.set_nonblocking(true)?;
            return Ok(Wire::Plain(stream));
        };
        let files = ClientFiles { ca: Some(ca), ..ClientFiles::default() };
        let tls =
            ClientStream::connect(stream.into(), &files, "localhost", soon()).map_err(|e| e.to_string())?;
        Ok(Wire::Tls(Box::new(tls)))
    }

    fn write(&mut self, text: &str) -> Result<()> {
        match self {
            Wire::Plain(stream) => Ok(stream.write_all(text.as_bytes())?),
            Wire::Tls(stream) => Ok(stream.write_all(text.as_bytes(), soon()).map_err(|e| e.to_string())?),
        }
    }

    /// Appends what has arrived.
    fn read(&mut self, into: &mut Vec<u8>) -> Result<()> {
        match self {
            Wire::Plain(stream) => {
                let mut buffer = [0; 4096];
                match stream.read(&mut buffer) {
                    Ok(0) => fail("the server has closed"),
                    Ok(bytes) => {
                        into.extend_from_slice(&buffer[..bytes]);
                        Ok(())
                    }
                    Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(()),
                    Err(e) => Err(e.into()),
                }
            }
            Wire::Tls(stream) => match stream.try_read(into).map_err(|e| e.to_string())? {
                Some(0) => fail("the server has closed"),
                _ => Ok(()),
            },
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Wire::Plain(stream) => stream.as_fd(),
            Wire::Tls(stream) => stream.as_fd(),
        }
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

/// How many times a second the connections lock and release.
fn saturate(port: u16, tls: Option<&Path>, talk: Talk) -> Result<f64> {
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    let mut wires = Vec::new();
    // The server may not have noticed yet that the connections of the turn before are closed, and keeps their locks.
    static TURN: AtomicU64 = AtomicU64::new(0);
    let first = TURN.fetch_add(1, Ordering::Relaxed) * CONNECTIONS;
    for number in 0..CONNECTIONS {
        let key = first + number;
        let mut wire = Wire::connect(port, tls.map(|folder| folder.join("ca.pem")))?;
        wire.write(&talk.first(key))?;
        epoll.add(&wire, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
        wires.push((wire, talk.again(key), 0));
    }
    let mut events = [EpollEvent::empty(); 256];
    let mut answer = Vec::new();
    let mut done = 0;
    let began = Instant::now();
    while done < ROUNDS {
        let ready = epoll.wait(&mut events, EpollTimeout::from(5000_u16))?;
        if ready == 0 {
            return fail("the server does not answer");
        }
        for event in &events[..ready] {
            let (wire, again, lines) = &mut wires[event.data() as usize];
            answer.clear();
            wire.read(&mut answer)?;
            *lines += answer.iter().filter(|&&byte| byte == b'\n').count();
            if *lines < 2 {
                continue;
            }
            if answer.starts_with(b"-") || answer.windows(7).any(|bytes| bytes == b"\"error\"") {
                return fail(format!("refused: {}", String::from_utf8_lossy(&answer)));
            }
            *lines = 0;
            done += 1;
            wire.write(again)?;
        }
    }
    Ok(done as f64 / began.elapsed().as_secs_f64())
}

/// Checks that redis is there, with TLS, before everything else is measured.
pub fn check() -> Result<()> {
    match Command::new("redis-server").arg("--version").output() {
        Ok(_) => Ok(()),
        Err(e) => fail(format!("redis-server, Debian's package redis-server, is needed: {e}")),
    }
}
