//! What finalizing a server removes, and what stands in its way: data only. [`super::finalize`] finds it and carries it
//! out; a dry run prints it.

use serde::Serialize;

use super::provider::{Observed, Power, Side};
use crate::image::metadata::LostKey;
use crate::image::rbd::{FlattenCost, RbdLink, RbdSnapshot};
use crate::replicate::is_automatic;
use crate::replicate::state::{Commit, TargetState};

/// What goes when a server is finalized.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Farewell {
    /// The server.
    pub server: String,
    /// Who runs it: `libvirt domain web-1, warm`.
    pub by: String,
    /// Since when it has run from its targets, RFC 3339.
    pub since: String,
    /// Whether an earlier run has begun to remove them: there is no way back any more.
    pub begun: bool,
    /// What its provider says of it, where that is not what it has to be; a sentence.
    pub wrong_side: Option<String>,
    /// Its volumes, in the order of the plan.
    pub volumes: Vec<VolumeFarewell>,
}

/// What goes of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VolumeFarewell {
    /// Its name in the plan.
    pub volume: String,
    /// The kept source; `None` if it has gone already.
    pub source: Option<SourceFarewell>,
    /// The target, which stays.
    pub target: TargetFarewell,
}

/// A kept source, all of which goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SourceFarewell {
    /// Where it is: `rbd:sata/web-1.poolshift-kept`.
    pub location: String,
    /// Whether it has the name under which sources are kept.
    pub named_as_kept: bool,
    /// Its size, in bytes.
    pub size: u64,
    /// How many bytes of objects it has itself, beside its snapshots; `None` where nothing tells.
    pub own_bytes: Option<u64>,
    /// Its snapshots, which go with it.
    pub snapshots: Vec<Going>,
    /// The clones that hang on it, and theirs: each after those that hang on it.
    pub clones: Vec<CloneFarewell>,
    /// What of its metadata the target does not have, or has otherwise.
    pub metadata: Vec<LostKey>,
    /// Who else has it open: addresses.
    pub users: Vec<String>,
}

/// A clone that is cut loose, and stays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CloneFarewell {
    /// The clone.
    pub image: RbdLink,
    /// What flattening it copies at most; `None` if only snapshots of it still see the parent.
    pub cost: Option<FlattenCost>,
    /// Snapshots of it that go on seeing the parent after that, for want of deep-flatten.
    pub bound_snapshots: Vec<String>,
}

/// A target, which loses what poolshift has left with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TargetFarewell {
    /// Where it is.
    pub location: String,
    /// The snapshots of poolshift's that go.
    pub snapshots: Vec<Going>,
    /// The image that its state follows, where that is not the kept source.
    pub follows_another: Option<String>,
}

/// Whose a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Whose {
    /// poolshift made it.
    Poolshift,
    /// It has a name like poolshift's; nothing says who made it.
    Unknown,
    /// Somebody else made it.
    Foreign,
}

/// A snapshot that goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Going {
    /// Its id.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// The image's size in it, in bytes.
    pub size: u64,
    /// Whose it is.
    pub whose: Whose,
    /// Whether it has to be unprotected first.
    pub protected: bool,
    /// Whether it is a user's: not of a group, nor mirroring's, nor in the trash.
    pub user: bool,
    /// The clones made of it.
    pub clones: Vec<RbdLink>,
}

impl Going {
    /// A snapshot, and whose it is.
    pub fn of(snapshot: &RbdSnapshot, whose: Whose) -> Self {
        let RbdSnapshot { id, name, size, user, protected, clones, .. } = snapshot.clone();
        Self { id, name, size, whose, protected, user, clones }
    }
}

/// Whose a snapshot of the source is, by the state with its target.
pub fn on_source(snapshot: &RbdSnapshot, state: Option<&TargetState>) -> Whose {
    let is_commit = |commit: &Commit| commit.automatic && commit.source_id == snapshot.id;
    let is_ours = state.is_some_and(|state| {
        let in_flight = state.in_flight.as_ref().filter(|in_flight| in_flight.automatic);
        state.commits.iter().any(is_commit)
            || state.retired.iter().any(|retired| retired.side == Side::Source && retired.id == snapshot.id)
            // What marks the point of the cutover has the name of the last delta, and no id in the state.
            || in_flight.is_some_and(|in_flight| in_flight.name == snapshot.name)
            || state.given_up.contains(&snapshot.name)
    });
    match (is_ours, is_automatic(&snapshot.name)) {
        (true, _) => Whose::Poolshift,
        (false, true) => Whose::Unknown,
        (false, false) => Whose::Foreign,
    }
}

/// Whether a snapshot of the target is poolshift's, by its state: by id, never by name alone.
pub fn on_target(snapshot: &RbdSnapshot, state: &TargetState) -> bool {
    state.commits.iter().any(|commit| commit.automatic && commit.target_id == snapshot.id)
        || state.retired.iter().any(|retired| retired.side == Side::Target && retired.id == snapshot.id)
}

