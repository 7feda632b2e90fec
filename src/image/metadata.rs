//! The metadata of an image that is not poolshift's: limits (`conf_*`), a CSI driver's wrapped key of an encrypted volume,
//! owners. It belongs to the disk, and goes with it from one side of a volume to the other.
//!
//! What decides is a three-way comparison ([`change`]): of the side that the disk leaves, of the side that it arrives at,
//! and of the keys that both sides had when it was carried last. The values of the side that is left win; a key that was
//! carried and has been removed there since is removed; a key that only the other side ever had stays.
//!
//! Not carried are poolshift's own records (`poolshift.*`) and those of `rbd mirror` (`.rbd_mirror.*`), which belong to the
//! image and not to the disk. Other keys that begin with `.rbd` are carried, although `rbd deep cp` leaves them out: CSI
//! drivers kept wrapped keys under `.rbd.csi.ceph.com/`.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde::Serialize;

/// The longest value that is carried, in bytes.
pub const VALUE_MAX: usize = 1 << 20;

/// The longest record of the keys that both sides have, in bytes.
pub const KNOWN_MAX: usize = 64 << 10;

/// How many keys are named in one sentence.
const NAMED: usize = 12;

const OWN: &str = "poolshift.";
const MIRRORING: &str = ".rbd_mirror.";
const CONFIGURATION: &str = "conf_";
const LIMITS: &str = "conf_rbd_qos_";

/// Why a key is not carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It is a record of `rbd mirror`.
    Mirroring,
    /// Its name is no UTF-8.
    NoText,
    /// Its value is longer than [`VALUE_MAX`].
    TooLong,
}

impl Left {
    fn why(self) -> &'static str {
        match self {
            Self::Mirroring => "rbd mirror's own",
            Self::NoText => "its name is no UTF-8",
            Self::TooLong => "its value is longer than 1 MiB",
        }
    }
}

/// The metadata of an image, without poolshift's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// What is carried: keys and the exact bytes of their values.
    pub carried: BTreeMap<String, Bytes>,
    /// What is not, and why.
    pub left: BTreeMap<String, Left>,
}

impl Metadata {
    /// Sorts all keys of an image, as they are stored.
    pub fn of(pairs: impl IntoIterator<Item = (Vec<u8>, Vec<u8>)>) -> Self {
        let mut metadata = Self::default();
        for (key, value) in pairs {
            let key = match String::from_utf8(key) {
                Ok(key) => key,
                Err(error) => {
                    metadata.left.insert(String::from_utf8_lossy(error.as_bytes()).into_owned(), Left::NoText);
                    continue;
                }
            };
            match () {
                () if key.starts_with(OWN) => {}
                () if key.starts_with(MIRRORING) => drop(metadata.left.insert(key, Left::Mirroring)),
                () if value.len() > VALUE_MAX => drop(metadata.left.insert(key, Left::TooLong)),
                () => drop(metadata.carried.insert(key, value.into())),
            }
        }
        metadata
    }

    /// The keys that are carried.
    pub fn keys(&self) -> BTreeSet<String> {
        self.carried.keys().cloned().collect()
    }

    fn has(&self, key: &str) -> bool {
        self.carried.contains_key(key) || self.left.contains_key(key)
    }
}

/// What is to be changed on the side that a disk arrives at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// What is set.
    pub set: BTreeMap<String, Bytes>,
    /// What is removed.
    pub remove: BTreeSet<String>,
}

impl Change {
    /// Whether nothing is to be changed.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.remove.is_empty()
    }
}

/// What brings `to` what `from` has. `known`: the keys that both had when it was carried last.
pub fn change(from: &Metadata, to: &Metadata, known: &BTreeSet<String>) -> Change {
    let differs = |(key, value): &(&String, &Bytes)| to.carried.get(*key) != Some(*value);
    let set = from.carried.iter().filter(differs).map(|(key, value)| (key.clone(), value.clone()));
    let removed = |key: &&String| known.contains(*key) && !from.has(key);
    Change { set: set.collect(), remove: to.carried.keys().filter(removed).cloned().collect() }
}

/// A key that is lost with an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LostKey {
    /// The key.
    pub key: String,
    /// The length of its value, in bytes; `None` of one that can't be carried.
    pub bytes: Option<usize>,
    /// Whether the image that stays has another value of it.
    pub differs: bool,
}

