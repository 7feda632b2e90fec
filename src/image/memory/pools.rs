//! Pools of images in memory: names, and the placeholders that have them for a while.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use super::MemoryImage;
use crate::image::pools::{LIMIT_KEYS, Limits, Named, Pools, VolumeImage, placeholder_name};
use crate::image::{ErrorKind, ImageError, Layout, Result};

/// How a placeholder is laid out, and its size in bytes: one small object.
const PLACEHOLDER: Layout = Layout { object_size: 4096, stripe_unit: 4096, stripe_count: 1 };

/// Any number of pools. Clones share them; a name is given once in each.
#[derive(Clone, Debug, Default)]
pub struct MemoryPools {
    images: Arc<Images>,
}

/// Images, each with its pool.
pub(super) type Images = Mutex<Vec<(String, MemoryImage)>>;

impl MemoryPools {
    fn lock(&self) -> MutexGuard<'_, Vec<(String, MemoryImage)>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts an image into a pool, under the name that it has.
    pub fn add(&self, pool: &str, image: MemoryImage) {
        image.lock().neighbours = Arc::downgrade(&self.images);
        self.lock().push((pool.to_owned(), image));
    }

    /// The image of that name.
    pub fn find(&self, pool: &str, name: &str) -> Option<MemoryImage> {
        let images = self.lock();
        let found = images.iter().find(|(of, image)| of == pool && image.lock().name == name);
        found.map(|(_, image)| image.clone())
    }

    /// The names of all images of a pool, sorted.
    pub fn names(&self, pool: &str) -> Vec<String> {
        let images = self.lock();
        let of_pool = images.iter().filter(|(of, _)| of == pool);
        let mut names: Vec<String> = of_pool.map(|(_, image)| image.lock().name.clone()).collect();
        names.sort();
        names
    }

    /// Removes the image of that name; whether there was one.
    pub fn remove(&self, pool: &str, name: &str) -> bool {
        let mut images = self.lock();
        let before = images.len();
        images.retain(|(of, image)| of != pool || image.lock().name != name);
        images.len() < before
    }

    /// All images as another process opens them ([`MemoryImage::reopen`]): what the last one held is held no more.
    pub fn reopen(&self) {
        for (_, image) in self.lock().iter_mut() {
            image.set_fault(None);
            image.abandon_lease();
            *image = image.reopen();
        }
    }

    /// The watches of processes that are gone time out, and with them their leases.
    pub fn time_out_watches(&self) {
        self.lock().iter().for_each(|(_, image)| image.forget_abandoned_lease());
    }
}

impl MemoryImage {
    /// Whether it is a placeholder.
    pub fn is_placeholder(&self) -> bool {
        self.lock().placeholder
    }

    /// Another image with the same name, HEAD, limits and mark, and without snapshots, as a copy to another pool has it.
    #[must_use]
    pub fn copied(&self) -> Self {
        let inner = self.lock();
        let copy = Self::new(&inner.name, inner.head.size(), inner.layout);
        {
            let mut other = copy.lock();
            (other.head, other.durable) = (inner.head.clone(), inner.head.clone());
            (other.placeholder, other.limits) = (inner.placeholder, inner.limits.clone());
        }
        copy
    }

    /// Whether another handle is to the same image.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Whether another image of its pool has that name.
    pub(super) fn is_taken(&self, name: &str) -> bool {
        let Some(neighbours) = self.lock().neighbours.upgrade() else { return false };
        let images = neighbours.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |one: &Self| one.is_same(self);
        let pool = images.iter().find(|(_, one)| same(one)).map(|(pool, _)| pool);
        images.iter().any(|(of, one)| Some(of) == pool && !same(one) && one.lock().name == name)
    }
}

#[async_trait]
impl VolumeImage for MemoryImage {
    async fn is_replicated(&self) -> Result<bool> {
        let inner = self.alive("look for a state")?;
        Ok(inner.state.is_some() || inner.journal.is_some())
    }

    async fn limits(&self) -> Result<Limits> {
        Ok(self.alive("look for limits")?.limits.clone())
    }

    async fn store_limits(&self, _has: &Limits, wanted: &Limits) -> Result<()> {
        self.step("write the limits", |inner| {
            inner.limits.clone_from(wanted);
            Ok(())
        })
    }
}

#[async_trait]
impl Pools for MemoryPools {
    async fn named(&self, pool: &str, _namespace: Option<&str>, name: &str) -> Result<Named> {
        Ok(match self.find(pool, name) {
            None => Named::Nothing,
            Some(image) if image.is_placeholder() => Named::Placeholder(Arc::new(image)),
            Some(image) => Named::Image(Arc::new(image)),
        })
    }

    async fn prepare_placeholder(
        &self,
        pool: &str,
        _namespace: Option<&str>,
        name: &str,
    ) -> Result<Arc<dyn VolumeImage>> {
        let aside = placeholder_name(name);
        if let Some(there) = self.find(pool, &aside) {
            return match there.is_placeholder() {
                true => Ok(Arc::new(there)),
                false => Err(ImageError::new(ErrorKind::AlreadyExists, there.location, "make a placeholder")),
            };
        }
        let image = MemoryImage::new(&aside, PLACEHOLDER.object_size, PLACEHOLDER);
        image.lock().placeholder = true;
        self.add(pool, image.clone());
        Ok(Arc::new(image))
    }

    async fn remove_placeholder(&self, pool: &str, _namespace: Option<&str>, name: &str) -> Result<()> {
        let aside = placeholder_name(name);
        if self.find(pool, &aside).is_some_and(|image| image.is_placeholder()) {
            self.remove(pool, &aside);
        }
        Ok(())
    }
}

/// An image without limits.
pub(super) fn no_limits() -> Limits {
    vec![None; LIMIT_KEYS.len()]
}
