//! Network lists from disk, reloaded on change.
//!
//! A directory is read whole into a [`Loaded`], which never changes: the lists that can be used, in the order of their
//! file names, and what is wrong with the others. One broken file never hides the rest. A change is noticed twice: by
//! inotify, which costs nothing while nothing happens, and by comparing the files' times whenever a pod needs a network,
//! so that a pod started right after a file appeared finds it. Nothing here runs a plugin, and nothing logs a list,
//! which may hold credentials.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde_json::{Map, Value, json};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::plugin::{excerpt, valid_type};
use crate::error::{Context, Error, Kind, Result};

/// A larger file is not a network configuration.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// More files than this are not read.
const FILES_MAX: usize = 256;
/// Longer chains are refused.
const PLUGINS_MAX: usize = 64;
/// A burst of changes is read once.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// File times are coarse: two writes closer together than this can look like one.
const TIME_GRAIN: Duration = Duration::from_millis(100);

/// A version of the CNI specification that we speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Version(u8, u8, u8);

impl Version {
    pub(super) const V0_4_0: Version = Version(0, 4, 0);
    pub(super) const V1_0_0: Version = Version(1, 0, 0);
    pub(super) const V1_1_0: Version = Version(1, 1, 0);
    const SUPPORTED: [Version; 5] =
        [Version(0, 3, 0), Version(0, 3, 1), Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];

    pub(super) fn parse(text: &str) -> Result<Version> {
        let known = Version::SUPPORTED.into_iter().find(|version| version.to_string() == text);
        known.ok_or_else(|| {
            let text = excerpt(text.as_bytes());
            Error::precondition(format!(
                "cniVersion {text:?} is not supported (0.3.0, 0.3.1, 0.4.0, 1.0.0 and 1.1.0 are)"
            ))
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// One network: a chain of plugins.
#[derive(Clone, PartialEq)]
pub(super) struct List {
    pub(super) name: String,
    pub(super) version: Version,
    pub(super) disable_check: bool,
    pub(super) disable_gc: bool,
    pub(super) plugins: Vec<Plugin>,
    /// The configuration as a list, from which all of the above can be read again.
    pub(super) source: Value,
}

/// One link of the chain.
#[derive(Clone, PartialEq)]
pub(super) struct Plugin {
    /// `type`: the name of its executable.
    pub(super) name: String,
    /// The runtime arguments it wants.
    pub(super) capabilities: BTreeSet<String>,
    /// Everything else is the plugin's own business and passed on as it is.
    pub(super) conf: Map<String, Value>,
}

impl List {
    /// Reads a list.
    pub(super) fn parse(source: Value) -> Result<List> {
        let top = source.as_object().ok_or_else(|| Error::precondition("not a JSON object"))?;
        let name = text(top, "name")?.ok_or_else(|| Error::precondition("no name"))?.to_owned();
        if !valid_name(&name) {
            let name = excerpt(name.as_bytes());
            return Err(Error::precondition(format!("name {name:?} is not letters, digits, '_', '.', '-'")));
        }
        let version = version(top)?;
        let plugins = match top.get("plugins") {
            Some(Value::Array(plugins)) if (1..=PLUGINS_MAX).contains(&plugins.len()) => plugins,
            Some(Value::Array(plugins)) => {
                return Err(Error::precondition(format!(
                    "{} plugins: 1 to {PLUGINS_MAX} are possible",
                    plugins.len()
                )));
            }
            _ => return Err(Error::precondition("no array of plugins")),
        };
        let plugins = plugins.iter().map(Plugin::parse).collect::<Result<_>>()?;
        let (disable_check, disable_gc) = (flag(top, "disableCheck")?, flag(top, "disableGC")?);
        Ok(List { name, version, disable_check, disable_gc, plugins, source })
    }

    /// Reads a configuration of a single plugin, and makes a list of it.
    fn parse_single(source: Value) -> Result<List> {
        let top = source.as_object().ok_or_else(|| Error::precondition("not a JSON object"))?;
        if top.contains_key("plugins") {
            return Err(Error::precondition("holds a list of plugins: its file name must end in .conflist"));
        }
        let mut list = json!({ "plugins": [source] });
        for key in ["name", "cniVersion"] {
            if let Some(value) = top.get(key) {
                list[key] = value.clone();
            }
        }
        List::parse(list)
    }
}

impl Plugin {
    fn parse(conf: &Value) -> Result<Plugin> {
        let conf = conf.as_object().ok_or_else(|| Error::precondition("a plugin is not a JSON object"))?;
        let name = text(conf, "type")?.ok_or_else(|| Error::precondition("a plugin has no type"))?;
        if !valid_type(name) {
            let name = excerpt(name.as_bytes());
            return Err(Error::precondition(format!("plugin type {name:?} is not a plain file name")));
        }
        let capabilities = match conf.get("capabilities") {
            None | Some(Value::Null) => BTreeSet::new(),
            Some(Value::Object(all)) => all
                .iter()
                .filter(|(_, wanted)| **wanted == Value::Bool(true))
                .map(|(key, _)| key.clone())
                .collect(),
            Some(_) => {
                return Err(Error::precondition(format!(
                    "capabilities of plugin {name:?} are not an object"
                )));
            }
        };
        Ok(Plugin { name: name.to_owned(), capabilities, conf: conf.clone() })
    }
}

/// Network names and container ids: they become file names in the hands of plugins.
pub(super) fn valid_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    name.len() <= 255 && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(plain)
}

fn text<'a>(top: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>> {
    match top.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(Error::precondition(format!("{key} is not a string"))),
    }
}

/// The specification once called flags strings, and both forms are found.
fn flag(top: &Map<String, Value>, key: &str) -> Result<bool> {
    match top.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(set)) => Ok(*set),
        Some(Value::String(set)) if set == "true" => Ok(true),
        Some(Value::String(set)) if set == "false" => Ok(false),
        Some(_) => Err(Error::precondition(format!("{key} is neither true nor false"))),
    }
}

