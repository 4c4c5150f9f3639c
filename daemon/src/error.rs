//! One error type: `kind` is what the caller can do about it, `context` what we were doing, `source` why it failed.
//!
//! A new kind is for a caller that acts on it. The mapping to gRPC is here and nowhere else.

use std::error::Error as StdError;
use std::fmt;

/// The result of everything in the daemon that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Change the request.
    InvalidArgument,
    /// Nothing of that name exists.
    NotFound,
    /// The object is not in a state that allows this.
    FailedPrecondition,
    /// A limit or a disk is full.
    ResourceExhausted,
    /// Try again later: a peer could not be reached.
    Unavailable,
    /// Something took longer than its deadline.
    DeadlineExceeded,
    /// A registry wants other credentials.
    Unauthenticated,
    /// The caller may not do this.
    PermissionDenied,
    /// This build does not do this.
    Unimplemented,
    /// The caller went away.
    Cancelled,
    /// A registry could not be reached or did not work; kubelet shows the pod as `RegistryUnavailable`.
    RegistryUnavailable,
    /// A signature did not satisfy the policy; kubelet shows `SignatureValidationFailed`.
    SignatureValidationFailed,
    /// Recursive read-only mounts are not supported; kubelet shows `RROUnsupported`.
    RroUnsupported,
    /// An image volume could not be mounted; kubelet shows `ImageVolumeMountFailed`.
    ImageVolumeMountFailed,
    /// None of the above: our own fault or the machine's.
    Internal,
}

/// See the module.
pub struct Error {
    kind: Kind,
    context: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error that begins here.
    pub fn new(kind: Kind, context: impl Into<String>) -> Error {
        Error { kind, context: context.into(), source: None }
    }

    /// An error with a cause.
    pub fn with_source(
        kind: Kind,
        context: impl Into<String>,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Error {
        Error { kind, context: context.into(), source: Some(source.into()) }
    }

    /// The request is wrong.
    pub fn invalid(context: impl Into<String>) -> Error {
        Error::new(Kind::InvalidArgument, context)
    }

    /// There is no such object.
    pub fn not_found(context: impl Into<String>) -> Error {
        Error::new(Kind::NotFound, context)
    }

    /// The object's state forbids it.
    pub fn precondition(context: impl Into<String>) -> Error {
        Error::new(Kind::FailedPrecondition, context)
    }

    /// Our own fault or the machine's.
    pub fn internal(context: impl Into<String>) -> Error {
        Error::new(Kind::Internal, context)
    }

    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Says what we were doing around an error that already has a kind.
    #[must_use]
    pub fn during(self, context: impl Into<String>) -> Error {
        Error { kind: self.kind, context: context.into(), source: Some(Box::new(self)) }
    }
}

impl fmt::Display for Error {
    /// The whole chain on one line, outermost first, as an operator reads it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)?;
        match &self.source {
            None => Ok(()),
            Some(source) => {
                write!(f, ": {source}")?;
                // Our own errors print their chain themselves; foreign ones print only their head.
                let mut next = if source.is::<Error>() { None } else { source.source() };
                while let Some(cause) = next {
                    write!(f, ": {cause}")?;
                    next = cause.source();
                }
                Ok(())
            }
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.kind)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}

/// Gives a foreign error a kind and says what we were doing.
pub trait Context<T> {
    /// Wraps the error; `context` is only called if there is one.
    ///
    /// # Errors
    /// The wrapped one.
    fn context(self, kind: Kind, context: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Box<dyn StdError + Send + Sync>>> Context<T> for std::result::Result<T, E> {
    fn context(self, kind: Kind, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::with_source(kind, context(), source))
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> tonic::Status {
        use tonic::Code;
        // kubelet finds the named reasons by the text's prefix, and strips the code from the text only where it is
        // Unknown: k8s.io/cri-api pkg/errors.
        let (code, prefix) = match error.kind {
            Kind::InvalidArgument => (Code::InvalidArgument, ""),
            Kind::NotFound => (Code::NotFound, ""),
            Kind::FailedPrecondition => (Code::FailedPrecondition, ""),
            Kind::ResourceExhausted => (Code::ResourceExhausted, ""),
            Kind::Unavailable => (Code::Unavailable, ""),
            Kind::DeadlineExceeded => (Code::DeadlineExceeded, ""),
            Kind::Unauthenticated => (Code::Unauthenticated, ""),
            Kind::PermissionDenied => (Code::PermissionDenied, ""),
            Kind::Unimplemented => (Code::Unimplemented, ""),
            Kind::Cancelled => (Code::Cancelled, ""),
            Kind::Internal => (Code::Internal, ""),
            Kind::RegistryUnavailable => (Code::Unknown, "RegistryUnavailable: "),
            Kind::SignatureValidationFailed => (Code::Unknown, "SignatureValidationFailed: "),
            Kind::RroUnsupported => (Code::Unknown, "RROUnsupported: "),
            Kind::ImageVolumeMountFailed => (Code::Unknown, "ImageVolumeMountFailed: "),
        };
        tonic::Status::new(code, format!("{prefix}{error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_chain_is_told_once() {
        let io = std::io::Error::other("disk on fire");
        let error = Error::with_source(Kind::Internal, "write record", io).during("create pod");
        assert_eq!(error.to_string(), "create pod: write record: disk on fire");
        assert_eq!(error.kind(), Kind::Internal);
    }

    #[test]
    fn named_reasons_are_a_prefix_with_code_unknown() {
        let status = tonic::Status::from(Error::new(Kind::RegistryUnavailable, "dial"));
        assert_eq!((status.code(), status.message()), (tonic::Code::Unknown, "RegistryUnavailable: dial"));
    }
}