/// What is wrong with what a provider says of a server that is to be finalized; `None` if nothing is. One that nobody
/// can ask about (`by_hand`) is judged by who has its images open.
pub fn wrong_side(observed: &Observed, by_hand: bool, begun: bool) -> Option<String> {
    if by_hand {
        return None;
    }
    match observed {
        Observed { power: Power::Running, side: Some(Side::Target) } => None,
        // Its sources are going already; that it was shut down meanwhile is no reason to stop.
        Observed { side: Some(Side::Target), .. } if begun => None,
        Observed { power, side: Some(Side::Target) } => {
            Some(format!("it is {power}; start it on its targets, and see that all is well there, first"))
        }
        Observed { power, side: Some(Side::Source) } => Some(format!("it is {power} on its sources, which would go")),
        Observed { power, side: None } => {
            Some(format!("it is {power}, and not all of its disks are on its targets, as far as can be told"))
        }
    }
}

impl Farewell {
    /// What stands in the way, a sentence each.
    pub fn obstacles(&self, flatten: bool) -> Vec<String> {
        let server = self.wrong_side.iter().map(|wrong| format!("{}: {wrong}", self.by));
        let volumes = self.volumes.iter().flat_map(|volume| {
            let source = volume.source.iter().flat_map(|source| self.on_source(source, flatten));
            let target = &volume.target;
            let follows = target.follows_another.iter().map(|other| {
                format!("{}: its state says that it follows {other}, and not the source that is kept", target.location)
            });
            let held = target.snapshots.iter().filter(|going| going.protected && !going.clones.is_empty());
            let held = held.map(|going| {
                let clones = links(&going.clones);
                format!("{}@{} is protected for its clones: {clones}; flatten them first", target.location, going.name)
            });
            source.chain(follows).chain(held).collect::<Vec<_>>()
        });
        server.chain(volumes).collect()
    }

    fn on_source(&self, source: &SourceFarewell, flatten: bool) -> Vec<String> {
        let location = &source.location;
        let mut all = Vec::new();
        if !source.named_as_kept {
            all.push(format!("{location} has been given another name than that of a kept source: somebody may use it"));
        }
        // A run that was killed may seem to have it open for a while; it is waited for.
        if !self.begun {
            all.extend(source.users.iter().map(|address| format!("{location} is open at {address}")));
        }
        for CloneFarewell { image, bound_snapshots, .. } in &source.clones {
            if !flatten {
                all.push(format!("{image} is a clone that hangs on {location}: give --flatten, or remove it"));
            }
            let bound = bound_snapshots.iter();
            all.extend(bound.map(|name| {
                format!(
                    "{image}@{name} sees {location} also after a flatten, for want of deep-flatten: remove it first"
                )
            }));
        }
        // One of a group is not ours to remove; what a removal that was cut has left is.
        let stuck = |going: &&Going| !going.user && going.clones.is_empty() && going.whose != Whose::Poolshift;
        let stuck = source.snapshots.iter().filter(|going| !self.begun && stuck(going));
        all.extend(stuck.map(|going| {
            format!("{location} has a snapshot of a group, or of mirroring, {}: remove it there first", going.name)
        }));
        all
    }

    /// Whether nothing goes by this that does not go by `agreed` as well.
    pub fn is_within(&self, agreed: &Self) -> bool {
        self.volumes.len() == agreed.volumes.len()
            && self.volumes.iter().zip(&agreed.volumes).all(|(now, then)| {
                now.volume == then.volume
                    && match (&now.source, &then.source) {
                        (None, _) => true,
                        (Some(_), None) => false,
                        (Some(now), Some(then)) => {
                            within(&now.snapshots, &then.snapshots, |going| going.id)
                                && within(&now.clones, &then.clones, |clone| clone.image.id.clone())
                                && within(&now.metadata, &then.metadata, Clone::clone)
                        }
                    }
                    && within(&now.target.snapshots, &then.target.snapshots, |going| going.id)
            })
    }
}

fn within<T, K: PartialEq>(now: &[T], then: &[T], key: impl Fn(&T) -> K) -> bool {
    now.iter().all(|now| then.iter().any(|then| key(then) == key(now)))
}

