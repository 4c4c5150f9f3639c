//! The CRI log format, sans-I/O: output in, records out.
//!
//! ```text
//! 2026-01-02T03:04:05.000000006Z stdout F a whole line, or the end of one
//! 2026-01-02T03:04:05.000000006Z stderr P a part of a line that goes on in the next record of this stream
//! ```
//!
//! A line is written when its newline has come, or 16 KiB of it, which is then a part. What is still unfinished when the
//! output ends is written as `F`: readers join parts until an `F` comes, so a last `P` would make kubelet glue the next
//! start's first line to it and make log collectors wait for a rest that never comes.
//!
//! Never allocates but for the unfinished line of a stream, at most 16 KiB, which is freed with the line.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Most bytes of a line in one record, as kubelet expects them.
pub(super) const LINE_MAX: usize = 16 * 1024;

/// Bytes before the data of a record.
const PREFIX: usize = STAMP + " stdout F ".len();

/// Most bytes that one record takes.
pub(super) const RECORD_MAX: usize = PREFIX + LINE_MAX + 1;

const STAMP: usize = "2026-01-02T03:04:05.000000006Z".len();

/// Which output of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or all output of a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Time as text: RFC 3339 with nanoseconds, in UTC. What changes once per second is written once per second.
#[derive(Debug)]
pub(super) struct Stamp {
    second: u64,
    text: [u8; STAMP],
}

impl Stamp {
    pub(super) fn new() -> Stamp {
        Stamp { second: 0, text: *b"1970-01-01T00:00:00.000000000Z" }
    }

    /// Moves to a time. One before 1970 counts as 1970, one after 9999 as its remainder.
    pub(super) fn set(&mut self, at: SystemTime) {
        let since = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        if since.as_secs() != self.second {
            self.second = since.as_secs();
            self.set_second();
        }
        digits(&mut self.text[20..29], since.subsec_nanos().into());
    }

    fn set_second(&mut self) {
        let (year, month, day) = date(self.second / 86_400);
        digits(&mut self.text[0..4], year);
        digits(&mut self.text[5..7], month);
        digits(&mut self.text[8..10], day);
        digits(&mut self.text[11..13], self.second / 3600 % 24);
        digits(&mut self.text[14..16], self.second / 60 % 60);
        digits(&mut self.text[17..19], self.second % 60);
    }
}

fn digits(text: &mut [u8], mut value: u64) {
    for digit in text.iter_mut().rev() {
        *digit = b'0' + u8::try_from(value % 10).unwrap_or(0);
        value /= 10;
    }
}

/// Year, month and day in the Gregorian calendar of a day counted from 1970-01-01. Years begin in March here, so that
/// the day that comes and goes is the last one.
fn date(day: u64) -> (u64, u64, u64) {
    const ERA: u64 = 146_097; // days in 400 years
    let day = day + 719_468; // from 0000-03-01
    let (era, day) = (day / ERA, day % ERA);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153; // from March
    let in_month = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + u64::from(month <= 2), month, in_month)
}

/// Where records go: a buffer of fixed size.
pub(super) struct Output<'a> {
    bytes: &'a mut [u8],
    len: usize,
}

impl<'a> Output<'a> {
    /// An empty output over a buffer of at least [`RECORD_MAX`].
    pub(super) fn new(bytes: &'a mut [u8]) -> Output<'a> {
        debug_assert!(bytes.len() >= RECORD_MAX, "a record always fits into an empty output");
        Output { bytes, len: 0 }
    }

    /// What has been put.
    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Makes it empty.
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    /// Whether a record with this much data fits.
    fn fits(&self, data: usize) -> bool {
        self.bytes.len() - self.len > PREFIX + data
    }

    fn record(&mut self, prefix: &[u8; PREFIX], data: [&[u8]; 2]) {
        let record = &mut self.bytes[self.len..][..PREFIX + data[0].len() + data[1].len() + 1];
        record[..PREFIX].copy_from_slice(prefix);
        record[PREFIX..][..data[0].len()].copy_from_slice(data[0]);
        record[PREFIX + data[0].len()..][..data[1].len()].copy_from_slice(data[1]);
        let len = record.len();
        record[len - 1] = b'\n';
        self.len += len;
    }
}

/// The state of one stream between two reads.
#[derive(Debug)]
pub(super) struct Encoder {
    stream: Stream,
    /// The beginning of a line that has not ended yet; at most [`LINE_MAX`].
    pending: Vec<u8>,
    /// The last record was a part, so that somebody waits for the rest.
    partial: bool,
}

impl Encoder {
    pub(super) fn new(stream: Stream) -> Encoder {
        Encoder { stream, pending: Vec::new(), partial: false }
    }

