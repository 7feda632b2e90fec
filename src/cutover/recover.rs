//! What is to be done about a cutover that was begun and not finished: a pure function of the journal's phase and of what
//! is true of the server now.

use super::phase::Phase;
use super::provider::{Observed, Power, Side};

/// How it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The server runs where it was and nothing was lost: from the beginning.
    Afresh,
    /// It stands still: the last changes are carried over, from a cycle that needs nothing of what was done before.
    FromQuiesced,
    /// It was to be started on the other side: whether it has written there decides.
    AskTheImages,
    /// It is in memory with its disks on the other side, and was never told to go on.
    Start,
    /// It runs on the other side.
    Commit,
    /// It was on its way back.
    GoBack,
    /// Both sides may have been written.
    Diverged,
}

/// Decides. `by_hand`: nobody but a person knows what the server does.
pub fn next(phase: Phase, to: Side, observed: &Observed, by_hand: bool) -> Next {
    let runs_on = |side| observed.power == Power::Running && observed.side == Some(side);
    match phase {
        Phase::RollingBack => Next::GoBack,
        Phase::Committed if runs_on(to.other()) && !by_hand => Next::Diverged,
        Phase::Committed => Next::Commit,
        // Nothing was stopped yet, or it was over.
        Phase::Syncing | Phase::Converged | Phase::RolledBack => Next::Afresh,
        Phase::Quiescing | Phase::FinalDelta | Phase::Verifying | Phase::Swapping => match () {
            () if by_hand => Next::FromQuiesced,
            () if runs_on(to.other()) => Next::Afresh,
            // Both sides were proved to be equal before the swap, so that whoever started it there lost nothing.
            () if runs_on(to) && phase == Phase::Swapping => Next::Commit,
            () if observed.power == Power::Running => Next::Diverged,
            // Whoever started it there, and stopped it, has had it write there.
            () if phase == Phase::Swapping && observed.side != Some(to.other()) => Next::AskTheImages,
            () => Next::FromQuiesced,
        },
        Phase::Resuming => match () {
            () if by_hand => Next::Commit,
            () if runs_on(to) => Next::Commit,
            () if observed.power == Power::Suspended && observed.side == Some(to) => Next::Start,
            () if observed.power == Power::Running => Next::Diverged,
            () => Next::AskTheImages,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [Phase; 10] = [
        Phase::Syncing,
        Phase::Converged,
        Phase::Quiescing,
        Phase::FinalDelta,
        Phase::Verifying,
        Phase::Swapping,
        Phase::Resuming,
        Phase::Committed,
        Phase::RollingBack,
        Phase::RolledBack,
    ];

    fn worlds() -> Vec<Observed> {
        let powers = [Power::Running, Power::Suspended, Power::Saved, Power::Off];
        let sides = [None, Some(Side::Source), Some(Side::Target)];
        powers.iter().flat_map(|&power| sides.map(|side| Observed { power, side })).collect()
    }

    #[test]
    fn a_server_that_runs_is_never_taken_for_one_that_stands_still() {
        for (phase, observed) in PHASES.iter().flat_map(|&phase| worlds().into_iter().map(move |world| (phase, world)))
        {
            let next = next(phase, Side::Target, &observed, false);
            if observed.power == Power::Running {
                assert!(!matches!(next, Next::FromQuiesced | Next::AskTheImages), "{phase} {observed:?}");
            }
            // Nothing but a proof, or a server that runs there, ends in a commit.
            if next == Next::Commit && phase != Phase::Committed {
                assert_eq!(observed, Observed { power: Power::Running, side: Some(Side::Target) }, "{phase}");
                assert!(matches!(phase, Phase::Swapping | Phase::Resuming), "{phase}");
            }
        }
    }

    #[test]
    fn both_directions_are_alike() {
        for (phase, observed) in PHASES.iter().flat_map(|&phase| worlds().into_iter().map(move |world| (phase, world)))
        {
            let mirrored = Observed { side: observed.side.map(Side::other), ..observed.clone() };
            let there = next(phase, Side::Target, &observed, false);
            assert_eq!(there, next(phase, Side::Source, &mirrored, false), "{phase} {observed:?}");
        }
    }

    #[test]
    fn a_suspended_server_with_its_disks_on_the_other_side_is_told_to_go_on() {
        let there = Observed { power: Power::Suspended, side: Some(Side::Target) };
        assert_eq!(next(Phase::Resuming, Side::Target, &there, false), Next::Start);
        assert_eq!(next(Phase::Swapping, Side::Target, &there, false), Next::AskTheImages);
        let here = Observed { power: Power::Suspended, side: Some(Side::Source) };
        assert_eq!(next(Phase::Resuming, Side::Target, &here, false), Next::AskTheImages);
    }
}
