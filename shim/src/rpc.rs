//! The ttrpc service: decode → call → encode.
//!
//! ttrpc drops a handler when its connection closes; so each call runs in a task of its own and the handler only waits
//! for it. Each connection has a server of its own, which is how a handler can know that its caller has gone.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use std::{future, io};

use async_trait::async_trait;
use ocid_api::id::ContainerId;
use ocid_api::shim::{
    CreateContainerRequest, CreateContainerResponse, CreatePodRequest, CreatePodResponse, ExecSyncOutput,
    ExecSyncRequest, OpenStreamRequest, OpenStreamResponse, PodState, RemoveContainerRequest,
    RemoveContainerResponse, RemovePodRequest, RemovePodResponse, ReopenLogRequest, ReopenLogResponse,
    SetNetworkRequest, SetNetworkResponse, Shim, StartContainerRequest, StartContainerResponse,
    StopContainerRequest, StopContainerResponse, UpdateContainerRequest, UpdateContainerResponse,
    WatchRequest, create_shim,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{Server, ServerStreamSender, TtrpcContext};

use crate::container::New;
use crate::container::exec::ExecSync;
use crate::container::state::Exit;
use crate::error::{Context as _, Error, Kind, Result};
use crate::log;
use crate::pod::{Leave, Pod};
use crate::record::now_ns;
use crate::stdio::{Chunk, Stream};

/// Connections at a time: the daemon has one, and one while it reconnects.
const CONNECTIONS_MAX: usize = 32;
/// Pause after the kernel could not accept, for want of descriptors perhaps.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What ttrpc needs to write an answer to a socket that takes it.
const LINGER: Duration = Duration::from_millis(5);

/// Calls and watches under way.
static ANSWERS: AtomicUsize = AtomicUsize::new(0);

/// Serves every root peer that connects, for as long as it is polled.
pub(crate) async fn serve(pod: Arc<Pod>, listener: UnixListener) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                log::say(&format!("accept: {e}"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 => {
                let pod = Arc::clone(&pod);
                tokio::spawn(async move {
                    connection(pod, stream).await;
                    drop(permit);
                });
            }
            _ => log::say("refused a peer that is not root"),
        }
    }
}

/// Serves one connection until it closes.
async fn connection(pod: Arc<Pod>, stream: UnixStream) {
    let (closed, mut is_closed) = watch::channel(false);
    let (stalled, is_stalled) = watch::channel(false);
    let service = Service { pod, closed: is_closed.clone(), stalled: is_stalled };
    let connection = Connection { stream, closed, stalled };
    let accepted = futures_util::stream::once(future::ready(io::Result::Ok(connection)));
    let mut server =
        Server::new().add_listener(Listener::new(accepted)).register_service(create_shim(Arc::new(service)));
    if let Err(e) = server.start().await {
        log::say(&format!("serve a connection: {e}"));
        return;
    }
    let _ = is_closed.wait_for(|closed| *closed).await;
}

/// Lets the last answers leave: every watcher its final state, every caller its result.
pub(crate) async fn farewell(at_most: Duration) {
    let quiet = async {
        while ANSWERS.load(Ordering::Relaxed) > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // What has been handed to ttrpc is written by its tasks, which need their turns.
        tokio::time::sleep(LINGER).await;
    };
    let _ = tokio::time::timeout(at_most, quiet).await;
}

/// Counts an answer that is not yet given.
struct Answering;

