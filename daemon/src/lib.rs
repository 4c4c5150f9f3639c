#![doc = include_str!("../README.md")]

pub mod config;
pub mod cri;
pub mod daemon;
pub mod error;
pub mod host;
pub mod image;
pub mod network;
pub mod oci;
pub mod os;
pub mod pod;
pub mod rooted;
pub mod shim;
pub mod snapshot;
pub mod spec;
pub mod stats;
