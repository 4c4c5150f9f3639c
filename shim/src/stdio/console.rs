//! Receives a terminal from the runtime, which makes it inside the container.
//!
//! The runtime connects to a Unix socket and sends the master as a message of ancillary data. The socket lives in a
//! private directory, serves one connection and is removed with this value.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

/// Longest name that the runtime may send with the terminal; it is ignored.
const NAME_MAX: usize = 4096;

/// A socket that waits for one terminal.
#[derive(Debug)]
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Listens at a path in a directory that only we may enter. What a crash has left there is replaced.
    ///
    /// # Errors
    /// If it cannot be made; a path longer than 107 bytes is one reason.
    pub fn listen(path: &Path) -> io::Result<ConsoleSocket> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        Ok(ConsoleSocket { listener: UnixListener::bind(path)?, path: path.to_owned() })
    }

    /// Where it is, for the runtime's command line.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the terminal's master.
    ///
    /// # Errors
    /// `TimedOut` if the runtime does not send it in time, `InvalidData` if it sends anything else.
    pub async fn receive(&self, at_most: Duration) -> io::Result<OwnedFd> {
        let master = tokio::time::timeout(at_most, async {
            let (stream, _) = self.listener.accept().await?;
            stream.async_io(Interest::READABLE, || receive_fd(&stream)).await
        });
        let master = master.await.map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                "the runtime did not send the container's terminal in time",
            )
        })??;
        if rustix::termios::isatty(&master) {
            Ok(master)
        } else {
            Err(io::Error::new(io::ErrorKind::InvalidData, "what the runtime sent is no terminal"))
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One message with one descriptor. More of them than one are closed by the kernel for lack of room.
fn receive_fd(stream: &UnixStream) -> io::Result<OwnedFd> {
    let mut name = [0; NAME_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(stream, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let received = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    received.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the runtime sent no terminal"))
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::IoSlice;
    use std::os::fd::AsFd as _;
    use std::thread::JoinHandle;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};

    use super::*;

    /// Does what the runtime does: makes a terminal, sends its master and keeps the slave.
    pub(in crate::stdio) fn runtime(socket: &Path) -> (OwnedFd, JoinHandle<()>) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
        (slave, send(socket, Some(master)))
    }

    fn send(socket: &Path, fd: Option<OwnedFd>) -> JoinHandle<()> {
        let stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
        std::thread::spawn(move || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds: Vec<_> = fd.iter().map(|fd| fd.as_fd()).collect();
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&fds));
            }
            sendmsg(&stream, &[IoSlice::new(b"/dev/ptmx")], &mut control, SendFlags::empty()).unwrap();
        })
    }

    #[tokio::test]
    async fn only_a_terminal_is_taken() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("tty.sock");
        std::fs::write(&path, "left by a crash").unwrap();
        let socket = ConsoleSocket::listen(&path).unwrap();
        let (no_terminal, _) = std::io::pipe().unwrap();
        for sent in [None, Some(OwnedFd::from(no_terminal))] {
            let sender = send(&path, sent);
            let error = socket.receive(Duration::from_secs(5)).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            sender.join().unwrap();
        }
        drop(std::os::unix::net::UnixStream::connect(&path).unwrap());
        assert_eq!(
            socket.receive(Duration::from_secs(5)).await.unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_runtime_that_sends_nothing_is_not_waited_for() {
        let temp = tempfile::tempdir().unwrap();
        let socket = ConsoleSocket::listen(&temp.path().join("tty.sock")).unwrap();
        let _silent = std::os::unix::net::UnixStream::connect(socket.path()).unwrap();
        let error = socket.receive(Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
