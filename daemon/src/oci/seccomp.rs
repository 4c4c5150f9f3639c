//! System calls a container may make.
//!
//! The default profile is a list of what is allowed; everything else gives EPERM. Some calls are allowed only with the
//! capability that makes them of use. A profile of the node is taken as it is.

use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompOperator,
    LinuxSyscall,
};

use crate::error::{Context, Error, Kind, Result};
use crate::spec::CapabilitySet;

/// A profile is a file of an operator; this is far more than one needs.
pub const PROFILE_BYTES_MAX: usize = 1 << 20;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// Allowed for everybody, whatever the arguments. Not here on purpose: io_uring, keyrings, userfaultfd, and the 32-bit
/// socketcall, whose arguments lie in memory where no filter can see which family it opens.
const ALWAYS: &str = "\
    accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset chdir chmod chown chown32 \
    clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep \
    clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 \
    epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit \
    exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 \
    fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat \
    fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait \
    futex_waitv futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 \
    getegid getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp \
    getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid \
    getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init \
    inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup \
    io_submit ioctl ioprio_get ioprio_set ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self \
    lchown lchown32 lgetxattr link linkat listen listmount listxattr listxattrat llistxattr _llseek lremovexattr lseek \
    lsetxattr lstat lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat \
    mlock mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 \
    mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall \
    munmap name_to_handle_at nanosleep newfstatat _newselect open openat openat2 pause pidfd_open pidfd_send_signal \
    pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 \
    process_mrelease pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recv \
    recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename renameat renameat2 \
    restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend \
    rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min \
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval \
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp \
    select semctl semget semop semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto \
    set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 \
    setgroups setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 \
    setreuid setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown \
    sigaltstack signalfd signalfd4 sigprocmask sigreturn socketpair splice stat stat64 statfs statfs64 statmount statx \
    symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun \
    timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 \
    timerfd_settime timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe \
    utime utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev";

/// Allowed on one kind of machine only.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: &str = "modify_ldt";
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: &str =
    "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls";
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHITECTURE: &str = "";

