//! The demonstration's disk: content as a filesystem would leave it, and a server that keeps writing.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::FallocateFlags;

/// What one piece of content covers, in bytes.
const PIECE: u64 = 256 << 10;

/// The block of a filesystem, in bytes: whatever the server writes begins and ends at its multiples.
const BLOCK: u64 = 4096;

/// The most that the server writes at a time, in blocks: 64 KiB.
const WRITE_BLOCKS_MAX: u64 = 16;

/// The pause between two writes of the server: about 500 writes and 16 MiB a second.
const PAUSE: Duration = Duration::from_millis(2);

/// Creates a sparse file of `size` bytes: text, what looks like compressed data, written zeroes, and holes. The same
/// seed gives the same bytes.
pub(super) fn create(path: &Path, size: u64, seed: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.set_len(size)?;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut piece = Vec::new();
    for offset in (0..size).step_by(PIECE as usize) {
        piece.resize(PIECE.min(size - offset) as usize, 0);
        match random.u8(..10) {
            0..4 => continue,
            4 => piece.fill(0),
            5..8 => fill_with_text(&mut piece, &mut random),
            _ => random.fill(&mut piece),
        }
        file.write_all_at(&piece, offset)?;
    }
    file.sync_all()
}

/// Lines as in a log: they compress about as well as a server's files do.
fn fill_with_text(buffer: &mut [u8], random: &mut fastrand::Rng) {
    const WORDS: [&str; 12] = [
        "GET",
        "POST",
        "/index",
        "/api/v2/orders",
        "200",
        "404",
        "session",
        "timeout",
        "retry",
        "INFO",
        "WARN",
        "user",
    ];
    let mut filled = 0;
    while filled < buffer.len() {
        let number = random.u32(..1_000_000);
        let line =
            format!("{number:06} {} {} {number:x}\n", random.choice(WORDS).unwrap_or(""), WORDS[random.usize(..12)]);
        let length = line.len().min(buffer.len() - filled);
        buffer[filled..filled + length].copy_from_slice(&line.as_bytes()[..length]);
        filled += length;
    }
}

/// A server that writes to its disk until it is stopped.
#[derive(Debug)]
pub(super) struct Server {
    written: Arc<AtomicU64>,
    stop: mpsc::Sender<()>,
    thread: JoinHandle<io::Result<()>>,
}

impl Server {
    /// Starts to write to the file.
    pub(super) fn start(path: &Path, seed: u64) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).open(path)?;
        let blocks = file.metadata()?.len() / BLOCK;
        let written = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = mpsc::channel();
        let thread = {
            let (written, mut random) = (written.clone(), fastrand::Rng::with_seed(seed));
            std::thread::spawn(move || {
                while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(PAUSE) {
                    written.fetch_add(write_once(&file, blocks, &mut random)?, Ordering::Relaxed);
                }
                file.sync_all()
            })
        };
        Ok(Self { written, stop, thread })
    }

    /// How many bytes it has written so far.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Stops it, as a server stops when its disk is quiesced; everything it wrote is durable then.
    pub(super) fn stop(self) -> io::Result<u64> {
        drop(self.stop);
        let ended = self.thread.join().unwrap_or_else(|_| Err(io::Error::other("the demonstration's server panicked")));
        ended.map(|()| self.written.load(Ordering::Relaxed))
    }
}

/// One write, or now and then a discard. Nine of ten go to a tenth of the disk, as servers do.
fn write_once(file: &File, blocks: u64, random: &mut fastrand::Rng) -> io::Result<u64> {
    let reach = if random.u8(..10) == 0 { blocks } else { (blocks / 10).max(1) };
    let first = random.u64(..reach);
    let length = random.u64(1..=WRITE_BLOCKS_MAX).min(blocks - first) * BLOCK;
    if random.u8(..20) == 0 {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file, flags, first * BLOCK, length) {
            // A filesystem without holes: the server's discard does nothing there.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => return Ok(0),
            Err(error) => return Err(error.into()),
        }
    }
    let mut data = vec![0; length as usize];
    if random.bool() {
        fill_with_text(&mut data, random);
    } else {
        random.fill(&mut data);
    }
    file.write_all_at(&data, first * BLOCK)?;
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_disk() {
        let folder = tempfile::tempdir().unwrap();
        let made = |name: &str, seed| {
            let path = folder.path().join(name);
            create(&path, 3 * PIECE * 10 + 5, seed).unwrap();
            std::fs::read(path).unwrap()
        };
        let (first, again, other) = (made("a", 1), made("b", 1), made("c", 2));
        assert_eq!(first.len() as u64, 3 * PIECE * 10 + 5);
        assert!(first == again && first != other);
        assert!(create(&folder.path().join("a"), PIECE, 1).is_err(), "an existing file was overwritten");
    }

    #[test]
    fn a_server_writes_until_it_is_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        create(&path, 4 * PIECE, 1).unwrap();
        let before = std::fs::read(&path).unwrap();
        let server = Server::start(&path, 7).unwrap();
        while server.written() == 0 {
            std::thread::yield_now();
        }
        assert!(server.stop().unwrap() > 0);
        let after = std::fs::read(&path).unwrap();
        assert_eq!(before.len(), after.len());
        assert!(before != after);
    }
}
