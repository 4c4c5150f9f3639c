//! The source tree keeps its own rules. Each rule reads files and nothing else: no root, no network, no build.
//!
//! | rule | where |
//! |---|---|
//! | the arrows: who may use whom | `arrows.rs` |
//! | calls that are banned, and where `unsafe` may be | `calls.rs` |
//! | what a file and the tree must look like | `tree.rs` |
//! | the shim's protocol only grows | `protocol.rs` |
//!
//! A finding says where, what, and what to do. A rule that is wrong is changed here, in the same commit as the code
//! that needs it. Each rule has tests of its own on made-up files, so that it is known to be able to fail.

mod arrows;
mod calls;
mod protocol;
mod source;
mod tree;

use std::fmt;
use std::path::{Path, PathBuf};

use source::Source;

/// One breach of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    file: String,
    /// From 1; 0 where it is about the file as a whole.
    line: usize,
    /// What is wrong, and what to do.
    advice: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.advice),
            line => write!(f, "{}:{line}: {}", self.file, self.advice),
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the repository").to_path_buf()
}

#[track_caller]
fn tidy(findings: &[Finding]) {
    let lines: Vec<_> = findings.iter().map(|finding| format!("  {finding}\n")).collect();
    assert!(findings.is_empty(), "{} found:\n{}", lines.len(), lines.concat());
}

/// Runs one rule over all Rust files.
#[track_caller]
fn tidy_sources(rule: impl Fn(&Source) -> Vec<Finding>) {
    let sources = source::rust_files(&root());
    assert!(sources.len() > 10, "the walk found only {} Rust files", sources.len());
    tidy(&sources.iter().flat_map(rule).collect::<Vec<_>>());
}

#[test]
fn folders_use_only_what_the_arrows_allow() {
    tidy_sources(arrows::folders);
}

#[test]
fn messages_stay_at_the_edges() {
    tidy_sources(arrows::messages);
}

#[test]
fn crates_do_not_depend_on_each_other_but_through_api() {
    tidy(&arrows::crates(&root()));
}

#[test]
fn banned_calls_are_not_made() {
    tidy_sources(calls::banned);
}

#[test]
fn a_task_has_an_owner() {
    tidy_sources(calls::tasks);
}

#[test]
fn unsafe_code_is_in_os_modules() {
    tidy_sources(calls::unsafe_code);
}

#[test]
fn a_file_begins_with_what_it_is() {
    tidy_sources(tree::module_doc);
}

#[test]
fn nothing_is_left_unfinished() {
    tidy_sources(tree::unfinished);
}

#[test]
fn every_file_is_compiled() {
    tidy(&tree::dead_files(&source::rust_files(&root())));
}

#[test]
fn every_file_is_in_a_code_map() {
    tidy(&tree::code_maps(&root(), &source::rust_files(&root())));
}

#[test]
fn the_top_level_is_as_agreed() {
    tidy(&tree::top_level(&root()));
}

#[test]
fn no_file_names_a_registry() {
    tidy(&tree::registry_names(&root()));
}

#[test]
fn the_shim_protocol_only_grows() {
    tidy(&protocol::only_grows(&root()));
}
