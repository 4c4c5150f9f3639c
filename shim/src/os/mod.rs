//! What the kernel offers and no safe library wraps: the only module of the shim with `unsafe`.
//!
//! Each function does one thing to this process or to a descriptor it is given. No policy lives here, no state but the
//! one limit that `inherit` must remember for our children.

#![allow(unsafe_code)]

mod inherit;
mod pages;

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub use inherit::{Inheritance, reset_inherited, with_children_limits};
pub(crate) use pages::Pages;

/// Makes orphaned descendants ours: a container's init becomes our child when the runtime that made it exits.
///
/// # Errors
/// If the kernel refuses.
pub fn become_subreaper() -> io::Result<()> {
    prctl::set_child_subreaper(true).map_err(io::Error::from_raw_os_error)
}

/// No core dump, no ptrace and no `/proc/self/{mem,environ,fd}` for anybody but root: pods' output passes through us.
///
/// # Errors
/// If the kernel refuses.
pub fn forbid_dumps() -> io::Result<()> {
    prctl::set_dumpable(false).map_err(io::Error::from_raw_os_error)
}

/// Sets the name that `ps` and `top` show. The kernel keeps the first 15 bytes.
///
/// # Errors
/// If the name holds a zero byte, or the kernel refuses.
pub fn set_name(name: &str) -> io::Result<()> {
    if name.contains('\0') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a process name cannot hold a zero byte"));
    }
    prctl::set_name(name).map_err(io::Error::from_raw_os_error)
}

/// Registers a descriptor with the runtime, to wait until it can be read.
///
/// # Errors
/// If the kernel refuses. Outside of a runtime it panics.
pub(crate) fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names one open descriptor for all its life, and the `AsyncFd` owns it until it is
    // deregistered.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// Sends any signal, the real-time ones included, to the process behind a pidfd.
///
/// # Errors
/// `ESRCH` if it has been reaped, `EINVAL` if there is no such signal.
pub(crate) fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as the borrow; a null siginfo is allowed and means "as kill(2)".
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
