//! A tar archive, read once, front to back.
//!
//! blocks ──▶ [extension headers]* header ──▶ `Entry` ──▶ its content ──▶ next
//!
//! One parser decides what an archive says, because archives are built so that two parsers disagree: a PAX size always
//! overrides the header's, an entry that by its type has no content has none, and a malformed or contradictory
//! extension is an error and never skipped. The libraries at hand do not do this (they fall back to the header's size
//! when a PAX record is malformed, split records at newlines and read extensions without a limit), which is why the few
//! fields of a header are read here. Where formats differ (ustar, PAX, old and new GNU sparse, star, V7), it follows
//! Go's `archive/tar`, which is what builds and checks nearly every image.
//!
//! Memory is bounded by `extension_bytes_max`, whatever the archive says.

use std::io::{self, BufRead};

use crate::error::{Error, Kind, Result};

/// The unit of a tar archive.
const BLOCK: usize = 512;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Type {
    /// Has content.
    File,
    /// Another name of an earlier file; `link` names that.
    HardLink,
    /// `link` is its text.
    Symlink,
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A directory.
    Dir,
    /// A named pipe.
    Fifo,
}

/// One member of the archive, with its extensions applied.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) kind: Type,
    /// As in the archive: not cleaned, not checked, but without NUL.
    pub(crate) path: Vec<u8>,
    /// The target of a link, likewise.
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970, and nanoseconds.
    pub(crate) mtime: (i64, u32),
    pub(crate) device: (u64, u64),
    /// The size of the file. For a sparse file that is more than its content in the archive.
    pub(crate) size: u64,
    /// Name and value, in the archive's order.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the content goes, if the file has holes: offset and length, ascending.
    pub(crate) sparse: Option<Vec<(u64, u64)>>,
}

/// See the module.
pub(crate) struct Archive<R> {
    reader: R,
    extension_bytes_max: usize,
    /// What is left to read of the current entry's content.
    content: u64,
    /// What fills the content's last block.
    padding: u64,
}

impl<R: BufRead> Archive<R> {
    /// An archive whose extension headers, for one entry together, are at most so large.
    pub(crate) fn new(reader: R, extension_bytes_max: usize) -> Archive<R> {
        Archive { reader, extension_bytes_max, content: 0, padding: 0 }
    }

