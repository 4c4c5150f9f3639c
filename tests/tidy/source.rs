//! Rust files as the rules see them: code without comments and literals, comments beside it, test code marked.
//!
//! This is a scanner, not a parser. It knows what a rule must not trip over: strings (raw ones too), characters,
//! lifetimes, nested comments.

use std::fs;
use std::path::{Path, PathBuf};

/// A Rust file.
pub(crate) struct Source {
    /// Relative to the repository, with slashes.
    pub(crate) path: String,
    /// As it is.
    pub(crate) text: String,
    /// The text with comments and the insides of literals blanked; every offset means the same in both.
    pub(crate) code: String,
    /// Offsets of code that is only compiled for tests, as ranges.
    test: Vec<std::ops::Range<usize>>,
}

impl Source {
    pub(crate) fn new(path: impl Into<String>, text: impl Into<String>) -> Self {
        let (path, text) = (path.into(), text.into());
        let code = blank(&text);
        let file_name = path.rsplit('/').next().unwrap_or_default();
        let all_test = path.starts_with("tests/") || file_name == "tests.rs" || path.contains("/tests/");
        let whole = 0..code.len();
        let test = if all_test { vec![whole] } else { test_items(&code) };
        Self { path, text, code, test }
    }

    pub(crate) fn is_test(&self, offset: usize) -> bool {
        self.test.iter().any(|range| range.contains(&offset))
    }

    /// From 1.
    pub(crate) fn line_of(&self, offset: usize) -> usize {
        self.text.as_bytes()[..offset].iter().filter(|byte| **byte == b'\n').count() + 1
    }

    /// Offsets of `word` in the code where it does not begin in the middle of a name.
    pub(crate) fn find<'a>(&'a self, word: &'a str) -> impl Iterator<Item = usize> + 'a {
        let starts_name = word.starts_with(is_name);
        self.code
            .match_indices(word)
            .map(|(at, _)| at)
            .filter(move |at| !starts_name || !self.code[..*at].ends_with(is_name))
    }

    /// The text of a line, from 1; empty outside the file.
    pub(crate) fn line(&self, number: usize) -> &str {
        number.checked_sub(1).and_then(|index| self.text.lines().nth(index)).unwrap_or_default()
    }
}

pub(crate) fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// All Rust files of the project, in the order of their paths.
pub(crate) fn rust_files(root: &Path) -> Vec<Source> {
    let mut paths = Vec::new();
    for member in ["api", "daemon", "shim", "tests"] {
        walk(&root.join(member), &mut paths);
    }
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    paths.iter().map(|path| Source::new(relative(root, path), read(path))).collect()
}

/// All files below a directory, but for what is built and what git keeps.
pub(crate) fn walk(dir: &Path, into: &mut Vec<PathBuf>) {
    let mut entries: Vec<_> = fs::read_dir(dir)
        .unwrap_or_else(|e| panic!("list {}: {e}", dir.display()))
        .map(|entry| entry.expect("a directory entry"))
        .collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type().expect("the type of a directory entry");
        let skipped = entry.file_name() == "target" || entry.file_name() == ".git";
        if kind.is_dir() && !skipped {
            walk(&entry.path(), into);
        } else if kind.is_file() && !skipped {
            into.push(entry.path());
        }
    }
}

pub(crate) fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).expect("found below the root").to_string_lossy().replace('\\', "/")
}

pub(crate) fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()))
}

/// Blanks comments and the insides of literals, byte for byte; line ends stay.
fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => find(bytes, at, b"\n").unwrap_or(bytes.len()),
            b'/' if bytes[at..].starts_with(b"/*") => comment_end(bytes, at),
            b'r' if raw_string(bytes, at).is_some() => raw_string(bytes, at).unwrap_or(at),
            b'"' => string_end(bytes, at),
            b'\'' => char_end(bytes, at),
            _ => {
                at += 1;
                continue;
            }
        };
        for byte in &mut code[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end.max(at + 1);
    }
    String::from_utf8(code).expect("only whole comments and literals were blanked")
}

fn find(bytes: &[u8], from: usize, what: &[u8]) -> Option<usize> {
    bytes[from..].windows(what.len()).position(|window| window == what).map(|at| from + at)
}

fn comment_end(bytes: &[u8], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0);
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            (at, depth) = (at + 2, depth + 1);
        } else if bytes[at..].starts_with(b"*/") {
            (at, depth) = (at + 2, depth - 1);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}

/// The end of a raw string whose `r` is at `start`; none if it is no raw string.
fn raw_string(bytes: &[u8], start: usize) -> Option<usize> {
    let before = bytes[..start].last().copied().unwrap_or(b' ');
    let prefixed = before == b'b' || before == b'c';
    if (before.is_ascii_alphanumeric() || before == b'_') && !prefixed {
        return None;
    }
    let hashes = bytes[start + 1..].iter().take_while(|byte| **byte == b'#').count();
    let quote = start + 1 + hashes;
    if bytes.get(quote) != Some(&b'"') {
        return None;
    }
    let close = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    Some(find(bytes, quote + 1, &close).map_or(bytes.len(), |at| at + close.len()))
}

fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The end of a character; of a lifetime, the place after its quote.
fn char_end(bytes: &[u8], start: usize) -> usize {
    if bytes.get(start + 1) == Some(&b'\\') {
        return find(bytes, start + 3, b"'").map_or(bytes.len(), |at| at + 1);
    }
    // One character of up to four bytes, then the closing quote.
    let length = bytes[start + 1..].iter().skip(1).take_while(|byte| (**byte & 0xc0) == 0x80).count() + 1;
    if bytes.get(start + 1 + length) == Some(&b'\'') { start + 2 + length } else { start + 1 }
}

/// Where items marked `#[cfg(test)]` are.
fn test_items(code: &str) -> Vec<std::ops::Range<usize>> {
    let mut ranges = Vec::new();
    for (start, mark) in code.match_indices("#[cfg(test)]") {
        let (mut depth, mut end) = (0_usize, code.len());
        for (at, byte) in code.bytes().enumerate().skip(start + mark.len()) {
            match byte {
                b'{' => depth += 1,
                b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth == 0 && (byte == b'}' || byte == b';') {
                end = at + 1;
                break;
            }
        }
        ranges.push(start..end);
    }
    ranges
}

#[test]
fn comments_and_literals_are_blanked_and_nothing_else() {
    for (text, code) in [
        ("a // b\nc", "a     \nc"),
        ("a /* b /* c */ d */ e", "a                   e"),
        (r#"f("x \" y", b)"#, "f(        , b)"),
        ("r##\"a\"# b\"## c", "             c"),
        ("br\"a\" for r in", "b     for r in"),
        (r"('a', '\'', '{', &'a str)", "(   ,     ,    , & a str)"),
        ("'\u{e9}' x", "     x"),
    ] {
        assert_eq!(blank(text), code, "{text}");
    }
}

#[test]
fn test_code_is_known() {
    let source =
        Source::new("daemon/src/a.rs", "fn a() {}\n#[cfg(test)]\nmod tests { fn b() { } }\nfn c() {}");
    for (word, test) in [("a()", false), ("b()", true), ("c()", false)] {
        let at = source.find(word).next().expect(word);
        assert_eq!(source.is_test(at), test, "{word}");
    }
}