/// The highest version that the list offers and we speak.
fn version(top: &Map<String, Value>) -> Result<Version> {
    let mut offered: Vec<&str> = text(top, "cniVersion")?.into_iter().collect();
    match top.get("cniVersions") {
        None | Some(Value::Null) => {}
        Some(Value::Array(more)) => offered.extend(more.iter().filter_map(Value::as_str)),
        Some(_) => return Err(Error::precondition("cniVersions is not an array")),
    }
    let first = *offered.first().ok_or_else(|| Error::precondition("no cniVersion"))?;
    match offered.iter().filter_map(|text| Version::parse(text).ok()).max() {
        Some(version) => Ok(version),
        None => Version::parse(first),
    }
}

/// What a directory held when it was read.
#[derive(Default)]
pub(super) struct Loaded {
    /// The usable lists; the first is the default network.
    pub(super) lists: Vec<Arc<List>>,
    /// What is wrong with files, or with the directory itself.
    pub(super) broken: Vec<String>,
    files: Files,
}

/// The directory's candidates with all that changes when they do.
#[derive(Default, PartialEq)]
struct Files {
    found: Vec<(OsString, Stamp)>,
    unreadable: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    dev: u64,
    ino: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Files {
    fn scan(dir: &Path) -> Files {
        match Files::read(dir) {
            Ok(files) => files,
            // An absent directory is an empty one: the network's installer makes it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Files::default(),
            Err(error) => {
                Files { found: Vec::new(), unreadable: Some(format!("read {}: {error}", dir.display())) }
            }
        }
    }

    fn read(dir: &Path) -> io::Result<Files> {
        let mut names = Vec::new();
        for entry in dir.read_dir()? {
            let name = entry?.file_name();
            if matches!(
                Path::new(&name).extension().map(OsStrExt::as_bytes),
                Some(b"conflist" | b"conf" | b"json")
            ) {
                names.push(name);
            }
        }
        names.sort();
        let unreadable = (names.len() > FILES_MAX).then(|| {
            format!("{} holds {} files: only the first {FILES_MAX} are read", dir.display(), names.len())
        });
        names.truncate(FILES_MAX);
        // Follows symbolic links: what counts is what would be read.
        let stamped = names.into_iter().filter_map(|name| {
            let meta = dir.join(&name).metadata().ok()?;
            let stamp = Stamp {
                dev: meta.dev(),
                ino: meta.ino(),
                bytes: meta.size(),
                modified: (meta.mtime(), meta.mtime_nsec()),
                changed: (meta.ctime(), meta.ctime_nsec()),
            };
            Some((name, stamp))
        });
        Ok(Files { found: stamped.collect(), unreadable })
    }

    /// Whether the stamps would show any later write.
    fn settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.found.iter().all(|(_, stamp)| {
            let seconds = u64::try_from(stamp.changed.0).unwrap_or_default();
            let nanos = u32::try_from(stamp.changed.1).unwrap_or_default();
            Duration::new(seconds, nanos) + TIME_GRAIN < now
        })
    }
}

