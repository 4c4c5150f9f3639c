//! The edge to kubelet and crictl: CRI in, CRI out, no decisions.
//!
//! Each RPC is one short function: decode, call the core, encode. What a request asks for is validated where it is
//! decoded, so the core sees only what can be done.

pub mod container;
pub mod pod;

mod detach;
mod filter;
mod image;
mod named;
mod runtime;
mod stats;
mod status;

use std::future::Future;
use std::time::Duration;

use ocid_api::cri::image_service_server::ImageServiceServer;
use ocid_api::cri::runtime_service_server::RuntimeServiceServer;
use tokio::net::UnixListener;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::task::TaskTracker;

pub use image::ImageApi;
pub use runtime::RuntimeApi;

use crate::error::{Context, Kind, Result};

/// How long to wait when a connection cannot be taken: without descriptors, trying again at once is a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

async fn accepted<T>(connection: std::io::Result<T>) -> std::io::Result<T> {
    if let Err(error) = &connection {
        tracing::warn!(%error, "a connection cannot be taken");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
    connection
}

/// Largest request in bytes: what kubelet itself takes.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Serves both services until `stop`, then waits up to `grace` for the calls under way.
///
/// # Errors
/// If the transport fails as a whole; a failing connection or call does not.
pub async fn serve(
    listener: UnixListener,
    runtime: RuntimeApi,
    image: ImageApi,
    stop: impl Future<Output = ()>,
    grace: Duration,
) -> Result<()> {
    let tasks = TaskTracker::new();
    let server = tonic::transport::Server::builder()
        .layer(named::Named)
        .layer(detach::Detach { tasks: tasks.clone() })
        .add_service(
            RuntimeServiceServer::new(runtime)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX),
        )
        .add_service(
            ImageServiceServer::new(image)
                .max_decoding_message_size(MESSAGE_BYTES_MAX)
                .max_encoding_message_size(MESSAGE_BYTES_MAX),
        )
        .serve_with_incoming(UnixListenerStream::new(listener).then(accepted));
    // kubelet holds its connections open for ever, so the server is dropped, not drained: what counts are the calls.
    tokio::select! {
        served = server => return served.context(Kind::Internal, || "serve CRI".into()),
        () = stop => {}
    }
    tasks.close();
    if tokio::time::timeout(grace, tasks.wait()).await.is_err() {
        tracing::warn!(
            calls = tasks.len(),
            ?grace,
            "stopping with calls under way; their callers will ask again"
        );
    }
    Ok(())
}
