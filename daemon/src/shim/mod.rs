//! The shims as the daemon sees them: one [`Shim`] per pod, with typed calls and the pod's last known state.
//!
//! A `Shim` is live (its state is what the shim says), stale (it lives but does not answer) or gone (its state is what
//! it recorded). Reading the state never waits. A call that changes something returns after the state here shows the
//! change, so that who has had an answer can read what it did.
//!
//! Calls that end things work on every shim: for one that is gone, `ocid-shim cleanup` does the same from the record.

mod launch;
mod state;
mod watch;

use std::fs::OpenOptions;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use ocid_api::id::{ContainerId, PodId};
use ocid_api::paths::PodPaths;
use ocid_api::shim::{self as wire, ShimClient};
use rustix::fs::{Mode, OFlags};
use tokio::net::UnixStream;
use tokio::sync::watch as channel;
use tokio_util::task::AbortOnDropHandle;

pub use launch::Launcher;
pub use state::{ContainerPhase, ContainerState, Deadlines, ExecOutput, Exit, Network, PodPhase, PodState};

use crate::error::{Context, Error, Kind, Result};
use launch::Depth;

/// Longest grace period that is passed on: the transport counts nanoseconds in 63 bits.
const GRACE_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// How far the daemon's knowledge of a shim goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// It reports its state.
    Live,
    /// It is alive and silent; the last known state stands.
    Stale,
    /// It has exited; the state is final.
    Gone,
}

/// A pod's last known state.
#[derive(Debug, Clone)]
pub struct View {
    /// The state.
    pub state: Arc<PodState>,
    /// How it is known.
    pub life: Life,
}

/// One pod's shim.
#[derive(Debug)]
pub struct Shim {
    inner: Arc<Inner>,
    _follower: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Inner {
    pod: PodId,
    paths: PodPaths,
    launcher: Arc<Launcher>,
    view: channel::Sender<View>,
    client: Mutex<Option<Client>>,
}

/// A connection that calls share.
struct Client(ShimClient);

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

impl Shim {
    /// Starts a shim for a new pod.
    ///
    /// # Errors
    /// If it cannot be started or is not ready in time; nothing of it is left then.
    pub async fn launch(launcher: &Arc<Launcher>, pod: &PodId) -> Result<Shim> {
        launcher.launch(pod).await?;
        Ok(Shim::new(launcher, pod, PodState::default()))
    }

    /// The shim of a pod that is on record. Finds out in the background whether it lives.
    pub fn recover(launcher: &Arc<Launcher>, pod: &PodId, recorded: PodState) -> Shim {
        Shim::new(launcher, pod, recorded)
    }

    fn new(launcher: &Arc<Launcher>, pod: &PodId, state: PodState) -> Shim {
        let (view, _) = channel::channel(View { state: Arc::new(state), life: Life::Stale });
        let inner = Arc::new(Inner {
            pod: pod.clone(),
            paths: launcher.dirs().pod(pod),
            launcher: Arc::clone(launcher),
            view,
            client: Mutex::new(None),
        });
        // task: follows the shim; owned by this `Shim` and ended with it.
        let follower = AbortOnDropHandle::new(tokio::spawn(watch::follow(Arc::clone(&inner))));
        Shim { inner, _follower: follower }
    }

    /// The pod's last known state. Never waits.
    pub fn view(&self) -> View {
        self.inner.view.borrow().clone()
    }

    /// Every change of the view from now on.
    pub fn changes(&self) -> channel::Receiver<View> {
        self.inner.view.subscribe()
    }

    /// Where the pod's files are.
    pub fn paths(&self) -> &PodPaths {
        &self.inner.paths
    }

    /// Waits until it is known whether the shim lives.
    ///
    /// # Errors
    /// `DeadlineExceeded` if it stays silent.
    pub async fn settled(&self, deadline: Duration) -> Result<()> {
        let what = "the pod's shim, which is alive but does not answer";
        self.until(deadline, what, |view| view.life != Life::Stale).await
    }

    /// Makes the pod.
    ///
    /// # Errors
    /// As the shim protocol says; `InvalidArgument` for what the kernel refuses.
    pub async fn create_pod(&self, request: wire::CreatePodRequest) -> Result<()> {
        let call = async |client: ShimClient, ctx| client.create_pod(ctx, &request).await;
        self.inner.call("create pod", self.inner.launcher.deadlines().call, call).await?;
        self.caught_up(|state| state.created_at_ns > 0).await
    }

