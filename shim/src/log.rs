//! The shim's own log: its stderr, bounded, for the person who asks why a pod is as it is.
//!
//! One line an event, each with the time. Never a secret, never a whole configuration, and never an error that is also
//! returned to a caller.

use std::io::{self, Write as _};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::record;

/// Bound on all that is said.
const LOG_BYTES_MAX: usize = 1 << 20;

static LOGGED: AtomicUsize = AtomicUsize::new(0);

/// Says something, while there is room.
pub(crate) fn say(text: &str) {
    let line = format!("{} {text}\n", record::now_ns());
    if LOGGED.fetch_add(line.len(), Ordering::Relaxed) < LOG_BYTES_MAX {
        let _ = io::stderr().write_all(line.as_bytes());
    }
}
