//! Who may use whom. The picture is in the README; these are the same arrows as tables.
//!
//! Test code is free: a unit test may borrow from anywhere.

use std::path::Path;

use crate::Finding;
use crate::source::{Source, is_name, read};

/// Folder (or file, at the top of a crate) → what it may use beside itself.
type Arrows = &'static [(&'static str, &'static [&'static str])];

const DAEMON: Arrows = &[
    ("main", &["daemon"]),
    ("cri", &["pod", "image", "streaming", "stats"]),
    ("streaming", &["pod"]),
    ("stats", &["pod", "image", "snapshot"]),
    ("pod", &["shim", "network", "oci", "image", "snapshot"]),
    ("image", &["snapshot"]),
    ("shim", &[]),
    ("network", &[]),
    ("oci", &[]),
    ("snapshot", &[]),
    // The file is one, so `Config` holds every section; the settings of a folder, their meaning and their defaults lie
    // beside its code. What such a folder takes of `config` is the macro `section!`, and never `Config` itself.
    ("config", &["network", "image"]),
];
/// Used by all of the daemon, but not by what they use; use nobody but each other and what is drawn above.
const DAEMON_BASE: &[&str] = &["spec", "host", "rooted", "config", "error", "os"];

const SHIM: Arrows = &[
    ("main", &["serve", "cleanup", "pause", "os"]),
    (
        "serve",
        &[
            "rpc",
            "streaming",
            "pod",
            "container",
            "runc",
            "stdio",
            "process",
            "cgroup",
            "lock",
            "record",
            "os",
        ],
    ),
    // Ends a pod with the same hands as its shim would, from the records, under the same lock.
    ("cleanup", &["pod", "container", "runc", "stdio", "process", "cgroup", "lock", "record", "os"]),
    ("pause", &["os"]),
    // The tokens of streams are kept in `streaming`, and OpenStream is an RPC. An exec's output comes in the words of
    // `stdio`, and its exit with the time of `record`.
    ("rpc", &["streaming", "pod", "container", "stdio", "record"]),
    ("streaming", &["pod", "container", "runc", "stdio", "process", "os"]),
    ("pod", &["board", "container", "runc", "stdio", "process", "cgroup", "record", "os"]),
    ("container", &["board", "runc", "stdio", "process", "cgroup", "record", "os"]),
    // Records a state, then publishes it. Below the pod and its containers, which both put theirs on it.
    ("board", &["record"]),
    // The runtime's own invocations are processes, and so are those whose output is drained. It gives the ends of
    // `stdio` to a process that it starts, and its short-lived files are written like all others, by `record`.
    ("runc", &["stdio", "process", "record", "os"]),
    ("stdio", &["process", "os"]),
    ("process", &["os"]),
    ("cgroup", &["os"]),
    ("lock", &[]),
    ("record", &["os"]),
    // Each line has the time.
    ("log", &["record"]),
    ("os", &[]),
];
/// As for the daemon.
const SHIM_BASE: &[&str] = &["error", "log"];

/// A folder uses only what its arrows point to.
pub(crate) fn folders(source: &Source) -> Vec<Finding> {
    let (krate, arrows, base, whole) = match source.path.split_once("/src/") {
        Some(("daemon", _)) => ("ocid", DAEMON, DAEMON_BASE, &["lib", "daemon"][..]),
        Some(("shim", _)) => ("ocid_shim", SHIM, SHIM_BASE, &["lib"][..]),
        _ => return Vec::new(),
    };
    let module = module_path(&source.path);
    let user = module.first().map_or_else(|| file_stem(&source.path), String::as_str);
    if whole.contains(&user) {
        return Vec::new();
    }
    let allowed = match arrows.iter().find(|(name, _)| *name == user) {
        Some((_, allowed)) => *allowed,
        None if base.contains(&user) => &[],
        None => {
            return vec![Finding {
                file: source.path.clone(),
                line: 0,
                advice: format!(
                    "`{user}` has no arrows: draw them in the README and in tests/tidy/arrows.rs"
                ),
            }];
        }
    };
    // What all may use, but for those that it uses itself: arrows make no circle.
    let is_base = |used: &str| {
        let back = arrows.iter().any(|(name, to)| *name == used && to.contains(&user));
        base.contains(&used) && !back
    };
    uses(source, krate, &module)
        .into_iter()
        .filter(|(used, _)| used != user && !allowed.contains(&used.as_str()) && !is_base(used))
        // Names at the top of the crate that are no module: a re-export, a macro, a constant.
        .filter(|(used, _)| used.starts_with(|c: char| c.is_ascii_lowercase()))
        .filter(|(used, _)| [whole, base].concat().contains(&used.as_str()) || arrows.iter().any(|(name, _)| name == used))
        .map(|(used, at)| Finding {
            file: source.path.clone(),
            line: source.line_of(at),
            advice: format!(
                "`{user}` may not use `{used}` (only {}): let the caller pass in what is needed or move it \
                 down; if it is the picture that is wrong, change it in the README and in tests/tidy/arrows.rs",
                [allowed, base].concat().join(", ")
            ),
        })
        .collect()
}

