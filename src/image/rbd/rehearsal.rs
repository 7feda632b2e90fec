//! Clones to rehearse with, which carry a mark; and removing images.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use rustix::io::Errno;

use super::disk::name_now;
use super::lease::LEASE_KEY;
use super::records::{self, REHEARSAL_KEY};
use super::view::{explain_missing, no_entry};
use super::{CreateOptions, Inner, Place, RbdImage, changes, wait_until_closed};
use crate::ceph::{self, CephError, Features, Image, OpenMode, ParentLink};
use crate::image::{ErrorKind, ImageError, Result, Snapshot};

/// How long this process's own handles may take to close before an image is removed.
const CLOSE_PATIENCE: Duration = Duration::from_secs(30);

impl RbdImage {
    /// Makes a clone of a snapshot in the same pool and namespace, and leaves `mark` with it. It has the features that
    /// poolshift wants, and nothing of the state that poolshift keeps with this image. The snapshot need not be
    /// protected; removed before the clone, it lives on in the trash for as long as that does.
    ///
    /// [`ErrorKind::NotFound`] without the snapshot, [`ErrorKind::AlreadyExists`] if the name is taken. A crash may leave
    /// a clone without its mark.
    pub async fn clone_of_snapshot(&self, snapshot: &Snapshot, name: &str, mark: &str) -> Result<Self> {
        let operation = format!("clone snapshot {snapshot} as {name:?}");
        let (inner, wanted, child, mark) =
            (Arc::clone(&self.inner), snapshot.clone(), name.to_owned(), mark.to_owned());
        let work = move || clone(&inner, &wanted, &child, &mark);
        let id = self.inner.call(operation, "rbd_clone3", work).await.map_err(|error| match error.kind {
            ErrorKind::AlreadyExists => error.detail(format!("there is an image {name:?} already")),
            _ => explain_missing(error, Some(snapshot)),
        })?;
        let place = Place { image: name.to_owned(), ..self.inner.place.clone() };
        Self::open(&self.inner.connector, place, Some(id), true).await
    }

    /// The mark that [`Self::clone_of_snapshot`] has left with this image.
    pub async fn rehearsal_mark(&self) -> Result<Option<String>> {
        self.load_record(REHEARSAL_KEY, "look for a rehearsal's mark").await
    }

    /// When this image was made; `None` where no clock can have said that.
    pub async fn created(&self) -> Result<Option<jiff::Timestamp>> {
        let seconds = self.inner.look("look when it was made", Image::created).await?;
        Ok(jiff::Timestamp::from_second(seconds).ok())
    }

    /// Removes the image, which has no snapshots and which nobody else has open. A lease that this holds is given back.
    ///
    /// [`ErrorKind::Busy`] where it has snapshots, clones, or users.
    pub async fn remove(self) -> Result<()> {
        let operation = "remove it";
        let location = self.inner.location.clone();
        let busy = |holder: String| {
            let kind = ErrorKind::Busy { holder: holder.clone() };
            ImageError::new(kind, location.clone(), operation).detail(holder)
        };
        let relations = self.relations().await?;
        if let Some(snapshot) = relations.snapshots.iter().find(|snapshot| !snapshot.clones.is_empty()) {
            let clones: Vec<String> = snapshot.clones.iter().map(ToString::to_string).collect();
            return Err(busy(format!("snapshot {:?} has clones: {}", snapshot.name, clones.join(", ")))
                .hint("flatten or remove them first: poolshift flatten --children"));
        }
        if !relations.snapshots.is_empty() {
            let names: Vec<&str> = relations.snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
            return Err(busy(format!("it has snapshots: {}", names.join(", ")))
                .hint(format!("remove them first: rbd snap purge {}", self.inner.place)));
        }
        if let Some(user) = self.watchers().await?.into_iter().find(|watcher| !watcher.is_own) {
            return Err(busy(format!("client.{} at {} has it open", user.client, user.address)));
        }
        self.give_lease_back().await?;
        let inner = Arc::clone(&self.inner);
        drop(self);
        wait_until_closed(CLOSE_PATIENCE).await;
        let (image, limit) = (Arc::clone(&inner), inner.timeout());
        let work = move |steps: &AtomicU64| remove(&image, steps);
        let removed = ceph::blocking_with_progress("rbd_remove_with_progress", limit, Arc::default(), work).await;
        removed.map_err(|error| match () {
            () if error.is(Errno::BUSY) => busy("somebody has just opened it".into()).caused_by(error),
            () if error.is(Errno::NOTEMPTY) => busy("somebody has just made a snapshot".into()).caused_by(error),
            () => inner.fail(operation, error),
        })
    }
}

/// Fails with ENOENT unless opening by this name opens this image.
fn check_name(inner: &Inner, name: &str) -> ceph::Result<()> {
    let there = inner.pool.id_of_name(name)?.as_deref() == Some(inner.id.as_str());
    there.then_some(()).ok_or_else(|| no_entry("rbd_open"))
}

fn remove(inner: &Inner, steps: &AtomicU64) -> ceph::Result<()> {
    // librbd removes by name only.
    let name = name_now(inner)?;
    check_name(inner, &name)?;
    inner.pool.remove_image(&name, steps)
}

/// Makes the clone, and gives back its id.
fn clone(inner: &Inner, snapshot: &Snapshot, name: &str, mark: &str) -> ceph::Result<String> {
    let parent = Image::open_by_id(&inner.pool, &inner.id, OpenMode::ReadOnly)?;
    changes::check_snapshot(&parent.snapshots()?, snapshot)?;
    let parent = parent.name()?;
    check_name(inner, &parent)?;
    let features = Features(CreateOptions::FEATURES);
    inner.pool.clone_image(&inner.place.pool, (&parent, &snapshot.name), name, features)?;
    let clone = Image::open(&inner.pool, name, OpenMode::ReadWrite)?;
    // librbd clones by names only: whether it was the right one is seen afterwards.
    match clone.parent_link()? {
        Some(ParentLink { snapshot_id, image, .. }) if snapshot_id == snapshot.id && image.id == inner.id => {}
        _ => {
            let what = format!("a clone {name:?} of another snapshot");
            return Err(CephError::Nonsense { function: "rbd_clone3", what });
        }
    }
    #[cfg(debug_assertions)]
    crate::failpoint::reach_blocking("rehearsal.unmarked");
    let (id, set) = (clone.id()?, |key: &str, value: Option<&str>| clone.set_metadata(key, value));
    // librbd copies the parent's metadata, the state of a cutover with it; whose that is stands only with newer ones.
    set(LEASE_KEY, None)?;
    records::remove_all(set)?;
    records::store((&clone, &id), (REHEARSAL_KEY, Some(mark)), set)?;
    #[cfg(debug_assertions)]
    crate::failpoint::reach_blocking("rehearsal.marked");
    Ok(id)
}
