//! Load: connections that lock and release as fast as they are answered.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::floor;
use crate::{Result, fail};

/// Which protocol to speak.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    V1,
    V2,
}

/// Connects. If many clients connect at once, it waits until there is room in the listener's backlog.
pub fn connect(sock: &Path) -> Result<UnixStream> {
    for _ in 0..50_000 {
        match UnixStream::connect(sock) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_micros(100))
            }
            other => return Ok(other?),
        }
    }
    fail("the daemon does not accept")
}

/// 16 bytes that no other client has.
pub fn key(number: u64) -> [u8; 16] {
    let a = number.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let b = a.wrapping_mul(0xBF58_476D_1CE4_E5B9) ^ (a >> 29);
    // No letter, so that the floor takes none for a waiter's.
    let mut key = (u128::from(a) << 64 | u128::from(b)).to_be_bytes();
    key[0] &= 0x1f;
    key
}

/// Connections that hold a lock each, and do nothing.
pub fn idle(sock: &Path, count: u64) -> Result<Vec<UnixStream>> {
    let hold = |number| {
        let mut stream = connect(sock)?;
        stream.write_all(&key(1_000_000 + number))?;
        expect(&mut stream, b"O")?;
        Ok(stream)
    };
    (0..count).map(hold).collect()
}

fn expect(stream: &mut UnixStream, answer: &[u8]) -> Result<()> {
    let mut buffer = [0; 4096];
    let got = stream.read(&mut buffer)?;
    if &buffer[..got] != answer {
        return fail(format!("{:?} instead of {answer:?}", &buffer[..got]));
    }
    Ok(())
}

/// One connection in the load.
struct Client {
    stream: UnixStream,
    /// What releases its lock and takes it again, in one write.
    again: Vec<u8>,
    /// How many bytes of an answer have come.
    lines: usize,
}

/// How many times a second `connections` connections lock and release, over `rounds` rounds in all.
pub fn saturate(sock: &Path, protocol: Protocol, connections: u64, rounds: u64) -> Result<f64> {
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    let mut clients = Vec::new();
    for number in 0..connections {
        let stream = connect(sock)?;
        epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
        let again = match protocol {
            Protocol::V1 => [b"R".as_slice(), &key(number)].concat(),
            Protocol::V2 => {
                format!("{{\"type\":\"release\"}}\n{{\"type\":\"lock\",\"key\":\"{number}\"}}\n").into()
            }
        };
        clients.push(Client { stream, again, lines: 0 });
    }
    for (number, client) in clients.iter_mut().enumerate() {
        match protocol {
            Protocol::V1 => client.stream.write_all(&key(number as u64))?,
            Protocol::V2 => {
                let first = format!("\0kmutex proto 2\n{{\"type\":\"lock\",\"key\":\"{number}\"}}\n");
                client.stream.write_all(first.as_bytes())?;
            }
        }
    }
    let mut events = [EpollEvent::empty(); 256];
    let mut buffer = [0; 4096];
    let mut done = 0;
    let began = Instant::now();
    while done < rounds {
        let ready = epoll.wait(&mut events, EpollTimeout::from(5000_u16))?;
        if ready == 0 {
            return fail("the daemon does not answer");
        }
        for event in &events[..ready] {
            let client = &mut clients[event.data() as usize];
            let got = client.stream.read(&mut buffer)?;
            match protocol {
                Protocol::V1 if &buffer[..got] == b"O" => {}
                Protocol::V1 => return fail(format!("{:?} instead of O", &buffer[..got])),
                Protocol::V2 => {
                    // A greeting or a `released`, and then a `granted`.
                    client.lines += buffer[..got].iter().filter(|&&byte| byte == b'\n').count();
                    if client.lines < 2 {
                        continue;
                    }
                    client.lines = 0;
                }
            }
            done += 1;
            client.stream.write_all(&client.again)?;
        }
    }
    Ok(done as f64 / began.elapsed().as_secs_f64())
}

/// One connection that locks, waits for the answer, and releases: how long each round took, in microseconds.
pub fn latencies(sock: &Path, rounds: u64) -> Result<Vec<f64>> {
    let mut stream = connect(sock)?;
    let round = |number| {
        let began = Instant::now();
        stream.write_all(&key(number % 1000))?;
        expect(&mut stream, b"O")?;
        stream.write_all(b"R")?;
        Ok(began.elapsed().as_secs_f64() * 1e6)
    };
    (0..rounds).map(round).collect()
}

/// How long it takes until all of `waiters` connections that wait for one lock know that it is free. (Of the floor:
/// until a byte was written to each.)
pub fn herd(sock: &Path, waiters: u64, is_floor: bool) -> Result<Duration> {
    let mut lock = key(7);
    let mut owner = connect(sock)?;
    if is_floor {
        lock[0] = floor::WAITER;
    } else {
        owner.write_all(&lock)?;
        expect(&mut owner, b"O")?;
    }
    let mut herd = Vec::new();
    for _ in 0..waiters {
        let mut waiter = connect(sock)?;
        waiter.write_all(&lock)?;
        herd.push(waiter);
    }
    // What they have sent is read before what is asked later.
    let mut last = connect(sock)?;
    for number in 0..100 {
        last.write_all(&key(5_000_000 + number))?;
        expect(&mut last, b"O")?;
        last.write_all(b"R")?;
    }
    let began = Instant::now();
    owner.write_all(if is_floor { &[floor::CALL] } else { b"R" })?;
    for waiter in &mut herd {
        expect(waiter, b"R")?;
    }
    Ok(began.elapsed())
}