    /// Records that the network is up: the pod is ready.
    ///
    /// # Errors
    /// As the shim protocol says.
    pub async fn set_attached(&self, result: Vec<u8>) -> Result<()> {
        let network = wire::Network {
            phase: wire::NetworkPhase::NETWORK_ATTACHED.into(),
            result,
            ..Default::default()
        };
        let request = wire::SetNetworkRequest { network: Some(network).into(), ..Default::default() };
        let call = async |client: ShimClient, ctx| client.set_network(ctx, &request).await;
        self.inner.call("record network", self.inner.launcher.deadlines().call, call).await?;
        self.caught_up(|state| state.phase >= PodPhase::Ready).await
    }

    /// Records that the network is down and stops the pod; the shim then exits.
    ///
    /// # Errors
    /// If something of the pod could not be ended in time.
    pub async fn set_detached(&self) -> Result<()> {
        let network =
            wire::Network { phase: wire::NetworkPhase::NETWORK_DETACHED.into(), ..Default::default() };
        let request = wire::SetNetworkRequest { network: Some(network).into(), ..Default::default() };
        let call = async |client: ShimClient, ctx| client.set_network(ctx, &request).await;
        self.end(self.inner.call("stop pod", self.inner.launcher.deadlines().runtime, call), Depth::Detached)
            .await?;
        self.until_gone().await
    }

    /// Leaves nothing of the pod, its record included.
    ///
    /// # Errors
    /// If something of the pod could not be ended or deleted.
    pub async fn remove_pod(&self) -> Result<()> {
        let request = wire::RemovePodRequest::default();
        let call = async |client: ShimClient, ctx| client.remove_pod(ctx, &request).await;
        self.end(self.inner.call("remove pod", self.inner.launcher.deadlines().runtime, call), Depth::Remove)
            .await?;
        self.until_gone().await
    }

    /// Makes a container.
    ///
    /// # Errors
    /// As the shim protocol says; nothing is left then.
    pub async fn create_container(
        &self,
        id: &ContainerId,
        request: wire::CreateContainerRequest,
    ) -> Result<()> {
        let call = async |client: ShimClient, ctx| client.create_container(ctx, &request).await;
        self.inner.call("create container", self.inner.launcher.deadlines().runtime, call).await?;
        self.reached(id, ContainerPhase::Created).await
    }

    /// Starts a container.
    ///
    /// # Errors
    /// As the shim protocol says.
    pub async fn start_container(&self, id: &ContainerId) -> Result<()> {
        let request = wire::StartContainerRequest { container: id.to_string(), ..Default::default() };
        let call = async |client: ShimClient, ctx| client.start_container(ctx, &request).await;
        self.inner.call("start container", self.inner.launcher.deadlines().runtime, call).await?;
        self.reached(id, ContainerPhase::Running).await
    }

    /// Stops a container; returns when its exit is recorded. On a pod whose shim is gone everything has ended already.
    ///
    /// # Errors
    /// `DeadlineExceeded` if the kernel cannot end it.
    pub async fn stop_container(&self, id: &ContainerId, signal: u32, grace: Duration) -> Result<()> {
        let grace = grace.min(GRACE_MAX);
        let timeout_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        let request = wire::StopContainerRequest {
            container: id.to_string(),
            signal,
            timeout_ms,
            ..Default::default()
        };
        let call = async |client: ShimClient, ctx| client.stop_container(ctx, &request).await;
        let deadline = grace.saturating_add(self.inner.launcher.deadlines().runtime);
        self.end(self.inner.call("stop container", deadline, call), Depth::End).await?;
        self.reached(id, ContainerPhase::Exited).await
    }

    /// Leaves nothing of a container but its log.
    ///
    /// # Errors
    /// If something of it could not be ended or deleted.
    pub async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        let request = wire::RemoveContainerRequest { container: id.to_string(), ..Default::default() };
        let call = async |client: ShimClient, ctx| client.remove_container(ctx, &request).await;
        let call = self.inner.call("remove container", self.inner.launcher.deadlines().runtime, call);
        self.end(call, Depth::RemoveContainer(id)).await?;
        self.caught_up(|state| state.container(id).is_none()).await
    }

    /// Opens a container's log file anew.
    ///
    /// # Errors
    /// As the shim protocol says; the old file is still written then.
    pub async fn reopen_log(&self, id: &ContainerId) -> Result<()> {
        let request = wire::ReopenLogRequest { container: id.to_string(), ..Default::default() };
        let call = async |client: ShimClient, ctx| client.reopen_log(ctx, &request).await;
        self.inner.call("reopen log", self.inner.launcher.deadlines().call, call).await.map(|_| ())
    }

