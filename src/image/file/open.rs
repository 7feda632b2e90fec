//! Opening and creating files, and saying why not.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::lock::{HeldLock, LockError};
use super::sidecar::{SidePaths, sync_folder};
use super::{FileOptions, raw};
use crate::image::{ErrorKind, ImageError, ImageIdentity, LeaseOwner, Result};

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Source,
    Target,
}

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    Device,
}

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileId {
    Regular { filesystem: u64, inode: u64 },
    Device { number: u64 },
}

/// An open file and all that doesn't change about it.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) role: Role,
    pub(super) kind: Kind,
    pub(super) id: FileId,
    /// `file:` and the path as it was given.
    pub(super) location: String,
    /// Without symbolic links.
    pub(super) path: PathBuf,
    pub(super) identity: ImageIdentity,
    /// `None` for a block device that is a source and has no state folder.
    pub(super) side: Option<SidePaths>,
}

impl Opened {
    /// Opens what is there.
    pub(super) fn existing(path: &Path, role: Role, options: &FileOptions) -> Result<Self> {
        let location = format!("file:{}", path.display());
        let operation = if role == Role::Source { "open it for reading" } else { "open it for writing" };
        let failed = |error: io::Error| open_error(error, path, &location, operation);
        // Before the open, which would wait for ever on a pipe, and can have effects on other devices.
        kind_of(&fs::metadata(path).map_err(failed)?, &location, operation)?;
        let file = OpenOptions::new().read(true).write(role == Role::Target).open(path).map_err(failed)?;
        let canonical = fs::canonicalize(path).map_err(failed)?;
        let opened = Self::of(file, canonical, location, role, options, operation)?;
        let size = raw::size(&opened.file).map_err(|e| ImageError::from_io(e, &opened.location, "ask for its size"))?;
        if role == Role::Source && size == 0 {
            let error = ImageError::new(ErrorKind::Unsupported, &opened.location, operation);
            return Err(error.detail("it is empty: there is nothing to replicate").hint("Check the path."));
        }
        Ok(opened)
    }

    /// Creates a sparse file. Durable; what fails leaves nothing behind.
    pub(super) fn created(path: &Path, size: u64) -> Result<Self> {
        let location = format!("file:{}", path.display());
        let operation = format!("create it with {size} bytes");
        let failed = |error: io::Error| create_error(error, path, &location, &operation);
        let name = path.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidFilename.into()))?;
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let canonical = fs::canonicalize(folder).map_err(failed)?.join(name);
        if fs::symlink_metadata(&canonical).is_ok() {
            return Err(failed(io::Error::from_raw_os_error(rustix::io::Errno::EXIST.raw_os_error())));
        }
        // What is on a disk is its owner's, whatever the umask.
        let side = SidePaths::beside(&canonical, 0o600);
        let owner = LeaseOwner::current().map_err(failed)?;
        let _lock = HeldLock::acquire(&side, None, &owner).map_err(|e| lock_error(e, &location, &operation))?;
        // They would say of the new image what was true of another.
        side.remove_leftovers().map_err(failed)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&canonical).map_err(failed)?;
        let sized = file.set_len(size).and_then(|()| file.sync_all()).and_then(|()| sync_folder(&side.folder));
        if let Err(error) = sized {
            let _ = fs::remove_file(&canonical);
            return Err(failed(error));
        }
        Self::of(file, canonical, location, Role::Target, &FileOptions::default(), &operation)
    }

    fn of(
        file: File,
        path: PathBuf,
        location: String,
        role: Role,
        options: &FileOptions,
        operation: &str,
    ) -> Result<Self> {
        let metadata = file.metadata().map_err(|e| ImageError::from_io(e, &location, operation))?;
        let kind = kind_of(&metadata, &location, operation)?;
        let side = match (kind, &options.state_dir) {
            (Kind::Regular, _) => Some(SidePaths::beside(&path, metadata.permissions().mode())),
            (Kind::Device, Some(folder)) => Some(SidePaths::within(folder, &path)),
            (Kind::Device, None) if role == Role::Source => None,
            (Kind::Device, None) => {
                let error = ImageError::new(ErrorKind::Unsupported, location, operation);
                return Err(error
                    .detail("it is a block device, and there is no place beside it for poolshift's state")
                    .hint("Name a folder for the state of block devices, on a disk that survives a reboot."));
            }
        };
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let image = path.to_string_lossy().into_owned();
        let identity = ImageIdentity { cluster: "file".into(), pool: host, image };
        Ok(Self { file, role, kind, id: FileId::of(&metadata), location, path, identity, side })
    }

    /// What this image can't promise.
    pub(super) fn remarks(&self) -> Vec<String> {
        let remark = match (self.role, self.kind) {
            (Role::Source, Kind::Regular) => {
                "a file has no snapshots: the copy is one point in time only if nobody writes to the file during the \
                 cycle; stop its writer for the last one"
            }
            (Role::Source, Kind::Device) => {
                "a block device has no snapshots, no holes and no times of change: all of it is read, and the copy is \
                 one point in time only if nobody writes to the device during the cycle, which can't be checked"
            }
            (Role::Target, Kind::Regular) => return Vec::new(),
            (Role::Target, Kind::Device) => {
                "writes of other programs to a block device are not noticed: let nothing else write to it, and verify \
                 it before it is used"
            }
        };
        vec![format!("{}: {remark}.", self.location)]
    }
}

