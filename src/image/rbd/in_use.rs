//! Images that have one name while they are replicated, or kept, and another while a server uses them; and the
//! placeholder that has the name meanwhile, where somebody else insists on there being an image of it.
//!
//! Cinder knows the image of a volume by its name only, `volume-ID`, in the pool of the volume's backend. What it moves
//! to another pool is an empty image of 4 MiB of that name, so that it takes an instant; the real images have other
//! names then. A placeholder carries a mark in its metadata, which librbd copies with it, and the limits (QoS) of the image
//! that it stands in for: what Cinder writes to it, that image is given when it has its name again.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use async_trait::async_trait;
use rustix::io::Errno;

use super::records::STATE_KEY;
use super::{Connector, CreateOptions, Place, RbdImage};
use crate::ceph::{self, Image, OpenMode};
use crate::image::pools::{LIMIT_KEYS, Limits, Named, Pools, VolumeImage, placeholder_name};
use crate::image::{Disk as _, ErrorKind, ImageError, ImageSpec, Result, SourceImage as _};

/// The metadata key of the mark.
const MARK_KEY: &str = "poolshift.placeholder";
/// The size of a placeholder, in bytes: one object.
const PLACEHOLDER_SIZE: u64 = 4 << 20;
/// How long an image may have a name and no header while librbd creates it: three requests.
const CREATION: Duration = Duration::from_secs(2);

/// Where an image is, by the names of its pool and namespace, or why it can't be on RBD.
fn place_of(spec: &ImageSpec) -> Result<(&str, Option<&str>, &str)> {
    match spec {
        ImageSpec::Rbd { pool, namespace, image, .. } => Ok((pool, namespace.as_deref(), image)),
        ImageSpec::File { .. } => {
            Err(ImageError::new(ErrorKind::Unsupported, spec.to_string(), "open the image").detail("it is a file"))
        }
    }
}

impl Connector {
    /// Opens a target to write to; `in_use` is its name while a server uses it, where that is another one.
    pub async fn open_target(&self, spec: &ImageSpec, in_use: Option<&ImageSpec>) -> Result<RbdImage> {
        let (pool, namespace, name) = place_of(spec)?;
        match in_use {
            None => RbdImage::open_target(self, pool, namespace, name).await,
            Some(in_use) => self.target_of(pool, namespace, name, place_of(in_use)?.2).await,
        }
    }

    /// What has that name.
    pub async fn named(&self, pool: &str, namespace: Option<&str>, name: &str) -> Result<Named<RbdImage>> {
        match RbdImage::open_target(self, pool, namespace, name).await {
            Ok(image) if image.is_placeholder().await? => Ok(Named::Placeholder(image)),
            Ok(image) => Ok(Named::Image(image)),
            Err(error) if error.kind == ErrorKind::NotFound => {
                // The pool, or the image: only one of them is no error.
                RbdImage::exists(self, pool, namespace, name).await?;
                Ok(Named::Nothing)
            }
            Err(error) => Err(error),
        }
    }

    /// The source that is called `in_use` while a server uses it, and `kept` otherwise; a placeholder is none.
    pub async fn source_of(&self, pool: &str, namespace: Option<&str>, in_use: &str, kept: &str) -> Result<RbdImage> {
        for name in [kept, in_use, kept] {
            if let Named::Image(image) = self.named(pool, namespace, name).await? {
                return Ok(image);
            }
        }
        Err(missing(pool, namespace, in_use)
            .detail(format!("{pool} has neither {in_use:?} nor {kept:?}, but for a placeholder"))
            .hint("look for it with rbd ls: somebody has renamed or removed it"))
    }

    /// The target that is called `name` while it is written, and `in_use` while a server uses it. Of that name it is
    /// known by what poolshift keeps with it: another image is none.
    async fn target_of(&self, pool: &str, namespace: Option<&str>, name: &str, in_use: &str) -> Result<RbdImage> {
        // It may be given the other name meanwhile, either way.
        for (name, is_other) in [(name, false), (in_use, true), (name, false)] {
            if let Named::Image(image) = self.named(pool, namespace, name).await?
                && (!is_other || image.is_replicated().await?)
            {
                return Ok(image);
            }
        }
        Err(missing(pool, namespace, name).detail(format!("{pool} has no image {name:?}")))
    }

