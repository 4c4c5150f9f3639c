//! The configuration: the whole file, the meaning and the default of every setting beside it.
//!
//! Read from one TOML file and then, in the order of their names, from the `*.toml` files of the directory `config.d`
//! beside it; a later file replaces what an earlier one says, table by table, key by key. No file at all is a good
//! configuration. An unknown key is an error: a misspelt setting must not be silently the default.
//!
//! `ocid config` prints the result with these comments, so the documentation cannot lag behind.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Kind, Result};

/// Where the configuration is, unless `--config` says otherwise.
pub const PATH: &str = "/etc/ocid/config.toml";

/// Longest configuration file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Longest time-out that can be set, in seconds: a day.
const TIMEOUT_S_MAX: u64 = 86_400;
/// Twice this and what holds it together are kubelet's 16 MiB.
const EXEC_OUTPUT_BYTES_MAX: usize = (8 << 20) - 1024;

/// A section that can be written with a comment on each field.
pub trait Section: Serialize {
    /// Every field's name and comment, in order.
    const FIELDS: &'static [(&'static str, &'static [&'static str])];
}

/// Declares a section: fields with their comment and default.
#[macro_export]
macro_rules! section {
    ($(#[doc = $doc:literal])* $vis:vis struct $name:ident {
        $($(#[doc = $field_doc:literal])* $field:ident : $ty:ty = $default:expr,)*
    }) => {
        $(#[doc = $doc])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        $vis struct $name { $($(#[doc = $field_doc])* pub $field: $ty,)* }

        impl Default for $name {
            fn default() -> $name {
                $name { $($field: $default,)* }
            }
        }

        impl $crate::config::Section for $name {
            const FIELDS: &'static [(&'static str, &'static [&'static str])] =
                &[$((stringify!($field), &[$($field_doc),*])),*];
        }
    };
}

section! {
    /// What concerns the daemon as a whole.
    pub struct Node {
        /// Durable directory: images, snapshots, pod records. Owned by root, not on a network file system.
        root: PathBuf = "/var/lib/ocid".into(),
        /// Directory of what has meaning only until a reboot: sockets, namespaces, bundles.
        state: PathBuf = "/run/ocid".into(),
        /// The CRI socket. Empty means `ocid.sock` in the state directory.
        listen: PathBuf = PathBuf::new(),
        /// What to log: a level (error, warn, info, debug, trace) or tracing's filter syntax. `RUST_LOG` overrides it.
        log: String = "info".into(),
        /// How long a stopping daemon waits for requests under way, in seconds. Pods never wait for it: they run on.
        shutdown_grace_s: u64 = 10,
    }
}

section! {
    /// How containers are run.
    pub struct Runtime {
        /// Handler of pods that name none.
        default_handler: String = "runc".into(),
        /// Who makes cgroups: "systemd", "cgroupfs", or "auto": systemd where systemd runs the machine.
        cgroup_driver: String = "auto".into(),
        /// Cgroup of pods that come without a parent (kubelet always sends one). With the systemd driver its last
        /// component becomes a slice.
        cgroup_parent: String = "/ocid".into(),
        /// How long one run of an OCI runtime may take, in seconds.
        timeout_s: u64 = 120,
        /// Size of a pod's /dev/shm, in bytes.
        shm_bytes: u64 = 64 << 20,
        /// How much of each stream ExecSync keeps, in bytes. Both together must fit kubelet's 16 MiB message.
        exec_output_bytes_max: usize = 8_000_000,
    }
}

section! {
    /// An OCI runtime that RuntimeClasses can name.
    pub struct Handler {
        /// The binary: an absolute path, or a name that is looked up in PATH.
        path: PathBuf = "runc".into(),
    }
}