fn links(links: &[RbdLink]) -> String {
    links.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageIdentity;
    use crate::image::rbd::FlattenBound;
    use crate::replicate::state::{InFlight, Origin, Retired};

    fn snapshot(id: u64, name: &str) -> RbdSnapshot {
        let (size, user, protected) = (8 << 20, true, false);
        RbdSnapshot { id, name: name.into(), size, user, protected, has_parent: false, clones: Vec::new() }
    }

    fn clone(bound: &[&str]) -> CloneFarewell {
        let image = RbdLink { pool: "sata".into(), namespace: None, image: "c".into(), id: "9".into(), trash: false };
        let cost = Some(FlattenCost { bytes_at_most: 4 << 20, bound: FlattenBound::ObjectMap });
        CloneFarewell { image, cost, bound_snapshots: bound.iter().map(ToString::to_string).collect() }
    }

    fn farewell() -> Farewell {
        let source = SourceFarewell {
            location: "rbd:sata/a.poolshift-kept".into(),
            named_as_kept: true,
            size: 8 << 20,
            own_bytes: Some(0),
            snapshots: vec![Going::of(&snapshot(3, "theirs"), Whose::Foreign)],
            clones: Vec::new(),
            metadata: Vec::new(),
            users: Vec::new(),
        };
        let target = TargetFarewell { location: "rbd:sas/a".into(), snapshots: Vec::new(), follows_another: None };
        Farewell {
            server: "web".into(),
            by: "commands of the plan".into(),
            since: "2026-11-25T22:00:00Z".into(),
            begun: false,
            wrong_side: None,
            volumes: vec![VolumeFarewell { volume: "a".into(), source: Some(source), target }],
        }
    }

    fn with_source(change: impl FnOnce(&mut SourceFarewell)) -> Farewell {
        let mut farewell = farewell();
        change(farewell.volumes[0].source.as_mut().unwrap());
        farewell
    }

    #[test]
    fn a_foreign_snapshot_is_named_and_blocks_nothing() {
        assert!(farewell().obstacles(false).is_empty());
    }

    #[test]
    fn clones_block_without_flatten_and_those_that_can_not_be_flattened_with_it() {
        let hanging = with_source(|source| source.clones.push(clone(&[])));
        assert!(hanging.obstacles(false)[0].contains("--flatten") && hanging.obstacles(true).is_empty());
        let bound = with_source(|source| source.clones.push(clone(&["t"])));
        assert!(bound.obstacles(true)[0].starts_with("rbd:sata/c@t sees"));
    }

    #[test]
    fn users_block_until_it_was_begun() {
        let mut open = with_source(|source| source.users.push("10.0.0.1:0/1".into()));
        assert_eq!(open.obstacles(true), ["rbd:sata/a.poolshift-kept is open at 10.0.0.1:0/1"]);
        open.begun = true;
        assert!(open.obstacles(true).is_empty());
        assert_eq!(with_source(|source| source.named_as_kept = false).obstacles(true).len(), 1);
    }

    #[test]
    fn a_snapshot_of_a_group_is_left_to_whoever_made_it() {
        let group = with_source(|source| source.snapshots[0].user = false);
        assert_eq!(group.obstacles(true).len(), 1);
        let cut =
            with_source(|source| (source.snapshots[0].user, source.snapshots[0].whose) = (false, Whose::Poolshift));
        assert!(cut.obstacles(true).is_empty());
    }

    #[test]
    fn what_has_come_since_was_not_agreed_to() {
        let agreed = farewell();
        assert!(agreed.is_within(&agreed));
        let gone = with_source(|source| source.snapshots.clear());
        assert!(gone.is_within(&agreed) && !agreed.is_within(&gone));
        assert!(!with_source(|source| source.clones.push(clone(&[]))).is_within(&agreed));
        let key = |bytes| LostKey { key: "owner".into(), bytes: Some(bytes), differs: false };
        let [short, long] = [1, 2].map(|bytes| with_source(|source| source.metadata.push(key(bytes))));
        assert!(!short.is_within(&agreed) && !long.is_within(&short) && agreed.is_within(&short));
        let mut removed = farewell();
        removed.volumes[0].source = None;
        assert!(removed.is_within(&agreed) && !agreed.is_within(&removed));
    }

    #[test]
    fn a_server_has_to_run_from_its_targets() {
        let observed = |power, side| Observed { power, side };
        let wrong = |power, side, begun| wrong_side(&observed(power, side), false, begun).is_some();
        assert!(!wrong(Power::Running, Some(Side::Target), false));
        assert!(wrong(Power::Running, Some(Side::Source), true) && wrong(Power::Running, None, true));
        assert!(wrong(Power::Off, Some(Side::Target), false) && !wrong(Power::Off, Some(Side::Target), true));
        assert!(wrong_side(&observed(Power::Running, None), true, false).is_none());
    }

    #[test]
    fn what_is_poolshifts_is_known_by_its_state() {
        let identity = ImageIdentity { cluster: "c".into(), pool: "1".into(), image: "s".into() };
        let mut state = TargetState::new(&identity, "rbd:sata/a");
        let commit = |source_id, target_id, automatic| Commit {
            name: "n".into(),
            source_id,
            target_id,
            size: 8 << 20,
            at: "2026-11-25T22:00:00Z".into(),
            automatic,
        };
        state.commits = vec![commit(1, 11, true), commit(2, 12, false)];
        state.retired = vec![Retired::of(Side::Source, 3, "r"), Retired::of(Side::Target, 13, "r")];
        state.in_flight = Some(InFlight::new("mark".into(), None, true, Origin::Blank, true));
        let source = |id, name| on_source(&snapshot(id, name), Some(&state));
        assert_eq!([source(1, "n"), source(3, "r"), source(4, "mark")], [Whose::Poolshift; 3]);
        assert_eq!([source(2, "n"), source(13, "theirs")], [Whose::Foreign; 2]);
        assert_eq!(source(9, "poolshift-20261123T220511.123Z"), Whose::Unknown);
        assert_eq!([11, 12, 13, 1].map(|id| on_target(&snapshot(id, "n"), &state)), [true, false, true, false]);
    }
}
