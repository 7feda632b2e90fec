//! One point in time of an RBD image, through a read-only handle of its own.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::io::Errno;

use super::changes::Compared;
use super::{Inner, Transfer, changes};
use crate::ceph::{CephError, Image, OpenMode, SnapInfo};
use crate::extent::{ByteRange, Extent};
use crate::image::{ChangedObjects, ErrorKind, ImageError, Point, Result, Snapshot, View};

/// The most that one request may read or write: 32 MiB.
pub(super) const REQUEST_MAX: u64 = 32 << 20;

/// A snapshot of an RBD image, or HEAD as it is.
#[derive(Debug)]
pub(super) struct RbdView {
    inner: Arc<Inner>,
    image: Arc<Image>,
    point: Point,
    size: u64,
    /// The snapshots that there were when the view was opened; all that it can be compared with.
    snapshots: Vec<SnapInfo>,
}

impl RbdView {
    pub(super) async fn open(inner: &Arc<Inner>, point: &Point) -> Result<Self> {
        let (opened, wanted) = (Arc::clone(inner), point.clone());
        let operation = format!("open {point}");
        let open = move || {
            let mut image = Image::open_by_id(&opened.pool, &opened.id, OpenMode::ReadOnly)?;
            let snapshots = image.snapshots()?;
            if let Point::Snapshot(snapshot) = &wanted {
                changes::check_snapshot(&snapshots, snapshot)?;
                image.set_snapshot(Some(snapshot.id))?;
            }
            let size = image.size()?;
            Ok((image, size, snapshots))
        };
        match inner.call(operation.clone(), "rbd_open_by_id_read_only", open).await {
            Ok((image, size, snapshots)) => {
                Ok(Self { inner: Arc::clone(inner), image: Arc::new(image), point: point.clone(), size, snapshots })
            }
            Err(error) => Err(explain_missing(error, point_snapshot(point))),
        }
    }

    /// Where `since` can't be compared with this point, why not; true if both are the same.
    fn check_since(&self, since: Option<&Snapshot>, operation: &str) -> Result<bool> {
        let Some(since) = since else { return Ok(false) };
        if let Err(error) = changes::check_snapshot(&self.snapshots, since) {
            return Err(explain_missing(self.inner.fail(operation, error), Some(since)));
        }
        match &self.point {
            Point::Snapshot(point) if point.id == since.id => Ok(true),
            Point::Snapshot(point) if point.id < since.id => {
                let wrong = ImageError::new(ErrorKind::Unsupported, self.inner.location.clone(), operation);
                Err(wrong.detail(format!("snapshot {since} is younger than {point}")))
            }
            _ => Ok(false),
        }
    }

    /// The first level of a delta.
    pub(super) async fn compare(&self, since: Option<&Snapshot>) -> Result<Compared> {
        let operation = format!("compare the object maps up to {}", self.point);
        if self.check_since(since, &operation)? {
            return Ok(Compared::Runs { changed: Vec::new(), doubtful: Vec::new() });
        }
        let (inner, point, since, size) = (Arc::clone(&self.inner), self.point.clone(), since.cloned(), self.size);
        let gone = since.clone();
        let compare = move || changes::compare(&inner, &point, since.as_ref(), size);
        let compared = self.inner.call(operation, "rbd_diff_iterate2", compare).await;
        compared.map_err(|error| explain_missing(error, gone.as_ref()))
    }
}

fn point_snapshot(point: &Point) -> Option<&Snapshot> {
    match point {
        Point::Head => None,
        Point::Snapshot(snapshot) => Some(snapshot),
    }
}

/// Adds which snapshot it is that isn't there.
pub(super) fn explain_missing(error: ImageError, snapshot: Option<&Snapshot>) -> ImageError {
    match snapshot {
        Some(snapshot) if error.kind == ErrorKind::NotFound => {
            error.detail(format!("there is no snapshot {snapshot}, or it has another id now"))
        }
        _ => error,
    }
}

/// Refuses a request beyond the end, or one too large.
pub(super) fn check_bounds(inner: &Inner, size: u64, range: ByteRange, most: u64, operation: &str) -> Result<()> {
    let detail = if range.length() > most {
        format!("{} bytes at once; the most is {most}", range.length())
    } else if range.end() > size {
        format!("it ends at {}, the image at {size}", range.end())
    } else {
        return Ok(());
    };
    let operation = format!("{operation} {} bytes at {}", range.length(), range.offset());
    Err(ImageError::new(ErrorKind::OutOfBounds, inner.location.clone(), operation).detail(detail))
}

#[async_trait]
impl View for RbdView {
    fn point(&self) -> &Point {
        &self.point
    }

    fn size(&self) -> u64 {
        self.size
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes> {
        check_bounds(&self.inner, self.size, range, REQUEST_MAX, "read")?;
        // The check above bounds the length by 32 MiB.
        let read = self.image.read(range.offset(), range.length() as usize, self.inner.timeout()).await;
        match read {
            Ok(bytes) => Ok(Bytes::from(bytes)),
            Err(error) => {
                let operation = format!("read {} bytes at {} of {}", range.length(), range.offset(), self.point);
                Err(self.inner.explain_slow(self.inner.fail(operation, error), Transfer::Read).await)
            }
        }
    }

    async fn changed_objects(&self, since: Option<&Snapshot>) -> Result<ChangedObjects> {
        self.compare(since).await.map(ChangedObjects::from)
    }

    async fn diff(&self, since: Option<&Snapshot>, within: ByteRange) -> Result<Vec<Extent>> {
        let operation = format!("compare {within} of {}", self.point);
        if self.check_since(since, &operation)? {
            return Ok(Vec::new());
        }
        let mut extents = Vec::new();
        for window in changes::windows(self.inner.layout, within, self.size) {
            let (image, since) = (Arc::clone(&self.image), since.cloned());
            let look = move || changes::exact(&image, since.as_ref(), window);
            extents.extend(self.inner.call(operation.clone(), "rbd_diff_iterate2", look).await?);
        }
        Ok(changes::tidy(extents, within, self.size))
    }
}

/// The error of a call that librbd answered with ENOENT for a snapshot.
pub(super) fn no_entry(function: &'static str) -> CephError {
    CephError::Call { function, errno: Errno::NOENT.raw_os_error() }
}
