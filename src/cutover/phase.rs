//! The phases of a cutover, and which follows which: one table, and no I/O.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a cutover, or the way back after one, is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The server runs, and cycles go on: the warm-up.
    Syncing,
    /// What is left to carry over is small: the server may be stopped.
    Converged,
    /// The server is being stopped, saved or suspended.
    Quiescing,
    /// It does not write any more; the last changes are carried over.
    FinalDelta,
    /// The copy is being proved.
    Verifying,
    /// The server is given its disks on the other side. Nothing runs yet.
    Swapping,
    /// The server is being started on the other side: from here on it may have written there.
    Resuming,
    /// It runs there. What is left is to put the side that it has left out of the way.
    Committed,
    /// The server is being brought back to the side that it came from.
    RollingBack,
    /// It runs where it came from, as if nothing had happened.
    RolledBack,
}

use Phase::{
    Committed, Converged, FinalDelta, Quiescing, Resuming, RolledBack, RollingBack, Swapping, Syncing, Verifying,
};

/// Which phase may follow which. A phase may always be entered again: every step can be repeated.
pub const TRANSITIONS: &[(Phase, &[Phase])] = &[
    (Syncing, &[Converged, RollingBack]),
    (Converged, &[Quiescing, RollingBack]),
    (Quiescing, &[FinalDelta, RollingBack]),
    (FinalDelta, &[Quiescing, Verifying, RollingBack]),
    (Verifying, &[Quiescing, Swapping, RollingBack]),
    // Both sides are equal by then: whoever started it on the other one has lost nothing.
    (Swapping, &[Quiescing, Resuming, Committed, RollingBack]),
    // Back only after it was proved that the server has not written on the other side.
    (Resuming, &[Committed, Quiescing, RollingBack]),
    (Committed, &[]),
    // It was started on the other side meanwhile, and has written there.
    (RollingBack, &[Resuming, Committed, RolledBack]),
    (RolledBack, &[]),
];

impl Phase {
    /// Whether `next` may follow.
    pub fn may_become(self, next: Self) -> bool {
        self == next || TRANSITIONS.iter().any(|(from, to)| *from == self && to.contains(&next))
    }

    /// Whether nothing is left to be done.
    pub fn is_over(self) -> bool {
        matches!(self, Committed | RolledBack)
    }

    /// Whether the server may have been stopped, and not started again.
    pub fn is_outage(self) -> bool {
        matches!(self, Quiescing | FinalDelta | Verifying | Swapping | Resuming | RollingBack)
    }

    /// How people are told of it: `final delta`.
    pub fn title(self) -> &'static str {
        match self {
            Syncing => "syncing",
            Converged => "converged",
            Quiescing => "quiescing",
            FinalDelta => "final delta",
            Verifying => "verifying",
            Swapping => "swapping",
            Resuming => "resuming",
            Committed => "committed",
            RollingBack => "rolling back",
            RolledBack => "rolled back",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_has_its_row_and_the_way_back_is_open_until_the_commit() {
        for (index, (phase, next)) in TRANSITIONS.iter().enumerate() {
            assert_eq!(TRANSITIONS.iter().position(|(other, _)| other == phase), Some(index));
            assert_eq!(phase.is_over(), next.is_empty());
            let can_go_back = phase.may_become(RollingBack) || *phase == RolledBack;
            assert_eq!(can_go_back, *phase != Committed, "{phase}");
        }
        assert_eq!(TRANSITIONS.len(), 10);
    }

    #[test]
    fn nothing_is_started_on_the_other_side_before_it_was_proved() {
        // Every way from the first phase to Resuming leads through Verifying and Swapping; but for the way back, from which
        // only one leads there that had been swapped before.
        fn reaches(from: Phase, to: Phase, without: Phase, seen: &mut Vec<Phase>) -> bool {
            if from == without || seen.contains(&from) {
                return false;
            }
            seen.push(from);
            let next = TRANSITIONS.iter().find(|(phase, _)| *phase == from).map_or(&[][..], |(_, next)| next);
            let next: &[Phase] = if from == RollingBack { &[RolledBack] } else { next };
            from == to || next.iter().any(|&next| reaches(next, to, without, seen))
        }
        for needed in [Converged, Quiescing, FinalDelta, Verifying, Swapping] {
            assert!(!reaches(Syncing, Resuming, needed, &mut Vec::new()), "{needed}");
            assert!(!reaches(Syncing, Committed, needed, &mut Vec::new()), "{needed}");
        }
        assert!(reaches(Syncing, Committed, RollingBack, &mut Vec::new()));
    }
}
