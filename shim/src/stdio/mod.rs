//! Wires one process to its log and, while they are attached, to its clients.
//!
//! ```text
//!            ┌ pipe or terminal ─▶ batch ─▶ encoder ─▶ log file
//! process ◀──┤                       └───▶ attached clients, later: a slow one is dropped, never waited for
//!            └ stdin pipe ◀── kept open here until a client closes it
//! ```
//!
//! One task per process reads until the end of output. Reading stops for nothing: not for a full disk, not for an absent
//! log, not for the exit. [`Stdio::drained`] answers when all that was written before it was called is in the log.
//!
//! Never holds a buffer while nothing comes, but for a line that has begun.

mod batch;
mod capture;
mod console;
mod cri_log;
mod log;
mod source;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::termios::{Winsize, tcsetwinsize};
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub use capture::{Capture, Chunk};
pub use console::ConsoleSocket;
pub use cri_log::Stream;
pub use log::LogPath;
pub use source::ChildEnds;

use cri_log::{Encoder, Output, Stamp};
use log::Log;
use source::{Read, Source};

/// Batches of one process before the others get their turn.
const TURN: usize = 8;

/// How a process is wired.
#[derive(Debug, Clone, Default)]
pub struct Spec {
    /// Where its output goes; nowhere if `None`, and is read all the same.
    pub log: Option<LogPath>,
    /// It gets a terminal, by [`ConsoleSocket`] and [`Stdio::attach_console`].
    pub tty: bool,
    /// It gets an input that stays open; else it reads /dev/null. A terminal always has one.
    pub stdin: bool,
}

/// The wires of one process. Dropping it closes them.
#[derive(Debug)]
pub struct Stdio {
    shared: Arc<Shared>,
    ended: watch::Receiver<bool>,
    /// Taken by the task that reads.
    pump: Mutex<Pump>,
}

#[derive(Debug)]
enum Pump {
    /// A terminal that has not come yet.
    Waiting(watch::Sender<bool>),
    Running(JoinHandle<()>),
}

#[derive(Debug)]
struct Shared {
    sink: Mutex<Sink>,
    sources: Mutex<[Option<Arc<Source>>; 2]>,
    /// Our end of the process's input, for who attaches.
    stdin: Mutex<Option<File>>,
}

/// Where output goes, and the unfinished lines.
#[derive(Debug)]
struct Sink {
    log: Option<Log>,
    stamp: Stamp,
    encoders: [Encoder; 2],
}

impl Stdio {
    /// Opens the log and makes the pipes. To be called on the runtime's thread.
    ///
    /// # Errors
    /// If the log path is refused or cannot be opened, or descriptors run out. Then nothing is left but directories.
    pub fn new(spec: &Spec) -> io::Result<(Stdio, ChildEnds)> {
        batch::with(|_| ())?; // from here on the buffers are there
        let sink = Sink {
            log: spec.log.clone().map(Log::open).transpose()?,
            stamp: Stamp::new(),
            encoders: [Encoder::new(Stream::Stdout), Encoder::new(Stream::Stderr)],
        };
        let mut ends = ChildEnds::null();
        let mut sources = [None, None];
        let mut input = None;
        if !spec.tty {
            let (stdout, theirs) = Source::pipe()?;
            ends.stdout = theirs.into();
            let (stderr, theirs) = Source::pipe()?;
            ends.stderr = theirs.into();
            sources = [Some(Arc::new(stdout)), Some(Arc::new(stderr))];
            if spec.stdin {
                let (theirs, ours) = source::input()?;
                ends.stdin = theirs.into();
                input = Some(ours);
            }
        }
        let shared = Arc::new(Shared {
            sink: Mutex::new(sink),
            sources: Mutex::new(sources),
            stdin: Mutex::new(input),
        });
        let (end, ended) = watch::channel(false);
        let pump = if spec.tty { Pump::Waiting(end) } else { Pump::start(&shared, end) };
        Ok((Stdio { shared, ended, pump: Mutex::new(pump) }, ends))
    }

    /// Takes the terminal that the runtime has made. Its output is `stdout`.
    ///
    /// # Errors
    /// If there is one already, or none was wanted.
    pub fn attach_console(&self, master: OwnedFd) -> io::Result<()> {
        let mut pump = lock(&self.pump);
        let Pump::Waiting(end) = &*pump else {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the process has its output already"));
        };
        let input = File::from(master.try_clone()?);
        lock(&self.shared.sources)[0] = Some(Arc::new(Source::terminal(master)?));
        *lock(&self.shared.stdin) = Some(input);
        *pump = Pump::start(&self.shared, end.clone());
        Ok(())
    }

