//! A daemon of one's own in a private folder, commands that use it, raw connections to it, and waiting for what is to
//! happen. Nothing here sleeps for a time that "should do": everything waits for a state, and gives up after
//! [`TIMEOUT`] with the reason.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{IoSlice, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Once};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tempfile::TempDir;

/// How long anything may take before the test fails. Far more than it needs, even on a busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// The program under test.
pub const KMUTEX: &str = env!("CARGO_BIN_EXE_kmutex");

/// A tool that a test runs beside kmutex: without it the test fails, and says what is missing.
pub fn tool(name: &str) -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(name).is_file());
    assert!(found, "this test needs {name}, which is not installed; tests/install-tools does that");
    Command::new(name)
}

/// Waits until `look` finds something, and returns it. `what` is for the failure.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let give_up = Instant::now() + TIMEOUT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < give_up, "waited in vain for {what}");
        // Leaves the processor to the processes that this waits for.
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until there are bytes to read, or the end.
fn wait_for_bytes(from: impl AsFd) {
    let mut ready = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
    let time = PollTimeout::try_from(TIMEOUT).unwrap();
    assert_ne!(poll(&mut ready, time).unwrap(), 0, "waited in vain for a process to write");
}

/// Waits until `look` says true.
pub fn wait_until(what: &str, mut look: impl FnMut() -> bool) {
    wait_for(what, || look().then_some(()));
}

/// A daemon in a folder of its own. It is killed when this is dropped; a failing test shows its log.
pub struct Daemon {
    folder: TempDir,
    process: Process,
}

impl Daemon {
    /// Serves `sock` in a new folder.
    pub fn start() -> Daemon {
        Daemon::with(&[])
    }

    /// The same with further options for `kmutex serve`.
    pub fn with(options: &[&str]) -> Daemon {
        Daemon::made(options, |command| command)
    }

    /// The same, with a last change to the command that starts it.
    pub fn made(options: &[&str], change: impl FnOnce(&mut Command) -> &mut Command) -> Daemon {
        let folder = tempfile::tempdir().unwrap();
        let process = Process::spawn(change(&mut Daemon::command(&folder, options)));
        let daemon = Daemon { folder, process };
        daemon.wait_for_log("serving on");
        daemon
    }

    /// Kills the daemon, unless it is dead already, and starts another one in its place, with these options.
    pub fn restart(&mut self, options: &[&str]) {
        self.restart_made(options, |command| command);
    }

    /// The same, with a last change to the command that starts it.
    pub fn restart_made(&mut self, options: &[&str], change: impl FnOnce(&mut Command) -> &mut Command) {
        if self.process.is_running() {
            self.kill();
        }
        self.process = Process::spawn(change(&mut Daemon::command(&self.folder, options)));
        self.wait_for_log("serving on");
    }

    /// Kills the daemon, as `kill -9` does, and waits until it is gone.
    pub fn kill(&mut self) {
        self.process.signal(Signal::SIGKILL);
        assert_eq!(self.process.wait(), 128 + 9);
    }

    fn command(folder: &TempDir, options: &[&str]) -> Command {
        let log = File::create(folder.path().join("log")).unwrap();
        let mut command = Command::new(KMUTEX);
        command.args(["serve", "--sock"]).arg(folder.path().join("sock"));
        if !options.contains(&"--log-level") {
            command.args(["--log-level", "debug"]);
        }
        command.args(options).current_dir(folder.path()).env_remove("KMUTEX_SOCK").env_remove("RUST_LOG");
        command.stdin(Stdio::null()).stderr(log);
        command
    }

    /// The private folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The Unix socket.
    pub fn sock(&self) -> PathBuf {
        self.folder.path().join("sock")
    }

    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// The process, to wait for its end.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Everything that it has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// Waits until the log has a line with `text` in it, and returns that line.
    pub fn wait_for_log(&self, text: &str) -> String {
        wait_for(&format!("{text:?} in the log:\n{}", self.log()), || {
            self.log().lines().find(|line| line.contains(text)).map(String::from)
        })
    }

    /// Waits until the log has `count` lines with `text` in them.
    pub fn wait_for_logs(&self, text: &str, count: usize) {
        wait_until(&format!("{count} times {text:?} in the log"), || {
            self.log().lines().filter(|line| line.contains(text)).count() >= count
        });
    }

