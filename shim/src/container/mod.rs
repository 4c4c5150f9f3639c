//! One container: create, start, update, reopen its log, remove. [`stop`] ends it, [`exec`] runs something beside it.
//!
//! `lifecycle` is held by create and start, and by the exit while it is recorded: so an exit is recorded after the start
//! it ends, however fast it was. Signals and waiting need no lock; a stop of 30 s blocks nobody.
//!
//! Never waits for a pid that it has not adopted, and never acts on a cgroup that it has not seen its init in.

pub(crate) mod exec;
mod facts;
pub(crate) mod rootfs;
pub(crate) mod state;
mod stop;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ocid_api::cgroup::Version;
use ocid_api::id::ContainerId;
use ocid_api::paths::ContainerPaths;
use ocid_api::shim::{self, ContainerState};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::board::Board;
use crate::cgroup::{self, Cgroup, oom};
use crate::error::{Context as _, Error, Result, shorten};
use crate::log;
use crate::process::{Process, Status, orphans};
use crate::record::{self, now_ns};
use crate::runc::Runc;
use crate::stdio::{ConsoleSocket, LogPath, Spec, Stdio};
use facts::Facts;
use rootfs::Rootfs;
use state::{Exit, State};

/// How long a terminal's last bytes may take; pipes take none.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);
/// How long processes that init left behind have to die.
const LEFTOVERS_DEADLINE: Duration = Duration::from_secs(5);
/// How long a runtime that has succeeded may take to send the terminal.
const CONSOLE_DEADLINE: Duration = Duration::from_secs(5);
/// How long a removal waits for the runtime to forget the container, beyond the runtime's own deadline.
const TAIL_DEADLINE: Duration = Duration::from_secs(300);
/// Longest message in an exit.
const MESSAGE_BYTES_MAX: usize = 1024;
/// Bound on the daemon's own data about a container.
pub(crate) const METADATA_BYTES_MAX: usize = 1 << 20;
/// Bound on the limits of a container, which are part of every state that is published.
const RESOURCES_BYTES_MAX: usize = 64 << 10;
/// Bound on an OCI configuration.
const CONFIG_BYTES_MAX: usize = 3 << 20;

/// What to create.
pub(crate) struct New {
    pub(crate) id: ContainerId,
    pub(crate) metadata: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) rootfs: shim::Rootfs,
    pub(crate) stdio: shim::Stdio,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Container {
    paths: ContainerPaths,
    /// The pod's run-time directory, for sockets, whose paths must be short.
    run_dir: PathBuf,
    runc: Arc<Runc>,
    board: Arc<Board>,
    own_pid_namespace: bool,
    lifecycle: tokio::sync::Mutex<()>,
    facts: watch::Sender<Facts>,
    live: Mutex<Live>,
    stop_deadline: Mutex<Option<Instant>>,
    /// Why the exit is not the program's own doing.
    failure: Mutex<Option<String>>,
    /// Whether the runtime has forgotten the container and its root filesystem is unmounted.
    tail: watch::Sender<bool>,
}

/// What only a living container has.
#[derive(Debug, Default)]
struct Live {
    process: Option<Arc<Process>>,
    stdio: Option<Arc<Stdio>>,
}

/// What we must know of an OCI configuration.
struct Config {
    own_pid_namespace: bool,
    /// The cgroup asked for, where it is a plain path.
    cgroup: String,
}

impl Container {
    /// The container before anything of it exists; [`Container::create`] makes it.
    pub(crate) fn new(
        new: &New,
        paths: ContainerPaths,
        run_dir: &Path,
        runc: &Arc<Runc>,
        board: &Arc<Board>,
    ) -> Result<Container> {
        if new.metadata.len() > METADATA_BYTES_MAX || new.config.len() > CONFIG_BYTES_MAX {
            return Err(Error::invalid("the container's metadata or configuration is too large"));
        }
        let config = parse_config(&new.config)?;
        let facts = Facts {
            id: new.id.to_string(),
            state: State::Creating,
            created_at_ns: now_ns(),
            stop_deadline_ns: 0,
            cgroup: config.cgroup,
            resources: Vec::new(),
            stdio: new.stdio.clone(),
            rootfs: new.rootfs.clone(),
            bundle: paths.bundle().to_string_lossy().into_owned(),
        };
        Ok(Container {
            paths,
            run_dir: run_dir.to_path_buf(),
            runc: Arc::clone(runc),
            board: Arc::clone(board),
            own_pid_namespace: config.own_pid_namespace,
            lifecycle: tokio::sync::Mutex::new(()),
            facts: watch::Sender::new(facts),
            live: Mutex::default(),
            stop_deadline: Mutex::default(),
            failure: Mutex::default(),
            tail: watch::Sender::new(false),
        })
    }

