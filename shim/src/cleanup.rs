//! Ends or removes a pod whose shim is gone, from its records alone.
//!
//! Idempotent, and works after a reboot: then no process, mount or cgroup of the pod exists, whatever the record says,
//! and only records change. Never touches a pod whose lock is held.

use std::time::Duration;

use ocid_api::cgroup::Version;
use ocid_api::id::{ContainerId, PodId};
use ocid_api::paths::{Dirs, PodPaths};
use ocid_api::record::{containers, read_container, read_pod};
use ocid_api::shim::{ContainerPhase, ContainerState, Exit, NetworkPhase, PodPhase, PodState};

use crate::cgroup::Cgroup;
use crate::container::{erase, rootfs};
use crate::error::{Context as _, Error, Result};
use crate::pod::{self, namespaces};
use crate::record::{self, boot_id, now_ns};
use crate::{lock, log};

/// How long the killed have to die.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

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
    record::make_dir(paths.run_dir()).context(|| format!("make {}", paths.run_dir().display()))?;
    let lock = lock::take(paths)?;
    let _lock = lock.ok_or_else(|| Error::precondition("the pod's shim lives"))?;
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

struct Cleaner<'a> {
    paths: &'a PodPaths,
    state: PodState,
    /// Whether this is still the boot in which the pod was made.
    alive: bool,
}

impl Cleaner<'_> {
    async fn run(&self, depth: &Depth) -> Result<()> {
        if let Depth::RemoveContainer(id) = depth {
            self.end(id).await?;
            return erase(&self.paths.container(id));
        }
        if self.alive
            && let Some(pid) = self.state.namespaces.as_ref().map(|n| &n.pid).filter(|pid| !pid.is_empty())
        {
            namespaces::kill_pid_namespace(pid.as_ref());
        }
        let ids = containers(self.paths).context(|| "list the pod's containers".to_owned())?;
        let mut result = Ok(());
        for id in &ids {
            result = result.and(self.end(id).await);
        }
        result?;
        if *depth == Depth::End {
            return Ok(());
        }
        if *depth == Depth::Remove {
            for id in &ids {
                erase(&self.paths.container(id))?;
            }
        }
        self.release()?;
        match depth {
            Depth::Remove => pod::erase_record(self.paths),
            _ => self.record_stopped(),
        }
    }

    /// Ends one container and records how.
    async fn end(&self, id: &ContainerId) -> Result<()> {
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
            Some(_) if exited => Ok(()),
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
        let cgroup = recorded
            .and_then(|container| Some((Version::detect().ok()?, &container.cgroup)))
            .and_then(|(version, path)| Cgroup::new(version, path));
        let mut dead = false;
        if let Some(cgroup) = &cgroup {
            dead = cgroup.kill(KILL_DEADLINE).await;
        }
        // The runtime has a state of its own to forget, and knows of processes when we know of no cgroup.
        if let Some(runtime) = self.state.runtime.as_ref().filter(|runtime| !runtime.binary.is_empty()) {
            let runc = pod::runc(runtime, self.paths.run_dir().to_path_buf());
            match runc.delete_by_force(id.as_str()).await {
                Ok(()) => dead = true,
                Err(e) => log::say(&format!("container {id}: {e}")),
            }
        }
        if let Some(cgroup) = &cgroup {
            if !cgroup.processes().is_empty() {
                return Err(Error::deadline(format!("processes of container {id} survive SIGKILL")));
            }
            cgroup.remove();
            dead = true;
        }
        if dead {
            Ok(())
        } else {
            Err(Error::internal(format!("cannot tell whether container {id} has ended")))
        }
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
