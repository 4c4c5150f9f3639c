//! A compressed layer into a directory, in one pass, on two cores.
//!
//! ```text
//! reader ─▶ decompress ─▶ hash ─▶ apply (this thread)
//!              ▲                    │
//!              └── empty buffers ◀──┘
//! ```
//!
//! Each arrow is a bounded channel of buffers that go round and are never copied, so memory is the same for a layer of
//! one file as for a bomb. The hash has a thread of its own because decompressing and applying take about as long as
//! each other, and the third fills the gaps. The diff id covers every byte of the expanded stream, also what follows
//! the end of the archive.
//!
//! This blocks: call it where blocking is allowed. The reader must itself give up in the end; cancelling is noticed
//! between two reads.

use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};

use super::archive;
use super::layer::{self, Below, Limits};
use crate::error::{Context, Error, Kind, Result};
use crate::snapshot::Usage;

/// The size of a buffer, and how many go round.
const BUFFER: usize = 256 << 10;
const BUFFERS: usize = 8;

/// The largest window that a zstd stream may ask for, as a power of two: 128 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// One or more gzip members.
    Gzip,
    /// One or more zstd frames.
    Zstd,
}

impl Compression {
    /// Tells it from the first four bytes or more, because media types lie. What is not known is not compressed, and
    /// then turns out to be no archive.
    pub fn detect(first: &[u8]) -> Compression {
        match first {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            // A frame, or a skippable one, which may come first.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
            _ => Compression::None,
        }
    }
}

/// What came out of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    /// `sha256:` and the digest of the uncompressed archive. The caller compares it with the image's config.
    pub diff_id: String,
    /// What the directory now uses.
    pub usage: Usage,
}

/// Expands a layer into an empty directory. On error the directory holds rubbish, and removing it is the caller's.
///
/// `below` gives the layers below when they are needed.
///
/// # Errors
/// `InvalidArgument` if the layer is malformed or hostile, `ResourceExhausted` if it exceeds a limit or the disk,
/// `Cancelled` if `cancel` became true; what the reader fails with is `Unavailable`.
pub fn unpack(
    reader: impl Read + Send,
    compression: Compression,
    dir: &Path,
    below: &Below<'_>,
    limits: &Limits,
    cancel: &AtomicBool,
) -> Result<Unpacked> {
    let (to_hash, hash_input) = sync_channel(BUFFERS);
    let (to_apply, apply_input) = sync_channel(BUFFERS);
    // Never blocks its sender: there are not more buffers than it has room for.
    let (give_back, empty) = sync_channel(BUFFERS);
    for _ in 0..BUFFERS {
        give_back.send(Vec::new()).context(Kind::Internal, || "prepare buffers".to_owned())?;
    }
    thread::scope(|scope| {
        let decompressor = scope.spawn(|| {
            let result = decompress(reader, compression, limits.expanded_bytes, &empty, &to_hash, cancel);
            if let Err(error) = result {
                let _ = to_hash.send(Err(error)); // nobody listens: then there is an earlier error
            }
            drop((to_hash, empty));
        });
        let hasher = scope.spawn(|| hash(hash_input, to_apply));
        let mut stream = Buffers { input: apply_input, give_back, current: Vec::new(), at: 0 };
        let applied = layer::apply(&mut stream, dir, below, limits, cancel).and_then(|usage| {
            drain(&mut stream)?;
            Ok(usage)
        });
        drop(stream); // so that nobody waits for us
        // A thread that panicked has cut the stream short, perhaps where an archive may end.
        let panicked = |_| Error::internal("a thread that unpacks a layer panicked");
        decompressor.join().map_err(panicked)?;
        let diff_id = hasher.join().map_err(panicked)?;
        Ok(Unpacked { diff_id: format!("sha256:{}", hex::encode(diff_id)), usage: applied? })
    })
}

type Piece = Result<Vec<u8>>;

/// Reads to the end of the compressed stream, so that its own checksums are checked.
fn decompress(
    reader: impl Read,
    compression: Compression,
    bytes_max: u64,
    empty: &Receiver<Vec<u8>>,
    output: &SyncSender<Piece>,
    cancel: &AtomicBool,
) -> Result<()> {
    let input = BufReader::with_capacity(BUFFER, Marked(reader));
    match compression {
        Compression::None => pump(input, bytes_max, empty, output, cancel),
        Compression::Gzip => pump(MultiGzDecoder::new(input), bytes_max, empty, output, cancel),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)
                .context(Kind::Internal, || "start zstd".to_owned())?;
            decoder
                .window_log_max(ZSTD_WINDOW_LOG_MAX)
                .context(Kind::Internal, || "start zstd".to_owned())?;
            pump(decoder, bytes_max, empty, output, cancel)
        }
    }
}

