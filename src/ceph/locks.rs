//! The two kinds of locks: the exclusive lock of librbd (a feature of the image; whoever writes must hold it), and the
//! advisory lock, which binds only those who ask.

use std::ffi::{CStr, c_char, c_int};
use std::ptr;

use rustix::io::Errno;

use super::library::library;
use super::{CephError, Image, Result, c_string, check};

/// The name of both locks on an image's header: `RBD_LOCK_NAME` of `include/rbd_types.h`.
const LOCK: &CStr = c"rbd_lock";
/// `RBD_LOCK_MODE_EXCLUSIVE`
const EXCLUSIVE: c_int = 0;

/// Who holds an advisory lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Locker {
    /// `client.NUMBER`
    pub(crate) client: String,
    pub(crate) cookie: String,
    pub(crate) address: String,
}

impl Image {
    /// Takes the exclusive lock, and doesn't give it to others who ask. EROFS when a live client holds it so; waits
    /// for the watch of a silent one to time out.
    pub(crate) fn acquire_lock(&self) -> Result<()> {
        // SAFETY: the image is open.
        check("rbd_lock_acquire", unsafe { (self.rbd()?.rbd_lock_acquire)(self.raw.0, EXCLUSIVE) }).map(drop)
    }

    /// Gives the exclusive lock back, after every request under way.
    pub(crate) fn release_lock(&self) -> Result<()> {
        // SAFETY: the image is open.
        check("rbd_lock_release", unsafe { (self.rbd()?.rbd_lock_release)(self.raw.0) }).map(drop)
    }

    /// The address of whoever holds the exclusive lock.
    pub(crate) fn lock_owner(&self) -> Result<Option<String>> {
        let rbd = self.rbd()?;
        let mut owners = [ptr::null_mut::<c_char>(); 8];
        let (mut mode, mut found): (c_int, usize) = (0, owners.len());
        // SAFETY: the image is open, the list has room for as many as said.
        let value = unsafe { (rbd.rbd_lock_get_owners)(self.raw.0, &mut mode, owners.as_mut_ptr(), &mut found) };
        match check("rbd_lock_get_owners", value) {
            Err(error) if error.is(Errno::NOENT) => return Ok(None),
            result => result?,
        };
        let found = found.min(owners.len());
        // SAFETY: librbd filled in `found` addresses that end with NUL.
        let owner = owners[..found].first().map(|&owner| unsafe { CStr::from_ptr(owner) });
        let owner = owner.map(|owner| owner.to_string_lossy().into_owned());
        // SAFETY: the entries were filled in by rbd_lock_get_owners.
        unsafe { (rbd.rbd_lock_get_owners_cleanup)(owners.as_mut_ptr(), found) };
        Ok(owner)
    }

    /// Takes the advisory lock. EBUSY if another has it, EEXIST if this client has it with this cookie.
    pub(crate) fn acquire_advisory_lock(&self, cookie: &str) -> Result<()> {
        let cookie = c_string(cookie)?;
        // SAFETY: the image is open, the cookie ends with NUL.
        check("rbd_lock_exclusive", unsafe { (self.rbd()?.rbd_lock_exclusive)(self.raw.0, cookie.as_ptr()) }).map(drop)
    }

    /// Gives the advisory lock back.
    pub(crate) fn release_advisory_lock(&self, cookie: &str) -> Result<()> {
        let cookie = c_string(cookie)?;
        // SAFETY: the image is open, the cookie ends with NUL.
        check("rbd_unlock", unsafe { (self.rbd()?.rbd_unlock)(self.raw.0, cookie.as_ptr()) }).map(drop)
    }

    /// Takes either lock away from a client. ENOENT if it holds it no more. Not through `rbd_lock_break`, which blocklists
    /// the client or not, and for how long, as the configuration of cluster, pool or image has it.
    pub(crate) fn break_lock(&self, locker: &Locker) -> Result<()> {
        let header = c_string(&format!("rbd_header.{}", self.id()?))?;
        let (client, cookie) = (c_string(&locker.client)?, c_string(&locker.cookie)?);
        let rados = &library()?.rados;
        // SAFETY: the pool is open, all strings end with NUL.
        let value = unsafe {
            let [object, name] = [header.as_ptr(), LOCK.as_ptr()];
            (rados.rados_break_lock)(self.pool.raw.0, object, name, client.as_ptr(), cookie.as_ptr())
        };
        check("rados_break_lock", value).map(drop)
    }

    /// Who holds advisory locks; or the exclusive lock, which librbd keeps in the same place, with a cookie of its own.
    pub(crate) fn lockers(&self) -> Result<Vec<Locker>> {
        const ROOM: usize = 64 * 1024;
        let mut tag = [0u8; 256];
        let (mut clients, mut cookies, mut addresses) = (vec![0u8; ROOM], vec![0u8; ROOM], vec![0u8; ROOM]);
        let mut exclusive: c_int = 0;
        let (mut tag_length, mut lengths) = (tag.len(), [ROOM; 3]);
        let [clients_length, cookies_length, addresses_length] = &mut lengths;
        // SAFETY: the image is open, every buffer is as long as said.
        let found = unsafe {
            (self.rbd()?.rbd_list_lockers)(
                self.raw.0,
                &mut exclusive,
                tag.as_mut_ptr().cast(),
                &mut tag_length,
                clients.as_mut_ptr().cast(),
                clients_length,
                cookies.as_mut_ptr().cast(),
                cookies_length,
                addresses.as_mut_ptr().cast(),
                addresses_length,
            )
        };
        let found = match check("rbd_list_lockers", found as i64) {
            Err(error) if error.is(Errno::NOENT) => return Ok(Vec::new()),
            found => usize::try_from(found?).unwrap_or(usize::MAX),
        };
        let mut lists = [(&clients, lengths[0]), (&cookies, lengths[1]), (&addresses, lengths[2])]
            .map(|(buffer, length)| buffer[..length.min(ROOM)].split(|&byte| byte == 0));
        let mut lockers = Vec::new();
        for _ in 0..found {
            let [client, cookie, address] =
                lists.each_mut().map(|list| list.next().map(|text| String::from_utf8_lossy(text).into_owned()));
            let (Some(client), Some(cookie), Some(address)) = (client, cookie, address) else {
                let what = format!("{found} lockers, but not their names");
                return Err(CephError::Nonsense { function: "rbd_list_lockers", what });
            };
            lockers.push(Locker { client, cookie, address });
        }
        Ok(lockers)
    }
}
