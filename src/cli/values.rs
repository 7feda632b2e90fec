//! Values of the command line which are more than text: checked once, here, and trusted from then on.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use crate::plan::values::parse_size;

/// The longest snapshot name, in bytes: what a file system allows for a name, and well below what RBD takes.
pub const SNAPSHOT_NAME_MAX: usize = 255;

/// A snapshot's name that every backend and every stream can carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotName(String);

impl SnapshotName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is no snapshot name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It is empty.
    #[error("a snapshot's name can't be empty")]
    Empty,
    /// It is longer than [`SNAPSHOT_NAME_MAX`].
    #[error("a snapshot's name has at most {SNAPSHOT_NAME_MAX} bytes, this one has {0}")]
    TooLong(usize),
    /// It has a character that means something else in an image's location, or can't be shown.
    #[error("a snapshot's name can't contain {0:?}")]
    Character(char),
}

impl FromStr for SnapshotName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > SNAPSHOT_NAME_MAX {
            return Err(NameError::TooLong(text.len()));
        }
        match text.chars().find(|&c| c.is_control() || matches!(c, '/' | '@')) {
            Some(character) => Err(NameError::Character(character)),
            None => Ok(Self(text.to_owned())),
        }
    }
}

/// Parses a rate in bytes a second: a size, and not 0.
pub fn parse_rate(text: &str) -> Result<NonZeroU64, String> {
    NonZeroU64::new(parse_size(text)?)
        .ok_or_else(|| "a rate of 0 would never end; leave it out for no limit".to_owned())
}

/// Parses the budget of bytes in flight: 16 MiB to 1 GiB.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        size @ 0x100_0000..=0x4000_0000 => Ok(size),
        _ => Err("the budget must be from 16M to 1G".into()),
    }
}

/// Parses an RBD object size: a power of two from 4 KiB to 32 MiB, as `rbd create --object-size` takes it.
pub fn parse_object_size(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        size @ 0x1000..=0x200_0000 if size.is_power_of_two() => Ok(size),
        _ => Err("an object size is a power of two from 4K to 32M".into()),
    }
}

/// Parses the size of the demonstration's disk: 8 MiB to 64 GiB.
pub fn parse_demo_size(text: &str) -> Result<u64, String> {
    match parse_size(text)? {
        size @ 0x80_0000..=0x10_0000_0000 => Ok(size),
        _ => Err("the demonstration's disk has 8M to 64G".into()),
    }
}

/// Where RBD images are: a pool, and perhaps a namespace in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolName {
    /// The pool.
    pub pool: String,
    /// The namespace; `None` for the default one.
    pub namespace: Option<String>,
}

impl FromStr for PoolName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.strip_prefix("rbd:").unwrap_or(text).split('/').collect();
        let (pool, namespace) = match parts[..] {
            [pool] => (pool, None),
            [pool, namespace] => (pool, Some(namespace)),
            _ => return Err("write rbd:POOL or rbd:POOL/NAMESPACE".into()),
        };
        if parts.iter().any(|part| part.is_empty() || part.contains(|c: char| c.is_control() || c == '@' || c == ':')) {
            return Err("write rbd:POOL or rbd:POOL/NAMESPACE".into());
        }
        Ok(Self { pool: pool.to_owned(), namespace: namespace.map(str::to_owned) })
    }
}

impl fmt::Display for PoolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rbd:{}", self.pool)?;
        self.namespace.as_ref().map_or(Ok(()), |namespace| write!(f, "/{namespace}"))
    }
}

/// A limit of a rate; `None` is `unlimited`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit(pub Option<NonZeroU64>);

/// Parses a limit of bytes a second: a size that is not 0, or `unlimited`.
pub fn parse_bytes_limit(text: &str) -> Result<Limit, String> {
    limit(text, parse_size)
}

/// Parses a limit of requests a second: a number that is not 0, or `unlimited`.
pub fn parse_operations_limit(text: &str) -> Result<Limit, String> {
    limit(text, |text| text.parse().map_err(|_| "write a whole number, or unlimited".to_owned()))
}

