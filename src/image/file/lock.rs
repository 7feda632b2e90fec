//! The lease on a target file: `flock` on a file beside it, and on the image itself.
//!
//! The kernel gives the locks back when the last descriptor is closed, thus with the process, however it ends: a
//! holder is never merely presumed dead, and never has to be. The file beside it is there to name the holder, and is
//! kept when the lease is given back, because a file that is removed and made again would be two files, with a holder
//! each. The lock on the image itself covers one that is reached by two names.
//!
//! Asking who holds the lease takes a shared lock for an instant, which another process can take for a holder: whoever
//! meets a lock whose file names nobody alive tries again for a while.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use super::raw;
use super::sidecar::SidePaths;
use crate::image::LeaseOwner;

/// How often a lock that nobody alive seems to hold is tried, and the pause between: half a second in all.
const ATTEMPTS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(10);

/// The most bytes that are read of a lock file.
const OWNER_MAX: usize = 4096;

/// A lease that is held until this is dropped.
#[derive(Debug)]
pub(super) struct HeldLock {
    file: File,
    image: Option<File>,
    pub(super) owner: LeaseOwner,
}

/// Why there is no lease.
#[derive(Debug)]
pub(super) enum LockError {
    /// Somebody has it: who, as far as the file tells.
    Held(String),
    /// The lock file is a symbolic link, or something else than a file. It is not followed: it could lead to a file of
    /// somebody else's, which would be written.
    NoFile(PathBuf),
    Io(io::Error),
}

impl From<io::Error> for LockError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl HeldLock {
    /// Takes the lease for `owner`, on `image` too. Blocks for up to a second.
    pub(super) fn acquire(paths: &SidePaths, image: Option<&File>, owner: &LeaseOwner) -> Result<Self, LockError> {
        let mut last_seen = None;
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                std::thread::sleep(PAUSE);
            }
            let file = open_plain(OpenOptions::new().write(true).create(true).mode(paths.mode | 0o600), &paths.lock)?;
            if !try_lock(&file, FlockOperation::NonBlockingLockExclusive)? {
                last_seen = read_owner(&file)?;
                match &last_seen {
                    Some(holder) if !holder.is_known_dead() => break,
                    _ => continue,
                }
            }
            // Somebody may have removed the file between the open and the lock; a lock on it would then be worth
            // nothing, because the next one makes a new file.
            let same = std::fs::metadata(&paths.lock).is_ok_and(|now| {
                file.metadata().is_ok_and(|locked| (now.dev(), now.ino()) == (locked.dev(), locked.ino()))
            });
            if !same {
                continue;
            }
            // A duplicate is the same open file to the kernel, and so to the lock.
            let image = image.map(File::try_clone).transpose()?;
            if let Some(image) = &image
                && !try_lock(image, FlockOperation::NonBlockingLockExclusive)?
            {
                return Err(LockError::Held("a program that has locked the file itself (see `lslocks`)".into()));
            }
            let held = Self { file, image, owner: owner.clone() };
            held.write_owner()?;
            return Ok(held);
        }
        let unnamed = || format!("a process that does not name itself in {}", paths.lock.display());
        Err(LockError::Held(last_seen.map_or_else(unnamed, |holder| holder.to_string())))
    }

    fn write_owner(&self) -> io::Result<()> {
        let text = serde_json::to_vec(&self.owner)?;
        self.file.set_len(0)?;
        self.file.write_all_at(&text, 0)
    }
}

impl Drop for HeldLock {
    fn drop(&mut self) {
        // The name is only for people and for a quicker answer; that the locks are given back is what counts. Closing
        // the file does that, but the image stays open elsewhere.
        let _ = self.file.set_len(0);
        if let Some(image) = &self.image {
            let _ = rustix::fs::flock(image, FlockOperation::Unlock);
        }
    }
}