    /// `kmutex ARGS...`, with this daemon and no other.
    pub fn kmutex<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(KMUTEX);
        command.args(args).env("KMUTEX_SOCK", self.sock()).current_dir(self.folder());
        command.stdin(Stdio::null());
        command
    }

    /// `kmutex run --no-autostart ARGS...`, with this daemon and no other.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = self.kmutex(&["run", "--no-autostart"]);
        command.args(args);
        command
    }

    /// `kmutex status --json`: one value a lock.
    pub fn status(&self) -> Vec<serde_json::Value> {
        let output = self.kmutex(&["status", "--json"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// How many hold the key, and how many wait for it.
    pub fn counts(&self, key: &str) -> (u64, u64) {
        let count = |lock: &serde_json::Value, field: &str| lock[field].as_u64().unwrap();
        let status = self.status();
        let lock = status.iter().find(|lock| lock["key"] == key);
        lock.map_or((0, 0), |lock| (count(lock, "holding"), count(lock, "waiting")))
    }

    /// Waits until so many hold the key and so many wait for it.
    pub fn wait_for_counts(&self, key: &str, holding: u64, waiting: u64) {
        wait_until(&format!("{holding} holders and {waiting} waiters of {key}"), || {
            self.counts(key) == (holding, waiting)
        });
    }

    /// Starts a holder of `key` that holds until [`Holder::finish`], and waits until it holds.
    pub fn hold(&self, key: &str) -> Holder {
        self.hold_with(&[], key)
    }

    /// The same with further options for `kmutex run`.
    pub fn hold_with(&self, options: &[&str], key: &str) -> Holder {
        let mut command = self.run(options);
        // The command says that it runs, then waits for the end of its input, and exits with what it reads.
        command.args([key, "--", "sh", "-c", "echo holding; read status; exit ${status:-0}"]);
        let mut process = Process::spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        process.wait_for_line("holding");
        Holder { process }
    }

    /// A raw connection.
    pub fn wire(&self) -> Wire<UnixStream> {
        Wire::new(UnixStream::connect(self.sock()).unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log ---\n{}---", self.log());
        }
    }
}

/// A path where clients may have started a daemon, which is killed when this is dropped.
pub struct Autostarted(pub PathBuf);

impl Drop for Autostarted {
    fn drop(&mut self) {
        let mut lock_file = self.0.clone().into_os_string();
        lock_file.push(".lock");
        let pid = fs::read_to_string(lock_file).ok().and_then(|pid| pid.trim().parse().ok());
        if let Some(pid) = pid {
            // It may just have ended by itself.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// A `kmutex run` whose command runs until it is told to end.
pub struct Holder {
    pub process: Process,
}

impl Holder {
    /// Lets the command end with this status, and waits for kmutex's.
    pub fn finish(mut self, status: u8) -> i32 {
        let mut stdin = self.process.child.stdin.take().unwrap();
        writeln!(stdin, "{status}").unwrap();
        drop(stdin);
        self.process.wait()
    }
}

/// A process that is killed, by pid, when this is dropped.
pub struct Process {
    pub child: Child,
    /// What it has written to a piped standard output and was not yet asked for.
    pending: Vec<u8>,
}

impl Process {
    pub fn spawn(command: &mut Command) -> Process {
        handle_ignored_signals();
        let child = command.spawn();
        let child = child
            .unwrap_or_else(|e| panic!("cannot start {:?}, which is needed: {e}", command.get_program()));
        Process { child, pending: Vec::new() }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Waits for its end and returns its exit code; 128 and the signal if it died of one.
    pub fn wait(&mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        let status = wait_for("the end of a process", || self.child.try_wait().unwrap());
        status.code().unwrap_or_else(|| 128 + status.signal().unwrap())
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Reads its piped standard output up to and with a line that is `text`, and returns the lines before it.
    pub fn wait_for_line(&mut self, text: &str) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let line = self.line().unwrap_or_else(|| panic!("the output ends without {text:?}: {lines:?}"));
            if line == text {
                return lines;
            }
            lines.push(line);
        }
    }

    /// All of its piped standard error, up to its end.
    pub fn stderr(&mut self) -> String {
        let mut text = String::new();
        self.child.stderr.take().expect("standard error is piped").read_to_string(&mut text).unwrap();
        text
    }

    /// The next line of its piped standard output, without its end. `None`: there is no more.
    pub fn line(&mut self) -> Option<String> {
        let stdout = self.child.stdout.as_mut().expect("standard output is piped");
        loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return Some(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            let mut buffer = [0; 4096];
            wait_for_bytes(&stdout);
            match stdout.read(&mut buffer).unwrap() {
                0 => return None,
                bytes => self.pending.extend_from_slice(&buffer[..bytes]),
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended, and been waited for, already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lets no test depend on how the tests were started: a shell script starts what it puts into the background with SIGINT and
/// SIGQUIT ignored, and nohup(1) does so with SIGHUP. Children inherit that; a signal that is handled is theirs by default.
fn handle_ignored_signals() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
        let mask = u64::from_str_radix(mask.trim(), 16).unwrap();
        for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
            if mask & (1 << (signal as i32 - 1)) != 0 {
                signal_hook::flag::register(signal as i32, Arc::default()).unwrap();
            }
        }
    });
}

/// What a process that has ended leaves behind.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code; 128 and the signal if it died of one.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end, for which it has [`TIMEOUT`]. It may leave processes behind that have its output open.
pub fn finish(command: &mut Command) -> Finished {
    let [mut stdout, mut stderr] = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    command.stdout(stdout.try_clone().unwrap()).stderr(stderr.try_clone().unwrap());
    let code = Process::spawn(command).wait();
    let text = |file: &mut File| String::from_utf8_lossy(&read_from_start(file)).into_owned();
    Finished { code, stdout: text(&mut stdout), stderr: text(&mut stderr) }
}

impl Finished {
    /// It ended with this code and had nothing to say. Returns its output.
    #[track_caller]
    pub fn assert_silent(self, code: i32) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (code, ""), "{self:?}");
        self.stdout
    }

    /// It ended with this code, and with one line that names what is wrong.
    #[track_caller]
    pub fn assert_error(self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        let is_one_line = self.stderr.lines().count() == 1 && self.stderr.ends_with('\n');
        assert!(is_one_line && self.stderr.starts_with("kmutex: "), "not one line of kmutex: {self:?}");
        assert!(!self.stderr.trim_end().contains(char::is_control), "not for a terminal: {self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is missing: {self:?}");
        }
        assert_eq!(self.stdout, "", "{self:?}");
    }
}

/// A raw connection, for tests of the protocols themselves. Whatever it waits for, it waits [`TIMEOUT`] at the most.
pub struct Wire<S: Stream> {
    stream: S,
    pending: Vec<u8>,
}

/// What a raw connection can be made of.
pub trait Stream: Read + Write {
    fn set_timeout(&self);
    fn end(&self);
}

impl Stream for UnixStream {
    fn set_timeout(&self) {
        self.set_read_timeout(Some(TIMEOUT)).unwrap();
    }
    fn end(&self) {
        self.shutdown(Shutdown::Write).unwrap();
    }
}

impl Stream for Box<dyn Stream> {
    fn set_timeout(&self) {
        self.as_ref().set_timeout();
    }
    fn end(&self) {
        self.as_ref().end();
    }
}

impl Stream for TcpStream {
    fn set_timeout(&self) {
        self.set_nodelay(true).unwrap();
        self.set_read_timeout(Some(TIMEOUT)).unwrap();
    }
    fn end(&self) {
        self.shutdown(Shutdown::Write).unwrap();
    }
}

/// The preamble of protocol 2.
pub const PREAMBLE: &[u8; 16] = b"\0kmutex proto 2\n";

impl Wire<UnixStream> {
    /// Sends a request of protocol 2, with a descriptor of the process that it names. `preamble`: it is the first request.
    pub fn request_with(&mut self, preamble: &[u8], request: &str, process: Pid) -> &mut Self {
        self.request_with_file(preamble, request, open_process(process).as_fd())
    }

    /// The same with any descriptor.
    pub fn request_with_file(&mut self, preamble: &[u8], request: &str, file: BorrowedFd<'_>) -> &mut Self {
        send_with(&self.stream, &[preamble, request.as_bytes(), b"\n"].concat(), file);
        self
    }
}

/// Sends bytes, and a descriptor with them.
pub fn send_with(stream: &UnixStream, bytes: &[u8], file: BorrowedFd<'_>) {
    let descriptors = [file];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
    assert_eq!(sent, bytes.len());
}

/// Opens a process, to name it.
pub fn open_process(process: Pid) -> OwnedFd {
    let process = rustix::process::Pid::from_raw(process.as_raw()).unwrap();
    rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()).unwrap()
}

impl<S: Stream> Wire<S> {
    pub fn new(stream: S) -> Wire<S> {
        stream.set_timeout();
        Wire { stream, pending: Vec::new() }
    }

    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.stream.write_all(bytes.as_ref()).unwrap();
        self
    }

    /// The connection itself.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// Ends the sending direction.
    pub fn end(&mut self) {
        self.stream.end();
    }

    /// Reads as many bytes as `expected` has, and compares.
    pub fn expect(&mut self, expected: impl AsRef<[u8]>) -> &mut Self {
        let expected = expected.as_ref();
        while self.pending.len() < expected.len() {
            assert!(
                self.fill() > 0,
                "the daemon closed, {:?} was expected",
                String::from_utf8_lossy(expected)
            );
        }
        let got: Vec<u8> = self.pending.drain(..expected.len()).collect();
        assert_eq!(String::from_utf8_lossy(&got), String::from_utf8_lossy(expected));
        self
    }

    /// Waits for the end of the stream, before which nothing more may come.
    pub fn expect_closed(&mut self) {
        assert!(self.pending.is_empty(), "unread: {:?}", String::from_utf8_lossy(&self.pending));
        let bytes = self.fill();
        assert_eq!(
            bytes,
            0,
            "the daemon should close, but sent {:?}",
            String::from_utf8_lossy(&self.pending)
        );
    }

    /// What one read brings.
    pub fn read_once(&mut self) -> String {
        assert!(self.fill() > 0, "the daemon closed, an answer was expected");
        String::from_utf8(std::mem::take(&mut self.pending)).unwrap()
    }

    /// Sends the preamble and a request of protocol 2.
    pub fn open(&mut self, request: &str) -> &mut Self {
        self.send([PREAMBLE, request.as_bytes(), b"\n"].concat());
        let hello = self.answer();
        assert_eq!(hello["type"], "hello");
        self
    }

    /// Sends a request of protocol 2.
    pub fn request(&mut self, request: &str) -> &mut Self {
        self.send(format!("{request}\n"))
    }

    /// The next answer of protocol 2.
    pub fn answer(&mut self) -> serde_json::Value {
        loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return serde_json::from_slice(&line).unwrap();
            }
            assert!(self.fill() > 0, "the daemon closed, an answer was expected");
        }
    }

    /// The next answer of protocol 2, which must be of this type.
    pub fn answer_of(&mut self, kind: &str) -> serde_json::Value {
        let answer = self.answer();
        assert_eq!(answer["type"], kind, "{answer}");
        answer
    }

    /// Reads what comes; 0 is the end. A reset counts as the end: the daemon may close with bytes of ours unread.
    fn fill(&mut self) -> usize {
        let mut buffer = [0; 65536];
        let bytes = match self.stream.read(&mut buffer) {
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => 0,
            other => other.expect("the daemon sends nothing"),
        };
        self.pending.extend_from_slice(&buffer[..bytes]);
        bytes
    }
}

