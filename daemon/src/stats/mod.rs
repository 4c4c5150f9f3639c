//! What containers use, collected when somebody asks: a few cgroup files each, never a shim, never a walk.
//!
//! The size of writable layers cannot be had without a walk, so it is measured in the background, one layer at a time,
//! and only while somebody keeps asking; answers carry the last measurement and when it was taken.

mod cgroup;
mod disk;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use ocid_api::cgroup::Version;
use ocid_api::id::ContainerId;

pub use cgroup::CgroupUsage;
pub use disk::Measured;

use crate::pod::ContainerState;
use crate::snapshot::Overlay;
use disk::Disk;

/// CPU rates are taken over at least this long, in nanoseconds: two calls in a row would measure noise.
const RATE_SPAN_NS: i64 = 1_000_000_000;

/// What a container uses.
#[derive(Debug, Clone)]
pub struct Usage {
    /// When the cgroup was read, in Unix nanoseconds.
    pub at_ns: i64,
    /// CPU and memory.
    pub cgroup: CgroupUsage,
    /// CPUs in use lately, in billionths; `None` before there is something to compare with.
    pub nano_cores: Option<u64>,
    /// The writable layer, once it has been measured.
    pub writable_layer: Option<Measured>,
}

/// Collects usage.
#[derive(Debug)]
pub struct Stats {
    version: Version,
    disk: Disk,
    rates: Mutex<HashMap<ContainerId, Sample>>,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at_ns: i64,
    cpu_ns: u64,
    nano_cores: Option<u64>,
}

impl Stats {
    /// Reads cgroups of this version and measures layers of these snapshots.
    pub fn new(version: Version, snapshots: Arc<Overlay>) -> Stats {
        Stats { version, disk: Disk::new(snapshots), rates: Mutex::default() }
    }

    /// What a running container uses; `None` if its cgroup is gone.
    pub fn container(&self, state: &ContainerState) -> Option<Usage> {
        let cgroup = Some(&state.cgroup).filter(|path| path.len() > 1)?;
        let cgroup = cgroup::read(self.version, cgroup)?;
        let at_ns = now_ns();
        Some(Usage {
            at_ns,
            cgroup,
            nano_cores: self.rate(&state.id, at_ns, cgroup.cpu_ns),
            writable_layer: self.disk.last(&state.id),
        })
    }

    /// Forgets containers that are not among `live`.
    pub fn retain(&self, live: impl Fn(&ContainerId) -> bool) {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner).retain(|id, _| live(id));
        self.disk.retain(live);
    }

    fn rate(&self, id: &ContainerId, at_ns: i64, cpu_ns: u64) -> Option<u64> {
        let mut rates = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Sample { at_ns, cpu_ns, nano_cores: None };
        let last = rates.entry(id.clone()).or_insert(now);
        let span = at_ns - last.at_ns;
        if span >= RATE_SPAN_NS {
            let used = u128::from(cpu_ns.saturating_sub(last.cpu_ns)) * 1_000_000_000;
            let rate = used / u128::try_from(span).unwrap_or(u128::MAX);
            *last = Sample { nano_cores: u64::try_from(rate).ok(), ..now };
        }
        last.nano_cores
    }
}

/// The time in Unix nanoseconds.
pub fn now_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}
