//! What can go wrong between poolshift and a cloud.

/// The result of asking a cloud.
pub type Result<T, E = CloudError> = std::result::Result<T, E>;

/// The class of a failure: what the caller may do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The configuration of the access is missing, or makes no sense.
    Config,
    /// The credentials are not accepted.
    Unauthorized,
    /// The credentials are accepted, and may not do this.
    Forbidden,
    /// What was asked for is not there.
    NotFound,
    /// It can't be done as things are (409, 412): look at how they are, and decide anew.
    Conflict,
    /// The request is refused for what it says, with that status.
    Refused(u16),
    /// A quota is reached.
    OverQuota,
    /// The cloud is too old, or too new.
    Version,
    /// No answer, or one that says that the service failed. Whether the request was carried out is not known.
    Unavailable,
    /// The service has too much to do, and has not carried the request out.
    Busy,
    /// An answer that makes no sense, or is too long.
    Strange,
}

/// A request that failed: what was wanted, of whom, and what it said.
#[derive(Debug)]
pub struct CloudError {
    /// The class.
    pub fault: Fault,
    /// What was wanted, as an infinitive: `show volume 3f…`.
    pub operation: String,
    /// Who was asked: `cinder at http://controller:8776`. Never holds a secret.
    pub place: String,
    /// What it said, or what is wrong.
    pub detail: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// The error below.
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl CloudError {
    /// A failure.
    pub fn new(
        fault: Fault,
        operation: impl Into<String>,
        place: impl Into<String>,
        detail: impl Into<String>,
    ) -> Self {
        let (operation, place, detail) = (operation.into(), place.into(), detail.into());
        Self { fault, operation, place, detail, hint: None, source: None }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the error below.
    #[must_use]
    pub fn caused_by(mut self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(error.into());
        self
    }

    /// Whether the same may well succeed a little later.
    pub fn is_passing(&self) -> bool {
        matches!(self.fault, Fault::Unavailable | Fault::Busy)
    }
}

/// What was asked for, if it is there.
///
/// # Errors
/// If that could not be asked.
pub fn if_there<T>(asked: Result<T>) -> Result<Option<T>> {
    match asked {
        Err(error) if error.fault == Fault::NotFound => Ok(None),
        asked => asked.map(Some),
    }
}

impl std::fmt::Display for CloudError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: cannot {}: {}", self.place, self.operation, self.detail)
    }
}

impl std::error::Error for CloudError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as _)
    }
}
