//! An image's object maps, as they are on the OSDs.
//!
//! librbd keeps one for HEAD, in the object `rbd_object_map.ID` of the image's own pool and namespace (not of its data
//! pool), and one a snapshot, in `rbd_object_map.ID.SNAPSHOT` with the snapshot's id as 16 hexadecimal digits
//! (`ObjectMap::object_map_name` of librbd 16.2). They are read with the method `object_map_load` of the class `rbd`, as
//! librbd itself does: one operation, which the OSD runs whole or not at all, and which needs no other rights. The class
//! holds the stored map against its CRCs before it answers; the answer has none.
//!
//! The answer is a `ceph::BitVector<2>` (`common/bit_vector.hpp`), integers little-endian:
//!
//! | bytes        | what                                                                      |
//! |--------------|---------------------------------------------------------------------------|
//! | 4            | the header's length: 14                                                   |
//! | 1, 1, 4      | the header's version, the oldest one it is compatible with (both 1), and the length of the rest: 8 |
//! | 8            | the number of objects                                                     |
//! | ⌈objects / 4⌉ | two bits an object, the first in the most significant ones               |
//! | 4            | the footer's length: 0, because there are no CRCs                         |

use std::ffi::CStr;
use std::sync::PoisonError;

use rustix::io::Errno;

use super::library::library;
use super::{CephError, Pool, Result, c_string, check};

/// What the two bits of an object say: `OBJECT_*` of `include/rbd/object_map_types.h`.
#[cfg(test)]
pub(crate) mod state {
    /// There is no such object.
    pub(crate) const NONEXISTENT: u8 = 0;
    /// It is there, and may have been written since the last snapshot.
    pub(crate) const EXISTS: u8 = 1;
    /// It is being removed.
    pub(crate) const PENDING: u8 = 2;
    /// It is there, and is as it is in the last snapshot.
    pub(crate) const EXISTS_CLEAN: u8 = 3;
}

/// The most objects that an object map has: `MAX_OBJECT_MAP_OBJECT_COUNT` of `cls/rbd/cls_rbd_types.h`. 61 MiB.
const OBJECTS_MAX: u64 = 256_000_000;
/// What stands in front of the number of objects.
const HEADER: [u8; 10] = [14, 0, 0, 0, 1, 1, 8, 0, 0, 0];
/// What stands behind the states.
const FOOTER: [u8; 4] = [0; 4];
/// By how many objects a map may be larger than the image, as while this is resized.
const SURPLUS: u64 = 64 << 10;

/// How each of an image's objects is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ObjectMap {
    /// As [`Self::into_states`] says.
    states: Vec<u8>,
}

impl ObjectMap {
    /// The states, four a byte, the first in the most significant bits; those behind the last object are 0.
    pub(crate) fn into_states(self) -> Vec<u8> {
        self.states
    }

    #[cfg(test)]
    pub(crate) fn of(states: &[u8]) -> Self {
        let pack = |four: &[u8]| four.iter().enumerate().fold(0, |byte, (i, &state)| byte | state << (6 - 2 * i));
        Self { states: states.chunks(4).map(pack).collect() }
    }

    /// Reads the answer of the class, of which the first `objects` count.
    fn decode(mut encoded: Vec<u8>, objects: u64) -> Result<Self> {
        let nonsense = |what: String| Err(CephError::Nonsense { function: "rados_exec", what });
        let number = encoded.strip_prefix(&HEADER).and_then(|rest| rest.first_chunk::<8>());
        let Some(known) = number.map(|bytes| u64::from_le_bytes(*bytes)) else {
            return nonsense(format!("an object map of {} bytes with an unknown header", encoded.len()));
        };
        if known < objects || known > OBJECTS_MAX {
            return nonsense(format!("an object map of {known} objects for {objects}"));
        }
        let (start, length) = (HEADER.len() + 8, bytes_of(known));
        if encoded.len() != start + length + FOOTER.len() || !encoded.ends_with(&FOOTER) {
            return nonsense(format!("an object map of {} bytes for {known} objects", encoded.len()));
        }
        encoded.truncate(start + bytes_of(objects));
        encoded.drain(..start);
        // What a larger map says of the objects behind the end.
        if let Some(last) = encoded.last_mut().filter(|_| !objects.is_multiple_of(4)) {
            *last &= !(0xff >> (2 * (objects % 4)));
        }
        Ok(Self { states: encoded })
    }
}

