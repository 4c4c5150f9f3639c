//! The process that holds one pod.
fn main() {}
