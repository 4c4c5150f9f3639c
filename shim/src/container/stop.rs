//! Signal, wait, kill. The deadline is recorded and is the shim's own, so a stop survives the daemon.

use std::time::Duration;

use tokio::time::Instant;

use super::Container;
use super::state::State;
use crate::error::{Context as _, Error, Result};
use crate::record::now_ns;

/// How long the kernel has to end what was killed. A process in uninterruptible sleep takes longer.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// Longest wait that is counted: a century is for ever, and the clock cannot overflow.
const TIMEOUT_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

impl Container {
    /// Ends the container and returns when its exit is recorded.
    pub(crate) async fn stop(&self, signal: i32, timeout: Duration) -> Result<()> {
        self.settled().await;
        let state = self.state();
        if matches!(state, State::Creating) {
            return Ok(()); // its create has failed and left nothing
        }
        if matches!(state, State::Running { .. }) && !timeout.is_zero() {
            self.signal(signal)?;
            let deadline = self.shorten_deadline(timeout.min(TIMEOUT_MAX));
            if tokio::time::timeout_at(deadline, self.exited()).await.is_ok() {
                return Ok(());
            }
        }
        self.kill().await
    }

    /// Kills, and waits until the exit is recorded.
    pub(crate) async fn kill(&self) -> Result<()> {
        self.signal(libc::SIGKILL)?;
        tokio::time::timeout(KILL_DEADLINE, self.exited()).await.map_err(|_| {
            let seconds = KILL_DEADLINE.as_secs();
            Error::deadline(format!(
                "the container was killed and has not ended within {seconds} s: \
                 a process of it sleeps in the kernel (state D)"
            ))
        })
    }

    /// Init, if it is there; the others follow it, by their pid namespace or when its exit is seen.
    fn signal(&self, signal: i32) -> Result<()> {
        match self.process() {
            Some(process) => {
                process.signal(signal).map_err(|e| Error::invalid(format!("signal {signal}: {e}")))
            }
            None => Ok(()),
        }
    }

    /// The time at which this stop kills: the earliest anybody has asked for.
    fn shorten_deadline(&self, timeout: Duration) -> Instant {
        let asked = Instant::now() + timeout;
        let mut deadline = self.stop_deadline.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match *deadline {
            Some(earlier) if earlier <= asked => earlier,
            _ => {
                *deadline = Some(asked);
                drop(deadline);
                let nanos = i64::try_from(timeout.as_nanos()).unwrap_or(i64::MAX);
                self.note(|facts| facts.stop_deadline_ns = now_ns().saturating_add(nanos));
                asked
            }
        }
    }

    /// Waits for the recorded exit.
    pub(crate) async fn exited(&self) {
        let mut facts = self.facts.subscribe();
        // The sender lives in `self`, so this ends by the exit only.
        let _ = facts.wait_for(|facts| facts.state.has_exited()).await.context(String::new);
    }
}