/// First components of all paths into the crate's own modules, with where they are.
fn uses(source: &Source, krate: &str, module: &[String]) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for prefix in ["crate::".to_owned(), format!("{krate}::")] {
        for at in source.find(&prefix) {
            names(&source.code, at + prefix.len(), &mut found);
        }
    }
    for at in source.find("super::") {
        if source.code[..at].ends_with("::") {
            continue; // in the middle of a chain
        }
        let chain = source.code[at..].split("super::").skip(1).take_while(|rest| rest.is_empty()).count() + 1;
        // Inside its own file a module is one level deep; so many steps up lead to the top of the crate.
        if chain == module.len() {
            names(&source.code, at + chain * "super::".len(), &mut found);
        }
    }
    found.retain(|(_, at)| !source.is_test(*at));
    found
}

/// The name at `at`, or the first name of each item in a group there.
fn names(code: &str, at: usize, into: &mut Vec<(String, usize)>) {
    let name_at = |at: usize| code[at..].chars().take_while(|c| is_name(*c)).collect::<String>();
    if !code[at..].starts_with('{') {
        into.push((name_at(at), at));
        return;
    }
    let (mut depth, mut first) = (0_usize, false);
    for (offset, c) in code[at..].char_indices() {
        match c {
            '{' => (depth, first) = (depth + 1, depth == 0),
            '}' if depth == 1 => return,
            '}' => depth -= 1,
            ',' if depth == 1 => first = true,
            c if is_name(c) && first => {
                into.push((name_at(at + offset), at + offset));
                first = false;
            }
            _ => {}
        }
    }
}

/// `daemon/src/pod/run.rs` → `pod`, `run`.
fn module_path(path: &str) -> Vec<String> {
    let inside = path.split_once("/src/").map_or(path, |(_, inside)| inside);
    let mut parts: Vec<String> = inside.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
    if matches!(parts.last().map(String::as_str), Some("mod" | "lib" | "main")) {
        parts.pop();
    }
    parts
}

fn file_stem(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path).trim_end_matches(".rs")
}

/// Where the shim's messages may be. They are the form of the records too, so beside the service those meet them who
/// record, publish or read back a state, and who take a request apart into what others need. Who acts (the states and
/// their moves, mounts, execs, the runtime, output, processes, cgroups) never does.
const SHIM_MESSAGES: &[&str] = &[
    "shim/src/rpc.rs",
    "shim/src/record.rs",
    "shim/src/board.rs",
    "shim/src/cleanup.rs",
    "shim/src/pod/mod.rs",
    "shim/src/container/mod.rs",
    "shim/src/container/facts.rs",
];

/// Wire types are met at the edges and nowhere further in.
pub(crate) fn messages(source: &Source) -> Vec<Finding> {
    let path = source.path.as_str();
    let rules: [(&str, bool, &str); 3] = [
        (
            "ocid_api::cri",
            path.starts_with("shim/src/")
                || (path.starts_with("daemon/src/") && !path.starts_with("daemon/src/cri/")),
            "CRI messages stay in daemon/src/cri: take a type of spec.rs, or of your own",
        ),
        (
            "ocid_api::shim",
            path.starts_with("shim/src/") && !SHIM_MESSAGES.contains(&path),
            "in the shim only SHIM_MESSAGES of tests/tidy/arrows.rs touch messages: take a type of your own",
        ),
        (
            "ocid_api::shim",
            ["cri", "image", "network", "oci", "snapshot"]
                .iter()
                .any(|f| path.starts_with(&format!("daemon/src/{f}/"))),
            "the shim's messages stay in daemon/src/shim and its users in pod, streaming and stats",
        ),
    ];
    let mut found = Vec::new();
    for (word, applies, advice) in rules {
        for at in source.find(word).filter(|at| applies && !source.is_test(*at)) {
            found.push(Finding { file: path.into(), line: source.line_of(at), advice: advice.into() });
        }
    }
    found
}

/// What the manifests may not name.
pub(crate) fn crates(root: &Path) -> Vec<Finding> {
    let banned: [(&str, &[&str]); 3] = [
        ("api", &["ocid", "ocid-shim", "ocid-tests"]),
        ("daemon", &["ocid-shim", "ocid-tests"]),
        ("shim", &["ocid", "ocid-tests"]),
    ];
    banned
        .iter()
        .flat_map(|(dir, names)| {
            let file = format!("{dir}/Cargo.toml");
            manifest(&file, &read(&root.join(&file)), names)
        })
        .collect()
}

