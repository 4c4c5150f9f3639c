//! The daemon.

pub mod config;
pub mod error;
pub mod shim;
