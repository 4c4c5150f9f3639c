//! What a process gets from its parent without asking, undone.
//!
//! The daemon's hardening and its service manager's settings must reach neither the shim nor, through it, a container
//! (which inherits from the runtime, which inherits from us). So all that `execve` carries over is set to what pid 1
//! would give: signals, mask, umask, session, directory, limits, oom score, descriptors and environment. The cgroup is
//! the caller's business, and no_new_privs and seccomp cannot be undone by anybody.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::sync::OnceLock;

use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The search path of the shim and of the runtime it calls.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Highest signal number.
const SIGNAL_MAX: i32 = 64;

/// NOFILE for our children, known once [`reset_inherited`] has raised our own.
static CHILDREN_NOFILE: OnceLock<Rlimit> = OnceLock::new();

/// What is kept or chosen instead of being reset.
#[derive(Debug, Default)]
pub struct Inheritance<'a> {
    /// Descriptors above 2 that were passed to us on purpose. They become close-on-exec.
    pub keep: &'a [RawFd],
    /// Our oom score, clamped to what the kernel knows. `None` leaves it.
    pub oom_score_adj: Option<i32>,
}

/// Undoes inheritance. To be the first call of `main`: it closes every descriptor that is not kept, and takes it that
/// nothing has been opened yet. Descriptors 0 to 2 are left; the standard library has made sure that they are open.
///
/// # Errors
/// If a second thread exists, or the kernel refuses something that it cannot refuse to us. Neither a limit nor an oom
/// score that we may not set is an error.
pub fn reset_inherited(inheritance: &Inheritance<'_>) -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("inherited state can only be reset before the first thread is started"));
    }
    reset_signals()?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    match rustix::process::setsid() {
        Ok(_) | Err(rustix::io::Errno::PERM) => {} // PERM: we lead a group, so the daemon has made the session
        Err(e) => return Err(e.into()),
    }
    rustix::process::chdir("/")?;
    reset_limits();
    if let Some(score) = inheritance.oom_score_adj {
        // Lowering needs a capability that a nested node may lack; a pod works without it.
        let _ = std::fs::write("/proc/self/oom_score_adj", score.clamp(-1000, 1000).to_string());
    }
    close_others(inheritance.keep)?;
    reset_environment();
    Ok(())
}