impl FileId {
    pub(super) fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            return Self::Device { number: metadata.rdev() };
        }
        Self::Regular { filesystem: metadata.dev(), inode: metadata.ino() }
    }
}

fn kind_of(metadata: &Metadata, location: &str, operation: &str) -> Result<Kind> {
    let file_type = metadata.file_type();
    let detail = if file_type.is_file() {
        return Ok(Kind::Regular);
    } else if file_type.is_block_device() {
        return Ok(Kind::Device);
    } else if file_type.is_dir() {
        "it is a folder"
    } else {
        "it is neither a regular file nor a block device"
    };
    let error = ImageError::new(ErrorKind::Unsupported, location, operation).detail(detail);
    Err(error.hint("Name a raw disk image or a block device."))
}

fn open_error(error: io::Error, path: &Path, location: &str, operation: &str) -> ImageError {
    let error = described(error, location, operation);
    match error.kind {
        ErrorKind::NotFound if path.is_symlink() => error.hint("It is a symbolic link to something that is missing."),
        ErrorKind::NotFound => error.hint("Check the path."),
        ErrorKind::PermissionDenied => error.hint("Run poolshift as a user who may open it."),
        ErrorKind::ReadOnly => error.hint("Mount its file system for writing, or choose another target."),
        _ => error,
    }
}

fn create_error(error: io::Error, path: &Path, location: &str, operation: &str) -> ImageError {
    let error = described(error, location, operation);
    match error.kind {
        ErrorKind::NotFound => {
            let folder = path.parent().unwrap_or(path).display().to_string();
            error.hint(format!("Create the folder first: mkdir -p {folder}"))
        }
        ErrorKind::PermissionDenied => error.hint("Run poolshift as a user who may write there."),
        ErrorKind::NoSpace => error.hint("Free some space there, or choose another place."),
        _ => error,
    }
}

pub(super) fn lock_error(error: LockError, location: &str, operation: &str) -> ImageError {
    match error {
        LockError::Io(error) => described(error, location, operation),
        LockError::NoFile(path) => ImageError::new(ErrorKind::Unsupported, location, operation)
            .detail(format!("{} is a symbolic link, or no file", path.display()))
            .hint("Find out who made it; poolshift keeps who writes the image in a file of that name."),
        LockError::Held(holder) => ImageError::new(ErrorKind::Busy { holder }, location, operation)
            .hint("Wait until it is done; its lease ends with its process."),
    }
}

/// An error whose detail is what the system says.
pub(super) fn described(error: io::Error, location: &str, operation: &str) -> ImageError {
    let detail = error.to_string();
    ImageError::from_io(error, location, operation).detail(detail)
}
