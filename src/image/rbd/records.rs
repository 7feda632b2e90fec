//! The records that poolshift keeps with an image, in the image's metadata, and whose they are.
//!
//! `rbd cp`, `rbd deep cp`, `rbd clone` and `rbd migration` take an image's metadata along. So with the first record the
//! image's own id is stored as well, under [`OWNER_KEY`]. Records of an image with another id are those of the image that
//! it was copied from: they are not read, and removed before the first record of its own. Without an id, which versions
//! before this one did not store, they count.
//!
//! The lease's record is none of these: it counts for the client that it names.

use crate::ceph::{Image, Result};

/// The metadata key of the id of the image that the records belong to.
const OWNER_KEY: &str = "poolshift.image";
/// The metadata key of the state.
pub(super) const STATE_KEY: &str = "poolshift.state";
/// The metadata key of the note.
pub(super) const NOTE_KEY: &str = "poolshift.note";
/// The metadata key of the journal.
pub(super) const JOURNAL_KEY: &str = "poolshift.cutover";
/// The metadata key of the note that says which image is this one's target.
pub(super) const TARGET_KEY: &str = "poolshift.target";
/// The metadata key of a rehearsal's mark.
pub(super) const REHEARSAL_KEY: &str = "poolshift.rehearsal";
/// The metadata key of the record of the keys that were carried between source and target.
pub(super) const KNOWN_KEY: &str = "poolshift.carried";

const KEYS: [&str; 6] = [STATE_KEY, NOTE_KEY, JOURNAL_KEY, TARGET_KEY, REHEARSAL_KEY, KNOWN_KEY];

/// A record of the image that has that id; `None` for one that was copied with another image's metadata.
pub(super) fn load(image: &Image, id: &str, key: &str) -> Result<Option<String>> {
    match image.metadata(OWNER_KEY)? {
        Some(owner) if owner != id => Ok(None),
        _ => image.metadata(key),
    }
}

/// Removes all records, whose ever they are: an image that was just made by a clone has them of its parent.
pub(super) fn remove_all(set: impl Fn(&str, Option<&str>) -> Result<()>) -> Result<()> {
    KEYS.into_iter().try_for_each(|key| set(key, None))
}

/// Stores a record, or removes it. `set` changes a key of the image's metadata, `image` reads it.
pub(super) fn store(
    (image, id): (&Image, &str),
    (key, value): (&str, Option<&str>),
    set: impl Fn(&str, Option<&str>) -> Result<()>,
) -> Result<()> {
    let owner = image.metadata(OWNER_KEY)?;
    match &owner {
        Some(owner) if owner == id => {}
        // The id last: a crash in between leaves records that are not read.
        Some(_) => {
            remove_all(&set)?;
            set(OWNER_KEY, Some(id))?;
        }
        None if value.is_some() => set(OWNER_KEY, Some(id))?,
        None => {}
    }
    set(key, value)?;
    if value.is_none() {
        for key in KEYS {
            if image.metadata(key)?.is_some() {
                return Ok(());
            }
        }
        set(OWNER_KEY, None)?;
    }
    Ok(())
}
