//! An open image: a `rbd_image_t` that closes itself.
//!
//! Every method here blocks, but for those of `aio`; call them inside `blocking`.

use std::ffi::{CStr, c_char, c_int};
use std::ptr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Once};

use rustix::io::Errno;

use super::aio::InFlight;
use super::library::{
    Handle, ImageInfoC, Library, LinkedImageSpecC, MirrorInfoC, Rbd, SnapInfoC, SnapSpecC, TimespecC, WatcherC,
    count_progress, library, no_progress,
};
use super::pace::Pace;
use super::{CephError, Pool, Raw, Result, c_string, check, close_in_background, exit};

/// `RBD_FEATURE_*` of `rbd/features.h`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features(pub(crate) u64);

impl Features {
    pub(crate) const LAYERING: u64 = 1 << 0;
    pub(crate) const EXCLUSIVE_LOCK: u64 = 1 << 2;
    pub(crate) const OBJECT_MAP: u64 = 1 << 3;
    pub(crate) const FAST_DIFF: u64 = 1 << 4;
    pub(crate) const DEEP_FLATTEN: u64 = 1 << 5;
    pub(crate) const JOURNALING: u64 = 1 << 6;
    pub(crate) const DATA_POOL: u64 = 1 << 7;
    pub(crate) const MIGRATING: u64 = 1 << 9;
    pub(crate) const NON_PRIMARY: u64 = 1 << 10;

    /// Whether all of these bits are set.
    pub(crate) fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }
}

/// `RBD_FLAG_OBJECT_MAP_INVALID | RBD_FLAG_FAST_DIFF_INVALID`
pub(crate) const INVALID_FLAGS: u64 = 1 | 2;

/// `CEPH_NOSNAP`: HEAD, where a snapshot's id is asked for.
const NO_SNAPSHOT: u64 = u64::MAX - 1;

/// How to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpenMode {
    /// Without a watch: changes made later by others, new snapshots above all, are not noticed by the handle.
    ReadOnly,
    /// With a watch, and the exclusive lock when something is written.
    ReadWrite,
}

/// A snapshot in an image's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapInfo {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) size: u64,
    /// Whether it is in the user namespace: neither of a group, nor the trash's, nor the mirror's.
    pub(crate) user: bool,
}

/// A client that has an image open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Watcher {
    pub(crate) address: String,
    pub(crate) client: i64,
}

/// Whose clone an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParentSpec {
    pub(crate) pool: String,
    pub(crate) namespace: String,
    pub(crate) image: String,
    pub(crate) snapshot: String,
    /// How many bytes from the start are still shared with the parent.
    pub(crate) overlap: u64,
}

/// What a new image is to be.
#[derive(Clone, Debug)]
pub(crate) struct CreateSpec {
    pub(crate) size: u64,
    /// Objects have `1 << order` bytes.
    pub(crate) order: u32,
    pub(crate) features: Features,
    /// Unit and count.
    pub(crate) striping: (u64, u64),
    /// The pool of its data; its own, too, is named: without a name it is that of `rbd_default_data_pool`.
    pub(crate) data_pool: String,
}

/// An open image.
#[derive(Debug)]
pub(crate) struct Image {
    pub(super) raw: Raw,
    pub(super) in_flight: Arc<InFlight>,
    pub(super) pace: Pace,
    pub(super) pool: Arc<Pool>,
}

impl Image {
    /// Opens an image by its name.
    pub(crate) fn open(pool: &Arc<Pool>, name: &str, mode: OpenMode) -> Result<Self> {
        let rbd = &library()?.rbd;
        match mode {
            OpenMode::ReadOnly => Self::open_with(pool, name, "rbd_open_read_only", rbd.rbd_open_read_only),
            OpenMode::ReadWrite => Self::open_with(pool, name, "rbd_open", rbd.rbd_open),
        }
    }

    /// Opens the image that has this id, whatever its name is by now.
    pub(crate) fn open_by_id(pool: &Arc<Pool>, id: &str, mode: OpenMode) -> Result<Self> {
        let rbd = &library()?.rbd;
        match mode {
            OpenMode::ReadOnly => Self::open_with(pool, id, "rbd_open_by_id_read_only", rbd.rbd_open_by_id_read_only),
            OpenMode::ReadWrite => Self::open_with(pool, id, "rbd_open_by_id", rbd.rbd_open_by_id),
        }
    }

    fn open_with(
        pool: &Arc<Pool>,
        name: &str,
        function: &'static str,
        open: unsafe extern "C" fn(Handle, *const c_char, *mut Handle, *const c_char) -> c_int,
    ) -> Result<Self> {
        let name = c_string(name)?;
        let mut raw = ptr::null_mut();
        // SAFETY: the pool is open, the name ends with NUL, `raw` is a valid place; NULL means HEAD.
        check(function, unsafe { open(pool.raw.0, name.as_ptr(), &mut raw, ptr::null()) })?;
        // librbd makes some of its global objects when the first image is opened.
        static FIRST: Once = Once::new();
        FIRST.call_once(exit::watch_the_end);
        Ok(Self { raw: Raw(raw), in_flight: Arc::default(), pace: Pace::default(), pool: Arc::clone(pool) })
    }