impl Loaded {
    /// Reads the directory again if it may differ from `self`.
    pub(super) fn reload(&self, dir: &Path) -> Option<Loaded> {
        let files = Files::scan(dir);
        (files != self.files || !files.settled(SystemTime::now())).then(|| Loaded::read(dir, files))
    }

    /// Reads the directory.
    pub(super) fn load(dir: &Path) -> Loaded {
        Loaded::read(dir, Files::scan(dir))
    }

    fn read(dir: &Path, files: Files) -> Loaded {
        let mut lists = Vec::new();
        let mut broken: Vec<String> = files.unreadable.iter().cloned().collect();
        for (name, _) in &files.found {
            let path = dir.join(name);
            match read_list(&path) {
                Ok(list) => lists.push(Arc::new(list)),
                Err(error) => broken.push(format!("{}: {error}", path.display())),
            }
        }
        Loaded { lists, broken, files }
    }

    /// Whether the same networks can be used; times do not matter.
    pub(super) fn same(&self, other: &Loaded) -> bool {
        self.lists == other.lists && self.broken == other.broken
    }
}

fn read_list(path: &Path) -> Result<List> {
    let mut bytes = Vec::new();
    // Not blocking: a FIFO in the directory must not hang us before we have seen that it is one.
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())
        .context(Kind::Internal, || "open".to_owned())?;
    let file = File::from(fd);
    if !file.metadata().context(Kind::Internal, || "stat".to_owned())?.is_file() {
        return Err(Error::precondition("not a file"));
    }
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).context(Kind::Internal, || "read".to_owned())?;
    if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > FILE_BYTES_MAX {
        return Err(Error::precondition(format!("larger than {FILE_BYTES_MAX} bytes")));
    }
    let source =
        serde_json::from_slice(&bytes).context(Kind::FailedPrecondition, || "not JSON".to_owned())?;
    if path.extension().is_some_and(|extension| extension == "conflist") {
        List::parse(source)
    } else {
        List::parse_single(source)
    }
}

/// Calls `changed` now and after every change of the directory, for as long as it can be watched.
///
/// The directory may be absent, and may be replaced: every directory above it is watched too, for the next name only.
pub(super) async fn watch<F: Future<Output = ()>>(dir: PathBuf, changed: impl Fn() -> F) -> io::Result<()> {
    loop {
        let watches = Watches::arm(&dir)?;
        // Only now: a change while we read is an event already.
        changed().await;
        watches.wait().await?;
        tokio::time::sleep(DEBOUNCE).await;
    }
}

struct Watches {
    fd: AsyncFd<OwnedFd>,
    /// By watch: the one name in the directory that matters, or all.
    names: HashMap<i32, Option<OsString>>,
}