/// Allowed with the capability.
const WITH_CAPABILITY: [(&str, &str); 14] = [
    ("DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr \
         lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree perf_event_open quotactl quotactl_fd \
         setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("SYS_BOOT", "reboot"),
    ("SYS_CHROOT", "chroot"),
    ("SYS_MODULE", "delete_module finit_module init_module"),
    ("SYS_PACCT", "acct"),
    ("SYS_PTRACE", "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace"),
    ("SYS_RAWIO", "iopl ioperm"),
    ("SYS_TIME", "clock_settime clock_settime64 settimeofday stime"),
    ("SYS_TTY_CONFIG", "vhangup"),
    ("SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("SYSLOG", "syslog"),
    ("BPF", "bpf"),
    ("PERFMON", "perf_event_open"),
];

/// Domains that personality(2) may set: Linux, 32-bit Linux, both with a fixed layout of memory, and the query.
const PERSONALITIES: [u64; 5] = [0x0, 0x0008, 0x0002_0000, 0x0002_0008, 0xffff_ffff];

/// Address families that containers have no use for, and whose code has been a way out of them: AF_ALG and AF_VSOCK.
/// Families are numbered without gaps up to the last one that we know.
const AF_BLOCKED: [u64; 2] = [38, 40];
const AF_LAST: u64 = 45;

/// Flags of clone(2) that make namespaces: new mount, cgroup, uts, ipc, user, pid and net.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;

/// Since when ptrace cannot be used to get around the filter.
const SAFE_PTRACE: (u32, u32) = (4, 8);

/// The profile for a container with those capabilities.
pub(super) fn default_profile(has: CapabilitySet, compat: bool, kernel: (u32, u32)) -> LinuxSeccomp {
    let mut rules = vec![allow(ALWAYS), allow(ARCHITECTURE)];
    if kernel >= SAFE_PTRACE {
        rules.push(allow("process_vm_readv process_vm_writev ptrace"));
    }
    for value in PERSONALITIES {
        rules.push(allow_if("personality", &[arg(0, LinuxSeccompOperator::ScmpCmpEq, value, None)]));
    }
    // The filter compares 64 bits and the kernel then reads 32 of them. So only exact values and "less than" are safe:
    // under "not equal" or "greater than", a blocked family with a high bit set would pass.
    let first_blocked = AF_BLOCKED[0];
    rules.push(allow_if("socket", &[arg(0, LinuxSeccompOperator::ScmpCmpLt, first_blocked, None)]));
    for family in (first_blocked..=AF_LAST).filter(|family| !AF_BLOCKED.contains(family)) {
        rules.push(allow_if("socket", &[arg(0, LinuxSeccompOperator::ScmpCmpEq, family, None)]));
    }
    let admin = CapabilitySet::named("SYS_ADMIN").is_some_and(|admin| has.contains(admin));
    if !admin {
        // s390 has the flags second; nothing else that we know does.
        let flags = if cfg!(target_arch = "s390x") { 1 } else { 0 };
        let no_namespaces = arg(flags, LinuxSeccompOperator::ScmpCmpMaskedEq, CLONE_NAMESPACES, Some(0));
        rules.push(allow_if("clone", &[no_namespaces]));
        // Its flags lie in memory, where no filter can see them; libraries fall back to clone.
        rules.push(deny("clone3", ENOSYS));
    }
    for (capability, names) in WITH_CAPABILITY {
        if CapabilitySet::named(capability).is_some_and(|capability| has.contains(capability)) {
            rules.push(allow(names));
        }
    }
    rules.retain(|rule| !rule.names().is_empty());

    let mut profile = LinuxSeccomp::default();
    profile
        .set_default_action(LinuxSeccompAction::ScmpActErrno)
        .set_default_errno_ret(Some(EPERM))
        .set_architectures(Some(architectures(compat)))
        .set_syscalls(Some(rules));
    profile
}

/// Each further architecture makes the filter longer, and every start slower.
fn architectures(compat: bool) -> Vec<Arch> {
    let (native, kin): (Arch, &[Arch]) = if cfg!(target_arch = "x86_64") {
        (Arch::ScmpArchX86_64, &[Arch::ScmpArchX86, Arch::ScmpArchX32])
    } else if cfg!(target_arch = "aarch64") {
        (Arch::ScmpArchAarch64, &[Arch::ScmpArchArm])
    } else {
        (Arch::ScmpArchNative, &[])
    };
    let mut list = vec![native];
    if compat {
        list.extend(kin);
    }
    list
}

fn allow(names: &str) -> LinuxSyscall {
    rule(names, LinuxSeccompAction::ScmpActAllow, None, None)
}

fn allow_if(name: &str, args: &[LinuxSeccompArg]) -> LinuxSyscall {
    rule(name, LinuxSeccompAction::ScmpActAllow, None, Some(args.to_vec()))
}

fn deny(name: &str, errno: u32) -> LinuxSyscall {
    rule(name, LinuxSeccompAction::ScmpActErrno, Some(errno), None)
}

fn rule(
    names: &str,
    action: LinuxSeccompAction,
    errno: Option<u32>,
    args: Option<Vec<LinuxSeccompArg>>,
) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.split_whitespace().map(str::to_owned).collect())
        .set_action(action)
        .set_errno_ret(errno)
        .set_args(args);
    rule
}

fn arg(index: usize, op: LinuxSeccompOperator, value: u64, value_two: Option<u64>) -> LinuxSeccompArg {
    let arg = LinuxSeccompArgBuilder::default().index(index).value(value).op(op);
    let arg = if let Some(value_two) = value_two { arg.value_two(value_two) } else { arg };
    arg.build().expect("every member has a default")
}

/// A profile that an operator put on the node.
///
/// # Errors
/// `InvalidArgument` if the text is no profile.
pub(super) fn localhost_profile(path: &str, text: &[u8]) -> Result<LinuxSeccomp> {
    if text.len() > PROFILE_BYTES_MAX {
        return Err(Error::invalid(format!(
            "the seccomp profile {path:?} has more than {PROFILE_BYTES_MAX} bytes"
        )));
    }
    serde_json::from_slice(text)
        .context(Kind::InvalidArgument, || format!("the file {path:?} is not a seccomp profile"))
}