    /// The next member, or `None` at the end. What was not read of the current one is skipped.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>> {
        let mut extensions = Extensions::default();
        loop {
            self.skip_content()?;
            let Some(block) = self.header()? else {
                return if extensions.any() {
                    Err(malformed("an extension header describes no entry"))
                } else {
                    Ok(None)
                };
            };
            match block.typeflag() {
                b'x' => {
                    let records = self.extension(&block, &mut extensions)?;
                    if extensions.pax.replace(Pax::parse(&records)?).is_some() {
                        return Err(malformed("two PAX headers describe one entry"));
                    }
                }
                // A global header applies to all that follows. Nobody's image builder uses one for more than a
                // comment, and Go ignores them; one that says where content goes would split the parsers.
                b'g' => {
                    if extensions.any() {
                        return Err(malformed("a PAX header describes a PAX header"));
                    }
                    let records = self.extension(&block, &mut extensions)?;
                    extensions.bytes = 0;
                    if Pax::parse(&records)?.moves_content() {
                        return Err(malformed("a global PAX header gives paths or sizes"));
                    }
                }
                b'L' => {
                    let name = self.extension(&block, &mut extensions)?;
                    if extensions.long_path.replace(until_nul(&name).to_vec()).is_some() {
                        return Err(malformed("two long names for one entry"));
                    }
                }
                b'K' => {
                    let name = self.extension(&block, &mut extensions)?;
                    if extensions.long_link.replace(until_nul(&name).to_vec()).is_some() {
                        return Err(malformed("two long links for one entry"));
                    }
                }
                _ => return self.entry(&block, extensions).map(Some),
            }
        }
    }

    /// The next piece of the current entry's content, at most `max` long; empty at its end. Call `consume` after.
    pub(crate) fn content(&mut self, max: u64) -> Result<&[u8]> {
        let wanted = self.content.min(max);
        if wanted == 0 {
            return Ok(&[]);
        }
        let buffer = fill(&mut self.reader)?;
        if buffer.is_empty() {
            return Err(truncated());
        }
        let len = usize::try_from(wanted).unwrap_or(usize::MAX).min(buffer.len());
        Ok(&buffer[..len])
    }

    /// Marks a piece of the content as read.
    pub(crate) fn consume(&mut self, len: usize) {
        self.reader.consume(len);
        self.content = self.content.saturating_sub(len as u64);
    }

    /// How much of the current entry's content is left.
    pub(crate) fn content_left(&self) -> u64 {
        self.content
    }

    fn skip_content(&mut self) -> Result<()> {
        let mut left = std::mem::take(&mut self.content)
            .checked_add(std::mem::take(&mut self.padding))
            .ok_or_else(truncated)?;
        while left > 0 {
            let buffer = fill(&mut self.reader)?;
            if buffer.is_empty() {
                return Err(truncated());
            }
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            self.reader.consume(len);
            left -= len as u64;
        }
        Ok(())
    }

    /// A block, or `None` if the stream ends before its first byte.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            let buffer = fill(&mut self.reader)?;
            if buffer.is_empty() {
                return if filled == 0 { Ok(None) } else { Err(truncated()) };
            }
            let len = buffer.len().min(BLOCK - filled);
            block[filled..filled + len].copy_from_slice(&buffer[..len]);
            self.reader.consume(len);
            filled += len;
        }
        Ok(Some(block))
    }

    /// The next header. Two blocks of zeros, or the end of the stream, end the archive.
    fn header(&mut self) -> Result<Option<Block>> {
        let Some(block) = self.block()? else { return Ok(None) };
        if block.iter().any(|b| *b != 0) {
            return Block::checked(block).map(Some);
        }
        match self.block()? {
            Some(second) if second.iter().any(|b| *b != 0) => {
                Err(malformed("a header follows a single block of zeros"))
            }
            _ => Ok(None),
        }
    }

    /// The content of an extension header.
    fn extension(&mut self, block: &Block, extensions: &mut Extensions) -> Result<Vec<u8>> {
        let size = block.number(SIZE)?;
        let size = usize::try_from(size).map_err(|_| malformed("an extension header of negative size"))?;
        extensions.bytes = extensions.bytes.saturating_add(size);
        if extensions.bytes > self.extension_bytes_max {
            let max = self.extension_bytes_max;
            let what = format!("the layer has an entry with extension headers of more than {max} bytes");
            return Err(Error::new(Kind::ResourceExhausted, what));
        }
        self.begin_content(size as u64);
        let mut content = Vec::with_capacity(size);
        self.read_content(size, &mut content)?;
        Ok(content)
    }

    fn begin_content(&mut self, size: u64) {
        self.content = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn read_content(&mut self, size: usize, into: &mut Vec<u8>) -> Result<()> {
        let wanted = into.len().saturating_add(size);
        while into.len() < wanted {
            let piece = self.content((wanted - into.len()) as u64)?;
            if piece.is_empty() {
                return Err(truncated());
            }
            let len = piece.len();
            into.extend_from_slice(piece);
            self.consume(len);
        }
        Ok(())
    }

    fn entry(&mut self, block: &Block, extensions: Extensions) -> Result<Entry> {
        let pax = extensions.pax.unwrap_or_default();
        let stored = match pax.size {
            Some(size) => size,
            None => u64::try_from(block.number(SIZE)?).map_err(|_| malformed("an entry of negative size"))?,
        };
        let path = one_name(extensions.long_path, pax.path, || block.path())?;
        let kind = match block.typeflag() {
            0 if path.ends_with(b"/") => Type::Dir,
            0 | b'0' | b'7' | b'S' => Type::File,
            b'1' => Type::HardLink,
            b'2' => Type::Symlink,
            b'3' => Type::Char,
            b'4' => Type::Block,
            b'5' => Type::Dir,
            b'6' => Type::Fifo,
            other => return Err(malformed(&format!("an entry of unknown type {:?}", char::from(other)))),
        };
        let link = match kind {
            Type::HardLink | Type::Symlink => {
                one_name(extensions.long_link, pax.link, || until_nul(&block.0[LINK]).to_vec())?
            }
            _ => Vec::new(),
        };
        let device = match kind {
            Type::Char | Type::Block => (block.device(MAJOR)?, block.device(MINOR)?),
            _ => (0, 0),
        };
        let mut entry = Entry {
            kind,
            path,
            link,
            mode: u32::try_from(block.number(MODE)? & 0o7777).unwrap_or(0),
            uid: pax.uid.map_or_else(|| id(block.number(UID)?), Ok)?,
            gid: pax.gid.map_or_else(|| id(block.number(GID)?), Ok)?,
            mtime: pax.mtime.map_or_else(|| Ok::<_, Error>((block.number(MTIME)?, 0)), Ok)?,
            device,
            size: 0,
            xattrs: pax.xattrs,
            sparse: None,
        };
        if kind != Type::File {
            // The size of such a header means nothing (some writers put the target's there), and no content follows.
            return Ok(entry);
        }
        self.begin_content(stored);
        entry.size = stored;
        if block.typeflag() == b'S' {
            if pax.sparse.any() {
                return Err(malformed("a file is sparse in two ways"));
            }
            self.gnu_sparse(block, &mut entry)?;
        } else if pax.sparse.any() {
            self.pax_sparse(pax.sparse, &mut entry)?;
        }
        Ok(entry)
    }

    /// The old form: the map is in the header, and in blocks between it and the content.
    fn gnu_sparse(&mut self, block: &Block, entry: &mut Entry) -> Result<()> {
        if !block.is_gnu() {
            return Err(malformed("a sparse file without a GNU header"));
        }
        let (stored, padding) = (std::mem::take(&mut self.content), std::mem::take(&mut self.padding));
        let mut map = Vec::new();
        let mut add = |bytes: &[u8]| -> Result<()> {
            for piece in bytes.chunks_exact(24).take_while(|piece| piece[0] != 0) {
                map.push((unsigned(number(&piece[..12])?)?, unsigned(number(&piece[12..])?)?));
            }
            Ok(())
        };
        add(&block.0[386..482])?;
        let mut more = block.0[482] != 0;
        let mut bytes = 0;
        while more {
            let extended = self.block()?.ok_or_else(truncated)?;
            bytes += BLOCK;
            if bytes > self.extension_bytes_max {
                return Err(Error::new(Kind::ResourceExhausted, "the map of a sparse file is too large"));
            }
            add(&extended[..504])?;
            more = extended[504] != 0;
        }
        entry.size = unsigned(number(&block.0[483..495])?)?;
        (self.content, self.padding) = (stored, padding);
        entry.sparse = Some(checked_map(map, entry.size, stored)?);
        Ok(())
    }

    /// The PAX forms: the map is in records (0.0, 0.1), or text before the content (1.0).
    fn pax_sparse(&mut self, sparse: Sparse, entry: &mut Entry) -> Result<()> {
        let map = match (sparse.major.as_deref(), sparse.minor.as_deref()) {
            (Some(b"1"), Some(b"0")) if sparse.map.is_empty() => self.sparse_text()?,
            (None, None) | (Some(b"0"), Some(b"0" | b"1")) => {
                let pairs: Vec<_> = sparse.map.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
                let count = u64::try_from(pairs.len()).ok();
                if !sparse.map.len().is_multiple_of(2) || sparse.blocks != count {
                    return Err(malformed("the map of a sparse file has another length than it says"));
                }
                pairs
            }
            _ => return Err(malformed("a sparse file of unknown version")),
        };
        entry.size = sparse.size.ok_or_else(|| malformed("a sparse file without its size"))?;
        if let Some(name) = sparse.name {
            entry.path = name;
        }
        entry.sparse = Some(checked_map(map, entry.size, self.content)?);
        Ok(())
    }

    /// The map of version 1.0: decimal numbers, one per line, filled up to whole blocks.
    fn sparse_text(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut text = Vec::new();
        let mut numbers: Vec<u64> = Vec::new();
        let mut begin = 0;
        loop {
            if text.len() >= self.extension_bytes_max {
                return Err(Error::new(Kind::ResourceExhausted, "the map of a sparse file is too large"));
            }
            self.read_content(BLOCK, &mut text)?;
            while let Some(len) = text[begin..].iter().position(|b| *b == b'\n') {
                numbers.push(decimal(&text[begin..begin + len])?);
                begin += len + 1;
                let count = usize::try_from(numbers[0]).unwrap_or(usize::MAX);
                if numbers.len() == count.saturating_mul(2).saturating_add(1) {
                    return Ok(numbers[1..].chunks_exact(2).map(|pair| (pair[0], pair[1])).collect());
                }
            }
            if text.len() - begin > 32 {
                return Err(malformed("the map of a sparse file has a line that is not a number"));
            }
        }
    }
}

