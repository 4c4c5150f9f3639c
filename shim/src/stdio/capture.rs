//! Captures the output of a short process for a caller who wants it as data, not in a log.
//!
//! Reading stops for nothing. Each stream has a cap, after which its bytes are dropped, and a caller who does not take
//! what is offered for [`PATIENCE`] gets nothing more. So neither a chatty process nor a slow caller holds up the exit.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use super::batch;
use super::cri_log::Stream;
use super::ready;
use super::source::{ChildEnds, Read, Ready, Source};

/// Chunks that wait for the caller.
const CHUNKS: usize = 4;
/// How long a caller may take for one chunk.
const PATIENCE: Duration = Duration::from_secs(2);

/// A piece of output, in order within its stream.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Where it was written.
    pub stream: Stream,
    /// At most 64 KiB.
    pub data: Vec<u8>,
}

/// The output of one process, read in the background. Dropping it stops the reading.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Capture {
    /// Makes the pipes. Of each stream, `bytes_max` bytes are handed over; the receiver ends when both streams have
    /// ended, or [`Capture::finish`] has been called and all before it is handed over.
    ///
    /// # Errors
    /// If descriptors run out.
    pub fn new(bytes_max: u64) -> io::Result<(Capture, ChildEnds, mpsc::Receiver<Chunk>)> {
        batch::with(|_| ())?; // from here on the buffers are there
        let (stdout, out) = Source::pipe()?;
        let (stderr, err) = Source::pipe()?;
        let ends = ChildEnds { stdout: out.into(), stderr: err.into(), ..ChildEnds::null() };
        let (caller, chunks) = mpsc::channel(CHUNKS);
        let stop = Arc::new(Notify::new());
        let reader = Reader { caller: Some(caller), left: [bytes_max; 2] };
        let task = tokio::spawn(reader.run([Some(stdout), Some(stderr)], Arc::clone(&stop)));
        Ok((Capture { stop, task }, ends, chunks))
    }

    /// To be called after the exit: hands over all that has been written until now, and stops. Does not wait for
    /// descendants that hold the output. The caller must go on receiving meanwhile.
    pub async fn finish(mut self) {
        self.stop.notify_one();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Reader {
    /// `None` once the caller has gone or is too slow.
    caller: Option<mpsc::Sender<Chunk>>,
    /// Bytes of each stream that may still be handed over.
    left: [u64; 2],
}

impl Reader {
    async fn run(mut self, mut sources: [Option<Source>; 2], stop: Arc<Notify>) {
        while sources.iter().any(Option::is_some) {
            let (stream, data) = tokio::select! {
                ready = ready(sources[0].as_ref()) => (0, read_ready(ready)),
                ready = ready(sources[1].as_ref()) => (1, read_ready(ready)),
                () = stop.notified() => break,
            };
            match data {
                Some(data) => self.hand_over(stream, data).await,
                None => sources[stream] = None,
            }
        }
        for (stream, source) in sources.iter().enumerate() {
            if let Some(source) = source {
                self.rest(stream, source).await;
            }
        }
        batch::release(Duration::ZERO);
    }

    /// What has been written until now, and nothing of what descendants still write.
    async fn rest(&mut self, stream: usize, source: &Source) {
        let mut waiting = source.waiting();
        while waiting > 0 {
            match read(|buffer| source.read(&mut buffer[..waiting.min(batch::READ_MAX)])) {
                Some(data) if !data.is_empty() => {
                    waiting -= data.len();
                    self.hand_over(stream, data).await;
                }
                _ => return,
            }
        }
    }

    async fn hand_over(&mut self, stream: usize, mut data: Vec<u8>) {
        data.truncate(usize::try_from(self.left[stream]).unwrap_or(usize::MAX));
        self.left[stream] -= data.len() as u64;
        let Some(caller) = self.caller.as_ref().filter(|_| !data.is_empty()) else {
            // What is dropped waits for nobody, so the other tasks must get their turn here.
            return tokio::task::yield_now().await;
        };
        let chunk = Chunk { stream: if stream == 0 { Stream::Stdout } else { Stream::Stderr }, data };
        if caller.send_timeout(chunk, PATIENCE).await.is_err() {
            self.caller = None;
        }
    }
}

/// Reads once; `None` at the end, empty if there is nothing for now.
fn read(from: impl FnOnce(&mut [u8]) -> Read) -> Option<Vec<u8>> {
    let read = batch::with(|batch| match from(&mut batch.input) {
        Read::Data(len) => Some(batch.input[..len].to_vec()),
        Read::Empty => Some(Vec::new()),
        Read::Ended => None,
    });
    read.unwrap_or(None) // an error cannot be: `new` has made the buffers
}

fn read_ready(ready: io::Result<Ready<'_>>) -> Option<Vec<u8>> {
    let mut ready = ready.ok()?; // an error only if the runtime is going away
    read(|buffer| ready.read(buffer))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::process::Process;

    async fn collect(mut chunks: mpsc::Receiver<Chunk>) -> (Vec<u8>, Vec<u8>) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        while let Some(chunk) = chunks.recv().await {
            match chunk.stream {
                Stream::Stdout => out.extend(chunk.data),
                Stream::Stderr => err.extend(chunk.data),
            }
        }
        (out, err)
    }

    fn start(script: &str, bytes_max: u64) -> (Process, Capture, mpsc::Receiver<Chunk>) {
        let (capture, ends, chunks) = Capture::new(bytes_max).unwrap();
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        ends.give_to(&mut command);
        (Process::spawn(&mut command).unwrap(), capture, chunks)
    }

    #[tokio::test]
    async fn both_streams_are_handed_over_whole() {
        let (process, _capture, chunks) = start("seq 200000; echo bad >&2; exit 4", u64::MAX);
        let ((out, err), status) = tokio::join!(collect(chunks), process.wait());
        let expected: String = (1..=200_000).map(|number| format!("{number}\n")).collect();
        assert!(out == expected.as_bytes());
        assert_eq!((err.as_slice(), status.unwrap().code), (b"bad\n".as_slice(), 4));
    }

    #[tokio::test]
    async fn what_exceeds_the_cap_is_dropped_and_stops_nobody() {
        let (process, _capture, chunks) = start("seq 200000; echo bad >&2", 10);
        let ((out, err), status) = tokio::join!(collect(chunks), process.wait());
        assert_eq!((out.as_slice(), err.as_slice()), (b"1\n2\n3\n4\n5\n".as_slice(), b"bad\n".as_slice()));
        assert_eq!(status.unwrap().code, 0);
    }

    #[tokio::test]
    async fn a_caller_who_has_gone_stops_nobody() {
        let (process, _capture, chunks) = start("seq 200000", u64::MAX);
        drop(chunks);
        assert_eq!(process.wait().await.unwrap().code, 0);
    }

    #[tokio::test]
    async fn a_caller_who_takes_nothing_stops_nobody_for_long() {
        let (process, _capture, _chunks) = start("seq 200000", u64::MAX);
        let status = tokio::time::timeout(PATIENCE * 2, process.wait()).await;
        assert_eq!(status.unwrap().unwrap().code, 0);
    }

    #[tokio::test]
    async fn a_descendant_that_holds_the_output_is_not_waited_for() {
        let (process, capture, chunks) = start("echo mine; sleep 60 & echo $! >&2", u64::MAX);
        process.wait().await.unwrap();
        let ((out, err), ()) = tokio::join!(collect(chunks), capture.finish());
        assert_eq!(out, b"mine\n");
        let sleeper: i32 = String::from_utf8(err).unwrap().trim().parse().unwrap();
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(sleeper).unwrap(),
            rustix::process::Signal::KILL,
        )
        .unwrap();
    }
}
