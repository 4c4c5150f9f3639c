//! A layer: a handler finishes even when its client hangs up.
//!
//! tonic drops a handler's future when the client cancels the call or its deadline passes, which kubelet does and then
//! asks again. Half a RunPodSandbox is worth nothing, so each call runs as a task of its own and the client's future
//! only waits for it. The tasks are tracked, so that a stopping daemon can wait for them.
//!
//! Calls whose work is of no use without the caller are left alone: dropping them is how they are cancelled.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use tower::{Layer, Service};

/// Methods that end with their caller.
const CANCELLED: &[&str] = &["/runtime.v1.ImageService/PullImage", "/runtime.v1.RuntimeService/ExecSync"];

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Detach {
    /// The calls under way.
    pub(super) tasks: TaskTracker,
}

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Detached<S> {
    inner: S,
    tasks: TaskTracker,
}

impl<S> Layer<S> for Detach {
    type Service = Detached<S>;
    fn layer(&self, inner: S) -> Detached<S> {
        Detached { inner, tasks: self.tasks.clone() }
    }
}

impl<S, B, R> Service<http::Request<B>> for Detached<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Send + 'static,
    R: Default + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        // The service that said it is ready is the one to call; its clone is ready for the next call.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let tasks = self.tasks.clone();
        let cancelled = CANCELLED.contains(&request.uri().path());
        Box::pin(async move {
            let task = tasks.spawn(inner.call(request));
            let done = if cancelled { AbortOnDropHandle::new(task).await } else { task.await };
            match done {
                Ok(answer) => answer,
                // A handler that panicked is our bug; the daemon and every other call live on.
                Err(_) => {
                    Ok(tonic::Status::internal("the daemon failed in this call; see its log").into_http())
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use super::*;

    async fn finishes_after_its_caller(path: &str) -> bool {
        let finished = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&finished);
        let handler = tower::service_fn(move |_: http::Request<()>| {
            let flag = Arc::clone(&flag);
            async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                flag.store(true, Ordering::SeqCst);
                Ok::<_, std::convert::Infallible>(http::Response::new(()))
            }
        });
        let detach = Detach { tasks: TaskTracker::new() };
        let mut service = detach.layer(handler);
        let call = service.call(http::Request::builder().uri(path).body(()).unwrap());
        assert!(tokio::time::timeout(Duration::from_millis(1), call).await.is_err());
        detach.tasks.close();
        detach.tasks.wait().await;
        finished.load(Ordering::SeqCst)
    }

    #[tokio::test]
    async fn a_handler_that_panics_fails_its_own_call_only() {
        for path in ["/runtime.v1.RuntimeService/RunPodSandbox", "/runtime.v1.RuntimeService/ExecSync"] {
            let handler = tower::service_fn(|_: http::Request<()>| async {
                if true {
                    panic!("a bug");
                }
                Ok::<_, std::convert::Infallible>(http::Response::new(()))
            });
            let mut service = Detach { tasks: TaskTracker::new() }.layer(handler);
            let answer = service.call(http::Request::builder().uri(path).body(()).unwrap()).await.unwrap();
            let status = tonic::Status::from_header_map(answer.headers()).unwrap();
            assert_eq!(status.code(), tonic::Code::Internal, "{path}");
        }
    }

    #[tokio::test]
    async fn a_handler_outlives_its_caller_unless_its_work_is_only_for_the_caller() {
        assert!(finishes_after_its_caller("/runtime.v1.RuntimeService/RunPodSandbox").await);
        assert!(!finishes_after_its_caller("/runtime.v1.ImageService/PullImage").await);
    }
}
