#![doc = include_str!("../README.md")]

pub mod cgroup;
#[cfg(feature = "cri")]
pub mod cri;
pub mod id;
pub mod paths;
pub mod record;
// Its children are generated: there is no folder of them here.
#[allow(clippy::self_named_module_files)]
pub mod shim;
