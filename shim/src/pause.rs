//! Pid 1 of a pod that shares its pid namespace: collects orphans, ends when it is told to.
//!
//! The namespace ends with it, and with the namespace everything in it.

use nix::sys::signal::{SigSet, Signal};
use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::error::{Context as _, Result};

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// If signals cannot be waited for.
pub fn run() -> Result<()> {
    // Nothing but the shim keeps a pod alive: whoever kills the shim ends what shares this namespace.
    let _ = prctl::set_death_signal(libc::SIGKILL as isize);
    let _ = crate::os::set_name("ocid-pause");
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block().context(|| "block signals".to_owned())?;
    loop {
        // One signal may stand for many children, some from before we looked.
        let any = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        while matches!(waitid(WaitId::All, any), Ok(Some(_))) {}
        match signals.wait().context(|| "wait for a signal".to_owned())? {
            Signal::SIGCHLD => {}
            _ => return Ok(()),
        }
    }
}
