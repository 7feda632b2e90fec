//! What has to be done: a pure function of what is found on both sides.

use crate::image::{ImageIdentity, Snapshot, SnapshotSupport};

use super::error::ConflictKind;
use super::state::{Commit, InFlight, Origin, TargetState};

/// What was found.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The source's identity.
    pub source: ImageIdentity,
    /// What its snapshots are.
    pub source_support: SnapshotSupport,
    /// Its snapshots.
    pub source_snapshots: Vec<Snapshot>,
    /// What the target's snapshots are.
    pub target_support: SnapshotSupport,
    /// Its snapshots.
    pub target_snapshots: Vec<Snapshot>,
    /// What poolshift keeps with the target.
    pub state: Option<TargetState>,
    /// Whether nothing is allocated on the target. Only asked for where [`needs_blank`] says so.
    pub target_blank: bool,
    /// Whether HEAD differs from the newest commit. Only asked for where [`needs_head_check`] says so.
    pub head_differs: bool,
}

/// What is wanted.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The snapshot to replicate; one of poolshift's own naming otherwise.
    pub name: Option<String>,
    /// The name is of poolshift's own giving all the same, and may be removed by retention.
    pub automatic: bool,
    /// Start over: compare both sides, whatever the history says.
    pub full: bool,
    /// With `full`: take over a target that poolshift did not make.
    pub adopt: bool,
}

/// What has to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// A new snapshot, or an existing one for the first time.
    Begin {
        /// What from.
        from: Origin,
        /// Whether HEAD must be brought back to the base before.
        rewind: bool,
    },
    /// The snapshot in flight is finished.
    Resume(InFlight),
    /// The target snapshot is there; it only has to be entered into the state.
    EnterCommit {
        /// What is in flight.
        in_flight: InFlight,
        /// The target snapshot.
        target: Snapshot,
    },
    /// The snapshot asked for has been replicated already.
    AlreadyThere(Commit),
}

/// Whether `snapshots` holds exactly this one: same id, same name.
pub fn holds(snapshots: &[Snapshot], id: u64, name: &str) -> bool {
    snapshots.iter().any(|have| have.id == id && have.name == name)
}

/// Whether [`decide`] wants to know if the target is blank: it has no history, and poolshift has not written to it.
pub fn needs_blank(state: Option<&TargetState>) -> bool {
    state.is_none_or(|state| state.commits.is_empty() && !state.is_dirty())
}

/// The snapshot against which [`decide`] wants to have HEAD checked: the newest commit where poolshift has written
/// nothing since; or, on a file, the statement that was made and not entered.
pub fn needs_head_check(facts: &Facts) -> Option<Snapshot> {
    let state = facts.state.as_ref()?;
    if let Some(in_flight) = state.in_flight.as_ref().filter(|in_flight| in_flight.dirty) {
        let declared = facts.target_snapshots.iter().find(|have| have.name == in_flight.name);
        return declared.filter(|_| in_flight.applied && facts.target_support == SnapshotSupport::HeadOnly).cloned();
    }
    state.newest().filter(|newest| on_target(facts, newest)).map(Commit::on_target)
}

fn on_target(facts: &Facts, commit: &Commit) -> bool {
    holds(&facts.target_snapshots, commit.target_id, &commit.name)
}

fn on_source(facts: &Facts, commit: &Commit) -> bool {
    holds(&facts.source_snapshots, commit.source_id, &commit.name)
}

/// Decides what has to be done, or names the conflict.
pub fn decide(facts: &Facts, request: &Request) -> Result<Decision, ConflictKind> {
    let Some(state) = &facts.state else { return begin_without_history(facts, request) };
    if state.source != facts.source && !request.full {
        return Err(ConflictKind::OtherSource {
            followed: (state.source.clone(), state.source_location.clone()),
            given: facts.source.clone(),
        });
    }
    if request.full {
        return begin_over(facts, request, state);
    }
    match &state.in_flight {
        Some(in_flight) => go_on(facts, request, state, in_flight),
        None => begin_after(facts, request, state),
    }
}

