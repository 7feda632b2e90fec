//! Reading a file.

use async_trait::async_trait;
use bytes::Bytes;

use super::open::{Kind, Role};
use super::state::Shared;
use super::token::Token;
use super::{FileImage, REQUEST_BYTES_MAX, raw};
use crate::extent::{ByteRange, Extent};
use crate::image::{ChangedObjects, ErrorKind, ImageError, Point, Result, Snapshot, View};

/// HEAD, a source's label, or the snapshot that is declared on a target.
#[derive(Debug)]
pub(super) struct FileView {
    image: FileImage,
    point: Point,
    size: u64,
    /// A declared snapshot: how the file looks for as long as it is that.
    token: Option<Token>,
}

impl FileView {
    /// Blocks.
    pub(super) fn open(image: FileImage, point: Point) -> Result<Self> {
        let shared = &image.shared;
        let (size, token) = match &point {
            Point::Head => (shared.size()?, None),
            Point::Snapshot(label) if label.id == 0 && shared.opened.role == Role::Source => {
                let size = shared.size()?;
                if size != label.size {
                    let detail = format!("the file had {} bytes then, and has {size} now", label.size);
                    return Err(gone(shared, &point, detail).hint("Run the cycle again."));
                }
                (size, None)
            }
            Point::Snapshot(snapshot) => match shared.standing(snapshot)? {
                Ok(token) => (snapshot.size.min(shared.size()?), Some(token)),
                Err(reason) => {
                    let hint = "A file keeps only its last snapshot, and only until it is written.";
                    return Err(gone(shared, &point, reason).hint(hint));
                }
            },
        };
        Ok(Self { image, point, size, token })
    }

    fn unsupported(&self, since: &Snapshot) -> ImageError {
        let operation = format!("tell what changed since {since}");
        let error = self.image.shared.error(ErrorKind::Unsupported, &operation);
        error.detail("a file keeps no snapshots to compare with").hint("Compare it with the target's digests.")
    }

    fn check(&self, range: ByteRange, operation: &str) -> Result<()> {
        if range.end() <= self.size && range.length() <= REQUEST_BYTES_MAX {
            return Ok(());
        }
        let detail = format!("the image ends at {}, and the most at once is {REQUEST_BYTES_MAX} bytes", self.size);
        Err(self.image.shared.error(ErrorKind::OutOfBounds, operation).detail(detail))
    }
}

fn gone(shared: &Shared, point: &Point, detail: String) -> ImageError {
    shared.error(ErrorKind::NotFound, &format!("open the snapshot {point}")).detail(detail)
}

fn read(shared: &Shared, range: ByteRange, token: Option<Token>, point: &Point) -> Result<Bytes> {
    let operation = format!("read {} bytes at {}", range.length(), range.offset());
    let bytes = raw::read_exact(&shared.opened.file, range).map_err(|error| {
        if error.kind() != std::io::ErrorKind::UnexpectedEof {
            return shared.io_error(error, &operation);
        }
        let now = raw::size(&shared.opened.file).map_or("?".into(), |size| size.to_string());
        let detail = format!("the file was shortened while it was read: it ends at {now} now");
        shared.error(ErrorKind::OutOfBounds, &operation).detail(detail).hint("Run the cycle again.")
    })?;
    // What was read is the snapshot only if nobody wrote until after the read. A device has nothing to look at.
    if let Some(then) = token.filter(|_| shared.opened.kind == Kind::Regular) {
        let now = Token::of(&shared.opened.file).map_err(|error| shared.io_error(error, &operation))?;
        if now != then {
            return Err(gone(shared, point, "it was written while it was read".into()));
        }
    }
    Ok(bytes.into())
}

#[async_trait]
impl View for FileView {
    fn point(&self) -> &Point {
        &self.point
    }

    fn size(&self) -> u64 {
        self.size
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes> {
        self.check(range, &format!("read {} bytes at {}", range.length(), range.offset()))?;
        let (token, point) = (self.token.clone(), self.point.clone());
        self.image.run(move |shared| read(shared, range, token, &point)).await
    }

    /// One run, the whole image: where the holes are is asked in the second level.
    async fn changed_objects(&self, since: Option<&Snapshot>) -> Result<ChangedObjects> {
        Ok(match since {
            None => ChangedObjects::Runs(ByteRange::between(0, self.size).into_iter().collect()),
            Some(since) => {
                let reason =
                    format!("{} is a file, which keeps no snapshot {since}", self.image.shared.opened.location);
                ChangedObjects::Unavailable { reason, cure: None }
            }
        })
    }

    async fn diff(&self, since: Option<&Snapshot>, within: ByteRange) -> Result<Vec<Extent>> {
        if let Some(since) = since {
            return Err(self.unsupported(since));
        }
        let Some(within) = within.clip(self.size) else { return Ok(Vec::new()) };
        let look = move |shared: &std::sync::Arc<Shared>| {
            raw::data_ranges(&shared.opened.file, within).map_err(|e| shared.io_error(e, "look for holes"))
        };
        let data = self.image.run(look).await?.unwrap_or_else(|| vec![within]);
        Ok(data.into_iter().map(Extent::data).collect())
    }
}
