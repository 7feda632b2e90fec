//! One point in time of an image in memory.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::MemoryImage;
use super::content::Content;
use crate::extent::{ByteRange, Extent, normalize_extents};
use crate::image::{ChangedObjects, ErrorKind, Point, Result, Snapshot, View};

/// A point in time of a [`MemoryImage`].
pub(super) struct MemoryView {
    pub(super) image: MemoryImage,
    pub(super) point: Point,
    pub(super) frozen: Option<Arc<Content>>,
    pub(super) size: u64,
}

impl MemoryView {
    /// Runs `look` over the content, and that of `since`.
    fn with<T>(
        &self,
        operation: &str,
        since: Option<&Snapshot>,
        look: impl FnOnce(&Content, Option<&Content>) -> T,
    ) -> Result<T> {
        let inner = self.image.alive(operation)?;
        let earlier = match since {
            None => None,
            Some(since) => {
                let found = inner.snapshots.iter().find(|(have, _)| have.id == since.id);
                let missing = || self.image.error(ErrorKind::NotFound, format!("{operation} since snapshot {since}"));
                Some(found.ok_or_else(missing)?.1.clone())
            }
        };
        Ok(look(self.frozen.as_deref().unwrap_or(&inner.head), earlier.as_deref()))
    }
}

#[async_trait]
impl View for MemoryView {
    fn point(&self) -> &Point {
        &self.point
    }

    fn size(&self) -> u64 {
        self.size
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes> {
        self.image.in_bounds(&format!("read {range}"), range.end(), self.size)?;
        if let Point::Snapshot(snapshot) = &self.point {
            let mut inner = self.image.alive("read")?;
            inner.reads_until_lost = match inner.reads_until_lost {
                Some(0) => {
                    inner.changes += 1;
                    inner.snapshots.retain(|(have, _)| have.id != snapshot.id);
                    None
                }
                reads => reads.map(|reads| reads - 1),
            };
            if !inner.snapshots.iter().any(|(have, _)| have.id == snapshot.id) {
                return Ok(Bytes::from(vec![0; range.length() as usize]));
            }
        }
        self.with("read", None, |content, _| {
            Bytes::copy_from_slice(&content.bytes()[range.offset() as usize..range.end() as usize])
        })
    }

    async fn changed_objects(&self, since: Option<&Snapshot>) -> Result<ChangedObjects> {
        let (fast_diff, layout) = {
            let inner = self.image.alive("compare object maps")?;
            (inner.fast_diff, inner.layout)
        };
        if !fast_diff {
            return Ok(ChangedObjects::Unavailable { reason: "the image has no object map".into(), cure: None });
        }
        let Some(whole) = ByteRange::between(0, self.size) else { return Ok(ChangedObjects::Runs(Vec::new())) };
        let extents = self.diff(since, whole).await?;
        let runs = extents.iter().map(|extent| extent.range.align_outward(layout.period(), self.size)).collect();
        Ok(ChangedObjects::Runs(crate::extent::normalize(runs)))
    }

    async fn diff(&self, since: Option<&Snapshot>, within: ByteRange) -> Result<Vec<Extent>> {
        self.with("compare", since, |content, earlier| normalize_extents(content.diff(earlier, within)))
    }
}
