//! The result of one run for many callers (`--share`). All callers are in a folder of their own, which is empty in the end.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, mkfifo};
use tempfile::TempDir;

use crate::commands::{Environment, Timed, alternate};
use crate::report::{Row, Target};
use crate::servers::{Server, pin_load, unpin_load};
use crate::{Result, fail, median, percentile};

/// How many callers want one result, and how many bytes it has.
const CALLERS: usize = 200;
const BYTES: u64 = 50_000_000;
/// How often the first byte of a live result is awaited.
const FIRST_BYTES: usize = 50;
/// How often a holder runs beside a waiter of each kind.
const TURNS: usize = 40;
/// How often each of two commands finds its result remembered, and of how many bytes.
const HITS: usize = 1_000;
const PAGE_BYTES: usize = 10_000;
/// How long anything may take that must happen.
const PATIENCE: Duration = Duration::from_secs(60);
/// What all callers lock.
const KEY: &str = "page";

/// All rows.
pub fn measure(program: &Path) -> Result<Vec<Row>> {
    unpin_load()?;
    let scene = Scene::new(program)?;
    let mut rows = scene.one_run_for_all()?;
    rows.push(scene.first_byte()?);
    for option in ["--share", "--share=live"] {
        rows.push(scene.beside_a_waiter(option)?);
    }
    rows.push(scene.remembered()?);
    rows.push(scene.left_over()?);
    pin_load()?;
    Ok(rows)
}

/// Checks that bkt is there before everything else is measured.
pub fn check() -> Result<()> {
    match Command::new("bkt").arg("--version").output() {
        Ok(_) => Ok(()),
        Err(e) => fail(format!("bkt is needed (`cargo install bkt --locked`): {e}")),
    }
}

/// A daemon, its callers' folder, and what their commands read.
struct Scene {
    program: PathBuf,
    daemon: Server,
    /// What the daemon has beside its socket before any caller comes.
    daemon_files: usize,
    /// Where the callers are, and have their temporary files.
    callers: TempDir,
    inputs: TempDir,
}

impl Scene {
    fn new(program: &Path) -> Result<Scene> {
        let daemon = Server::kmutex(program)?;
        daemon.unpin()?;
        let (callers, inputs) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let mut output = fs::File::create(inputs.path().join("output"))?;
        std::io::copy(&mut fs::File::open("/dev/urandom")?.take(BYTES), &mut output)?;
        for pipe in ["go", "end"] {
            mkfifo(&inputs.path().join(pipe), Mode::S_IRUSR | Mode::S_IWUSR)?;
        }
        let daemon_files = entries(daemon.folder())?;
        Ok(Scene { program: program.into(), daemon, daemon_files, callers, inputs })
    }

    fn input(&self, name: &str) -> PathBuf {
        self.inputs.path().join(name)
    }

    /// A caller whose command runs this script in the folder of the inputs, if it runs.
    fn caller(&self, option: &str, script: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["run", option, "--sock"]).arg(self.daemon.sock());
        command.args([KEY, "sh", "-c", &self.in_inputs(script)]);
        command.current_dir(self.callers.path()).env("TMPDIR", self.callers.path());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn in_inputs(&self, script: &str) -> String {
        format!("cd '{}'; {script}", self.inputs.path().display())
    }

    /// Waits until the lock is held, and so many wait for it.
    fn wait_for_waiters(&self, waiting: usize) -> Result<()> {
        let counts = ["\"holding\":1,".into(), format!("\"waiting\":{waiting}}}")];
        wait_for(&format!("{waiting} waiters"), || {
            let mut status = Command::new(&self.program);
            status.args(["status", "--json", "--sock"]).arg(self.daemon.sock());
            let locks = String::from_utf8(status.output()?.stdout)?;
            Ok(counts.iter().all(|count: &String| locks.contains(count)))
        })
    }

    /// Lets the holder's command go on, which waits to read from this pipe. (Two lines for one command go through two pipes: it
    /// may open a pipe again before the writer has closed it.)
    fn write_to(&self, pipe: &str) -> Result<()> {
        Ok(fs::write(self.input(pipe), "\n")?)
    }