/// What is lost when `going` is removed and `stays` stays. A key that was carried, and was removed from `stays` since, is
/// none of it.
pub fn lost(going: &Metadata, stays: &Metadata, known: &BTreeSet<String>) -> Vec<LostKey> {
    let carried = going.carried.iter().filter(|(key, value)| match stays.carried.get(*key) {
        Some(other) => other != *value,
        None => stays.left.contains_key(*key) || !known.contains(*key),
    });
    let carried = carried.map(|(key, value)| (key, Some(value.len())));
    let left = going.left.keys().map(|key| (key, None));
    let lost = |(key, bytes): (&String, Option<usize>)| LostKey { key: key.clone(), bytes, differs: stays.has(key) };
    carried.chain(left).map(lost).collect()
}

/// What a person should know before `from` is carried to `to`, where that is there: a sentence each, and whether it is a
/// warning.
pub fn remarks(from: &Metadata, to: Option<&Metadata>) -> Vec<(bool, String)> {
    let mut all = Vec::new();
    if !from.carried.is_empty() {
        all.push((false, format!("its metadata is carried at a cutover: {}", names(from.carried.keys()))));
    }
    let limits: Vec<&String> = from.carried.keys().filter(|key| key.starts_with(LIMITS)).collect();
    if let Some(first) = limits.first() {
        let option = first.trim_start_matches(CONFIGURATION);
        let text = format!(
            "its limits hold on the new pool as well, unless Cinder gives it those of its volume type: {}; to have others \
             there, set them after the cutover: rbd config image set POOL/IMAGE {option} VALUE",
            names(limits.iter().copied())
        );
        all.push((true, text));
    }
    let replaced = |key: &&String| to.and_then(|to| to.carried.get(*key)).is_some_and(|to| *to != from.carried[*key]);
    let replaced: Vec<&String> = from.carried.keys().filter(replaced).collect();
    if !replaced.is_empty() {
        let text = format!("its values replace those that the other image has: {}", names(replaced.into_iter()));
        all.push((true, text));
    }
    if !from.left.is_empty() {
        let each: Vec<String> = from.left.iter().map(|(key, left)| format!("{key} ({})", left.why())).collect();
        all.push((true, format!("of its metadata is NOT carried: {}", names(each.iter()))));
    }
    all
}

fn names<'a>(all: impl ExactSizeIterator<Item = &'a String>) -> String {
    let more = all.len().saturating_sub(NAMED);
    let named: Vec<&str> = all.take(NAMED).map(String::as_str).collect();
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", named.join(", "))
}

/// The record of the keys that both sides have: those that fit into [`KNOWN_MAX`]. One that does not and is removed on
/// one side stays on the other.
pub fn render_known(keys: &BTreeSet<String>) -> Option<String> {
    let mut room = KNOWN_MAX - 2;
    let fits = |key: &&String| {
        // Each byte may be escaped, as `\u0000`.
        let length = serde_json::to_string(key).map_or(usize::MAX, |text| text.len() + 1);
        let fits = length <= room;
        room -= if fits { length } else { 0 };
        fits
    };
    let keys: Vec<&String> = keys.iter().filter(fits).collect();
    Some(serde_json::to_string(&keys).ok()?).filter(|_| !keys.is_empty())
}