    pub(super) fn rbd(&self) -> Result<&'static Rbd> {
        Ok(&library()?.rbd)
    }

    fn number(
        &self,
        function: &'static str,
        get: impl Fn(&'static Rbd) -> unsafe extern "C" fn(Handle, *mut u64) -> c_int,
    ) -> Result<u64> {
        let mut value = 0;
        // SAFETY: the image is open, `value` is a valid place.
        check(function, unsafe { get(self.rbd()?)(self.raw.0, &mut value) })?;
        Ok(value)
    }

    /// The size in bytes, of the snapshot if one is set.
    pub(crate) fn size(&self) -> Result<u64> {
        self.number("rbd_get_size", |rbd| rbd.rbd_get_size)
    }

    pub(crate) fn features(&self) -> Result<Features> {
        self.number("rbd_get_features", |rbd| rbd.rbd_get_features).map(Features)
    }

    /// When it was made, in seconds since 1970.
    pub(crate) fn created(&self) -> Result<i64> {
        let mut at = TimespecC::default();
        // SAFETY: the image is open, `at` is a valid place.
        let value = unsafe { (self.rbd()?.rbd_get_create_timestamp)(self.raw.0, &mut at) };
        check("rbd_get_create_timestamp", value)?;
        Ok(at.seconds)
    }

    /// The flags of HEAD, or of the snapshot that is set; see [`INVALID_FLAGS`].
    pub(crate) fn flags(&self) -> Result<u64> {
        self.number("rbd_get_flags", |rbd| rbd.rbd_get_flags)
    }

    /// How many snapshots the image may have (`rbd snap limit set`); `u64::MAX` without a limit.
    pub(crate) fn snapshot_limit(&self) -> Result<u64> {
        self.number("rbd_snap_get_limit", |rbd| rbd.rbd_snap_get_limit)
    }

    /// Object size, stripe unit and stripe count.
    pub(crate) fn layout(&self) -> Result<(u64, u64, u64)> {
        // SAFETY: a structure of numbers and characters, for which zeroes are valid.
        let mut info: ImageInfoC = unsafe { std::mem::zeroed() };
        // SAFETY: the image is open, the structure is as long as said.
        let value = unsafe { (self.rbd()?.rbd_stat)(self.raw.0, &mut info, size_of::<ImageInfoC>()) };
        check("rbd_stat", value)?;
        let unit = self.number("rbd_get_stripe_unit", |rbd| rbd.rbd_get_stripe_unit)?;
        let count = self.number("rbd_get_stripe_count", |rbd| rbd.rbd_get_stripe_count)?;
        if info.obj_size == 0 || unit == 0 || count == 0 || info.obj_size.checked_mul(count).is_none() {
            let what = format!("object size {}, stripe unit {unit}, stripe count {count}", info.obj_size);
            return Err(CephError::Nonsense { function: "rbd_stat", what });
        }
        Ok((info.obj_size, unit, count))
    }

    /// The id, which stays with the image when it is renamed. EINVAL for images of the old format 1.
    pub(crate) fn id(&self) -> Result<String> {
        let mut buffer = [0u8; 256];
        // SAFETY: the image is open, the buffer is as long as said.
        check("rbd_get_id", unsafe { (self.rbd()?.rbd_get_id)(self.raw.0, buffer.as_mut_ptr().cast(), buffer.len()) })?;
        let id = CStr::from_bytes_until_nul(&buffer)
            .map_err(|_| CephError::Nonsense { function: "rbd_get_id", what: "an id without an end".into() })?;
        Ok(id.to_string_lossy().into_owned())
    }

    /// Turns the handle to a snapshot. Not while the handle is shared.
    pub(crate) fn set_snapshot(&mut self, id: Option<u64>) -> Result<()> {
        // SAFETY: the image is open, and `&mut` says that nobody else uses the handle.
        let value = unsafe { (self.rbd()?.rbd_snap_set_by_id)(self.raw.0, id.unwrap_or(NO_SNAPSHOT)) };
        check("rbd_snap_set_by_id", value).map(drop)
    }

    /// All snapshots of every namespace, by ascending id.
    pub(crate) fn snapshots(&self) -> Result<Vec<SnapInfo>> {
        let rbd = self.rbd()?;
        let mut room: c_int = 32;
        loop {
            let length = usize::try_from(room).unwrap_or(0);
            let mut list = vec![SnapInfoC { id: 0, size: 0, name: ptr::null() }; length];
            // SAFETY: the image is open, the list has room for as many as said.
            let found =
                check("rbd_snap_list", unsafe { (rbd.rbd_snap_list)(self.raw.0, list.as_mut_ptr(), &mut room) });
            let found = match found {
                Err(error) if error.is(Errno::RANGE) && usize::try_from(room).is_ok_and(|room| room > length) => {
                    continue;
                }
                found => usize::try_from(found?).unwrap_or(0).min(length),
            };
            let mut snapshots = Vec::with_capacity(found);
            for snapshot in &list[..found] {
                // SAFETY: librbd filled in `found` entries, with names that end with NUL.
                let name = unsafe { CStr::from_ptr(snapshot.name) }.to_string_lossy().into_owned();
                snapshots.push(SnapInfo { id: snapshot.id, name, size: snapshot.size, user: true });
            }
            if found > 0 {
                // SAFETY: the list was filled in by rbd_snap_list, and ends with an entry without a name.
                unsafe { (rbd.rbd_snap_list_end)(list.as_mut_ptr()) };
            }
            for snapshot in &mut snapshots {
                let mut kind: c_int = 0;
                // SAFETY: the image is open, `kind` is a valid place for the enumeration.
                let value = unsafe { (rbd.rbd_snap_get_namespace_type)(self.raw.0, snapshot.id, &mut kind) };
                match check("rbd_snap_get_namespace_type", value) {
                    Ok(_) => snapshot.user = kind == 0,
                    // It went between the two calls: no snapshot to work with.
                    Err(error) if error.is(Errno::NOENT) => snapshot.user = false,
                    Err(error) => return Err(error),
                }
            }
            snapshots.sort_unstable_by_key(|snapshot| snapshot.id);
            return Ok(snapshots);
        }
    }

    /// Creates a snapshot of HEAD in the user namespace. EEXIST if there is one of that name.
    pub(crate) fn create_snapshot(&self, name: &str) -> Result<()> {
        let name = c_string(name)?;
        // SAFETY: the image is open; the callback is never NULL, which librbd 16.2 would call.
        let value =
            unsafe { (self.rbd()?.rbd_snap_create2)(self.raw.0, name.as_ptr(), 0, no_progress, ptr::null_mut()) };
        check("rbd_snap_create2", value).map(drop)
    }

    /// Removes the snapshot with this id.
    pub(crate) fn remove_snapshot(&self, id: u64) -> Result<()> {
        // SAFETY: the image is open.
        check("rbd_snap_remove_by_id", unsafe { (self.rbd()?.rbd_snap_remove_by_id)(self.raw.0, id) }).map(drop)
    }

    /// Resizes HEAD; `steps` counts up for as long as there is progress.
    pub(crate) fn resize(&self, size: u64, steps: &AtomicU64) -> Result<()> {
        let counter = ptr::from_ref(steps).cast_mut().cast();
        // SAFETY: the image is open; the callback only counts, and isn't called after the return.
        check("rbd_resize2", unsafe { (self.rbd()?.rbd_resize2)(self.raw.0, size, true, count_progress, counter) })
            .map(drop)
    }

    /// The value of a key of the image's metadata.
    pub(crate) fn metadata(&self, key: &str) -> Result<Option<String>> {
        let key = c_string(key)?;
        let mut room = 4096usize;
        loop {
            let mut value = vec![0u8; room];
            let mut length = room;
            // SAFETY: the image is open, the buffer is as long as said.
            let got = unsafe {
                (self.rbd()?.rbd_metadata_get)(self.raw.0, key.as_ptr(), value.as_mut_ptr().cast(), &mut length)
            };
            match check("rbd_metadata_get", got) {
                Err(error) if error.is(Errno::NOENT) => return Ok(None),
                Err(error) if error.is(Errno::RANGE) && length > room && length <= 16 << 20 => room = length,
                Err(error) => return Err(error),
                Ok(_) => {
                    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
                    value.truncate(end);
                    return String::from_utf8(value).map(Some).map_err(|_| CephError::Nonsense {
                        function: "rbd_metadata_get",
                        what: "bytes that are no UTF-8".into(),
                    });
                }
            }
        }
    }

    /// Sets, or with `None` removes, a key of the image's metadata; removing what isn't there is no error.
    pub(crate) fn set_metadata(&self, key: &str, value: Option<&str>) -> Result<()> {
        let (rbd, key) = (self.rbd()?, c_string(key)?);
        let Some(value) = value else {
            // SAFETY: the image is open, the key ends with NUL.
            return match check("rbd_metadata_remove", unsafe { (rbd.rbd_metadata_remove)(self.raw.0, key.as_ptr()) }) {
                Err(error) if !error.is(Errno::NOENT) => Err(error),
                _ => Ok(()),
            };
        };
        let value = c_string(value)?;
        // SAFETY: the image is open, key and value end with NUL.
        let set = unsafe { (rbd.rbd_metadata_set)(self.raw.0, key.as_ptr(), value.as_ptr()) };
        check("rbd_metadata_set", set).map(drop)
    }

    /// Whether the image is mirrored, and its other side is the one that is written.
    pub(crate) fn is_non_primary(&self) -> Result<bool> {
        /// `RBD_MIRROR_IMAGE_DISABLED`
        const DISABLED: c_int = 2;
        let rbd = self.rbd()?;
        let mut info = MirrorInfoC { global_id: ptr::null_mut(), state: DISABLED, primary: true };
        // SAFETY: the image is open, the structure is as long as said.
        let got = unsafe { (rbd.rbd_mirror_image_get_info)(self.raw.0, &mut info, size_of::<MirrorInfoC>()) };
        match check("rbd_mirror_image_get_info", got) {
            // Mirroring is off in its pool.
            Err(error) if error.is(Errno::NOENT) || error.is(Errno::INVAL) => return Ok(false),
            result => result?,
        };
        let is_non_primary = info.state != DISABLED && !info.primary;
        // SAFETY: rbd_mirror_image_get_info has filled it in.
        unsafe { (rbd.rbd_mirror_image_get_info_cleanup)(&mut info) };
        Ok(is_non_primary)
    }

    /// Who has the image open for writing.
    pub(crate) fn watchers(&self) -> Result<Vec<Watcher>> {
        let rbd = self.rbd()?;
        let mut room = 16usize;
        loop {
            let mut list = vec![WatcherC { addr: ptr::null_mut(), id: 0, cookie: 0 }; room];
            let mut found = room;
            // SAFETY: the image is open, the list has room for as many as said.
            let value = unsafe { (rbd.rbd_watchers_list)(self.raw.0, list.as_mut_ptr(), &mut found) };
            match check("rbd_watchers_list", value) {
                Err(error) if error.is(Errno::RANGE) && found > room => room = found,
                Err(error) => return Err(error),
                Ok(_) => {
                    let found = found.min(room);
                    let watchers = list[..found].iter().map(|watcher| Watcher {
                        // SAFETY: librbd filled in `found` entries, with addresses that end with NUL.
                        address: unsafe { CStr::from_ptr(watcher.addr) }.to_string_lossy().into_owned(),
                        client: watcher.id,
                    });
                    let watchers = watchers.collect();
                    // SAFETY: the entries were filled in by rbd_watchers_list.
                    unsafe { (rbd.rbd_watchers_list_cleanup)(list.as_mut_ptr(), found) };
                    return Ok(watchers);
                }
            }
        }
    }

    /// Whose clone this is, if it is one.
    pub(crate) fn parent(&self) -> Result<Option<ParentSpec>> {
        let rbd = self.rbd()?;
        // SAFETY: structures of numbers and pointers, for which zeroes are valid.
        let (mut image, mut snapshot): (LinkedImageSpecC, SnapSpecC) = unsafe { std::mem::zeroed() };
        // SAFETY: the image is open, both places are valid.
        match check("rbd_get_parent", unsafe { (rbd.rbd_get_parent)(self.raw.0, &mut image, &mut snapshot) }) {
            Err(error) if error.is(Errno::NOENT) => return Ok(None),
            result => result?,
        };
        let text = |text: *const c_char| {
            if text.is_null() {
                return String::new();
            }
            // SAFETY: librbd filled in strings that end with NUL.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        };
        let mut spec = ParentSpec {
            pool: text(image.pool_name),
            namespace: text(image.pool_namespace),
            image: text(image.image_name),
            snapshot: text(snapshot.name),
            overlap: 0,
        };
        // SAFETY: both were filled in by rbd_get_parent.
        unsafe {
            (rbd.rbd_linked_image_spec_cleanup)(&mut image);
            (rbd.rbd_snap_spec_cleanup)(&mut snapshot);
        }
        spec.overlap = self.number("rbd_get_overlap", |rbd| rbd.rbd_get_overlap)?;
        Ok(Some(spec))
    }
}

impl Image {
    /// Waits until no request is under way. Blocks.
    pub(crate) fn wait_until_idle(&self) {
        self.in_flight.wait_until_none();
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let (raw, in_flight, pool) = (Raw(self.raw.0), Arc::clone(&self.in_flight), Arc::clone(&self.pool));
        close_in_background(move || {
            let raw = raw;
            in_flight.wait_until_none();
            if let Ok(Library { rbd, .. }) = library() {
                // SAFETY: this was the last user of the handle, and no request is under way.
                let value = unsafe { (rbd.rbd_close)(raw.0) };
                if let Err(error) = check("rbd_close", value) {
                    tracing::debug!(%error, "an image did not close cleanly");
                }
            }
            drop(pool);
        });
    }
}