    /// Makes it, up to but not including the user's process. On error nothing is left.
    pub(crate) async fn create(self: &Arc<Self>, new: &New) -> Result<()> {
        let _lifecycle = self.lifecycle.lock().await;
        let mut runtime_ran = false;
        match self.bring_up(new, &mut runtime_ran).await {
            Ok(process) => {
                tokio::spawn(Arc::clone(self).watch_init(process));
                Ok(())
            }
            Err(cause) => {
                if let Err(e) = self.undo(runtime_ran).await {
                    log::say(&format!("container {}: undoing a failed create: {e}", self.id()));
                }
                Err(cause)
            }
        }
    }

    async fn bring_up(&self, new: &New, runtime_ran: &mut bool) -> Result<Arc<Process>> {
        cgroup::hasten();
        // Record first: whoever finds it after a crash can undo all that follows.
        record::make_dir(self.paths.record_dir()).context(|| "make the container's record".to_owned())?;
        record::replace(&self.paths.metadata(), &new.metadata).context(|| "write metadata".to_owned())?;
        record::reserve_exit(&self.paths).context(|| "reserve room for the exit".to_owned())?;
        self.board.put(&self.paths, self.to_message())?;

        record::make_dir(&self.paths.rootfs()).context(|| "make the bundle".to_owned())?;
        record::write_file(&self.paths.config(), &new.config, 0o600)
            .context(|| "write the bundle".to_owned())?;
        let shim::Rootfs { lower, upper, work, .. } = &new.rootfs;
        rootfs::mount_at(&Rootfs { lower, upper, work }, &self.paths.rootfs())?;

        let spec = stdio_spec(&new.stdio);
        let (stdio, ends) = Stdio::new(&spec).map_err(|e| Error::invalid(format!("open the log: {e}")))?;
        let console = match spec.tty {
            false => None,
            true => {
                // Short, for a socket's path has 107 bytes and the pod's directory has most of them.
                let name = format!("tty-{}", &self.id()[..8]);
                let socket = ConsoleSocket::listen(&self.run_dir.join(name));
                Some(socket.context(|| "listen for the terminal".to_owned())?)
            }
        };
        let hold = orphans::hold(); // until init is ours
        *runtime_ran = true;
        let pid = self
            .runc
            .create(&self.id(), self.paths.bundle(), console.as_ref().map(ConsoleSocket::path), ends)
            .await?;
        let process = Arc::new(Process::adopt(pid).context(|| format!("adopt init, process {pid}"))?);
        drop(hold);
        self.live().process = Some(Arc::clone(&process));
        if let Some(console) = console {
            let master =
                console.receive(CONSOLE_DEADLINE).await.context(|| "receive the terminal".to_owned())?;
            stdio.attach_console(master).context(|| "attach the terminal".to_owned())?;
        }
        self.live().stdio = Some(Arc::new(stdio));
        let mut facts = self.facts.borrow().clone();
        if let Some(cgroup) = Cgroup::of(pid) {
            cgroup.path().clone_into(&mut facts.cgroup);
        }
        facts.state = facts.state.created(pid)?;
        self.board.put(&self.paths, facts.to_message())?;
        self.facts.send_replace(facts);
        Ok(process)
    }

    /// Takes away whatever a failed create has left.
    async fn undo(&self, runtime_ran: bool) -> Result<()> {
        let process = self.process();
        if let Some(process) = &process {
            let _ = process.signal(libc::SIGKILL);
        }
        if runtime_ran {
            self.runc.delete_by_force(&self.id()).await.unwrap_or_else(|e| log::say(&e.to_string()));
            let known = self.cgroup().map(|cgroup| vec![cgroup]);
            for cgroup in known.unwrap_or_else(|| Cgroup::named_after(&self.id())) {
                if !cgroup.kill(LEFTOVERS_DEADLINE).await {
                    log::say(&format!(
                        "container {}: processes of {} survive SIGKILL",
                        self.id(),
                        cgroup.path()
                    ));
                }
                cgroup.remove();
            }
        }
        if let Some(process) = process {
            let _ = tokio::time::timeout(LEFTOVERS_DEADLINE, process.wait()).await;
        }
        *self.live() = Live::default();
        self.erase()
    }

    /// Deletes what is on disk.
    fn erase(&self) -> Result<()> {
        erase(&self.paths)?;
        self.board.forget(&self.id());
        Ok(())
    }

