//! Why an image can't be opened, by what its objects say: librbd gives one errno for several causes.
//!
//! The objects and methods are those of Ceph's `cls_rbd` (src/cls/rbd/cls_rbd.cc): `rbd_directory` has the names of a
//! pool's images and their ids (`dir_get_id`), `rbd_id.NAME` the id of one, `rbd_header.ID` its parent (`parent_get`).
//!
//! Everything here blocks.

use std::sync::Arc;

use rustix::io::Errno;

use super::{CephError, Pool, Result};

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unopened {
    /// The pool has no such name.
    NoName,
    /// The pool has the name, by its directory or by the object that has the id; this object is missing.
    Missing { object: String, id: String },
    /// It is a clone, and its parent is in a pool, of this name, that the user may not read.
    UnreadableParent { pool: String },
    /// Something else.
    Unknown,
}

/// The longest answer of the methods asked here.
const ANSWER: usize = 4096;

impl Pool {
    /// Finds out why the image of that name, or id if that is known, could not be opened.
    pub(crate) fn why_unopened(self: &Arc<Self>, name: &str, id: Option<&str>, error: &CephError) -> Unopened {
        let found = match () {
            () if error.is(Errno::NOENT) => self.what_is_missing(name, id),
            () if error.is(Errno::PERM) || error.is(Errno::ACCESS) => self.unreadable_parent(name, id),
            () => Ok(Unopened::Unknown),
        };
        found.unwrap_or(Unopened::Unknown)
    }

    fn what_is_missing(&self, name: &str, id: Option<&str>) -> Result<Unopened> {
        let listed = || match self.exec("rbd_directory", c"dir_get_id", &text(name), ANSWER) {
            Err(error) if error.is(Errno::NOENT) => Ok(None),
            listed => listed.map(|(answer, _)| read_text(&answer)),
        };
        let id = match id.map(str::to_owned) {
            Some(id) => id,
            None => match self.id_of_name(name)? {
                Some(id) => id,
                None => {
                    let missing = |id| Unopened::Missing { object: format!("rbd_id.{name}"), id };
                    return Ok(listed()?.map_or(Unopened::NoName, missing));
                }
            },
        };
        let object = format!("rbd_header.{id}");
        match self.exec(&object, c"get_size", &HEAD.to_le_bytes(), ANSWER) {
            Err(error) if error.is(Errno::NOENT) => Ok(Unopened::Missing { object, id }),
            _ => Ok(Unopened::Unknown),
        }
    }

    fn unreadable_parent(self: &Arc<Self>, name: &str, id: Option<&str>) -> Result<Unopened> {
        let Some(id) = id.map(str::to_owned).map_or_else(|| self.id_of_name(name), |id| Ok(Some(id)))? else {
            return Ok(Unopened::Unknown);
        };
        let (answer, _) = self.exec(&format!("rbd_header.{id}"), c"parent_get", &[], ANSWER)?;
        let Some((pool_id, namespace, parent)) = read_parent(&answer) else { return Ok(Unopened::Unknown) };
        let cluster = self.cluster();
        let pool = cluster.pool_name(pool_id)?;
        let looked = cluster.pool(&pool, Some(&namespace)).and_then(|of_parent| {
            of_parent.exec(&format!("rbd_header.{parent}"), c"get_size", &HEAD.to_le_bytes(), ANSWER)
        });
        Ok(match looked {
            Err(error) if error.is(Errno::PERM) || error.is(Errno::ACCESS) => Unopened::UnreadableParent { pool },
            _ => Unopened::Unknown,
        })
    }
}

/// `CEPH_NOSNAP`: HEAD, and no snapshot.
const HEAD: u64 = u64::MAX - 1;

/// As Ceph encodes a text: its length in 32 bits, little-endian, and its bytes.
fn text(text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    [&length.to_le_bytes()[..], text.as_bytes()].concat()
}

fn read_text(bytes: &[u8]) -> Option<String> {
    split_text(bytes).map(|(text, _)| text)
}

fn split_text(bytes: &[u8]) -> Option<(String, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (text, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
    Some((String::from_utf8(text.to_vec()).ok()?, rest))
}

/// The pool's id, the namespace and the image's id of a `cls::rbd::ParentImageSpec`: a version, an oldest version and a
/// length precede its fields. Pool −1 stands for no parent.
fn read_parent(bytes: &[u8]) -> Option<(i64, String, String)> {
    let fields = bytes.get(6..)?;
    let (pool, rest) = fields.split_first_chunk::<8>()?;
    let (namespace, rest) = split_text(rest)?;
    let (image, _) = split_text(rest)?;
    let pool = i64::from_le_bytes(*pool);
    (pool >= 0).then_some((pool, namespace, image))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_read_as_ceph_encodes_it() {
        let fields = [&7i64.to_le_bytes()[..], &text(""), &text("1234abcd"), &9u64.to_le_bytes()].concat();
        let length = u32::try_from(fields.len()).unwrap().to_le_bytes();
        let encoded = [&[1, 1][..], &length, &fields].concat();
        assert_eq!(read_parent(&encoded), Some((7, String::new(), "1234abcd".into())));
        for cut in 0..encoded.len() - 8 {
            assert_eq!(read_parent(&encoded[..cut]), None, "cut at {cut}");
        }
        let none = [&[1, 1, 0, 0, 0, 0][..], &(-1i64).to_le_bytes(), &text(""), &text("")].concat();
        assert_eq!(read_parent(&none), None);
    }
}