/// Pieces must ascend, fit in the file and account for all of the content.
fn checked_map(map: Vec<(u64, u64)>, size: u64, stored: u64) -> Result<Vec<(u64, u64)>> {
    let mut end = 0_u64;
    let mut total = 0_u64;
    for (offset, len) in &map {
        let next = offset.checked_add(*len).filter(|next| *offset >= end && *next <= size);
        end = next.ok_or_else(|| malformed("the pieces of a sparse file overlap or exceed it"))?;
        total += len; // no overflow: the pieces are disjoint and below `size`
    }
    if total != stored {
        return Err(malformed("the pieces of a sparse file are not its content"));
    }
    Ok(map)
}

/// What precedes an entry's header.
#[derive(Default)]
struct Extensions {
    bytes: usize,
    pax: Option<Pax>,
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Extensions {
    fn any(&self) -> bool {
        self.pax.is_some() || self.long_path.is_some() || self.long_link.is_some()
    }
}

/// The records of a PAX header that mean something for a layer.
#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: Sparse,
}

#[derive(Default)]
struct Sparse {
    major: Option<Vec<u8>>,
    minor: Option<Vec<u8>>,
    name: Option<Vec<u8>>,
    size: Option<u64>,
    blocks: Option<u64>,
    /// Offsets and lengths, alternating.
    map: Vec<u64>,
}