/// How many bytes the states of so many objects take. At most [`OBJECTS_MAX`] are asked for, and a little.
fn bytes_of(objects: u64) -> usize {
    objects.div_ceil(4) as usize
}

const FUNCTION: &str = "rados_exec";
/// The most bytes that a snapshot context takes: 131,000 snapshots, many more than an image can have.
const SNAPSHOTS_MAX: usize = 1 << 20;

impl Pool {
    /// The object map of HEAD, or of a snapshot, of the image with this id, which has so many objects. Blocks.
    ///
    /// ENOENT without one; ERANGE if it is much larger than the image, or this too large for an object map at all.
    pub(crate) fn object_map(&self, image: &str, snapshot: Option<u64>, objects: u64) -> Result<ObjectMap> {
        if objects > OBJECTS_MAX {
            return Err(CephError::Call { function: FUNCTION, errno: Errno::RANGE.raw_os_error() });
        }
        let object = match snapshot {
            None => format!("rbd_object_map.{image}"),
            Some(id) => format!("rbd_object_map.{image}.{id:016x}"),
        };
        let capacity = HEADER.len() + 8 + bytes_of(objects + SURPLUS) + FOOTER.len();
        ObjectMap::decode(self.exec(&object, c"object_map_load", &[], capacity)?.0, objects)
    }

    /// The highest id of any snapshot that the image with this id ever had, also of one that has gone: the first number of
    /// what `get_snapcontext` of the class `rbd` answers (`cls/rbd/cls_rbd.cc`), which grows with every snapshot and never
    /// shrinks. Blocks.
    pub(crate) fn snapshot_sequence(&self, image: &str) -> Result<u64> {
        // Behind it are as many ids as there are snapshots.
        let (answer, _) = self.exec(&format!("rbd_header.{image}"), c"get_snapcontext", &[], SNAPSHOTS_MAX)?;
        let sequence = answer.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
        sequence.ok_or_else(|| CephError::Nonsense {
            function: FUNCTION,
            what: format!("a snapshot context of {} bytes", answer.len()),
        })
    }

