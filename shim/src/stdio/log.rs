//! A container's log file.
//!
//! Opened below its directory and nowhere else, whatever links somebody has put there. A write error never stops the
//! process that is logged: whole records are dropped and counted, and a note says so when there is room again.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, open, openat2};

use super::cri_log::{Stamp, note};

/// Where a log is: the directory is the node's and may be reached through symbolic links, the path below it may not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPath {
    /// Absolute. Created if absent.
    pub directory: PathBuf,
    /// Relative, without `..`. Its own directories are created if absent.
    pub path: PathBuf,
}

impl LogPath {
    /// Opens the file for appending, and makes it if there is none.
    fn open(&self) -> io::Result<File> {
        let names = self.names()?;
        let Some((file, parents)) = names.split_last() else {
            return Err(self.refused("is empty"));
        };
        fs::create_dir_all(&self.directory)?;
        let directory = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let mut at = open(&self.directory, directory, Mode::empty())?;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        for parent in parents {
            match mkdirat(&at, *parent, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
            at = openat2(&at, *parent, directory, Mode::empty(), beneath)?;
        }
        // NONBLOCK: a pipe that lies in wait here is an error, not a wait for its reader.
        let flags = OFlags::WRONLY
            | OFlags::APPEND
            | OFlags::CREATE
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC
            | OFlags::NONBLOCK;
        let file = File::from(openat2(&at, *file, flags, Mode::from_raw_mode(0o640), beneath)?);
        if !file.metadata()?.is_file() {
            return Err(self.refused("is not a regular file"));
        }
        Ok(file)
    }

    fn names(&self) -> io::Result<Vec<&Path>> {
        if !self.directory.is_absolute() {
            return Err(self.refused("has a directory that is not absolute"));
        }
        self.path
            .components()
            .map(|component| match component {
                Component::Normal(name) => Ok(Path::new(name)),
                _ => Err(self.refused("is not a plain relative path")),
            })
            .collect()
    }

    fn refused(&self, why: &str) -> io::Error {
        let message = format!("log path {:?} below {:?} {why}", self.path, self.directory);
        io::Error::new(io::ErrorKind::InvalidInput, message)
    }
}

/// An open log.
#[derive(Debug)]
pub(super) struct Log {
    path: LogPath,
    file: File,
    dropped: Option<Dropped>,
}

/// What has been lost since the last note.
#[derive(Debug)]
struct Dropped {
    records: usize,
    /// Of the first loss.
    why: io::Error,
}

impl Log {
    pub(super) fn open(path: LogPath) -> io::Result<Log> {
        let file = path.open()?;
        Ok(Log { path, file, dropped: None })
    }

    /// Goes on in a new file of the same name, somebody having renamed the old one. On error the old one stays.
    pub(super) fn reopen(&mut self) -> io::Result<()> {
        self.file = self.path.open()?;
        Ok(())
    }

    /// Appends whole records. What cannot be written is dropped and counted.
    pub(super) fn write(&mut self, stamp: &Stamp, records: &[u8]) {
        if !self.note_dropped(stamp) {
            self.drop_records(records, None);
        } else if let Err((kept, why)) = append(&self.file, records) {
            self.drop_records(&records[kept..], Some(why));
        }
    }

    /// Writes what has been lost, if anything; `false` if there is no room even for that.
    pub(super) fn note_dropped(&mut self, stamp: &Stamp) -> bool {
        let Some(Dropped { records, why }) = &self.dropped else { return true };
        let text = note(stamp, &format!("ocid: {records} lines dropped: {why}"));
        let noted = append(&self.file, &text).is_ok();
        if noted {
            self.dropped = None;
        }
        noted
    }

