//! A layer: an RPC that is not implemented says which it was. The generated stubs do not.

use std::pin::Pin;
use std::task::{Context, Poll};

use tower::{Layer, Service};

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Named;

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct NamedService<S>(S);

impl<S> Layer<S> for Named {
    type Service = NamedService<S>;
    fn layer(&self, inner: S) -> NamedService<S> {
        NamedService(inner)
    }
}

impl<S, B, R> Service<http::Request<B>> for NamedService<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    R: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let path = request.uri().path().to_owned();
        let answer = self.0.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            let status = tonic::Status::from_header_map(answer.headers());
            match status {
                Some(status) if status.code() == tonic::Code::Unimplemented => {
                    Ok(tonic::Status::unimplemented(format!("{path} is not implemented")).into_http())
                }
                _ => Ok(answer),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_unimplemented_rpc_is_named_and_other_errors_pass() {
        for (code, expected) in [
            (
                tonic::Status::unimplemented("Not yet implemented"),
                "/runtime.v1.RuntimeService/Exec is not implemented",
            ),
            (tonic::Status::not_found("pod"), "pod"),
        ] {
            let handler = tower::service_fn(move |_: http::Request<()>| {
                let answer: http::Response<()> = code.clone().into_http();
                async move { Ok::<_, std::convert::Infallible>(answer) }
            });
            let request = http::Request::builder().uri("/runtime.v1.RuntimeService/Exec").body(()).unwrap();
            let answer = Named.layer(handler).call(request).await.unwrap();
            assert_eq!(tonic::Status::from_header_map(answer.headers()).unwrap().message(), expected);
        }
    }
}
