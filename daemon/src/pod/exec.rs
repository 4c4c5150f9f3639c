//! ExecSync: one call to the shim, the hottest path there is, for probes run through it.

use std::time::Duration;

use super::Pods;
use super::run::encode;
use crate::error::{Error, Result};
use crate::oci;
use crate::shim::{ContainerPhase, ExecOutput};

impl Pods {
    /// Runs a command in a running container and collects what it writes. Dropping the future ends the command.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` if the container does not run; `DeadlineExceeded` after `timeout`;
    /// `InvalidArgument` if there is no command or the runtime cannot execute it.
    pub async fn exec_sync(
        &self,
        text: &str,
        command: Vec<String>,
        timeout: Option<Duration>,
    ) -> Result<ExecOutput> {
        let (pod, container) = self.index.container(text)?;
        if command.is_empty() {
            return Err(Error::invalid("exec: no command"));
        }
        match pod.container_state(container.id()).map(|state| state.phase) {
            Some(ContainerPhase::Running) => {}
            phase => {
                let phase =
                    phase.map_or("being created".to_owned(), |phase| format!("{phase:?}").to_lowercase());
                return Err(Error::precondition(format!(
                    "container {} is not running: {phase}",
                    container.id()
                )));
            }
        }
        let process = encode(&oci::exec_process(&container.metadata().process, command, false))?;
        pod.shim()?.exec_sync(container.id(), process, timeout, self.config.exec_output_bytes_max).await
    }
}