    /// Puts the records of `input` and returns what of it did not fit: write the output, clear it, and go on with that.
    pub(super) fn encode<'a>(&mut self, stamp: &Stamp, input: &'a [u8], output: &mut Output<'_>) -> &'a [u8] {
        let full = prefix(stamp, self.stream, b'F');
        let part = prefix(stamp, self.stream, b'P');
        let mut rest = input;
        if !self.pending.is_empty() {
            if !output.fits(LINE_MAX) {
                return rest;
            }
            let Some(after) = self.complete(&full, &part, rest, output) else { return &[] };
            rest = after;
        }
        let mut start = 0;
        for newline in memchr::memchr_iter(b'\n', rest) {
            while newline - start > LINE_MAX {
                if !output.fits(LINE_MAX) {
                    return &rest[start..];
                }
                output.record(&part, [&rest[start..start + LINE_MAX], &[]]);
                self.partial = true;
                start += LINE_MAX;
            }
            if !output.fits(newline - start) {
                return &rest[start..];
            }
            output.record(&full, [&rest[start..newline], &[]]);
            self.partial = false;
            start = newline + 1;
        }
        rest = &rest[start..];
        while rest.len() > LINE_MAX {
            if !output.fits(LINE_MAX) {
                return rest;
            }
            output.record(&part, [&rest[..LINE_MAX], &[]]);
            self.partial = true;
            rest = &rest[LINE_MAX..];
        }
        self.pending.extend_from_slice(rest);
        &[]
    }

    /// Puts the pending line, if `input` ends it or makes it too long, and returns what comes after it.
    fn complete<'a>(
        &mut self,
        full: &[u8; PREFIX],
        part: &[u8; PREFIX],
        input: &'a [u8],
        output: &mut Output<'_>,
    ) -> Option<&'a [u8]> {
        let room = LINE_MAX - self.pending.len();
        let (prefix, data, after) = match memchr::memchr(b'\n', &input[..input.len().min(room + 1)]) {
            Some(newline) => (full, &input[..newline], &input[newline + 1..]),
            None if input.len() > room => (part, &input[..room], &input[room..]),
            None => {
                self.pending.extend_from_slice(input);
                return None;
            }
        };
        output.record(prefix, [&self.pending, data]);
        self.partial = prefix == part;
        self.pending = Vec::new();
        Some(after)
    }

    /// The output has ended: ends the line. `output` must be empty.
    pub(super) fn finish(&mut self, stamp: &Stamp, output: &mut Output<'_>) {
        if self.partial || !self.pending.is_empty() {
            output.record(&prefix(stamp, self.stream, b'F'), [&self.pending, &[]]);
            self.partial = false;
            self.pending = Vec::new();
        }
    }

    /// Somebody wants to see all there is, but the output goes on: puts what is pending as a part. `output` must be
    /// empty.
    pub(super) fn flush(&mut self, stamp: &Stamp, output: &mut Output<'_>) {
        if !self.pending.is_empty() {
            output.record(&prefix(stamp, self.stream, b'P'), [&self.pending, &[]]);
            self.partial = true;
            self.pending = Vec::new();
        }
    }
}

