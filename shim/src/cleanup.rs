//! Ends or removes a pod whose shim is gone, from its records alone.
//!
//! Idempotent, and works after a reboot: then no process, mount or cgroup of the pod exists, whatever the record says,
//! and only records change. Never touches a pod whose lock is held.
//!
//! What the shim had begun may still go on: a call of the runtime outlives it, and would make a container after we have
//! looked. So these are ended first, then the containers that they have made.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use ocid_api::cgroup::Version;
use ocid_api::id::{ContainerId, PodId};
use ocid_api::paths::{Dirs, PodPaths};
use ocid_api::record::{containers, read_container, read_pod};
use ocid_api::shim::{ContainerPhase, ContainerState, Exit, NetworkPhase, PodPhase, PodState};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::cgroup::Cgroup;
use crate::container::{erase, rootfs};
use crate::error::{Context as _, Error, Result};
use crate::pod::{self, namespaces};
use crate::process::tree;
use crate::record::{self, boot_id, now_ns};
use crate::{lock, log, runc};

/// How long the killed have to die.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// How long the dying may keep a cgroup from being removed.
const REMOVE_DEADLINE: Duration = Duration::from_secs(1);
/// How long the lock may be held by what a dying shim has started.
const LOCK_DEADLINE: Duration = Duration::from_millis(500);
/// Between two looks at who still lives.
const PAUSE: Duration = Duration::from_millis(2);

/// How far to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Depth {
    /// End every container and record it.
    End,
    /// Also release the namespaces: the pod is stopped.
    Detached,
    /// Also delete everything.
    Remove,
    /// Delete one container.
    RemoveContainer(ContainerId),
}

/// Cleans up.
///
/// # Errors
/// If the shim lives, or something could not be ended or removed; it may be repeated.
pub fn run(id: &PodId, dirs: &Dirs, depth: &Depth) -> Result<()> {
    // Whose directory it was may be unmounted some day; and the runtime is started without naming one.
    std::env::set_current_dir("/").context(|| "change to /".to_owned())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context(|| "start the runtime".to_owned())?;
    runtime.block_on(cleanup(&dirs.pod(id), depth))
}

async fn cleanup(paths: &PodPaths, depth: &Depth) -> Result<()> {
    // Held while we work, so that no two of us meet and no shim begins. Its directory is gone after a stop or a reboot.
    let _lock = match record::make_dir(paths.run_dir()) {
        // No shim can begin without that directory either.
        Err(e) if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => None,
        made => {
            made.context(|| format!("make {}", paths.run_dir().display()))?;
            Some(lock(paths).await?)
        }
    };
    let state = match read_pod(paths) {
        Ok(state) => state,
        // A record that nobody can read hides nothing that removing it would lose.
        Err(_) if *depth == Depth::Remove => None,
        Err(e) => return Err(e).context(|| "read the pod's record".to_owned()),
    };
    let state = state.unwrap_or_default();
    let cleaner = Cleaner { paths, alive: state.boot_id.is_empty() || state.boot_id == boot_id(), state };
    let result = cleaner.run(depth).await;
    // A pod that has stopped, or never was, has no run-time files: what is there is the directory we made for the lock.
    let over = matches!(depth, Depth::Detached | Depth::Remove) || cleaner.never_ran_or_stopped();
    if result.is_ok() && over {
        record::remove_dir(paths.run_dir()).context(|| "remove the pod's run-time files".to_owned())?;
    }
    result
}

/// Takes the lock. A child that the shim was about to start when it died holds it until it runs its program.
async fn lock(paths: &PodPaths) -> Result<File> {
    let deadline = Instant::now() + LOCK_DEADLINE;
    loop {
        match lock::take(paths)? {
            Some(lock) => return Ok(lock),
            None if Instant::now() < deadline => tokio::time::sleep(PAUSE).await,
            None => return Err(Error::precondition("the pod's shim lives")),
        }
    }
}

struct Cleaner<'a> {
    paths: &'a PodPaths,
    state: PodState,
    /// Whether this is still the boot in which the pod was made.
    alive: bool,
}

