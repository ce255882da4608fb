//! The output of a command, kept to be given to others: both streams in one file in memory (memfd_create(2)), in the order
//! in which the command wrote.
//!
//! The file is a row of pieces. Each has a head of eight bytes: the stream (1 or 2), three zero bytes, and the length of
//! what follows, big-endian. Only the process that made the file can write to it: what others get is open for reading, and is
//! sealed when it is complete. They read at offsets of their own (pread(2)).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
#[cfg(feature = "daemon")]
use rustix::fs::{FileType, fcntl_get_seals, fstat};
use rustix::fs::{MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, memfd_create};

/// The longest output that is sent through a connection, in bytes: to other hosts, where no descriptor can be passed.
pub const SENT_BYTES_MAX: usize = 64 * 1024;
/// The longest piece that is made of a result that is there as a whole.
const PIECE_BYTES_MAX: usize = 1 << 20;
/// How long the head of a piece is.
pub(crate) const HEAD_BYTES: usize = 8;
/// How long a file can be whose output is not longer than [`SENT_BYTES_MAX`]: no piece is empty.
#[cfg(feature = "daemon")]
const READ_BYTES_MAX: usize = SENT_BYTES_MAX * (HEAD_BYTES + 1);
/// What makes sure that a file stays as it is.
const SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::GROW).union(SealFlags::SHRINK);

/// Where a command has written something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    /// Returns the number of its descriptor.
    pub fn number(self) -> u8 {
        match self {
            Stream::Stdout => 1,
            Stream::Stderr => 2,
        }
    }

    /// Returns the stream with this number.
    pub fn from_number(number: u8) -> Option<Stream> {
        match number {
            1 => Some(Stream::Stdout),
            2 => Some(Stream::Stderr),
            _ => None,
        }
    }
}

/// A file of output that grows.
#[derive(Debug)]
pub struct OutputFile(File);

impl OutputFile {
    /// An empty one.
    ///
    /// # Errors
    /// Those of memfd_create(2) and fchmod(2).
    pub fn new() -> io::Result<OutputFile> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = match memfd_create("kmutex-output", flags) {
            // Where vm.memfd_noexec demands it, which older kernels do not know.
            Err(rustix::io::Errno::ACCESS) => memfd_create("kmutex-output", flags | MemfdFlags::NOEXEC_SEAL)?,
            other => other?,
        };
        // A descriptor can be opened anew through /proc: other users may do that only for reading.
        fchmod(&fd, Mode::RUSR)?;
        Ok(OutputFile(fd.into()))
    }

    /// Makes a file that is complete, and returns a descriptor for readers.
    ///
    /// # Errors
    /// As [`OutputFile::new`] and [`OutputFile::append`].
    pub fn of(stdout: &[u8], stderr: &[u8]) -> io::Result<OwnedFd> {
        let mut file = OutputFile::new()?;
        for (stream, bytes) in [(Stream::Stdout, stdout), (Stream::Stderr, stderr)] {
            bytes.chunks(PIECE_BYTES_MAX).try_for_each(|piece| file.append(stream, piece))?;
        }
        file.seal()?;
        file.for_readers()
    }

    /// Makes a file that is complete of the bytes that it has, and returns a descriptor for readers.
    ///
    /// # Errors
    /// As [`OutputFile::new`] and [`OutputFile::append`].
    #[cfg(feature = "daemon")]
    pub(crate) fn of_row(row: &[u8]) -> io::Result<OwnedFd> {
        let mut file = OutputFile::new()?;
        file.0.write_all(row)?;
        file.seal()?;
        file.for_readers()
    }

    /// Appends a piece.
    ///
    /// # Errors
    /// As write(2): there may be no memory.
    pub fn append(&mut self, stream: Stream, bytes: &[u8]) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        let mut head = [0; HEAD_BYTES];
        head[0] = stream.number();
        head[4..].copy_from_slice(&length.to_be_bytes());
        self.0.write_all(&head)?;
        self.0.write_all(bytes)
    }

    /// Returns a descriptor of the same file that is open for reading only.
    ///
    /// # Errors
    /// As open(2), where /proc is missing.
    pub fn for_readers(&self) -> io::Result<OwnedFd> {
        Ok(File::open(format!("/proc/self/fd/{}", self.0.as_raw_fd()))?.into())
    }

    /// Returns the output for this process itself.
    ///
    /// # Errors
    /// As dup(2).
    pub fn output(&self) -> io::Result<Output> {
        Ok(Output::from_descriptor(self.0.try_clone()?.into()))
    }

    /// Returns how long the file is.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    /// Makes sure that the file stays as it is.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn seal(&self) -> io::Result<()> {
        Ok(fcntl_add_seals(&self.0, SEALS)?)
    }
}