fn begin_without_history(facts: &Facts, request: &Request) -> Result<Decision, ConflictKind> {
    let untouched = facts.target_blank && facts.target_snapshots.is_empty();
    if !(untouched || request.full && request.adopt) {
        return Err(ConflictKind::NotOurs);
    }
    check_name_free(facts, request)?;
    let from = if facts.target_blank { Origin::Blank } else { Origin::Compare };
    Ok(Decision::Begin { from, rewind: false })
}

fn begin_over(facts: &Facts, request: &Request, state: &TargetState) -> Result<Decision, ConflictKind> {
    // A commit of the same name is on the target and can't be made again; without a name there is no such clash.
    if let Some(name) = &request.name
        && let Some(commit) = state.commits.iter().find(|commit| commit.name == *name)
        && on_target(facts, commit)
        && facts.target_support == SnapshotSupport::Kept
    {
        return Err(ConflictKind::NameTaken { name: name.clone() });
    }
    check_name_free(facts, request)?;
    Ok(Decision::Begin { from: Origin::Compare, rewind: false })
}

/// A file's one statement is replaced by the next, so that no name is ever taken there.
fn check_name_free(facts: &Facts, request: &Request) -> Result<(), ConflictKind> {
    match &request.name {
        Some(name)
            if facts.target_support == SnapshotSupport::Kept
                && facts.target_snapshots.iter().any(|have| have.name == *name) =>
        {
            Err(ConflictKind::NameTaken { name: name.clone() })
        }
        _ => Ok(()),
    }
}

fn go_on(
    facts: &Facts,
    request: &Request,
    state: &TargetState,
    in_flight: &InFlight,
) -> Result<Decision, ConflictKind> {
    if let Some(target) = made(facts, in_flight)? {
        return Ok(Decision::EnterCommit { in_flight: in_flight.clone(), target });
    }
    let there = match &in_flight.snapshot {
        Some(snapshot) => holds(&facts.source_snapshots, snapshot.id, &snapshot.name),
        // One that was to be made in step with others is no point if nobody noted its id: it may have been made late.
        None => !in_flight.in_step && facts.source_snapshots.iter().any(|have| have.name == in_flight.name),
    };
    let can_finish = there && base_is_there(facts, state, in_flight);
    if !in_flight.dirty {
        // Nothing was written: HEAD is what the newest commit says, or somebody else wrote it, which must be noticed.
        let clean = TargetState { in_flight: None, ..state.clone() };
        let as_found = begin_after(facts, &Request::default(), &clean);
        return match as_found {
            // A comparison takes whatever HEAD holds, and was asked for.
            _ if can_finish && in_flight.from == Origin::Compare => Ok(Decision::Resume(in_flight.clone())),
            Ok(Decision::Begin { ref from, .. }) if can_finish && *from == in_flight.from => {
                Ok(Decision::Resume(in_flight.clone()))
            }
            _ => begin_after(facts, request, &clean),
        };
    }
    if facts.source_support == SnapshotSupport::HeadOnly {
        // A live file has no snapshot to finish: what it holds now is compared with whatever the target holds.
        return Ok(match in_flight.withdraw {
            Some(_) => Decision::Resume(InFlight { progress_to: 0, applied: false, ..in_flight.clone() }),
            None => Decision::Begin { from: Origin::Compare, rewind: false },
        });
    }
    if can_finish { Ok(Decision::Resume(in_flight.clone())) } else { begin_dirty(facts, request, state) }
}

/// The target snapshot that was made of what is in flight, and not entered into the state.
fn made(facts: &Facts, in_flight: &InFlight) -> Result<Option<Snapshot>, ConflictKind> {
    let named = facts.target_snapshots.iter().find(|have| have.name == in_flight.name);
    let Some(named) = named.filter(|named| in_flight.withdraw != Some(named.id)) else { return Ok(None) };
    match facts.target_support {
        // The statement about a file is withdrawn before the first write: it is there only if it was made anew.
        SnapshotSupport::HeadOnly if !in_flight.applied => Ok(None),
        SnapshotSupport::HeadOnly if facts.head_differs => {
            Err(ConflictKind::Diverged { since: in_flight.name.clone() })
        }
        SnapshotSupport::Kept if !in_flight.applied || named.id <= in_flight.target_newest => {
            Err(ConflictKind::NameTaken { name: in_flight.name.clone() })
        }
        _ => Ok(Some(named.clone())),
    }
}