impl Sparse {
    fn any(&self) -> bool {
        self.major.is_some()
            || self.minor.is_some()
            || self.name.is_some()
            || self.size.is_some()
            || self.blocks.is_some()
            || !self.map.is_empty()
    }
}

impl Pax {
    /// Parses `LENGTH KEY=VALUE\n` records. The length counts, so a value may contain anything.
    fn parse(mut records: &[u8]) -> Result<Pax> {
        let mut pax = Pax::default();
        while !records.is_empty() {
            let bad = || malformed("a malformed PAX record");
            let space = records.iter().take(20).position(|b| *b == b' ').ok_or_else(bad)?;
            let len = usize::try_from(decimal(&records[..space])?).map_err(|_| bad())?;
            if len > records.len() || len <= space + 1 {
                return Err(bad());
            }
            let (record, rest) = records.split_at(len);
            records = rest;
            let record = record[space + 1..].strip_suffix(b"\n").ok_or_else(bad)?;
            let equals = record.iter().position(|b| *b == b'=').filter(|at| *at > 0).ok_or_else(bad)?;
            pax.set(&record[..equals], &record[equals + 1..])?;
        }
        Ok(pax)
    }

    /// The last record of a key wins. An empty value takes the record back, as POSIX has it.
    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let given = (!value.is_empty()).then_some(value);
        let name = |value: Option<&[u8]>| match value {
            Some(value) if value.contains(&0) => Err(malformed("a PAX name contains NUL")),
            value => Ok(value.map(<[u8]>::to_vec)),
        };
        match key {
            b"path" => self.path = name(given)?,
            b"linkpath" => self.link = name(given)?,
            b"size" => self.size = given.map(decimal).transpose()?,
            b"uid" => self.uid = given.map(pax_id).transpose()?,
            b"gid" => self.gid = given.map(pax_id).transpose()?,
            b"mtime" => self.mtime = given.map(pax_time).transpose()?,
            b"GNU.sparse.major" => self.sparse.major = name(given)?,
            b"GNU.sparse.minor" => self.sparse.minor = name(given)?,
            b"GNU.sparse.name" => self.sparse.name = name(given)?,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.size = given.map(decimal).transpose()?
            }
            b"GNU.sparse.numblocks" => self.sparse.blocks = given.map(decimal).transpose()?,
            b"GNU.sparse.offset" => self.sparse_number(value, 0)?,
            b"GNU.sparse.numbytes" => self.sparse_number(value, 1)?,
            b"GNU.sparse.map" => {
                let numbers: Result<Vec<u64>> = value.split(|b| *b == b',').map(decimal).collect();
                self.sparse.map = if value.is_empty() { Vec::new() } else { numbers? };
            }
            _ => {
                if let Some(attribute) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.set_xattr(attribute, value)?;
                }
            }
        }
        Ok(())
    }

    fn set_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<()> {
        if name.is_empty() || name.contains(&0) {
            return Err(malformed("an extended attribute without a proper name"));
        }
        self.xattrs.push((name.to_vec(), value.to_vec()));
        Ok(())
    }

    fn sparse_number(&mut self, value: &[u8], turn: usize) -> Result<()> {
        if self.sparse.map.len() % 2 != turn {
            return Err(malformed("the map of a sparse file is out of order"));
        }
        self.sparse.map.push(decimal(value)?);
        Ok(())
    }

    fn moves_content(&self) -> bool {
        self.path.is_some() || self.link.is_some() || self.size.is_some() || self.sparse.any()
    }
}