    /// Sets the size of the terminal; the kernel tells the process by SIGWINCH.
    ///
    /// # Errors
    /// If the process has no terminal, or none any more.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        let terminal = lock(&self.shared.sources)[0].clone().filter(|source| !source.is_exact());
        let terminal = terminal.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no terminal"))?;
        tcsetwinsize(&*terminal, Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 })?;
        Ok(())
    }

    /// Takes our end of the input, which does not block: dropping it is the process's end of input. Once only, and
    /// `None` if it has no input.
    pub fn take_stdin(&self) -> Option<File> {
        lock(&self.shared.stdin).take()
    }

    /// Opens the log file anew, somebody having renamed it.
    ///
    /// # Errors
    /// If it cannot be opened. Then no new file exists and the old one is still written.
    pub fn reopen_log(&self) -> io::Result<()> {
        lock(&self.shared.sink).log.as_mut().map_or(Ok(()), Log::reopen)
    }

    /// Whether all output has ended: nobody can write any more.
    pub fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// To be called after the exit. Returns when all that has been written until now is in the log, the unfinished line
    /// included. Output of descendants that live on is read on in the background and delays nobody.
    ///
    /// `at_most` is for a terminal, whose bytes come to us with a delay of the kernel's; pipes need no time.
    pub async fn drained(&self, at_most: Duration) {
        let sources = lock(&self.shared.sources).clone();
        if sources.iter().flatten().any(|source| !source.is_exact()) {
            let mut ended = self.ended.clone();
            let _ = tokio::time::timeout(at_most, ended.wait_for(|ended| *ended)).await;
        }
        for (stream, source) in sources.iter().enumerate() {
            if let Some(source) = source {
                self.shared.drain(stream, source).await;
            }
        }
        self.shared.settle();
    }
}

impl Drop for Stdio {
    fn drop(&mut self) {
        if let Pump::Running(task) = &*lock(&self.pump) {
            task.abort();
        }
    }
}

impl Pump {
    fn start(shared: &Arc<Shared>, end: watch::Sender<bool>) -> Pump {
        let shared = Arc::clone(shared);
        Pump::Running(tokio::spawn(async move {
            shared.pump().await;
            batch::release(Duration::ZERO); // who still uses it only has to fault a page in
            end.send_replace(true);
        }))
    }
}

impl Shared {
    /// Moves output to the log until there is no more.
    async fn pump(&self) {
        let mut sources = lock(&self.sources).clone();
        let mut batches = 0;
        while sources.iter().any(Option::is_some) {
            let (stream, read) = tokio::select! {
                ready = ready(sources[0].as_deref()) => (0, self.read_ready(0, ready)),
                ready = ready(sources[1].as_deref()) => (1, self.read_ready(1, ready)),
                () = tokio::time::sleep(batch::IDLE), if batch::is_held() => {
                    batch::release(batch::IDLE);
                    continue;
                }
            };
            if read == Read::Ended {
                self.end(stream);
                sources[stream] = None;
            }
            batches += 1;
            if batches % TURN == 0 {
                tokio::task::yield_now().await;
            }
        }
    }

    fn read_ready(&self, stream: usize, ready: io::Result<source::Ready<'_>>) -> Read {
        match ready {
            Ok(mut ready) => self.transfer(stream, batch::READ_MAX, |buffer| ready.read(buffer)),
            Err(_) => Read::Ended, // only if the runtime is going away
        }
    }

    /// Reads what has been written until now, and the end if it is there.
    async fn drain(&self, stream: usize, source: &Source) {
        let mut waiting = source.waiting();
        loop {
            match self.transfer(stream, waiting.clamp(1, batch::READ_MAX), |buffer| source.read(buffer)) {
                Read::Data(len) if len < waiting => waiting -= len,
                Read::Data(_) if waiting > 0 => waiting = 0, // once more: is it the end?
                Read::Data(_) | Read::Empty => return,
                Read::Ended => return self.end(stream),
            }
            tokio::task::yield_now().await;
        }
    }