    /// Makes a placeholder for the name, which it has not yet ([`Disk::rename`](crate::image::Disk::rename)). There already is no error.
    pub async fn prepare_placeholder(&self, pool: &str, namespace: Option<&str>, name: &str) -> Result<RbdImage> {
        let aside = placeholder_name(name);
        self.forget_stale_name(pool, namespace, &aside).await?;
        match RbdImage::create(self, pool, namespace, &aside, &CreateOptions::new(PLACEHOLDER_SIZE)).await {
            Ok(()) => {}
            Err(error) if error.kind == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        let image = RbdImage::open_target(self, pool, namespace, &aside).await?;
        if !image.is_placeholder().await? && image.size().await? != PLACEHOLDER_SIZE {
            let taken = ImageError::new(ErrorKind::AlreadyExists, image.location(), "make a placeholder");
            return Err(taken.detail("an image that poolshift has not made has its name").hint("give it another name"));
        }
        // A run that was cut may have made it, and not marked it.
        image.mark_as_placeholder(name).await?;
        Ok(image)
    }

    /// Removes the placeholder that was put aside of that name. Nothing there is no error.
    pub async fn remove_placeholder(&self, pool: &str, namespace: Option<&str>, name: &str) -> Result<()> {
        let aside = placeholder_name(name);
        match self.named(pool, namespace, &aside).await? {
            Named::Placeholder(image) => image.remove().await,
            Named::Nothing => self.forget_stale_name(pool, namespace, &aside).await,
            Named::Image(_) => Ok(()),
        }
    }

    /// Removes a name that opens nothing: a placeholder's whose rename or creation was interrupted. No image could be given
    /// the name otherwise. Only for names of poolshift's own making: any other image may have lost its header, and is not
    /// to be removed.
    async fn forget_stale_name(&self, pool: &str, namespace: Option<&str>, name: &str) -> Result<()> {
        let place = Place::new(pool, namespace, name);
        let (opened, name) = (self.pool(&place).await?, name.to_owned());
        let forget = move |steps: &AtomicU64| {
            let opens_nothing = || match opened.id_of_name(&name)? {
                None => Ok(None),
                Some(id) => match Image::open_by_id(&opened, &id, OpenMode::ReadOnly) {
                    Err(error) if error.is(Errno::NOENT) => Ok(Some(id)),
                    opened => opened.map(|_| None),
                },
            };
            let Some(id) = opens_nothing()? else { return Ok(()) };
            // Another process may be creating it.
            std::thread::sleep(CREATION);
            if opens_nothing()?.as_ref() != Some(&id) {
                return Ok(());
            }
            match opened.remove_image(&name, steps) {
                // The pool's directory does not have the name.
                Err(error) if error.is(Errno::NOENT) => {}
                removed => removed?,
            }
            opened.forget_name(&name)
        };
        let function = "rbd_remove_with_progress";
        let forgotten = ceph::blocking_with_progress(function, self.io_timeout, Arc::default(), forget).await;
        forgotten.map_err(|error| self.failure(&place).of("remove a name that opens nothing", error))
    }
}

fn missing(pool: &str, namespace: Option<&str>, name: &str) -> ImageError {
    let namespace = namespace.map(|namespace| format!("{namespace}/")).unwrap_or_default();
    ImageError::new(ErrorKind::NotFound, format!("rbd:{pool}/{namespace}{name}"), "open the image")
}

impl RbdImage {
    /// Whether it is a placeholder.
    pub async fn is_placeholder(&self) -> Result<bool> {
        let mark = self.inner.look("look for a placeholder's mark", |image| image.metadata(MARK_KEY)).await?;
        Ok(mark.is_some())
    }

    /// Whether poolshift has written to it: it keeps a state with it, or a journal.
    pub async fn is_replicated(&self) -> Result<bool> {
        let state = self.load_record(STATE_KEY, "look for a state").await?;
        Ok(state.is_some() || self.load_journal().await?.is_some())
    }

    async fn mark_as_placeholder(&self, name: &str) -> Result<()> {
        self.set_metadata_bounded(MARK_KEY, Some(name), 1024, "mark the placeholder").await
    }
}

#[async_trait]
impl VolumeImage for RbdImage {
    async fn is_replicated(&self) -> Result<bool> {
        self.is_replicated().await
    }

    async fn limits(&self) -> Result<Limits> {
        let read = |image: &crate::ceph::Image| {
            LIMIT_KEYS.iter().map(|key| image.metadata(key)).collect::<std::result::Result<Limits, _>>()
        };
        self.inner.look("look for limits", read).await
    }

    async fn store_limits(&self, has: &Limits, wanted: &Limits) -> Result<()> {
        for ((key, has), wanted) in LIMIT_KEYS.into_iter().zip(has).zip(wanted) {
            if has != wanted {
                self.set_metadata_bounded(key, wanted.as_deref(), 64, "write a limit").await?;
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Pools for Connector {
    async fn named(&self, pool: &str, namespace: Option<&str>, name: &str) -> Result<Named> {
        Ok(match self.named(pool, namespace, name).await? {
            Named::Nothing => Named::Nothing,
            Named::Placeholder(image) => Named::Placeholder(Arc::new(image)),
            Named::Image(image) => Named::Image(Arc::new(image)),
        })
    }

    async fn prepare_placeholder(
        &self,
        pool: &str,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<Arc<dyn VolumeImage>> {
        Ok(Arc::new(self.prepare_placeholder(pool, namespace, name).await?))
    }

    async fn remove_placeholder(&self, pool: &str, namespace: Option<&str>, name: &str) -> Result<()> {
        self.remove_placeholder(pool, namespace, name).await
    }
}
