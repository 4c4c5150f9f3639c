//! The shim protocol, generated from `proto/shim/v1/shim.proto`.

mod generated {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::unwrap_used, unused)]
    include!(concat!(env!("OUT_DIR"), "/shim/mod.rs"));
}

pub use generated::shim::*;
pub use generated::shim_ttrpc::*;

/// The version of the protocol that this build speaks: `PodState.protocol`.
pub const PROTOCOL: u32 = 1;
