//! Follow a shim: publish each state it reports, reconnect when the connection breaks, and notice that it is gone.
//!
//! ```text
//!   connect ──▶ Watch ──▶ Live(state)… ──▶ stream ends ──▶ lock held?  yes: Stale, try again
//!      ▲                                                        │  no: clean up, read the record ──▶ Gone(state)
//!      └────────────────────────────────────────────────────────┘
//! ```
//!
//! A shim that does not answer but holds its lock is alive: its last state stands, marked stale, because a frozen shim
//! must not make kubelet kill a healthy pod.

use std::sync::Arc;
use std::time::Duration;

use ocid_api::record;
use ocid_api::shim::{self as wire, ShimClient};

use super::launch::Depth;
use super::state::{Network, PodPhase, PodState};
use super::{Inner, Life};
use crate::error::{Context, Error, Kind, Result};

/// A shim that has said its last word needs a moment to exit and free its lock.
const RETRY_FIRST: Duration = Duration::from_millis(5);
const RETRY_MOST: Duration = Duration::from_secs(2);

/// Runs until the shim is gone.
pub(super) async fn follow(inner: Arc<Inner>) {
    let mut pause = RETRY_FIRST;
    loop {
        match follow_connection(&inner).await {
            Ok(()) => pause = RETRY_FIRST,
            Err(error) => tracing::debug!(pod = %inner.pod, %error, "shim does not answer"),
        }
        inner.disconnect();
        match inner.lock_held() {
            Ok(true) => inner.publish(None, Life::Stale),
            Ok(false) => {
                // Until its containers have ended, what was last reported is not known to be so any more.
                inner.publish(None, Life::Stale);
                match bury(&inner).await {
                    Ok(()) => return,
                    Err(error) => {
                        tracing::error!(pod = %inner.pod, %error, "cannot end a pod whose shim is gone; will try again")
                    }
                }
            }
            Err(error) => tracing::error!(pod = %inner.pod, %error, "cannot tell whether the shim is alive"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_MOST);
    }
}

/// Publishes states until the stream ends.
async fn follow_connection(inner: &Inner) -> Result<()> {
    let client = inner.connect().await?;
    let request = wire::WatchRequest::default();
    let mut states = client
        .watch(ttrpc::context::Context::default(), &request)
        .await
        .context(Kind::Unavailable, || "watch shim".into())?;
    let mut client = Some(client);
    loop {
        // Only the first message is waited for with a deadline: after it, silence means that nothing changes.
        let next = match &client {
            Some(_) => tokio::time::timeout(inner.launcher.deadlines().call, states.recv())
                .await
                .map_err(|_| Error::new(Kind::DeadlineExceeded, "shim sends no state"))?,
            None => states.recv().await,
        };
        let Some(state) = next.context(Kind::Unavailable, || "watch shim".into())? else { return Ok(()) };
        if state.protocol == 0 {
            return Err(Error::new(Kind::Unimplemented, "shim speaks no version of the protocol"));
        }
        inner.publish(Some(state.into()), Life::Live);
        if let Some(client) = client.take() {
            inner.keep(client);
        }
    }
}

/// The shim is gone. If it did not stop its pod first, its containers end with it; then the record is the truth.
async fn bury(inner: &Inner) -> Result<()> {
    if recorded(inner)?.is_some_and(|state| state.phase != PodPhase::Stopped) {
        tracing::warn!(pod = %inner.pod, "the shim died; ending its containers");
        inner.launcher.cleanup(&inner.pod, Depth::End).await?;
    }
    inner.publish_record()
}

/// What the pod's record says now.
pub(super) fn recorded(inner: &Inner) -> Result<Option<PodState>> {
    let state = record::read_pod(&inner.paths)
        .context(Kind::Internal, || format!("read {}", inner.paths.record().display()))?;
    Ok(state.map(PodState::from))
}

impl Inner {
    /// Publishes what the record says as the final state. No record: the pod was removed.
    pub(super) fn publish_record(&self) -> Result<()> {
        let state = recorded(self)?.unwrap_or_else(|| PodState {
            phase: PodPhase::Stopped,
            created_at_ns: self.view.borrow().state.created_at_ns,
            network: Network { detached: true, ..Network::default() },
            ..PodState::default()
        });
        self.publish(Some(state), Life::Gone);
        Ok(())
    }

    /// Makes a connected client the one that calls use.
    fn keep(&self, client: ShimClient) {
        *self.client() = Some(super::Client(client));
    }
}
