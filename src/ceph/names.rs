//! Images by their names: making, cloning, renaming and removing them.
//!
//! A name is kept in two places: the pool's directory, where names and ids stand together, and the object
//! `rbd_id.NAME`, which holds the id and is what opening by name looks at. librbd 16.2 renames in three steps
//! (`operation/RenameRequest.cc`): it makes `rbd_id.NEW`, changes the directory, which is atomic and decides, and
//! removes `rbd_id.OLD`. A client that dies in between leaves an image that opens by both names; see
//! [`Pool::id_of_name`].
//!
//! Everything here blocks.

use std::ffi::{CStr, c_int};
use std::ptr;
use std::sync::PoisonError;
use std::sync::atomic::AtomicU64;

use rustix::io::Errno;

use super::library::{Handle, Rbd, count_progress, library};
use super::{CephError, CreateSpec, Features, Image, Pool, Result, c_string, check};

/// `RBD_IMAGE_OPTION_*` of librbd.h.
mod option {
    use std::ffi::c_int;

    pub(super) const FORMAT: c_int = 0;
    pub(super) const FEATURES: c_int = 1;
    pub(super) const ORDER: c_int = 2;
    pub(super) const STRIPE_UNIT: c_int = 3;
    pub(super) const STRIPE_COUNT: c_int = 4;
    pub(super) const DATA_POOL: c_int = 10;
    pub(super) const CLONE_FORMAT: c_int = 12;
}

/// The longest name that is read back, with its NUL; librbd's own tools stop at 96.
const NAME_ROOM: usize = 4096;

/// The options of an image that is being made.
struct Options {
    raw: Handle,
    rbd: &'static Rbd,
}

impl Options {
    fn new(numbers: &[(c_int, u64)]) -> Result<Self> {
        let rbd = &library()?.rbd;
        let mut raw = ptr::null_mut();
        // SAFETY: `raw` is a valid place for the options.
        unsafe { (rbd.rbd_image_options_create)(&mut raw) };
        let options = Self { raw, rbd };
        for &(option, value) in numbers {
            // SAFETY: the options exist.
            let set = unsafe { (rbd.rbd_image_options_set_uint64)(options.raw, option, value) };
            check("rbd_image_options_set_uint64", set)?;
        }
        Ok(options)
    }

    fn set_data_pool(&self, pool: &str) -> Result<()> {
        let pool = c_string(pool)?;
        // SAFETY: the options exist, the string ends with NUL and is copied.
        let set = unsafe { (self.rbd.rbd_image_options_set_string)(self.raw, option::DATA_POOL, pool.as_ptr()) };
        check("rbd_image_options_set_string", set).map(drop)
    }
}

impl Drop for Options {
    fn drop(&mut self) {
        // SAFETY: the options were created, and aren't used any more.
        unsafe { (self.rbd.rbd_image_options_destroy)(self.raw) };
    }
}

/// Creates an image. EEXIST if there is one of that name. All of its properties are given: what is left out would be
/// what the cluster's configuration has for it (`rbd_default_*`).
pub(crate) fn create_image(pool: &Pool, name: &str, spec: &CreateSpec) -> Result<()> {
    let name = c_string(name)?;
    let (unit, count) = spec.striping;
    let options = Options::new(&[
        (option::FORMAT, 2),
        (option::FEATURES, spec.features.0),
        (option::ORDER, u64::from(spec.order)),
        (option::STRIPE_UNIT, unit),
        (option::STRIPE_COUNT, count),
    ])?;
    options.set_data_pool(&spec.data_pool)?;
    // SAFETY: the pool is open, the name ends with NUL, the options exist.
    let value = unsafe { (options.rbd.rbd_create4)(pool.raw.0, name.as_ptr(), spec.size, options.raw) };
    check("rbd_create4", value).map(drop)
}

impl Pool {
    /// Makes a clone, of the second format, of a snapshot that need not be protected; both in this pool, whose name is
    /// `pool` and which gets the clone's data. It gets a copy of the parent's metadata. EEXIST if there is an image of
    /// that name.
    pub(crate) fn clone_image(
        &self,
        pool: &str,
        (parent, snapshot): (&str, &str),
        clone: &str,
        features: Features,
    ) -> Result<()> {
        let (parent, snapshot, clone) = (c_string(parent)?, c_string(snapshot)?, c_string(clone)?);
        let options = Options::new(&[(option::FEATURES, features.0), (option::CLONE_FORMAT, 2)])?;
        options.set_data_pool(pool)?;
        // SAFETY: the pool is open, the names end with NUL, the options exist.
        let value = unsafe {
            (options.rbd.rbd_clone3)(
                self.raw.0,
                parent.as_ptr(),
                snapshot.as_ptr(),
                self.raw.0,
                clone.as_ptr(),
                options.raw,
            )
        };
        check("rbd_clone3", value).map(drop)
    }

