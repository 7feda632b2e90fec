//! What poolshift keeps beside a target file: one small JSON document, replaced atomically and durably.
//!
//! ```text
//! PATH.poolshift           {"version":1,"crc32":…,"body":{…}}      this module
//! PATH.poolshift.new       the next one, until it is renamed
//! PATH.poolshift.lock      the lease                               `lease`
//! PATH.poolshift.digests   digests of the target's blocks          `digests`
//! ```
//!
//! # Why it survives a crash
//!
//! The new document is written to a file of its own and synced *before* it is renamed over the old one, because a
//! rename may reach the disk before the data that it makes visible; then the folder is synced, because until that the
//! rename itself may be lost. A crash or a full disk at any step leaves the old document whole. What is left of an
//! interrupted attempt is removed by the next one.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::token::Token;
use crate::image::Snapshot;

/// The format of [`Document`].
const VERSION: u32 = 1;

/// The most bytes of state that a target keeps: 64 KiB, as [`crate::image::TargetImage::store_state`] promises.
pub(super) const STATE_MAX: usize = 64 * 1024;

/// The most bytes that a sidecar can have: JSON writes a byte of the state as six at most.
const DOCUMENT_MAX: u64 = 8 * STATE_MAX as u64 + 64 * 1024;

/// Where the side files of one image are.
#[derive(Clone, Debug)]
pub(super) struct SidePaths {
    pub(super) folder: PathBuf,
    pub(super) sidecar: PathBuf,
    pub(super) temporary: PathBuf,
    pub(super) lock: PathBuf,
    pub(super) digests: PathBuf,
    /// The permissions of new side files: they tell about the image, so who may not read it may not read them.
    pub(super) mode: u32,
}

impl SidePaths {
    /// The side files of a regular file, beside it. `image` is canonical.
    pub(super) fn beside(image: &Path, mode: u32) -> Self {
        let folder = image.parent().unwrap_or(Path::new("/")).to_owned();
        Self::of(folder, image.as_os_str().to_owned(), mode & 0o666)
    }

    /// The side files of a block device, in a folder for such. `device` is canonical.
    pub(super) fn within(folder: &Path, device: &Path) -> Self {
        let name = device.as_os_str().as_bytes().iter().flat_map(|&byte| match byte {
            b'/' => b"%2F".to_vec(),
            b'%' => b"%25".to_vec(),
            _ => vec![byte],
        });
        let name = OsString::from(std::ffi::OsStr::from_bytes(&name.collect::<Vec<u8>>()));
        Self::of(folder.to_owned(), folder.join(name).into_os_string(), 0o600)
    }

    fn of(folder: PathBuf, stem: OsString, mode: u32) -> Self {
        let with = |suffix: &str| {
            let mut path = stem.clone();
            path.push(suffix);
            PathBuf::from(path)
        };
        Self {
            folder,
            sidecar: with(".poolshift"),
            temporary: with(".poolshift.new"),
            lock: with(".poolshift.lock"),
            digests: with(".poolshift.digests"),
            mode,
        }
    }

    /// Removes what an earlier image of this name has left, but for the lock file. Durable.
    pub(super) fn remove_leftovers(&self) -> io::Result<()> {
        let mut removed = false;
        for path in [&self.sidecar, &self.temporary, &self.digests] {
            removed |= remove_if_there(path)?;
        }
        if removed { sync_folder(&self.folder) } else { Ok(()) }
    }
}

/// The statement that HEAD was this snapshot when it looked like this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Declared {
    pub(super) snapshot: Snapshot,
    pub(super) token: Token,
    /// Set before the first write that came while the declaration stood: HEAD is something else since.
    pub(super) dirty: bool,
    /// The generation of the digests that were durable when this was declared; `None` if none were.
    pub(super) digests: Option<u64>,
}

/// What the sidecar says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sidecar {
    /// The highest snapshot id that was ever given; ids are not given twice.
    pub(super) last_snapshot_id: u64,
    pub(super) declared: Option<Declared>,
    /// Block devices: how many bytes of the device are the image, once that was set.
    pub(super) device_size: Option<u64>,
    /// The engine's state, as it was given.
    pub(super) state: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    /// Of the body as this version writes it: JSON alone doesn't notice a changed digit.
    crc32: u32,
    body: Sidecar,
}

/// Why a sidecar can't be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it was written by a newer poolshift (format {0}, this one knows {VERSION})")]
    Newer(u32),
    #[error("it is damaged: {0}")]
    Damaged(String),
}

