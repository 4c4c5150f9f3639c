//! Sizes of writable layers, measured by one background thread at a time and remembered.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ocid_api::id::ContainerId;

use super::now_ns;
use crate::snapshot::Overlay;

/// A measurement younger than this is not repeated, in nanoseconds.
const FRESH_NS: i64 = 10_000_000_000;

/// The size of a layer at some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// Unix nanoseconds.
    pub at_ns: i64,
    /// Bytes on disk.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

#[derive(Debug)]
pub(super) struct Disk(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    snapshots: Arc<Overlay>,
    /// `None`: asked for, not yet measured.
    layers: Mutex<HashMap<ContainerId, Option<Measured>>>,
    measuring: AtomicBool,
}

impl Disk {
    pub(super) fn new(snapshots: Arc<Overlay>) -> Disk {
        Disk(Arc::new(Inner { snapshots, layers: Mutex::default(), measuring: AtomicBool::new(false) }))
    }

    /// The last measurement; an old one starts a new round in the background.
    pub(super) fn last(&self, id: &ContainerId) -> Option<Measured> {
        let last = *self.0.lock().entry(id.clone()).or_default();
        let stale = last.is_none_or(|measured| now_ns() - measured.at_ns > FRESH_NS);
        if stale && !self.0.measuring.swap(true, Ordering::AcqRel) {
            let inner = Arc::clone(&self.0);
            // task: measures every layer that was asked for, then ends; owned by `Disk` through `measuring`.
            tokio::task::spawn_blocking(move || inner.measure());
        }
        last
    }

    pub(super) fn retain(&self, live: impl Fn(&ContainerId) -> bool) {
        self.0.lock().retain(|id, _| live(id));
    }
}

impl Inner {
    fn measure(&self) {
        let wanted: Vec<ContainerId> = self.lock().keys().cloned().collect();
        for id in wanted {
            // A container that is being removed has no size any more.
            if let Ok(usage) = self.snapshots.container_usage(&id)
                && let Some(entry) = self.lock().get_mut(&id)
            {
                *entry = Some(Measured { at_ns: now_ns(), bytes: usage.bytes, inodes: usage.inodes });
            }
        }
        self.measuring.store(false, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ContainerId, Option<Measured>>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
