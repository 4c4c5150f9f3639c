//! The contract between ocid's processes, and nothing else: the CRI and shim protocols, the identities of pods and
//! containers, where their files live, and what those files say.

pub mod cgroup;
#[cfg(feature = "cri")]
pub mod cri;
pub mod id;
pub mod paths;
pub mod record;
pub mod shim;
