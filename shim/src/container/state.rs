//! The life of a container: which moves are legal, and what is true in each state. Pure.
//!
//! ```text
//! Creating ──▶ Created ──▶ Running ──▶ Exited        absence means removed
//!                 └──────────────────────▲
//! ```

use crate::error::Error;

/// Where a container is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// Recorded; the runtime is at work.
    Creating,
    /// The runtime made it; nothing of the user's has run.
    Created {
        /// Init, in our pid namespace.
        init: i32,
    },
    /// The user's process runs, or is about to be seen dead.
    Running {
        /// Init, in our pid namespace.
        init: i32,
        /// Unix nanoseconds.
        started_at_ns: i64,
    },
    /// It ended, once and for ever.
    Exited {
        /// Unix nanoseconds; 0 if it never started.
        started_at_ns: i64,
        /// How.
        exit: Exit,
    },
}

/// How a container ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 and the signal.
    pub(crate) code: u32,
    /// Signal, or 0.
    pub(crate) signal: u32,
    /// Whether the kernel killed one of its processes for want of memory.
    pub(crate) oom_killed: bool,
    /// Unix nanoseconds.
    pub(crate) finished_at_ns: i64,
    /// One CamelCase word, or empty.
    pub(crate) reason: String,
    /// For a person.
    pub(crate) message: String,
}

/// A move that the state forbids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The runtime has not made it yet.
    NotYetCreated,
    /// It is past that.
    AlreadyCreated,
    /// It runs.
    AlreadyRunning,
    /// It has ended.
    AlreadyExited,
}

impl State {
    /// The runtime's create has succeeded.
    pub(crate) fn created(&self, init: i32) -> Result<State, Refused> {
        match self {
            State::Creating => Ok(State::Created { init }),
            State::Created { .. } => Err(Refused::AlreadyCreated),
            State::Running { .. } => Err(Refused::AlreadyRunning),
            State::Exited { .. } => Err(Refused::AlreadyExited),
        }
    }

    /// The runtime's start has succeeded.
    pub(crate) fn started(&self, started_at_ns: i64) -> Result<State, Refused> {
        match *self {
            State::Created { init } => Ok(State::Running { init, started_at_ns }),
            State::Creating => Err(Refused::NotYetCreated),
            State::Running { .. } => Err(Refused::AlreadyRunning),
            State::Exited { .. } => Err(Refused::AlreadyExited),
        }
    }

    /// Init has been waited for.
    pub(crate) fn exited(&self, exit: Exit) -> Result<State, Refused> {
        match *self {
            State::Created { .. } => Ok(State::Exited { started_at_ns: 0, exit }),
            State::Running { started_at_ns, .. } => Ok(State::Exited { started_at_ns, exit }),
            State::Creating => Err(Refused::NotYetCreated),
            State::Exited { .. } => Err(Refused::AlreadyExited),
        }
    }

    /// Whether it has ended.
    pub(crate) fn has_exited(&self) -> bool {
        matches!(self, State::Exited { .. })
    }

    /// Whether the user's process runs.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self, State::Running { .. })
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Error {
        Error::precondition(match refused {
            Refused::NotYetCreated => "the container has not been created yet",
            Refused::AlreadyCreated => "the container has been created already",
            Refused::AlreadyRunning => "the container runs already",
            Refused::AlreadyExited => "the container has exited",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_move_from_every_state() {
        let exit = Exit { code: 3, ..Exit::default() };
        let created = State::Created { init: 7 };
        let running = State::Running { init: 7, started_at_ns: 5 };
        let exited = State::Exited { started_at_ns: 5, exit: exit.clone() };
        let unstarted = State::Exited { started_at_ns: 0, exit: exit.clone() };
        use Refused::{AlreadyCreated, AlreadyExited, AlreadyRunning, NotYetCreated};
        // from, created, started, exited
        let table = [
            (State::Creating, Ok(created.clone()), Err(NotYetCreated), Err(NotYetCreated)),
            (created, Err(AlreadyCreated), Ok(running.clone()), Ok(unstarted)),
            (running, Err(AlreadyRunning), Err(AlreadyRunning), Ok(exited.clone())),
            (exited, Err(AlreadyExited), Err(AlreadyExited), Err(AlreadyExited)),
        ];
        for (from, create, start, end) in table {
            assert_eq!(from.created(7), create, "{from:?} created");
            assert_eq!(from.started(5), start, "{from:?} started");
            assert_eq!(from.exited(exit.clone()), end, "{from:?} exited");
        }
    }
}
