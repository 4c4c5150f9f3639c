//! How fast a container can write: lines of 100 bytes through the runtime into a CRI log, and through `cat` into a file
//! on the same file system.
//!
//! The writer is busybox's `cat` of a file in memory, in the container and before `cat` alike: next to nothing.

use std::fs::{self, File};
use std::io::{BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::client::{Client, container};
use harness::process::runs;
use harness::{BUSYBOX, Node};
use nix::sys::stat::Mode;
use ocid_api::cri::{Mount, PodSandboxConfig};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::cost::cpu_s;

const LINE_BYTES: u64 = 100;
/// Bytes of the file that is written again and again.
const FILE_BYTES: u64 = 16_000_000;
/// A log that has not grown for so long is complete.
const QUIET: Duration = Duration::from_millis(100);
const DEADLINE: Duration = Duration::from_secs(300);

/// What one writer saw.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flow {
    /// Of the writer's bytes, not of the log's.
    pub(crate) mb_per_s: f64,
    /// Of the processes between writer and file.
    pub(crate) cpu_s_per_gb: f64,
}

/// The directory that is mounted into the writers.
#[derive(Debug)]
pub(crate) struct Stage {
    dir: PathBuf,
    times: u64,
    /// Open for both, so that neither end of a fifo ever waits for the other to be opened.
    go: File,
}

impl Stage {
    pub(crate) fn new(node: &Node, bytes: u64) -> Stage {
        let dir = node.path().join("stage");
        fs::create_dir_all(&dir).unwrap();
        let mut file = BufWriter::new(File::create(dir.join("lines")).unwrap());
        for number in 0..FILE_BYTES / LINE_BYTES {
            writeln!(file, "{number:099}").unwrap();
        }
        file.flush().unwrap();
        for fifo in ["go", "done"] {
            nix::unistd::mkfifo(&dir.join(fifo), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        }
        let go = File::options().read(true).write(true).open(dir.join("go")).unwrap();
        Stage { dir, times: bytes.div_ceil(FILE_BYTES), go }
    }

    fn bytes(&self, part: u64) -> u64 {
        self.times.div_ceil(part) * FILE_BYTES
    }

    fn files(&self, dir: &str, part: u64) -> String {
        vec![format!("{dir}/lines"); usize::try_from(self.times.div_ceil(part)).unwrap()].join(" ")
    }

    /// `cat` from a pipe to a file.
    pub(crate) fn cat(&self, node: &Node) -> Flow {
        let to = node.log_dir().join("cat");
        let mut writer = Command::new("busybox");
        writer.arg("cat").args(self.files(self.dir.to_str().unwrap(), 1).split(' '));
        let begun = Instant::now();
        let mut writer = writer.stdout(Stdio::piped()).spawn().unwrap();
        let pipe = writer.stdout.take().unwrap();
        let mut reader = Command::new("cat").stdin(pipe).stdout(File::create(&to).unwrap()).spawn().unwrap();
        let mut used = 0.0;
        writer.wait().unwrap();
        while runs(reader.id()) {
            used = cpu_s(&[reader.id()]);
            std::thread::sleep(Duration::from_millis(1));
        }
        let took = begun.elapsed();
        assert!(reader.wait().unwrap().success());
        assert_eq!(to.metadata().unwrap().len(), self.bytes(1));
        fs::remove_file(to).unwrap();
        self.flow(1, took, used)
    }

    fn flow(&self, part: u64, took: Duration, used: f64) -> Flow {
        let bytes = self.bytes(part) as f64;
        Flow { mb_per_s: bytes / 1e6 / took.as_secs_f64(), cpu_s_per_gb: used / (bytes / 1e9) }
    }

    /// A pod whose container waits to be let go and then writes a `part`th of the bytes.
    pub(crate) async fn writer(&self, client: &Client, pod: &PodSandboxConfig, part: u64) -> Writer<'_> {
        let script = format!("read x < /stage/go; cat {}; echo > /stage/done", self.files("/stage", part));
        let mut config = container("writer", BUSYBOX, &["sh", "-c", &script]);
        config.mounts = vec![Mount {
            container_path: "/stage".into(),
            host_path: self.dir.display().to_string(),
            ..Default::default()
        }];
        let id = client.run_pod(pod).await.unwrap();
        client.run(&id, &config, pod).await.unwrap();
        let log = Path::new(&pod.log_directory).join("writer/0.log");
        Writer { stage: self, part, pod: id, log }
    }
}

/// A container that waits to write.
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    stage: &'a Stage,
    part: u64,
    /// Its pod.
    pub(crate) pod: String,
    log: PathBuf,
}

impl Writer<'_> {
    fn go(&self) {
        (&self.stage.go).write_all(b"\n").unwrap();
    }

    fn len(&self) -> u64 {
        self.log.metadata().map_or(0, |meta| meta.len())
    }

    /// Lets it go and waits until the log is complete. `between` are the processes between writer and file.
    pub(crate) async fn write(&self, between: &[u32]) -> Flow {
        let path = self.stage.dir.join("done");
        let mut done = pipe::OpenOptions::new().read_write(true).open_receiver(path).unwrap();
        let before = cpu_s(between);
        let begun = Instant::now();
        self.go();
        let mut byte = [0];
        tokio::time::timeout(DEADLINE, done.read_exact(&mut byte))
            .await
            .expect("it writes for ever")
            .unwrap();
        let mut took = begun.elapsed();
        let mut len = self.len();
        while begun.elapsed() - took < QUIET {
            tokio::time::sleep(Duration::from_millis(2)).await;
            if self.len() != len {
                (len, took) = (self.len(), begun.elapsed());
            }
        }
        let used = cpu_s(between) - before;
        let written = self.stage.bytes(self.part) / LINE_BYTES;
        assert_eq!(lines(&self.log), written, "lines of {written} are in the log");
        fs::remove_file(&self.log).unwrap();
        self.stage.flow(self.part, took, used)
    }

    /// Lets it go and says how much of its log is there after this time, in MB per second.
    pub(crate) async fn write_for(&self, time: Duration) -> f64 {
        self.go();
        tokio::time::sleep(time).await;
        self.len() as f64 / 1e6 / time.as_secs_f64()
    }
}

fn lines(path: &Path) -> u64 {
    let mut file = File::open(path).unwrap();
    let mut buffer = vec![0; 1 << 20];
    let mut count = 0;
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return count,
            read => count += buffer[..read].iter().map(|byte| u64::from(*byte == b'\n')).sum::<u64>(),
        }
    }
}
