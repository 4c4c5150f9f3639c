//! The runtime's JSON log → one readable error.

use crate::error::{Kind, shorten};

/// Longest text kept of a log, in bytes.
const TEXT_BYTES_MAX: usize = 4096;

/// How much of a log's end is read: the last words are what counts.
pub(super) const TAIL_BYTES: u64 = 64 << 10;

/// The runtime's own last error, and whose fault it is. `None` if it logged none.
pub(super) fn last_error(log: &str) -> Option<(Kind, String)> {
    #[derive(serde::Deserialize)]
    struct Line {
        #[serde(default)]
        level: String,
        #[serde(default)]
        msg: String,
    }
    let message = log
        .lines()
        .rev()
        .filter_map(|line| serde_json::from_str::<Line>(line).ok())
        .find(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic"))?
        .msg;
    let kind = if is_the_users(&message) { Kind::InvalidArgument } else { Kind::Internal };
    Some((kind, shorten(message.trim().to_owned(), TEXT_BYTES_MAX)))
}

/// Whether the runtime says that the user's command cannot be run, which no retry mends.
fn is_the_users(message: &str) -> bool {
    let about_the_command =
        message.contains("exec: \"") || message.contains("chdir to cwd") || message.contains("exec /");
    let refused = [
        "executable file not found",
        "no such file or directory",
        "permission denied",
        "is a directory",
        "not a directory",
        "exec format error",
    ];
    about_the_command && refused.iter().any(|text| message.contains(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(level: &str, msg: &str) -> String {
        serde_json::json!({ "level": level, "msg": msg, "time": "2026-01-02T03:04:05Z" }).to_string()
    }

    #[test]
    fn the_last_error_counts_and_says_whose_fault_it_is() {
        let missing = "runc create failed: unable to start container process: exec: \"nope\": executable file not found in $PATH";
        let log = [line("error", "first"), line("warning", "w"), line("error", missing), line("info", "i")]
            .join("\n");
        assert_eq!(last_error(&log), Some((Kind::InvalidArgument, missing.to_owned())));
        let cgroup = "runc create failed: mkdir /sys/fs/cgroup/x: no such file or directory";
        assert_eq!(last_error(&line("error", cgroup)), Some((Kind::Internal, cgroup.to_owned())));
    }

    #[test]
    fn garbage_is_no_error_and_a_novel_is_cut() {
        assert_eq!(last_error("\0not json\n{}\n{\"level\":3}"), None);
        assert_eq!(last_error(&line("fatal", &"x".repeat(9999))).unwrap().1.len(), TEXT_BYTES_MAX);
    }
}