    /// Runs a process in a container and collects its output. Dropping the future ends the process: the call has a
    /// connection of its own, whose end the shim takes as the caller's.
    ///
    /// # Errors
    /// `DeadlineExceeded` if `timeout` passed; as the shim protocol says.
    pub async fn exec_sync(
        &self,
        id: &ContainerId,
        process: Vec<u8>,
        timeout: Option<Duration>,
        output_bytes_max: usize,
    ) -> Result<ExecOutput> {
        self.inner.not_gone()?;
        let client = self.inner.connect().await?;
        let request = wire::ExecSyncRequest {
            container: id.to_string(),
            process,
            timeout_ms: timeout.map_or(0, |t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX)),
            output_bytes_max: output_bytes_max as u64,
            ..Default::default()
        };
        let collect = async {
            let mut stream =
                client.exec_sync(ttrpc::context::Context::default(), &request).await.map_err(rpc_error)?;
            let mut output = ExecOutput::default();
            while let Some(part) = stream.recv().await.map_err(rpc_error)? {
                append(&mut output.stdout, &part.stdout, output_bytes_max);
                append(&mut output.stderr, &part.stderr, output_bytes_max);
                if let Some(exit) = part.exit.into_option() {
                    output.exit = exit.into();
                    return Ok(output);
                }
            }
            Err(Error::new(Kind::Unavailable, "the shim ended the exec without an exit"))
        };
        // The time-out is the shim's to keep; ours is for a shim that does not.
        let margin = self.inner.launcher.deadlines().runtime;
        let collect = async { self.inner.attended(collect).await? };
        let output = match timeout {
            None => collect.await,
            Some(timeout) => tokio::time::timeout(timeout.saturating_add(margin), collect)
                .await
                .unwrap_or_else(|_| Err(Error::new(Kind::DeadlineExceeded, "the shim does not answer"))),
        };
        output.map_err(|e| e.during(format!("exec in container {id}")))
    }

    /// Does what ends things: by a call, or by cleanup where there is nobody to call.
    async fn end<T>(&self, call: impl Future<Output = Result<T>>, depth: Depth<'_>) -> Result<()> {
        if self.view().life != Life::Gone {
            match call.await {
                Ok(_) => return Ok(()),
                // The shim may just have exited; the follower knows soon.
                Err(error) if error.kind() == Kind::Unavailable => {
                    self.until_gone().await.map_err(|_| error)?
                }
                // It went between our look at it and the call.
                Err(_) if self.view().life == Life::Gone => {}
                Err(error) => return Err(error),
            }
        }
        // The follower has ended everything before it said `Gone`.
        if !matches!(depth, Depth::End) {
            self.inner.launcher.cleanup(&self.inner.pod, depth).await?;
            self.inner.publish_record()?;
        }
        Ok(())
    }

    async fn reached(&self, id: &ContainerId, phase: ContainerPhase) -> Result<()> {
        self.caught_up(|state| state.container(id).is_none_or(|c| c.phase >= phase)).await
    }

    /// Waits for the view to show what a call has done. It follows within microseconds, unless the shim dies.
    async fn caught_up(&self, done: impl Fn(&PodState) -> bool) -> Result<()> {
        let deadline = self.inner.launcher.deadlines().call;
        self.until(deadline, "the shim's state", |view| view.life == Life::Gone || done(&view.state)).await
    }

    async fn until_gone(&self) -> Result<()> {
        let deadline = self.inner.launcher.deadlines().cleanup;
        self.until(deadline, "the shim to exit", |view| view.life == Life::Gone).await
    }

    async fn until(&self, deadline: Duration, what: &str, done: impl Fn(&View) -> bool) -> Result<()> {
        let mut changes = self.changes();
        match tokio::time::timeout(deadline, changes.wait_for(|view| done(view))).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::internal("the shim's follower has ended")),
            Err(_) => Err(Error::new(Kind::DeadlineExceeded, format!("waited {deadline:?} for {what}"))),
        }
    }
}

impl Inner {
    /// One unary call, over the connection that is open or a new one.
    async fn call<T, F: Future<Output = ttrpc::Result<T>>>(
        &self,
        what: &str,
        deadline: Duration,
        call: impl FnOnce(ShimClient, ttrpc::context::Context) -> F,
    ) -> Result<T> {
        let run = async {
            self.not_gone()?;
            let open = self.client().as_ref().map(|client| client.0.clone());
            let client = match open {
                Some(client) => client,
                None => self.connect().await?,
            };
            // A margin, so that the shim's own, better described time-out comes first.
            let wait = deadline.saturating_add(Duration::from_secs(5));
            let answer = self.attended(call(client, ttrpc::context::with_duration(wait)));
            match tokio::time::timeout(wait, answer).await {
                Ok(answer) => answer?.map_err(rpc_error),
                Err(_) => Err(Error::new(Kind::DeadlineExceeded, format!("no answer within {wait:?}"))),
            }
        };
        run.await.map_err(|e: Error| e.during(format!("{what} (pod {})", self.pod)))
    }