/// Whether what a delta in flight starts from can still be had on the source (and, for a rewind, on the target).
fn base_is_there(facts: &Facts, state: &TargetState, in_flight: &InFlight) -> bool {
    let Origin::Base(id) = in_flight.from else { return true };
    state
        .commit_of_source(id)
        .is_some_and(|base| on_source(facts, base) && (!in_flight.rewind || on_target(facts, base)))
}

/// The snapshot in flight is lost, and HEAD holds parts of it: a new delta alone can't explain that.
fn begin_dirty(facts: &Facts, request: &Request, state: &TargetState) -> Result<Decision, ConflictKind> {
    check_name(facts, request, state)?;
    let base = common(facts, state).last();
    if let Some(base) = base {
        check_age(facts, request, base)?;
    }
    match base {
        Some(base) if facts.target_support == SnapshotSupport::Kept => {
            Ok(Decision::Begin { from: Origin::Base(base.source_id), rewind: true })
        }
        _ => Ok(Decision::Begin { from: Origin::Compare, rewind: false }),
    }
}

/// Whether the snapshot asked for is younger than the one that the target is at.
fn check_age(facts: &Facts, request: &Request, newest: &Commit) -> Result<(), ConflictKind> {
    let named = |name: &String| facts.source_snapshots.iter().find(|have| have.name == *name);
    match request.name.as_ref().and_then(named) {
        Some(asked) if asked.id < newest.source_id => {
            Err(ConflictKind::OlderThanBase { name: asked.name.clone(), base: newest.name.clone() })
        }
        _ => Ok(()),
    }
}

/// The commits whose snapshots are there on both sides, oldest first.
fn common<'a>(facts: &'a Facts, state: &'a TargetState) -> impl Iterator<Item = &'a Commit> {
    state.commits.iter().filter(|commit| on_source(facts, commit) && on_target(facts, commit))
}

fn begin_after(facts: &Facts, request: &Request, state: &TargetState) -> Result<Decision, ConflictKind> {
    let Some(newest) = state.newest() else {
        let fresh = Facts { state: None, ..facts.clone() };
        return begin_without_history(&fresh, request);
    };
    if !on_target(facts, newest) {
        return Err(ConflictKind::CommitRemoved { name: newest.name.clone() });
    }
    if facts.head_differs {
        return Err(ConflictKind::Diverged { since: newest.name.clone() });
    }
    if facts.source_support == SnapshotSupport::HeadOnly {
        check_name(facts, request, state)?;
        return Ok(Decision::Begin { from: Origin::Compare, rewind: false });
    }
    if let Some(name) = &request.name
        && let Some(commit) = common(facts, state).find(|commit| commit.name == *name)
    {
        return Ok(Decision::AlreadyThere(commit.clone()));
    }
    let base = common(facts, state).last().ok_or(ConflictKind::NoCommonSnapshot)?;
    check_name(facts, request, state)?;
    check_age(facts, request, newest)?;
    // An older base than the one HEAD is at: a delta from it does not say what the newer commits changed in between.
    let rewind = base != newest;
    if rewind && facts.target_support == SnapshotSupport::HeadOnly {
        return Err(ConflictKind::NoCommonSnapshot);
    }
    Ok(Decision::Begin { from: Origin::Base(base.source_id), rewind })
}

/// Whether the name asked for is free on the target.
fn check_name(facts: &Facts, request: &Request, state: &TargetState) -> Result<(), ConflictKind> {
    let ours = |name: &String| state.in_flight.as_ref().is_some_and(|in_flight| in_flight.name == *name);
    match &request.name {
        Some(name) if !ours(name) => check_name_free(facts, request),
        _ => Ok(()),
    }
}

/// What a batch stream is to be applied to.
#[derive(Clone, Debug)]
pub struct Offer<'a> {
    /// The image that its bytes are of.
    pub source: &'a ImageIdentity,
    /// The snapshot that it starts from; `None` for an image of zeroes.
    pub from: Option<&'a Snapshot>,
    /// The snapshot that it ends at.
    pub to: &'a Snapshot,
}