impl AsFd for OutputFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Why a descriptor that another process sent is not used.
#[cfg(feature = "daemon")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unusable {
    /// Reading it could take for ever, or it is no file.
    NoMemoryFile,
    /// It can still change.
    NotSealed,
}

/// Returns the size of the file in memory behind a descriptor. Asking any other kind of file could block.
#[cfg(feature = "daemon")]
pub(crate) fn size(descriptor: impl AsFd) -> Result<u64, Unusable> {
    fcntl_get_seals(&descriptor).map_err(|_| Unusable::NoMemoryFile)?;
    let stat = fstat(&descriptor).map_err(|_| Unusable::NoMemoryFile)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(u64::try_from(stat.st_size).unwrap_or(0)),
        _ => Err(Unusable::NoMemoryFile),
    }
}

/// The same for a file that cannot change any more.
#[cfg(feature = "daemon")]
pub(crate) fn sealed_size(descriptor: impl AsFd) -> Result<u64, Unusable> {
    let seals = fcntl_get_seals(&descriptor).map_err(|_| Unusable::NoMemoryFile)?;
    if !seals.contains(SEALS) {
        return Err(Unusable::NotSealed);
    }
    size(descriptor)
}

/// Reads a file that cannot change any more, which another process made. However it is divided into pieces, that is one read of at
/// most [`READ_BYTES_MAX`]. `None`: it is longer than [`SENT_BYTES_MAX`].
///
/// # Errors
/// Those of fcntl(2) and pread(2).
#[cfg(feature = "daemon")]
pub(crate) fn read_short(descriptor: &OwnedFd) -> io::Result<Option<Output>> {
    let size = sealed_size(descriptor).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    let Some(size) = usize::try_from(size).ok().filter(|&size| size <= READ_BYTES_MAX) else {
        return Ok(None);
    };
    let mut row = vec![0; size];
    File::from(descriptor.try_clone()?).read_exact_at(&mut row, 0)?;
    Ok(Some(Output::from_bytes(row)))
}

/// The output of a command: of a run that is over, or as far as it has come.
#[derive(Clone, Debug)]
pub struct Output(Arc<Content>);

#[derive(Debug)]
enum Content {
    /// On this host.
    File(File),
    /// As it came through a connection: the bytes that the file would have.
    Bytes(Vec<u8>),
}

impl PartialEq for Output {
    fn eq(&self, other: &Output) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Output {
    pub(crate) fn from_descriptor(descriptor: OwnedFd) -> Output {
        Output(Arc::new(Content::File(descriptor.into())))
    }

    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Output {
        Output(Arc::new(Content::Bytes(bytes)))
    }

    /// Returns a reader from the beginning.
    pub fn reader(&self) -> Reader {
        Reader { output: self.clone(), offset: 0, piece: None }
    }

    /// Reads everything of one stream.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] if the file is not what it should be.
    pub fn read(&self, stream: Stream) -> io::Result<Vec<u8>> {
        let (mut reader, mut all, mut buffer) = (self.reader(), Vec::new(), vec![0; 64 * 1024]);
        while let Some((of, length)) = reader.read(&mut buffer)? {
            if of == stream {
                all.extend_from_slice(&buffer[..length]);
            }
        }
        Ok(all)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match &*self.0 {
            Content::File(file) => loop {
                match file.read_at(buffer, offset) {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    other => return other,
                }
            },
            Content::Bytes(bytes) => {
                let rest = bytes.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or_default();
                let length = rest.len().min(buffer.len());
                buffer[..length].copy_from_slice(&rest[..length]);
                Ok(length)
            }
        }
    }
}

/// Reads an output in order.
#[derive(Debug)]
pub struct Reader {
    output: Output,
    offset: u64,
    /// The piece that is being read, and how much of it is left.
    piece: Option<(Stream, usize)>,
}

impl Reader {
    /// Reads what comes next of one stream. `None`: there is no more yet.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] if the file is not what it should be.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<(Stream, usize)>> {
        loop {
            let Some((stream, left)) = self.piece.filter(|(_, left)| *left > 0) else {
                if !self.begin_piece()? {
                    return Ok(None);
                }
                continue;
            };
            let most = left.min(buffer.len());
            let read = self.output.read_at(&mut buffer[..most], self.offset)?;
            self.offset += read as u64;
            self.piece = Some((stream, left - read));
            return Ok((read > 0).then_some((stream, read)));
        }
    }