    /// One batch: read once, encode, write.
    fn transfer(&self, stream: usize, at_most: usize, read: impl FnOnce(&mut [u8]) -> Read) -> Read {
        let moved = batch::with(|batch| {
            let read = read(&mut batch.input[..at_most]);
            if let Read::Data(len) = read {
                // The place for attached clients: they get these bytes as they are.
                lock(&self.sink).write(stream, &batch.input[..len], &mut Output::new(&mut batch.output));
            }
            read
        });
        moved.unwrap_or(Read::Ended) // cannot be: `new` has made the buffers
    }

    /// A stream has no more output.
    fn end(&self, stream: usize) {
        lock(&self.sources)[stream] = None;
        let _ = batch::with(|batch| lock(&self.sink).end(stream, &mut Output::new(&mut batch.output)));
    }

    /// Shows what is unfinished.
    fn settle(&self) {
        let _ = batch::with(|batch| lock(&self.sink).flush(&mut Output::new(&mut batch.output)));
    }
}

/// Waits for a source to be readable; for ever if there is none.
async fn ready(source: Option<&Source>) -> io::Result<source::Ready<'_>> {
    match source {
        Some(source) => source.ready().await,
        None => std::future::pending().await,
    }
}

impl Sink {
    fn write(&mut self, stream: usize, mut input: &[u8], output: &mut Output<'_>) {
        let Some(log) = &mut self.log else { return };
        self.stamp.set(SystemTime::now());
        while !input.is_empty() {
            input = self.encoders[stream].encode(&self.stamp, input, output);
            log.write(&self.stamp, output.filled());
            output.clear();
        }
    }

    fn end(&mut self, stream: usize, output: &mut Output<'_>) {
        let Some(log) = &mut self.log else { return };
        self.stamp.set(SystemTime::now());
        self.encoders[stream].finish(&self.stamp, output);
        log.write(&self.stamp, output.filled());
    }