// The fields that all formats share.
type Field = std::ops::Range<usize>;
const NAME: Field = 0..100;
const MODE: Field = 100..108;
const UID: Field = 108..116;
const GID: Field = 116..124;
const SIZE: Field = 124..136;
const MTIME: Field = 136..148;
const CHECKSUM: Field = 148..156;
const TYPE: usize = 156;
const LINK: Field = 157..257;
const MAGIC: Field = 257..265;
const MAJOR: Field = 329..337;
const MINOR: Field = 337..345;
const PREFIX: Field = 345..500;
const STAR_PREFIX: Field = 345..476;
const STAR_TRAILER: Field = 508..512;
const GNU_TIMES: [Field; 2] = [345..357, 357..369];

/// A header whose checksum is right.
struct Block([u8; BLOCK]);

impl Block {
    fn checked(bytes: [u8; BLOCK]) -> Result<Block> {
        let block = Block(bytes);
        let stored = block.number(CHECKSUM).unwrap_or(-1); // no sum is negative
        let (mut sum, mut signed) = (0_i64, 0_i64);
        for (at, byte) in bytes.iter().enumerate() {
            let byte = if CHECKSUM.contains(&at) { b' ' } else { *byte };
            sum += i64::from(byte);
            signed += i64::from(byte.cast_signed()); // some old writers did
        }
        if stored != sum && stored != signed {
            return Err(malformed("a header with a wrong checksum: not a tar archive, or damaged"));
        }
        Ok(block)
    }

    fn typeflag(&self) -> u8 {
        self.0[TYPE]
    }

    fn is_gnu(&self) -> bool {
        &self.0[MAGIC] == b"ustar  \0"
    }

    fn number(&self, field: Field) -> Result<i64> {
        number(&self.0[field])
    }

    /// Half of a device number. Only the formats that have the field are asked for it.
    fn device(&self, field: Field) -> Result<u64> {
        if !self.0[MAGIC].starts_with(b"ustar") {
            return Err(malformed("a device without its number"));
        }
        unsigned(self.number(field)?)
    }

    fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.0[NAME]);
        let prefix = until_nul(self.prefix());
        if prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    fn prefix(&self) -> &[u8] {
        if &self.0[MAGIC] == b"ustar\x0000" {
            let star = &self.0[STAR_TRAILER] == b"tar\0";
            return if star { &self.0[STAR_PREFIX] } else { &self.0[PREFIX] };
        }
        // Go before 1.8 wrote prefixes in GNU headers, over the times; layers of that age are still pulled.
        let times_parse = GNU_TIMES.iter().all(|time| number(&self.0[time.clone()]).is_ok());
        if self.is_gnu() && !times_parse && until_nul(&self.0[PREFIX]).is_ascii() {
            return &self.0[PREFIX];
        }
        &[]
    }
}

/// A name that may be given in three places. Go takes GNU's over PAX's, others the reverse: they must agree.
fn one_name(gnu: Option<Vec<u8>>, pax: Option<Vec<u8>>, header: impl Fn() -> Vec<u8>) -> Result<Vec<u8>> {
    match (gnu, pax) {
        (Some(gnu), Some(pax)) if gnu != pax => Err(malformed("an entry with two different long names")),
        (Some(name), _) | (None, Some(name)) => Ok(name),
        (None, None) => Ok(header()),
    }
}

/// A number as octal text, or in base 256 if the first bit is set.
fn number(field: &[u8]) -> Result<i64> {
    let bad = || malformed("a header with a field that is not a number");
    let Some(first) = field.first().filter(|first| **first & 0x80 != 0) else {
        let blank = |b: &u8| *b == b' ' || *b == 0;
        let Some(begin) = field.iter().position(|b| !blank(b)) else { return Ok(0) };
        let digits = field[begin..].split(blank).next().unwrap_or_default();
        return digits.iter().try_fold(0_i64, |value, digit| match digit {
            b'0'..=b'7' => value.checked_mul(8).map(|v| v + i64::from(digit - b'0')).ok_or_else(bad),
            _ => Err(bad()),
        });
    };
    // Two's complement, of which the first bit is the flag and the second the sign.
    let negative = first & 0x40 != 0;
    let start = i128::from(first & 0x3f) - if negative { 0x40 } else { 0 };
    field[1..].iter().try_fold(i64::try_from(start).map_err(|_| bad())?, |value, byte| {
        value.checked_mul(256).and_then(|v| v.checked_add(i64::from(*byte))).ok_or_else(bad)
    })
}

fn unsigned(number: i64) -> Result<u64> {
    u64::try_from(number).map_err(|_| malformed("a negative number"))
}

fn decimal(text: &[u8]) -> Result<u64> {
    let bad = || malformed("an extension with a field that is not a number");
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or_else(bad)
}

/// An owner. The last value means "nobody in particular" to chown and must not get there.
fn id(number: i64) -> Result<u32> {
    u32::try_from(number).ok().filter(|id| *id != u32::MAX).ok_or_else(|| malformed("an owner out of range"))
}

fn pax_id(text: &[u8]) -> Result<u32> {
    id(i64::try_from(decimal(text)?).unwrap_or(i64::MAX))
}

/// `[-]SECONDS[.FRACTION]`, of which nanoseconds are kept.
fn pax_time(text: &[u8]) -> Result<(i64, u32)> {
    let bad = || malformed("a PAX time that is not a number");
    let (negative, text) = text.strip_prefix(b"-").map_or((false, text), |text| (true, text));
    let mut halves = text.splitn(2, |b| *b == b'.');
    let seconds = i64::try_from(decimal(halves.next().unwrap_or_default())?).map_err(|_| bad())?;
    let fraction = halves.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(bad());
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanos = digits.fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    Ok(match (negative, nanos) {
        (false, nanos) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, nanos) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

fn malformed(what: &str) -> Error {
    Error::invalid(format!("the layer is malformed: {what}"))
}

fn truncated() -> Error {
    malformed("it ends in the middle of an entry")
}

/// The reader's buffer, filled if it was empty. An error that is already ours passes unchanged.
pub(crate) fn fill(reader: &mut impl BufRead) -> Result<&[u8]> {
    reader.fill_buf().map_err(from_io)
}

/// Unwraps an error that travelled through `io::Error`.
pub(crate) fn from_io(error: io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(ours) => ours,
        Err(foreign) => Error::with_source(Kind::Internal, "read the layer", foreign),
    }
}
