//! The journal: which locks are held, in a file, so that a daemon that is killed at any moment can be followed by one
//! that knows.
//!
//! The file is a header and then records of one size, appended: one when a lock is granted, before the grant is sent;
//! one when the hold ends, before the waiters are notified. One turn of the daemon's loop records its
//! changes with one write. When the file has grown well beyond what is held, it is written anew beside itself and renamed.
//!
//! Nothing is ever synced to disk: what the kernel was handed survives the death of a process, and a crash of the
//! machine ends all holders as well, which the boot id in the header tells.
//!
//! What is read is not trusted further than its checksums go: a record that is damaged is passed over, and the file is
//! only read at all if it belongs to this user alone. This module knows nothing of sockets or processes.

mod record;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use md5::{Digest, Md5};
use nix::unistd::Uid;

use crate::proto::{Pid, Token};
use crate::table::{HoldState, Run, Timestamp};
use record::{Decoded, Entry, MAGIC, RECORD_BYTES, decode, encode, header, is_whole, namespace_in, put_hold};

/// The file may always grow to this size before it is written anew, and then to [`GROWTH_MAX`] times what is held.
const SIZE_MIN: u64 = 4 * 1024 * 1024;
const GROWTH_MAX: u64 = 4;

/// Identifies a boot of this machine (random(4), boot_id).
pub type BootId = [u8; 16];

/// When and where the process ids of a journal mean something: in one boot, and in one pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Era {
    /// The boot.
    pub boot: BootId,
    /// The pid namespace (its inode, namespaces(7)); 0: it cannot be told.
    pub namespace: u64,
}

impl From<BootId> for Era {
    fn from(boot: BootId) -> Era {
        Era { boot, namespace: 0 }
    }
}

/// One process. Another one that gets its number later has another start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number, in the daemon's pid namespace.
    pub pid: Pid,
    /// When it started, by the clock that counts from boot.
    pub started: Timestamp,
}

/// Identifies where a journal was written.
type Place = [u8; 16];

/// A held lock, as the journal keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoldRecord {
    /// The hold itself.
    pub held: HoldState,
    /// The process that holds the lock, if it is known.
    pub pid: Option<Pid>,
    /// The command that has inherited the lock, if there is one.
    pub child: Option<Process>,
    /// When it was granted, by the clock that counts from boot.
    pub granted: Timestamp,
    /// When this was first recorded. The process that holds the lock lived then: one that was started later is another.
    pub recorded: Timestamp,
}

/// A run that is over and still counts, as the journal keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunRecord {
    /// The run itself.
    pub run: Run,
    /// When it began, in milliseconds since 1970: the clock of an earlier boot means nothing after a boot.
    pub began_unix_ms: u64,
}

/// Everything that a journal records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// What is held.
    pub holds: Vec<HoldRecord>,
    /// The runs that still count.
    pub runs: Vec<RunRecord>,
}

/// Whether the locks are clustered, and under which lease of etcd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClusterLease {
    /// The locks are this host's alone.
    #[default]
    Local,
    /// The locks are clustered, and there is no lease now.
    None,
    /// The locks are clustered, under the lease with this number.
    Id(u64),
    /// The locks are clustered, and none is granted before this moment, because the store of etcd went back.
    /// [`Timestamp::NEVER`]: the moment is of another boot, so it is not known how much of that time is left.
    Quarantine(Timestamp),
}

impl ClusterLease {
    /// Returns `true` if the locks are clustered.
    pub fn is_clustered(self) -> bool {
        self != ClusterLease::Local
    }

    /// Returns the number of the lease, if there is one.
    pub fn number(self) -> Option<u64> {
        match self {
            ClusterLease::Id(number) => Some(number),
            ClusterLease::Local | ClusterLease::None | ClusterLease::Quarantine(_) => None,
        }
    }

    /// Returns what is left of it after a boot of the machine.
    fn after_boot(self) -> ClusterLease {
        match self {
            ClusterLease::Local => ClusterLease::Local,
            ClusterLease::None | ClusterLease::Id(_) => ClusterLease::None,
            ClusterLease::Quarantine(_) => ClusterLease::Quarantine(Timestamp::NEVER),
        }
    }
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    era: Era,
    /// How far the file is good. What lies behind it was written in part, and is written over.
    length: u64,
    /// How large it was when it was last written anew.
    compacted: u64,
    /// What is to be written.
    pending: Vec<u8>,
    /// Something that should be in the file is not, and is forgotten.
    stale: bool,
    lease: ClusterLease,
}

impl Journal {
    /// Begins a new journal of this content in the place of whatever is at `path`. `lease`: as in [`Loaded`].
    ///
    /// # Errors
    /// When the file cannot be written or put into its place.
    pub fn create(
        path: &Path,
        era: impl Into<Era>,
        lease: ClusterLease,
        content: &Snapshot,
    ) -> io::Result<Journal> {
        let era = era.into();
        let mut bytes = header(&era, &place(path)).to_vec();
        if lease.is_clustered() {
            encode(Entry::Lease(lease), &mut bytes);
        }
        content.holds.iter().for_each(|hold| put_hold(hold, &mut bytes));
        for run in &content.runs {
            encode(Entry::Run(run), &mut bytes);
            encode(Entry::RunBy(run), &mut bytes);
        }
        let file = replace(path, &bytes)?;
        let length = bytes.len() as u64;
        Ok(Journal {
            path: path.into(),
            file,
            era,
            length,
            compacted: length,
            pending: Vec::new(),
            stale: false,
            lease,
        })
    }

