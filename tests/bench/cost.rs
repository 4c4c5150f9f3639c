//! What processes cost: memory from `smaps_rollup`, CPU from their clocks.

use std::fs;

use nix::time::ClockId;
use nix::unistd::Pid;

/// Memory of some processes, in KiB.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Memory {
    /// Proportional set size.
    pub(crate) pss: u64,
    /// What nobody shares.
    pub(crate) private: u64,
}

/// The sum over these processes; who is gone counts nothing.
pub(crate) fn memory(pids: &[u32]) -> Memory {
    let mut sum = Memory::default();
    for pid in pids {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let key = words.next().unwrap_or_default();
            let kib: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or_default();
            match key {
                "Pss:" => sum.pss += kib,
                "Private_Clean:" | "Private_Dirty:" => sum.private += kib,
                _ => {}
            }
        }
    }
    sum
}

/// Seconds of CPU, user and system, that these processes have used: the kernel's exact count, not its ticks, which would
/// round an idle process to nothing. Ended threads are in it, children are not.
pub(crate) fn cpu_s(pids: &[u32]) -> f64 {
    let of = |pid: &u32| {
        let pid = Pid::from_raw(i32::try_from(*pid).ok()?);
        let time = ClockId::pid_cpu_clock_id(pid).ok()?.now().ok()?;
        Some(time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
    };
    pids.iter().filter_map(of).sum()
}
