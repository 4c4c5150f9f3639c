//! Calls that are banned whatever they are for, tasks that nobody owns, and where `unsafe` may be.

use crate::Finding;
use crate::source::{Source, is_name};

/// What, and why not and what instead.
const BANNED: &[(&str, &str)] = &[
    ("waitpid(-1", WAIT_ANY),
    ("waitpid(None", WAIT_ANY),
    ("Pid::from_raw(-1)", WAIT_ANY),
    ("wait::wait()", WAIT_ANY),
    ("process::wait(", WAIT_ANY),
    (
        ".pre_exec(",
        "std falls back to fork, which copies the page tables of a large process: spawn, and let the child do it",
    ),
    ("libc::fork(", "never fork: posix_spawn, through std's Command without pre_exec, user or group"),
    ("unistd::fork(", "never fork: posix_spawn, through std's Command without pre_exec, user or group"),
];
const WAIT_ANY: &str =
    "takes the exits of all children, somebody else's too: wait for one process by its pidfd";

/// In these, and in nobody else's code, a peek at any child is allowed if it takes nothing (WNOWAIT).
const ANY_CHILD: &[&str] = &["WaitId::All", "Id::All", "P_ALL"];

/// No code of the daemon or the shim makes a banned call. Test code may: it has children of its own.
pub(crate) fn banned(source: &Source) -> Vec<Finding> {
    if !ours(source) {
        return Vec::new();
    }
    let mut found: Vec<(usize, &str)> = Vec::new();
    for (call, advice) in BANNED {
        found.extend(source.find(call).map(|at| (at, *advice)));
    }
    // Pid 1 of a pod is there to collect what nobody else waits for, and has no children of its own.
    let init = source.path == "shim/src/pause.rs";
    for any in ANY_CHILD.iter().filter(|_| !init) {
        let takes = |at: &usize| {
            let statement = source.code[*at..].split(';').next().unwrap_or_default();
            !statement.contains("NOWAIT")
        };
        found.extend(source.find(any).filter(takes).map(|at| (at, WAIT_ANY)));
    }
    findings(source, found.into_iter().filter(|(at, _)| !source.is_test(*at)))
}

/// In the folders of the daemon that handle requests a task is not merely begun. What is accepted beside
/// `TaskTracker::spawn` and `JoinSet::spawn`: a handle that ends the task with its owner (`AbortOnDropHandle`), on the
/// same line, or a line comment `// task:` there or just above that says who owns the task and what ends it.
pub(crate) fn tasks(source: &Source) -> Vec<Finding> {
    const ADVICE: &str = "a task belongs to an object: spawn it on that object's TaskTracker, hold it in an \
                          AbortOnDropHandle, or say on the line above who owns it (`// task: …`)";
    let handles = ["pod", "image", "network", "shim", "cri"];
    if !handles.iter().any(|folder| source.path.starts_with(&format!("daemon/src/{folder}/"))) {
        return Vec::new();
    }
    let begun = ["tokio::spawn(", "task::spawn(", "task::spawn_local("]
        .into_iter()
        .flat_map(|call| source.find(call));
    let unowned = begun.filter(|at| {
        let line = source.line_of(*at);
        let owned = source.line(line).contains("AbortOnDropHandle");
        let said = [line, line - 1].iter().any(|line| source.line(*line).contains("// task:"));
        !owned && !said && !source.is_test(*at)
    });
    findings(source, unowned.map(|at| (at, ADVICE)))
}

/// `unsafe` is in modules called `os`, which have the proofs. In tests too.
pub(crate) fn unsafe_code(source: &Source) -> Vec<Finding> {
    const ADVICE: &str =
        "unsafe code lives in an `os` module, small and with its proof: put a safe function there";
    let path = &source.path;
    if path.contains("/os/") || path.ends_with("/os.rs") {
        return Vec::new();
    }
    let keyword = source.find("unsafe").filter(|at| !source.code[at + "unsafe".len()..].starts_with(is_name));
    let allowed = source.find("allow(unsafe_code");
    findings(source, keyword.chain(allowed).map(|at| (at, ADVICE)))
}

fn ours(source: &Source) -> bool {
    ["daemon/src/", "shim/src/", "api/src/"].iter().any(|dir| source.path.starts_with(dir))
}

fn findings<'a>(source: &Source, found: impl Iterator<Item = (usize, &'a str)>) -> Vec<Finding> {
    found
        .map(|(at, advice)| {
            let line = source.line_of(at);
            let what = source.line(line).trim();
            Finding { file: source.path.clone(), line, advice: format!("`{what}`: {advice}") }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_banned_call_is_found() {
        for code in [
            "let s = waitpid(-1, None);",
            "nix::sys::wait::waitpid(None, flags);",
            "let any = Pid::from_raw(-1);",
            "rustix::process::wait(options);",
            "waitid(WaitId::All, EXITED);",
            "waitid(Id::All, EXITED);",
            "command.arg(1)\n    .pre_exec(f);",
            "match nix::unistd::fork() {}",
        ] {
            assert_eq!(banned(&Source::new("shim/src/process/mod.rs", code)).len(), 1, "{code}");
        }
    }

    #[test]
    fn what_takes_nothing_or_is_only_spoken_of_is_not_found() {
        for code in [
            "// waitpid(-1) is called nowhere",
            "let text = \"waitpid(-1)\";",
            "waitpid(pid, None);",
            "waitid(WaitId::All, EXITED | WaitIdOptions::NOWAIT);",
            "#[cfg(test)]\nmod tests { fn f() { waitpid(None); } }",
            "my_fork();",
        ] {
            assert_eq!(banned(&Source::new("shim/src/process/mod.rs", code)), [], "{code}");
        }
        assert_eq!(banned(&Source::new("shim/src/pause.rs", "waitid(WaitId::All, EXITED);")), []);
    }

    #[test]
    fn a_task_without_an_owner_is_found() {
        let found = |path: &str, code: &str| tasks(&Source::new(path, code)).len();
        assert_eq!(found("daemon/src/pod/run.rs", "fn f() { tokio::spawn(g()); }"), 1);
        assert_eq!(found("daemon/src/pod/run.rs", "fn f() {\n task::spawn(g()); }"), 1);
        assert_eq!(found("daemon/src/pod/run.rs", "// task: ends with the pod\ntokio::spawn(g());"), 0);
        assert_eq!(found("daemon/src/pod/run.rs", "tokio::spawn(g()); // task: ends with the pod"), 0);
        assert_eq!(found("daemon/src/pod/run.rs", "let t = AbortOnDropHandle::new(tokio::spawn(g()));"), 0);
        assert_eq!(found("daemon/src/pod/run.rs", "self.tasks.spawn(g()); task::spawn_blocking(h);"), 0);
        assert_eq!(found("daemon/src/daemon.rs", "tokio::spawn(g());"), 0);
    }

    #[test]
    fn unsafe_outside_os_is_found() {
        let found = |path: &str, code: &str| unsafe_code(&Source::new(path, code)).len();
        assert_eq!(found("shim/src/pod/mod.rs", "let x = unsafe { f() };"), 1);
        assert_eq!(found("tests/harness/lib.rs", "#![allow(unsafe_code)]"), 1);
        assert_eq!(found("shim/src/os/mod.rs", "let x = unsafe { f() };"), 0);
        assert_eq!(found("shim/src/pod/mod.rs", "// unsafe\n#![deny(unsafe_code)]"), 0);
    }
}
