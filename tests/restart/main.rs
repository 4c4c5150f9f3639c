//! What survives the death of the daemon or of a shim, at any instant.
//!
//! Each test has a node of its own and needs root; `scripts/test restart` builds what they run. `OCID_TEST_SEED`
//! repeats the chance of a failed run.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails, and says where")]

mod joining;
mod restart;
mod shim_killed;
mod storm;
