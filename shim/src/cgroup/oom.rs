//! Who was killed for want of memory: `memory.oom_control` (v1), `memory.events` (v2).

use std::fs;

use ocid_api::cgroup::Version;

use super::Cgroup;

/// How many processes of the cgroup the kernel has killed for want of memory. 0 if it cannot be known.
///
/// To be read before the runtime's delete removes the cgroup.
pub(crate) fn kills(cgroup: &Cgroup) -> u64 {
    let file = match cgroup.version() {
        Version::V1 => "memory.oom_control",
        Version::V2 => "memory.events",
    };
    fs::read_to_string(cgroup.dir().join(file)).ok().and_then(|text| count(&text)).unwrap_or(0)
}

fn count(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn only_kills_count_not_being_short_of_memory() {
        assert_eq!(count("oom_kill_disable 0\nunder_oom 1\noom_kill 3\n"), Some(3));
        assert_eq!(count("low 0\nhigh 7\nmax 9\noom 2\noom_kill 0\noom_group_kill 0\n"), Some(0));
        assert_eq!(count("oom_kill_disable 0\nunder_oom 0\n"), None);
    }
}