impl Cleaner<'_> {
    async fn run(&self, depth: &Depth) -> Result<()> {
        if self.alive {
            self.end_calls().await?;
        }
        if let Depth::RemoveContainer(id) = depth {
            self.end(id, false).await?;
            return erase(&self.paths.container(id));
        }
        if self.alive
            && let Some(pid) = self.state.namespaces.as_ref().map(|n| &n.pid).filter(|pid| !pid.is_empty())
        {
            namespaces::kill_pid_namespace(pid.as_ref());
        }
        let ids = self.containers()?;
        let mut result = Ok(());
        for id in &ids {
            result = result.and(self.end(id, *depth != Depth::Remove).await);
        }
        result?;
        if *depth == Depth::End && self.state.phase.enum_value_or_default() != PodPhase::POD_PHASE_UNSPECIFIED
        {
            return Ok(());
        }
        if *depth == Depth::Remove {
            for id in &ids {
                erase(&self.paths.container(id))?;
            }
        }
        if self.alive
            && let Some(cgroup) = Version::detect().ok().and_then(|v| Cgroup::new(v, &self.state.cgroup))
        {
            cgroup.remove_within(REMOVE_DEADLINE).await;
        }
        self.release()?;
        match depth {
            Depth::Remove => pod::erase_record(self.paths),
            _ => self.record_stopped(),
        }
    }

    /// Those that have a record, and those of which only run-time files are left.
    fn containers(&self) -> Result<BTreeSet<ContainerId>> {
        let recorded = containers(self.paths).context(|| "list the pod's containers".to_owned())?;
        let bundles = fs::read_dir(self.paths.bundles()).into_iter().flatten().flatten();
        let bundles = bundles.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        Ok(recorded.into_iter().chain(bundles).collect())
    }

    /// Ends what the shim has started and had no time to write down: calls of the runtime, with all below them, and the
    /// init of a pid namespace that is not pinned yet.
    async fn end_calls(&self) -> Result<()> {
        let deadline = Instant::now() + KILL_DEADLINE;
        loop {
            let mut left = false;
            for pid in self.calls() {
                left = true;
                let Some(Ok(pidfd)) = Pid::from_raw(pid).map(|pid| pidfd_open(pid, PidfdFlags::empty()))
                else {
                    continue;
                };
                if self.is_call(pid) {
                    // Stopped, it keeps its pid until it is killed.
                    let _ = pidfd_send_signal(&pidfd, Signal::STOP);
                    tree::kill_descendants(pid, Vec::new);
                    let _ = pidfd_send_signal(&pidfd, Signal::KILL);
                }
            }
            if !left {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::deadline("what the pod's shim has started survives SIGKILL"));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn calls(&self) -> Vec<i32> {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| self.is_call(*pid)).collect()
    }

    /// By its command line, which names files of this pod that nothing else does. A zombie has none.
    fn is_call(&self, pid: i32) -> bool {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let args = || line.split(|byte| *byte == 0);
        runc::is_call(args(), self.paths.run_dir()) || namespaces::is_pause(args(), self.paths)
    }

    /// Ends one container and, unless it is to be deleted, records how.
    async fn end(&self, id: &ContainerId, keep: bool) -> Result<()> {
        let paths = self.paths.container(id);
        let recorded = read_container(self.paths, id).ok().flatten();
        let exited =
            recorded.as_ref().is_some_and(|c| c.phase.enum_value() == Ok(ContainerPhase::CONTAINER_EXITED));
        if self.alive {
            self.kill(id, recorded.as_ref()).await?;
            rootfs::unmount_at(&paths.rootfs())?;
        }
        record::remove_dir(paths.bundle()).context(|| "remove a bundle".to_owned())?;
        match recorded {
            None => erase(&paths), // it was never recorded, or nobody can read what was
            Some(container)
                if !exited && container.phase.enum_value() == Ok(ContainerPhase::CONTAINER_CREATING) =>
            {
                erase(&paths) // its creation was never answered
            }
            Some(_) if exited || !keep => Ok(()),
            Some(_) => {
                let exit = Exit {
                    code: 137,
                    signal: 9,
                    finished_at_ns: now_ns(),
                    reason: "ShimLost".to_owned(),
                    message: self.why().to_owned(),
                    ..Default::default()
                };
                record::write_exit(&paths, &exit).context(|| format!("record the exit of {id}"))
            }
        }
    }

    fn why(&self) -> &'static str {
        match self.alive {
            true => "the pod's shim died; its containers were killed",
            false => "the machine was restarted",
        }
    }

    async fn kill(&self, id: &ContainerId, recorded: Option<&ContainerState>) -> Result<()> {
        let recorded = recorded
            .and_then(|container| Some((Version::detect().ok()?, &container.cgroup)))
            .and_then(|(version, path)| Cgroup::new(version, path));
        // Where no cgroup is recorded, those named after the container: no other has such a name.
        let cgroups =
            || recorded.clone().map_or_else(|| Cgroup::named_after(id.as_str()), |known| vec![known]);
        for cgroup in cgroups() {
            cgroup.kill(KILL_DEADLINE).await;
        }
        // The runtime has a state of its own to forget, and knows of processes when we know of no cgroup.
        if let Some(runtime) = self.state.runtime.as_ref().filter(|runtime| !runtime.binary.is_empty()) {
            let runc = pod::runc(runtime, self.paths.run_dir().to_path_buf());
            if let Err(e) = runc.delete_by_force(id.as_str()).await {
                log::say(&format!("container {id}: {e}"));
            }
        }
        for cgroup in cgroups() {
            if !cgroup.processes().is_empty() {
                return Err(Error::deadline(format!("processes of container {id} survive SIGKILL")));
            }
            cgroup.remove_within(REMOVE_DEADLINE).await;
        }
        Ok(())
    }

    fn release(&self) -> Result<()> {
        if self.alive { pod::release(self.paths, &self.state.cgroup) } else { pod::release(self.paths, "") }
    }

    fn record_stopped(&self) -> Result<()> {
        if self.state.phase.enum_value_or_default() == PodPhase::POD_PHASE_UNSPECIFIED {
            return Ok(()); // never recorded
        }
        let mut state = self.state.clone();
        state.phase = PodPhase::POD_STOPPED.into();
        let mut network = state.network.take().unwrap_or_default();
        network.phase = NetworkPhase::NETWORK_DETACHED.into();
        state.network = Some(network).into();
        record::write_pod(self.paths, &state).context(|| "write the pod's record".to_owned())
    }

    fn never_ran_or_stopped(&self) -> bool {
        matches!(
            self.state.phase.enum_value_or_default(),
            PodPhase::POD_PHASE_UNSPECIFIED | PodPhase::POD_STOPPED
        )
    }
}
