//! Changing and comparing a target's content, and keeping its digests with it.
//!
//! Every function here holds the blocks that it works on (see [`super::ranges`]) from before its first access to the
//! content until the digests agree with it again.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;

use rayon::prelude::*;

use super::digests::{Digest, UNKNOWN};
use super::open::Kind;
use super::state::{Change, Shared};
use super::{REQUEST_BYTES_MAX, raw};
use crate::extent::{ByteRange, normalize};
use crate::image::{COMPARE_BLOCK, ErrorKind, Result};

/// Up to how many blocks of zeroes get their digests at once (64 MiB, 32 KiB of digests). Of more the digests are
/// dropped instead: zeroing a terabyte of holes should not write half a gigabyte beside it.
const ZERO_BLOCKS_MAX: u64 = 1024;

/// How much of the target is read at once where its digests are not known: 4 MiB.
const COMPARE_READ_BLOCKS: usize = (4 << 20) / COMPARE_BLOCK as usize;

static ZERO_DIGEST: LazyLock<Digest> = LazyLock::new(|| *blake3::hash(&[0; COMPARE_BLOCK as usize]).as_bytes());

impl Shared {
    /// [`ErrorKind::OutOfBounds`] unless `range` lies within HEAD. The size of HEAD.
    fn check_bounds(&self, range: ByteRange, most: u64, operation: &str) -> Result<u64> {
        let size = self.size()?;
        if range.end() > size || range.length() > most {
            let detail = match range.end() > size {
                true => format!("the image ends at {size}"),
                false => format!("the most at once is {most} bytes"),
            };
            return Err(self.error(ErrorKind::OutOfBounds, operation).detail(detail));
        }
        Ok(size)
    }

    pub(super) fn write(&self, range: ByteRange, data: &[u8]) -> Result<()> {
        let operation = format!("write {} bytes at {}", range.length(), range.offset());
        let blocks = touched(range);
        let _held = self.ranges.hold(blocks.start, blocks.end);
        let size = self.check_bounds(range, REQUEST_BYTES_MAX, &operation)?;
        let change = self.begin_change(&operation)?;
        let known: Option<Vec<Digest>> = change.digests.as_ref().map(|_| {
            let digest = |block| match covered(range, block, size) {
                Some(part) => *blake3::hash(slice(data, range, part)).as_bytes(),
                None => UNKNOWN,
            };
            blocks.clone().into_par_iter().map(digest).collect()
        });
        let written = change.file(self).write_all_at(data, range.offset());
        if let (Some(digests), Some(known)) = (&change.digests, known) {
            match written {
                Ok(()) => digests.write(blocks.start, &known),
                // A part may have been written.
                Err(_) => digests.forget(blocks),
            }
        }
        written.map_err(|error| self.io_error(error, &operation))
    }

