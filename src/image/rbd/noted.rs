//! Where an image's target is, noted with the image: for targets whose names nobody can know beforehand.
//!
//! Cinder names an image that it is given as a volume `volume-ID`, by an id that it makes up. So before it is given one,
//! the target's identity is noted in the metadata of its source ([`RbdImage::note_target`]), and the target is opened by
//! that, whatever its name. The note is there before the name can change, and goes with the source; nobody has to ask the
//! cloud. It names the source as well, because a clone of that takes it along.
//!
//! Once the source is gone, which only the end of finalizing brings about, the pool is looked through for the image that
//! keeps the server's journal.

use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};

use super::records::TARGET_KEY;
use super::{Connector, RbdImage};
use crate::image::{Disk as _, ErrorKind, ImageError, ImageIdentity, ImageSpec, Result, SourceImage as _};

/// How many images of a pool are looked at side by side.
const LOOKS: usize = 8;

#[derive(Deserialize, Serialize)]
struct Note {
    source: ImageIdentity,
    target: ImageIdentity,
}

impl RbdImage {
    /// Notes which image is this one's target.
    pub async fn note_target(&self, target: &ImageIdentity) -> Result<()> {
        let note = Note { source: self.identity().clone(), target: target.clone() };
        let text = serde_json::to_string(&note).unwrap_or_default();
        self.store_bounded(TARGET_KEY, Some(&text), 1024, "note its target").await
    }

    /// Takes the note away.
    pub async fn forget_target(&self) -> Result<()> {
        self.store_bounded(TARGET_KEY, None, 1024, "forget its target").await
    }

    /// Which image is this one's target, if that is noted. A note of another image's is none.
    pub async fn noted_target(&self) -> Result<Option<ImageIdentity>> {
        let text = self.load_record(TARGET_KEY, "look for its target").await?;
        let note = text.and_then(|text| serde_json::from_str::<Note>(&text).ok());
        Ok(note.filter(|note| note.source == *self.identity()).map(|note| note.target))
    }
}

impl Connector {
    /// Opens a target to write to, by its names ([`Self::open_target`]) or by the note with its source, which is in
    /// `sources`. Known by that note it is only as long as poolshift keeps something with it.
    ///
    /// [`ErrorKind::NotFound`] where neither leads to it.
    pub async fn open_target_of(
        &self,
        spec: &ImageSpec,
        in_use: Option<&ImageSpec>,
        (sources, source): (&Connector, &ImageSpec),
    ) -> Result<RbdImage> {
        let missing = match self.open_target(spec, in_use).await {
            Err(error) if error.kind == ErrorKind::NotFound && in_use.is_some() => error,
            opened => return opened,
        };
        if let Some(image) = self.noted_with(spec, (sources, source)).await? {
            return Ok(image);
        }
        // It may have been given the name back meanwhile.
        match self.open_target(spec, in_use).await {
            Err(error) if error.kind == ErrorKind::NotFound => Err(missing),
            opened => opened,
        }
    }

    async fn noted_with(&self, spec: &ImageSpec, source: (&Connector, &ImageSpec)) -> Result<Option<RbdImage>> {
        let (sources, source) = source;
        let (ImageSpec::Rbd { pool, namespace, .. }, ImageSpec::Rbd { pool: of, namespace: within, image: name, .. }) =
            (spec, source)
        else {
            return Ok(None);
        };
        let source = match RbdImage::open_source(sources, of, within.as_deref(), name).await {
            Ok(source) => source,
            Err(error) if error.kind == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(target) = source.noted_target().await? else { return Ok(None) };
        let Some(image) = RbdImage::open_known(self, pool, namespace.as_deref(), &target).await? else {
            return Ok(None);
        };
        Ok(if image.is_replicated().await? { Some(image) } else { None })
    }

    /// All images of a pool that keep a journal, with that. Each image of the pool is opened for it.
    pub async fn journals(&self, pool: &str, namespace: Option<&str>) -> Result<Vec<(RbdImage, String)>> {
        let images = self.images(pool, namespace).await?.into_iter().filter_map(|image| image.id);
        let looks = images.map(|id| async move {
            let found = async {
                let image = RbdImage::open_by_id(self, pool, namespace, &id).await?;
                let journal = image.load_journal().await?;
                Ok::<_, ImageError>(journal.map(|journal| (image, journal)))
            };
            match found.await {
                // It has gone meanwhile.
                Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
                found => found,
            }
        });
        stream::iter(looks).buffer_unordered(LOOKS).try_filter_map(|found| async { Ok(found) }).try_collect().await
    }
}
