//! The lease, and what is kept in the sidecar while it is held: the declared snapshot and the engine's state.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::digests::Digests;
use super::lock::{self, HeldLock};
use super::open::{FileId, Kind, Opened, Role, described, lock_error};
use super::ranges::Ranges;
use super::raw;
use super::sidecar::{Declared, LoadError, SidePaths, Sidecar, remove_if_there};
use super::token::{Token, settled};
use crate::image::{ErrorKind, ImageError, LeaseOwner, Result, Snapshot};

/// The longest snapshot name, in bytes: what rbd's stream readers take.
const NAME_MAX: usize = 4096;

/// The image, as the blocking threads see it.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) opened: Opened,
    /// Which blocks are being worked on.
    pub(super) ranges: Ranges,
    session: Mutex<Option<Session>>,
    /// A sync has failed: the kernel reports that once, and drops what it could not write, so that a later sync may
    /// succeed although data is lost. This open file never declares anything again.
    sync_failed: AtomicBool,
}

/// What a change of the content needs.
#[derive(Debug)]
pub(super) struct Change {
    /// The digests that follow the change.
    pub(super) digests: Option<Arc<Digests>>,
    claim: Option<Arc<File>>,
}

impl Change {
    /// The file to write to. The kernel zeroes parts of a claimed block device only for the one who has claimed it.
    pub(super) fn file<'a>(&'a self, shared: &'a Shared) -> &'a File {
        self.claim.as_deref().unwrap_or(&shared.opened.file)
    }
}

/// What there is only while the lease is held.
#[derive(Debug)]
struct Session {
    lock: HeldLock,
    /// Keeps the kernel from mounting a block device meanwhile.
    claim: Option<Arc<File>>,
    sidecar: Sidecar,
    /// Cleared when a replacement failed, after which either may be on the disk.
    sidecar_is_on_disk: bool,
    digests: Option<Arc<Digests>>,
}

impl Shared {
    pub(super) fn new(opened: Opened) -> Self {
        Self { opened, ranges: Ranges::default(), session: Mutex::new(None), sync_failed: AtomicBool::new(false) }
    }

    pub(super) fn error(&self, kind: ErrorKind, operation: &str) -> ImageError {
        ImageError::new(kind, &self.opened.location, operation)
    }

    pub(super) fn io_error(&self, error: io::Error, operation: &str) -> ImageError {
        let error = described(error, &self.opened.location, operation);
        match error.kind {
            ErrorKind::NoSpace => error.hint("Free some space on its file system; the next run goes on from here."),
            _ => error,
        }
    }