    pub(super) fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        let operation = format!("write {} zeroes at {}", range.length(), range.offset());
        let blocks = touched(range);
        let _held = self.ranges.hold(blocks.start, blocks.end);
        let size = self.check_bounds(range, u64::MAX, &operation)?;
        let change = self.begin_change(&operation)?;
        let zeroed = raw::write_zeroes(change.file(self), range);
        if let Some(digests) = &change.digests {
            if zeroed.is_ok() && blocks.end - blocks.start <= ZERO_BLOCKS_MAX {
                digests.write(blocks.start, &zero_digests(range, blocks, size));
            } else {
                digests.forget(blocks);
            }
        }
        zeroed.map_err(|error| self.io_error(error, &operation))
    }

    pub(super) fn resize(&self, size: u64) -> Result<()> {
        let operation = format!("resize it to {size} bytes");
        let _held = self.ranges.hold(0, u64::MAX);
        let old = self.size()?;
        // Nothing changes, so that what is declared goes on standing.
        if old == size {
            return Ok(());
        }
        let change = self.begin_change(&operation)?;
        match self.opened.kind {
            Kind::Regular => {
                self.opened.file.set_len(size).map_err(|error| self.io_error(error, &operation))?;
                follow(&change, old, size);
                self.sync(File::sync_all, &operation)
            }
            Kind::Device => self.resize_device(&change, old, size, &operation),
        }
    }

    /// A device stays as large as it is; the sidecar keeps how much of it is the image.
    fn resize_device(&self, change: &Change, old: u64, size: u64, operation: &str) -> Result<()> {
        let whole = raw::size(&self.opened.file).map_err(|error| self.io_error(error, operation))?;
        if size > whole {
            let error = self.error(ErrorKind::NoSpace, operation).detail(format!("the device has {whole} bytes"));
            return Err(error.hint("Take a larger device, or grow this one."));
        }
        follow(change, old, size);
        // The contract: new bytes read as zeroes. Whatever is there is left of other times.
        if let Some(grown) = ByteRange::between(old, size) {
            raw::write_zeroes(change.file(self), grown).map_err(|error| self.io_error(error, operation))?;
            self.sync(File::sync_all, operation)?;
        }
        if size < whole {
            tracing::info!("{}: the first {size} of {whole} bytes are used", self.opened.location);
        }
        self.change_sidecar(operation, |sidecar| sidecar.device_size = Some(size))
    }

    /// The blocks of `range` in which HEAD isn't `data`: by their kept digests, and where there are none by reading
    /// HEAD, whose digest is known then.
    pub(super) fn differing_blocks(&self, range: ByteRange, data: &[u8]) -> Result<Vec<ByteRange>> {
        let operation = format!("compare {} bytes at {}", range.length(), range.offset());
        let blocks = touched(range);
        let _held = self.ranges.hold(blocks.start, blocks.end);
        let size = self.check_bounds(range, REQUEST_BYTES_MAX, &operation)?;
        if blocks.clone().any(|block| covered(range, block, size).is_none()) {
            let error = self.error(ErrorKind::OutOfBounds, &operation);
            return Err(error.detail(format!("it is no multiple of {COMPARE_BLOCK} bytes")));
        }
        let digests = self.digests();
        let count = (blocks.end - blocks.start) as usize;
        let kept = digests.as_ref().map_or_else(|| vec![UNKNOWN; count], |digests| digests.read(blocks.clone()));
        let equal = self.equal_where_unknown(range, data, &kept).map_err(|error| self.io_error(error, &operation))?;
        // A block that is known, or was found equal and is to be known, needs its digest; the others don't.
        let judge = |(index, part): (usize, &[u8])| {
            let is_known = kept[index] != UNKNOWN;
            let digest = match is_known || (equal[index] && digests.is_some()) {
                true => *blake3::hash(part).as_bytes(),
                false => UNKNOWN,
            };
            (if is_known { digest == kept[index] } else { equal[index] }, digest)
        };
        let judged: Vec<(bool, Digest)> = data.par_chunks(COMPARE_BLOCK as usize).enumerate().map(judge).collect();
        if let Some(digests) = digests.filter(|_| equal.contains(&true)) {
            let known = |(index, &(same, digest))| if same { digest } else { kept[index] };
            let known: Vec<Digest> = judged.iter().enumerate().map(known).collect();
            digests.write(blocks.start, &known);
        }
        let differing = blocks.zip(&judged).filter(|(_, (same, _))| !same);
        Ok(normalize(differing.filter_map(|(block, _)| covered(range, block, size)).collect()))
    }

    /// For each block whether it was read and found equal; false for those whose digest is known.
    fn equal_where_unknown(&self, range: ByteRange, data: &[u8], kept: &[Digest]) -> io::Result<Vec<bool>> {
        let mut equal = vec![false; kept.len()];
        let mut index = 0;
        while index < kept.len() {
            let run = kept[index..].iter().take(COMPARE_READ_BLOCKS).take_while(|digest| **digest == UNKNOWN).count();
            if run == 0 {
                index += 1;
                continue;
            }
            let (start, end) = (index as u64 * COMPARE_BLOCK, (index + run) as u64 * COMPARE_BLOCK);
            let part = ByteRange::between(range.offset() + start, range.end().min(range.offset() + end));
            if let Some(part) = part {
                let there = raw::read_exact(&self.opened.file, part)?;
                let blocks = there.chunks(COMPARE_BLOCK as usize);
                let wanted = slice(data, range, part).chunks(COMPARE_BLOCK as usize);
                for (equal, (there, wanted)) in equal[index..].iter_mut().zip(blocks.zip(wanted)) {
                    *equal = there == wanted;
                }
            }
            index += run;
        }
        Ok(equal)
    }
}

fn follow(change: &Change, old: u64, new: u64) {
    if let Some(digests) = &change.digests {
        digests.resize(old, new);
    }
}

/// The blocks that have a byte in `range`.
fn touched(range: ByteRange) -> Range<u64> {
    range.offset() / COMPARE_BLOCK..range.end().div_ceil(COMPARE_BLOCK)
}

/// The bytes of `block`, if `range` has all of them; the last one of an image of `size` bytes ends there.
fn covered(range: ByteRange, block: u64, size: u64) -> Option<ByteRange> {
    let start = block.checked_mul(COMPARE_BLOCK)?;
    let bytes = ByteRange::between(start, start.checked_add(COMPARE_BLOCK)?.min(size))?;
    (range.intersect(bytes)? == bytes).then_some(bytes)
}

/// The bytes of `part`, which lies within `range`, whose bytes are `data`.
fn slice(data: &[u8], range: ByteRange, part: ByteRange) -> &[u8] {
    &data[(part.offset() - range.offset()) as usize..(part.end() - range.offset()) as usize]
}

fn zero_digests(range: ByteRange, blocks: Range<u64>, size: u64) -> Vec<Digest> {
    let digest = |block| match covered(range, block, size) {
        Some(part) if part.length() == COMPARE_BLOCK => *ZERO_DIGEST,
        Some(part) => *blake3::hash(&vec![0; part.length() as usize]).as_bytes(),
        None => UNKNOWN,
    };
    blocks.map(digest).collect()
}
