//! The process: arguments, environment, directory, user, limits and terminal.

use std::collections::HashMap;
use std::path::PathBuf;

use oci_spec::runtime::{PosixRlimit, PosixRlimitBuilder, PosixRlimitType, Process, User as OciUser};

use super::{ImageDefaults, Input, User, security};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::spec::{ContainerSpec, EnvVar, Scope, Signal};

/// Where programs are looked for if nobody says.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Open files: few enough that programs which close or poll all they could have are fast, many if they ask.
const NOFILE_SOFT: u64 = 1024;
const NOFILE_HARD: u64 = 524_288;

/// Arguments and environment together, the image's included.
const ARGS_BYTES_MAX: usize = 2 << 20;

pub(super) fn process(input: &Input<'_>) -> Result<Process> {
    let container = input.container;
    let args = args(container, input.image)?;
    let env = env(input)?;
    if args.iter().chain(&env).map(|text| text.len() + 9).sum::<usize>() > ARGS_BYTES_MAX {
        return Err(Error::invalid(format!(
            "arguments and environment have more than {ARGS_BYTES_MAX} bytes"
        )));
    }
    let mut process = Process::default();
    process
        .set_terminal(Some(container.tty))
        .set_user(oci_user(input.user))
        .set_args(Some(args))
        .set_env(Some(env))
        .set_cwd(working_dir(container, input.image)?)
        .set_capabilities(Some(security::capabilities(input)?))
        .set_rlimits(Some(vec![nofile(input.host)]))
        .set_no_new_privileges(Some(container.security.no_new_privs))
        .set_apparmor_profile(security::apparmor(input)?)
        .set_selinux_label(security::process_label(input))
        .set_oom_score_adj(Some(oom_score_adj(container.resources.oom_score_adj, input.host)));
    Ok(process)
}

/// The process of an exec: the container's own, but for its arguments and terminal. It never gets more than the container.
pub fn exec_process(base: &Process, args: Vec<String>, tty: bool) -> Process {
    let mut process = base.clone();
    process.set_args(Some(args)).set_terminal(Some(tty)).set_console_size(None);
    if tty
        && let Some(env) = process.env_mut()
        && !env.iter().any(|entry| entry.starts_with("TERM="))
    {
        env.push("TERM=xterm".into());
    }
    process
}

/// What a stop sends: the request's signal, else the image's, else SIGTERM. An image's nonsense counts as nothing said.
pub fn stop_signal(container: &ContainerSpec, image: &ImageDefaults) -> Signal {
    container.stop_signal.or_else(|| Signal::parse(&image.stop_signal)).unwrap_or(Signal::TERM)
}

/// A command replaces the image's entrypoint and with it the image's arguments; arguments alone replace only those.
fn args(container: &ContainerSpec, image: &ImageDefaults) -> Result<Vec<String>> {
    let (program, arguments) = match (container.command.is_empty(), container.args.is_empty()) {
        (false, _) => (&container.command, &container.args),
        (true, false) => (&image.entrypoint, &container.args),
        (true, true) => (&image.entrypoint, &image.cmd),
    };
    let args: Vec<String> = program.iter().chain(arguments).cloned().collect();
    match args.first() {
        None => Err(Error::invalid("neither the container nor its image says what to run")),
        Some(program) if program.is_empty() => Err(Error::invalid("the name of the program to run is empty")),
        Some(_) if args.iter().any(|arg| arg.contains('\0')) => {
            Err(Error::invalid("an argument contains NUL"))
        }
        Some(_) => Ok(args),
    }
}

/// The image's variables, then the pod's, then the container's: of two with one name the later one counts.
fn env(input: &Input<'_>) -> Result<Vec<String>> {
    let mut env = Environment::default();
    env.set("PATH", DEFAULT_PATH);
    if input.container.tty {
        env.set("TERM", "xterm");
    }
    for entry in &input.image.env {
        // What is no variable, a runtime would refuse; the image's author is not the one to be told.
        if let Some((name, value)) = entry.split_once('=')
            && !name.is_empty()
            && !entry.contains('\0')
        {
            env.set(name, value);
        }
    }
    let pod_name = &input.pod.hostname;
    let uses_node_name = pod_name.is_empty() || input.pod.namespaces.network == Scope::Node;
    env.set("HOSTNAME", if uses_node_name { &input.host.hostname } else { pod_name });
    for EnvVar { name, value } in &input.container.envs {
        let value = std::str::from_utf8(value).map_err(|_| {
            // JSON cannot say it, and a runtime would silently replace what it cannot read.
            Error::invalid(format!("the value of envs[{name:?}] is not UTF-8, which the OCI runtime needs"))
        })?;
        env.set(name, value);
    }
    Ok(env.list.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
}

/// Variables in the order in which they were first set.
#[derive(Default)]
struct Environment<'a> {
    list: Vec<(&'a str, &'a str)>,
    /// Where in the list: a request may have a hundred thousand.
    index: HashMap<&'a str, usize>,
}

impl<'a> Environment<'a> {
    fn set(&mut self, name: &'a str, value: &'a str) {
        let at = *self.index.entry(name).or_insert(self.list.len());
        match self.list.get_mut(at) {
            Some(entry) => entry.1 = value,
            None => self.list.push((name, value)),
        }
    }
}

/// The path is cleaned as text, like an image's author expects; symbolic links are the runtime's to follow, in the
/// root filesystem. A directory in /proc could be one of the node's, through a descriptor that somebody left open.
fn working_dir(container: &ContainerSpec, image: &ImageDefaults) -> Result<PathBuf> {
    let asked = if container.working_dir.is_empty() { &image.working_dir } else { &container.working_dir };
    if asked.contains('\0') || asked.len() >= crate::spec::PATH_BYTES_MAX {
        return Err(Error::invalid("the working directory is too long or contains NUL"));
    }
    let mut parts = Vec::new();
    for part in asked.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    if parts.len() > 1 && parts[0] == "proc" {
        return Err(Error::invalid(format!("the working directory {asked:?} is inside /proc")));
    }
    Ok(PathBuf::from(format!("/{}", parts.join("/"))))
}

fn oci_user(user: &User) -> OciUser {
    let mut out = OciUser::default();
    let groups = (!user.additional_gids.is_empty()).then(|| user.additional_gids.clone());
    out.set_uid(user.uid).set_gid(user.gid).set_additional_gids(groups);
    out
}

fn nofile(host: &Host) -> PosixRlimit {
    let hard = NOFILE_HARD.min(host.nofile_max);
    PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitNofile)
        .hard(hard)
        .soft(NOFILE_SOFT.min(hard))
        .build()
        .expect("every member has a default")
}

/// Without the right to, asking for a lower score than our own would fail the whole start.
fn oom_score_adj(asked: Option<i32>, host: &Host) -> i32 {
    let asked = asked.unwrap_or(0);
    if host.can_raise_limits() { asked } else { asked.max(host.oom_score_adj) }
}
