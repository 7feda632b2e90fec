//! An RBD image as a target.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use rustix::io::Errno;

use super::changes::Compared;
use super::lease::Held;
use super::records::{self, NOTE_KEY, STATE_KEY};
use super::view::{REQUEST_MAX, RbdView, check_bounds};
use super::{Inner, RbdImage, Transfer};
use crate::ceph::{self, CephError, Image, OpenMode};
use crate::extent::{ByteRange, normalize};
use crate::image::{
    COMPARE_BLOCK, ErrorKind, ImageError, LeaseOwner, Point, Result, Snapshot, SourceImage, TargetImage, View,
};

/// The most that a note may have: 1 KiB, as the contract says.
const NOTE_MAX: usize = 1024;
/// The most that the state may have: 64 KiB, as the contract says.
const STATE_MAX: usize = 64 * 1024;
/// The most that one request to librbd zeroes: it makes a request of its own for every object of the range at once.
const ZEROES_MAX: u64 = 256 << 20;
/// How many requests a call that is cut in pieces has under way.
const PIECES_IN_FLIGHT: usize = 4;
/// The piece in which content is compared, and in which zeroes are written where librbd can't zero.
const PIECE: u64 = 4 << 20;
/// How much of an image is compared at once to find whether there is any difference.
const SEARCH_WINDOW: u64 = 16 << 30;

impl RbdImage {
    /// The error of a failed write: a lock that is gone means that somebody has taken the lease over.
    pub(super) fn write_error(&self, operation: String, error: CephError) -> ImageError {
        if error.is(Errno::ROFS) {
            let fenced = ImageError::new(ErrorKind::Fenced, self.inner.location.clone(), operation);
            return fenced.caused_by(error);
        }
        self.inner.fail(operation, error)
    }

    async fn zero_piece(&self, held: &Held, range: ByteRange) -> ceph::Result<()> {
        let limit = self.inner.timeout();
        // A piece has at most 256 MiB.
        match held.image.write_zeroes(range.offset(), range.length() as usize, limit).await {
            Err(error) if error.is(Errno::OPNOTSUPP) => {
                let zeroes = Bytes::from(vec![0; PIECE.min(range.length()) as usize]);
                for part in range.split_at_multiples(PIECE) {
                    held.image.write(part.offset(), zeroes.slice(..part.length() as usize), limit).await?;
                }
                Ok(())
            }
            result => result,
        }
    }