impl Wire<UnixStream> {
    /// Sends bytes, and passes a descriptor with them.
    pub fn send_with(&mut self, bytes: &str, passed: BorrowedFd<'_>) {
        let passed = [passed];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&passed)));
        let bytes = [IoSlice::new(bytes.as_bytes())];
        sendmsg(&self.stream, &bytes, &mut control, SendFlags::empty()).unwrap();
    }
}

/// Everything that is in an open file.
pub fn read_from_start(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Writes a script that everybody may execute. By another process: if this one had the file open for writing, so might,
/// for a moment, the children that other tests start, and a file that is open for writing cannot be executed.
pub fn write_script(path: &Path, text: &str) {
    let mut command = Command::new("sh");
    command.args(["-c", r#"cat > "$0" && chmod 755 "$0""#]).arg(path);
    let mut process = Process::spawn(command.stdin(Stdio::piped()));
    process.child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert_eq!(process.wait(), 0);
}

/// Lets everybody make files in a folder.
pub fn open_to_all(folder: &Path) {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).unwrap();
}

/// A process that is not a child of this test. Dropping this kills it, by pid.
pub struct KillOnDrop(Pid);

impl KillOnDrop {
    /// From its pid, as it was printed.
    pub fn new(pid: &str) -> KillOnDrop {
        let pid = pid.trim().parse().unwrap_or_else(|_| panic!("no process id: {pid:?}"));
        assert!(pid > 1, "{pid}");
        KillOnDrop(Pid::from_raw(pid))
    }

    pub fn kill(&self) {
        kill(self.0, Signal::SIGKILL).unwrap();
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = kill(self.0, Signal::SIGKILL);
    }
}
