//! `ocid-shim`: argv, and which of its three lives begins.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use ocid_api::id::{ContainerId, PodId};
use ocid_api::paths::Dirs;
use ocid_shim::cleanup::Depth;
use ocid_shim::error::{Error, Result};
use ocid_shim::{cleanup, pause, serve};

const USAGE: &str = "usage: ocid-shim serve --pod ID --root DIR --state DIR [--cgroup PATH]
       ocid-shim cleanup --pod ID --root DIR --state DIR [--detached | --remove | --remove-container ID]
       ocid-shim pause PATH
       ocid-shim --version
";

fn main() -> ExitCode {
    match run(std::env::args_os().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "ocid-shim: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut args: impl Iterator<Item = OsString>) -> Result<()> {
    let verb = args.next().unwrap_or_default();
    match verb.to_str() {
        Some("serve") => {
            let flags = Flags::parse(args)?;
            flags.no_depth()?;
            let (pod, dirs) = flags.pod()?;
            serve::run(&pod, &dirs, flags.cgroup.as_deref())
        }
        Some("cleanup") => {
            let flags = Flags::parse(args)?;
            let (pod, dirs) = flags.pod()?;
            cleanup::run(&pod, &dirs, &flags.depth.unwrap_or(Depth::End))
        }
        Some("pause") => {
            let pinned =
                args.next().ok_or_else(|| Error::invalid("pause needs the path of its namespace"))?;
            pause::run(&directory("pause", pinned)?)
        }
        Some("--version") => {
            let _ = writeln!(std::io::stdout(), "ocid-shim {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        _ => Err(Error::invalid(format!("unknown command\n{USAGE}"))),
    }
}

/// The flags of `serve` and `cleanup`.
#[derive(Debug, Default)]
struct Flags {
    pod: Option<PodId>,
    root: Option<PathBuf>,
    state: Option<PathBuf>,
    cgroup: Option<String>,
    depth: Option<Depth>,
}

impl Flags {
    fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Flags> {
        let mut flags = Flags::default();
        while let Some(flag) = args.next() {
            let name = flag.to_string_lossy().into_owned();
            let mut value = || args.next().ok_or_else(|| Error::invalid(format!("{name} needs a value")));
            match name.as_str() {
                "--pod" => flags.pod = Some(parse(&name, value()?)?),
                "--root" => flags.root = Some(directory(&name, value()?)?),
                "--state" => flags.state = Some(directory(&name, value()?)?),
                "--cgroup" => flags.cgroup = Some(parse(&name, value()?)?),
                "--detached" => flags.set_depth(Depth::Detached)?,
                "--remove" => flags.set_depth(Depth::Remove)?,
                "--remove-container" => {
                    let container: ContainerId = parse(&name, value()?)?;
                    flags.set_depth(Depth::RemoveContainer(container))?;
                }
                _ => return Err(Error::invalid(format!("unknown flag {name}"))),
            }
        }
        Ok(flags)
    }

    fn set_depth(&mut self, depth: Depth) -> Result<()> {
        match self.depth.replace(depth) {
            None => Ok(()),
            Some(_) => Err(Error::invalid("one of --detached, --remove and --remove-container")),
        }
    }

    fn no_depth(&self) -> Result<()> {
        self.depth.as_ref().map_or(Ok(()), |_| Err(Error::invalid("serve removes nothing")))
    }

    fn pod(&self) -> Result<(PodId, Dirs)> {
        match (&self.pod, &self.root, &self.state) {
            (Some(pod), Some(root), Some(state)) => {
                Ok((pod.clone(), Dirs { root: root.clone(), state: state.clone() }))
            }
            _ => Err(Error::invalid("--pod, --root and --state are needed")),
        }
    }
}

fn parse<T: std::str::FromStr>(name: &str, value: OsString) -> Result<T>
where
    T::Err: std::fmt::Display,
{
    let value = value.into_string().map_err(|_| Error::invalid(format!("{name} is not text")))?;
    value.parse().map_err(|e| Error::invalid(format!("{name}: {e}")))
}

fn directory(name: &str, value: OsString) -> Result<PathBuf> {
    let path = PathBuf::from(value);
    if path.is_absolute() { Ok(path) } else { Err(Error::invalid(format!("{name} is not an absolute path"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(args: &[&str]) -> Result<Flags> {
        Flags::parse(args.iter().map(OsString::from))
    }

    #[test]
    fn flags_are_checked_before_anything_is_done() {
        let id = "0123456789abcdef".repeat(4);
        let good = flags(&["--pod", &id, "--root", "/r", "--state", "/s", "--detached"]).unwrap();
        assert_eq!(good.pod().unwrap().0.as_str(), id);
        assert_eq!(good.depth, Some(Depth::Detached));
        for bad in [
            &["--pod", "x"][..],
            &["--pod"],
            &["--root", "r"],
            &["--what"],
            &["--detached", "--remove"],
            &["--remove-container", ".."],
        ] {
            assert!(flags(bad).is_err(), "{bad:?}");
        }
        assert!(flags(&[]).unwrap().pod().is_err());
    }
}