    /// Waits for an answer as long as the shim shows that it lives. What it does may take minutes; but one that is
    /// frozen does nothing, and its callers must hear so before they give up.
    async fn attended<T>(&self, answer: impl Future<Output = T>) -> Result<T> {
        let mut answer = std::pin::pin!(answer);
        loop {
            if let Ok(answer) = tokio::time::timeout(self.launcher.deadlines().call, &mut answer).await {
                return Ok(answer);
            }
            tokio::select! {
                answer = &mut answer => return Ok(answer),
                alive = self.answers() => alive?,
            }
        }
    }

    /// Asks the shim for its state on a connection of its own.
    async fn answers(&self) -> Result<()> {
        let deadline = self.launcher.deadlines().call;
        let ask = async {
            let client = self.connect().await?;
            let request = wire::WatchRequest::default();
            let states = client.watch(ttrpc::context::Context::default(), &request).await;
            states.map_err(rpc_error)?.recv().await.map_err(rpc_error)
        };
        match tokio::time::timeout(deadline, ask).await {
            Err(_) => Err(Error::new(
                Kind::DeadlineExceeded,
                format!(
                    "the pod's shim is alive but has answered nothing for {deadline:?}: it is frozen or starved"
                ),
            )),
            // One that has just exited is told of by its connections.
            Ok(_) => Ok(()),
        }
    }

    fn not_gone(&self) -> Result<()> {
        if self.view.borrow().life == Life::Gone {
            return Err(Error::precondition("the pod has ended"));
        }
        Ok(())
    }

    /// A new connection. The path is taken through a descriptor of its directory, because a socket's address may not
    /// be longer than 107 bytes.
    async fn connect(&self) -> Result<ShimClient> {
        let what = || format!("connect to {}", self.paths.socket().display());
        let dir = rustix::fs::open(
            self.paths.run_dir(),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .context(Kind::Unavailable, what)?;
        let path = format!("/proc/self/fd/{}/shim.sock", dir.as_raw_fd());
        let stream = tokio::time::timeout(self.launcher.deadlines().call, UnixStream::connect(path))
            .await
            .map_err(|_| Error::new(Kind::DeadlineExceeded, what()))?
            .context(Kind::Unavailable, what)?;
        let socket = ttrpc::r#async::transport::Socket::new(stream);
        Ok(ShimClient::new(ttrpc::r#async::Client::new(socket)))
    }

    fn disconnect(&self) {
        *self.client() = None;
    }

    fn client(&self) -> MutexGuard<'_, Option<Client>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes what is known; `None` keeps the last state.
    fn publish(&self, state: Option<PodState>, life: Life) {
        self.view.send_modify(|view| {
            if let Some(state) = state {
                view.state = Arc::new(state);
            }
            view.life = life;
        });
    }

    /// Whether a shim holds the pod's lock. The lock is only tested: one who takes it could be mistaken for a shim.
    fn lock_held(&self) -> Result<bool> {
        let path = self.paths.lock();
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(Error::with_source(Kind::Internal, format!("open {}", path.display()), e)),
        };
        let mut lock = nix::libc::flock {
            l_type: i16::try_from(nix::libc::F_WRLCK).unwrap_or_default(),
            l_whence: i16::try_from(nix::libc::SEEK_SET).unwrap_or_default(),
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock))
            .context(Kind::Internal, || format!("test the lock {}", path.display()))?;
        Ok(i32::from(lock.l_type) != nix::libc::F_UNLCK)
    }
}

/// Adds to a buffer without passing its cap: the shim has a cap too, but it is a peer.
fn append(buffer: &mut Vec<u8>, part: &[u8], most: usize) {
    let room = most.saturating_sub(buffer.len());
    buffer.extend_from_slice(&part[..part.len().min(room)]);
}

fn rpc_error(error: ttrpc::Error) -> Error {
    use ttrpc::Code;
    let ttrpc::Error::RpcStatus(status) = error else {
        return Error::with_source(Kind::Unavailable, "talk to the shim", error);
    };
    let kind = match status.code() {
        Code::INVALID_ARGUMENT => Kind::InvalidArgument,
        Code::NOT_FOUND => Kind::NotFound,
        Code::FAILED_PRECONDITION => Kind::FailedPrecondition,
        Code::RESOURCE_EXHAUSTED => Kind::ResourceExhausted,
        Code::DEADLINE_EXCEEDED => Kind::DeadlineExceeded,
        Code::UNIMPLEMENTED => Kind::Unimplemented,
        Code::UNAVAILABLE => Kind::Unavailable,
        _ => Kind::Internal,
    };
    Error::new(kind, status.message)
}
