//! What every ring above the unit tests stands on: a node in a temporary root, a client, images made from nothing but
//! the machine's busybox, registries, and stand-ins that misbehave on request.
//!
//! A test is a closure over a running [`Node`]; [`test`] gives it one and takes it back:
//!
//! ```no_run
//! harness::test(harness::Setup::default(), async |node| {
//!     let pod = node.pod("web");
//!     let id = node.client().run_pod(&pod).await.unwrap();
//!     assert_eq!(node.client().pods().await.unwrap()[0].id, id);
//! });
//! ```
//!
//! After the closure every pod is stopped and removed, the daemon is ended, and whatever is still there of the node
//! (see [`leak`]) fails the test. A test that panicked is only cleaned up after, and shows the daemon's log.
//!
//! The harness touches nothing but what it made: its own directory, bridge, subnet and cgroup, so that nodes run side
//! by side and beside a real one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails, and says where")]
#![allow(clippy::missing_panics_doc, reason = "panicking is how a harness reports")]

pub mod client;
pub mod faults;
pub mod http;
pub mod image;
pub mod leak;
pub mod network;
pub mod node;
pub mod process;
pub mod registry;
pub mod wait;

pub use client::Client;
pub use image::{BUSYBOX, Image, Layer};
pub use node::{Node, Setup, test};
pub use registry::Registry;
pub use wait::{Random, eventually};