impl Answering {
    fn new() -> Answering {
        ANSWERS.fetch_add(1, Ordering::Relaxed);
        Answering
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        ANSWERS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream that says when it has closed, and when its peer does not read.
struct Connection {
    stream: UnixStream,
    closed: watch::Sender<bool>,
    stalled: watch::Sender<bool>,
}

impl Connection {
    fn note(&self, closed: bool) {
        if closed {
            self.closed.send_replace(true);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.note(true);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if let Poll::Ready(result) = &read {
            self.note(result.is_err() || (buffer.filled().len() == before && buffer.remaining() > 0));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note(matches!(written, Poll::Ready(Err(_))));
        let full = written.is_pending();
        self.stalled.send_if_modified(|stalled| std::mem::replace(stalled, full) != full);
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

struct Service {
    pod: Arc<Pod>,
    closed: watch::Receiver<bool>,
    stalled: watch::Receiver<bool>,
}

impl Service {
    /// Waits until the peer reads again. ttrpc queues a hundred messages for a peer that does not; what can wait here
    /// takes no memory.
    async fn taken(&self) {
        let mut stalled = self.stalled.clone();
        let _ = stalled.wait_for(|stalled| !stalled).await; // an error if the connection is gone: nothing to wait for
    }
}

/// Runs a call to its end though its caller goes away.
async fn detached<T: Send + 'static>(
    call: impl Future<Output = Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    let _answering = Answering::new();
    // A task that ends without a result has panicked; the text is in our log.
    let done = tokio::spawn(call).await.map_err(|_| Error::internal("the call panicked"))?;
    Ok(done?)
}

fn container_id(text: &str) -> Result<ContainerId> {
    text.parse().map_err(|e| Error::invalid(format!("container: {e}")))
}

fn signal(number: u32) -> Result<i32> {
    match number {
        0 => Ok(libc::SIGTERM),
        1..=64 => i32::try_from(number).context(|| "signal".to_owned()),
        _ => Err(Error::invalid(format!("there is no signal {number}"))),
    }
}

#[async_trait]
impl Shim for Service {
    async fn watch(
        &self,
        _: &TtrpcContext,
        _: WatchRequest,
        out: ServerStreamSender<PodState>,
    ) -> ttrpc::Result<()> {
        let _answering = Answering::new();
        let mut states = self.pod.subscribe();
        let (mut ended, mut closed) = (self.pod.ended(), self.closed.clone());
        loop {
            let last = *ended.borrow_and_update();
            let state = states.borrow_and_update().clone();
            out.send(&state).await?;
            if last {
                return Ok(());
            }
            tokio::select! {
                _ = states.changed() => {}
                _ = ended.changed() => {}
                _ = closed.wait_for(|closed| *closed) => return Ok(()),
            }
            // Meanwhile changes are merged.
            tokio::select! {
                () = self.taken() => {}
                _ = closed.wait_for(|closed| *closed) => return Ok(()),
            }
        }
    }

    async fn create_pod(
        &self,
        _: &TtrpcContext,
        request: CreatePodRequest,
    ) -> ttrpc::Result<CreatePodResponse> {
        let pod = Arc::clone(&self.pod);
        let namespaces = detached(async move { pod.create(request).await }).await?;
        Ok(CreatePodResponse { namespaces: Some(namespaces).into(), ..Default::default() })
    }

    async fn set_network(
        &self,
        _: &TtrpcContext,
        request: SetNetworkRequest,
    ) -> ttrpc::Result<SetNetworkResponse> {
        let pod = Arc::clone(&self.pod);
        detached(async move { pod.set_network(request.network.unwrap_or_default()).await }).await?;
        Ok(SetNetworkResponse::default())
    }

    async fn remove_pod(&self, _: &TtrpcContext, _: RemovePodRequest) -> ttrpc::Result<RemovePodResponse> {
        let pod = Arc::clone(&self.pod);
        detached(async move { pod.end(Leave::Nothing).await }).await?;
        Ok(RemovePodResponse::default())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        let pod = Arc::clone(&self.pod);
        let state = detached(async move {
            let new = New {
                id: container_id(&request.container)?,
                metadata: request.metadata,
                config: request.config,
                rootfs: request.rootfs.unwrap_or_default(),
                stdio: request.stdio.unwrap_or_default(),
            };
            pod.create_container(new).await
        })
        .await?;
        Ok(CreateContainerResponse { state: Some(state).into(), ..Default::default() })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: StartContainerRequest,
    ) -> ttrpc::Result<StartContainerResponse> {
        let container = self.pod.container(&container_id(&request.container)?)?;
        let state = detached(async move { container.start().await.map(|()| container.to_message()) }).await?;
        Ok(StartContainerResponse { state: Some(state).into(), ..Default::default() })
    }

    async fn stop_container(
        &self,
        _: &TtrpcContext,
        request: StopContainerRequest,
    ) -> ttrpc::Result<StopContainerResponse> {
        let signal = signal(request.signal)?;
        let Ok(container) = self.pod.container(&container_id(&request.container)?) else {
            return Ok(StopContainerResponse::default());
        };
        let timeout = Duration::from_millis(request.timeout_ms);
        let state = detached(async move {
            container.stop(signal, timeout).await?;
            // One that could not be created is as unknown as one that was never asked for.
            Ok(container.state().has_exited().then(|| container.to_message()))
        });
        Ok(StopContainerResponse { state: state.await?.into(), ..Default::default() })
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<UpdateContainerResponse> {
        let container = self.pod.container(&container_id(&request.container)?)?;
        let state = detached(async move {
            container.update(&request.resources).await?;
            Ok(container.to_message())
        });
        Ok(UpdateContainerResponse { state: Some(state.await?).into(), ..Default::default() })
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        request: RemoveContainerRequest,
    ) -> ttrpc::Result<RemoveContainerResponse> {
        let (pod, id) = (Arc::clone(&self.pod), container_id(&request.container)?);
        detached(async move { pod.remove_container(&id).await }).await?;
        Ok(RemoveContainerResponse::default())
    }

    async fn reopen_log(
        &self,
        _: &TtrpcContext,
        request: ReopenLogRequest,
    ) -> ttrpc::Result<ReopenLogResponse> {
        self.pod.container(&container_id(&request.container)?)?.reopen_log()?;
        Ok(ReopenLogResponse::default())
    }

    async fn open_stream(&self, _: &TtrpcContext, _: OpenStreamRequest) -> ttrpc::Result<OpenStreamResponse> {
        Err(Error::new(Kind::Unimplemented, "streaming sessions are not there yet").into())
    }

    async fn exec_sync(
        &self,
        _: &TtrpcContext,
        request: ExecSyncRequest,
        out: ServerStreamSender<ExecSyncOutput>,
    ) -> ttrpc::Result<()> {
        let container = self.pod.container(&container_id(&request.container)?)?;
        let exec = ExecSync {
            process: request.process,
            timeout: (request.timeout_ms > 0).then(|| Duration::from_millis(request.timeout_ms)),
            output_bytes_max: request.output_bytes_max,
        };
        let mut closed = self.closed.clone();
        let gone = async move {
            let _ = closed.wait_for(|closed| *closed).await;
        };
        let output = |chunk: Chunk| {
            let out = &out;
            let message = match chunk.stream {
                Stream::Stdout => ExecSyncOutput { stdout: chunk.data, ..Default::default() },
                Stream::Stderr => ExecSyncOutput { stderr: chunk.data, ..Default::default() },
            };
            async move {
                self.taken().await;
                out.send(&message).await.is_ok()
            }
        };
        let status = container.exec_sync(exec, output, gone).await?;
        let exit =
            Exit { code: status.code, signal: status.signal, finished_at_ns: now_ns(), ..Exit::default() };
        out.send(&ExecSyncOutput { exit: Some(exit.to_message()).into(), ..Default::default() }).await
    }
}

#[cfg(test)]
mod tests {
    use super::signal;

    #[test]
    fn no_signal_is_sigterm_and_there_are_64() {
        assert_eq!(signal(0).unwrap(), libc::SIGTERM);
        assert_eq!(signal(64).unwrap(), 64);
        assert!(signal(65).is_err());
        assert!(signal(u32::MAX).is_err());
    }
}