    /// Gives an image another name. EEXIST if any image has that name, this one too.
    pub(crate) fn rename_image(&self, from: &str, to: &str) -> Result<()> {
        let (from, to) = (c_string(from)?, c_string(to)?);
        // SAFETY: the pool is open, the names end with NUL.
        let value = unsafe { (library()?.rbd.rbd_rename)(self.raw.0, from.as_ptr(), to.as_ptr()) };
        check("rbd_rename", value).map(drop)
    }

    /// Removes an image; `steps` counts up for as long as there is progress. ENOTEMPTY if it has snapshots, EBUSY if
    /// somebody has it open for writing.
    pub(crate) fn remove_image(&self, name: &str, steps: &AtomicU64) -> Result<()> {
        let name = c_string(name)?;
        let counter = ptr::from_ref(steps).cast_mut().cast();
        // SAFETY: the pool is open, the name ends with NUL; the callback's counter outlives the call, after which it
        // isn't called.
        let value =
            unsafe { (library()?.rbd.rbd_remove_with_progress)(self.raw.0, name.as_ptr(), count_progress, counter) };
        check("rbd_remove_with_progress", value).map(drop)
    }

    /// The id of the image that opening by this name opens, whatever the directory says. `None` if there is none.
    pub(crate) fn id_of_name(&self, name: &str) -> Result<Option<String>> {
        // The answer is a string as Ceph encodes it: its length in four bytes, little-endian, and its bytes.
        let answer = match self.exec(&id_object(name), c"get_id", &[], NAME_ROOM) {
            Err(error) if error.is(Errno::NOENT) => return Ok(None),
            answer => answer?.0,
        };
        let id =
            answer.split_first_chunk::<4>().filter(|(length, id)| u32::from_le_bytes(**length) as usize == id.len());
        let id = id.and_then(|(_, id)| String::from_utf8(id.to_vec()).ok());
        let nonsense = || CephError::Nonsense {
            function: "rados_exec",
            what: format!("{} bytes that are no image's id", answer.len()),
        };
        id.map(Some).ok_or_else(nonsense)
    }

    /// Whether this user may write in the pool, and in its namespace: it may remove an object that is not there, which
    /// changes nothing.
    pub(crate) fn may_write(&self) -> Result<bool> {
        match self.forget_name(&format!("poolshift-probe-{:016x}", fastrand::u64(..))) {
            Err(error) if error.is(Errno::PERM) || error.is(Errno::ACCESS) => Ok(false),
            probed => probed.map(|()| true),
        }
    }

    /// Takes away what opening by this name looks at. For a name that a rename which was cut has left, and for no
    /// other.
    pub(crate) fn forget_name(&self, name: &str) -> Result<()> {
        let object = c_string(&id_object(name))?;
        let _last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the pool is open, the name ends with NUL.
        match check("rados_remove", unsafe { (library()?.rados.rados_remove)(self.raw.0, object.as_ptr()) }) {
            Err(error) if error.is(Errno::NOENT) => Ok(()),
            result => result.map(drop),
        }
    }
}

fn id_object(name: &str) -> String {
    format!("rbd_id.{name}")
}

impl Image {
    /// The name that the image had, by the directory, when this handle was opened.
    pub(crate) fn name(&self) -> Result<String> {
        let mut buffer = [0u8; NAME_ROOM];
        let mut length = buffer.len();
        // SAFETY: the image is open, the buffer is as long as said.
        let value = unsafe { (self.rbd()?.rbd_get_name)(self.raw.0, buffer.as_mut_ptr().cast(), &mut length) };
        check("rbd_get_name", value)?;
        let name = CStr::from_bytes_until_nul(&buffer)
            .map_err(|_| CephError::Nonsense { function: "rbd_get_name", what: "a name without an end".into() })?;
        Ok(name.to_string_lossy().into_owned())
    }
}