section! {
    /// The processes that hold the pods.
    pub struct ShimSection {
        /// The shim binary. Empty means `ocid-shim` beside the daemon's own binary.
        path: PathBuf = PathBuf::new(),
        /// Cgroup for shims, outside the pods' and the daemon's own, so that neither limit nor stop reaches them.
        /// Empty leaves them where the daemon is.
        cgroup: String = "/ocid-shims".into(),
        /// How long a shim may take until it serves, in seconds.
        start_timeout_s: u64 = 10,
        /// How long a shim may take to answer a call that runs nothing, in seconds.
        call_timeout_s: u64 = 10,
        /// How long ending a pod whose shim is gone may take, in seconds.
        cleanup_timeout_s: u64 = 30,
    }
}

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `[node]`
    pub node: Node,
    /// `[runtime]`
    pub runtime: Runtime,
    /// `[handlers.NAME]`
    pub handlers: BTreeMap<String, Handler>,
    /// `[shim]`
    pub shim: ShimSection,
    /// `[network]`
    pub network: crate::network::Config,
    /// `[image]`
    pub image: crate::image::Config,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            node: Node::default(),
            runtime: Runtime::default(),
            handlers: BTreeMap::from([("runc".to_owned(), Handler::default())]),
            shim: ShimSection::default(),
            network: crate::network::Config::default(),
            image: crate::image::Config::default(),
        }
    }
}

/// What the command line says, above every file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--root`
    pub root: Option<PathBuf>,
    /// `--state`
    pub state: Option<PathBuf>,
    /// `--listen`
    pub listen: Option<PathBuf>,
}