/// A record of ours among those of the process.
pub(super) fn note(stamp: &Stamp, text: &str) -> Vec<u8> {
    [&prefix(stamp, Stream::Stderr, b'F'), text.as_bytes(), b"\n"].concat()
}

fn prefix(stamp: &Stamp, stream: Stream, tag: u8) -> [u8; PREFIX] {
    let mut prefix = [b' '; PREFIX];
    prefix[..STAMP].copy_from_slice(&stamp.text);
    prefix[STAMP + 1..STAMP + 7].copy_from_slice(match stream {
        Stream::Stdout => b"stdout",
        Stream::Stderr => b"stderr",
    });
    prefix[STAMP + 8] = tag;
    prefix
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use proptest::prelude::*;

    use super::*;

    fn stamp() -> Stamp {
        let mut stamp = Stamp::new();
        stamp.set(UNIX_EPOCH + Duration::new(1_767_323_045, 6));
        stamp
    }

    /// Encodes reads one after another, then ends the stream. The buffer is small, so that it fills.
    fn encode(reads: &[&[u8]]) -> Vec<u8> {
        let mut encoder = Encoder::new(Stream::Stdout);
        let mut buffer = vec![0; RECORD_MAX + 7];
        let mut output = Output::new(&mut buffer);
        let mut log = Vec::new();
        let stamp = stamp();
        for read in reads {
            let mut rest = *read;
            while !rest.is_empty() {
                rest = encoder.encode(&stamp, rest, &mut output);
                assert!(rest.is_empty() || !output.filled().is_empty(), "every call gets on");
                log.extend_from_slice(output.filled());
                output.clear();
            }
            assert!(encoder.pending.len() <= LINE_MAX);
        }
        encoder.finish(&stamp, &mut output);
        log.extend_from_slice(output.filled());
        log
    }

    /// As a reader does it: parts are joined, and an `F` ends the line.
    fn decode(log: &[u8]) -> Vec<u8> {
        let mut text = Vec::new();
        for record in log.split_inclusive(|byte| *byte == b'\n') {
            let data = &record[PREFIX..record.len() - 1];
            assert!(data.len() <= LINE_MAX, "{}", data.len());
            assert_eq!(&record[STAMP..STAMP + 8], b" stdout ");
            text.extend_from_slice(data);
            match record[STAMP + 8] {
                b'F' => text.push(b'\n'),
                tag => assert_eq!(tag, b'P'),
            }
        }
        text
    }

    fn check(reads: &[&str], expected: Expect) {
        let reads: Vec<&[u8]> = reads.iter().map(|read| read.as_bytes()).collect();
        expected.assert_eq(&String::from_utf8(encode(&reads)).unwrap());
    }

    #[test]
    fn a_line_is_a_record() {
        check(
            &["one\ntwo\n\n"],
            expect![[r#"
                2026-01-02T03:04:05.000000006Z stdout F one
                2026-01-02T03:04:05.000000006Z stdout F two
                2026-01-02T03:04:05.000000006Z stdout F 
            "#]],
        );
    }

    #[test]
    fn a_line_that_comes_in_pieces_is_one_record() {
        check(
            &["he", "llo", " world\nne", "xt\n"],
            expect![[r#"
                2026-01-02T03:04:05.000000006Z stdout F hello world
                2026-01-02T03:04:05.000000006Z stdout F next
            "#]],
        );
    }

    #[test]
    fn a_last_line_without_newline_is_ended() {
        check(
            &["one\nlast"],
            expect![[r#"
                2026-01-02T03:04:05.000000006Z stdout F one
                2026-01-02T03:04:05.000000006Z stdout F last
            "#]],
        );
    }

    #[test]
    fn no_output_is_no_record() {
        check(&[], expect![""]);
    }

    #[test]
    fn long_lines_are_split_and_marked_partial() {
        let lengths = |reads: &[&[u8]]| -> Vec<(char, usize)> {
            let log = encode(reads);
            let records = log.split_inclusive(|byte| *byte == b'\n');
            records.map(|record| (char::from(record[STAMP + 8]), record.len() - PREFIX - 1)).collect()
        };
        let line = |len: usize| [vec![b'x'; len], vec![b'\n']].concat();
        assert_eq!(lengths(&[&line(LINE_MAX)]), [('F', LINE_MAX)], "a line that just fits is whole");
        assert_eq!(lengths(&[&line(LINE_MAX + 1)]), [('P', LINE_MAX), ('F', 1)]);
        assert_eq!(lengths(&[&line(3 * LINE_MAX)]), [('P', LINE_MAX), ('P', LINE_MAX), ('F', LINE_MAX)]);
        assert_eq!(lengths(&[&vec![b'x'; LINE_MAX]]), [('F', LINE_MAX)], "and so is one that is never ended");
        assert_eq!(lengths(&[&vec![b'x'; LINE_MAX], b"\n"]), [('F', LINE_MAX)]);
        assert_eq!(lengths(&[&vec![b'x'; LINE_MAX], b"y", b"\n"]), [('P', LINE_MAX), ('F', 1)]);
    }

    #[test]
    fn what_is_flushed_early_is_a_part_and_is_ended_later() {
        let mut encoder = Encoder::new(Stream::Stderr);
        let mut buffer = vec![0; 2 * RECORD_MAX];
        let mut output = Output::new(&mut buffer);
        let stamp = stamp();
        encoder.encode(&stamp, b"half", &mut output);
        encoder.flush(&stamp, &mut output);
        encoder.flush(&stamp, &mut output); // nothing new
        encoder.finish(&stamp, &mut output);
        encoder.finish(&stamp, &mut output); // nothing new
        expect![[r#"
            2026-01-02T03:04:05.000000006Z stderr P half
            2026-01-02T03:04:05.000000006Z stderr F 
        "#]]
        .assert_eq(std::str::from_utf8(output.filled()).unwrap());
    }

    #[test]
    fn times_are_rfc3339_in_utc() {
        let at = |seconds: u64, nanos: u32| {
            let mut stamp = Stamp::new();
            stamp.set(UNIX_EPOCH + Duration::new(seconds, nanos));
            String::from_utf8(stamp.text.to_vec()).unwrap()
        };
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(at(951_782_399, 999_999_999), "2000-02-28T23:59:59.999999999Z");
        assert_eq!(at(951_782_400, 1), "2000-02-29T00:00:00.000000001Z");
        assert_eq!(at(4_107_542_400, 0), "2100-03-01T00:00:00.000000000Z"); // 2100 is no leap year
        assert_eq!(at(1_798_761_599, 0), "2026-12-31T23:59:59.000000000Z");
        let mut before = Stamp::new();
        before.set(UNIX_EPOCH - Duration::from_secs(5));
        assert_eq!(&before.text, b"1970-01-01T00:00:00.000000000Z");
    }

    proptest! {
        #[test]
        fn decoding_gives_back_what_was_encoded(
            lines in proptest::collection::vec(prop_oneof![0..200_usize, LINE_MAX - 2..LINE_MAX + 3, 0..80_000_usize], 0..12),
            ended in any::<bool>(),
            reads in proptest::collection::vec(1..40_000_usize, 1..40),
        ) {
            let mut text = Vec::new();
            for (number, len) in lines.iter().enumerate() {
                let bytes = (0..=250_u8).filter(|byte| *byte != b'\n').cycle();
                text.extend(bytes.skip(number).take(*len));
                text.push(b'\n');
            }
            if !ended {
                text.pop();
            }
            let mut rest = text.as_slice();
            let mut pieces = Vec::new();
            for read in reads.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, after) = rest.split_at(rest.len().min(*read));
                pieces.push(piece);
                rest = after;
            }
            let log = encode(&pieces);
            if text.last().is_some_and(|last| *last != b'\n') {
                text.push(b'\n'); // the reader sees the last line ended
            }
            prop_assert!(decode(&log) == text);
        }
    }
}
