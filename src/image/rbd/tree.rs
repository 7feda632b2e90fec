//! The tree of clones that grows from an image's snapshots.

use futures::future::{BoxFuture, FutureExt, try_join_all};
use tokio::sync::Semaphore;

use super::RbdImage;
use super::relations::{RbdLink, RbdParentLink, RbdRelations, RbdSnapshot};
use crate::image::{ErrorKind, ImageError, Result};

/// How deep a tree or a chain of parents may be. librbd itself gets slow well before.
pub const TREE_DEPTH_MAX: usize = 64;
/// How many images are looked at side by side.
const LOOKS: usize = 8;

/// An image with its snapshots, and the clones of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageTree {
    /// The image.
    pub image: RbdLink,
    /// What it is bound to.
    pub relations: RbdRelations,
    /// Its snapshots, by ascending id.
    pub snapshots: Vec<SnapshotTree>,
}

/// A snapshot with the trees of its clones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotTree {
    /// The snapshot.
    pub snapshot: RbdSnapshot,
    /// Its clones.
    pub clones: Vec<ImageTree>,
}

impl ImageTree {
    /// Every clone below, those that are deepest first: each after all that were made of it.
    pub fn clones_deepest_first(&self) -> Vec<&ImageTree> {
        let mut all = Vec::new();
        for clone in self.snapshots.iter().flat_map(|snapshot| &snapshot.clones) {
            all.extend(clone.clones_deepest_first());
            all.push(clone);
        }
        all
    }
}

impl RbdImage {
    /// The tree of clones below this image. [`ErrorKind::Unsupported`] if it is deeper than [`TREE_DEPTH_MAX`].
    ///
    /// A clone that goes or comes while it looks may be in the tree or not.
    pub async fn tree(&self) -> Result<ImageTree> {
        grow(self, self.link(), 0, &Semaphore::new(LOOKS)).await
    }

    /// The parents, nearest first; empty if this is no clone.
    pub async fn parents(&self) -> Result<Vec<RbdParentLink>> {
        let mut chain = Vec::new();
        let mut next = self.relations().await?.parent;
        while let Some(parent) = next {
            if chain.len() >= TREE_DEPTH_MAX {
                return Err(too_deep(self));
            }
            next = self.open_linked(&parent.image).await?.relations().await?.parent;
            chain.push(parent);
        }
        Ok(chain)
    }
}

fn too_deep(image: &RbdImage) -> ImageError {
    ImageError::new(ErrorKind::Unsupported, image.inner.location.clone(), "follow its clones")
        .detail(format!("clones of clones go more than {TREE_DEPTH_MAX} deep"))
}

fn grow<'a>(
    image: &'a RbdImage,
    link: RbdLink,
    depth: usize,
    looks: &'a Semaphore,
) -> BoxFuture<'a, Result<ImageTree>> {
    async move {
        if depth > TREE_DEPTH_MAX {
            return Err(too_deep(image));
        }
        let relations = {
            // The semaphore is never closed; without a permit the look would only be less polite.
            let _turn = looks.acquire().await.ok();
            image.relations().await?
        };
        let snapshots = relations.snapshots.iter().map(|snapshot| async {
            let clones = try_join_all(snapshot.clones.iter().map(|clone| sprout(image, clone, depth, looks))).await?;
            Ok(SnapshotTree { snapshot: snapshot.clone(), clones: clones.into_iter().flatten().collect() })
        });
        let snapshots = try_join_all(snapshots).await?;
        Ok(ImageTree { image: link, relations, snapshots })
    }
    .boxed()
}

/// The tree of one clone; `None` if it went meanwhile.
async fn sprout(parent: &RbdImage, link: &RbdLink, depth: usize, looks: &Semaphore) -> Result<Option<ImageTree>> {
    let opened = {
        let _turn = looks.acquire().await.ok();
        parent.open_linked(link).await
    };
    match opened {
        Ok(clone) => grow(&clone, link.clone(), depth + 1, looks).await.map(Some),
        Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
