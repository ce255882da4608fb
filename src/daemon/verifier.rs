//! A thread that verifies secrets, since that takes longer than the loop may take. It verifies one at a time, so that the
//! memory for it is taken once.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use crate::auth::StoredSecret;
use crate::proto::Secret;

pub(super) struct Verifier {
    jobs: Sender<Job>,
    results: Receiver<bool>,
    /// Becomes readable with each result.
    wake: UnixStream,
}

struct Job {
    stored: Option<StoredSecret>,
    secret: Secret,
}

impl Verifier {
    pub(super) fn start() -> io::Result<Verifier> {
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let (jobs, thread_jobs) = channel();
        let (thread_results, results) = channel();
        std::thread::Builder::new().name("verifier".into()).spawn(move || {
            let verdict = |job: Job| job.stored.is_some_and(|stored| stored.verify(&job.secret));
            for job in thread_jobs {
                // An error means that the loop has ended, and this thread with it.
                if thread_results.send(verdict(job)).is_err() || (&waker).write_all(b".").is_err() {
                    return;
                }
            }
        })?;
        Ok(Verifier { jobs, results, wake })
    }

    /// Begins to verify a secret. `None`: there is nothing that it could fit.
    pub(super) fn begin(&mut self, stored: Option<StoredSecret>, secret: Secret) {
        // The thread lives as long as this end of its channel.
        let _ = self.jobs.send(Job { stored, secret });
    }

    /// Returns the result, once.
    pub(super) fn result(&mut self) -> Option<bool> {
        self.results.try_recv().ok()
    }

    /// Takes the bytes that woke the loop.
    pub(super) fn drain(&mut self) {
        let _ = self.wake.read(&mut [0; 16]);
    }
}

impl AsFd for Verifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
