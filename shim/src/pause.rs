//! Pid 1 of a pod that shares its pid namespace: collects orphans, ends when it is told to.
//!
//! The namespace ends with it, and with the namespace everything in it.
//!
//! The pod's containers see it, and one that may trace others can look through its /proc entries and make it do
//! anything. So before a container can be there it has given up all that is the host's: it sees an empty root, lives in
//! the pod's other namespaces, holds no descriptor and no privilege, and nobody without CAP_SYS_PTRACE gets near it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{WaitId, WaitIdOptions, chdir, pivot_root, waitid};
use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::error::{Context as _, Error, Result};

/// Somebody who owns nothing: what pause images run as.
const NOBODY: u32 = 65535;

/// Serves until SIGTERM or SIGINT. `pinned` is where the pid namespace will be, beside the pod's others. Says ready on
/// stdout when nothing of the host is left in this process.
///
/// # Errors
/// If something of the host could not be given up, nobody waits for us, or signals cannot be waited for.
pub fn run(pinned: &Path) -> Result<()> {
    let _ = crate::os::set_name("ocid-pause");
    let dir = pinned.parent().ok_or_else(|| Error::invalid("the namespace has no directory"))?;
    join(dir).context(|| "join the pod's namespaces".to_owned())?;
    see_nothing(dir).context(|| "leave the host's files".to_owned())?;
    give_up_privileges().context(|| "give up privileges".to_owned())?;
    crate::os::forbid_dumps().context(|| "forbid tracing".to_owned())?;
    // Nothing but the shim keeps a pod alive: whoever kills the shim ends what shares this namespace. Set last, for a
    // change of user unsets it; and if the shim was killed before, nobody reads that we are ready.
    prctl::set_death_signal(libc::SIGKILL as isize)
        .map_err(io::Error::from_raw_os_error)
        .context(|| "end with the shim".to_owned())?;
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block().context(|| "block signals".to_owned())?;
    rustix::io::write(io::stdout().as_fd(), b"1").context(|| "say ready".to_owned())?;
    rustix::stdio::dup2_stdout(io::stdin()).context(|| "close stdout".to_owned())?;
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

/// Enters those namespaces that the pod has of its own.
fn join(dir: &Path) -> io::Result<()> {
    for (name, flag) in [
        ("net", CloneFlags::CLONE_NEWNET),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
    ] {
        match File::open(dir.join(name)) {
            Ok(namespace) => setns(namespace, flag)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Makes the root an empty directory that nobody can write, in a mount namespace with nothing else in it.
fn see_nothing(dir: &Path) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(c"none", dir, c"tmpfs", flags, c"mode=555,nr_inodes=1,size=4k")?;
    chdir(dir)?;
    pivot_root(".", ".")?; // the old root lies on top of the new one, and is taken off
    unmount(".", UnmountFlags::DETACH)?;
    Ok(chdir("/")?)
}

/// A change from root to another user clears every capability.
fn give_up_privileges() -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    Ok(set_thread_res_uid(uid, uid, uid)?)
}