impl Watches {
    /// Watches the path from the root down, so that what is made behind our back is either seen or reported.
    fn arm(dir: &Path) -> io::Result<Watches> {
        let moved = WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF | WatchFlags::ONLYDIR;
        let entries = moved | WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVE;
        let contents = entries | WatchFlags::CLOSE_WRITE;

        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let mut path: Vec<&Path> = dir.ancestors().filter(|path| !path.as_os_str().is_empty()).collect();
        path.reverse();
        let mut names = HashMap::new();
        for (depth, level) in path.iter().enumerate() {
            let next = path.get(depth + 1).and_then(|next| next.file_name()).map(ToOwned::to_owned);
            match inotify::add_watch(&fd, *level, if next.is_some() { entries } else { contents }) {
                Ok(watch) => names.insert(watch, next),
                Err(Errno::NOENT | Errno::NOTDIR) => break,
                Err(error) => return Err(error.into()),
            };
            // Busy directories such as /etc wake us only where the path ends: further up a move is all that matters.
            if let Some(above) = depth.checked_sub(2) {
                match inotify::add_watch(&fd, path[above], moved) {
                    // Gone meanwhile: the watch it had until now has said so.
                    Ok(_) | Err(Errno::NOENT | Errno::NOTDIR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        #[expect(
            deprecated,
            reason = "its hazard is a descriptor that is not owned; ours is, and so this needs no unsafe"
        )]
        let fd = AsyncFd::with_interest(fd, Interest::READABLE)?;
        Ok(Watches { fd, names })
    }

    /// Waits for an event that matters.
    async fn wait(&self) -> io::Result<()> {
        loop {
            let mut ready = self.fd.readable().await?;
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut events = inotify::Reader::new(self.fd.get_ref(), &mut buffer);
            loop {
                match events.next() {
                    Ok(event) if self.matters(&event) => return Ok(()),
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
        }
    }

    fn matters(&self, event: &inotify::Event<'_>) -> bool {
        match (self.names.get(&event.wd()), event.file_name()) {
            (Some(Some(expected)), Some(name)) => expected.as_bytes() == name.to_bytes(),
            // Of the directory itself, of a watch we do not know, or lost in an overflow.
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(files: &[(&str, &str)]) -> (Vec<String>, Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let loaded = Loaded::load(dir.path());
        let names = loaded.lists.iter().map(|list| format!("{} {}", list.name, list.version)).collect();
        (names, loaded.broken)
    }

    const PLUGIN: &str = r#""plugins":[{"type":"bridge"}]"#;

    #[test]
    fn files_are_taken_in_the_order_of_their_names_and_broken_ones_are_told() {
        let (lists, broken) = load(&[
            ("20-b.conf", r#"{"cniVersion":"0.3.1","name":"b","type":"bridge"}"#),
            ("10-a.conflist", &format!(r#"{{"cniVersion":"1.0.0","name":"a",{PLUGIN}}}"#)),
            ("30-c.json", r#"{"cniVersion":"0.4.0","name":"c","type":"bridge"}"#),
            ("00-broken.conflist", "{"),
            ("05-notes.txt", "{"),
            ("40-list.conf", &format!(r#"{{"cniVersion":"1.0.0","name":"d",{PLUGIN}}}"#)),
        ]);
        assert_eq!(lists, ["a 1.0.0", "b 0.3.1", "c 0.4.0"]);
        assert_eq!(broken.len(), 2, "{broken:?}");
        assert!(broken[0].contains("00-broken.conflist") && broken[0].contains("not JSON"), "{broken:?}");
        assert!(
            broken[1].contains("40-list.conf") && broken[1].contains("must end in .conflist"),
            "{broken:?}"
        );
    }

    #[test]
    fn an_unusable_list_says_why() {
        let cases = [
            ("[]", "not a JSON object"),
            (r#"{"cniVersion":"1.0.0"}"#, "no name"),
            (r#"{"cniVersion":"1.0.0","name":7}"#, "name is not a string"),
            (r#"{"cniVersion":"1.0.0","name":"../x"}"#, "name \"../x\" is not"),
            (r#"{"name":"a"}"#, "no cniVersion"),
            (r#"{"cniVersion":"0.2.0","name":"a"}"#, "\"0.2.0\" is not supported"),
            (r#"{"cniVersion":"1.2.0","name":"a"}"#, "\"1.2.0\" is not supported"),
            (r#"{"cniVersion":"v1","name":"a"}"#, "\"v1\" is not supported"),
            (r#"{"cniVersion":"1.0.0","name":"a"}"#, "no array of plugins"),
            (r#"{"cniVersion":"1.0.0","name":"a","plugins":[]}"#, "0 plugins"),
            (r#"{"cniVersion":"1.0.0","name":"a","plugins":[7]}"#, "not a JSON object"),
            (r#"{"cniVersion":"1.0.0","name":"a","plugins":[{}]}"#, "no type"),
            (
                r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"../../canary/evil"}]}"#,
                "plain file name",
            ),
            (r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":".."}]}"#, "plain file name"),
            (r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":""}]}"#, "plain file name"),
            (
                r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"b","capabilities":[]}]}"#,
                "not an object",
            ),
            (
                r#"{"cniVersion":"1.0.0","name":"a","disableCheck":3,"plugins":[{"type":"b"}]}"#,
                "disableCheck",
            ),
        ];
        for (text, expected) in cases {
            let (lists, broken) = load(&[("a.conflist", text)]);
            assert!(lists.is_empty(), "{text}");
            assert!(broken[0].contains(expected), "{text}: {broken:?}");
        }
    }

    #[test]
    fn the_highest_common_version_is_spoken() {
        let cases = [
            (r#""cniVersion":"0.3.0""#, "0.3.0"),
            (r#""cniVersion":"1.0.0","cniVersions":["0.4.0","1.1.0"]"#, "1.1.0"),
            (r#""cniVersion":"0.4.0","cniVersions":["0.4.0","9.0.0"]"#, "0.4.0"),
            (r#""cniVersion":"9.0.0","cniVersions":["1.0.0"]"#, "1.0.0"),
        ];
        for (versions, expected) in cases {
            let list =
                List::parse(serde_json::from_str(&format!(r#"{{{versions},"name":"a",{PLUGIN}}}"#)).unwrap());
            assert_eq!(list.map(|list| list.version.to_string()).unwrap(), expected, "{versions}");
        }
    }

    #[test]
    fn a_file_that_is_no_file_or_too_large_is_refused_without_hanging() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("1.conflist");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        std::fs::create_dir(dir.path().join("2.conflist")).unwrap();
        std::fs::write(dir.path().join("3.conflist"), vec![b' '; (1 << 20) + 1]).unwrap();
        let broken = Loaded::load(dir.path()).broken;
        assert!(broken[0].contains("not a file") && broken[1].contains("not a file"), "{broken:?}");
        assert!(broken[2].contains("larger than"), "{broken:?}");
    }

    #[test]
    fn an_unchanged_directory_is_not_read_again_and_a_changed_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("net.d");
        let absent = Loaded::load(&conf);
        assert!(absent.reload(&conf).is_none());
        std::fs::create_dir(&conf).unwrap();
        let list = |name| format!(r#"{{"cniVersion":"1.0.0","name":"{name}",{PLUGIN}}}"#);
        std::fs::write(conf.join("a.conflist"), list("one")).unwrap();
        let first = absent.reload(&conf).expect("a new file is noticed");
        // The same size at nearly the same time: the stamps alone might not show it.
        std::fs::write(conf.join("a.conflist"), list("two")).unwrap();
        let second = first.reload(&conf).expect("a changed file is noticed");
        assert_eq!(second.lists[0].name, "two");
        std::thread::sleep(TIME_GRAIN * 2);
        assert!(second.reload(&conf).is_none());
        std::fs::remove_file(conf.join("a.conflist")).unwrap();
        assert!(second.reload(&conf).expect("a removed file is noticed").lists.is_empty());
    }

    #[tokio::test]
    async fn the_watch_follows_a_directory_that_appears_changes_and_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("cni/net.d");
        let (tx, mut rx) = tokio::sync::mpsc::unbounded_channel();
        let watching = tokio::spawn(watch(conf.clone(), move || {
            let _ = tx.send(());
            std::future::ready(())
        }));
        let mut changed = async |what: &str| {
            let seen = tokio::time::timeout(Duration::from_secs(10), rx.recv()).await;
            assert_eq!(seen, Ok(Some(())), "{what}");
            // What one step made is one or more events: let them pass.
            while let Ok(Some(())) = tokio::time::timeout(DEBOUNCE * 4, rx.recv()).await {}
        };
        changed("the start").await;
        std::fs::create_dir_all(&conf).unwrap();
        changed("the directory appears").await;
        std::fs::write(conf.join("a.conf"), "{}").unwrap();
        changed("a file is written").await;
        std::fs::rename(&conf, dir.path().join("cni/old")).unwrap();
        std::fs::create_dir(&conf).unwrap();
        changed("it is replaced").await;
        std::fs::write(conf.join("b.conf"), "{}").unwrap();
        changed("a file in the new one").await;
        std::fs::remove_dir_all(dir.path().join("cni")).unwrap();
        changed("all is removed").await;
        std::fs::create_dir_all(&conf).unwrap();
        changed("it comes back").await;
        std::fs::write(dir.path().join("unrelated"), "").unwrap();
        let quiet = tokio::time::timeout(DEBOUNCE * 4, rx.recv()).await;
        assert!(quiet.is_err(), "a file elsewhere is no change");
        watching.abort();
    }
}