impl Config {
    /// Reads and checks the configuration. A missing file is an empty one, unless it was asked for by name.
    ///
    /// # Errors
    /// If a file cannot be read, is not TOML, has an unknown key or a value that cannot work. The text names the file.
    pub fn load(path: Option<&Path>, overrides: Overrides) -> Result<Config> {
        let main = path.unwrap_or(Path::new(PATH));
        let mut merged = toml::Table::new();
        match read(main)? {
            Some(text) => merge(&mut merged, parse(main, &text)?),
            None if path.is_some() => {
                return Err(Error::invalid(format!("{}: no such file", main.display())));
            }
            None => {}
        }
        for file in drop_ins(main)? {
            if let Some(text) = read(&file)? {
                merge(&mut merged, parse(&file, &text)?);
            }
        }
        let mut config: Config = merged
            .try_into()
            .context(Kind::InvalidArgument, || format!("{} with its drop-ins", main.display()))?;
        let Overrides { root, state, listen } = overrides;
        config.node.root = root.unwrap_or(config.node.root);
        config.node.state = state.unwrap_or(config.node.state);
        config.node.listen = listen.unwrap_or(config.node.listen);
        if config.node.listen.as_os_str().is_empty() {
            config.node.listen = config.node.state.join("ocid.sock");
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        self.check_paths()?;
        self.check_numbers()?;
        if !self.handlers.contains_key(&self.runtime.default_handler) {
            let known: Vec<_> = self.handlers.keys().map(String::as_str).collect();
            return Err(Error::invalid(format!(
                "runtime.default_handler: there is no handler {:?}; there are: {}",
                self.runtime.default_handler,
                known.join(", ")
            )));
        }
        if !["auto", "systemd", "cgroupfs"].contains(&self.runtime.cgroup_driver.as_str()) {
            return Err(Error::invalid(format!(
                "runtime.cgroup_driver: {:?} is none of auto, systemd, cgroupfs",
                self.runtime.cgroup_driver
            )));
        }
        let downwards = |cgroup: &str| cgroup.starts_with('/') && !cgroup.contains("..");
        if !downwards(&self.runtime.cgroup_parent) {
            return Err(Error::invalid("runtime.cgroup_parent: must begin with a slash and go downwards"));
        }
        if !self.shim.cgroup.is_empty() && !downwards(&self.shim.cgroup) {
            return Err(Error::invalid("shim.cgroup: must begin with a slash and go downwards"));
        }
        Ok(())
    }

    /// What a relative path means depends on where somebody started us.
    fn check_paths(&self) -> Result<()> {
        let mut dirs = vec![
            ("node.root", &self.node.root),
            ("node.state", &self.node.state),
            ("node.listen", &self.node.listen),
            ("network.conf_dir", &self.network.conf_dir),
            ("image.certs_dir", &self.image.certs_dir),
        ];
        dirs.extend(self.network.plugin_dirs.iter().map(|dir| ("network.plugin_dirs", dir)));
        dirs.extend(
            Some(("image.preload_dir", &self.image.preload_dir))
                .filter(|(_, dir)| !dir.as_os_str().is_empty()),
        );
        if let Some((name, path)) = dirs.into_iter().find(|(_, path)| !path.is_absolute()) {
            return Err(Error::invalid(format!("{name}: {:?} is not an absolute path", path.display())));
        }
        let handlers =
            self.handlers.iter().map(|(name, handler)| (format!("handlers.{name}.path"), &handler.path));
        for (name, path) in handlers.chain([("shim.path".to_owned(), &self.shim.path)]) {
            if !path.is_absolute() && path.components().count() > 1 {
                let text =
                    format!("{name}: {:?} is neither an absolute path nor a bare name", path.display());
                return Err(Error::invalid(text));
            }
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<()> {
        let deadlines = [
            ("runtime.timeout_s", self.runtime.timeout_s),
            ("shim.start_timeout_s", self.shim.start_timeout_s),
            ("shim.call_timeout_s", self.shim.call_timeout_s),
            ("shim.cleanup_timeout_s", self.shim.cleanup_timeout_s),
            ("network.add_timeout_s", self.network.add_timeout_s),
            ("network.del_timeout_s", self.network.del_timeout_s),
            ("network.check_timeout_s", self.network.check_timeout_s),
            ("network.gc_timeout_s", self.network.gc_timeout_s),
            ("network.status_timeout_s", self.network.status_timeout_s),
            ("image.connect_timeout_s", self.image.connect_timeout_s),
            ("image.stall_timeout_s", self.image.stall_timeout_s),
        ];
        if let Some((name, seconds)) = deadlines.into_iter().find(|(_, s)| !(1..=TIMEOUT_S_MAX).contains(s)) {
            return Err(Error::invalid(format!("{name}: {seconds} is not between 1 and {TIMEOUT_S_MAX}")));
        }
        if self.runtime.exec_output_bytes_max > EXEC_OUTPUT_BYTES_MAX {
            return Err(Error::invalid(format!(
                "runtime.exec_output_bytes_max: more than {EXEC_OUTPUT_BYTES_MAX} for each of two streams do not fit kubelet's message"
            )));
        }
        Ok(())
    }

    /// The configuration as a commented TOML file.
    ///
    /// # Errors
    /// If a path is not UTF-8, which TOML cannot hold.
    pub fn document(&self) -> Result<String> {
        let mut text = String::from(
            "# The configuration of ocid as it is in effect.\n# Every setting is optional; remove what you do not change.\n",
        );
        write_section(&mut text, "node", &self.node)?;
        write_section(&mut text, "runtime", &self.runtime)?;
        for (name, handler) in &self.handlers {
            write_section(&mut text, &format!("handlers.{name}"), handler)?;
        }
        write_section(&mut text, "shim", &self.shim)?;
        write_section(&mut text, "network", &self.network)?;
        write_section(&mut text, "image", &self.image)?;
        Ok(text)
    }
}

fn write_section<S: Section>(text: &mut String, name: &str, section: &S) -> Result<()> {
    let what = || format!("print [{name}]");
    let table = toml::Table::try_from(section).context(Kind::Internal, what)?;
    writeln!(text, "\n[{name}]").context(Kind::Internal, what)?;
    for (field, comment) in S::FIELDS {
        for line in *comment {
            writeln!(text, "#{line}").context(Kind::Internal, what)?;
        }
        match table.get(*field) {
            Some(value) => writeln!(text, "{field} = {value}"),
            // TOML has no null: an absent setting is shown as what it would look like.
            None => writeln!(text, "# {field} ="),
        }
        .context(Kind::Internal, what)?;
    }
    Ok(())
}

fn drop_ins(main: &Path) -> Result<Vec<PathBuf>> {
    let dir = main.parent().unwrap_or(Path::new("/")).join("config.d");
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::with_source(Kind::Internal, format!("list {}", dir.display()), e)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.context(Kind::Internal, || format!("list {}", dir.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<Option<String>> {
    let what = || format!("read {}", path.display());
    // Without waiting: it may be a pipe.
    let file =
        File::options().read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed()).open(path);
    let file = match file {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::with_source(Kind::Internal, what(), e)),
    };
    let metadata = file.metadata().context(Kind::Internal, what)?;
    if !metadata.is_file() {
        return Err(Error::invalid(format!("{} is not a file", path.display())));
    }
    // Who can write it decides what runs as root.
    let owner = metadata.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        let text = format!("{} belongs to user {owner}: it must be root's (chown root)", path.display());
        return Err(Error::new(Kind::PermissionDenied, text));
    }
    if metadata.mode() & 0o022 != 0 {
        let text = format!(
            "{} can be written by others than its owner: its mode is {:03o} (chmod go-w)",
            path.display(),
            metadata.mode() & 0o777
        );
        return Err(Error::new(Kind::PermissionDenied, text));
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).context(Kind::Internal, what)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(Error::invalid(format!("{} is larger than {FILE_BYTES_MAX} bytes", path.display())));
    }
    Ok(Some(text))
}

/// Parses one file and checks it on its own, so that an unknown key is reported with its file and line.
fn parse(path: &Path, text: &str) -> Result<toml::Table> {
    let what = || path.display().to_string();
    toml::from_str::<Config>(text).context(Kind::InvalidArgument, what)?;
    toml::from_str(text).context(Kind::InvalidArgument, what)
}

fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn load(files: &[(&str, &str)]) -> Result<Config> {
        load_with_mode(files, 0o644)
    }

    fn load_with_mode(files: &[(&str, &str)], mode: u32) -> Result<Config> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("config.d")).unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        Config::load(Some(&dir.path().join("config.toml")), Overrides::default())
    }

    #[test]
    fn an_empty_file_is_the_default() {
        let mut default = Config::default();
        default.node.listen = "/run/ocid/ocid.sock".into();
        assert_eq!(load(&[("config.toml", "")]).unwrap(), default);
    }

    #[test]
    fn drop_ins_replace_key_by_key_in_the_order_of_their_names() {
        let config = load(&[
            ("config.toml", "[node]\nlog = \"warn\"\nroot = \"/a\""),
            ("config.d/20.toml", "[node]\nlog = \"trace\""),
            ("config.d/10.toml", "[node]\nlog = \"debug\"\nstate = \"/b\""),
            ("config.d/ignored.txt", "not toml"),
        ])
        .unwrap();
        assert_eq!(
            (config.node.log.as_str(), config.node.root, config.node.state),
            ("trace", "/a".into(), "/b".into())
        );
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_file_and_key() {
        let error =
            load(&[("config.toml", ""), ("config.d/x.toml", "[node]\nrooot = 1")]).unwrap_err().to_string();
        assert!(error.contains("config.d/x.toml") && error.contains("rooot"), "{error}");
    }

    #[test]
    fn a_file_that_others_may_write_is_refused() {
        for mode in [0o664, 0o646] {
            let error = load_with_mode(&[("config.toml", "")], mode).unwrap_err();
            assert_eq!(error.kind(), Kind::PermissionDenied);
            assert!(
                error.to_string().contains("config.toml") && error.to_string().contains("chmod"),
                "{error}"
            );
        }
        assert!(load_with_mode(&[("config.toml", "")], 0o640).is_ok());
    }

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        let table = [
            ("[node]\nlisten = \"a/b\"", "node.listen"),
            ("[network]\nconf_dir = \"net.d\"", "network.conf_dir"),
            ("[network]\nplugin_dirs = [\"/a\", \"b\"]", "network.plugin_dirs"),
            ("[image]\ncerts_dir = \"\"", "image.certs_dir"),
            ("[image]\npreload_dir = \"p\"", "image.preload_dir"),
            ("[handlers.runc]\npath = \"bin/runc\"", "handlers.runc.path"),
            ("[shim]\npath = \"./shim\"", "shim.path"),
            ("[shim]\ncgroup = \"/../x\"", "shim.cgroup"),
            ("[shim]\ncall_timeout_s = 0", "shim.call_timeout_s"),
            ("[runtime]\ntimeout_s = 18446744073709551", "runtime.timeout_s"),
            ("[runtime]\nexec_output_bytes_max = 9000000", "runtime.exec_output_bytes_max"),
        ];
        for (text, name) in table {
            let error = load(&[("config.toml", text)]).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument, "{text}");
            assert!(error.to_string().starts_with(name), "{text}: {error}");
        }
    }

    #[test]
    fn a_default_handler_that_is_not_there_is_refused() {
        let error =
            load(&[("config.toml", "[runtime]\ndefault_handler = \"kata\"")]).unwrap_err().to_string();
        assert!(error.contains("kata") && error.contains("runc"), "{error}");
    }

    #[test]
    fn the_printed_configuration_is_a_configuration_that_says_the_same() {
        let config = load(&[("config.toml", "[node]\nlog = \"warn\"")]).unwrap();
        let text = config.document().unwrap();
        assert_eq!(load(&[("config.toml", &text)]).unwrap(), config);
        assert!(text.contains("# Handler of pods that name none."), "{text}");
    }
}
