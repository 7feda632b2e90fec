//! The digests that are kept of a target's blocks, so that a cycle needs not read the target to know what differs.
//!
//! One BLAKE3 digest (32 bytes) for each [`COMPARE_BLOCK`] of the target's *own* content. 1 TiB has 512 MiB of them;
//! they are read and written a request at a time and never held in memory.
//!
//! ```text
//! 0     magic "PSDIGEST" · version u32 · block size u32 · generation u64 · image size u64 · CRC-32 of these 32 bytes
//! 4096  the digest of block 0, of block 1, …; all zeroes where none is known; the same beyond the end of the file
//! ```
//! (All numbers are little-endian.)
//!
//! # When they may be believed
//!
//! A digest that is wrong in any random way only causes a block to be written that needed not be. A *stale* one, of
//! what a block held earlier, is the danger: it would let a changed block pass as equal. So the digests of an earlier
//! process are used only if the sidecar declares a snapshot, that declaration names their generation, and the file
//! still looks as it did then; and they were synced before that was declared. As the declaration is withdrawn, or
//! marked as not holding any more, before the first write after it, digests that a crash left in whatever mixture of
//! old and new are never taken up again: [`Digests::create`] begins a new generation, with nothing in it.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use super::raw;
use super::sidecar::{SidePaths, remove_if_there};
use crate::extent::ByteRange;
use crate::image::COMPARE_BLOCK;

const MAGIC: [u8; 8] = *b"PSDIGEST";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 36;
/// A page for the header, so that no entry crosses a page.
const ENTRIES_AT: u64 = 4096;

/// A BLAKE3 digest, or [`UNKNOWN`].
pub(super) type Digest = [u8; 32];
const DIGEST_BYTES: u64 = 32;

/// Nothing is known of the block. (That a block should have this digest is as likely as any other collision, and
/// would only cost a read.)
pub(super) const UNKNOWN: Digest = [0; 32];

/// The file of digests, open.
#[derive(Debug)]
pub(super) struct Digests {
    file: File,
    generation: u64,
    /// Set at the first failure: from then on nothing is known, and the next declaration names no digests.
    broken: AtomicBool,
}

impl Digests {
    /// The digests of `generation`, if the file is there, whole, and for an image of `image_size`. Any doubt is `None`.
    pub(super) fn open(paths: &SidePaths, generation: u64, image_size: u64) -> Option<Self> {
        // A link is not followed: it could lead to a file of somebody else's.
        let no_link = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
        let file = OpenOptions::new().read(true).write(true).custom_flags(no_link).open(&paths.digests).ok()?;
        let mut header = [0; HEADER_BYTES];
        let read = raw::read_up_to(&file, &mut header, 0).ok()?;
        (read == HEADER_BYTES && header == encode_header(generation, image_size)).then_some(Self {
            file,
            generation,
            broken: AtomicBool::new(false),
        })
    }

    /// Begins a new generation for an image of `image_size`, with nothing known.
    pub(super) fn create(paths: &SidePaths, image_size: u64) -> io::Result<Self> {
        remove_if_there(&paths.digests)?;
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(paths.mode | 0o600).open(&paths.digests)?;
        let digests = Self { file, generation: fastrand::u64(1..), broken: AtomicBool::new(false) };
        digests.file.write_all_at(&encode_header(digests.generation, image_size), 0)?;
        Ok(digests)
    }

    /// The digests of `blocks`. Blocks whose digests can't be read are unknown.
    pub(super) fn read(&self, blocks: Range<u64>) -> Vec<Digest> {
        let mut bytes = vec![0; (blocks.end - blocks.start) as usize * DIGEST_BYTES as usize];
        if self.is_broken() || raw::read_up_to(&self.file, &mut bytes, entry(blocks.start)).is_err() {
            self.give_up();
            bytes.fill(0);
        }
        bytes.as_chunks::<32>().0.to_vec()
    }

    /// Keeps the digests of the blocks from `first` on.
    pub(super) fn write(&self, first: u64, digests: &[Digest]) {
        if !self.is_broken() && self.file.write_all_at(digests.as_flattened(), entry(first)).is_err() {
            self.give_up();
        }
    }

    /// Makes `blocks`, of which there may be very many, unknown.
    pub(super) fn forget(&self, blocks: Range<u64>) {
        let known = self.file.metadata().map(|metadata| metadata.len());
        let forgotten = known.and_then(|length| {
            let range = ByteRange::between(entry(blocks.start), entry(blocks.end)).and_then(|range| range.clip(length));
            range.map_or(Ok(()), |range| raw::write_zeroes(&self.file, range))
        });
        if forgotten.is_err() {
            self.give_up();
        }
    }

