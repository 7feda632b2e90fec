//! An image's metadata, on its header object itself, by the methods of the class `rbd` (`cls/rbd/cls_rbd.cc`): values are
//! bytes there, where librbd's C functions end them at the first NUL. The image need not be opened, and nobody is asked
//! for its lock: a server may be using it.

use rustix::io::Errno;

use super::{CephError, Pool, Result};

const FUNCTION: &str = "rados_exec";
/// More than methods answer that only change something.
const ANSWER: usize = 4096;
/// How many keys are asked for at a time, and how many bytes they may have. What has more is read key by key.
const PAGE: (u64, usize) = (16, 1 << 20);
/// The same for one key.
const ONE: (u64, usize) = (1, 16 << 20);
/// What all of it may have, in bytes.
const MOST: usize = 64 << 20;

/// A key and its value, both any bytes.
pub(crate) type Pair = (Vec<u8>, Vec<u8>);

impl Pool {
    /// All keys of the image with this id, in their order, with the exact bytes of their values. Blocks.
    ///
    /// ERANGE where one value has more than 16 MiB, or all together more than 64 MiB.
    pub(crate) fn image_metadata(&self, image: &str) -> Result<Vec<Pair>> {
        let header = format!("rbd_header.{image}");
        let page = |after: &[u8], (keys, capacity): (u64, usize)| {
            let mut input = Vec::new();
            encode(after, &mut input)?;
            input.extend(keys.to_le_bytes());
            decode(&self.exec(&header, c"metadata_list", &input, capacity)?.0)
        };
        let mut all: Vec<Pair> = Vec::new();
        let mut total = 0;
        loop {
            let after = all.last().map(|(key, _)| key.clone()).unwrap_or_default();
            let pairs = match page(&after, PAGE) {
                Err(error) if error.is(Errno::RANGE) => page(&after, ONE)?,
                pairs => pairs?,
            };
            if pairs.is_empty() {
                return Ok(all);
            }
            // An answer that repeats itself would never end, and a part of it must not pass for the whole.
            if pairs.iter().any(|(key, _)| !all.is_empty() && *key <= after) {
                return Err(CephError::Nonsense {
                    function: FUNCTION,
                    what: "keys of metadata that it had given".into(),
                });
            }
            total += pairs.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>();
            if total > MOST {
                return Err(CephError::Call { function: FUNCTION, errno: Errno::RANGE.raw_os_error() });
            }
            all.extend(pairs);
        }
    }

    /// Sets, or with `None` removes, a key of an image's metadata. Removing what isn't there is no error. Blocks.
    pub(crate) fn set_image_metadata(
        &self,
        image: &str,
        key: &str,
        value: Option<&(impl AsRef<[u8]> + ?Sized)>,
    ) -> Result<()> {
        let header = format!("rbd_header.{image}");
        let mut input = Vec::new();
        let Some(value) = value else {
            encode(key.as_bytes(), &mut input)?;
            return match self.exec(&header, c"metadata_remove", &input, ANSWER) {
                Err(error) if !error.is(Errno::NOENT) => Err(error),
                _ => Ok(()),
            };
        };
        input.extend(1u32.to_le_bytes());
        encode(key.as_bytes(), &mut input)?;
        encode(value.as_ref(), &mut input)?;
        self.exec(&header, c"metadata_set", &input, ANSWER).map(drop)
    }

    /// The id of the `rbd group` that the image with this id is a member of. Blocks.
    pub(crate) fn group_of_image(&self, image: &str) -> Result<Option<String>> {
        let (answer, _) = self.exec(&format!("rbd_header.{image}"), c"image_group_get", &[], ANSWER)?;
        // A `GroupSpec`: two bytes of versions, its length, the pool's id, the group's.
        let mut rest = answer.get(14..).unwrap_or_default();
        let id = take(&mut rest).ok_or_else(|| nonsense(answer.len()))?;
        Ok(Some(String::from_utf8_lossy(id).into_owned()).filter(|id| !id.is_empty()))
    }
}

/// As Ceph encodes texts: a length of 32 bits, little-endian, and the bytes.
fn encode(text: &[u8], into: &mut Vec<u8>) -> Result<()> {
    let long = |_| CephError::Nonsense { function: FUNCTION, what: "a text of over 4 GiB".into() };
    into.extend(u32::try_from(text.len()).map_err(long)?.to_le_bytes());
    into.extend(text);
    Ok(())
}

fn number(rest: &mut &[u8]) -> Option<usize> {
    let (number, behind) = rest.split_first_chunk::<4>()?;
    *rest = behind;
    usize::try_from(u32::from_le_bytes(*number)).ok()
}

fn take<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = number(rest)?;
    let (text, behind) = rest.split_at_checked(length)?;
    *rest = behind;
    Some(text)
}

fn nonsense(length: usize) -> CephError {
    CephError::Nonsense { function: FUNCTION, what: format!("{length} bytes that are cut, or no metadata") }
}

/// A map of texts to bytes: their number, then each key and its value.
fn decode(answer: &[u8]) -> Result<Vec<Pair>> {
    let mut rest = answer;
    let mut pairs = Vec::new();
    let count = number(&mut rest).ok_or_else(|| nonsense(answer.len()))?;
    for _ in 0..count {
        let (key, value) = take(&mut rest).zip(take(&mut rest)).ok_or_else(|| nonsense(answer.len()))?;
        pairs.push((key.to_vec(), value.to_vec()));
    }
    if rest.is_empty() { Ok(pairs) } else { Err(nonsense(answer.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_to_the_byte_or_refused() {
        let pairs = vec![(b"a".to_vec(), vec![0, 255, 0]), (b"b\xff".to_vec(), Vec::new())];
        let mut answer = 2u32.to_le_bytes().to_vec();
        for (key, value) in &pairs {
            encode(key, &mut answer).unwrap();
            encode(value, &mut answer).unwrap();
        }
        assert_eq!(decode(&answer).unwrap(), pairs);
        assert!((0..answer.len()).all(|cut| decode(&answer[..cut]).is_err()));
        assert!(decode(&[&answer[..], &[0]].concat()).is_err());
        assert!(decode(&u32::MAX.to_le_bytes()).is_err());
    }
}