/// How a batch stream is to be applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// The target has that snapshot already.
    AlreadyThere(Commit),
    /// The target snapshot is there; it only has to be entered into the state.
    EnterCommit {
        /// What is in flight.
        in_flight: InFlight,
        /// The target snapshot.
        target: Snapshot,
    },
    /// The same stream was received in part.
    Resume(InFlight),
    /// From its first byte.
    Begin {
        /// What from.
        from: Origin,
        /// Whether HEAD must be brought back to the base before.
        rewind: bool,
        /// Whether HEAD holds parts of a lost first copy, and must be emptied before.
        empty: bool,
    },
}

/// Decides how a stream is to be applied, or names the conflict. `facts` are those of the target; of the source nothing
/// is known but what the stream says.
pub fn accept(facts: &Facts, offer: &Offer<'_>) -> Result<Acceptance, ConflictKind> {
    let wrong_base = |at: String| ConflictKind::WrongBase {
        stream: offer.from.map_or_else(|| "an empty image".to_owned(), |from| format!("snapshot {from}")),
        at,
    };
    let fresh = |state: Option<&TargetState>| {
        if !facts.target_blank || !facts.target_snapshots.is_empty() {
            return Err(ConflictKind::NotOurs);
        }
        debug_assert!(state.is_none_or(|state| state.commits.is_empty()));
        if offer.from.is_some() {
            return Err(wrong_base("nothing: it is empty".to_owned()));
        }
        Ok(Acceptance::Begin { from: Origin::Blank, rewind: false, empty: false })
    };
    let Some(state) = &facts.state else { return fresh(None) };
    if state.source != *offer.source {
        return Err(ConflictKind::OtherSource {
            followed: (state.source.clone(), state.source_location.clone()),
            given: offer.source.clone(),
        });
    }
    let same = |snapshot: &Snapshot| snapshot.id == offer.to.id && snapshot.name == offer.to.name;
    let from = offer.from.map_or(Origin::Blank, |from| Origin::Base(from.id));
    let dirty = state.in_flight.as_ref().filter(|in_flight| in_flight.dirty);
    if let Some(in_flight) = dirty
        && in_flight.snapshot.as_ref().is_some_and(same)
        && in_flight.from == from
    {
        let base_is_lost =
            in_flight.rewind && facts.target_support == SnapshotSupport::HeadOnly && from != Origin::Blank;
        return match made(facts, in_flight)? {
            Some(target) => Ok(Acceptance::EnterCommit { in_flight: in_flight.clone(), target }),
            None if base_is_lost => Err(wrong_base("no snapshot: it holds parts of a stream with a fault".to_owned())),
            None => Ok(Acceptance::Resume(in_flight.clone())),
        };
    }
    let committed = state.commits.iter().find(|commit| commit.source_id == offer.to.id && commit.name == offer.to.name);
    if let Some(commit) = committed.filter(|commit| on_target(facts, commit)) {
        return Ok(Acceptance::AlreadyThere(commit.clone()));
    }
    check_offered_name(facts, offer)?;
    let Some(newest) = state.newest() else {
        return match (dirty, offer.from) {
            (Some(_), None) => Ok(Acceptance::Begin { from: Origin::Blank, rewind: false, empty: true }),
            (Some(_), Some(_)) => Err(wrong_base("nothing: its first copy was never finished".to_owned())),
            (None, _) => fresh(Some(state)),
        };
    };
    if dirty.is_none() && !on_target(facts, newest) {
        return Err(ConflictKind::CommitRemoved { name: newest.name.clone() });
    }
    if facts.head_differs {
        return Err(ConflictKind::Diverged { since: newest.name.clone() });
    }
    let base = state.commits.iter().find(|commit| {
        offer.from.is_some_and(|from| from.id == commit.source_id && from.name == commit.name)
            && on_target(facts, commit)
    });
    let Some(base) = base else { return Err(wrong_base(format!("snapshot {}", newest.on_source()))) };
    let rewind = base != newest || dirty.is_some();
    if rewind && facts.target_support == SnapshotSupport::HeadOnly {
        return Err(wrong_base("no snapshot: it is being written".to_owned()));
    }
    Ok(Acceptance::Begin { from: Origin::Base(base.source_id), rewind, empty: false })
}

fn check_offered_name(facts: &Facts, offer: &Offer<'_>) -> Result<(), ConflictKind> {
    let request = Request { name: Some(offer.to.name.clone()), ..Request::default() };
    check_name_free(facts, &request)
}