    /// All callers get the result of one run, whole, beside as many that read it from a file.
    fn one_run_for_all(&self) -> Result<Vec<Row>> {
        let expected = fs::read(self.input("output"))?;
        let script = "echo >>runs; read go <go; exec cat output";
        let callers = start_all(|| self.caller("--share", script))?;
        self.wait_for_waiters(CALLERS - 1)?;
        let ours = read_all(callers, &expected, || self.write_to("go"))?;
        let runs = fs::read_to_string(self.input("runs"))?.lines().count();
        let readers = start_all(|| {
            let mut command = Command::new("sh");
            command
                .args(["-c", &self.in_inputs("until test -e begin; do sleep 0.01; done; exec cat output")]);
            command
        })?;
        let theirs = read_all(readers, &expected, || Ok(fs::write(self.input("begin"), "")?))?;
        let megabytes = BYTES / 1_000_000;
        let what =
            format!("runs for {CALLERS} callers with `--share`, which all get the same {megabytes} MB");
        Ok(vec![
            Row::new(&what, runs as f64, None, "", Target::AtMost(1.0)),
            Row::new(
                &format!("these {CALLERS} results / {CALLERS} times `cat` of a file"),
                ours,
                Some(theirs),
                "ms",
                Target::Open,
            ),
        ])
    }

    /// How long after the holder's caller a caller that waits has the first byte, at the worst.
    fn first_byte(&self) -> Result<Row> {
        let mut behind = Vec::new();
        for _ in 0..FIRST_BYTES {
            let script = "read go <go; echo first; read end <end";
            let mut holder = Caller::start_piped(&mut self.caller("--share", script))?;
            self.wait_for_waiters(0)?;
            let mut waiter = Caller::start_piped(&mut self.caller("--share=live", script))?;
            self.wait_for_waiters(1)?;
            let [first, second] = thread::scope(|scope| {
                let reads = [&mut holder, &mut waiter].map(|caller| scope.spawn(|| caller.first_byte()));
                self.write_to("go")?;
                let [first, second] = reads.map(|read| read.join().map_err(|_| "a reader panicked")?);
                Ok::<_, crate::Failure>([first?, second?])
            })?;
            self.write_to("end")?;
            [holder, waiter].iter_mut().try_for_each(Caller::ended)?;
            // The waiter may be first.
            behind.push(second.saturating_duration_since(first).as_secs_f64() * 1e3);
        }
        let what = format!("first byte with `--share=live` after the holder's, slowest of {FIRST_BYTES}");
        Ok(Row::new(&what, percentile(&behind, 1.0), None, "ms", Target::AtMost(50.0)))
    }

    /// How long a holder's run takes while a waiter is stopped, and while it is not. (Without a waiter, the run also takes the
    /// time of freeing its result, which otherwise the last waiter does.)
    fn beside_a_waiter(&self, option: &str) -> Result<Row> {
        let mut took = [Vec::new(), Vec::new()];
        for _ in 0..TURNS {
            took[0].push(self.run_beside(option, Waiter::Stopped)?);
            took[1].push(self.run_beside(option, Waiter::Running)?);
        }
        let [stopped, running] = took.map(|took| median(&took));
        let what = format!("run beside a stopped waiter with `{option}` / beside a running one");
        Ok(Row::new(&what, stopped, Some(running), "ms", Target::AtMost(1.02)))
    }

    /// How long one run takes, in milliseconds.
    fn run_beside(&self, option: &str, waiter: Waiter) -> Result<f64> {
        let script = "read go <go; exec cat output";
        let mut holder = Caller::start(&mut self.caller("--share", script))?;
        self.wait_for_waiters(0)?;
        let mut waiting = Caller::start(&mut self.caller(option, script))?;
        self.wait_for_waiters(1)?;
        if waiter == Waiter::Stopped {
            waiting.stop()?;
        }
        let began = Instant::now();
        self.write_to("go")?;
        holder.ended()?;
        let took = began.elapsed();
        waiting.cont()?;
        waiting.ended()?;
        Ok(took.as_secs_f64() * 1e3)
    }

    /// A command whose result is remembered, beside bkt, which remembers it too.
    fn remembered(&self) -> Result<Row> {
        fs::write(self.input("page"), vec![b'x'; PAGE_BYTES])?;
        let folder = self.input("bkt");
        let script = |name: &str| self.in_inputs(&format!("echo >>{name}; cat page"));
        let sock = self.daemon.sock();
        let (program, sock) = (self.program.to_string_lossy(), sock.to_string_lossy());
        let (ours, theirs) = (script("runs-of-kmutex"), script("runs-of-bkt"));
        let ours =
            [&program, "run", "--share", "--fresh", "1h", "--sock", &sock, KEY, "sh", "-c", ours.as_str()];
        let folder = folder.to_string_lossy();
        let theirs = ["bkt", "--ttl=1h", "--cache-dir", &folder, "--", "sh", "-c", theirs.as_str()];
        let [ours, theirs] = [&ours[..], &theirs].map(|words| Timed::new(words, 0, Environment::Cron));
        // The first two run the command.
        let [mut ours, mut theirs] = alternate(HITS + 1, &ours?, &theirs?)?;
        for (took, runs) in [(&mut ours, "runs-of-kmutex"), (&mut theirs, "runs-of-bkt")] {
            took.remove(0);
            if fs::read(self.input(runs))? != b"\n" {
                return fail(format!("a result was not remembered: {runs}"));
            }
        }
        let what = "remembered result of `kmutex run --share --fresh` / of `bkt`";
        Ok(Row::new(what, median(&ours), Some(median(&theirs)), "µs", Target::AtMost(1.0)))
    }

