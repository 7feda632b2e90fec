//! Why a cycle stops.

use std::fmt;

use crate::image::{ErrorKind, ImageError, ImageIdentity, Snapshot};
use crate::pipeline::PipelineError;

use super::state::StateError;

/// The result of an operation on a volume.
pub type Result<T, E = CycleError> = std::result::Result<T, E>;

/// Why a cycle, or another operation on a volume, stopped.
#[derive(Debug, thiserror::Error)]
pub enum CycleError {
    /// The two sides don't fit together; somebody has to decide.
    #[error(transparent)]
    Conflict(Box<Conflict>),
    /// An image failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The transfer failed.
    #[error(transparent)]
    Pipeline(PipelineError),
    /// A diff stream can't be written.
    #[error(transparent)]
    Diff(#[from] crate::delta::stream::DiffError),
    /// The state with the target can't be used.
    #[error("{target}: {error}")]
    State {
        /// The target.
        target: String,
        /// What is wrong with it.
        #[source]
        error: StateError,
    },
    /// A snapshot was removed while it was read: what was read of it can't be trusted.
    #[error("{location}: snapshot {snapshot} was removed while it was read; nothing was committed")]
    SnapshotLost {
        /// The image.
        location: String,
        /// The snapshot.
        snapshot: String,
    },
    /// A task panicked: a defect of poolshift's own.
    #[error("poolshift has a defect: {0}; please report it with the log")]
    Defect(String),
    /// The user stopped it. The next run goes on from here.
    #[error("interrupted; the next run goes on at {progress_to} of {size} bytes of snapshot {snapshot}")]
    Interrupted {
        /// The snapshot in flight.
        snapshot: String,
        /// Everything below is done.
        progress_to: u64,
        /// The size of the image.
        size: u64,
    },
}

impl CycleError {
    /// Whether the same cycle may succeed later without anybody's doing.
    pub fn is_retryable(&self) -> bool {
        match self {
            // What somebody resized in the middle has another size for the next cycle; who was fenced may come again.
            Self::Image(error) => {
                error.is_retryable() || matches!(error.kind, ErrorKind::OutOfBounds | ErrorKind::Fenced)
            }
            // A chunk that was damaged on its way is read again.
            Self::Pipeline(PipelineError::Batch(_) | PipelineError::Wire(_)) => true,
            Self::SnapshotLost { .. } | Self::Interrupted { .. } => true,
            Self::Pipeline(PipelineError::Image(error)) => error.is_retryable(),
            Self::Pipeline(_) | Self::Conflict(_) | Self::Defect(_) | Self::Diff(_) | Self::State { .. } => false,
        }
    }

    /// Who holds the lease, where that is what stops the cycle.
    pub fn holder(&self) -> Option<&str> {
        match self {
            Self::Image(ImageError { kind: ErrorKind::Busy { holder }, .. }) => Some(holder),
            _ => None,
        }
    }
}

impl From<PipelineError> for CycleError {
    fn from(error: PipelineError) -> Self {
        match error {
            PipelineError::Image(error) => Self::Image(error),
            PipelineError::Diff(error) => Self::Diff(error),
            other => Self::Pipeline(other),
        }
    }
}

impl From<Conflict> for CycleError {
    fn from(conflict: Conflict) -> Self {
        Self::Conflict(Box::new(conflict))
    }
}

/// Two sides that don't fit together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// What is wrong.
    pub kind: ConflictKind,
    /// The source, as the user wrote it, and its snapshots.
    pub source: (String, Vec<Snapshot>),
    /// The target, as the user wrote it, and its snapshots.
    pub target: (String, Vec<Snapshot>),
}

/// The ways in which two sides don't fit together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConflictKind {
    /// The target has content or snapshots, and no state of poolshift's.
    NotOurs,
    /// The target has content, and the stream is for an empty one.
    NotEmpty,
    /// poolshift keeps the target in step with an image itself.
    Owned {
        /// Where that image was.
        location: String,
    },
    /// The target follows another image.
    OtherSource {
        /// The one it follows, and where that was.
        followed: (ImageIdentity, String),
        /// The one given.
        given: ImageIdentity,
    },
    /// Somebody wrote the target since the last commit.
    Diverged {
        /// That commit's name.
        since: String,
    },
    /// HEAD of the target is not at the snapshot that a diff starts from: somebody wrote it, or an import that was cut or
    /// led to HEAD.
    HeadMoved {
        /// That snapshot's name.
        since: String,
    },
    /// The target snapshot that HEAD is at was removed by somebody else: whether HEAD was written since can't be told.
    CommitRemoved {
        /// Its name.
        name: String,
    },
    /// No snapshot is left that both sides have, with the ids that the state recorded.
    NoCommonSnapshot,
    /// The target has a snapshot of this name that was not made for it.
    NameTaken {
        /// The name.
        name: String,
    },
    /// The snapshot asked for is on both sides, and is not what the source holds now.
    NotNow {
        /// Its name.
        name: String,
        /// The newest commit, where that is another one.
        newest: Option<String>,
    },
    /// The snapshot asked for is older than what the target has.
    OlderThanBase {
        /// The snapshot asked for.
        name: String,
        /// The newest commit.
        base: String,
    },
    /// The snapshot to be repaired is not the target's newest, or something is in flight on top of it.
    NotNewest {
        /// The snapshot.
        name: String,
    },
    /// A stream that starts from another point than the target is at.
    WrongBase {
        /// What the stream starts from.
        stream: String,
        /// What the target is at.
        at: String,
    },
}

