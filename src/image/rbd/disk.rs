//! An RBD image as a server's disk: who has it open, the fence, its name, and the journal of a cutover.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use rustix::io::Errno;

use super::records::{self, JOURNAL_KEY, KNOWN_KEY, STATE_KEY};
use super::{Connector, Inner, Place, RbdImage, RbdWatcher};
use crate::ceph::{self, CephError, Features, Image, OpenMode};
use crate::failpoint::failpoint;
use crate::image::metadata::{Change, KNOWN_MAX, Metadata};
use crate::image::{Disk, DiskUser, ErrorKind, ImageError, ImageIdentity, JOURNAL_MAX, LeaseOwner, LockHolder, Result};

impl RbdImage {
    /// Opens the image that has this id ([`crate::image::ImageIdentity::image`]), whatever its name is by now, to read
    /// and to write. [`ErrorKind::NotFound`] when it is not there.
    pub async fn open_by_id(connector: &Connector, pool: &str, namespace: Option<&str>, id: &str) -> Result<Self> {
        let place = Place::new(pool, namespace, id);
        let (opened, wanted) = (connector.pool(&place).await?, id.to_owned());
        let named = ceph::blocking("rbd_open_by_id_read_only", connector.io_timeout, move || {
            Image::open_by_id(&opened, &wanted, OpenMode::ReadOnly)?.name()
        });
        let name = named.await.map_err(|error| {
            let missing = error.is(rustix::io::Errno::NOENT);
            let failed = connector.failure(&place).of("open the image", error);
            if missing { failed.detail(format!("{} has no image with the id {id}", place.parent())) } else { failed }
        })?;
        Self::open(connector, Place { image: name, ..place }, Some(id.to_owned()), true).await
    }