fn limit(text: &str, number: impl Fn(&str) -> Result<u64, String>) -> Result<Limit, String> {
    if text == "unlimited" {
        return Ok(Limit(None));
    }
    let limit = NonZeroU64::new(number(text)?);
    limit.map(Some).map(Limit).ok_or_else(|| "0 would stop everything: use poolshift pause for that".to_owned())
}

/// Parses a Ceph user: `name` or `client.name`; the result is the name alone.
pub fn parse_ceph_user(text: &str) -> Result<String, String> {
    let name = text.strip_prefix("client.").unwrap_or(text);
    if name.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err("a Ceph user is written name or client.name, without blanks".into());
    }
    if name.is_empty() && !text.is_empty() {
        return Err("a name must follow client.".into());
    }
    Ok(name.to_owned())
}

/// A number of bytes for people: `0 B`, `512 B`, `1.5 MiB`.
pub fn human_bytes(bytes: u64) -> String {
    bytesize::ByteSize::b(bytes).display().iec().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshot_names_that_would_mean_something_else_are_refused() {
        assert_eq!("nightly-2026.11.23 a".parse::<SnapshotName>().unwrap().as_str(), "nightly-2026.11.23 a");
        assert_eq!("ä".repeat(127).parse::<SnapshotName>().unwrap().as_str().len(), 254);
        assert_eq!("".parse::<SnapshotName>(), Err(NameError::Empty));
        assert_eq!("ä".repeat(128).parse::<SnapshotName>(), Err(NameError::TooLong(256)));
        for (text, c) in [("a/b", '/'), ("a@b", '@'), ("a\nb", '\n'), ("\0", '\0'), ("a\u{85}", '\u{85}')] {
            assert_eq!(text.parse::<SnapshotName>(), Err(NameError::Character(c)));
        }
    }

    #[test]
    fn sizes_have_their_bounds() {
        assert_eq!(parse_memory("16M"), Ok(16 << 20));
        assert_eq!(parse_memory("1G"), Ok(1 << 30));
        assert!(parse_memory("16777215").is_err() && parse_memory("1073741825").is_err());
        assert_eq!(parse_object_size("32M"), Ok(32 << 20));
        assert!(
            parse_object_size("3M").is_err() && parse_object_size("64M").is_err() && parse_object_size("2K").is_err()
        );
    }

    #[test]
    fn a_limit_is_a_number_or_unlimited() {
        assert_eq!(parse_bytes_limit("64M"), Ok(Limit(NonZeroU64::new(64 << 20))));
        assert_eq!(parse_operations_limit("200"), Ok(Limit(NonZeroU64::new(200))));
        assert_eq!(
            [parse_bytes_limit("unlimited"), parse_operations_limit("unlimited")],
            [Ok(Limit(None)), Ok(Limit(None))]
        );
        for text in ["0", "", "none", "-1"] {
            assert!(parse_bytes_limit(text).is_err() && parse_operations_limit(text).is_err(), "{text}");
        }
        assert!(parse_operations_limit("1K").is_err());
    }

    #[test]
    fn a_ceph_user_is_named_with_or_without_client() {
        assert_eq!(parse_ceph_user("client.poolshift").as_deref(), Ok("poolshift"));
        assert_eq!(parse_ceph_user("poolshift").as_deref(), Ok("poolshift"));
        assert_eq!(parse_ceph_user("").as_deref(), Ok(""));
        assert!(parse_ceph_user("client.").is_err() && parse_ceph_user("a b").is_err());
    }

    #[test]
    fn pools_are_named_with_or_without_their_scheme() {
        for (text, shown) in [("sata", "rbd:sata"), ("rbd:sata", "rbd:sata"), ("rbd:sata/tenant", "rbd:sata/tenant")] {
            assert_eq!(text.parse::<PoolName>().unwrap().to_string(), shown);
        }
        for text in ["", "rbd:", "a/b/c", "a/", "/a", "file:/a", "a@b"] {
            assert!(text.parse::<PoolName>().is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_are_told_in_powers_of_1024() {
        let told: Vec<_> = [0, 512, 1536, 4 << 20, 5 << 30].into_iter().map(human_bytes).collect();
        assert_eq!(told, ["0 B", "512 B", "1.5 KiB", "4.0 MiB", "5.0 GiB"]);
    }
}