    fn session(&self) -> MutexGuard<'_, Option<Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leased<'a>(&self, session: &'a mut Option<Session>, operation: &str) -> Result<&'a mut Session> {
        if self.opened.role == Role::Source {
            return Err(self.error(ErrorKind::ReadOnly, operation).detail("it is open as a source"));
        }
        session
            .as_mut()
            .ok_or_else(|| self.error(ErrorKind::Fenced, operation).detail("this process doesn't hold its lease"))
    }

    fn side(&self, operation: &str) -> Result<&SidePaths> {
        self.opened.side.as_ref().ok_or_else(|| {
            let error = self.error(ErrorKind::Unsupported, operation).detail("no state is kept of this block device");
            error.hint("Name the folder for the state of block devices.")
        })
    }

    pub(super) fn acquire_lease(&self, owner: &LeaseOwner) -> Result<()> {
        const OPERATION: &str = "take the lease";
        let mut session = self.session();
        if session.is_some() {
            return Ok(());
        }
        if self.opened.role == Role::Source {
            return Err(self.error(ErrorKind::ReadOnly, OPERATION).detail("it is open as a source"));
        }
        let side = self.side(OPERATION)?;
        let lock = HeldLock::acquire(side, Some(&self.opened.file), owner)
            .map_err(|error| lock_error(error, &self.opened.location, OPERATION))?;
        self.check_still_there(OPERATION)?;
        let claim = self.claim_device(OPERATION)?;
        remove_if_there(&side.temporary).map_err(|error| self.io_error(error, OPERATION))?;
        let sidecar = self.load_sidecar(side)?;
        let digests = self.take_up_digests(side, &sidecar);
        *session = Some(Session { lock, claim, sidecar, sidecar_is_on_disk: true, digests });
        Ok(())
    }

    /// The lock is on a name: the name must still be that of the open file.
    fn check_still_there(&self, operation: &str) -> Result<()> {
        if fs::metadata(&self.opened.path).is_ok_and(|metadata| FileId::of(&metadata) == self.opened.id) {
            return Ok(());
        }
        let error = self.error(ErrorKind::NotFound, operation);
        Err(error.detail("the file was replaced or removed since it was opened").hint("Run the command again."))
    }

    /// Linux refuses to open a block device with O_EXCL that is mounted, or part of something else.
    fn claim_device(&self, operation: &str) -> Result<Option<Arc<File>>> {
        if self.opened.kind == Kind::Regular {
            return Ok(None);
        }
        let exclusive = rustix::fs::OFlags::EXCL.bits().cast_signed();
        let claimed = OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(&self.opened.path);
        claimed.map(|file| Some(Arc::new(file))).map_err(|error| {
            let error = described(error, &self.opened.location, operation);
            if !matches!(error.kind, ErrorKind::Busy { .. }) {
                return error;
            }
            let holder = "the kernel: it is mounted, or part of LVM, RAID or multipath".into();
            self.error(ErrorKind::Busy { holder }, operation)
                .hint("See `lsblk`, and unmount it if it is the right one.")
        })
    }

    /// The digests that may be believed, or new ones; `None` if there is no place for them, which costs only speed.
    fn take_up_digests(&self, side: &SidePaths, sidecar: &Sidecar) -> Option<Arc<Digests>> {
        let size = self.size_of(sidecar.device_size).ok()?;
        let kept = || {
            let declared = sidecar.declared.as_ref()?;
            let believed = !declared.dirty && Token::of(&self.opened.file).ok()? == declared.token;
            believed.then(|| Digests::open(side, declared.digests?, size))?
        };
        let begun = || {
            Digests::create(side, size)
                .inspect_err(|error| tracing::warn!(%error, "no digests can be kept of {}", self.opened.location))
                .ok()
        };
        kept().or_else(begun).map(Arc::new)
    }

    pub(super) fn lease_owner(&self) -> Result<Option<LeaseOwner>> {
        const OPERATION: &str = "see who holds the lease";
        if let Some(session) = &*self.session() {
            return Ok(Some(session.lock.owner.clone()));
        }
        lock::owner(self.side(OPERATION)?).map_err(|error| lock_error(error, &self.opened.location, OPERATION))
    }

    pub(super) fn release_lease(&self) {
        *self.session() = None;
    }

    fn load_sidecar(&self, side: &SidePaths) -> Result<Sidecar> {
        Sidecar::load(side).map_err(|error| {
            let operation = format!("read its state in {}", side.sidecar.display());
            match error {
                LoadError::Io(error) => self.io_error(error, &operation),
                LoadError::Newer(_) => {
                    let wrapped = self.error(ErrorKind::Unsupported, &operation).detail(error.to_string());
                    wrapped.hint("Update poolshift.")
                }
                LoadError::Damaged(_) => {
                    let wrapped = self.error(ErrorKind::Corrupt, &operation).detail(error.to_string());
                    wrapped.hint("Move that file away: the target then counts as one that poolshift doesn't know.")
                }
            }
        })
    }

    /// Looks at the sidecar: this process's own while it holds the lease, and otherwise what is on the disk.
    pub(super) fn with_sidecar<T>(&self, look: impl FnOnce(&Sidecar) -> T) -> Result<T> {
        if let Some(session) = &*self.session() {
            return Ok(look(&session.sidecar));
        }
        match &self.opened.side {
            Some(side) => self.load_sidecar(side).map(|sidecar| look(&sidecar)),
            None => Ok(look(&Sidecar::default())),
        }
    }

    /// Changes the sidecar, durably.
    pub(super) fn change_sidecar(&self, operation: &str, change: impl FnOnce(&mut Sidecar)) -> Result<()> {
        let mut session = self.session();
        let session = self.leased(&mut session, operation)?;
        let mut next = session.sidecar.clone();
        change(&mut next);
        self.replace_sidecar(session, next, operation)
    }

    fn replace_sidecar(&self, session: &mut Session, next: Sidecar, operation: &str) -> Result<()> {
        let stored = next.store(self.side(operation)?);
        session.sidecar_is_on_disk = stored.is_ok();
        stored.map_err(|error| self.io_error(error, operation))?;
        session.sidecar = next;
        Ok(())
    }

    /// What must come before any change of the content: the lease is there, and the sidecar declares nothing that the
    /// change would make wrong.
    pub(super) fn begin_change(&self, operation: &str) -> Result<Change> {
        let mut session = self.session();
        let session = self.leased(&mut session, operation)?;
        let stands = session.sidecar.declared.as_ref().is_some_and(|declared| !declared.dirty);
        if stands || !session.sidecar_is_on_disk {
            let mut next = session.sidecar.clone();
            if let Some(declared) = &mut next.declared {
                declared.dirty = true;
            }
            self.replace_sidecar(session, next, operation)?;
        }
        let digests = session.digests.clone().filter(|digests| !digests.is_broken());
        Ok(Change { digests, claim: session.claim.clone() })
    }

    /// The digests, while the lease is held.
    pub(super) fn digests(&self) -> Option<Arc<Digests>> {
        self.session().as_ref()?.digests.clone().filter(|digests| !digests.is_broken())
    }

    /// The commit: declares that HEAD, as it is now, is the snapshot `name`. Nothing else runs meanwhile.
    ///
    /// First the data and the digests are made durable, then the declaration that stands on them.
    pub(super) fn declare(&self, name: String) -> Result<Snapshot> {
        const OPERATION: &str = "declare a snapshot";
        if name.is_empty() || name.len() > NAME_MAX {
            let detail = format!("its name has {} bytes, 1 to {NAME_MAX} are allowed", name.len());
            return Err(self.error(ErrorKind::OutOfBounds, OPERATION).detail(detail));
        }
        let mut session = self.session();
        let session = self.leased(&mut session, OPERATION)?;
        if session.sidecar.declared.as_ref().is_some_and(|declared| declared.snapshot.name == name) {
            return Err(self
                .error(ErrorKind::AlreadyExists, OPERATION)
                .detail(format!("there is a snapshot {name:?}")));
        }
        self.check_still_there(OPERATION)?;
        self.sync(File::sync_all, OPERATION)?;
        let size = self.size_of(session.sidecar.device_size)?;
        let digests = session.digests.as_ref().and_then(|digests| digests.sync());
        let token = settled(&self.opened.file).map_err(|error| self.io_error(error, OPERATION))?;
        if self.opened.kind == Kind::Regular && token.size != size {
            let error = self.error(ErrorKind::Io, OPERATION);
            return Err(error.detail("somebody else changes the file").hint("Stop the other writer, then verify."));
        }
        let exhausted = || self.error(ErrorKind::Corrupt, OPERATION).detail("the snapshot ids are used up");
        let id = session.sidecar.last_snapshot_id.checked_add(1).ok_or_else(exhausted)?;
        let snapshot = Snapshot { id, name, size };
        let declared = Declared { snapshot: snapshot.clone(), token, dirty: false, digests };
        let next = Sidecar { last_snapshot_id: id, declared: Some(declared), ..session.sidecar.clone() };
        self.replace_sidecar(session, next, OPERATION)?;
        Ok(snapshot)
    }

    pub(super) fn withdraw(&self, snapshot: &Snapshot) -> Result<()> {
        let operation = format!("remove the snapshot {snapshot}");
        let mut session = self.session();
        let session = self.leased(&mut session, &operation)?;
        let declared = session.sidecar.declared.as_ref().map(|declared| &declared.snapshot);
        if declared.is_none_or(|declared| (declared.id, &declared.name) != (snapshot.id, &snapshot.name)) {
            return Err(self.error(ErrorKind::NotFound, &operation).detail(match declared {
                Some(other) => format!("its snapshot is {other}"),
                None => "it has no snapshot".into(),
            }));
        }
        let next = Sidecar { declared: None, ..session.sidecar.clone() };
        self.replace_sidecar(session, next, &operation)
    }

    /// The declaration of `snapshot`, if it still stands and nobody wrote since; otherwise why not.
    pub(super) fn standing(&self, snapshot: &Snapshot) -> Result<std::result::Result<Token, String>> {
        let Some(declared) = self.with_sidecar(|sidecar| sidecar.declared.clone())? else {
            return Ok(Err("it has no snapshot".into()));
        };
        if (declared.snapshot.id, &declared.snapshot.name) != (snapshot.id, &snapshot.name) {
            return Ok(Err(format!("its snapshot is {}", declared.snapshot)));
        }
        let now = Token::of(&self.opened.file).map_err(|error| self.io_error(error, "look at the file's times"))?;
        if declared.dirty || now != declared.token {
            return Ok(Err("it was written since that snapshot was declared".into()));
        }
        Ok(Ok(declared.token))
    }

    pub(super) fn head_differs(&self, snapshot: &Snapshot) -> Result<bool> {
        Ok(self.standing(snapshot)?.is_err())
    }

    pub(super) fn flush(&self) -> Result<()> {
        const OPERATION: &str = "flush";
        if self.opened.role == Role::Source {
            return Err(self.error(ErrorKind::ReadOnly, OPERATION).detail("it is open as a source"));
        }
        self.sync(File::sync_data, OPERATION)
    }

    pub(super) fn sync(&self, sync: impl FnOnce(&File) -> io::Result<()>, operation: &str) -> Result<()> {
        if self.sync_failed.load(Ordering::Acquire) {
            let error = self.error(ErrorKind::Io, operation);
            return Err(error.detail("an earlier flush has failed, and data may be lost").hint("Run poolshift again."));
        }
        sync(&self.opened.file).map_err(|error| {
            self.sync_failed.store(true, Ordering::Release);
            self.io_error(error, operation)
        })
    }

    /// The size of HEAD in bytes.
    pub(super) fn size(&self) -> Result<u64> {
        match self.opened.kind {
            Kind::Regular => self.size_of(None),
            Kind::Device => self.size_of(self.with_sidecar(|sidecar| sidecar.device_size)?),
        }
    }

    /// The size of HEAD: of a device no more than what was set, because the image may be smaller than it.
    fn size_of(&self, device_size: Option<u64>) -> Result<u64> {
        let whole = raw::size(&self.opened.file).map_err(|error| self.io_error(error, "ask for its size"))?;
        Ok(device_size.filter(|_| self.opened.kind == Kind::Device).map_or(whole, |size| size.min(whole)))
    }
}
