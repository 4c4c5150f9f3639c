//! CPU and memory of a cgroup, from the kernel's files. Missing files give zeros: a cgroup may go while it is read.

use std::fs;
use std::path::Path;

use ocid_api::cgroup::Version;

/// What a cgroup has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CgroupUsage {
    /// CPU time since the cgroup was made, in nanoseconds.
    pub cpu_ns: u64,
    /// Memory in use, page cache included, in bytes.
    pub memory_bytes: u64,
    /// Memory in use without the page cache that the kernel would give up first, in bytes.
    pub working_set_bytes: u64,
    /// Anonymous memory, in bytes.
    pub rss_bytes: u64,
    /// Memory limit in bytes; `None` if there is none.
    pub memory_limit_bytes: Option<u64>,
    /// Swap in use, in bytes.
    pub swap_bytes: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Page faults that read from disk.
    pub major_page_faults: u64,
}

/// v1 writes "no limit" as the largest multiple of the page size; nothing real is near it.
const V1_NO_LIMIT: u64 = 1 << 62;

/// Reads a cgroup; `None` if it does not exist.
pub(super) fn read(version: Version, cgroup: &str) -> Option<CgroupUsage> {
    match version {
        Version::V1 => v1(&version.dir("cpuacct", cgroup), &version.dir("memory", cgroup)),
        Version::V2 => v2(&version.dir("", cgroup)),
    }
}

fn v1(cpu: &Path, memory: &Path) -> Option<CgroupUsage> {
    let stat = fs::read_to_string(memory.join("memory.stat")).ok()?;
    let memory_bytes = number(&memory.join("memory.usage_in_bytes")).unwrap_or_default();
    let swapped = number(&memory.join("memory.memsw.usage_in_bytes")).unwrap_or_default();
    Some(CgroupUsage {
        cpu_ns: number(&cpu.join("cpuacct.usage")).unwrap_or_default(),
        memory_bytes,
        working_set_bytes: memory_bytes.saturating_sub(field(&stat, "total_inactive_file")),
        rss_bytes: field(&stat, "total_rss"),
        memory_limit_bytes: number(&memory.join("memory.limit_in_bytes"))
            .filter(|limit| *limit < V1_NO_LIMIT),
        swap_bytes: swapped.saturating_sub(memory_bytes),
        page_faults: field(&stat, "total_pgfault"),
        major_page_faults: field(&stat, "total_pgmajfault"),
    })
}

fn v2(dir: &Path) -> Option<CgroupUsage> {
    let cpu = fs::read_to_string(dir.join("cpu.stat")).ok()?;
    let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let memory_bytes = number(&dir.join("memory.current")).unwrap_or_default();
    Some(CgroupUsage {
        cpu_ns: field(&cpu, "usage_usec").saturating_mul(1000),
        memory_bytes,
        working_set_bytes: memory_bytes.saturating_sub(field(&stat, "inactive_file")),
        rss_bytes: field(&stat, "anon"),
        // "max" is not a number: no limit.
        memory_limit_bytes: number(&dir.join("memory.max")),
        swap_bytes: number(&dir.join("memory.swap.current")).unwrap_or_default(),
        page_faults: field(&stat, "pgfault"),
        major_page_faults: field(&stat, "pgmajfault"),
    })
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The number behind a key in a file of `key number` lines.
fn field(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
    }

    #[test]
    fn v1_and_v2_say_the_same_in_their_own_words() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(
            one.path(),
            &[
                ("cpuacct.usage", "5000\n"),
                ("memory.usage_in_bytes", "100\n"),
                ("memory.memsw.usage_in_bytes", "107\n"),
                ("memory.limit_in_bytes", "9223372036854771712\n"),
                (
                    "memory.stat",
                    "inactive_file 1\ntotal_inactive_file 30\ntotal_rss 50\ntotal_pgfault 8\ntotal_pgmajfault 2\n",
                ),
            ],
        );
        write(
            two.path(),
            &[
                ("cpu.stat", "usage_usec 5\nuser_usec 3\n"),
                ("memory.current", "100\n"),
                ("memory.swap.current", "7\n"),
                ("memory.max", "max\n"),
                ("memory.stat", "anon 50\ninactive_file 30\npgfault 8\npgmajfault 2\n"),
            ],
        );
        let expected = CgroupUsage {
            cpu_ns: 5000,
            memory_bytes: 100,
            working_set_bytes: 70,
            rss_bytes: 50,
            memory_limit_bytes: None,
            swap_bytes: 7,
            page_faults: 8,
            major_page_faults: 2,
        };
        assert_eq!(v1(one.path(), one.path()), Some(expected));
        assert_eq!(v2(two.path()), Some(expected));
    }

    #[test]
    fn a_cgroup_that_is_gone_has_no_usage() {
        assert_eq!(v1(Path::new("/nowhere"), Path::new("/nowhere")), None);
        assert_eq!(v2(Path::new("/nowhere")), None);
    }
}
