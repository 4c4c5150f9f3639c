//! Where every file and socket of a pod lives: one function per path.
//!
//! ```text
//! <root>/pods/<pod>/                 written only by that pod's shim; survives a reboot
//!   metadata                         the daemon's data about the pod, immutable
//!   record                           PodState without its containers
//!   containers/<container>/
//!     metadata                       the daemon's data about the container, immutable
//!     record                         ContainerState; no record, no container
//!     exit                           Exit, in blocks allocated when the container was created
//! <state>/pods/<pod>/                what has meaning only while this kernel runs
//!   lock                             held (OFD write lock) as long as the shim lives
//!   shim.sock                        ttrpc
//!   log                              what the shim itself has to say
//!   ns/{net,ipc,uts,pid,user}        pinned namespaces
//!   shm/                             the pod's /dev/shm
//!   files/                           resolv.conf, hostname, hosts
//!   containers/<container>/          bundle: config.json, rootfs/
//! <state>/runtime/<handler>/         the OCI runtime's own state (`--root`)
//! ```

use std::path::{Path, PathBuf};

use crate::id::{ContainerId, PodId};

/// The two directories under which a node keeps everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dirs {
    /// Durable: `/var/lib/ocid` by default.
    pub root: PathBuf,
    /// Lost at reboot: `/run/ocid` by default.
    pub state: PathBuf,
}

impl Dirs {
    /// The directory of all pods' records.
    pub fn records(&self) -> PathBuf {
        self.root.join("pods")
    }

    /// The directory of all pods' run-time files.
    pub fn runs(&self) -> PathBuf {
        self.state.join("pods")
    }

    /// The paths of one pod.
    pub fn pod(&self, pod: &PodId) -> PodPaths {
        PodPaths { record: self.records().join(pod.as_str()), run: self.runs().join(pod.as_str()) }
    }
}

/// The paths of one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPaths {
    record: PathBuf,
    run: PathBuf,
}

impl PodPaths {
    /// The durable directory.
    pub fn record_dir(&self) -> &Path {
        &self.record
    }
    /// The pod's record.
    pub fn record(&self) -> PathBuf {
        self.record.join("record")
    }
    /// The daemon's data about the pod.
    pub fn metadata(&self) -> PathBuf {
        self.record.join("metadata")
    }
    /// The directory of the containers' records.
    pub fn containers(&self) -> PathBuf {
        self.record.join("containers")
    }
    /// The paths of one container.
    pub fn container(&self, container: &ContainerId) -> ContainerPaths {
        ContainerPaths {
            record: self.containers().join(container.as_str()),
            bundle: self.bundles().join(container.as_str()),
        }
    }
    /// The run-time directory.
    pub fn run_dir(&self) -> &Path {
        &self.run
    }
    /// Held as long as the shim lives.
    pub fn lock(&self) -> PathBuf {
        self.run.join("lock")
    }
    /// The shim's ttrpc socket.
    pub fn socket(&self) -> PathBuf {
        self.run.join("shim.sock")
    }
    /// The shim's own log.
    pub fn log(&self) -> PathBuf {
        self.run.join("log")
    }
    /// The directory of pinned namespaces.
    pub fn namespaces(&self) -> PathBuf {
        self.run.join("ns")
    }
    /// The pod's /dev/shm.
    pub fn shm(&self) -> PathBuf {
        self.run.join("shm")
    }
    /// Files for the daemon to bind into containers.
    pub fn files(&self) -> PathBuf {
        self.run.join("files")
    }
    /// The directory of bundles.
    pub fn bundles(&self) -> PathBuf {
        self.run.join("containers")
    }
}

/// The paths of one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerPaths {
    record: PathBuf,
    bundle: PathBuf,
}

impl ContainerPaths {
    /// The durable directory.
    pub fn record_dir(&self) -> &Path {
        &self.record
    }
    /// The container's record.
    pub fn record(&self) -> PathBuf {
        self.record.join("record")
    }
    /// The daemon's data about the container.
    pub fn metadata(&self) -> PathBuf {
        self.record.join("metadata")
    }
    /// The preallocated exit file.
    pub fn exit(&self) -> PathBuf {
        self.record.join("exit")
    }
    /// The bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }
    /// The OCI configuration.
    pub fn config(&self) -> PathBuf {
        self.bundle.join("config.json")
    }
    /// Where the root filesystem is mounted.
    pub fn rootfs(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }
}