fn manifest(file: &str, text: &str, banned: &[&str]) -> Vec<Finding> {
    let mut table = "";
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.starts_with('[') {
            table = line;
        }
        let key = line.split(['=', '.', ' ']).next().unwrap_or_default();
        let advice = if table.contains("dependencies") && banned.contains(&key) {
            "the daemon and the shim know each other through ocid-api only, and nothing knows the tests"
        } else if file.starts_with("shim/") && key == "ocid-api" && line.contains("\"cri\"") {
            "the shim never sees a CRI message: leave the feature `cri` off"
        } else {
            continue;
        };
        found.push(Finding { file: file.into(), line: number, advice: advice.into() });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &str, text: &str) -> Vec<usize> {
        folders(&Source::new(path, text)).iter().map(|f| f.line).collect()
    }

    #[test]
    fn an_arrow_that_is_not_drawn_is_found_in_every_spelling() {
        for (path, text) in [
            ("daemon/src/image/pull.rs", "use crate::pod::Pods;"),
            ("daemon/src/image/pull.rs", "use crate::{error::Result, pod};"),
            ("daemon/src/image/pull.rs", "use crate::{\nsnapshot::{cri, X},\npod::Pods};"),
            ("daemon/src/image/pull.rs", "fn f() { crate::pod::f() }"),
            ("daemon/src/image/mod.rs", "use super::pod::Pods;"),
            ("daemon/src/image/pull.rs", "use super::super::{pod::Pods};"),
            ("daemon/src/error.rs", "use crate::pod::Pods;"),
            ("daemon/src/main.rs", "use ocid::pod::Pods;"),
            ("daemon/src/pod/mod.rs", "use crate::daemon::Daemon;"),
            ("shim/src/runc/mod.rs", "use crate::container::Container;"),
            ("shim/src/board.rs", "use crate::container::state::State;"),
            ("shim/src/record.rs", "use crate::log;"),
            ("daemon/src/image/mod.rs", "use crate::config::Config;"),
            ("daemon/src/config.rs", "use crate::shim::Deadlines;"),
        ] {
            assert_eq!(lines(path, text).len(), 1, "{path}: {text}");
        }
    }

    #[test]
    fn what_is_drawn_or_is_test_code_is_not_found() {
        for (path, text) in [
            ("daemon/src/image/pull.rs", "use crate::{error::Result, snapshot::Snapshotter}; use super::gc;"),
            ("daemon/src/image/pull.rs", "// crate::pod\nconst A: &str = \"crate::pod\";"),
            ("daemon/src/image/pull.rs", "#[cfg(test)]\nmod tests { use crate::pod::Pods; }"),
            ("daemon/src/daemon.rs", "use crate::{cri, pod};"),
            ("daemon/src/main.rs", "use ocid::{config::Config, daemon::Daemon}; use ocid_api::id;"),
            ("shim/src/container/mod.rs", "use crate::runc::Runc; use crate::log;"),
            ("daemon/src/config.rs", "use crate::{error::Result, network::Config};"),
            ("daemon/src/image/mod.rs", "use crate::section;"),
            ("api/src/id.rs", "use crate::pod;"),
        ] {
            assert_eq!(lines(path, text), [0_usize; 0], "{path}: {text}");
        }
    }

    #[test]
    fn the_arrows_make_no_circle() {
        for arrows in [DAEMON, SHIM] {
            let (mut left, mut gone) = (arrows.to_vec(), Vec::new());
            while !left.is_empty() {
                // A name without a row is a folder that uses nobody.
                let free = |to: &&str| gone.contains(to) || !arrows.iter().any(|(name, _)| name == to);
                let at = left.iter().position(|(_, to)| to.iter().all(&free));
                let at = at.unwrap_or_else(|| panic!("a circle among {left:?}"));
                gone.push(left.remove(at).0);
            }
        }
    }

    #[test]
    fn a_folder_without_arrows_is_found() {
        assert_eq!(lines("daemon/src/util/mod.rs", ""), [0]);
    }

    #[test]
    fn messages_are_found_outside_the_edges() {
        let found = |path, text| messages(&Source::new(path, text)).len();
        assert_eq!(found("daemon/src/pod/run.rs", "use ocid_api::cri::Mount;"), 1);
        assert_eq!(found("daemon/src/cri/pod.rs", "use ocid_api::cri::Mount;"), 0);
        assert_eq!(found("shim/src/stdio/mod.rs", "use ocid_api::shim::Stdio;"), 1);
        assert_eq!(found("shim/src/rpc.rs", "use ocid_api::shim::Stdio;"), 0);
        assert_eq!(found("daemon/src/image/gc.rs", "use ocid_api::shim::Rootfs;"), 1);
    }

    #[test]
    fn a_crate_that_depends_on_its_peer_is_found() {
        let text = "[package]\nname = \"x\"\n[dependencies]\nocid-shim.workspace = true\nserde = \"1\"\n";
        assert_eq!(manifest("daemon/Cargo.toml", text, &["ocid-shim"]).len(), 1);
        let text = "[dependencies]\nocid-api = { workspace = true, features = [\"cri\"] }";
        assert_eq!(manifest("shim/Cargo.toml", text, &["ocid"]).len(), 1);
        assert_eq!(manifest("daemon/Cargo.toml", text, &["ocid-shim"]).len(), 0);
    }
}