fn pump(
    mut expanded: impl Read,
    bytes_max: u64,
    empty: &Receiver<Vec<u8>>,
    output: &SyncSender<Piece>,
    cancel: &AtomicBool,
) -> Result<()> {
    let mut total = 0_u64;
    // An error from here on is the consumer's business to explain: it is gone.
    while let Ok(mut buffer) = empty.recv() {
        if cancel.load(Ordering::Relaxed) {
            return Err(layer::cancelled());
        }
        buffer.resize(BUFFER, 0); // costs something only the first time round
        let len = read_full(&mut expanded, &mut buffer)?;
        buffer.truncate(len);
        total += len as u64;
        if total > bytes_max {
            let what = format!("the layer expands to more than {bytes_max} bytes");
            return Err(Error::new(Kind::ResourceExhausted, what));
        }
        if len == 0 || output.send(Ok(buffer)).is_err() {
            break;
        }
    }
    Ok(())
}

/// Fills the buffer, or as much of it as there is.
fn read_full(reader: &mut impl Read, buffer: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(len) => filled += len,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(stream_error(e)),
        }
    }
    Ok(filled)
}

/// Tells what the source failed with from what a decoder found wrong with it.
fn stream_error(error: io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(ours) => ours,
        Err(foreign) => {
            Error::with_source(Kind::InvalidArgument, "the layer cannot be decompressed", foreign)
        }
    }
}

/// Marks errors of the source as such, on their way through a decoder.
struct Marked<R>(R);

impl<R: Read> Read for Marked<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into).map_err(|e| match e.kind() {
            io::ErrorKind::Interrupted => e,
            kind => {
                io::Error::new(kind, Error::with_source(Kind::Unavailable, "read the compressed layer", e))
            }
        })
    }
}

/// Hashes what passes by.
fn hash(input: Receiver<Piece>, output: SyncSender<Piece>) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for piece in input {
        if let Ok(bytes) = &piece {
            hasher.update(bytes);
        }
        if output.send(piece).is_err() {
            break;
        }
    }
    hasher.finalize().into()
}

/// The expanded stream as its last reader sees it.
struct Buffers {
    input: Receiver<Piece>,
    give_back: SyncSender<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
}

impl BufRead for Buffers {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.current.len() {
            let spent = std::mem::take(&mut self.current);
            self.at = 0;
            if spent.capacity() > 0 {
                let _ = self.give_back.send(spent); // nobody wants it at the end of the stream
            }
            match self.input.recv() {
                Ok(piece) => self.current = piece.map_err(io::Error::other)?,
                Err(_) => return Ok(&[]),
            }
        }
        Ok(&self.current[self.at..])
    }

    fn consume(&mut self, len: usize) {
        self.at = self.current.len().min(self.at + len);
    }
}

impl Read for Buffers {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.fill_buf()?.read(into)?;
        self.consume(len);
        Ok(len)
    }
}

