//! What is in a pool, and how much more may go in.

use std::ffi::{CStr, c_char};
use std::ptr;

use rustix::io::Errno;

use super::library::{ImageSpecC, library};
use super::{CephError, Cluster, Pool, Result, c_string, check};

/// An image in a pool's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListedImage {
    pub(crate) name: String,
    /// Empty for images of the old format 1.
    pub(crate) id: String,
}

impl Pool {
    /// All images of the pool's namespace; what is in the trash is not among them. Blocks.
    pub(crate) fn images(&self) -> Result<Vec<ListedImage>> {
        // Far beyond any pool, and a bound for what is allocated on the word of a library.
        const MOST: usize = 4 << 20;
        let rbd = &library()?.rbd;
        let mut room = 1024usize;
        loop {
            let mut list = vec![ImageSpecC { id: ptr::null_mut(), name: ptr::null_mut() }; room];
            let mut found = room;
            // SAFETY: the pool is open, the list has room for as many as said.
            let value = unsafe { (rbd.rbd_list2)(self.raw.0, list.as_mut_ptr(), &mut found) };
            match check("rbd_list2", value) {
                // Some more, for images that are made meanwhile.
                Err(error) if error.is(Errno::RANGE) && found > room && found <= MOST => room = found + 1024,
                Err(error) => return Err(error),
                Ok(_) => {
                    let found = found.min(room);
                    let images = list[..found].iter().map(|image| ListedImage {
                        // SAFETY: librbd filled in `found` entries.
                        name: unsafe { text(image.name) },
                        // SAFETY: as above.
                        id: unsafe { text(image.id) },
                    });
                    let images = images.collect();
                    // SAFETY: the entries were filled in by rbd_list2.
                    unsafe { (rbd.rbd_image_spec_list_cleanup)(list.as_mut_ptr(), found) };
                    return Ok(images);
                }
            }
        }
    }
}

/// The text at a pointer that C gave; empty for none.
///
/// # Safety
/// `at` is NULL, or points to a text that ends with NUL.
unsafe fn text(at: *const c_char) -> String {
    if at.is_null() {
        return String::new();
    }
    // SAFETY: as the caller promises.
    unsafe { CStr::from_ptr(at) }.to_string_lossy().into_owned()
}

impl Cluster {
    /// Asks a monitor, with a command in JSON as `ceph` sends it; gives its answer. Blocks, at most for
    /// `rados_mon_op_timeout`.
    pub(crate) fn monitor_command(&self, command: &str) -> Result<String> {
        const NAME: &str = "rados_mon_command";
        let rados = &library()?.rados;
        let command = c_string(command)?;
        let mut commands = [command.as_ptr()];
        let (mut answer, mut length) = (ptr::null_mut::<c_char>(), 0usize);
        // SAFETY: the handle is connected, the command ends with NUL, there is no input, the answer has valid places;
        // NULL for the status text says that it is not wanted.
        let value = unsafe {
            (rados.rados_mon_command)(
                self.raw.0,
                commands.as_mut_ptr(),
                commands.len(),
                ptr::null(),
                0,
                &mut answer,
                &mut length,
                ptr::null_mut(),
                ptr::null_mut(),
            )
        };
        let outcome = check(NAME, value);
        if answer.is_null() {
            return outcome.map(|_| String::new());
        }
        // SAFETY: librados gave a buffer of that length, which nobody changes before it is freed.
        let bytes = unsafe { std::slice::from_raw_parts(answer.cast::<u8>(), length) }.to_vec();
        // SAFETY: the buffer came from rados_mon_command.
        unsafe { (rados.rados_buffer_free)(answer) };
        outcome?;
        String::from_utf8(bytes)
            .map_err(|_| CephError::Nonsense { function: NAME, what: "bytes that are no UTF-8".into() })
    }
}
