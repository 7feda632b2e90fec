//! What differs between two points: the object map's answer, and the exact one. Everything here blocks.
//!
//! Facts of librbd 16.2 that shape this code:
//!
//! - A read-only handle has no watch: it knows the snapshots that there were when it was opened. An object map diff
//!   that misses a snapshot in between omits what was written before it, so each one starts from a fresh handle, and
//!   the list is looked at again afterwards.
//! - librbd checks the invalid flags of some of the maps only; all are checked here.
//! - An object map diff forgets what it found behind the end of the smallest map on its way: of an image that shrank,
//!   was snapshotted, and grew again, it reports neither the old bytes that went, nor the zeroes in their place (seen
//!   with 16.2.15). That part always counts as changed.
//! - `rbd snap rollback` sets HEAD's object map to a copy of the older snapshot's, and no flag: an object that was clean
//!   there is clean in the next snapshot too, as if it were as it is in the snapshots between (seen with 16.2.15). See
//!   [`rolled_back`].
//!   A rollback that was killed half-way, or failed, leaves the older map with objects that are not turned back yet, which
//!   nothing tells either.
//! - What is acknowledged to a writer may be in no map and no object yet: with journaling, in the journal of a host that
//!   crashed; with a persistent write-back cache, on the host. Until somebody opens the image for writing, which replays
//!   it, "nothing has changed" speaks of what has reached the image, as a snapshot made now would.
//! - A snapshot that is being removed first moves to the trash namespace, then loses its object map (whose dirty objects
//!   the next one inherits), and is gone about a second later; in between its map counts as invalid.
//! - With striping v2 a whole-object diff reports offsets within the object as if they were the image's (ceph#44483),
//!   which still lie in the right period; with ranges that begin within an object both kinds of diff have been wrong.
//!   So everything is asked for, and reported, in whole periods of the layout, and clipped afterwards.
//! - An object map diff costs CPU for every object of the image. poolshift reads and compares the maps itself, see
//!   [`object_map`]; librbd is asked where it can't.

use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::Inner;
use super::object_map::{self, Path};
use crate::ceph::{self, CephError, Collected, DiffRange, Features, Image, OpenMode, SnapInfo};
use crate::extent::{ByteRange, Extent, normalize, normalize_extents};
use crate::image::{ChangedObjects, Layout, Point, Snapshot};

/// The most runs that an object map diff keeps: 96 MiB of them, for an image of at least 32 TiB.
const RUNS_MAX: usize = 4 << 20;
/// The most extents that one window of an exact diff keeps; beyond, the window counts as changed as a whole.
const EXTENTS_MAX: usize = 1 << 20;
/// How many objects one window of an exact diff has.
const WINDOW_OBJECTS: u64 = 4096;
/// How often a diff is begun anew when snapshots come or go meanwhile.
const ATTEMPTS: u32 = 5;
/// How long a snapshot may take to go once its object map has gone: it waits for the monitors, up to a second.
const REMOVAL: Duration = Duration::from_secs(4);
/// The pause between two looks whether it has gone.
const REMOVAL_POLL: Duration = Duration::from_millis(200);

/// What the first level finds.
pub(super) enum Compared {
    /// All differences lie in these two, each sorted and disjoint, of whole objects.
    Runs {
        /// What the object maps say.
        changed: Vec<ByteRange>,
        /// What else may differ, if the image was rolled back in between; empty unless there are older snapshots.
        doubtful: Vec<ByteRange>,
    },
    /// As [`ChangedObjects::Unavailable`].
    Unavailable { reason: String, cure: Option<String> },
}

impl From<Compared> for ChangedObjects {
    fn from(compared: Compared) -> Self {
        match compared {
            Compared::Runs { changed, doubtful } => {
                Self::Runs(normalize(changed.into_iter().chain(doubtful).collect()))
            }
            Compared::Unavailable { reason, cure } => Self::Unavailable { reason, cure },
        }
    }
}