    /// Follows a change of the image's size. The last block of the smaller size is unknown then, because it has
    /// another length now.
    pub(super) fn resize(&self, old: u64, new: u64) {
        let whole = old.min(new) / COMPARE_BLOCK;
        let resized = self
            .file
            .metadata()
            .and_then(|metadata| self.file.set_len(metadata.len().min(entry(whole))))
            .and_then(|()| self.file.write_all_at(&encode_header(self.generation, new), 0));
        if resized.is_err() {
            self.give_up();
        }
    }

    /// Makes everything durable. The generation to declare, or `None` if these digests are not to be believed.
    pub(super) fn sync(&self) -> Option<u64> {
        if !self.is_broken() && self.file.sync_all().is_err() {
            self.give_up();
        }
        (!self.is_broken()).then_some(self.generation)
    }

    /// Whether nothing is known any more.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Stops believing these digests, in this process and in later ones: an entry that could not be written may be
    /// stale.
    fn give_up(&self) {
        if !self.broken.swap(true, Ordering::AcqRel) {
            tracing::warn!("the kept digests can't be read or written: blocks are compared by reading the target");
        }
    }
}

/// Where the digest of a block stands. Files have less than 2^63 bytes, so that this can't overflow.
fn entry(block: u64) -> u64 {
    ENTRIES_AT + block * DIGEST_BYTES
}

fn encode_header(generation: u64, image_size: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(COMPARE_BLOCK as u32).to_le_bytes());
    header[16..24].copy_from_slice(&generation.to_le_bytes());
    header[24..32].copy_from_slice(&image_size.to_le_bytes());
    let crc32 = crc32fast::hash(&header[..32]);
    header[32..].copy_from_slice(&crc32.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn paths(folder: &tempfile::TempDir) -> SidePaths {
        SidePaths::beside(&folder.path().join("disk"), 0o644)
    }

    #[test]
    fn the_header_is_what_it_was() {
        let header = encode_header(0x1122, 96 * MIB);
        assert_eq!(hex::encode(header), "50534449474553540100000000000100221100000000000000000006000000006b20211d");
    }

    #[test]
    fn only_the_right_generation_of_the_right_size_is_taken_up() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(&folder);
        let made = Digests::create(&paths, MIB).unwrap();
        made.write(3, &[[7; 32], [8; 32]]);
        let generation = made.sync().unwrap();
        let again = Digests::open(&paths, generation, MIB).unwrap();
        assert_eq!(again.read(2..6), [UNKNOWN, [7; 32], [8; 32], UNKNOWN]);
        assert!(Digests::open(&paths, generation + 1, MIB).is_none());
        assert!(Digests::open(&paths, generation, MIB + 1).is_none());
        let whole = std::fs::read(&paths.digests).unwrap();
        for end in 0..HEADER_BYTES {
            std::fs::write(&paths.digests, &whole[..end]).unwrap();
            assert!(Digests::open(&paths, generation, MIB).is_none(), "cut at {end}");
        }
        for at in 0..HEADER_BYTES {
            let mut bad = whole.clone();
            bad[at] ^= 0x10;
            std::fs::write(&paths.digests, &bad).unwrap();
            assert!(Digests::open(&paths, generation, MIB).is_none(), "flipped at {at}");
        }
        // Entries that were cut off are unknown, not an error.
        std::fs::write(&paths.digests, &whole[..4096 + 3 * 32 + 5]).unwrap();
        let cut = Digests::open(&paths, generation, MIB).unwrap();
        assert_eq!(cut.read(2..6)[..1], [UNKNOWN]);
        assert_eq!(cut.read(4..6), [UNKNOWN; 2]);
    }

    #[test]
    fn sizes_and_forgetting() {
        let folder = tempfile::tempdir().unwrap();
        let digests = Digests::create(&paths(&folder), 4 * COMPARE_BLOCK).unwrap();
        digests.write(0, &[[1; 32]; 4]);
        digests.resize(4 * COMPARE_BLOCK, 2 * COMPARE_BLOCK + 1);
        digests.resize(2 * COMPARE_BLOCK + 1, 9 * COMPARE_BLOCK);
        assert_eq!(digests.read(0..9), [&[[1; 32]; 2][..], &[UNKNOWN; 7]].concat());
        digests.write(0, &[[1; 32]; 9]);
        digests.forget(1..3);
        digests.forget(8..1 << 40);
        assert_eq!(digests.read(0..4), [[1; 32], UNKNOWN, UNKNOWN, [1; 32]]);
        assert_eq!(digests.read(7..9), [[1; 32], UNKNOWN]);
        assert!(digests.sync().is_some());
    }
}
