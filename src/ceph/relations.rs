//! What binds images together: parents, clones, protected snapshots, and flattening, which cuts a clone loose.
//!
//! Everything here blocks.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use rustix::io::Errno;

use super::diff::{Collected, DiffRange};
use super::library::{LinkedImageSpecC, SnapSpecC};
use super::{Image, Result, c_string, check};
use crate::extent::{ByteRange, ExtentKind, normalize};

/// An image at the other end of a clone's link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LinkedImage {
    pub(crate) pool: String,
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// The name, in the trash the one that it had before.
    pub(crate) name: String,
    /// Whether it is in the trash, where it is found by its id only.
    pub(crate) trash: bool,
}

/// Whose clone the point of a handle is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ParentLink {
    pub(crate) image: LinkedImage,
    pub(crate) snapshot: String,
    pub(crate) snapshot_id: u64,
    /// How many bytes from the start are still shared with the parent.
    pub(crate) overlap: u64,
}

/// A string that librbd filled in; empty where it left NULL.
fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: librbd fills in strings that end with NUL, and the caller has not freed them yet.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn linked(spec: &LinkedImageSpecC) -> LinkedImage {
    LinkedImage {
        pool: text(spec.pool_name),
        namespace: text(spec.pool_namespace),
        id: text(spec.image_id),
        name: text(spec.image_name),
        trash: spec.trash,
    }
}

/// Whether flattening is to go on after the object of this number, of so many.
type Watch<'a> = &'a (dyn Fn(u64, u64) -> bool + Sync);