    fn flush(&mut self, output: &mut Output<'_>) {
        let Some(log) = &mut self.log else { return };
        self.stamp.set(SystemTime::now());
        for encoder in &mut self.encoders {
            encoder.flush(&self.stamp, output);
        }
        log.write(&self.stamp, output.filled());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::path::Path;
    use std::process::Command;

    use super::*;
    use crate::process::Process;

    fn log_in(directory: &Path) -> Option<LogPath> {
        Some(LogPath { directory: directory.to_owned(), path: "0.log".into() })
    }

    fn start(spec: &Spec, script: &str) -> (Process, Stdio) {
        let (stdio, ends) = Stdio::new(spec).unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        ends.give_to(&mut command);
        (Process::spawn(&mut command).unwrap(), stdio)
    }

    /// What is in the log, without times.
    fn read(directory: &Path) -> Vec<String> {
        let log = fs::read_to_string(directory.join("0.log")).unwrap();
        log.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }

    #[tokio::test]
    async fn all_that_was_written_before_the_exit_is_in_the_log() {
        let temp = tempfile::tempdir().unwrap();
        let spec = Spec { log: log_in(temp.path()), ..Spec::default() };
        let (process, stdio) = start(&spec, "seq 100000; printf end; echo bad >&2");
        process.wait().await.unwrap();
        stdio.drained(Duration::ZERO).await;
        let log = read(temp.path());
        let of = |stream: &str| {
            log.iter().filter_map(|line| line.strip_prefix(stream)).map(str::to_owned).collect()
        };
        let stdout: Vec<String> = of("stdout F ");
        assert_eq!(stdout.len(), 100_001);
        assert!((0..100_000).all(|line| stdout[line] == (line + 1).to_string()));
        assert_eq!(stdout[100_000], "end");
        assert_eq!(of("stderr F "), ["bad"]);
        assert_eq!(log.len(), 100_002);
    }

    #[tokio::test]
    async fn a_descendant_that_holds_the_output_delays_nobody_and_is_still_logged() {
        let temp = tempfile::tempdir().unwrap();
        let spec = Spec { log: log_in(temp.path()), stdin: true, ..Spec::default() };
        let (process, stdio) = start(&spec, "exec 3<&0; printf mine; (read go <&3; echo theirs) &");
        process.wait().await.unwrap();
        stdio.drained(Duration::ZERO).await;
        assert_eq!(read(temp.path()), ["stdout P mine"], "at once, and open to go on");
        drop(stdio.take_stdin());
        stdio.ended.clone().wait_for(|ended| *ended).await.unwrap();
        assert_eq!(read(temp.path()), ["stdout P mine", "stdout F theirs"]);
    }

    #[tokio::test]
    async fn a_descendant_that_floods_delays_nobody() {
        let temp = tempfile::tempdir().unwrap();
        let spec = Spec { log: log_in(temp.path()), ..Spec::default() };
        let (process, stdio) = start(&spec, "echo first; (exec timeout 10 yes) &");
        process.wait().await.unwrap();
        tokio::time::timeout(Duration::from_secs(5), stdio.drained(Duration::ZERO)).await.unwrap();
        assert_eq!(read(temp.path())[0], "stdout F first");
        drop(stdio); // the flood ends by SIGPIPE
    }

    #[tokio::test]
    async fn without_a_log_output_is_read_and_dropped() {
        let (process, stdio) = start(&Spec::default(), "seq 100000");
        assert_eq!(process.wait().await.unwrap().code, 0);
        stdio.drained(Duration::ZERO).await;
        stdio.reopen_log().unwrap();
    }

    #[tokio::test]
    async fn a_full_disk_stops_nobody() {
        let temp = tempfile::tempdir().unwrap();
        let spec = Spec { log: log_in(temp.path()), ..Spec::default() };
        let (process, stdio) = start(&spec, "read go; seq 100000 >&2");
        drop(process); // has no input: it goes on at once
        lock(&stdio.shared.sink).log.as_mut().unwrap().fill_up();
        stdio.ended.clone().wait_for(|ended| *ended).await.unwrap();
        stdio.reopen_log().unwrap();
        stdio.drained(Duration::ZERO).await;
        let log = read(temp.path());
        assert_eq!(log, ["stderr F ocid: 100000 lines dropped: No space left on device (os error 28)"]);
    }

    #[tokio::test]
    async fn input_stays_open_until_it_is_dropped() {
        let temp = tempfile::tempdir().unwrap();
        let spec = Spec { log: log_in(temp.path()), stdin: true, ..Spec::default() };
        let (process, stdio) = start(&spec, "exec cat");
        let open = tokio::time::timeout(Duration::from_millis(50), process.wait()).await;
        assert!(open.is_err(), "cat waits");
        let mut input = stdio.take_stdin().unwrap();
        assert!(stdio.take_stdin().is_none());
        input.write_all(b"typed\n").unwrap();
        drop(input);
        assert_eq!(process.wait().await.unwrap().code, 0);
        stdio.drained(Duration::ZERO).await;
        assert_eq!(read(temp.path()), ["stdout F typed"]);
    }

    #[tokio::test]
    async fn a_log_that_is_refused_opens_nothing() {
        let log = Some(LogPath { directory: "/tmp".into(), path: "../x".into() });
        assert_eq!(
            Stdio::new(&Spec { log, ..Spec::default() }).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }

    #[tokio::test]
    async fn a_terminal_is_logged_as_stdout_and_can_be_resized() {
        let temp = tempfile::tempdir().unwrap();
        let spec = Spec { log: log_in(temp.path()), tty: true, stdin: false };
        let (stdio, _ends) = Stdio::new(&spec).unwrap();
        assert!(stdio.resize(80, 24).is_err(), "not yet");

        let socket = ConsoleSocket::listen(&temp.path().join("tty.sock")).unwrap();
        let (slave, sender) = console::tests::runtime(socket.path());
        stdio.attach_console(socket.receive(Duration::from_secs(5)).await.unwrap()).unwrap();
        sender.join().unwrap();

        stdio.resize(91, 33).unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "stty size; echo to-stderr >&2; read line; echo got $line"]);
        command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
        let process = Process::spawn(&mut command).unwrap();
        stdio.take_stdin().unwrap().write_all(b"typed\n").unwrap();
        assert_eq!(process.wait().await.unwrap().code, 0);
        stdio.drained(Duration::from_secs(5)).await;
        let mut log = read(temp.path());
        log.retain(|line| line != "stdout F typed"); // the echo comes when it comes
        assert_eq!(log, ["stdout F 33 91", "stdout F to-stderr", "stdout F got typed"]);
    }

    #[tokio::test]
    async fn the_buffers_are_given_back_when_nothing_comes() {
        let spec = Spec { stdin: true, ..Spec::default() };
        let (process, stdio) = start(&spec, "echo; exec cat");
        assert!(batch::is_held());
        let idle = async {
            while batch::is_held() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(batch::IDLE * 20, idle).await.expect("only the reading task gives them back");
        drop(stdio);
        process.wait().await.unwrap();
    }
}