impl ConflictKind {
    /// A short name, stable, for scripts.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NotOurs => "not-ours",
            Self::NotEmpty => "not-empty",
            Self::Owned { .. } => "owned",
            Self::OtherSource { .. } => "other-source",
            Self::Diverged { .. } | Self::HeadMoved { .. } => "diverged",
            Self::CommitRemoved { .. } => "commit-removed",
            Self::NoCommonSnapshot => "no-common-snapshot",
            Self::NameTaken { .. } => "name-taken",
            Self::NotNow { .. } => "not-now",
            Self::OlderThanBase { .. } => "older-than-base",
            Self::NotNewest { .. } => "not-newest",
            Self::WrongBase { .. } => "wrong-base",
        }
    }

    /// What the user can do.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotOurs => "give an empty or new target; poolshift sync with --full --adopt overwrites this one",
            Self::NotEmpty => "give an empty or new target",
            Self::Owned { .. } => "go on with poolshift sync or receive, or import into another image",
            Self::OtherSource { .. } => {
                "check both names; if the target shall follow the new source from now on, start over with --full"
            }
            Self::Diverged { .. } => {
                "find out who wrote the target; --full makes it equal to the source again, and their writes are lost"
            }
            Self::HeadMoved { .. } => {
                "find out what wrote it; import-diff --rewind brings HEAD back to that snapshot first, and what was written \
                 since is lost"
            }
            Self::CommitRemoved { .. } => {
                "start over with --full: both sides are compared, and what differs is written"
            }
            Self::NoCommonSnapshot => "start over with --full: both sides are compared, and what differs is written",
            Self::NameTaken { .. } => "choose another name, or remove that snapshot of the target",
            Self::NotNow { .. } => {
                "nothing was copied: give a name that neither side has, or none (each sync names its snapshot); poolshift \
                 verify compares the snapshots of this name"
            }
            Self::OlderThanBase { .. } => "name a newer snapshot, or none",
            Self::NotNewest { .. } => "start over with sync --full: it compares both sides and writes what differs",
            Self::WrongBase { .. } => "send again from the snapshot that the target is at (poolshift status shows it)",
        }
    }
}

impl fmt::Display for ConflictKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOurs => f.write_str("the target is not empty, and poolshift did not make it"),
            Self::NotEmpty => f.write_str("the target is not empty, and the stream is for an empty one"),
            Self::Owned { location } => write!(f, "poolshift keeps the target in step with {location}"),
            Self::OtherSource { followed: (identity, location), given } => {
                write!(f, "the target follows another image: {location} was {identity}; the one given is {given}")
            }
            Self::Diverged { since } => {
                write!(f, "the target was written by someone else since its last snapshot, {since}")
            }
            Self::HeadMoved { since } => {
                write!(f, "the target was written since snapshot {since}, which the stream starts from")
            }
            Self::CommitRemoved { name } => {
                write!(f, "snapshot {name} of the target, which it was at, was removed by someone else")
            }
            Self::NoCommonSnapshot => f.write_str("no snapshot is left that both sides have"),
            Self::NameTaken { name } => {
                write!(f, "the target has another snapshot {name} already")
            }
            Self::NotNow { name, newest: Some(newest) } => {
                write!(f, "snapshot {name} is on both sides already, and {newest} is newer")
            }
            Self::NotNow { name, newest: None } => {
                write!(f, "snapshot {name} is on both sides already, and the source has changed since")
            }
            Self::OlderThanBase { name, base } => {
                write!(f, "snapshot {name} of the source is older than {base}, which the target has")
            }
            Self::NotNewest { name } => {
                write!(f, "snapshot {name} is not what the target is at, and can't be repaired any more")
            }
            Self::WrongBase { stream, at } => write!(f, "the stream starts from {stream}, the target is at {at}"),
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        for (location, snapshots) in [&self.source, &self.target] {
            write!(f, "\n  snapshots of {location}: ")?;
            if snapshots.is_empty() {
                f.write_str("none")?;
            }
            let names: Vec<String> = snapshots.iter().map(Snapshot::to_string).collect();
            f.write_str(&names.join(", "))?;
        }
        Ok(())
    }
}

impl std::error::Error for Conflict {}
