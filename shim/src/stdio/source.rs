//! Where a process's output comes from: our end of a pipe, or the master of its terminal.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::unix::AsyncFd;

use crate::os;

/// A non-blocking descriptor that is read.
#[derive(Debug)]
pub(super) struct Source {
    fd: AsyncFd<OwnedFd>,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Pipe,
    Terminal,
}

/// What one read found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    /// This many bytes.
    Data(usize),
    /// Nothing for now.
    Empty,
    /// Nothing ever again.
    Ended,
}

impl Source {
    /// A pipe: our end, and the one for the process.
    pub(super) fn pipe() -> io::Result<(Source, OwnedFd)> {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        set_nonblocking(&ours)?; // ours only: the flag would surprise the process
        Ok((Source { fd: os::watch_readable(ours)?, kind: Kind::Pipe }, theirs))
    }

    /// The master of a terminal.
    pub(super) fn terminal(master: OwnedFd) -> io::Result<Source> {
        set_nonblocking(&master)?;
        Ok(Source { fd: os::watch_readable(master)?, kind: Kind::Terminal })
    }

    /// Waits until a read may find something. Cancel-safe.
    pub(super) async fn ready(&self) -> io::Result<Ready<'_>> {
        Ok(Ready { guard: self.fd.readable().await?, source: self })
    }

    /// Reads without waiting.
    pub(super) fn read(&self, buffer: &mut [u8]) -> Read {
        loop {
            return match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(0) => Read::Ended,
                Ok(len) => Read::Data(len),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Read::Empty,
                Err(_) => Read::Ended, // EIO: no process has the terminal open any more
            };
        }
    }

    /// Bytes that are in the pipe now.
    pub(super) fn waiting(&self) -> usize {
        rustix::io::ioctl_fionread(&self.fd).ok().and_then(|len| usize::try_from(len).ok()).unwrap_or(0)
    }

    /// Whether what a process has written is readable at once. The bytes of a terminal come by way of a kernel thread.
    pub(super) fn is_exact(&self) -> bool {
        self.kind == Kind::Pipe
    }
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A source that may have something to read.
pub(super) struct Ready<'a> {
    guard: tokio::io::unix::AsyncFdReadyGuard<'a, OwnedFd>,
    source: &'a Source,
}

impl Ready<'_> {
    /// Reads once, and remembers when there is nothing left.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Read {
        let read = self.source.read(buffer);
        match read {
            Read::Empty => self.guard.clear_ready(),
            // A short read has emptied the pipe: what comes next is a new event. A terminal gives less than it has.
            Read::Data(len) if len < buffer.len() && self.source.is_exact() => self.guard.clear_ready(),
            Read::Data(_) | Read::Ended => {}
        }
        read
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

/// The child's ends, for the command that starts the process. Our copies close with the command, or when
/// [`Process::spawn`](crate::process::Process::spawn) has run it.
#[derive(Debug)]
pub struct ChildEnds {
    /// Input.
    pub stdin: std::process::Stdio,
    /// Output.
    pub stdout: std::process::Stdio,
    /// Errors.
    pub stderr: std::process::Stdio,
}

impl ChildEnds {
    /// Nothing at all: for the runtime when the process gets a terminal.
    pub(super) fn null() -> ChildEnds {
        use std::process::Stdio;
        ChildEnds { stdin: Stdio::null(), stdout: Stdio::null(), stderr: Stdio::null() }
    }

    /// Gives them to a command.
    pub fn give_to(self, command: &mut std::process::Command) {
        command.stdin(self.stdin).stdout(self.stdout).stderr(self.stderr);
    }
}

/// A pipe into the process: the end for it, and ours, which does not block.
pub(super) fn input() -> io::Result<(OwnedFd, File)> {
    let (theirs, ours) = pipe_with(PipeFlags::CLOEXEC)?;
    set_nonblocking(&ours)?;
    Ok((theirs, File::from(ours)))
}
