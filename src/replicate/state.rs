//! What poolshift keeps with a target: where its data comes from, which snapshots it has, and what is in flight.
//!
//! One JSON object, stored through [`TargetImage::store_state`](crate::image::TargetImage::store_state): RBD image
//! metadata `poolshift.state`, or a file's sidecar.

use serde::{Deserialize, Serialize};

use crate::image::{ImageIdentity, Snapshot};

/// The version of this format. A reader refuses any other: guessing at somebody else's state could lose data.
pub const FORMAT: u32 = 1;

/// The state of one target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetState {
    /// [`FORMAT`].
    pub format: u32,
    /// The image that this target follows.
    pub source: ImageIdentity,
    /// Where that image was when it was last used, for messages only.
    pub source_location: String,
    /// The snapshots replicated so far that are still known, oldest first.
    #[serde(default)]
    pub commits: Vec<Commit>,
    /// The snapshot that is being replicated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<InFlight>,
    /// Snapshots of poolshift's own making that no commit needs any more, to be removed when there is time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retired: Vec<Retired>,
    /// Names that poolshift meant to give to snapshots of the source, and gave up before it saw them. One that is found
    /// later is poolshift's: the creation was under way, and nobody waited for it any more. Oldest first, at most
    /// [`GIVEN_UP_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub given_up: Vec<String>,
}

/// How many names are remembered of snapshots that were given up.
pub const GIVEN_UP_MAX: usize = 64;

/// A snapshot that is on both sides and the same, byte for byte.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Its name on both sides.
    pub name: String,
    /// The source snapshot's id.
    pub source_id: u64,
    /// The target snapshot's id.
    pub target_id: u64,
    /// The image's size in it, in bytes.
    pub size: u64,
    /// When the source snapshot was made or first used, RFC 3339.
    pub at: String,
    /// Whether poolshift named it: then poolshift may remove it, on both sides.
    pub automatic: bool,
}

/// A snapshot on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InFlight {
    /// Its name on both sides.
    pub name: String,
    /// The source snapshot; `None` when it is about to be created.
    pub snapshot: Option<Snapshot>,
    /// When the cycle began, RFC 3339.
    pub at: String,
    /// Whether poolshift named it.
    pub automatic: bool,
    /// What the delta starts from.
    pub from: Origin,
    /// Its snapshot is made at one moment with those of other volumes, so that without an id it counts for nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_step: bool,
    /// HEAD holds something else than `from` says, and must be brought back before anything is applied: to the base, or
    /// to zeroes.
    #[serde(default)]
    pub rewind: bool,
    /// HEAD of the target may hold something else than the newest commit. Stored before the first change of HEAD; until
    /// then nothing has been done, and HEAD can be held against the newest commit.
    #[serde(default)]
    pub dirty: bool,
    /// A target snapshot of the same name that was found wrong, by its id: it is removed before HEAD is repaired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub withdraw: Option<u64>,
    /// Everything below this offset is applied and flushed.
    #[serde(default)]
    pub progress_to: u64,
    /// All of it is applied and flushed; only the target snapshot is missing.
    #[serde(default)]
    pub applied: bool,
    /// The highest id of a target snapshot when `applied` was stored: one of the same name with a higher id was made
    /// from what is applied, whoever made it.
    #[serde(default)]
    pub target_newest: u64,
}

impl InFlight {
    /// A new intent: nothing is done yet. `dirty` says whether HEAD holds parts of an earlier one.
    pub fn new(name: String, snapshot: Option<Snapshot>, automatic: bool, from: Origin, dirty: bool) -> Self {
        let at = crate::clock::now().to_string();
        Self {
            name,
            snapshot,
            at,
            automatic,
            from,
            in_step: false,
            rewind: false,
            dirty,
            withdraw: None,
            progress_to: 0,
            applied: false,
            target_newest: 0,
        }
    }
}

/// What a delta starts from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A target that was all zeroes: zeroes need not be written.
    Blank,
    /// Any content: both sides are compared, and what differs is written.
    Compare,
    /// A commit, by the source snapshot's id.
    Base(u64),
}

/// A snapshot that may go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retired {
    /// On which side.
    pub side: Side,
    /// Its id there.
    pub id: u64,
    /// Its name.
    pub name: String,
}

impl Retired {
    /// A snapshot of that side.
    pub fn of(side: Side, id: u64, name: &str) -> Self {
        Self { side, id, name: name.to_owned() }
    }

    /// The same snapshot, where the sides are exchanged.
    pub fn reversed(&self) -> Self {
        Self { side: self.side.other(), ..self.clone() }
    }
}

/// One of the two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The source.
    Source,
    /// The target.
    Target,
}

impl Side {
    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

/// A state that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It is no JSON of this shape.
    #[error("the state that poolshift keeps with the target can't be read")]
    Damaged(#[from] serde_json::Error),
    /// It was written by another version.
    #[error("the state with the target has format {found}; this poolshift reads {FORMAT}")]
    Version {
        /// As found.
        found: u64,
    },
}

impl TargetState {
    /// A state without history.
    pub fn new(source: &ImageIdentity, source_location: &str) -> Self {
        Self {
            format: FORMAT,
            source: source.clone(),
            source_location: source_location.to_owned(),
            commits: Vec::new(),
            in_flight: None,
            retired: Vec::new(),
            given_up: Vec::new(),
        }
    }

    /// Reads a stored state.
    pub fn parse(text: &str) -> Result<Self, StateError> {
        // The version first, so that a newer format is named as such and not as damage.
        let value: serde_json::Value = serde_json::from_str(text)?;
        let found = value.get("format").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if found != u64::from(FORMAT) {
            return Err(StateError::Version { found });
        }
        Ok(serde_json::from_value(value)?)
    }

    /// The state as it is stored.
    pub fn render(&self) -> Result<String, StateError> {
        Ok(serde_json::to_string(self)?)
    }

    /// Remembers the name of a source snapshot that was about to be made and that nobody waits for any more.
    pub fn give_up(&mut self, name: &str) {
        self.given_up.retain(|given_up| given_up != name);
        self.given_up.push(name.to_owned());
        let surplus = self.given_up.len().saturating_sub(GIVEN_UP_MAX);
        self.given_up.drain(..surplus);
    }

    /// The commit that HEAD is at when nothing is in flight.
    pub fn newest(&self) -> Option<&Commit> {
        self.commits.last()
    }

    /// Whether HEAD may hold something else than the newest commit because of poolshift's own work.
    pub fn is_dirty(&self) -> bool {
        self.in_flight.as_ref().is_some_and(|in_flight| in_flight.dirty)
    }

    /// The commit whose source snapshot has this id.
    pub fn commit_of_source(&self, source_id: u64) -> Option<&Commit> {
        self.commits.iter().find(|commit| commit.source_id == source_id)
    }
}

impl Commit {
    /// The same commit, where the sides are exchanged.
    pub fn reversed(&self) -> Self {
        Self { source_id: self.target_id, target_id: self.source_id, ..self.clone() }
    }

    /// The snapshot on the source.
    pub fn on_source(&self) -> Snapshot {
        Snapshot { id: self.source_id, name: self.name.clone(), size: self.size }
    }

    /// The snapshot on the target.
    pub fn on_target(&self) -> Snapshot {
        Snapshot { id: self.target_id, name: self.name.clone(), size: self.size }
    }
}