    /// Whether the view differs from `since` anywhere within these runs, by the exact look.
    async fn differs_exactly(&self, view: &RbdView, since: Option<&Snapshot>, runs: Vec<ByteRange>) -> Result<bool> {
        let windows = runs.into_iter().flat_map(|run| run.split_at_multiples(SEARCH_WINDOW));
        let mut looks = stream::iter(windows.map(|window| view.diff(since, window))).buffer_unordered(PIECES_IN_FLIGHT);
        while let Some(found) = looks.try_next().await? {
            if !found.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn differs(&self, view: &RbdView, since: Option<&Snapshot>) -> Result<bool> {
        match view.compare(since).await? {
            // The maps name what is not clean. A client that dies between a snapshot and the cleaning of HEAD's map, which
            // librbd does after it, leaves objects there that nobody has written since.
            Compared::Runs { changed, doubtful } => {
                let runs = normalize(changed.into_iter().chain(doubtful).collect());
                self.differs_exactly(view, since, runs).await
            }
            Compared::Unavailable { .. } => {
                let all = ByteRange::between(0, view.size());
                self.differs_exactly(view, since, all.into_iter().collect()).await
            }
        }
    }

    /// A handle to read HEAD with: the one that writes, or a fresh one.
    async fn head(&self) -> Result<(Arc<Image>, u64)> {
        if let Some(held) = self.held() {
            return Ok((Arc::clone(&held.image), held.size.load(Ordering::Acquire)));
        }
        let inner = Arc::clone(&self.inner);
        let open = move || {
            let image = Image::open_by_id(&inner.pool, &inner.id, OpenMode::ReadOnly)?;
            let size = image.size()?;
            Ok((Arc::new(image), size))
        };
        self.inner.call("open HEAD", "rbd_open_by_id_read_only", open).await
    }
}

/// The blocks of one piece of `data` (which stands at `offset`) in which HEAD holds something else.
async fn compare_piece(
    inner: &Inner,
    head: &Image,
    offset: u64,
    data: &Bytes,
    piece: ByteRange,
) -> Result<Vec<ByteRange>> {
    let read = head.read(piece.offset(), piece.length() as usize, inner.timeout()).await;
    let there =
        read.map_err(|error| inner.fail(format!("read {} bytes at {}", piece.length(), piece.offset()), error))?;
    let start = (piece.offset() - offset) as usize;
    let wanted = &data[start..start + there.len()];
    let block = COMPARE_BLOCK as usize;
    let blocks = there.chunks(block).zip(wanted.chunks(block)).enumerate();
    let differing = blocks.filter(|(_, (there, wanted))| there != wanted).filter_map(|(index, (block, _))| {
        let start = piece.offset() + index as u64 * COMPARE_BLOCK;
        ByteRange::between(start, start + block.len() as u64)
    });
    Ok(differing.collect())
}

#[async_trait]
impl TargetImage for RbdImage {
    async fn acquire_lease(&self, owner: &LeaseOwner) -> Result<()> {
        self.take_lease(owner).await
    }

    async fn lease_owner(&self) -> Result<Option<LeaseOwner>> {
        self.find_lease_owner().await
    }

    async fn release_lease(&self) -> Result<()> {
        self.give_lease_back().await
    }

    async fn load_state(&self) -> Result<Option<String>> {
        self.load_record(STATE_KEY, "read the state").await
    }

    async fn store_state(&self, state: &str) -> Result<()> {
        let held = self.held_for("store the state")?;
        if state.len() > STATE_MAX {
            let large = ImageError::new(ErrorKind::OutOfBounds, self.inner.location.clone(), "store the state");
            return Err(large.detail(format!("it has {} bytes; the most is {STATE_MAX}", state.len())));
        }
        let state = state.to_owned();
        let (id, known) = (self.inner.id.clone(), self.has_records.load(Ordering::Acquire));
        let store = move || {
            let set = |key: &str, value: Option<&str>| held.image.set_metadata(key, value);
            match known {
                true => set(STATE_KEY, Some(&state)),
                false => records::store((&held.image, &id), (STATE_KEY, Some(&state)), set),
            }
        };
        let stored = ceph::blocking("rbd_metadata_set", self.inner.timeout(), store).await;
        stored.map_err(|error| self.write_error("store the state".into(), error))?;
        self.has_records.store(true, Ordering::Release);
        Ok(())
    }

    async fn rate_limits(&self) -> Result<Vec<String>> {
        self.qos_remarks(Transfer::Write).await
    }

    fn keeps_notes(&self) -> bool {
        true
    }

    async fn load_note(&self) -> Result<Option<String>> {
        self.load_record(NOTE_KEY, "read the note").await
    }

    async fn store_note(&self, note: Option<&str>) -> Result<()> {
        self.store_bounded(NOTE_KEY, note, NOTE_MAX, "leave a note with the image").await
    }

    async fn resize(&self, size: u64) -> Result<()> {
        let operation = format!("resize to {size} bytes");
        let held = self.held_for(&operation)?;
        let image = Arc::clone(&held.image);
        let resize = move |steps: &AtomicU64| {
            image.resize(size, steps)?;
            image.size()
        };
        let resized = ceph::blocking_with_progress("rbd_resize2", self.inner.timeout(), Arc::default(), resize).await;
        let now = resized.map_err(|error| self.write_error(operation, error))?;
        held.size.store(now, Ordering::Release);
        Ok(())
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<()> {
        let held = self.held_for("write")?;
        let length = data.len() as u64;
        if length == 0 {
            return Ok(());
        }
        let range = ByteRange::new(offset, length).map_err(|wrong| {
            let refused = ImageError::new(ErrorKind::OutOfBounds, self.inner.location.clone(), "write");
            refused.caused_by(wrong)
        })?;
        check_bounds(&self.inner, held.size.load(Ordering::Acquire), range, REQUEST_MAX, "write")?;
        let written = held.image.write(offset, data, self.inner.timeout()).await;
        match written {
            Ok(()) => Ok(()),
            Err(error) => {
                let error = self.write_error(format!("write {length} bytes at {offset}"), error);
                Err(self.inner.explain_slow(error, Transfer::Write).await)
            }
        }
    }

    async fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        let held = self.held_for("write zeroes")?;
        check_bounds(&self.inner, held.size.load(Ordering::Acquire), range, u64::MAX, "zero")?;
        let period = self.inner.layout.period();
        // Whole periods, so that whole objects are freed.
        let piece = (ZEROES_MAX / period).max(1).saturating_mul(period);
        let pieces = range.split_at_multiples(piece).map(|piece| self.zero_piece(&held, piece));
        let zeroed = stream::iter(pieces).buffer_unordered(PIECES_IN_FLIGHT).try_collect::<()>().await;
        zeroed.map_err(|error| self.write_error(format!("zero {} bytes at {}", range.length(), range.offset()), error))
    }

    async fn flush(&self) -> Result<()> {
        let held = self.held_for("flush")?;
        let flushed = held.image.flush(self.inner.timeout()).await;
        flushed.map_err(|error| self.write_error("flush".into(), error))?;
        // librbd carries out a resize that somebody else asks for, and clips writes beyond the end in silence: what
        // was written since the last look counts only if the size is still what the bounds were checked against.
        let (image, expected) = (Arc::clone(&held.image), held.size.load(Ordering::Acquire));
        let size = self.inner.call("flush", "rbd_get_size", move || image.size()).await?;
        if size != expected {
            let moved = ImageError::new(ErrorKind::OutOfBounds, self.inner.location.clone(), "flush");
            return Err(moved
                .detail(format!("somebody resized the image from {expected} to {size} bytes while it was written"))
                .hint("run again, and keep others from resizing it"));
        }
        Ok(())
    }

    async fn head_differs(&self, snapshot: &Snapshot) -> Result<bool> {
        let view = RbdView::open(&self.inner, &Point::Head).await?;
        Ok(view.size() != snapshot.size || self.differs(&view, Some(snapshot)).await?)
    }

    async fn is_blank(&self) -> Result<bool> {
        let view = RbdView::open(&self.inner, &Point::Head).await?;
        Ok(!self.differs(&view, None).await?)
    }

    async fn differing_blocks(&self, offset: u64, data: &Bytes) -> Result<Vec<ByteRange>> {
        let Ok(range) = ByteRange::new(offset, data.len() as u64) else { return Ok(Vec::new()) };
        let (head, size) = self.head().await?;
        check_bounds(&self.inner, size, range, REQUEST_MAX, "compare")?;
        if !offset.is_multiple_of(COMPARE_BLOCK)
            || (!range.length().is_multiple_of(COMPARE_BLOCK) && range.end() != size)
        {
            let odd = ImageError::new(ErrorKind::OutOfBounds, self.location(), format!("compare {range}"));
            return Err(odd.detail(format!("it is not made of whole blocks of {COMPARE_BLOCK} bytes")));
        }
        let pieces = range.split_at_multiples(PIECE);
        let compared = pieces.map(|piece| compare_piece(&self.inner, &head, offset, data, piece));
        let found: Vec<Vec<ByteRange>> =
            stream::iter(compared).buffer_unordered(PIECES_IN_FLIGHT).try_collect().await?;
        Ok(normalize(found.into_iter().flatten().collect()))
    }
}
