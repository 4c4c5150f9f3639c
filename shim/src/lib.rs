#![doc = include_str!("../README.md")]

mod board;
mod cgroup;
pub mod cleanup;
mod container;
pub mod error;
mod lock;
mod log;
pub mod os;
pub mod pause;
mod pod;
pub mod process;
mod record;
mod rpc;
mod runc;
pub mod serve;
pub mod stdio;