/// The first level: [`crate::image::View::changed_objects`], up to `size`.
pub(super) fn compare(inner: &Inner, point: &Point, since: Option<&Snapshot>, size: u64) -> ceph::Result<Compared> {
    let (mut attempts, mut going) = (0, None);
    while attempts < ATTEMPTS {
        match attempt(inner, point, since, size) {
            Ok(Attempt::Done(answer)) => return Ok(answer),
            Ok(Attempt::Going { snapshot, unavailable }) => {
                let begun = going.filter(|(seen, _)| *seen == snapshot).map_or_else(Instant::now, |(_, begun)| begun);
                if begun.elapsed() >= REMOVAL {
                    return Ok(unavailable);
                }
                going = Some((snapshot, begun));
                std::thread::sleep(REMOVAL_POLL);
            }
            Ok(Attempt::Moved) => attempts += 1,
            // A snapshot went that matters to nobody else: the next attempt does without.
            Err(error) if error.is(Errno::NOENT) && are_there(inner, point, since)? => {
                attempts += 1;
                std::thread::sleep(REMOVAL_POLL);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Compared::Unavailable {
        reason: format!("snapshots of {} came or went at every attempt to compare object maps", inner.place),
        cure: None,
    })
}

/// Whether the object maps are kept at all, by the features that the image has now: without fast-diff, librbd doesn't hand
/// a removed snapshot's dirty objects on to the next map (`object_map/SnapshotRemoveRequest.cc`).
fn without_maps(inner: &Inner, image: &Image) -> ceph::Result<Option<Compared>> {
    if image.features()?.has(Features::OBJECT_MAP | Features::FAST_DIFF) {
        return Ok(None);
    }
    let place = &inner.place;
    Ok(Some(Compared::Unavailable {
        reason: format!("{place} has no object map with fast-diff"),
        cure: Some(format!(
            "rbd feature enable {place} exclusive-lock object-map fast-diff; rbd object-map rebuild {place}"
        )),
    }))
}

/// How one attempt ended.
enum Attempt {
    Done(Compared),
    /// Snapshots came or went meanwhile.
    Moved,
    /// The map of this snapshot, which is none of the user's, is invalid or gone, perhaps because it is being removed.
    Going {
        snapshot: u64,
        unavailable: Compared,
    },
}

fn attempt(inner: &Inner, point: &Point, since: Option<&Snapshot>, size: u64) -> ceph::Result<Attempt> {
    // Before the list: a snapshot that comes and goes while HEAD's map is read leaves no trace but here.
    let sequence = || match point {
        Point::Head => inner.pool.snapshot_sequence(&inner.id),
        Point::Snapshot(_) => Ok(0),
    };
    let begun_at = sequence()?;
    let mut image = Image::open_by_id(&inner.pool, &inner.id, OpenMode::ReadOnly)?;
    if let Some(unavailable) = without_maps(inner, &image)? {
        return Ok(Attempt::Done(unavailable));
    }
    let all = image.snapshots()?;
    check_both(&all, point, since)?;
    let chain = up_to(&all, point);
    if let Some((snapshot, unavailable)) = find_invalid(inner, &mut image, &chain)? {
        let later = Image::open_by_id(&inner.pool, &inner.id, OpenMode::ReadOnly)?.snapshots()?;
        let later = up_to(&later, point);
        return Ok(match snapshot {
            _ if later != chain => Attempt::Moved,
            Some(snapshot) if !snapshot.user => Attempt::Going { snapshot: snapshot.id, unavailable },
            _ => Attempt::Done(unavailable),
        });
    }
    // The diff starts from the snapshot `since`, and from no other that stands in its place.
    since.map_or(Ok(()), |since| check_snapshot(&chain, since))?;
    let first = since.map_or(0, |since| chain.partition_point(|snapshot| snapshot.id < since.id));
    let (up_to_since, range) = (chain.get(..=first).unwrap_or(&chain), &chain[first..]);
    // The handle stands at a snapshot already when the check has ended with it: turning costs a load of the map.
    if matches!(point, Point::Head) {
        image.set_snapshot(None)?;
    }
    let end = image.size()?;
    let within = size.min(end);
    let head = matches!(point, Point::Head).then_some(end);
    let mut changed =
        whole_objects(inner, &image, Path { snapshots: range, from_first: since.is_some(), head }, within)?;
    changed.extend(since.and_then(|since| forgotten(range, since.id, since.size, end)));
    let doubtful = match since {
        Some(since) if first > 0 => rolled_back(inner, &mut image, up_to_since, since)?,
        _ => Vec::new(),
    };
    // With nothing but two snapshots that the caller keeps, nothing can have changed under way.
    let is_fixed = matches!(point, Point::Snapshot(_)) && chain.len() <= 1 + usize::from(since.is_some());
    if !is_fixed {
        let mut later = Image::open_by_id(&inner.pool, &inner.id, OpenMode::ReadOnly)?;
        let moved = up_to(&later.snapshots()?, point) != chain
            || without_maps(inner, &later)?.is_some()
            || later.flags()? & ceph::INVALID_FLAGS != 0
            // One that was removed without its map being readable invalidates the next one's.
            || chain.len() > 2 && find_invalid(inner, &mut later, &chain)?.is_some()
            || sequence()? != begun_at;
        if moved {
            return Ok(Attempt::Moved);
        }
    }
    let period = inner.layout.period();
    let whole = |found: Vec<ByteRange>| {
        let aligned = found.into_iter().filter_map(|range| range.align_outward(period, within).clip(within));
        normalize(aligned.collect())
    };
    Ok(Attempt::Done(Compared::Runs { changed: whole(changed), doubtful: whole(doubtful) }))
}

/// What the object maps say of a path, up to `end`: read here, or else by librbd. The handle stands at the path's end.
fn whole_objects(inner: &Inner, image: &Image, path: Path<'_>, end: u64) -> ceph::Result<Vec<ByteRange>> {
    let Some(within) = ByteRange::between(0, end) else { return Ok(Vec::new()) };
    if let Some(found) = object_map::compare(inner, image, path, end, RUNS_MAX)? {
        return Ok(found);
    }
    let since = path.snapshots.first().filter(|_| path.from_first).map(|since| since.name.as_str());
    let what = DiffRange { since, within, whole_object: true };
    Ok(match image.diff(&what, RUNS_MAX)? {
        Collected::TooMany => vec![within],
        Collected::Extents(extents) => extents.into_iter().map(|extent| extent.range).collect(),
    })
}

/// Where an image that was rolled back after `since`, to one of the older snapshots, may differ from `since` although
/// the object maps from there on say nothing. Turns the handle.
///
/// Such an object is there in both, and has changed between the older snapshot and `since`: it is in the object map
/// diff from the oldest one to `since`, whichever of them it was, and whichever of them but the oldest has gone in the
/// meantime, because librbd hands a removed snapshot's dirty objects on to the next one. A diff can't start from a
/// snapshot of another namespace than the user's; then every object of `since` is in doubt.
///
/// A rollback to what was the oldest snapshot then needs none of this, even when it has gone: all that it holds is dirty
/// in its map, also of a clone and after a rebuild (seen with 16.2.15), and so became dirty again. What can't be seen
/// is a rollback to a later one when it has gone by now, with all that were older: no map, flag or time tells.
fn rolled_back(
    inner: &Inner,
    image: &mut Image,
    up_to_since: &[SnapInfo],
    since: &Snapshot,
) -> ceph::Result<Vec<ByteRange>> {
    image.set_snapshot(Some(since.id))?;
    let oldest = up_to_since.first().filter(|oldest| oldest.user);
    let path = Path { snapshots: up_to_since, from_first: oldest.is_some(), head: None };
    let mut found = whole_objects(inner, image, path, since.size)?;
    found.extend(oldest.and_then(|oldest| forgotten(up_to_since, oldest.id, oldest.size, since.size)));
    Ok(found)
}

/// The part of which an object map diff forgets what it found; see the module's head. `range` has the snapshots that it
/// goes through, `since` and `start` are the id and the size at its beginning, `end` is the size at its end.
fn forgotten(range: &[SnapInfo], since: u64, start: u64, end: u64) -> Option<ByteRange> {
    let sizes = range.iter().filter(|snapshot| snapshot.id > since).map(|snapshot| snapshot.size);
    ByteRange::between(sizes.min()?.min(end), end.min(start))
}

/// The snapshots of every namespace up to a point.
fn up_to(all: &[SnapInfo], point: &Point) -> Vec<SnapInfo> {
    let last = match point {
        Point::Head => u64::MAX,
        Point::Snapshot(snapshot) => snapshot.id,
    };
    all.iter().filter(|snapshot| snapshot.id <= last).cloned().collect()
}

/// Looks at the flags of HEAD (`None`) and of every snapshot in the range; leaves the handle at the last one.
fn find_invalid<'a>(
    inner: &Inner,
    image: &mut Image,
    range: &'a [SnapInfo],
) -> ceph::Result<Option<(Option<&'a SnapInfo>, Compared)>> {
    let place = &inner.place;
    if image.flags()? & ceph::INVALID_FLAGS != 0 {
        let unavailable = Compared::Unavailable {
            reason: format!("the object map of {place} is flagged invalid"),
            cure: Some(format!("rbd object-map rebuild {place}")),
        };
        return Ok(Some((None, unavailable)));
    }
    for snapshot in range {
        image.set_snapshot(Some(snapshot.id))?;
        if image.flags()? & ceph::INVALID_FLAGS != 0 {
            let name = &snapshot.name;
            let unavailable = Compared::Unavailable {
                reason: format!("the object map of snapshot {name:?} of {place} is flagged invalid"),
                cure: Some(format!("rbd object-map rebuild {place}@{name}")),
            };
            return Ok(Some((Some(snapshot), unavailable)));
        }
    }
    Ok(None)
}

/// Whether both ends of a diff are there still.
fn are_there(inner: &Inner, point: &Point, since: Option<&Snapshot>) -> ceph::Result<bool> {
    let all = Image::open_by_id(&inner.pool, &inner.id, OpenMode::ReadOnly)?.snapshots()?;
    Ok(check_both(&all, point, since).is_ok())
}

/// [`check_snapshot`] for both ends of a diff.
fn check_both(all: &[SnapInfo], point: &Point, since: Option<&Snapshot>) -> ceph::Result<()> {
    since.map_or(Ok(()), |since| check_snapshot(all, since))?;
    match point {
        Point::Head => Ok(()),
        Point::Snapshot(snapshot) => check_snapshot(all, snapshot),
    }
}

/// Fails with ENOENT unless there is a snapshot of the user namespace with that name and id.
pub(super) fn check_snapshot(all: &[SnapInfo], wanted: &Snapshot) -> ceph::Result<()> {
    let there = all.iter().any(|found| found.user && found.id == wanted.id && found.name == wanted.name);
    let missing = CephError::Call { function: "rbd_snap_list", errno: Errno::NOENT.raw_os_error() };
    there.then_some(()).ok_or(missing)
}

/// The windows in which an exact diff of `within` is asked for: whole periods, each of a bounded cost.
pub(super) fn windows(layout: Layout, within: ByteRange, size: u64) -> impl Iterator<Item = ByteRange> {
    let period = layout.period();
    let window = period.saturating_mul((WINDOW_OBJECTS / layout.stripe_count.max(1)).max(1));
    within.clip(size).into_iter().flat_map(move |range| range.align_outward(period, size).split_at_multiples(window))
}

/// The second level for one of [`windows`].
pub(super) fn exact(image: &Image, since: Option<&Snapshot>, window: ByteRange) -> ceph::Result<Vec<Extent>> {
    let what = DiffRange { since: since.map(|since| since.name.as_str()), within: window, whole_object: false };
    Ok(match image.diff(&what, EXTENTS_MAX)? {
        Collected::TooMany => vec![Extent::data(window)],
        Collected::Extents(extents) => extents,
    })
}

/// Sorts and clips what [`exact`] found.
pub(super) fn tidy(extents: Vec<Extent>, within: ByteRange, size: u64) -> Vec<Extent> {
    let clip = |extent: Extent| {
        let range = extent.range.intersect(within)?.clip(size)?;
        Some(Extent { range, kind: extent.kind })
    };
    normalize_extents(extents.into_iter().filter_map(clip).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRIPED: Layout = Layout { object_size: 1 << 20, stripe_unit: 1 << 16, stripe_count: 8 };

    fn range(offset: u64, length: u64) -> ByteRange {
        ByteRange::new(offset, length).unwrap()
    }

    fn snapshot(id: u64, name: &str, user: bool) -> SnapInfo {
        SnapInfo { id, name: name.into(), size: 0, user }
    }

    #[test]
    fn windows_are_whole_periods_and_cover_the_range() {
        let size = (100 << 20) + 5;
        let all: Vec<_> = windows(STRIPED, range(9 << 20, 1), size).collect();
        assert_eq!(all, [range(8 << 20, 8 << 20)]);
        assert_eq!(windows(STRIPED, range(size - 1, 100), size).collect::<Vec<_>>(), [range(96 << 20, (4 << 20) + 5)]);
        assert_eq!(windows(STRIPED, range(size, 1), size).count(), 0);
        let many: Vec<_> = windows(Layout::DEFAULT, range(1, 1 << 40), 1 << 40).collect();
        assert_eq!((many.len(), many[0], many[63].end()), (64, range(0, 16 << 30), 1 << 40));
    }

    #[test]
    fn a_snapshot_is_found_by_name_and_id_in_the_user_namespace_only() {
        let all = [snapshot(3, "a", true), snapshot(4, "b", false)];
        let wanted = |id, name: &str| Snapshot { id, name: name.into(), size: 0 };
        assert!(check_snapshot(&all, &wanted(3, "a")).is_ok());
        for (id, name) in [(3, "b"), (4, "a"), (4, "b"), (5, "a")] {
            assert!(check_snapshot(&all, &wanted(id, name)).unwrap_err().is(Errno::NOENT));
        }
    }

    #[test]
    fn what_was_cut_off_on_the_way_counts_as_changed() {
        let sized = |id, size| SnapInfo { size, ..snapshot(id, "s", true) };
        assert_eq!(forgotten(&[sized(3, 100), sized(4, 40), sized(5, 90)], 3, 100, 90), Some(range(40, 50)));
        assert_eq!(forgotten(&[sized(3, 100), sized(4, 40), sized(5, 190)], 3, 100, 190), Some(range(40, 60)));
        assert_eq!(forgotten(&[sized(3, 100), sized(4, 100), sized(5, 190)], 3, 100, 190), None);
        assert_eq!(forgotten(&[sized(3, 100)], 3, 100, 50), None);
    }

    #[test]
    fn what_librbd_says_is_sorted_joined_and_clipped() {
        let found = vec![Extent::zero(range(50, 20)), Extent::data(range(10, 50)), Extent::data(range(0, 12))];
        let tidied = tidy(found, range(5, 60), 62);
        assert_eq!(tidied, [Extent::data(range(5, 55)), Extent::zero(range(60, 2))]);
    }
}
