//! Orphans: snapshots of poolshift's own making that nothing needs any more. A pure decision.
//!
//! What makes a snapshot poolshift's is the state with a target, never its name. The state has the name before the
//! source snapshot is made (step 1 of a cycle), and its id from the first write to the commit, and then until it is
//! removed; a name that was given up before the snapshot was seen stays in
//! [`TargetState::given_up`]. So whatever a crash leaves, the state knows it. What has a name of poolshift's scheme and
//! is in no state was made for a target that isn't looked at, or that follows another source now, or belongs to
//! somebody else: [`Why::Unknown`], and removed only when that is asked for.

use std::collections::HashSet;

use serde::Serialize;

use super::cycle::is_automatic;
use super::state::{Retired, Side, TargetState};
use crate::image::{ImageIdentity, Snapshot};

/// A snapshot that may go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Orphan {
    /// On which side.
    pub side: Side,
    /// Its id there.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Why it may go.
    pub why: Why,
}

/// Why a snapshot may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// The target's state says that it is poolshift's and has no use any more.
    Retired,
    /// The target's state says that poolshift was about to make it, and gave that up.
    GivenUp,
    /// It looks like poolshift's, and is known to no target that was looked at: no proof that it is.
    Unknown,
}

impl Why {
    /// Whether the state proves that poolshift made it.
    pub fn is_proven(self) -> bool {
        self != Self::Unknown
    }
}

/// What the states of several targets know of the snapshots of images.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Those of commits, and in flight. By id, and where that isn't known yet by name.
    needed_ids: HashSet<(ImageIdentity, u64)>,
    needed_names: HashSet<(ImageIdentity, String)>,
    /// All that any state mentions, by name.
    mentioned: HashSet<(ImageIdentity, String)>,
    /// What was there before any of the states was read.
    listed: HashSet<(ImageIdentity, u64)>,
}

impl Known {
    /// Adds the snapshots of an image, listed before any state is read: whatever is in the list, its intent is in its
    /// target's state by then. What was made later may be of a replication whose intent was not seen, and is never
    /// unknown.
    pub fn list(&mut self, image: &ImageIdentity, snapshots: &[Snapshot]) {
        self.listed.extend(snapshots.iter().map(|snapshot| (image.clone(), snapshot.id)));
    }

    /// Adds what a target's state knows, of the target and of the source that it follows.
    pub fn note(&mut self, target: &ImageIdentity, state: &TargetState) {
        let source = &state.source;
        for commit in &state.commits {
            for (image, id) in [(source, commit.source_id), (target, commit.target_id)] {
                self.needed_ids.insert((image.clone(), id));
                self.mentioned.insert((image.clone(), commit.name.clone()));
            }
        }
        if let Some(in_flight) = &state.in_flight {
            let source_id = in_flight.snapshot.as_ref().map(|snapshot| (source.clone(), snapshot.id));
            self.needed_ids.extend(source_id);
            self.needed_ids.extend(in_flight.withdraw.map(|id| (target.clone(), id)));
            for image in [source, target] {
                self.needed_names.insert((image.clone(), in_flight.name.clone()));
            }
        }
        for Retired { side, name, .. } in &state.retired {
            let image = if *side == Side::Source { source } else { target };
            self.mentioned.insert((image.clone(), name.clone()));
        }
        self.mentioned.extend(state.given_up.iter().map(|name| (source.clone(), name.clone())));
    }

    fn needs(&self, image: &ImageIdentity, id: u64, name: &str) -> bool {
        self.needed_ids.contains(&(image.clone(), id)) || self.needed_names.contains(&(image.clone(), name.to_owned()))
    }

    fn mentions(&self, image: &ImageIdentity, name: &str) -> bool {
        self.mentioned.contains(&(image.clone(), name.to_owned()))
    }
}

/// What was found on one volume's two sides.
#[derive(Clone, Debug)]
pub struct OrphanFacts {
    /// The source, and its snapshots.
    pub source: (ImageIdentity, Vec<Snapshot>),
    /// The target, and its snapshots.
    pub target: (ImageIdentity, Vec<Snapshot>),
    /// The state with the target.
    pub state: Option<TargetState>,
}

