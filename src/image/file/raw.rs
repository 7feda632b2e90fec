//! Positioned I/O on an open file: exact, restarted after signals, in bounded pieces. Everything here blocks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::extent::ByteRange;

/// What one write of zeroes covers where neither holes nor zeroed ranges can be asked for: 1 MiB.
static ZEROES: [u8; 1 << 20] = [0; 1 << 20];

/// Reads exactly `range`. [`io::ErrorKind::UnexpectedEof`] if the file ends before.
pub(super) fn read_exact(file: &File, range: ByteRange) -> io::Result<Vec<u8>> {
    let length = usize::try_from(range.length()).map_err(io::Error::other)?;
    let mut buffer: Vec<u8> = Vec::with_capacity(length);
    while buffer.len() < length {
        let at = range.offset() + buffer.len() as u64;
        match rustix::io::pread(file, rustix::buffer::spare_capacity(&mut buffer), at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    // The allocator may have given more than was asked for, and the last read then filled that too.
    buffer.truncate(length);
    Ok(buffer)
}

/// Reads from `offset` as much as there is, up to the end of `buffer`; says how much that was.
pub(super) fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Makes `range` read as zeroes without changing the file's size: a hole where there can be one, a zeroed range where
/// not, written zeroes where neither.
pub(super) fn write_zeroes(file: &File, range: ByteRange) -> io::Result<()> {
    for mode in [FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, FallocateFlags::ZERO_RANGE] {
        // The range lies within the file, so that ZERO_RANGE can't grow it.
        match retry(|| rustix::fs::fallocate(file, mode, range.offset(), range.length())) {
            Ok(()) => return Ok(()),
            // EINVAL: a block device, and a range that is no multiple of its sectors. EPERM: an append-only or sealed
            // file, which then says so again when it is written.
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::PERM | Errno::NODEV) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    for piece in range.split_at_multiples(ZEROES.len() as u64) {
        file.write_all_at(&ZEROES[..piece.length() as usize], piece.offset())?;
    }
    Ok(())
}

/// The parts of `range` that hold data as far as the file system tells; `None` where it doesn't (block devices).
/// The file's own position, which this moves, is used by nothing else.
pub(super) fn data_ranges(file: &File, range: ByteRange) -> io::Result<Option<Vec<ByteRange>>> {
    let mut found = Vec::new();
    let mut at = range.offset();
    while at < range.end() {
        let start = match retry(|| rustix::fs::seek(file, SeekFrom::Data(at))) {
            Ok(start) => start,
            // Nothing but a hole from here to the end (or the file was shortened, which the read will tell).
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        if start >= range.end() {
            break;
        }
        let end = match retry(|| rustix::fs::seek(file, SeekFrom::Hole(start))) {
            Ok(end) => end,
            // The file was shortened between the two calls.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        // A file system that answers with a range which is empty or runs backwards is not believed.
        let Some(data) = ByteRange::between(start.max(at), end.min(range.end())) else { return Ok(None) };
        found.push(data);
        at = data.end();
    }
    Ok(Some(found))
}

/// Whether the file is known to hold nothing but holes.
pub(super) fn is_all_hole(file: &File) -> io::Result<bool> {
    match retry(|| rustix::fs::seek(file, SeekFrom::Data(0))) {
        Ok(_) | Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY) => Ok(false),
        Err(Errno::NXIO) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

/// The size in bytes, of a block device too, for which `stat` says 0.
pub(super) fn size(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    if metadata.is_file() {
        return Ok(metadata.len());
    }
    Ok(retry(|| rustix::fs::seek(file, SeekFrom::End(0)))?)
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, length: u64) -> ByteRange {
        ByteRange::new(offset, length).unwrap()
    }

    #[test]
    fn reads_are_exact_or_fail() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"0123456789", 0).unwrap();
        assert_eq!(read_exact(&file, range(3, 4)).unwrap(), b"3456");
        assert_eq!(read_exact(&file, range(9, 2)).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let mut buffer = [0; 4];
        assert_eq!(read_up_to(&file, &mut buffer, 8).unwrap(), 2);
        assert_eq!(read_up_to(&file, &mut buffer, 80).unwrap(), 0);
    }

    #[test]
    fn zeroed_ranges_become_holes_and_keep_the_size() {
        let file = tempfile::tempfile().unwrap();
        assert!(is_all_hole(&file).unwrap());
        file.write_all_at(&[7; 300_000], 0).unwrap();
        assert!(!is_all_hole(&file).unwrap());
        write_zeroes(&file, range(65_536, 131_072)).unwrap();
        write_zeroes(&file, range(299_990, 10)).unwrap();
        assert_eq!(size(&file).unwrap(), 300_000);
        let bytes = read_exact(&file, range(0, 300_000)).unwrap();
        assert!(bytes[65_536..196_608].iter().chain(&bytes[299_990..]).all(|&b| b == 0));
        assert!(bytes[..65_536].iter().chain(&bytes[196_608..299_990]).all(|&b| b == 7));
        let data = data_ranges(&file, range(10, 299_000)).unwrap().unwrap();
        assert!(data.iter().all(|r| r.offset() >= 10 && r.end() <= 299_010), "{data:?}");
        assert!(data.windows(2).all(|pair| pair[0].end() <= pair[1].offset()));
        let covered = |at: u64| data.iter().any(|r| r.offset() <= at && at < r.end());
        assert!(covered(10) && covered(65_535) && covered(196_608) && covered(299_009));
    }
}
