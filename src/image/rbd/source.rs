//! An RBD image as a source: its snapshots, and the views of them.

use std::sync::Arc;

use async_trait::async_trait;

use super::lease::by_advisory_lock;
use super::view::{RbdView, explain_missing, no_entry};
use super::{RbdImage, changes};
use crate::ceph::{CephError, Features, Image, Locker, OpenMode, SnapInfo, Watcher};
use crate::image::{
    ErrorKind, ImageError, ImageIdentity, Layout, Point, Result, Snapshot, SnapshotSupport, SourceImage, View,
};

impl RbdImage {
    /// The read-write handle: the lease's, or one that is shared by the operations under way and closes after them.
    pub(super) async fn writer(&self) -> Result<Arc<Image>> {
        if let Some(held) = self.held() {
            return Ok(Arc::clone(&held.image));
        }
        let mut idle = self.idle_writer.lock().await;
        if let Some(image) = idle.upgrade() {
            return Ok(image);
        }
        let inner = Arc::clone(&self.inner);
        let open = move || Image::open_by_id(&inner.pool, &inner.id, OpenMode::ReadWrite).map(Arc::new);
        let image = self.inner.call("open the image for writing", "rbd_open_by_id", open).await?;
        *idle = Arc::downgrade(&image);
        Ok(image)
    }

    /// Why an image that this client may change can't be changed, and what to do: what a look finds.
    pub async fn read_only_because(&self) -> Result<Option<(String, String)>> {
        let (place, exclusive) = (self.inner.place.to_string(), self.inner.features.has(Features::EXCLUSIVE_LOCK));
        let look = move |image: &Image| {
            if image.is_non_primary()? {
                let hint =
                    format!("replicate it from the cluster where it is primary: rbd mirror image status {place}");
                return Ok(Some(("it is the non-primary side of mirroring".to_owned(), hint)));
            }
            // That of librbd itself begins with "auto".
            let others = |locker: &Locker| exclusive && !locker.cookie.starts_with("auto ");
            Ok(image.lockers()?.iter().find(|locker| others(locker)).map(|locker| {
                let detail = format!("it is locked by {}", by_advisory_lock(locker));
                (detail, format!("find out who has: rbd lock ls {place}; poolshift goes on once the lock is released"))
            }))
        };
        self.inner.look("find out why it can't be changed", look).await
    }

    /// Whether the image may have no more snapshots (`rbd snap limit set`), in words, and what to do.
    pub async fn snapshot_limit_reached(&self) -> Result<Option<(String, String)>> {
        let look = |image: &Image| Ok((image.snapshot_limit()?, image.snapshots()?.len()));
        let (limit, count) = self.inner.look("look for a limit of its snapshots", look).await?;
        let place = &self.inner.place;
        Ok((count as u64 >= limit).then(|| {
            let detail = format!("it may have {limit} snapshots, and has {count}");
            (
                detail,
                format!(
                    "raise the limit: rbd snap limit set {place} --limit NUMBER; rbd snap ls --all {place} lists them"
                ),
            )
        }))
    }

    async fn explain_read_only(&self, error: ImageError) -> ImageError {
        match self.read_only_because().await {
            Ok(Some((detail, hint))) => error.detail(detail).hint(hint),
            _ => error,
        }
    }
}

fn user_snapshots(all: Vec<SnapInfo>) -> Vec<Snapshot> {
    let user = all.into_iter().filter(|snapshot| snapshot.user);
    user.map(|SnapInfo { id, name, size, .. }| Snapshot { id, name, size }).collect()
}