/// Reads such a record. One that is damaged names nothing: then nothing is removed.
pub fn parse_known(text: Option<&str>) -> BTreeSet<String> {
    let Some(text) = text else { return BTreeSet::new() };
    serde_json::from_str(text).unwrap_or_else(|error| {
        tracing::warn!(%error, "the record of the metadata that was carried can't be read");
        BTreeSet::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(pairs: &[(&str, &str)]) -> Metadata {
        Metadata::of(pairs.iter().map(|(key, value)| (key.as_bytes().to_vec(), value.as_bytes().to_vec())))
    }

    fn known(keys: &[&str]) -> BTreeSet<String> {
        keys.iter().map(ToString::to_string).collect()
    }

    fn changed(set: &[(&str, &str)], remove: &[&str]) -> Change {
        let set = set.iter().map(|(key, value)| (key.to_string(), Bytes::copy_from_slice(value.as_bytes())));
        Change { set: set.collect(), remove: known(remove) }
    }

    #[test]
    fn the_side_that_is_left_wins_and_what_only_the_other_ever_had_stays() {
        let from =
            metadata(&[("conf_rbd_qos_bps_limit", "1"), ("owner", "a"), ("same", "s"), ("poolshift.state", "{}")]);
        let to = metadata(&[("owner", "b"), ("same", "s"), ("theirs", "t"), ("gone", "g"), ("poolshift.state", "[]")]);
        let set = [("conf_rbd_qos_bps_limit", "1"), ("owner", "a")];
        assert_eq!(change(&from, &to, &known(&[])), changed(&set, &[]));
        assert_eq!(change(&from, &to, &known(&["gone", "owner", "never"])), changed(&set, &["gone"]));
        assert!(change(&from, &from, &from.keys()).is_empty());
    }

    #[test]
    fn it_can_be_repeated_and_reversed() {
        let (mut from, mut to) = (metadata(&[("a", "1"), ("b", "2")]), metadata(&[("b", "0"), ("own", "x")]));
        let apply = |to: &mut Metadata, change: Change| {
            to.carried.extend(change.set);
            to.carried.retain(|key, _| !change.remove.contains(key));
        };
        let there = change(&from, &to, &known(&[]));
        apply(&mut to, there);
        assert!(change(&from, &to, &from.keys()).is_empty());
        // Where it runs now, one is removed and one is changed: back with both.
        let both = from.keys();
        to.carried.remove("a");
        to.carried.insert("b".into(), Bytes::from_static(b"3"));
        let back = change(&to, &from, &both);
        apply(&mut from, back);
        assert_eq!(from, to);
    }

    #[test]
    fn a_wrapped_key_is_carried_to_the_byte_and_what_is_mirrorings_stays() {
        let large = vec![0; VALUE_MAX + 1];
        let pairs = [
            (b".rbd.csi.ceph.com/dek".to_vec(), vec![0, 255, 10]),
            (b".rbd_mirror.4f2c".to_vec(), b"{}".to_vec()),
            (b"large".to_vec(), large),
            (b"odd\xff".to_vec(), b"v".to_vec()),
        ];
        let from = Metadata::of(pairs);
        assert_eq!(from.carried, [(".rbd.csi.ceph.com/dek".to_owned(), Bytes::from_static(&[0, 255, 10]))].into());
        assert_eq!(from.left.len(), 3);
        // What can't be carried was not removed.
        let to = metadata(&[("large", "small before")]);
        assert!(change(&from, &to, &known(&["large"])).remove.is_empty());
        let told = remarks(&from, Some(&to));
        assert!(told.iter().any(|(warning, text)| *warning && text.contains("large (its value is longer than 1 MiB)")));
    }

    #[test]
    fn what_is_lost_is_what_nobody_removed() {
        let going = metadata(&[("a", "1"), ("changed", "1"), ("since", "2"), ("removed", "3")]);
        let stays = metadata(&[("a", "1"), ("changed", "0"), ("own", "x")]);
        let lost = lost(&going, &stays, &known(&["a", "changed", "removed"]));
        let found: Vec<_> = lost.iter().map(|lost| (lost.key.as_str(), lost.bytes, lost.differs)).collect();
        assert_eq!(found, [("changed", Some(1), true), ("since", Some(1), false)]);
    }

    #[test]
    fn limits_and_replaced_values_are_named() {
        let from = metadata(&[("conf_rbd_qos_bps_limit", "1"), ("owner", "a")]);
        let told = remarks(&from, Some(&metadata(&[("owner", "b")])));
        let text = told.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>().join("\n");
        assert!(
            text.contains("rbd_qos_bps_limit VALUE") && text.contains("replace those that the other image has: owner")
        );
        assert!(remarks(&Metadata::default(), Some(&from)).is_empty());
    }

    #[test]
    fn the_record_is_bounded() {
        let few = known(&["a", "\u{0}"]);
        assert_eq!(parse_known(render_known(&few).as_deref()), few);
        let many: BTreeSet<String> = (0..2000).map(|number| format!("{number:0>64}")).collect();
        let text = render_known(&many).unwrap();
        assert!(text.len() <= KNOWN_MAX && text.len() > KNOWN_MAX - 200);
        assert!(parse_known(Some(&text)).is_subset(&many) && parse_known(Some("{")).is_empty());
        assert_eq!(render_known(&BTreeSet::new()), None);
    }
}
