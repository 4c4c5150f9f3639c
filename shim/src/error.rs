//! One error type: `kind` is what the caller can do about it, `context` what we were doing, `source` why it failed.
//!
//! The mapping to ttrpc statuses is here and nowhere else.

use std::error::Error as StdError;
use std::fmt;

/// The result of everything in the shim that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Longest text sent to a peer, in bytes: what a runtime prints is not ours to bound otherwise.
const TEXT_BYTES_MAX: usize = 4096;

/// What a caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Change the request.
    InvalidArgument,
    /// Nothing of that name exists.
    NotFound,
    /// The object is not in a state that allows this.
    FailedPrecondition,
    /// Too much at once.
    ResourceExhausted,
    /// Something took longer than its deadline.
    DeadlineExceeded,
    /// The caller went away.
    Cancelled,
    /// This build does not do this.
    Unimplemented,
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

    /// A deadline passed.
    pub fn deadline(context: impl Into<String>) -> Error {
        Error::new(Kind::DeadlineExceeded, context)
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
    /// Wraps the error as an internal one; `context` is only called if there is one.
    ///
    /// # Errors
    /// The wrapped one.
    fn context(self, context: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Box<dyn StdError + Send + Sync>>> Context<T> for std::result::Result<T, E> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::with_source(Kind::Internal, context(), source))
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> ttrpc::Error {
        use ttrpc::Code;
        let code = match error.kind {
            Kind::InvalidArgument => Code::INVALID_ARGUMENT,
            Kind::NotFound => Code::NOT_FOUND,
            Kind::FailedPrecondition => Code::FAILED_PRECONDITION,
            Kind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
            Kind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
            Kind::Cancelled => Code::CANCELLED,
            Kind::Unimplemented => Code::UNIMPLEMENTED,
            Kind::Internal => Code::INTERNAL,
        };
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, shorten(error.to_string(), TEXT_BYTES_MAX)))
    }
}

/// Cuts a text to at most so many bytes, at a character.
pub(crate) fn shorten(mut text: String, bytes_max: usize) -> String {
    if text.len() > bytes_max {
        text.truncate(text.floor_char_boundary(bytes_max));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_chain_is_told_once_and_keeps_its_kind() {
        let io = std::io::Error::other("disk on fire");
        let error = Error::with_source(Kind::NotFound, "write record", io).during("create pod");
        assert_eq!(error.to_string(), "create pod: write record: disk on fire");
        assert_eq!(error.kind(), Kind::NotFound);
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        assert_eq!(shorten("aä".to_owned(), 2), "a");
        assert_eq!(shorten("aä".to_owned(), 3), "aä");
    }
}