    /// Opens the image of that identity, whatever its name is by now, to read and to write. `None` when it is gone,
    /// also where only its name is left ([`Connector::remove_remains`]), or in the trash.
    ///
    /// [`ErrorKind::Unsupported`] if the identity is of another cluster, pool or namespace.
    pub async fn open_known(
        connector: &Connector,
        pool: &str,
        namespace: Option<&str>,
        identity: &ImageIdentity,
    ) -> Result<Option<Self>> {
        let place = Place::new(pool, namespace, "");
        let id = connector.pool(&place).await?.id();
        let there = place.namespace.as_ref().map_or_else(|| id.to_string(), |namespace| format!("{id}/{namespace}"));
        if (connector.fsid(), &there) != (identity.cluster.as_str(), &identity.pool) {
            let other = ImageError::new(ErrorKind::Unsupported, place.location(), format!("find the image {identity}"));
            return Err(other
                .detail(format!("this is the pool {}/{there}", connector.fsid()))
                .hint("the plan has to name the pools that it had at the cutover"));
        }
        match Self::open_by_id(connector, pool, namespace, &identity.image).await {
            Ok(image) => Ok(Some(image)),
            Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The id of the `rbd group` that it is a member of.
    pub async fn group(&self) -> Result<Option<String>> {
        let inner = Arc::clone(&self.inner);
        let read = move || inner.pool.group_of_image(&inner.id);
        self.inner.call("look for its group", "rados_exec", read).await
    }

    /// [`Self::store`], for at most so many bytes.
    pub(super) async fn store_bounded(
        &self,
        key: &'static str,
        value: Option<&str>,
        most: usize,
        operation: &str,
    ) -> Result<()> {
        self.check_length(value, most, operation)?;
        self.store(key, value, operation).await
    }

    fn check_length(&self, value: Option<&str>, most: usize, operation: &str) -> Result<()> {
        let Some(value) = value.filter(|value| value.len() > most) else { return Ok(()) };
        let large = ImageError::new(ErrorKind::OutOfBounds, self.inner.location.clone(), operation);
        Err(large.detail(format!("it has {} bytes; the most is {most}", value.len())))
    }

    /// Changes a key of the image's metadata that is no record, to at most so many bytes.
    pub(super) async fn set_metadata_bounded(
        &self,
        key: &'static str,
        value: Option<&str>,
        most: usize,
        operation: &str,
    ) -> Result<()> {
        self.check_length(value, most, operation)?;
        self.set_metadata(key, value, operation).await
    }

    /// Changes a key of the image's metadata without its lock: a server that has it need not give it.
    async fn set_metadata(&self, key: &'static str, value: Option<&str>, operation: &str) -> Result<()> {
        let (inner, value) = (Arc::clone(&self.inner), value.map(str::to_owned));
        let set = move || inner.pool.set_image_metadata(&inner.id, key, value.as_deref());
        self.inner.call(operation, "rados_exec", set).await
    }

    /// Stores a record, or removes it, without the lock.
    async fn store(&self, key: &'static str, value: Option<&str>, operation: &str) -> Result<()> {
        // While a server stands still each look counts: that the records are this image's is looked at once.
        if value.is_some() && self.has_records.load(Ordering::Acquire) {
            return self.set_metadata(key, value, operation).await;
        }
        let (inner, text) = (Arc::clone(&self.inner), value.map(str::to_owned));
        let store = move |image: &Image| {
            let set = |key: &str, value: Option<&str>| inner.pool.set_image_metadata(&inner.id, key, value);
            records::store((image, &inner.id), (key, text.as_deref()), set)
        };
        self.inner.look(operation, store).await?;
        self.has_records.store(value.is_some(), Ordering::Release);
        Ok(())
    }

    /// A record of this image's own.
    pub(super) async fn load_record(&self, key: &'static str, operation: &str) -> Result<Option<String>> {
        let id = self.inner.id.clone();
        self.inner.look(operation, move |image| records::load(image, &id, key)).await
    }
}

impl Connector {
    /// Takes away the name of an image that is gone: a removal that was cut leaves it in the pool's directory. Nothing
    /// left is no error.
    pub async fn remove_remains(&self, pool: &str, namespace: Option<&str>, id: &str) -> Result<()> {
        let images = self.images(pool, namespace).await?;
        let Some(image) = images.into_iter().find(|image| image.id.as_deref() == Some(id)) else { return Ok(()) };
        let place = Place::new(pool, namespace, &image.name);
        let (opened, id) = (self.pool(&place).await?, id.to_owned());
        let work = move |steps: &AtomicU64| match Image::open_by_id(&opened, &id, OpenMode::ReadOnly) {
            Err(error) if error.is(Errno::NOENT) => opened.remove_image(&image.name, steps),
            // It is whole.
            Ok(_) => Err(CephError::Nonsense { function: "rbd_open_by_id", what: "an image that had gone".into() }),
            Err(error) => Err(error),
        };
        let work = ceph::blocking_with_progress("rbd_remove_with_progress", self.io_timeout, Arc::default(), work);
        match work.await {
            Err(error) if !error.is(Errno::NOENT) => Err(self.failure(&place).of("remove what is left of it", error)),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Disk for RbdImage {
    fn has_lock(&self) -> bool {
        self.inner.features.has(Features::EXCLUSIVE_LOCK)
    }

    async fn users(&self) -> Result<Vec<DiskUser>> {
        let user = |RbdWatcher { address, is_own, .. }| DiskUser { address, is_own };
        Ok(self.watchers().await?.into_iter().map(user).collect())
    }

    async fn fence(&self, owner: &LeaseOwner, holder: LockHolder) -> Result<()> {
        self.take_fence(owner, holder).await
    }

    async fn name(&self) -> Result<String> {
        // A handle that is open keeps the name that it found.
        self.inner.look("read its name", Image::name).await
    }

    async fn rename(&self, name: &str) -> Result<()> {
        let operation = format!("rename it to {name:?}");
        if name.is_empty() || name.contains(['/', '@']) {
            let refused = ImageError::new(ErrorKind::Unsupported, self.inner.location.clone(), operation);
            return Err(refused.detail("no tool could name it any more"));
        }
        let (inner, wanted) = (Arc::clone(&self.inner), name.to_owned());
        let renamed = self.inner.call(operation, "rbd_rename", move || rename(&inner, &wanted)).await;
        renamed.map_err(|error| match error.kind {
            ErrorKind::AlreadyExists => {
                error.detail(format!("{} has another image {name:?}", self.inner.place.parent()))
            }
            _ => error,
        })
    }

    async fn load_journal(&self) -> Result<Option<String>> {
        self.load_record(JOURNAL_KEY, "read the journal").await
    }

    async fn store_journal(&self, journal: Option<&str>) -> Result<()> {
        self.store_bounded(JOURNAL_KEY, journal, JOURNAL_MAX, "store the journal").await
    }

    async fn forget_state(&self) -> Result<()> {
        self.store(STATE_KEY, None, "forget the state").await
    }

    async fn metadata(&self) -> Result<Metadata> {
        let inner = Arc::clone(&self.inner);
        let read = move || inner.pool.image_metadata(&inner.id);
        Ok(Metadata::of(self.inner.call("read its metadata", "rados_exec", read).await?))
    }

    async fn change_metadata(&self, change: &Change) -> Result<()> {
        let set = change.set.iter().map(|(key, value)| (key, Some(value)));
        for (key, value) in set.chain(change.remove.iter().map(|key| (key, None))) {
            let (inner, name, value) = (Arc::clone(&self.inner), key.clone(), value.cloned());
            let what = if value.is_some() { "set" } else { "remove" };
            let change = move || inner.pool.set_image_metadata(&inner.id, &name, value.as_ref());
            self.inner.call(format!("{what} {key:?} of its metadata"), "rados_exec", change).await?;
            failpoint!("image.metadata-changed");
        }
        Ok(())
    }

    async fn load_known_keys(&self) -> Result<Option<String>> {
        self.load_record(KNOWN_KEY, "read which metadata was carried").await
    }

    async fn store_known_keys(&self, known: Option<&str>) -> Result<()> {
        self.store_bounded(KNOWN_KEY, known, KNOWN_MAX, "note which metadata was carried").await
    }
}

/// The image's name, by the directory.
pub(super) fn name_now(inner: &Inner) -> ceph::Result<String> {
    Image::open_by_id(&inner.pool, &inner.id, OpenMode::ReadOnly)?.name()
}

/// Renames the image, or finishes a rename that was cut: such a one has left it two names to be opened by (see
/// `ceph::names`).
fn rename(inner: &Inner, wanted: &str) -> ceph::Result<()> {
    let old = name_now(inner)?;
    let opens_this = |name: &str| Ok(inner.pool.id_of_name(name)?.as_deref() == Some(inner.id.as_str()));
    if old != wanted {
        if opens_this(wanted)? {
            tracing::warn!(image = %inner.place, name = wanted, "a rename was cut before it counted: doing it again");
            inner.pool.forget_name(wanted)?;
        }
        inner.pool.rename_image(&old, wanted)?;
        #[cfg(debug_assertions)]
        crate::failpoint::reach_blocking("image.renamed");
        let name = name_now(inner)?;
        if name != wanted {
            let what = format!("success, and the image is called {name:?}");
            return Err(CephError::Nonsense { function: "rbd_rename", what });
        }
    }
    // What was cut after it counted.
    let opened_by = inner.place.image.as_str();
    if opened_by != wanted && opens_this(opened_by)? {
        tracing::warn!(image = %inner.place, name = opened_by, "a rename was cut: its old name is taken away");
        inner.pool.forget_name(opened_by)?;
    }
    Ok(())
}