    /// Starts the user's process. Success if it runs already.
    pub(crate) async fn start(&self) -> Result<()> {
        let lifecycle = self.lifecycle.lock().await;
        if self.state().is_running() {
            return Ok(());
        }
        // The time before, so that a process that ends at once has not ended before it started.
        let started = self.state().started(now_ns())?;
        let Err(cause) = self.runc.start(&self.id()).await else {
            self.note(|facts| facts.state = started);
            return Ok(());
        };
        let message = shorten(cause.to_string(), MESSAGE_BYTES_MAX);
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(message);
        drop(lifecycle); // lets the exit be recorded
        self.kill().await?;
        Err(cause)
    }

    /// Takes the exit of init, records it, and clears up behind it.
    async fn watch_init(self: Arc<Self>, process: Arc<Process>) {
        let status = process.wait().await.unwrap_or_else(|e| {
            log::say(&format!("container {}: wait for init: {e}", self.id()));
            Status { code: 255, signal: 0 }
        });
        let finished_at_ns = now_ns();
        {
            let _lifecycle = self.lifecycle.lock().await;
            let cgroup = self.cgroup();
            if let Some(cgroup) = cgroup.as_ref().filter(|_| !self.own_pid_namespace) {
                // Without a pid namespace of its own, the end of init does not end the others.
                if !cgroup.kill(LEFTOVERS_DEADLINE).await {
                    log::say(&format!(
                        "container {}: processes of {} survive SIGKILL",
                        self.id(),
                        cgroup.path()
                    ));
                }
            }
            let oom_killed = cgroup.as_ref().is_some_and(|cgroup| oom::kills(cgroup) > 0);
            let stdio = self.live().stdio.clone();
            if let Some(stdio) = &stdio {
                stdio.drained(DRAIN_DEADLINE).await;
            }
            let exit = self.exit(status, oom_killed, finished_at_ns);
            match self.state().exited(exit) {
                Ok(exited) => self.note(|facts| {
                    facts.state = exited;
                    facts.stop_deadline_ns = 0;
                }),
                Err(refused) => log::say(&format!("container {}: exit: {refused:?}", self.id())),
            }
            self.live().process = None;
        }
        self.clear_up().await;
    }

    fn exit(&self, status: Status, oom_killed: bool, finished_at_ns: i64) -> Exit {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        match failure {
            Some(message) => Exit {
                code: 128,
                finished_at_ns,
                reason: "StartError".to_owned(),
                message,
                ..Exit::default()
            },
            None => Exit {
                code: status.code,
                signal: status.signal,
                oom_killed,
                finished_at_ns,
                ..Exit::default()
            },
        }
    }

    /// What is left to do once the exit is known, off everybody's path. A removal waits for it.
    async fn clear_up(&self) {
        if let Err(plain) = self.runc.delete(&self.id()).await {
            log::say(&format!("container {}: {plain}; by force, then", self.id()));
            if let Err(e) = self.runc.delete_by_force(&self.id()).await {
                log::say(&format!("container {}: {e}", self.id()));
            }
        }
        if let Some(cgroup) = self.cgroup() {
            cgroup.remove(); // where the runtime has not
        }
        if let Err(e) = rootfs::unmount_at(&self.paths.rootfs()) {
            log::say(&format!("container {}: {e}", self.id()));
        }
        // Closes the log, unless a descendant still writes to it: the container may stay for long, its log need not.
        let mut live = self.live();
        if live.stdio.as_ref().is_some_and(|stdio| stdio.has_ended()) {
            live.stdio = None;
        }
        drop(live);
        self.tail.send_replace(true);
    }

    /// Changes the limits.
    pub(crate) async fn update(&self, resources: &[u8]) -> Result<()> {
        if resources.len() > RESOURCES_BYTES_MAX {
            return Err(Error::invalid("the limits are too large"));
        }
        serde_json::from_slice::<serde::de::IgnoredAny>(resources)
            .map_err(|e| Error::invalid(format!("the limits are not JSON: {e}")))?;
        let _lifecycle = self.lifecycle.lock().await;
        match self.state() {
            State::Created { .. } | State::Running { .. } => {}
            State::Creating => return Err(state::Refused::NotYetCreated.into()),
            State::Exited { .. } => return Err(state::Refused::AlreadyExited.into()),
        }
        self.runc.update(&self.id(), resources).await?;
        self.note(|facts| facts.resources = resources.to_vec());
        Ok(())
    }

    /// Opens the log anew.
    pub(crate) fn reopen_log(&self) -> Result<()> {
        let stdio = self.live().stdio.clone().filter(|_| !self.state().has_exited());
        let stdio = stdio.ok_or_else(|| Error::precondition("the container does not run"))?;
        stdio.reopen_log().context(|| "open the log anew".to_owned())
    }

    /// Ends it by force if it lives and deletes everything of it but its log.
    pub(crate) async fn remove(&self) -> Result<()> {
        self.end().await?;
        *self.live() = Live::default();
        self.erase()
    }