    /// Returns `true` if it has read anything so far.
    pub fn has_read(&self) -> bool {
        self.offset > 0
    }

    /// Returns how far in the file it has come.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns `true` if the last piece was read to its end: an output that is complete ends so.
    pub fn is_between_pieces(&self) -> bool {
        self.piece.is_none_or(|(_, left)| left == 0)
    }

    fn begin_piece(&mut self) -> io::Result<bool> {
        let mut head = [0; HEAD_BYTES];
        // A head that is not whole is read again.
        if self.output.read_at(&mut head, self.offset)? < HEAD_BYTES {
            return Ok(false);
        }
        let stream = Stream::from_number(head[0]).filter(|_| head[1..4] == [0; 3]);
        let stream =
            stream.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it has no such format"))?;
        let length = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        self.offset += HEAD_BYTES as u64;
        self.piece = Some((stream, length as usize));
        Ok(true)
    }
}

/// What was written to a stream at a time.
pub(crate) type Piece = (Stream, Vec<u8>);

/// Returns an output as few pieces, none longer than `piece_max`, for a connection. `None`: it is longer than
/// [`SENT_BYTES_MAX`].
///
/// # Errors
/// As [`Reader::read`].
pub(crate) fn pieces(output: &Output, piece_max: usize) -> io::Result<Option<Vec<Piece>>> {
    let mut streams = [(Stream::Stdout, Vec::new()), (Stream::Stderr, Vec::new())];
    let mut in_order: Vec<Piece> = Vec::new();
    let (mut reader, mut buffer, mut total) = (output.reader(), vec![0; piece_max], 0);
    while let Some((stream, length)) = reader.read(&mut buffer)? {
        total += length;
        if total > SENT_BYTES_MAX {
            return Ok(None);
        }
        let bytes = &buffer[..length];
        streams[usize::from(stream.number()) - 1].1.extend_from_slice(bytes);
        match in_order.last_mut() {
            Some((last, piece)) if *last == stream && piece.len() + length <= piece_max => {
                piece.extend_from_slice(bytes);
            }
            _ => in_order.push((stream, bytes.to_vec())),
        }
    }
    if in_order.len() <= PIECES_MAX {
        return Ok(Some(in_order));
    }
    // A command that switches between its streams so often: one after the other.
    let split = |(stream, bytes): &Piece| {
        bytes.chunks(piece_max).map(|chunk| (*stream, chunk.to_vec())).collect::<Vec<Piece>>()
    };
    Ok(Some(streams.iter().flat_map(split).collect()))
}

/// Returns pieces as a row, in the form that a file has.
#[cfg(feature = "daemon")]
pub(crate) fn row(pieces: &[Piece]) -> Vec<u8> {
    let mut row = Vec::new();
    for (stream, bytes) in pieces {
        row.extend_from_slice(&[stream.number(), 0, 0, 0]);
        row.extend_from_slice(&u32::try_from(bytes.len()).expect("a piece is short").to_be_bytes());
        row.extend_from_slice(bytes);
    }
    row
}

