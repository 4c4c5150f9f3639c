//! What only the operating system's bare interface gives; the daemon's only `unsafe` code.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

/// Descriptors that a service manager passes begin here: sd_listen_fds(3).
const FIRST_PASSED: RawFd = 3;

/// The listening socket that systemd passed to this process, if it passed one. Gives it once.
///
/// # Errors
/// If it passed more than one, or something that is no descriptor.
pub fn passed_listener() -> io::Result<Option<UnixListener>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let for_us =
        std::env::var("LISTEN_PID").ok().and_then(|pid| pid.parse().ok()) == Some(std::process::id());
    let count = std::env::var("LISTEN_FDS").ok().and_then(|n| n.parse::<u32>().ok()).unwrap_or_default();
    match (for_us, count) {
        (false, _) | (_, 0) => return Ok(None),
        (true, 1) => {}
        (true, n) => return Err(io::Error::other(format!("{n} sockets were passed, one is expected"))),
    }
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(None);
    }
    // SAFETY: the service manager gave this descriptor to this very process (LISTEN_PID) and to nobody else in it; the
    // flag above makes us take it once. Nothing else in the daemon opens descriptors by number.
    let fd = unsafe { OwnedFd::from_raw_fd(FIRST_PASSED) };
    // It came without close-on-exec, and must not reach what we run.
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(Some(UnixListener::from(fd)))
}