    /// The versions of an image's header and of HEAD's object map, unless that names an object which was written since the
    /// last snapshot, or can't be had. Blocks.
    ///
    /// As long as both stay the same nothing was written to HEAD, and no snapshot came or went: librbd stores that an
    /// object is written in the map before it writes it (`object_map/UpdateRequest.cc`), but only where the map doesn't say
    /// so yet; size, snapshots, features and flags are in the header. Watching an image changes no version
    /// (`PrimaryLogPG::do_osd_ops`).
    pub(crate) fn quiet_versions(&self, image: &str) -> Result<Option<(u64, u64)>> {
        let (_, header) = self.exec(&format!("rbd_header.{image}"), c"get_snapcontext", &[], SNAPSHOTS_MAX)?;
        let object = format!("rbd_object_map.{image}");
        // Sizes for 2, 32 and 1024 TiB of 4 MiB objects: what is too small costs a request.
        for capacity in [128 << 10, 2 << 20, 62 << 20] {
            let out_of_space = |error: &CephError| error.is(Errno::RANGE);
            match self.exec(&object, c"object_map_load", &[], capacity + HEADER.len() + 8 + FOOTER.len()) {
                Ok((map, version)) => return Ok(is_quiet(&map).then_some((header, version))),
                Err(error) if out_of_space(&error) => {}
                Err(error) if error.is(Errno::NOENT) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// What a method of the class `rbd` answers for an object, given its encoded arguments: at most `capacity` bytes, or
    /// ERANGE; and that object's version.
    pub(super) fn exec(&self, object: &str, method: &CStr, input: &[u8], capacity: usize) -> Result<(Vec<u8>, u64)> {
        let object = c_string(object)?;
        let _last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let mut answer = vec![0; capacity];
        // SAFETY: the handle is valid, the three names end with NUL, and both buffers are as long as said.
        let length = unsafe {
            (library()?.rados.rados_exec)(
                self.raw.0,
                object.as_ptr(),
                c"rbd".as_ptr(),
                method.as_ptr(),
                input.as_ptr().cast(),
                input.len(),
                answer.as_mut_ptr().cast(),
                answer.len(),
            )
        };
        let length = usize::try_from(check(FUNCTION, length)?).unwrap_or(usize::MAX);
        // SAFETY: the handle is valid.
        let version = unsafe { (library()?.rados.rados_get_last_version)(self.raw.0) };
        if length > answer.len() {
            return Err(CephError::Nonsense { function: FUNCTION, what: format!("an answer of {length} bytes") });
        }
        answer.truncate(length);
        Ok((answer, version))
    }
}

/// Whether no object of an encoded map was written since the last snapshot, or is being removed.
fn is_quiet(encoded: &[u8]) -> bool {
    let known = encoded.strip_prefix(&HEADER).and_then(|rest| rest.split_first_chunk::<8>());
    let Some((objects, states)) = known else { return false };
    let Some(states) = states.strip_suffix(&FOOTER) else { return false };
    // NONEXISTENT is 0 and EXISTS_CLEAN 3: the two bits of each are the same.
    u64::from_le_bytes(*objects).div_ceil(4) == states.len() as u64
        && states.iter().all(|four| (four ^ four >> 1) & 0b0101_0101 == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(states: &[u8]) -> Vec<u8> {
        let size = states.len() as u64;
        [&HEADER[..], &size.to_le_bytes(), &ObjectMap::of(states).states, &FOOTER].concat()
    }

    /// What an OSD of 16.2.15 answers: 0 and 5 of 6 objects were written, the snapshot made, and 1 written.
    #[test]
    fn the_answers_of_a_real_osd() {
        let head = hex::decode("0e0000000101080000000600000000000000d03000000000").unwrap();
        let snapshot = hex::decode("0e0000000101080000000600000000000000401000000000").unwrap();
        let (exists, clean) = (state::EXISTS, state::EXISTS_CLEAN);
        assert_eq!(ObjectMap::decode(head, 6).unwrap(), ObjectMap::of(&[clean, exists, 0, 0, 0, clean]));
        assert_eq!(ObjectMap::decode(snapshot, 6).unwrap(), ObjectMap::of(&[exists, 0, 0, 0, 0, exists]));
    }

    #[test]
    fn a_map_is_quiet_when_nothing_is_dirty_or_going() {
        for count in 0..9 {
            let states: Vec<u8> =
                (0..count).map(|at| if at % 3 == 0 { state::NONEXISTENT } else { state::EXISTS_CLEAN }).collect();
            assert!(is_quiet(&encoded(&states)));
            for (at, loud) in (0..count).flat_map(|at| [(at, state::EXISTS), (at, state::PENDING)]) {
                let mut states = states.clone();
                states[at] = loud;
                assert!(!is_quiet(&encoded(&states)), "{loud} at {at} of {count}");
            }
        }
        let good = encoded(&[3, 0, 3, 3, 3]);
        assert!((0..good.len()).all(|cut| !is_quiet(&good[..cut])));
    }

    #[test]
    fn what_stands_behind_the_image_does_not_count() {
        let all = [1, 2, 3, 1, 2, 3, 1, 2, 3];
        for objects in 0..=all.len() {
            let decoded = ObjectMap::decode(encoded(&all), objects as u64).unwrap();
            assert_eq!(decoded, ObjectMap::of(&all[..objects]), "{objects}");
        }
        assert!(ObjectMap::decode(encoded(&all), 10).is_err());
    }

    #[test]
    fn an_answer_that_is_cut_longer_or_changed_in_its_frame_is_refused() {
        let good = encoded(&[1, 0, 3, 2, 1]);
        assert!(ObjectMap::decode(good.clone(), 5).is_ok());
        for cut in 0..good.len() {
            assert!(ObjectMap::decode(good[..cut].to_vec(), 0).is_err(), "{cut}");
        }
        assert!(ObjectMap::decode([&good[..], &[0]].concat(), 5).is_err());
        let frame = (0..18).chain(20..24);
        for (at, bit) in frame.flat_map(|at| (0..8).map(move |bit| (at, bit))) {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            // As many objects as fit the same bytes can't be told apart: there are 5 of at most 8.
            let fits = at == 10 && (5..=8).contains(&bad[at]);
            assert_eq!(ObjectMap::decode(bad, 5).is_ok(), fits, "bit {bit} of byte {at}");
        }
        let mut huge = good;
        huge[10..18].fill(0xff);
        assert!(ObjectMap::decode(huge, 5).is_err());
    }
}