/// Reads what follows the archive: it is part of the digest, and may hold an error.
fn drain(stream: &mut Buffers) -> Result<()> {
    loop {
        let len = archive::fill(stream)?.len();
        if len == 0 {
            return Ok(());
        }
        stream.consume(len);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::{Duration, Instant};

    use super::super::layer::tests::{Tar, privileged, tree};
    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zst(bytes: &[u8]) -> Vec<u8> {
        zstd::stream::encode_all(bytes, 1).unwrap()
    }

    fn run_with(stream: &[u8], limits: &Limits) -> (tempfile::TempDir, Result<Unpacked>) {
        let dir = tempfile::tempdir().unwrap();
        let began = Instant::now();
        let compression = Compression::detect(stream);
        let result =
            unpack(stream, compression, dir.path(), &|| Ok(Vec::new()), limits, &AtomicBool::new(false));
        assert!(began.elapsed() < Duration::from_secs(20), "it hung");
        (dir, result)
    }

    fn run(stream: &[u8]) -> (tempfile::TempDir, Result<Unpacked>) {
        run_with(stream, &Limits::default())
    }

    /// An archive of some buffers' size, which neither compresses to nothing nor not at all.
    fn archive() -> Vec<u8> {
        let content: Vec<u8> =
            (0..1_200_000_u32).map(|i| u8::try_from((i.wrapping_mul(i) >> 7) & 0x3f).unwrap()).collect();
        Tar::default().file("large", &content).file("small", b"x").end()
    }

    #[test]
    fn every_compression_and_any_number_of_members_give_the_same_layer() {
        if !privileged() {
            return;
        }
        let archive = archive();
        let (head, tail) = archive.split_at(700_001);
        let skippable = [&[0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(&archive)));
        for (name, stream) in [
            ("plain", archive.clone()),
            ("gzip", gzip(&archive)),
            ("two gzip members", [gzip(head), gzip(tail)].concat()),
            ("an empty gzip member", [gzip(b""), gzip(&archive), gzip(b"")].concat()),
            ("zstd", zst(&archive)),
            ("two zstd frames", [zst(head), zst(tail)].concat()),
            (
                "skippable zstd frames",
                [skippable.clone(), zst(head), skippable.clone(), zst(tail), skippable].concat(),
            ),
        ] {
            let (dir, result) = run(&stream);
            let unpacked = result.unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(unpacked.diff_id, diff_id, "{name}");
            assert_eq!(tree(dir.path())[1..], ["f 644 large of 1200000", "f 644 small \"x\""], "{name}");
            assert!(
                std::fs::read(dir.path().join("large")).unwrap() == archive[512..1_200_512],
                "{name}: content"
            );
        }
    }

    #[test]
    fn the_diff_id_covers_what_follows_the_archive() {
        if !privileged() {
            return;
        }
        let stream = [archive(), vec![7; 1_000_000]].concat();
        let (_dir, result) = run(&gzip(&stream));
        assert_eq!(result.unwrap().diff_id, format!("sha256:{}", hex::encode(Sha256::digest(&stream))));
    }

    #[test]
    fn truncated_and_damaged_streams_are_errors() {
        if !privileged() {
            return;
        }
        let archive = archive();
        let (gz, zs) = (gzip(&archive), zst(&archive));
        let damaged = |stream: &[u8], at: usize| {
            let mut stream = stream.to_vec();
            stream[at] ^= 0x55;
            stream
        };
        let mut window = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3]; // a frame with a window of 2 GiB
        window.extend([1, 0, 0]);
        for (name, stream) in [
            ("half a gzip", &gz[..gz.len() / 2]),
            ("a gzip without its checksum", &gz[..gz.len() - 8]),
            ("a gzip without its last byte", &gz[..gz.len() - 1]),
            ("only a magic number", &gz[..2]),
            ("a gzip with a wrong checksum", &damaged(&gz, gz.len() - 6)),
            ("a gzip with a wrong length", &damaged(&gz, gz.len() - 1)),
            ("garbage after a gzip", &[&gz[..], b"garbage!"].concat()),
            ("half a zstd", &zs[..zs.len() / 2]),
            ("a zstd without its last byte", &zs[..zs.len() - 1]),
            ("garbage after a zstd", &[&zs[..], b"garbage!"].concat()),
            ("a zstd with too large a window", &window),
            ("bzip2", b"BZh91AY&SY"),
            ("xz", &[&b"\xfd7zXZ\0"[..], &[0; 600]].concat()),
            ("garbage", &[b'?'; 5000]),
            ("half an archive", &archive[..1_000_000]),
        ] {
            let (_dir, result) = run(stream);
            let error = result.err().unwrap_or_else(|| panic!("{name}: accepted"));
            assert_eq!(error.kind(), Kind::InvalidArgument, "{name}: {error}");
        }
    }

    #[test]
    fn a_bomb_is_stopped_at_the_budget() {
        if !privileged() {
            return;
        }
        // 8 MiB of zeros, in the archive and behind it.
        let limits = Limits { expanded_bytes: 1 << 20, ..Limits::default() };
        let zeros = vec![0; 8 << 20];
        let (dir, result) = run_with(&gzip(&Tar::default().file("zeros", &zeros).end()), &limits);
        assert_eq!(result.unwrap_err().kind(), Kind::ResourceExhausted);
        assert!(crate::snapshot::tree_usage(dir.path()).unwrap().bytes <= 2 << 20);
        let (_dir, result) = run_with(&zst(&zeros), &limits);
        assert_eq!(result.unwrap_err().kind(), Kind::ResourceExhausted);
    }

    /// Gives some bytes and then an error.
    struct Failing<'a>(&'a [u8]);

    impl Read for Failing<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            match self.0.read(into)? {
                0 => Err(io::Error::new(io::ErrorKind::ConnectionReset, "reset")),
                len => Ok(len),
            }
        }
    }

    #[test]
    fn what_the_source_fails_with_is_told_from_what_is_wrong_with_the_layer() {
        if !privileged() {
            return;
        }
        let archive = archive();
        for stream in [archive.clone(), gzip(&archive), zst(&archive)] {
            let dir = tempfile::tempdir().unwrap();
            let reader = Failing(&stream[..stream.len() / 2]);
            let compression = Compression::detect(&stream);
            let error = unpack(
                reader,
                compression,
                dir.path(),
                &|| Ok(Vec::new()),
                &Limits::default(),
                &AtomicBool::new(false),
            );
            let error = error.unwrap_err();
            assert_eq!(error.kind(), Kind::Unavailable, "{compression:?}: {error}");
        }
    }

    #[test]
    fn a_hostile_entry_or_a_cancel_stops_the_whole_pipeline() {
        if !privileged() {
            return;
        }
        let hostile = [Tar::default().file("../x", b"").0, archive().repeat(8)].concat();
        let (_dir, result) = run(&gzip(&hostile));
        assert_eq!(result.unwrap_err().kind(), Kind::InvalidArgument);

        let dir = tempfile::tempdir().unwrap();
        let cancel = AtomicBool::new(false);
        let endless = io::repeat(0);
        let big = {
            // one entry of 8 GiB
            let mut header = tar::Header::new_gnu();
            header.set_path("f").unwrap();
            header.set_size(8 << 30);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_cksum();
            header
        };
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(20));
                cancel.store(true, Ordering::Relaxed);
            });
            let reader = big.as_bytes().chain(endless);
            let result = unpack(
                reader,
                Compression::None,
                dir.path(),
                &|| Ok(Vec::new()),
                &Limits::default(),
                &cancel,
            );
            assert_eq!(result.unwrap_err().kind(), Kind::Cancelled);
        });
    }
}