/// Returns `true` if this is a row of whole pieces, not longer than an output may be that is sent.
#[cfg(feature = "etcd")]
pub(crate) fn is_short_row(row: &[u8]) -> bool {
    let (mut rest, mut pieces, mut total) = (row, 0, 0);
    while let Some((head, after)) = rest.split_at_checked(HEAD_BYTES) {
        let length = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let is_head = Stream::from_number(head[0]).is_some() && head[1..4] == [0; 3];
        let Some(after) = after.get(length..).filter(|_| is_head) else { return false };
        (rest, pieces, total) = (after, pieces + 1, total + length);
    }
    rest.is_empty() && pieces <= PIECES_MAX && total <= SENT_BYTES_MAX
}

/// Returns a piece, sent as base64, in the form that it has in a file. `None`: it is not valid.
pub(crate) fn encode_piece(stream: u8, data: &str) -> Option<Vec<u8>> {
    let data = STANDARD.decode(data).ok()?;
    let mut piece = vec![Stream::from_number(stream)?.number(), 0, 0, 0];
    piece.extend_from_slice(&u32::try_from(data.len()).ok()?.to_be_bytes());
    piece.extend_from_slice(&data);
    Some(piece)
}

/// Returns what was written, as it is sent.
pub(crate) fn to_base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// How many pieces are sent through a connection at the most.
pub(crate) const PIECES_MAX: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn output(pieces: &[(Stream, &[u8])]) -> (OutputFile, Output) {
        let mut file = OutputFile::new().unwrap();
        pieces.iter().for_each(|(stream, bytes)| file.append(*stream, bytes).unwrap());
        let output = Output::from_descriptor(file.for_readers().unwrap());
        (file, output)
    }

    #[test]
    fn what_is_written_is_read_in_order_and_by_stream() {
        let (mut file, out) =
            output(&[(Stream::Stdout, b"one\0"), (Stream::Stderr, b"two"), (Stream::Stdout, b"")]);
        assert_eq!(out.read(Stream::Stdout).unwrap(), b"one\0");
        assert_eq!(out.read(Stream::Stderr).unwrap(), b"two");
        let (mut reader, mut buffer) = (out.reader(), [0; 2]);
        assert_eq!(reader.read(&mut buffer).unwrap(), Some((Stream::Stdout, 2)));
        assert!(!reader.is_between_pieces());
        while reader.read(&mut buffer).unwrap().is_some() {}
        assert!(reader.is_between_pieces());
        file.append(Stream::Stderr, b"!").unwrap();
        assert_eq!(reader.read(&mut buffer).unwrap(), Some((Stream::Stderr, 1)));
        assert_eq!(reader.read(&mut buffer).unwrap(), None);
    }

    #[test]
    fn readers_cannot_write_and_after_the_seal_not_even_the_owner_can() {
        let (mut file, out) = output(&[(Stream::Stdout, b"one")]);
        let Content::File(shared) = &*out.0 else { unreachable!() };
        assert!((&*shared).write_all(b"x").is_err());
        assert_eq!(sealed_size(shared), Err(Unusable::NotSealed));
        assert_eq!(size(shared), Ok(11));
        file.seal().unwrap();
        assert_eq!(sealed_size(shared), Ok(11));
        assert!(file.append(Stream::Stdout, b"x").is_err());
        // The owner may open it for writing again, which is of no use.
        let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
        fchmod(shared, Mode::RUSR | Mode::WUSR).unwrap();
        assert!(File::options().write(true).open(path).unwrap().write_all(b"x").is_err());
    }

    #[test]
    fn what_is_no_file_in_memory_is_not_even_asked_for_its_size() {
        let (reader, _writer) = io::pipe().unwrap();
        assert_eq!(size(&reader), Err(Unusable::NoMemoryFile));
        assert_eq!(size(File::open("/").unwrap()), Err(Unusable::NoMemoryFile));
        assert_eq!(size(File::open("/proc/self/status").unwrap()), Err(Unusable::NoMemoryFile));
    }

    #[test]
    fn a_file_of_another_format_is_an_error() {
        for bytes in [&b"\x03\0\0\0\0\0\0\x01x"[..], b"\x01\0\x01\0\0\0\0\x01x", b"GIF89a..."] {
            let error = Output::from_bytes(bytes.to_vec()).read(Stream::Stdout).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[cfg(feature = "daemon")]
    #[test]
    fn a_file_is_read_at_once_however_it_is_divided() {
        let (mut file, _) = output(&vec![(Stream::Stdout, &b"x"[..]); SENT_BYTES_MAX]);
        let descriptor = file.for_readers().unwrap();
        assert!(read_short(&descriptor).is_err(), "it may still change");
        file.append(Stream::Stdout, b"").unwrap();
        file.seal().unwrap();
        assert_eq!(read_short(&descriptor).unwrap(), None, "it has an empty piece too many");
        let (file, _) = output(&vec![(Stream::Stdout, &b"x"[..]); SENT_BYTES_MAX]);
        file.seal().unwrap();
        let short = read_short(&file.for_readers().unwrap()).unwrap().unwrap();
        assert_eq!(short.read(Stream::Stdout).unwrap(), vec![b'x'; SENT_BYTES_MAX]);
    }

    #[cfg(feature = "etcd")]
    #[test]
    fn a_row_of_whole_and_few_pieces_is_told_from_anything_else() {
        let bytes = vec![7; SENT_BYTES_MAX];
        let good = [
            vec![],
            vec![(Stream::Stderr, bytes.clone())],
            vec![(Stream::Stdout, vec![]); PIECES_MAX],
            vec![(Stream::Stdout, b"a\0".to_vec()), (Stream::Stderr, b"b".to_vec())],
        ];
        for pieces in good {
            let row = row(&pieces);
            assert!(is_short_row(&row), "{pieces:?}");
            let file = Output::from_descriptor(OutputFile::of_row(&row).unwrap());
            for stream in [Stream::Stdout, Stream::Stderr] {
                let of = |(its, bytes): &Piece| if *its == stream { bytes.clone() } else { Vec::new() };
                assert_eq!(file.read(stream).unwrap(), pieces.iter().flat_map(of).collect::<Vec<u8>>());
            }
        }
        let long = row(&[(Stream::Stdout, bytes), (Stream::Stderr, vec![0])]);
        let many = row(&vec![(Stream::Stdout, vec![]); PIECES_MAX + 1]);
        for bad in [
            &long[..],
            &many,
            b"\x01\0\0\0\0\0\0\x02x",
            b"\x01\0\0\0\0\0\0\x01xx",
            b"\x01\0\0",
            b"\x03\0\0\0\0\0\0\0",
            b"\x01\0\x01\0\0\0\0\0",
            b"\x01\0\0\0\xff\xff\xff\xff",
        ] {
            assert!(!is_short_row(bad), "{:?}", &bad[..bad.len().min(20)]);
        }
    }

    #[test]
    fn what_is_sent_through_a_connection_is_few_pieces_of_at_most_64_kib() {
        let all = |pieces: &[Piece], of| -> Vec<u8> {
            pieces.iter().filter(|(stream, _)| *stream == of).flat_map(|(_, bytes)| bytes.clone()).collect()
        };
        let row: Vec<(Stream, &[u8])> = (0..SENT_BYTES_MAX / 2)
            .flat_map(|_| [(Stream::Stdout, &b"o"[..]), (Stream::Stderr, &b"e"[..])])
            .collect();
        let sent = pieces(&output(&row).1, 16 * 1024).unwrap().unwrap();
        assert!(sent.len() <= PIECES_MAX, "{}", sent.len());
        assert_eq!(all(&sent, Stream::Stdout), vec![b'o'; SENT_BYTES_MAX / 2]);
        assert_eq!(all(&sent, Stream::Stderr), vec![b'e'; SENT_BYTES_MAX / 2]);
        let longer = output(&[(Stream::Stdout, &[0; SENT_BYTES_MAX + 1])]).1;
        assert_eq!(pieces(&longer, 16 * 1024).unwrap(), None);
        let turns = output(&[(Stream::Stderr, b"a"), (Stream::Stdout, b"b"), (Stream::Stdout, b"c")]).1;
        let expected = vec![(Stream::Stderr, b"a".to_vec()), (Stream::Stdout, b"bc".to_vec())];
        assert_eq!(pieces(&turns, 10).unwrap(), Some(expected));
    }
}
