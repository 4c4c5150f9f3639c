//! Begins early what the runtime would wait for.
//!
//! The kernel lets a process be moved into a cgroup only after every processor has passed through the scheduler, since
//! from then on each fork must look whether it may go on: 7 to 11 ms here as the median, up to 50 on a busy machine. The
//! runtime does that some time after its start, in every create and exec, and moves soon after the first wait less. So
//! we move ourselves to where we are, beside the runtime's start, and the two waits pass at once. Measured on `runc exec`
//! by itself: mostly 8 to 16 ms of 50 to 60 saved, in one run of five nothing.
//!
//! Changes nothing, and nobody depends on it.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use ocid_api::cgroup::{Version, of_process};

/// Enough for one file to be written.
const STACK_BYTES: usize = 64 << 10;

static UNDER_WAY: AtomicBool = AtomicBool::new(false);

/// To be called when a runtime is about to be started that moves a process. Returns at once.
pub(crate) fn hasten() {
    if UNDER_WAY.swap(true, Ordering::Relaxed) {
        return;
    }
    let thread = std::thread::Builder::new().name("hasten".to_owned()).stack_size(STACK_BYTES);
    let spawned = own_procs().map(|procs| {
        thread.spawn(move || {
            let _ = fs::write(&procs, "0");
            UNDER_WAY.store(false, Ordering::Relaxed);
        })
    });
    if !matches!(spawned, Some(Ok(_))) {
        UNDER_WAY.store(false, Ordering::Relaxed);
    }
}

/// The list of the processes of the cgroup that we are in, in one hierarchy: there is one lock for all.
fn own_procs() -> Option<std::path::PathBuf> {
    let version = Version::detect().ok()?;
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    Some(version.dir("memory", of_process(version, &text)?).join("cgroup.procs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_are_where_we_were() {
        let own = || fs::read_to_string("/proc/self/cgroup").unwrap();
        let before = own();
        hasten();
        while UNDER_WAY.load(Ordering::Relaxed) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(own(), before);
    }
}