    /// Kills it if it lives, and waits until nothing of it is left but files.
    async fn end(&self) -> Result<()> {
        self.settled().await;
        if matches!(self.state(), State::Creating) {
            return Ok(()); // its create has failed and left nothing
        }
        if !self.state().has_exited() {
            self.kill().await?;
        }
        let mut tail = self.tail.subscribe();
        tokio::time::timeout(TAIL_DEADLINE, tail.wait_for(|done| *done))
            .await
            .map_err(|_| Error::deadline("the runtime does not forget the container"))?
            .context(|| "wait for the runtime".to_owned())?;
        Ok(())
    }

    /// Ends it by force if it lives, and leaves its record.
    pub(crate) async fn retire(&self) -> Result<()> {
        self.end().await?;
        rootfs::unmount_at(&self.paths.rootfs())?;
        record::remove_dir(self.paths.bundle()).context(|| "remove the bundle".to_owned())
    }

    /// The state after a create that somebody else has begun.
    pub(crate) async fn created(&self) -> Result<ContainerState> {
        self.settled().await;
        match self.state() {
            State::Creating => Err(Error::internal("the container could not be created")),
            _ => Ok(self.to_message()),
        }
    }

    /// Waits for a create or start under way.
    async fn settled(&self) {
        drop(self.lifecycle.lock().await);
    }

    /// Its state on the wire.
    pub(crate) fn to_message(&self) -> ContainerState {
        self.facts.borrow().to_message()
    }

    /// Where it is in its life.
    pub(crate) fn state(&self) -> State {
        self.facts.borrow().state.clone()
    }

    fn id(&self) -> String {
        self.facts.borrow().id.clone()
    }

    fn cgroup(&self) -> Option<Cgroup> {
        Cgroup::new(Version::detect().ok()?, &self.facts.borrow().cgroup)
    }

    fn process(&self) -> Option<Arc<Process>> {
        self.live().process.clone()
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records and publishes what has become true. The board first: who waits for `facts` then finds it there.
    fn note(&self, change: impl FnOnce(&mut Facts)) {
        let mut facts = self.facts.borrow().clone();
        change(&mut facts);
        self.board.put_anyway(&self.paths, facts.to_message());
        self.facts.send_replace(facts);
    }
}

/// Deletes what is on disk of a container, its root filesystem unmounted first.
pub(crate) fn erase(paths: &ContainerPaths) -> Result<()> {
    rootfs::unmount_at(&paths.rootfs())?;
    record::remove_dir(paths.bundle()).context(|| "remove the bundle".to_owned())?;
    // The record goes before its directory: without it the container does not exist, whatever else is left.
    record::remove_file(&paths.record()).context(|| "remove the record".to_owned())?;
    record::remove_dir(paths.record_dir()).context(|| "remove the record".to_owned())
}

fn stdio_spec(stdio: &shim::Stdio) -> Spec {
    let log = (!stdio.log_path.is_empty())
        .then(|| LogPath { directory: (&stdio.log_directory).into(), path: (&stdio.log_path).into() });
    Spec { log, tty: stdio.tty, stdin: stdio.stdin }
}

fn parse_config(json: &[u8]) -> Result<Config> {
    #[derive(Default, serde::Deserialize)]
    #[serde(default, rename_all = "camelCase")]
    struct Linux {
        namespaces: Vec<Namespace>,
        cgroups_path: String,
    }
    #[derive(serde::Deserialize)]
    struct Namespace {
        r#type: String,
        #[serde(default)]
        path: String,
    }
    #[derive(serde::Deserialize)]
    struct Document {
        #[serde(default)]
        linux: Linux,
    }
    let document: Document =
        serde_json::from_slice(json).map_err(|e| Error::invalid(format!("the OCI configuration: {e}")))?;
    let Linux { namespaces, cgroups_path } = document.linux;
    Ok(Config {
        own_pid_namespace: namespaces.iter().any(|n| n.r#type == "pid" && n.path.is_empty()),
        cgroup: if cgroups_path.starts_with('/') { cgroups_path } else { String::new() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_namespace_is_its_own_only_without_a_path() {
        let parse = |json: &str| parse_config(json.as_bytes()).unwrap();
        let own = r#"{"linux":{"namespaces":[{"type":"pid"}],"cgroupsPath":"/a/b"}}"#;
        assert!(parse(own).own_pid_namespace);
        assert_eq!(parse(own).cgroup, "/a/b");
        assert!(!parse(r#"{"linux":{"namespaces":[{"type":"pid","path":"/p"}]}}"#).own_pid_namespace);
        assert!(!parse("{}").own_pid_namespace);
        assert_eq!(parse(r#"{"linux":{"cgroupsPath":"slice:ocid:x"}}"#).cgroup, "");
        assert!(parse_config(b"{").is_err());
    }
}