    fn drop_records(&mut self, records: &[u8], why: Option<io::Error>) {
        let lost = memchr::memchr_iter(b'\n', records).count();
        match (&mut self.dropped, why) {
            (Some(dropped), _) => dropped.records += lost,
            (None, Some(why)) => self.dropped = Some(Dropped { records: lost, why }),
            (None, None) => {}
        }
    }
}

/// Appends records: all of them, or as many whole ones as there is room for; then says how many bytes those are.
fn append(mut file: &File, records: &[u8]) -> Result<(), (usize, io::Error)> {
    let mut done = 0;
    while done < records.len() {
        let why = match file.write(&records[done..]) {
            Ok(0) => io::ErrorKind::WriteZero.into(),
            Ok(written) => {
                done += written;
                continue;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => e,
        };
        let whole = memchr::memrchr(b'\n', &records[..done]).map_or(0, |newline| newline + 1);
        cut(file, done - whole);
        return Err((whole, why));
    }
    Ok(())
}

/// Takes the torn record off the end. We are the only writer, so the end is ours.
fn cut(file: &File, torn: usize) {
    if torn > 0
        && let Ok(metadata) = file.metadata()
    {
        // If even this fails, the torn record stays: better than no log.
        let _ = file.set_len(metadata.len().saturating_sub(torn as u64));
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn at(directory: &Path, path: &str) -> LogPath {
        LogPath { directory: directory.to_owned(), path: path.into() }
    }

    #[test]
    fn the_file_and_its_directories_are_made() {
        let temp = tempfile::tempdir().unwrap();
        let mut log = Log::open(at(&temp.path().join("pods/pod"), "name/0.log")).unwrap();
        log.write(&Stamp::new(), b"a\n");
        let path = temp.path().join("pods/pod/name/0.log");
        assert_eq!(fs::read(&path).unwrap(), b"a\n");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o137, 0, "nothing beyond 0640");
        Log::open(log.path.clone()).unwrap().write(&Stamp::new(), b"b\n");
        assert_eq!(fs::read(&path).unwrap(), b"a\nb\n", "an old file is continued");
    }

    #[test]
    fn paths_that_leave_the_directory_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        let inside = temp.path().join("pod");
        for path in ["", "/etc/x", "../x", "a/../../x", "a/..", ".."] {
            let error = Log::open(at(&inside, path)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path}");
        }
        assert!(Log::open(at(Path::new("relative"), "x")).is_err());
        assert!(!inside.exists(), "a refusal leaves nothing");
    }

    #[test]
    fn links_and_pipes_in_the_way_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        let canary = temp.path().join("canary");
        fs::write(&canary, "untouched").unwrap();
        let inside = temp.path().join("pod");
        fs::create_dir(&inside).unwrap();
        symlink(&canary, inside.join("file.log")).unwrap();
        symlink(temp.path(), inside.join("dir")).unwrap();
        symlink(temp.path().join("new"), inside.join("dangling.log")).unwrap();
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, inside.join("pipe.log"), rustix::fs::FileType::Fifo, mode, 0)
            .unwrap();
        let reader = OFlags::RDONLY | OFlags::NONBLOCK;
        let mut reading = None;
        for (path, with_reader) in [
            ("file.log", false),
            ("dir/canary", false),
            ("dangling.log", false),
            ("pipe.log", false),
            ("pipe.log", true),
        ] {
            if with_reader {
                reading = Some(open(inside.join(path), reader, Mode::empty()).unwrap());
            }
            assert!(Log::open(at(&inside, path)).is_err(), "{path}");
        }
        drop(reading);
        assert_eq!(fs::read_to_string(&canary).unwrap(), "untouched");
        assert!(!temp.path().join("new").exists());
    }

    #[test]
    fn a_directory_may_be_reached_through_a_link() {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir(temp.path().join("real")).unwrap();
        symlink("real", temp.path().join("link")).unwrap();
        Log::open(at(&temp.path().join("link"), "0.log")).unwrap();
        assert!(temp.path().join("real/0.log").exists());
    }

    #[test]
    fn reopening_makes_a_new_file_or_keeps_the_old_one() {
        let temp = tempfile::tempdir().unwrap();
        let (path, rotated) = (temp.path().join("0.log"), temp.path().join("0.log.1"));
        let mut log = Log::open(at(temp.path(), "0.log")).unwrap();
        fs::rename(&path, &rotated).unwrap();
        log.write(&Stamp::new(), b"old\n");
        log.reopen().unwrap();
        log.write(&Stamp::new(), b"new\n");
        assert_eq!(
            (fs::read(&rotated).unwrap(), fs::read(&path).unwrap()),
            (b"old\n".to_vec(), b"new\n".to_vec())
        );

        fs::rename(&path, &rotated).unwrap();
        fs::create_dir(&path).unwrap();
        log.reopen().unwrap_err();
        log.write(&Stamp::new(), b"more\n");
        assert_eq!(fs::read(&rotated).unwrap(), b"new\nmore\n");
    }

    impl Log {
        /// From now on there is no room, until the next reopening.
        pub(in crate::stdio) fn fill_up(&mut self) {
            self.file = File::options().append(true).open("/dev/full").unwrap();
        }
    }

    #[test]
    fn what_has_no_room_is_dropped_and_noted() {
        let temp = tempfile::tempdir().unwrap();
        let mut log = Log::open(at(temp.path(), "0.log")).unwrap();
        log.fill_up();
        let stamp = Stamp::new();
        log.write(&stamp, b"one\ntwo\n");
        log.write(&stamp, b"three\n");
        log.reopen().unwrap();
        log.write(&stamp, b"four\n");
        log.write(&stamp, b"five\n");
        let expected = "1970-01-01T00:00:00.000000000Z stderr F ocid: 3 lines dropped: \
                        No space left on device (os error 28)\nfour\nfive\n";
        assert_eq!(fs::read_to_string(temp.path().join("0.log")).unwrap(), expected);
    }

    #[test]
    fn a_record_that_does_not_fit_leaves_no_torn_end() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("0.log");
        fs::write(&path, "old\nwhole\nto").unwrap();
        cut(&File::options().append(true).open(&path).unwrap(), 2);
        assert_eq!(fs::read(&path).unwrap(), b"old\nwhole\n");
    }
}