/// Who has an image open for writing, and who has its lock without that: a client that is cut off, or died and has left
/// it behind. `own` is this process's client.
fn describe_writers(watchers: &[Watcher], lockers: &[Locker], own: u64) -> Vec<String> {
    let others = watchers.iter().filter(|watcher| u64::try_from(watcher.client) != Ok(own));
    let open = others.map(|Watcher { client, address }| format!("client.{client} at {address} has it open"));
    let is_open =
        |locker: &&Locker| watchers.iter().any(|watcher| locker.client == format!("client.{}", watcher.client));
    let locked = lockers.iter().filter(|locker| !is_open(locker) && locker.client != format!("client.{own}"));
    let locked = locked.map(|Locker { client, address, .. }| format!("{client} at {address} holds a lock on it"));
    open.chain(locked).collect()
}

/// The snapshot of that name that isn't older than all of `before`: the one that was just made.
fn new_snapshot(before: &[SnapInfo], after: Vec<SnapInfo>, name: &str) -> Option<Snapshot> {
    let newest = before.iter().map(|snapshot| snapshot.id).max();
    user_snapshots(after).into_iter().find(|made| made.name == name && Some(made.id) > newest)
}

#[async_trait]
impl SourceImage for RbdImage {
    fn location(&self) -> &str {
        &self.inner.location
    }

    fn identity(&self) -> &ImageIdentity {
        &self.inner.identity
    }

    fn layout(&self) -> Layout {
        self.inner.layout
    }

    fn snapshot_support(&self) -> SnapshotSupport {
        SnapshotSupport::Kept
    }

    fn remarks(&self) -> Vec<String> {
        self.remarks.clone()
    }

    async fn quiet_token(&self) -> Result<Option<String>> {
        let (inner, read) = (Arc::clone(&self.inner), "look for changes");
        let look = move || inner.pool.quiet_versions(&inner.id);
        let versions = self.inner.call(read, "rados_exec", look).await?;
        Ok(versions.map(|(header, map)| format!("{header} {map}")))
    }

    async fn writers(&self) -> Result<Vec<String>> {
        let own = self.inner.pool.cluster().instance_id();
        let look = |image: &Image| Ok((image.watchers()?, image.lockers()?));
        let (watchers, lockers) = self.inner.look("look for writers", look).await?;
        Ok(describe_writers(&watchers, &lockers, own))
    }

    async fn size(&self) -> Result<u64> {
        self.inner.look("read the size", Image::size).await
    }

    async fn snapshots(&self) -> Result<Vec<Snapshot>> {
        self.inner.look("list the snapshots", Image::snapshots).await.map(user_snapshots)
    }

    async fn create_snapshot(&self, name: &str) -> Result<Snapshot> {
        let operation = format!("create snapshot {name:?}");
        let (writer, inner, wanted) = (self.writer().await?, Arc::clone(&self.inner), name.to_owned());
        let create = move || {
            let before = writer.snapshots()?;
            // librbd answers "done" when the lock's owner, whom it asks, finds the name taken.
            if before.iter().any(|snapshot| snapshot.user && snapshot.name == wanted) {
                let errno = rustix::io::Errno::EXIST.raw_os_error();
                return Err(CephError::Call { function: "rbd_snap_create2", errno });
            }
            writer.create_snapshot(&wanted)?;
            if let Some(made) = new_snapshot(&before, writer.snapshots()?, &wanted) {
                return Ok(made);
            }
            // The lock's owner made it, and this handle has not heard of it yet.
            let fresh = Image::open_by_id(&inner.pool, &inner.id, OpenMode::ReadOnly)?;
            new_snapshot(&before, fresh.snapshots()?, &wanted).ok_or_else(|| no_entry("rbd_snap_create2"))
        };
        match self.inner.call(operation.clone(), "rbd_snap_create2", create).await {
            // librbd looks for the lock's owner for as long as it may when a lock that it had is gone.
            Err(error) if error.kind == ErrorKind::TimedOut && self.has_lost_lease().await => {
                Err(ImageError::new(ErrorKind::Fenced, self.inner.location.clone(), operation).caused_by(error))
            }
            Err(error) if error.kind == ErrorKind::ReadOnly => Err(self.explain_read_only(error).await),
            // A pool's quota has the same errno.
            Err(error) if error.kind == ErrorKind::NoSpace => Err(match self.snapshot_limit_reached().await {
                Ok(Some((detail, hint))) => error.detail(detail).hint(hint),
                _ => error,
            }),
            created => created.map_err(|error| match error.kind {
                ErrorKind::AlreadyExists => error.detail(format!("there is a snapshot {name:?} already")),
                ErrorKind::NotFound => error.detail("it was created, but is gone again"),
                _ => error,
            }),
        }
    }

