//! What every file must have, what none may have, and what lies at the top.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::Finding;
use crate::source::{Source, read, relative, walk};

/// All that is visible at the top of the repository. Settings of tools are dot files.
const TOP: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "daemon",
    "shim",
    "api",
    "proto",
    "tests",
    "scripts",
    "contrib",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
];

fn about(file: impl Into<String>, line: usize, advice: impl Into<String>) -> Finding {
    Finding { file: file.into(), line, advice: advice.into() }
}

/// A Rust file begins with what it is.
pub(crate) fn module_doc(source: &Source) -> Vec<Finding> {
    let first = source.text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    if first.starts_with("//!") || first.starts_with("#![doc") {
        return Vec::new();
    }
    vec![about(&source.path, 1, "begin with `//!`: what this is, how it moves, and what it never does")]
}

/// No holes and no tests that do not run.
pub(crate) fn unfinished(source: &Source) -> Vec<Finding> {
    let holes = ["todo!", "unimplemented!", "#[ignore"]
        .into_iter()
        .flat_map(|hole| source.find(hole).map(move |at| (hole, at)));
    holes
        .map(|(hole, at)| {
            about(
                &source.path,
                source.line_of(at),
                format!("`{hole}`: finish it, return an error, or take it out"),
            )
        })
        .collect()
}

/// In the three crates every file is a module of the one above it.
pub(crate) fn dead_files(sources: &[Source]) -> Vec<Finding> {
    sources
        .iter()
        .filter(|source| !is_compiled(source, sources))
        .map(|source| {
            about(&source.path, 0, "is no module of anything: declare it in the file above, or delete it")
        })
        .collect()
}

fn is_compiled(source: &Source, all: &[Source]) -> bool {
    let Some((krate, inside)) = source.path.split_once("/src/") else { return true };
    if ["lib.rs", "main.rs"].contains(&inside) || inside.starts_with("bin/") {
        return true;
    }
    let mut parts: Vec<&str> = inside.trim_end_matches(".rs").split('/').collect();
    if parts.last() == Some(&"mod") {
        parts.pop();
    }
    let name = parts.pop().unwrap_or_default();
    let dir = parts.join("/");
    let above: Vec<String> = if dir.is_empty() {
        vec![format!("{krate}/src/lib.rs"), format!("{krate}/src/main.rs")]
    } else {
        // The second is where a file with a folder of its own beside it would be.
        vec![format!("{krate}/src/{dir}/mod.rs"), format!("{krate}/src/{dir}.rs")]
    };
    let declaration = format!("mod {name};");
    all.iter().any(|other| above.contains(&other.path) && other.find(&declaration).next().is_some())
}

/// The code map in the README of the daemon and of the shim has every file of `src`, and none that is not there.
pub(crate) fn code_maps(root: &Path, sources: &[Source]) -> Vec<Finding> {
    let paths: Vec<&str> = sources.iter().map(|source| source.path.as_str()).collect();
    ["daemon", "shim"]
        .iter()
        .flat_map(|krate| code_map(krate, &read(&root.join(krate).join("README.md")), &paths))
        .collect()
}

fn code_map(krate: &str, readme: &str, paths: &[&str]) -> Vec<Finding> {
    let file = format!("{krate}/README.md");
    // A row of the map begins with the file's name.
    let mapped: Vec<(usize, String)> = (1..)
        .zip(readme.lines())
        .filter_map(|(number, line)| Some((number, line.strip_prefix("| `")?.split_once("` |")?.0)))
        .filter(|(_, name)| name.starts_with("src/") && name.ends_with(".rs"))
        .map(|(number, name)| (number, format!("{krate}/{name}")))
        .collect();
    let missing = paths
        .iter()
        .filter(|path| {
            path.starts_with(&format!("{krate}/src/")) && !mapped.iter().any(|(_, name)| name == *path)
        })
        .map(|path| about(*path, 0, format!("is not in the code map of {file}: give it a row")));
    let stale = mapped
        .iter()
        .filter(|(_, name)| !paths.contains(&name.as_str()))
        .map(|(number, name)| about(&file, *number, format!("{name} is not there: take the row out")));
    missing.chain(stale).collect()
}

/// Only the agreed names are visible at the top.
pub(crate) fn top_level(root: &Path) -> Vec<Finding> {
    let names = fs::read_dir(root)
        .expect("the repository can be listed")
        .map(|entry| entry.expect("a directory entry").file_name().to_string_lossy().into_owned());
    strangers(names)
}

