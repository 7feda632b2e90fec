//! What can go wrong with an image.

use std::fmt;

/// The result of an image operation.
pub type Result<T, E = ImageError> = std::result::Result<T, E>;

/// The class of an image error: what the caller may do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The image, pool, namespace, snapshot or file is not there.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// Another process holds the lease or the lock; who, as far as it can be told.
    Busy {
        /// The holder, for a person.
        holder: String,
    },
    /// This process lost its lease to another: it must stop at once.
    Fenced,
    /// The image can't be written: a read-only pool, file or open.
    ReadOnly,
    /// The storage is full, or a quota is reached.
    NoSpace,
    /// A request beyond the end of the image, or larger than allowed.
    OutOfBounds,
    /// The backend, or the image's features, can't do it.
    Unsupported,
    /// The backend itself is missing: librbd is not installed.
    BackendMissing,
    /// The storage did not answer in time.
    TimedOut,
    /// The credentials don't allow it.
    PermissionDenied,
    /// What was read makes no sense: a damaged sidecar, an impossible length.
    Corrupt,
    /// Anything else that the storage reports.
    Io,
}

/// A failed image operation: what was tried, on which image, why it failed, and what to do.
#[derive(Debug)]
pub struct ImageError {
    /// The class.
    pub kind: ErrorKind,
    /// The image, as the user wrote it.
    pub location: String,
    /// What was tried, as an infinitive: `read 4096 bytes at 8192`.
    pub operation: String,
    /// What the backend said, when it said something of use.
    pub detail: Option<String>,
    /// What the user can do, a sentence.
    pub hint: Option<String>,
    /// The error below.
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl ImageError {
    /// An error of `kind` while trying to do `operation` on `location`.
    pub fn new(kind: ErrorKind, location: impl Into<String>, operation: impl Into<String>) -> Self {
        Self { kind, location: location.into(), operation: operation.into(), detail: None, hint: None, source: None }
    }

    /// Adds what the backend said.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// Adds what the user can do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the error below.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The class that an errno stands for, whichever call reported it.
    pub fn kind_of_errno(errno: i32) -> ErrorKind {
        use rustix::io::Errno;
        match Errno::from_raw_os_error(errno) {
            Errno::NOENT => ErrorKind::NotFound,
            Errno::EXIST => ErrorKind::AlreadyExists,
            Errno::ROFS => ErrorKind::ReadOnly,
            Errno::NOSPC | Errno::DQUOT => ErrorKind::NoSpace,
            Errno::SHUTDOWN => ErrorKind::Fenced,
            Errno::OPNOTSUPP | Errno::NOSYS => ErrorKind::Unsupported,
            Errno::TIMEDOUT => ErrorKind::TimedOut,
            Errno::ACCESS | Errno::PERM => ErrorKind::PermissionDenied,
            Errno::BUSY => ErrorKind::Busy { holder: "another client".into() },
            _ => ErrorKind::Io,
        }
    }

    /// An error from an errno (positive).
    pub fn from_errno(errno: i32, location: impl Into<String>, operation: impl Into<String>) -> Self {
        Self::new(Self::kind_of_errno(errno), location, operation).caused_by(std::io::Error::from_raw_os_error(errno))
    }

    /// An error from an [`std::io::Error`].
    pub fn from_io(error: std::io::Error, location: impl Into<String>, operation: impl Into<String>) -> Self {
        let kind = error.raw_os_error().map_or(ErrorKind::Io, Self::kind_of_errno);
        Self::new(kind, location, operation).caused_by(error)
    }

    /// Whether the same call may succeed later without anybody's doing.
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind, ErrorKind::TimedOut | ErrorKind::Busy { .. } | ErrorKind::NoSpace | ErrorKind::Io)
    }
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: cannot {}", self.location, self.operation)?;
        match (&self.kind, &self.detail) {
            (ErrorKind::Busy { holder }, None) => write!(f, ": held by {holder}"),
            (ErrorKind::Fenced, None) => f.write_str(": another process has taken the lease over"),
            (_, Some(detail)) => write!(f, ": {detail}"),
            (_, None) => Ok(()),
        }
    }
}

impl std::error::Error for ImageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