/// Default disposition for every signal that was ignored (a handler does not survive `execve`, so what std has
/// installed since stays), and nothing blocked. SIGPIPE stays ignored for us: a closed peer is an error, not our end;
/// `Command` gives children the default again.
fn reset_signals() -> io::Result<()> {
    for signal in 1..=SIGNAL_MAX {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: with a null new action the kernel only writes the old one, into memory of the right type.
        let result = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
        if result != 0 {
            continue; // the C library keeps some numbers for itself
        }
        // SAFETY: zeroed is a valid `sigaction`, and the call has filled it.
        let action = unsafe { action.assume_init() };
        if action.sa_sigaction == libc::SIG_IGN {
            // SAFETY: SIG_DFL runs no code of ours.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    nix::sys::signal::SigSet::empty().thread_set_mask()?;
    Ok(())
}

/// Limits as pid 1 has them, as far as our own hard limits allow. Unreadable: as they are.
fn reset_limits() {
    let limits = std::fs::read_to_string("/proc/1/limits").unwrap_or_default();
    for (resource, theirs) in limits.lines().filter_map(parse_limit) {
        // A limit that cannot be set stays; a pod works with it.
        let _ = setrlimit(resource, clamp(theirs, getrlimit(resource)));
    }
    // We hold three descriptors per container and more per session, and never select(2); children keep the soft limit.
    let nofile = getrlimit(Resource::Nofile);
    if setrlimit(Resource::Nofile, Rlimit { current: nofile.maximum, ..nofile }).is_ok() {
        let _ = CHILDREN_NOFILE.set(nofile);
    }
}

/// Runs `spawn` with the limits that a child shall inherit. Descriptors that are open stay so whatever the limit.
pub fn with_children_limits<T>(spawn: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let Some(children) = CHILDREN_NOFILE.get() else { return spawn() };
    let own = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { ..*children })?;
    let result = spawn();
    let _ = setrlimit(Resource::Nofile, own); // raising back to the hard limit is always allowed
    result
}

/// `None` is "no limit", the largest of all.
fn clamp(theirs: Rlimit, ours: Rlimit) -> Rlimit {
    let least = |a: Option<u64>, b: Option<u64>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    let maximum = least(theirs.maximum, ours.maximum);
    Rlimit { current: least(theirs.current, maximum), maximum }
}

/// One line of /proc/<pid>/limits: a name with blanks in it, then soft, hard and sometimes a unit.
fn parse_limit(line: &str) -> Option<(Resource, Rlimit)> {
    const NAMES: [(&str, Resource); 16] = [
        ("Max cpu time", Resource::Cpu),
        ("Max file size", Resource::Fsize),
        ("Max data size", Resource::Data),
        ("Max stack size", Resource::Stack),
        ("Max core file size", Resource::Core),
        ("Max resident set", Resource::Rss),
        ("Max processes", Resource::Nproc),
        ("Max open files", Resource::Nofile),
        ("Max locked memory", Resource::Memlock),
        ("Max address space", Resource::As),
        ("Max file locks", Resource::Locks),
        ("Max pending signals", Resource::Sigpending),
        ("Max msgqueue size", Resource::Msgqueue),
        ("Max nice priority", Resource::Nice),
        ("Max realtime priority", Resource::Rtprio),
        ("Max realtime timeout", Resource::Rttime),
    ];
    let (resource, rest) = NAMES.into_iter().find_map(|(name, resource)| {
        line.strip_prefix(name).filter(|rest| rest.starts_with(' ')).map(|rest| (resource, rest))
    })?;
    let mut values = rest.split_ascii_whitespace().map(|value| match value {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    });
    Some((resource, Rlimit { current: values.next()??, maximum: values.next()?? }))
}

/// Closes every descriptor above 2 but the kept ones.
fn close_others(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<u32> =
        keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep {
        if fd > first {
            close_range(first, fd - 1, 0)?;
        }
        close_range(fd, fd, libc::CLOSE_RANGE_CLOEXEC)?;
        first = first.max(fd + 1);
    }
    close_range(first, u32::MAX, 0)
}

fn close_range(first: u32, last: u32, flags: u32) -> io::Result<()> {
    // SAFETY: three integers. That nobody uses what is closed is the contract of `reset_inherited`, which comes before
    // anything of ours is opened.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Leaves a search path and nothing else: the daemon's variables may hold secrets, and the runtime reads its own.
fn reset_environment() {
    // SAFETY: there is one thread (checked at the start of `reset_inherited`), so nobody reads the environment now.
    unsafe {
        libc::clearenv();
        std::env::set_var("PATH", PATH);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_as_the_kernel_writes_them() {
        let limit =
            |line| parse_limit(line).map(|(resource, limit)| (resource, limit.current, limit.maximum));
        assert_eq!(
            limit("Max open files            1024                 524288               files     "),
            Some((Resource::Nofile, Some(1024), Some(524_288)))
        );
        assert_eq!(
            limit("Max core file size        0                    unlimited            bytes     "),
            Some((Resource::Core, Some(0), None))
        );
        assert_eq!(
            limit("Max nice priority         0                    0                    ").unwrap().1,
            Some(0)
        );
        for bad in [
            "",
            "Limit                     Soft Limit",
            "Max open files",
            "Max open files  x y",
            "Max open files 1",
        ] {
            assert!(limit(bad).is_none(), "{bad}");
        }
        let all = std::fs::read_to_string("/proc/self/limits").unwrap();
        assert_eq!(
            all.lines().filter_map(parse_limit).count(),
            all.lines().count() - 1,
            "all but the heading"
        );
    }

    #[test]
    fn a_limit_is_never_raised_beyond_our_own() {
        let limit = |current, maximum| Rlimit { current, maximum };
        let cases = [
            (limit(Some(1024), Some(4096)), limit(Some(9), Some(2048)), (Some(1024), Some(2048))),
            (limit(Some(1024), None), limit(None, Some(512)), (Some(512), Some(512))),
            (limit(None, None), limit(Some(1), None), (None, None)),
        ];
        for (theirs, ours, expected) in cases {
            let clamped = clamp(theirs, ours);
            assert_eq!((clamped.current, clamped.maximum), expected);
        }
    }

    #[test]
    fn a_process_with_threads_is_left_alone() {
        let (stop, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || wait.recv());
        reset_inherited(&Inheritance::default()).unwrap_err();
        drop(stop);
        let _ = thread.join();
    }
}