fn strangers(names: impl Iterator<Item = String>) -> Vec<Finding> {
    // Cargo's output, which git does not see.
    let known = |name: &String| name.starts_with('.') || name == "target" || TOP.contains(&name.as_str());
    let strange: BTreeSet<String> = names.filter(|name| !known(name)).collect();
    strange
        .into_iter()
        .map(|name| about(name, 0, "is not agreed to be at the top: put it where it belongs"))
        .collect()
}

/// No file names the host of a package registry or a product that mirrors one: where packages come from is a matter
/// of the machine that builds.
pub(crate) fn registry_names(root: &Path) -> Vec<Finding> {
    let mut paths: Vec<PathBuf> = Vec::new();
    walk(root, &mut paths);
    let texts = paths.iter().filter_map(|path| Some((relative(root, path), fs::read_to_string(path).ok()?)));
    texts.flat_map(|(path, text)| names_in(&path, &text)).collect()
}

/// In halves, so that this file passes its own check.
const REGISTRIES: &[(&str, &str)] = &[
    ("index.crates", ".io"),
    ("static.crates", ".io"),
    ("proxy.golang", ".org"),
    ("sum.golang", ".org"),
    ("pypi", ".org"),
    ("pythonhosted", ".org"),
    ("registry.npmjs", ".org"),
    ("arti", "factory"),
    ("jfr", "og"),
    ("verdac", "cio"),
    ("dev", "pi-server"),
];

fn names_in(path: &str, text: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let lower = line.to_ascii_lowercase();
        if REGISTRIES.iter().any(|(a, b)| lower.contains(&[*a, *b].concat())) {
            found.push(about(
                path,
                number,
                "names a package registry: leave that to the machine's own configuration",
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_doc_is_found() {
        assert_eq!(module_doc(&Source::new("a.rs", "use x;\n//! late")).len(), 1);
        assert_eq!(module_doc(&Source::new("a.rs", "")).len(), 1);
        assert_eq!(module_doc(&Source::new("a.rs", "\n//! What it is.")), []);
        assert_eq!(module_doc(&Source::new("lib.rs", "#![doc = include_str!(\"../README.md\")]")), []);
    }

    #[test]
    fn holes_are_found_and_words_are_not() {
        for hole in ["todo!()", "unimplemented!(\"x\")", "#[ignore]\nfn f() {}", "#[ignore = \"slow\"]"] {
            assert_eq!(unfinished(&Source::new("a.rs", hole)).len(), 1, "{hole}");
        }
        assert_eq!(
            unfinished(&Source::new("a.rs", "// todo!()\nlet ignore = \"#[ignore]\"; my_todo!()")),
            []
        );
    }

    #[test]
    fn a_file_that_nobody_declares_is_found() {
        let files = |parent: &str| {
            vec![
                Source::new("daemon/src/lib.rs", "pub mod pod;"),
                Source::new("daemon/src/pod/mod.rs", parent),
                Source::new("daemon/src/pod/run.rs", ""),
            ]
        };
        assert_eq!(dead_files(&files("mod run;")), []);
        assert_eq!(dead_files(&files("// mod run;\nmod rerun;")).len(), 1);
    }

    #[test]
    fn a_file_without_a_row_and_a_row_without_a_file_are_found() {
        let map = "| file | what |\n| `src/a.rs` | a |\n| `src/b.rs` | b |\nsee `src/c.rs`\n";
        assert_eq!(code_map("shim", map, &["shim/src/a.rs", "shim/src/b.rs", "daemon/src/c.rs"]), []);
        let found = code_map("shim", map, &["shim/src/a.rs", "shim/src/c.rs"]);
        assert_eq!(
            found.iter().map(|f| (f.file.as_str(), f.line)).collect::<Vec<_>>(),
            [("shim/src/c.rs", 0), ("shim/README.md", 3)]
        );
    }

    #[test]
    fn a_stranger_at_the_top_is_found() {
        let names = ["Cargo.toml", ".deny.toml", "target", "docs"].map(str::to_owned);
        assert_eq!(strangers(names.into_iter()).len(), 1);
    }

    #[test]
    fn a_registry_is_found() {
        let line = format!("url = https://{}{}/x", "proxy.golang", ".org");
        assert_eq!(names_in("a.toml", &format!("fine\n{line}\n"))[0].line, 2);
        assert_eq!(names_in("a.toml", "https://registry.k8s.io/pause and crates.io"), []);
    }
}