    /// Notes that a lock is held, for the next [`Journal::write`]. One with the same token as before replaces it.
    pub fn grant(&mut self, record: &HoldRecord) {
        put_hold(record, &mut self.pending);
    }

    /// Notes that the hold with this token has ended, for the next [`Journal::write`].
    pub fn end(&mut self, token: Token) {
        encode(Entry::End(token), &mut self.pending);
    }

    /// Notes that a run is over and counts for a while, for the next [`Journal::write`].
    pub fn run(&mut self, run: &RunRecord) {
        encode(Entry::Run(run), &mut self.pending);
        encode(Entry::RunBy(run), &mut self.pending);
    }

    /// Notes that the run with this token does not count any more, for the next [`Journal::write`].
    pub fn forget_run(&mut self, token: Token) {
        encode(Entry::RunForgotten(token), &mut self.pending);
    }

    /// Notes that the locks are clustered from now on, and under which lease, for the next [`Journal::write`].
    pub fn set_lease(&mut self, lease: ClusterLease) {
        debug_assert!(lease.is_clustered(), "a journal of clustered locks stays one");
        self.lease = lease;
        encode(Entry::Lease(lease), &mut self.pending);
    }

    /// True when there is something to write.
    pub fn is_dirty(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Writes what was noted to the file. If that fails, none of it counts.
    ///
    /// # Errors
    /// As pwrite(2) gives them; a full disk among them.
    pub fn write(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.pending, self.length)?;
        self.length += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    /// After a [`Journal::write`] that failed: forgets what was noted, so that it does not heap up. The file is stale
    /// then, until [`Journal::compact`] writes the whole state.
    pub fn mark_stale(&mut self) {
        self.pending.clear();
        self.stale = true;
    }

    /// True when only [`Journal::compact`] can make the file tell the truth again.
    pub fn is_stale(&self) -> bool {
        self.stale
    }

    /// True when most of the file is of the past.
    pub fn needs_compaction(&self) -> bool {
        self.length > SIZE_MIN.max(self.compacted * GROWTH_MAX)
    }

    /// Writes the file anew with only what is held now, whatever was noted. If that fails, the old file goes on.
    ///
    /// # Errors
    /// When the new file cannot be written.
    pub fn compact(&mut self, content: &Snapshot) -> io::Result<()> {
        match Journal::create(&self.path, self.era, self.lease, content) {
            Ok(new) => *self = new,
            Err(e) => {
                // Not again with every lock: when it has grown as much once more.
                self.compacted = self.length;
                return Err(e);
            }
        }
        Ok(())
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns `true` if the next daemon finds this file, and not another one or none.
    pub fn is_in_place(&self) -> bool {
        match (self.file.metadata(), fs::symlink_metadata(&self.path)) {
            (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
            _ => false,
        }
    }

    /// Removes the file: nothing is held any more.
    ///
    /// # Errors
    /// As unlink(2) gives them.
    pub fn remove(self) -> io::Result<()> {
        if !self.is_in_place() {
            return Ok(());
        }
        fs::remove_file(self.path)
    }
}

/// What a journal says, and what is wrong with it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// The holds that had not ended, and the runs that may count, each in the order of their tokens.
    pub content: Snapshot,
    /// The journal is of this boot of the machine. The holds of an earlier boot are left out.
    pub is_of_this_boot: bool,
    /// The pid namespace in which its process ids mean something; 0: it cannot be told.
    pub namespace: u64,
    /// The highest token in it: new ones must be larger.
    pub last_token: Option<Token>,
    /// Whether the locks are clustered, and under which lease.
    pub lease: ClusterLease,
    /// What an administrator should know.
    pub complaint: Option<String>,
}

/// Reads a journal, of which nothing is believed that cannot be.
pub fn load(path: &Path, boot: &BootId) -> Loaded {
    match read_own(path) {
        Ok(bytes) => without_foreign_lease(parse(&bytes, boot), &bytes, &place(path)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Loaded::default(),
        Err(e) => complaint(format!("not used: {e}")),
    }
}

/// Names the place of a journal: its machine (machine-id(5)) and its path there.
fn place(path: &Path) -> Place {
    let machine = fs::read("/etc/machine-id").unwrap_or_default();
    let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
    let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
    let path = folder.zip(path.file_name()).map_or(path.clone(), |(folder, name)| folder.join(name));
    Md5::new()
        .chain_update(&machine)
        .chain_update([0])
        .chain_update(path.as_os_str().as_bytes())
        .finalize()
        .into()
}

/// A journal that was written elsewhere is a copy: the daemon that wrote it may live, and keep the lease. A lease serves one
/// daemon, so nothing that was held under it is this daemon's.
fn without_foreign_lease(loaded: Loaded, bytes: &[u8], place: &Place) -> Loaded {
    let written_at = bytes.get(32..48).filter(|written_at| *written_at != [0; 16]);
    if loaded.lease.number().is_none() || written_at.is_none_or(|written_at| written_at == place) {
        return loaded;
    }
    let why = "it was written on another machine or at another path, so the lease and the locks in it are left to the \
               daemon that wrote it";
    Loaded { lease: ClusterLease::None, last_token: loaded.last_token, ..complaint(why.into()) }
}

/// True when a journal says that locks are shared with other hosts, whichever boot it is of.
pub fn is_clustered(path: &Path) -> bool {
    load(path, &BootId::default()).lease.is_clustered()
}

fn complaint(text: String) -> Loaded {
    Loaded { complaint: Some(text), ..Loaded::default() }
}

/// A user who can write the journal decides who holds what, so only a file that this user alone can write is read.
fn read_own(path: &Path) -> io::Result<Vec<u8>> {
    let mut options = OpenOptions::new();
    let mut file =
        options.read(true).custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK).open(path).map_err(
            |e| match e.raw_os_error() {
                Some(nix::libc::ELOOP) => io::Error::other("it is a symbolic link"),
                _ => e,
            },
        )?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::other("it is not a plain file"));
    }
    if meta.uid() != Uid::effective().as_raw() {
        return Err(io::Error::other(format!("it belongs to uid {}", meta.uid())));
    }
    if meta.nlink() > 1 {
        return Err(io::Error::other("it is another file too (a hard link)"));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(io::Error::other(format!("its mode {:o} lets others in", meta.mode() & 0o777)));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads the bytes of a journal file.
pub fn parse(bytes: &[u8], boot: &BootId) -> Loaded {
    let Some((head, body)) = bytes.split_first_chunk::<RECORD_BYTES>() else {
        return match bytes.len() {
            0 => Loaded::default(),
            _ => complaint("not used: it is cut off in its header".into()),
        };
    };
    if &head[..16] != MAGIC || !is_whole(head) {
        return complaint("not used: its header is damaged, or of another version".into());
    }
    let is_of_this_boot = &head[16..32] == boot;
    let mut contents = Contents::default();
    let (records, cut) = body.as_chunks::<RECORD_BYTES>();
    records.iter().for_each(|record| contents.add(decode(record)));
    contents.damaged += usize::from(!cut.is_empty());
    Loaded { namespace: namespace_in(head), ..contents.finish(is_of_this_boot) }
}

/// What the records of a journal say, read from the first to the last.
#[derive(Default)]
struct Contents {
    held: BTreeMap<Token, HoldRecord>,
    runs: BTreeMap<Token, RunRecord>,
    last_token: Option<Token>,
    lease: ClusterLease,
    damaged: usize,
}

impl Contents {
    fn add(&mut self, record: Option<Decoded>) {
        let token = match record {
            Some(Decoded::Grant(record)) => {
                let token = record.held.token;
                self.held.insert(token, record);
                token
            }
            Some(Decoded::Child(token, child)) => {
                if let Some(record) = self.held.get_mut(&token) {
                    record.child = Some(child);
                }
                token
            }
            Some(Decoded::End(token)) => {
                self.held.remove(&token);
                token
            }
            Some(Decoded::Run(record)) => {
                let token = record.run.token;
                self.runs.insert(token, record);
                token
            }
            Some(Decoded::RunBy(token, by)) => {
                if let Some(record) = self.runs.get_mut(&token) {
                    record.run.by = by.as_str().into();
                }
                token
            }
            Some(Decoded::RunForgotten(token)) => {
                self.runs.remove(&token);
                token
            }
            Some(Decoded::Lease(lease)) => return self.lease = lease,
            None => return self.damaged += 1,
        };
        self.last_token = self.last_token.max(Some(token));
    }

    fn finish(self, is_of_this_boot: bool) -> Loaded {
        let runs = self.runs.into_values().collect();
        if !is_of_this_boot {
            // No holder of an earlier boot lives now. That locks are clustered is as true as it was.
            let lease = self.lease.after_boot();
            return Loaded { content: Snapshot { runs, ..Snapshot::default() }, lease, ..Loaded::default() };
        }
        let complaint = (self.damaged > 0).then(|| format!("{} damaged records were skipped", self.damaged));
        let content = Snapshot { holds: self.held.into_values().collect(), runs };
        let (last_token, lease) = (self.last_token, self.lease);
        Loaded { content, is_of_this_boot, namespace: 0, last_token, lease, complaint }
    }
}

/// Writes a new file beside `path`, and renames it to that: at no moment is there half a file, or none.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    match fs::remove_file(&new) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    // `create_new` follows no link that another user may have made meanwhile.
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&new)?;
    let written = file.write_all_at(bytes, 0).and_then(|()| fs::rename(&new, path));
    if let Err(e) = written {
        // It is of no use, and the next attempt removes it too.
        let _ = fs::remove_file(&new);
        return Err(e);
    }
    Ok(file)
}

impl fmt::Display for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}