    async fn remove_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        let operation = format!("remove snapshot {snapshot}");
        // A look first, because opening for writing is not for a snapshot that isn't there.
        let there = self.inner.look(operation.clone(), Image::snapshots).await?;
        match changes::check_snapshot(&there, snapshot) {
            Err(error) if !was_cut(&there, snapshot) => {
                return Err(explain_missing(self.inner.fail(operation, error), Some(snapshot)));
            }
            _ => {}
        }
        let (writer, id) = (self.writer().await?, snapshot.id);
        // By id: nobody can slip another snapshot of that name in.
        let removed = self.inner.call(operation, "rbd_snap_remove_by_id", move || writer.remove_snapshot(id)).await;
        let removed = match removed {
            Err(error) if error.kind == ErrorKind::ReadOnly => Err(self.explain_read_only(error).await),
            removed => removed,
        };
        removed.map_err(|error| match error.kind {
            ErrorKind::Busy { .. } => busy_snapshot(error),
            _ => explain_missing(error, Some(snapshot)),
        })
    }

    async fn view(&self, point: &Point) -> Result<Arc<dyn View>> {
        Ok(Arc::new(RbdView::open(&self.inner, point).await?))
    }
}

/// Whether a removal of that snapshot was begun and cut: librbd first moves a snapshot to the trash's namespace, under
/// another name. Nothing but its id finds it there, and nobody would ever remove it.
fn was_cut(all: &[SnapInfo], snapshot: &Snapshot) -> bool {
    all.iter().any(|found| found.id == snapshot.id && !found.user)
}

fn busy_snapshot(error: ImageError) -> ImageError {
    error
        .detail("the snapshot is protected, or images are cloned from it")
        .hint("flatten or remove its clones (rbd children), then rbd snap unprotect")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_the_trash_is_known_by_its_id() {
        let info = |id, user| SnapInfo { id, name: "0d6cbf2b-3c0f".into(), size: 7, user };
        let snapshot = Snapshot { id: 4, name: "a".into(), size: 7 };
        assert!(was_cut(&[info(3, true), info(4, false)], &snapshot));
        assert!(!was_cut(&[info(3, false), info(4, true)], &snapshot));
    }

    #[test]
    fn a_lock_counts_where_its_holder_has_not_opened_the_image() {
        let watcher = |client| Watcher { client, address: format!("10.0.0.{client}:0/1") };
        let locker = |client: &str| Locker { client: client.into(), cookie: "auto 1".into(), address: "a".into() };
        let writers = describe_writers(&[watcher(4), watcher(5)], &[locker("client.5"), locker("client.6")], 4);
        assert_eq!(writers, ["client.5 at 10.0.0.5:0/1 has it open", "client.6 at a holds a lock on it"]);
        assert!(describe_writers(&[watcher(4)], &[locker("client.4")], 4).is_empty());
    }

    #[test]
    fn only_a_younger_snapshot_is_the_one_just_made() {
        let info = |id, name: &str, user| SnapInfo { id, name: name.into(), size: 7, user };
        let before = [info(4, "a", true), info(9, "g", false)];
        let made = |after: &[SnapInfo]| new_snapshot(&before, after.to_vec(), "a").map(|made| made.id);
        assert_eq!(made(&[info(4, "a", true)]), None);
        assert_eq!(made(&[info(10, "a", false)]), None);
        assert_eq!(made(&[info(4, "a", true), info(12, "a", true)]), Some(12));
    }
}
