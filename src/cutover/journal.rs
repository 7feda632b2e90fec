//! The journal of a cutover: what was meant to be done, and what came of it, kept with the server's first target, so that
//! another host can finish it or go back. It says where to begin to look; what is true is asked of the world.
//!
//! One JSON object in the image's metadata (RBD: `poolshift.cutover`). It is stored before every phase, and again when
//! the phase is over. It stays after the commit, for the way back, until `finalize` takes it away.

use serde::{Deserialize, Serialize};

use super::phase::Phase;
use super::provider::{Notes, Side};
use crate::image::{ImageIdentity, LeaseOwner};

/// The version of this format. A reader refuses any other.
pub const FORMAT: u32 = 1;

/// What a kept source is called after the commit: its name with this at its end. Nobody's configuration names it, so that
/// nobody starts a server from it by mistake.
pub const KEPT_SUFFIX: &str = ".poolshift-kept";

/// The name of a source that was left, and is kept.
pub fn kept_name(name: &str) -> String {
    format!("{name}{KEPT_SUFFIX}")
}

/// A moment in RFC 3339, to the second: for notes and marks that people read.
pub(super) fn moment(at: jiff::Timestamp) -> impl std::fmt::Display {
    at.strftime("%Y-%m-%dT%H:%M:%SZ")
}

/// The journal of one server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// [`FORMAT`].
    pub format: u32,
    /// The server, by its name in the plan.
    pub server: String,
    /// Which side the server is to run from when this is over.
    pub to: Side,
    /// With `to` the source: what becomes of what was written on the target since the cutover.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<Changes>,
    /// Who does it, for people: `libvirt domain web-1, warm`.
    pub by: String,
    /// Where it is.
    pub phase: Phase,
    /// Whether all that belongs to it was done; set for the last phase only.
    pub done: bool,
    /// Whether it has got to the swap: both sides were proved equal, and the server may have been told of the other one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub swapped: bool,
    /// Whether a memory that was saved is not to be used any more: somebody may have written to the disks since.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub memory_lost: bool,
    /// Which process is, or was, at it.
    pub worker: LeaseOwner,
    /// When it began, RFC 3339.
    pub begun: String,
    /// When the server was told to stop, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<String>,
    /// When it was over, RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
    /// The volumes, in the order of the plan.
    pub volumes: Vec<JournalVolume>,
    /// What the provider remembers.
    #[serde(default, skip_serializing_if = "Notes::is_empty")]
    pub notes: Notes,
    /// The note that paused the server before the cutover did, if somebody had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note_before: Option<String>,
    /// `finalize` has begun to remove the sources: there is no way back any more, and it has to be finished.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub finalizing: bool,
}

/// What becomes of the writes on the target, on the way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Changes {
    /// They are carried back.
    Carry,
    /// They are lost: the source is as it was at the cutover.
    Discard,
}

/// A volume in the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalVolume {
    /// Its name in the plan.
    pub name: String,
    /// The source image.
    pub source: ImageIdentity,
    /// The source's name while it is in use.
    pub source_name: String,
    /// The target image.
    pub target: ImageIdentity,
    /// Who fenced the side that is left, once that is done: while the lock is still theirs, nobody has written there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fence: Option<LeaseOwner>,
}

/// A journal that can't be read, or that is too large.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// It is no JSON of this shape.
    #[error("the journal of the cutover can't be read")]
    Damaged(#[from] serde_json::Error),
    /// It was written by another version.
    #[error("the journal of the cutover has format {found}; this poolshift reads {FORMAT}")]
    Version {
        /// As found.
        found: u64,
    },
}

impl Journal {
    /// Reads a stored journal.
    pub fn parse(text: &str) -> Result<Self, JournalError> {
        // The version first, so that a newer format is named as such and not as damage.
        let value: serde_json::Value = serde_json::from_str(text)?;
        let found = value.get("format").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if found != u64::from(FORMAT) {
            return Err(JournalError::Version { found });
        }
        Ok(serde_json::from_value(value)?)
    }

    /// The journal as it is stored.
    pub fn render(&self) -> Result<String, JournalError> {
        Ok(serde_json::to_string(self)?)
    }

    /// The side that is left.
    pub fn from(&self) -> Side {
        self.to.other()
    }

    /// Whether nothing is left to be done.
    pub fn is_over(&self) -> bool {
        self.phase.is_over() && self.done
    }

    /// Whether the server runs from its targets, and its sources are kept.
    pub fn is_cut_over(&self) -> bool {
        let stays = if self.to == Side::Target { Phase::Committed } else { Phase::RolledBack };
        self.phase == stays && self.done
    }
}