impl Sidecar {
    /// Reads the sidecar; an empty one if there is no file.
    pub(super) fn load(paths: &SidePaths) -> Result<Self, LoadError> {
        let file = match File::open(&paths.sidecar) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error.into()),
        };
        let mut bytes = Vec::new();
        file.take(DOCUMENT_MAX + 1).read_to_end(&mut bytes)?;
        Self::decode(&bytes)
    }

    fn decode(bytes: &[u8]) -> Result<Self, LoadError> {
        if bytes.len() as u64 > DOCUMENT_MAX {
            return Err(LoadError::Damaged(format!("it is larger than {DOCUMENT_MAX} bytes")));
        }
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let damaged = |error: serde_json::Error| LoadError::Damaged(error.to_string());
        // The version first and by itself: a newer document may have fields that this one doesn't know.
        let Version { version } = serde_json::from_slice(bytes).map_err(damaged)?;
        if version > VERSION {
            return Err(LoadError::Newer(version));
        }
        let document: Document = serde_json::from_slice(bytes).map_err(damaged)?;
        let crc32 = crc32fast::hash(&serde_json::to_vec(&document.body).map_err(damaged)?);
        if version != VERSION || crc32 != document.crc32 {
            return Err(LoadError::Damaged("its checksum is wrong".into()));
        }
        Ok(document.body)
    }

    fn encode(&self) -> io::Result<Vec<u8>> {
        let crc32 = crc32fast::hash(&serde_json::to_vec(self)?);
        let mut bytes = serde_json::to_vec(&Document { version: VERSION, crc32, body: self.clone() })?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Replaces the sidecar. When this returns without an error the new one survives any crash; when it returns one,
    /// the old one is there (or, if only the last step failed, the new one, which may yet be lost).
    pub(super) fn store(&self, paths: &SidePaths) -> io::Result<()> {
        let bytes = self.encode()?;
        remove_if_there(&paths.temporary)?;
        let written = (|| {
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(paths.mode | 0o600).open(&paths.temporary)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&paths.temporary, &paths.sidecar)
        })();
        if let Err(error) = written {
            // Nothing more can be done if even that fails; the next attempt tries again.
            let _ = fs::remove_file(&paths.temporary);
            return Err(error);
        }
        sync_folder(&paths.folder)
    }
}

/// Makes what was created, renamed or removed in a folder durable.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Removes a file; says whether there was one.
pub(super) fn remove_if_there(path: &Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Sidecar {
        let snapshot = Snapshot { id: 7, name: "poolshift-1".into(), size: 4096 };
        let token = Token { size: 4096, inode: 3, mtime_ns: 5, ctime_ns: -6, device: None };
        Sidecar {
            last_snapshot_id: 7,
            declared: Some(Declared { snapshot, token, dirty: false, digests: Some(9) }),
            device_size: None,
            state: Some("{\"a\":\"\\u0000ü\"}".into()),
        }
    }

    #[test]
    fn the_format_is_what_it_was() {
        let expected = concat!(
            r#"{"version":1,"crc32":2322879630,"body":{"last_snapshot_id":7,"declared":{"snapshot":{"id":7,"#,
            r#""name":"poolshift-1","size":4096},"token":{"size":4096,"inode":3,"mtime_ns":5,"ctime_ns":-6,"#,
            r#""device":null},"dirty":false,"digests":9},"device_size":null,"state":"{\"a\":\"\\u0000ü\"}"}}"#,
            "\n"
        );
        assert_eq!(String::from_utf8(full().encode().unwrap()).unwrap(), expected);
        assert_eq!(Sidecar::decode(expected.as_bytes()).unwrap(), full());
    }

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let good = full().encode().unwrap();
        for end in 0..good.len() - 1 {
            assert!(Sidecar::decode(&good[..end]).is_err(), "cut at {end}");
        }
        for at in 0..good.len() - 1 {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                // A flip that JSON or the checksum doesn't notice changes nothing that is said.
                assert!(Sidecar::decode(&bad).map_or(true, |sidecar| sidecar == full()), "bit {bit} of byte {at}");
            }
        }
        assert!(Sidecar::decode(&vec![b' '; DOCUMENT_MAX as usize + 1]).is_err());
        let newer = br#"{"version":2,"something":"else"}"#;
        assert!(matches!(Sidecar::decode(newer), Err(LoadError::Newer(2))));
    }

    #[test]
    fn a_failed_replacement_leaves_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let paths = SidePaths::beside(&folder.path().join("disk"), 0o644);
        assert_eq!(Sidecar::load(&paths).unwrap(), Sidecar::default());
        full().store(&paths).unwrap();
        // A half-written leftover of a crash is no obstacle.
        fs::write(&paths.temporary, b"{\"vers").unwrap();
        let next = Sidecar { state: None, ..full() };
        next.store(&paths).unwrap();
        assert_eq!(Sidecar::load(&paths).unwrap(), next);
        // Something that can't be replaced: the step before the rename fails.
        fs::create_dir(&paths.temporary).unwrap();
        assert!(full().store(&paths).is_err());
        assert_eq!(Sidecar::load(&paths).unwrap(), next);
    }

    #[test]
    fn names_of_devices_do_not_collide() {
        let name = |device: &str| SidePaths::within(Path::new("/state"), Path::new(device)).sidecar;
        assert_eq!(name("/dev/sdb"), Path::new("/state/%2Fdev%2Fsdb.poolshift"));
        assert_ne!(name("/dev/a/b"), name("/dev/a%2Fb"));
    }
}
