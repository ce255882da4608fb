//! The floor: the least that an epoll server of protocol 1 must do. It reads what has come and answers it, and keeps
//! nothing. A daemon is measured as a ratio to it.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::Result;

/// Serves `path` until it is killed. Every read of 16 bytes or more is answered with `O`; one of `W` bytes from a
/// connection that has sent a key with the first byte `W` has a byte written to all such connections.
pub fn serve(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::MAXALLOWABLE)?;
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX))?;
    let mut clients: Vec<Option<UnixStream>> = Vec::new();
    let mut herd: Vec<usize> = Vec::new();
    let mut events = [EpollEvent::empty(); 256];
    let mut buffer = [0; 512];
    loop {
        let ready = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..ready] {
            if event.data() == u64::MAX {
                while let Ok((client, _)) = listener.accept() {
                    client.set_nonblocking(true)?;
                    let number = client.as_raw_fd() as usize;
                    epoll.add(&client, EpollEvent::new(EpollFlags::EPOLLIN, number as u64))?;
                    clients.resize_with(clients.len().max(number + 1), || None);
                    clients[number] = Some(client);
                }
                continue;
            }
            let number = event.data() as usize;
            let Some(client) = &mut clients[number] else { continue };
            match client.read(&mut buffer) {
                Ok(16..) if buffer[0] == WAITER => herd.push(number),
                Ok(16..) => drop(client.write(b"O")),
                Ok(1) if buffer[0] == CALL => {
                    for number in herd.drain(..) {
                        let waiter = clients[number].as_mut();
                        drop(waiter.map(|waiter| waiter.write(b"R")));
                    }
                }
                Ok(1..) => {}
                _ => clients[number] = None,
            }
        }
    }
}

/// The first byte of a key that is not answered until a client sends [`CALL`].
pub const WAITER: u8 = b'W';
/// Has all who wait answered.
pub const CALL: u8 = b'C';
