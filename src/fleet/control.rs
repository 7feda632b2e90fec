//! What can be asked of a running fleet, and told to it: the contract between the daemon and what serves it.

use async_trait::async_trait;
use tokio::sync::broadcast;

use super::status::{Event, FleetStatus, Sample};
use crate::throttle::Rate;

/// Whom an action is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Every server.
    All,
    /// The server, or the server of the volume, with this name.
    Named(String),
}

/// An action that can't be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActionError {
    /// The plan has nothing of that name.
    #[error("the plan has no server or volume {0:?}")]
    UnknownName(String),
    /// The plan limits no such pool, and no volume reads from it.
    #[error("no volume of the plan reads from a pool {0:?}")]
    UnknownPool(String),
    /// A cutover has paused the server, and nobody else resumes it.
    #[error("{0} is paused by its cutover, and can't be resumed by hand")]
    CutOver(String),
    /// It could not be noted where all workers see it.
    #[error("the action could not be stored: {0}")]
    NotStored(String),
}

/// A running fleet.
#[async_trait]
pub trait FleetControl: Send + Sync + 'static {
    /// How everything is, now. Cheap: nothing is asked of the storage.
    fn status(&self) -> FleetStatus;

    /// The samples of a server's history, oldest first, about one a minute for a day; `None` for an unknown server.
    fn history(&self, server: &str) -> Option<Vec<Sample>>;

    /// The newest events, at most 1000, oldest first.
    fn recent_events(&self) -> Vec<Event>;

    /// Every event from now on. A receiver that is too slow misses some, and learns how many.
    fn events(&self) -> broadcast::Receiver<Event>;

    /// Stops cycles at the next checkpoint, until resumed. Durable, and seen by every worker. Gives back the servers.
    async fn pause(&self, scope: &Scope) -> Result<Vec<String>, ActionError>;

    /// Undoes [`Self::pause`], and tries again what is held.
    async fn resume(&self, scope: &Scope) -> Result<Vec<String>, ActionError>;

    /// Makes a cycle due at once.
    async fn sync_now(&self, scope: &Scope) -> Result<Vec<String>, ActionError>;

    /// Sets the limit of a source pool until the plan is read again; `None`: what the plan says.
    async fn set_throttle(&self, pool: &str, rate: Option<Rate>) -> Result<(), ActionError>;

    /// When the daemon last showed that it is alive, for `/healthz`: seconds ago.
    fn heartbeat_age_seconds(&self) -> f64;
}