/// The progress callback of [`Image::flatten`]: stops with ECANCELED.
unsafe extern "C" fn watch_flatten(object: u64, objects: u64, watch: *mut c_void) -> c_int {
    // SAFETY: `Image::flatten` passes a `Watch` that outlives the call; librbd may call from any thread, and the
    // closure is `Sync`. A panic in it aborts at this boundary.
    let watch = unsafe { *watch.cast::<Watch<'_>>() };
    if watch(object, objects) { 0 } else { -Errno::CANCELED.raw_os_error() }
}

impl Image {
    /// The clones of the snapshot that the handle is set to, of both clone formats, in every pool and namespace.
    pub(crate) fn children(&self) -> Result<Vec<LinkedImage>> {
        let rbd = self.rbd()?;
        let mut room = 16usize;
        loop {
            // SAFETY: a structure of numbers and pointers, for which zeroes are valid.
            let empty = || unsafe { std::mem::zeroed::<LinkedImageSpecC>() };
            let mut list: Vec<LinkedImageSpecC> = std::iter::repeat_with(empty).take(room).collect();
            let mut found = room;
            // SAFETY: the image is open, the list has room for as many as said.
            let value = unsafe { (rbd.rbd_list_children3)(self.raw.0, list.as_mut_ptr(), &mut found) };
            match check("rbd_list_children3", value) {
                Err(error) if error.is(Errno::RANGE) && found > room => room = found,
                Err(error) => return Err(error),
                Ok(_) => {
                    let found = found.min(room);
                    let children = list[..found].iter().map(linked).collect();
                    // SAFETY: the entries were filled in by rbd_list_children3.
                    unsafe { (rbd.rbd_linked_image_spec_list_cleanup)(list.as_mut_ptr(), found) };
                    return Ok(children);
                }
            }
        }
    }

    /// Whose clone HEAD is, or the snapshot that the handle is set to. A snapshot can keep a parent that HEAD has lost:
    /// flattening leaves the snapshots of a clone without deep-flatten as they are.
    pub(crate) fn parent_link(&self) -> Result<Option<ParentLink>> {
        let rbd = self.rbd()?;
        // SAFETY: structures of numbers and pointers, for which zeroes are valid.
        let (mut image, mut snapshot): (LinkedImageSpecC, SnapSpecC) = unsafe { std::mem::zeroed() };
        // SAFETY: the image is open, both places are valid.
        match check("rbd_get_parent", unsafe { (rbd.rbd_get_parent)(self.raw.0, &mut image, &mut snapshot) }) {
            Err(error) if error.is(Errno::NOENT) => return Ok(None),
            result => result?,
        };
        let (parent, name, snapshot_id) = (linked(&image), text(snapshot.name), snapshot.id);
        // SAFETY: both were filled in by rbd_get_parent.
        unsafe {
            (rbd.rbd_linked_image_spec_cleanup)(&mut image);
            (rbd.rbd_snap_spec_cleanup)(&mut snapshot);
        }
        let mut overlap = 0;
        // SAFETY: the image is open, `overlap` is a valid place.
        check("rbd_get_overlap", unsafe { (rbd.rbd_get_overlap)(self.raw.0, &mut overlap) })?;
        Ok(Some(ParentLink { image: parent, snapshot: name, snapshot_id, overlap }))
    }

    /// Whether the snapshot of that name, in the user namespace, is protected. ENOENT if there is none.
    pub(crate) fn is_snapshot_protected(&self, name: &str) -> Result<bool> {
        let name = c_string(name)?;
        let mut protected: c_int = 0;
        // SAFETY: the image is open, the name ends with NUL, `protected` is a valid place.
        let value = unsafe { (self.rbd()?.rbd_snap_is_protected)(self.raw.0, name.as_ptr(), &mut protected) };
        check("rbd_snap_is_protected", value)?;
        Ok(protected != 0)
    }

    /// Takes the protection off a snapshot. EBUSY if it has clones of the first format, EINVAL if it is not protected.
    pub(crate) fn unprotect_snapshot(&self, name: &str) -> Result<()> {
        let name = c_string(name)?;
        // SAFETY: the image is open, the name ends with NUL.
        let value = unsafe { (self.rbd()?.rbd_snap_unprotect)(self.raw.0, name.as_ptr()) };
        check("rbd_snap_unprotect", value).map(drop)
    }

    /// Where the object map of the handle's point says that there are objects, in whole objects; of the image alone, or
    /// with what it sees in its `parents`. `None` for more than `bound` runs. The caller has checked that there is a map
    /// and that it is valid, and that the layout is plain: offsets are wrong with striping (ceph#44483).
    pub(crate) fn objects(&self, parents: bool, bound: usize) -> Result<Option<Vec<ByteRange>>> {
        let Some(within) = ByteRange::between(0, self.size()?) else { return Ok(Some(Vec::new())) };
        let what = DiffRange { since: None, within, whole_object: true };
        Ok(match self.collect(&what, parents, bound)? {
            Collected::TooMany => None,
            Collected::Extents(extents) => {
                let there = extents.into_iter().filter(|extent| extent.kind == ExtentKind::Data);
                Some(normalize(there.map(|extent| extent.range).collect()))
            }
        })
    }

    /// Copies what HEAD still shares with its parent, object by object, and then cuts the link. `watch` is told the
    /// number of each object that is begun or passed over, and of how many; when it says false no further object is
    /// begun, those under way (10 by default) are finished, and the result is false. What was copied stays, so that the
    /// next call has the rest to do. EINVAL without a parent.
    ///
    /// Where another client owns the exclusive lock, librbd asks it to flatten, and looks at nothing that `watch` says:
    /// such a flatten can't be stopped. `watch` is called with locks of librbd held, from the thread that also answers
    /// those who ask for the exclusive lock: it must not wait for anything.
    pub(crate) fn flatten(&self, watch: Watch<'_>) -> Result<bool> {
        let argument = ptr::from_ref(&watch).cast_mut().cast();
        // SAFETY: the image is open; the callback's argument is a `Watch` that outlives the call, after which librbd
        // doesn't call any more.
        let value = unsafe { (self.rbd()?.rbd_flatten_with_progress)(self.raw.0, watch_flatten, argument) };
        match check("rbd_flatten_with_progress", value) {
            Err(error) if error.is(Errno::CANCELED) => Ok(false),
            result => result.map(|_| true),
        }
    }
}