/// The orphans of one volume. `known` has what every target at hand knows, this one's among them.
///
/// Never among them: what a commit or an intent of any of these targets needs, on either side; a source snapshot whose
/// name is not of poolshift's scheme; anything on the source side where the state follows another source.
pub fn orphans(facts: &OrphanFacts, known: &Known) -> Vec<Orphan> {
    let mut known = known.clone();
    if let Some(state) = &facts.state {
        known.note(&facts.target.0, state);
    }
    let mut found = Vec::new();
    if let Some(state) = &facts.state {
        let follows = state.source == facts.source.0;
        for Retired { side, id, name } in &state.retired {
            let image = if *side == Side::Source { &facts.source.0 } else { &facts.target.0 };
            // On the target poolshift makes snapshots of any name, and may have withdrawn one.
            let may_go = *side == Side::Target || follows && is_automatic(name);
            if may_go && !known.needs(image, *id, name) {
                found.push(Orphan { side: *side, id: *id, name: name.clone(), why: Why::Retired });
            }
        }
        for snapshot in facts.source.1.iter().filter(|_| follows) {
            if state.given_up.contains(&snapshot.name) && is_automatic(&snapshot.name) {
                let (id, name) = (snapshot.id, snapshot.name.clone());
                found.push(Orphan { side: Side::Source, id, name, why: Why::GivenUp });
            }
        }
        found.retain(|orphan| orphan.side == Side::Target || !known.needs(&facts.source.0, orphan.id, &orphan.name));
    }
    for (side, (image, snapshots)) in [(Side::Source, &facts.source), (Side::Target, &facts.target)] {
        for Snapshot { id, name, .. } in snapshots {
            let in_no_state = !known.needs(image, *id, name) && !known.mentions(image, name);
            if is_automatic(name) && in_no_state && known.listed.contains(&(image.clone(), *id)) {
                found.push(Orphan { side, id: *id, name: name.clone(), why: Why::Unknown });
            }
        }
    }
    // One that is retired and given up is told once.
    let mut told = HashSet::new();
    found.retain(|orphan| told.insert((orphan.side == Side::Source, orphan.id)));
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::replicate::state::{Commit, InFlight, Origin};

    fn identity(image: &str) -> ImageIdentity {
        ImageIdentity { cluster: "c".into(), pool: "1".into(), image: image.into() }
    }

    fn automatic(number: u64) -> String {
        format!("poolshift-20261123T2205{:02}.{:03}Z", number / 1000 % 60, number % 1000)
    }

    fn snapshot(id: u64, name: &str) -> Snapshot {
        Snapshot { id, name: name.into(), size: 1 }
    }

    fn commit(source_id: u64, name: String, automatic: bool) -> Commit {
        Commit { name, source_id, target_id: source_id + 1000, size: 1, at: String::new(), automatic }
    }

    fn facts(source: Vec<Snapshot>, target: Vec<Snapshot>, state: TargetState) -> OrphanFacts {
        OrphanFacts { source: (identity("s"), source), target: (identity("t"), target), state: Some(state) }
    }

    fn state() -> TargetState {
        TargetState::new(&identity("s"), "rbd:sata/s")
    }

    /// The orphans, where all that is there was there before the states were read.
    fn found(facts: &OrphanFacts, known: &Known) -> Vec<(Side, u64, Why)> {
        let mut known = known.clone();
        known.list(&facts.source.0, &facts.source.1);
        known.list(&facts.target.0, &facts.target.1);
        orphans(facts, &known).into_iter().map(|orphan| (orphan.side, orphan.id, orphan.why)).collect()
    }

    #[test]
    fn only_what_a_state_proves_is_poolshifts() {
        let mut own = state();
        own.commits = vec![commit(1, automatic(1), true), commit(2, "nightly".into(), false)];
        own.retired = vec![Retired::of(Side::Source, 3, &automatic(3)), Retired::of(Side::Target, 1003, &automatic(3))];
        own.give_up(&automatic(4));
        let source = (1..=7).map(|id| snapshot(id, &automatic(id)));
        let source = source.chain([snapshot(9, "nightly-2"), snapshot(10, "poolshift-mine")]).collect();
        let target = vec![snapshot(1001, &automatic(1)), snapshot(1003, &automatic(3)), snapshot(1008, &automatic(8))];
        let mut other = state();
        other.commits = vec![commit(5, automatic(5), true)];
        other.in_flight = Some(InFlight::new(automatic(6), None, true, Origin::Base(5), false));
        let mut known = Known::default();
        known.note(&identity("t2"), &other);
        let facts = facts(source, target, own);
        let expected = [
            (Side::Source, 3, Why::Retired),
            (Side::Target, 1003, Why::Retired),
            (Side::Source, 4, Why::GivenUp),
            // Number 2 is a commit's by its id, whatever it is called.
            (Side::Source, 7, Why::Unknown),
            (Side::Target, 1008, Why::Unknown),
        ];
        assert_eq!(found(&facts, &known), expected);
    }

    #[test]
    fn what_another_target_needs_is_no_orphan_though_this_one_retired_it() {
        let mut own = state();
        own.retired = vec![Retired::of(Side::Source, 3, &automatic(3))];
        let facts = facts(vec![snapshot(3, &automatic(3))], vec![], own);
        assert_eq!(found(&facts, &Known::default()), [(Side::Source, 3, Why::Retired)]);
        let mut other = state();
        other.commits = vec![commit(3, automatic(3), true)];
        let mut known = Known::default();
        known.note(&identity("t2"), &other);
        assert_eq!(found(&facts, &known), []);
    }

    #[test]
    fn a_target_that_follows_another_source_proves_nothing_of_this_one() {
        let mut own = TargetState::new(&identity("former"), "rbd:sata/former");
        own.retired = vec![Retired::of(Side::Source, 3, &automatic(3))];
        own.give_up(&automatic(4));
        let facts = facts(vec![snapshot(3, &automatic(3)), snapshot(4, &automatic(4))], vec![], own);
        assert_eq!(
            found(&facts, &Known::default()),
            [(Side::Source, 3, Why::Unknown), (Side::Source, 4, Why::Unknown)]
        );
    }

    #[test]
    fn what_was_made_after_the_look_is_not_unknown() {
        let facts = facts(vec![snapshot(3, &automatic(3))], vec![], state());
        assert_eq!(orphans(&facts, &Known::default()), []);
        assert_eq!(found(&facts, &Known::default()), [(Side::Source, 3, Why::Unknown)]);
    }

    #[test]
    fn a_target_is_another_ones_source() {
        let mut next = TargetState::new(&identity("t"), "rbd:sas/t");
        next.commits = vec![commit(1008, automatic(8), true)];
        let mut known = Known::default();
        known.note(&identity("u"), &next);
        assert_eq!(found(&facts(vec![], vec![snapshot(1008, &automatic(8))], state()), &known), []);
    }

    /// A state in which anything may stand, small enough that its parts meet.
    fn any_state() -> impl Strategy<Value = TargetState> {
        let entry = (0..8u64, 0..10u64, any::<bool>());
        let name =
            |number: u64, is_automatic: bool| if is_automatic { automatic(number) } else { format!("n{number}") };
        let commits = proptest::collection::vec(entry.clone(), 0..4);
        let retired = proptest::collection::vec((any::<bool>(), 0..8u64, 0..10u64, any::<bool>()), 0..6);
        let in_flight = proptest::option::of((proptest::option::of(0..8u64), 0..10u64, any::<bool>()));
        let given_up = proptest::collection::vec(0..10u64, 0..4);
        (commits, retired, in_flight, given_up).prop_map(move |(commits, retired, in_flight, given_up)| {
            let mut state = state();
            let commits = commits.into_iter().map(|(id, number, auto)| commit(id, name(number, auto), auto));
            state.commits = commits.collect();
            state.retired.extend(retired.into_iter().map(|(on_source, id, number, auto)| match on_source {
                true => Retired::of(Side::Source, id, &name(number, auto)),
                false => Retired::of(Side::Target, id + 1000, &name(number, auto)),
            }));
            state.in_flight = in_flight.map(|(id, number, auto)| {
                let name = name(number, auto);
                let there = id.map(|id| snapshot(id, &name));
                InFlight::new(name, there, auto, Origin::Compare, false)
            });
            given_up.into_iter().for_each(|number| state.give_up(&automatic(number)));
            state
        })
    }

    fn any_snapshots(base: u64) -> impl Strategy<Value = Vec<Snapshot>> {
        proptest::collection::btree_map(0..8u64, (0..10u64, any::<bool>()), 0..8).prop_map(move |map| {
            let name = |number, auto: bool| if auto { automatic(number) } else { format!("n{number}") };
            map.into_iter().map(|(id, (number, auto))| snapshot(id + base, &name(number, auto))).collect()
        })
    }

    proptest! {
        #[test]
        fn the_base_what_is_in_flight_and_what_is_named_are_never_orphans(
            own in any_state(),
            other in any_state(),
            source in any_snapshots(0),
            target in any_snapshots(1000),
        ) {
            let mut known = Known::default();
            known.note(&identity("t2"), &other);
            let facts = facts(source, target, own.clone());
            known.list(&facts.source.0, &facts.source.1);
            known.list(&facts.target.0, &facts.target.1);
            for orphan in orphans(&facts, &known) {
                let on_source = orphan.side == Side::Source;
                for state in [&own, &other] {
                    let is_own = state == &own;
                    for commit in &state.commits {
                        prop_assert!(!(on_source && commit.source_id == orphan.id), "{commit:?} {orphan:?}");
                        prop_assert!(!(!on_source && is_own && commit.target_id == orphan.id), "{commit:?} {orphan:?}");
                    }
                    if let Some(in_flight) = &state.in_flight {
                        let id = in_flight.snapshot.as_ref().map(|snapshot| snapshot.id);
                        prop_assert!(!on_source || id != Some(orphan.id) && in_flight.name != orphan.name);
                        prop_assert!(on_source || !is_own || in_flight.name != orphan.name);
                    }
                }
                // What somebody named goes only where the state itself says that poolshift made it: on the target.
                let withdrawn = !on_source && orphan.why == Why::Retired;
                prop_assert!(is_automatic(&orphan.name) || withdrawn, "{orphan:?}");
            }
        }
    }
}