/// Who holds the lease, if anybody does. Blocks for up to a second if it is held by somebody unnamed.
pub(super) fn owner(paths: &SidePaths) -> Result<Option<LeaseOwner>, LockError> {
    let file = match open_plain(&mut OpenOptions::new(), &paths.lock) {
        Ok(file) => file,
        Err(LockError::Io(error)) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    for _ in 0..ATTEMPTS {
        if try_lock(&file, FlockOperation::NonBlockingLockShared)? {
            return Ok(None);
        }
        match read_owner(&file)? {
            Some(holder) if !holder.is_known_dead() => return Ok(Some(holder)),
            _ => std::thread::sleep(PAUSE),
        }
    }
    Err(LockError::Held(format!("a process that does not name itself in {}", paths.lock.display())))
}

/// Opens a file to be read, and whatever else the options say; nothing that its name leads elsewhere to, and nothing to
/// wait for, as a pipe is.
fn open_plain(options: &mut OpenOptions, path: &Path) -> Result<File, LockError> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let no_file = || LockError::NoFile(path.to_owned());
    match options.read(true).custom_flags(flags.bits().cast_signed()).open(path) {
        Ok(file) if file.metadata()?.is_file() => Ok(file),
        Ok(_) => Err(no_file()),
        Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => Err(no_file()),
        Err(error) => Err(error.into()),
    }
}

fn try_lock(file: &File, operation: FlockOperation) -> io::Result<bool> {
    loop {
        match rustix::fs::flock(file, operation) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// What the lock file says; `None` if that is nothing, or only the first part of it yet.
fn read_owner(file: &File) -> io::Result<Option<LeaseOwner>> {
    let mut text = vec![0; OWNER_MAX];
    let length = raw::read_up_to(file, &mut text, 0)?;
    Ok(serde_json::from_slice(&text[..length]).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(folder: &tempfile::TempDir) -> SidePaths {
        SidePaths::beside(&folder.path().join("disk"), 0o644)
    }

    #[test]
    fn a_lock_file_that_leads_elsewhere_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (paths, me) = (paths(&folder), LeaseOwner::current().unwrap());
        let other = folder.path().join("other");
        std::fs::write(&other, "somebody's").unwrap();
        for leads_to in [other.clone(), folder.path().join("nothing")] {
            std::os::unix::fs::symlink(leads_to, &paths.lock).unwrap();
            assert!(matches!(HeldLock::acquire(&paths, None, &me), Err(LockError::NoFile(path)) if path == paths.lock));
            assert!(matches!(owner(&paths), Err(LockError::NoFile(_))));
            std::fs::remove_file(&paths.lock).unwrap();
        }
        std::fs::create_dir(&paths.lock).unwrap();
        assert!(matches!(owner(&paths), Err(LockError::NoFile(_))));
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "somebody's");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn one_at_a_time_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(&folder);
        let me = LeaseOwner::current().unwrap();
        assert_eq!(owner(&paths).unwrap(), None);
        let held = HeldLock::acquire(&paths, None, &me).unwrap();
        assert_eq!(owner(&paths).unwrap(), Some(me.clone()));
        assert!(matches!(HeldLock::acquire(&paths, None, &me), Err(LockError::Held(who)) if who == me.to_string()));
        drop(held);
        assert!(paths.lock.exists());
        assert_eq!(owner(&paths).unwrap(), None);
        HeldLock::acquire(&paths, None, &me).unwrap();
    }

    #[test]
    fn the_image_itself_is_locked_too() {
        let folder = tempfile::tempdir().unwrap();
        let me = LeaseOwner::current().unwrap();
        let image = File::create(folder.path().join("disk")).unwrap();
        let held = HeldLock::acquire(&paths(&folder), Some(&image), &me).unwrap();
        let by_other_name = SidePaths::beside(&folder.path().join("link"), 0o644);
        let again = File::open(folder.path().join("disk")).unwrap();
        assert!(matches!(HeldLock::acquire(&by_other_name, Some(&again), &me), Err(LockError::Held(_))));
        drop(held);
        HeldLock::acquire(&by_other_name, Some(&again), &me).unwrap();
    }

    #[test]
    fn questions_never_look_like_a_holder() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(&folder);
        let me = LeaseOwner::current().unwrap();
        drop(HeldLock::acquire(&paths, None, &me).unwrap());
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        owner(&paths).unwrap();
                    }
                });
            }
            for _ in 0..200 {
                let taken = HeldLock::acquire(&paths, None, &me);
                if taken.is_err() {
                    done.store(true, std::sync::atomic::Ordering::Relaxed);
                }
                drop(taken.unwrap());
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
