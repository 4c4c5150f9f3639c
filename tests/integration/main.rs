//! What one daemon does with pods, containers, images and networks, seen through CRI and in the kernel.
//!
//! Each test has a node of its own and needs root; `scripts/test integration` builds what they run.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails, and says where")]

mod acceptance;
mod config;
mod containers;
mod exec;
mod images;
mod layers;
mod logs;
mod network;
mod pods;