    /// Counts the files that callers and daemon have left, and the results that the daemon has open once it has forgotten the
    /// run.
    fn left_over(&self) -> Result<Row> {
        let mut forget = Command::new(&self.program);
        Caller::start(forget.args(["forget", "--sock"]).arg(self.daemon.sock()).arg(KEY))?.ended()?;
        let open = || open_results(self.daemon.pid());
        // The count says so, if that does not come true.
        let _ = wait_for("the results to be closed", || Ok(open()? == 0));
        let files = entries(self.callers.path())? + entries(self.daemon.folder())? - self.daemon_files;
        let what = "files and open results that are left over by all callers with `--share`";
        Ok(Row::new(what, (files + open()?) as f64, None, "", Target::AtMost(0.0)))
    }
}

fn start_all(command: impl Fn() -> Command) -> Result<Vec<Caller>> {
    (0..CALLERS).map(|_| Caller::start_piped(&mut command())).collect()
}

/// What the waiter does meanwhile.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waiter {
    Running,
    /// By SIGSTOP.
    Stopped,
}

/// How long it takes until each caller has written what is expected, and has ended, in milliseconds.
fn read_all(mut callers: Vec<Caller>, expected: &[u8], begin: impl Fn() -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    thread::scope(|scope| {
        let reads: Vec<_> =
            callers.iter_mut().map(|caller| scope.spawn(|| caller.read_whole(expected))).collect();
        begin()?;
        reads.into_iter().try_for_each(|read| read.join().map_err(|_| "a reader panicked")?)
    })?;
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// A process, which is ended when this is dropped.
struct Caller(Child);

impl Caller {
    fn start(command: &mut Command) -> Result<Caller> {
        Ok(Caller(command.spawn()?))
    }

    /// With a pipe for what it writes.
    fn start_piped(command: &mut Command) -> Result<Caller> {
        Caller::start(command.stdout(Stdio::piped()))
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }

    /// Returns when it is stopped.
    fn stop(&self) -> Result<()> {
        kill(self.pid(), Signal::SIGSTOP)?;
        waitpid(self.pid(), Some(WaitPidFlag::WUNTRACED))?;
        Ok(())
    }

    fn cont(&self) -> Result<()> {
        Ok(kill(self.pid(), Signal::SIGCONT)?)
    }

    /// When the first byte can be read.
    fn first_byte(&mut self) -> Result<Instant> {
        self.0.stdout.as_mut().ok_or(NO_PIPE)?.read_exact(&mut [0])?;
        Ok(Instant::now())
    }

    /// Reads exactly these bytes.
    fn read_whole(&mut self, expected: &[u8]) -> Result<()> {
        let mut stdout = self.0.stdout.take().ok_or(NO_PIPE)?;
        let (mut rest, mut buffer) = (expected, vec![0; 64 * 1024]);
        loop {
            let length = stdout.read(&mut buffer)?;
            match rest.strip_prefix(&buffer[..length]) {
                Some(b"") if length == 0 => return self.ended(),
                Some(behind) if length > 0 => rest = behind,
                _ => return fail("a caller got other bytes than the command wrote"),
            }
        }
    }

    /// Waits for its end, which must be with 0.
    fn ended(&mut self) -> Result<()> {
        let status = self.0.wait()?;
        if status.success() { Ok(()) } else { fail(format!("a caller has ended: {status}")) }
    }
}

const NO_PIPE: &str = "the caller has no pipe";

impl Drop for Caller {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            // Not SIGKILL, so that kmutex ends its command too. It may have ended by itself meanwhile.
            let _ = kill(self.pid(), Signal::SIGTERM);
            let _ = self.cont();
            let _ = self.0.wait();
        }
    }
}

/// Waits until something is so.
fn wait_for(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let give_up = Instant::now() + PATIENCE;
    while !is_so()? {
        if Instant::now() > give_up {
            return fail(format!("waited in vain for {what}"));
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<usize> {
    Ok(fs::read_dir(folder)?.count())
}

/// How many results a process has open (src/output.rs names them).
fn open_results(pid: Pid) -> Result<usize> {
    let links =
        fs::read_dir(format!("/proc/{pid}/fd"))?.filter_map(|link| fs::read_link(link.ok()?.path()).ok());
    Ok(links.filter(|target| target.to_string_lossy().contains("kmutex-output")).count())
}
