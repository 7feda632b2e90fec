//! The RBD images of a volume that Cinder copies. They are opened to read only: a client that watches one would keep
//! Cinder from removing it.

use std::fmt;
use std::time::Duration;

use bytesize::ByteSize;

use super::super::super::Side;
use super::super::switch::CloudVolume;
use crate::image::rbd::{RbdImage, RbdRelations};
use crate::image::{ErrorKind, ImageError, SourceImage as _};

/// The volume's image on a side, by the name that Cinder has for it; `None` where there is none.
pub(super) async fn open(volume: &CloudVolume, side: Side) -> Result<Option<RbdImage>, ImageError> {
    let (connector, place) = volume.in_cluster(side)?;
    match RbdImage::open_source(connector, &place.pool, place.namespace.as_deref(), &place.in_use).await {
        Ok(image) => Ok(Some(image)),
        Err(error) if error.kind == ErrorKind::NotFound => {
            // The pool, or the image: only one of them is no error.
            RbdImage::exists(connector, &place.pool, place.namespace.as_deref(), &place.in_use).await?;
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The image that has the volume's name where it is to go.
pub(super) async fn in_the_way(volume: &CloudVolume, to: Side) -> Result<Option<String>, ImageError> {
    Ok(open(volume, to).await?.map(|image| image.location().to_owned()))
}

/// The images that are there because the volume is replicated, or was cut over.
pub(super) async fn replicas(volume: &CloudVolume) -> Result<Vec<String>, ImageError> {
    let mut found = Vec::new();
    for side in [Side::Source, Side::Target] {
        let (connector, place) = volume.in_cluster(side)?;
        if RbdImage::exists(connector, &place.pool, place.namespace.as_deref(), &place.idle).await? {
            found.push(format!("{}/{}", place.pool, place.idle));
        }
    }
    Ok(found)
}

/// What an image is bound to, and who has it open.
pub(super) struct Bound {
    pub(super) relations: RbdRelations,
    /// Addresses.
    pub(super) users: Vec<String>,
}

pub(super) async fn bound(image: &RbdImage) -> Result<Bound, ImageError> {
    let (relations, watchers) = futures::try_join!(image.relations(), image.watchers())?;
    Ok(Bound { relations, users: watchers.into_iter().map(|watcher| watcher.address).collect() })
}

/// How much of a volume has been copied, as far as the object maps tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Copied {
    /// Bytes of the copy's objects.
    pub(super) there: Option<u64>,
    /// Bytes that are left of what is copied, which goes at the end.
    left: Option<u64>,
    /// For how long nothing of the copy was to be seen.
    unseen: Option<Duration>,
}

impl Copied {
    /// The same, with nothing of the copy to be seen for so long: there are no object maps, or Cinder copies by way of its
    /// own host to an image of another name.
    pub(super) fn unseen(self, since: Duration) -> Self {
        Self { unseen: Some(since), ..self }
    }
}

impl fmt::Display for Copied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(there) = self.there {
            write!(f, ", {} copied", ByteSize::b(there).display().iec())?;
        }
        if let Some(left) = self.left {
            write!(f, ", {} where it was", ByteSize::b(left).display().iec())?;
        }
        let Some(since) = self.unseen else { return Ok(()) };
        write!(f, ", for {} s without a sight of its copy", since.as_secs())
    }
}

pub(super) async fn copied(volume: &CloudVolume, to: Side) -> Result<Copied, ImageError> {
    let bytes = async |side| match open(volume, side).await? {
        None => Ok(None),
        Some(image) => image.relations().await.map(|relations| relations.own_bytes),
    };
    // An image that goes while it is looked at is no failure.
    let bytes = async |side| match bytes(side).await {
        Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
        found => found,
    };
    let (there, left) = futures::try_join!(bytes(to), bytes(to.other()))?;
    Ok(Copied { there, left, unseen: None })
}
