//! The cutover: a server leaves its sources and goes on from its targets, in seconds, with a way back.
//!
//! ```text
//! Syncing ─▶ Converged ─▶ Quiescing ─▶ FinalDelta ─▶ Verifying ─▶ Swapping ─▶ Resuming ─▶ Committed
//!    └───────────┴────────────┴────────────┴──────────────┴────────────┴───────────┴──▶ RollingBack ─▶ RolledBack
//! ```
//!
//! The way back after the commit is the same walk with the sides exchanged: what was written on the targets since is
//! carried to the sources by the same cycles and the same last delta, or discarded.
//!
//! | part | what it is |
//! |---|---|
//! | [`phase`] | the phases and the one table of transitions; no I/O |
//! | [`journal`] | what was meant to be done, kept with the first target |
//! | [`provider`] | who stops and starts a server and names its disks: the contract, and the ways of doing it |
//! | `driver`, `warm_up`, `proof`, `finish` | the walk, from the first cycle to either end |
//! | [`recover`] | what is to be done about a walk that was cut: a pure function of the phase and the world |
//! | `readiness` | what stands in the way, and how long it would take |
//! | [`farewell`], [`finalize`] | the end of the way back: what would be lost, and removing it |
//!
//! # What a crash leaves, and what the next run does
//!
//! | phase | left behind | `cutover` again | `rollback` |
//! |---|---|---|---|
//! | Syncing, Converged | a server that runs | from the beginning | nothing to go back from: it is tidied up |
//! | Quiescing to Swapping | a server that stands still, or runs where it was | a whole cycle, then on | undone |
//! | Resuming | a server that may have written on the other side | asked the hypervisor, then the images | undone if it has not written there |
//! | Committed | a server that runs there | the rest is done | the rest is done, then the way back |
//! | RollingBack | a server on its way back | brought back | brought back |
//!
//! A memory that was saved is restored only while it is proved that nobody has written to the disks that it knows: the
//! lock that fenced them is still that of the process that took it, dead or alive.

mod driver;
pub mod farewell;
pub mod finalize;
mod finish;
pub mod journal;
pub mod phase;
mod proof;
pub mod provider;
mod readiness;
pub mod recover;
mod server;
mod sides;
#[cfg(test)]
mod tests;
mod warm_up;

use tokio_util::sync::CancellationToken;

use driver::Walk;
use journal::{Changes, Journal};
use phase::Phase;
use provider::{Observed, Power, Side};
use recover::Next;
pub use server::{CutoverError, Observer, Options, PhaseTime, Proof, Readiness, Report, Result, Server, Volume};
use sides::Sides;

use crate::fleet::CUTOVER_NOTE;
use crate::image::LockHolder;

/// What stands in the way of leaving for `to`, and how long it would take. Changes nothing.
pub async fn readiness(server: &Server, to: Side, _options: &Options) -> Result<Readiness> {
    readiness::look(Sides { server, to }).await
}

/// The journal, if there is one.
pub async fn journal(server: &Server) -> Result<Option<Journal>> {
    sides::load_journal(server).await
}

/// Brings a server over to its targets, or finishes what was begun. A failure before the commit brings it back, which is
/// an `Ok` with [`Phase::RolledBack`]. `cancel` is heeded until the server was stopped, and brings it back after.
pub async fn cutover(
    server: &Server,
    options: &Options,
    observer: &dyn Observer,
    cancel: &CancellationToken,
) -> Result<Report> {
    let walk = Walk::new(Sides { server, to: Side::Target }, options, (observer, cancel), None)?;
    match sides::load_journal(server).await? {
        Some(found) if found.finalizing => Err(being_finalized(&server.name)),
        Some(found) if found.is_cut_over() => Err(CutoverError::WrongState {
            server: server.name.clone(),
            problem: "runs from its targets already".into(),
            hint: "rollback brings it back, finalize removes what it has left".into(),
        }),
        Some(found) if found.to == Side::Source && !found.is_over() => Err(CutoverError::WrongState {
            server: server.name.clone(),
            problem: "is on its way back to its sources".into(),
            hint: "finish that first: poolshift rollback".into(),
        }),
        Some(found) if found.to == Side::Target && !found.is_over() => walk.again(found).go_on().await,
        _ => walk.begin().await,
    }
}

/// Brings a server back to its sources, or finishes what was begun. Of a cutover that is not over `changes` may say
/// nothing: then it is undone, if the server has not run from its targets.
pub async fn rollback(
    server: &Server,
    changes: Option<Changes>,
    options: &Options,
    observer: &dyn Observer,
    cancel: &CancellationToken,
) -> Result<Report> {
    let context = (observer, cancel);
    let there = |changes| Walk::new(Sides { server, to: Side::Target }, options, context, changes);
    let back = |changes| Walk::new(Sides { server, to: Side::Source }, options, context, changes);
    let needs_a_word = || CutoverError::WrongState {
        server: server.name.clone(),
        problem: "runs from its targets, and has written there".into(),
        hint: "say what becomes of that: --with-changes carries it back, --discard-changes loses it".into(),
    };
    match sides::load_journal(server).await? {
        None => Err(CutoverError::WrongState {
            server: server.name.clone(),
            problem: "was not cut over: there is nothing to go back from".into(),
            hint: "poolshift status shows where it is".into(),
        }),
        Some(found) if found.finalizing => Err(being_finalized(&server.name)),
        Some(found) if found.is_cut_over() => {
            let mut walk = back(Some(changes.ok_or_else(needs_a_word)?))?;
            walk.journal.note_before.clone_from(&found.note_before);
            walk.begin().await
        }
        Some(found) if found.to == Side::Source => {
            // What was begun one way is not ended the other: the sources may hold parts of the changes.
            let changes = found.changes;
            back(changes)?.again(found).go_on().await
        }
        Some(found) => match there(None)?.again(found).give_up().await? {
            GivenUp::RolledBack(report) => Ok(report),
            GivenUp::Committed(found) => {
                let mut walk = back(Some(changes.ok_or_else(needs_a_word)?))?;
                walk.journal.note_before = found.and_then(|found| found.note_before);
                walk.begin().await
            }
        },
    }
}

/// A server whose sources are going goes nowhere.
pub fn being_finalized(server: &str) -> CutoverError {
    CutoverError::WrongState {
        server: server.to_owned(),
        problem: "is being finalized: its sources are going, or have gone, and there is no way back".into(),
        hint: "it runs from its targets; finish what was begun: poolshift finalize PLAN SERVER".into(),
    }
}

/// What the fleet's workers are told while this is under way.
fn own_note(by: &str) -> String {
    format!("{CUTOVER_NOTE} for its cutover{by}")
}

/// How a cutover that was not over ended when it was given up.
enum GivenUp {
    /// The server runs where it came from.
    RolledBack(Report),
    /// It runs from its targets.
    Committed(Option<Journal>),
}

impl Walk<'_> {
    /// From the beginning, with a server that runs where it is.
    async fn begin(mut self) -> Result<Report> {
        let readiness = readiness::look(self.sides).await?;
        readiness::refuse(self.server(), &readiness, self.options)?;
        (self.journal.phase, self.journal.stopped, self.stopped) = (Phase::Syncing, None, None);
        self.pause_workers().await?;
        if let Err(error) = self.sides.take_leases(self.observer, self.cancel).await {
            // Another cutover that has begun meanwhile needs the note.
            if !matches!(sides::load_journal(self.server()).await, Ok(Some(found)) if !found.is_over()) {
                self.leave_note(self.journal.note_before.as_deref()).await?;
            }
            return Err(error);
        }
        match self.warm_up().await {
            Ok(()) => match self.stop_and_go().await {
                Ok(()) => self.commit().await,
                Err(error) => self.go_back(error).await,
            },
            Err(error) => {
                // Nothing was stopped: it is as if nothing had been begun. What this can't tidy up, the next run can.
                if let Err(untidy) = self.end_before_the_stop().await {
                    tracing::warn!(error = driver::error_text(&untidy), "what was begun was not tidied up");
                }
                Err(error)
            }
        }
    }

    /// Has the fleet's workers leave the server alone.
    async fn pause_workers(&mut self) -> Result<()> {
        let Some(first) = self.server().volumes.first() else { return Ok(()) };
        if self.sides.to == Side::Source {
            // It is paused since its cutover.
            return Ok(());
        }
        let note = first.target.load_note().await?;
        let own = |note: &String| note.starts_with(&own_note(""));
        self.journal.note_before = note.filter(|note| !own(note)).or_else(|| self.journal.note_before.take());
        let worker = &self.journal.worker;
        let text = own_note(&format!(" by process {} on {}", worker.pid, worker.host));
        self.leave_note(Some(&text)).await
    }

    async fn end_before_the_stop(&mut self) -> Result<()> {
        self.enter(Phase::RollingBack).await?;
        self.end_where_it_was().await
    }

    /// Makes sure that the process that began this is gone, and that nobody else goes on with it: before the server may
    /// have been started on the other side the leases there decide, and the fence on what is left from then on. Gives
    /// back what is true of the server, and whether what is left is as that process has left it.
    async fn take_over(&mut self) -> Result<(Observed, bool)> {
        let untouched = self.is_untouched().await?;
        match self.journal.phase {
            Phase::Resuming | Phase::Committed => {
                let stays_open = self.server().provider.stays_open();
                let holder = if stays_open { LockHolder::Ask } else { LockHolder::Refuse };
                self.sides.fence(holder).await?;
            }
            _ => self.sides.take_leases(self.observer, self.cancel).await?,
        }
        let observed = self.observe().await?;
        let text = format!("going on where it was cut, at {}; the server is {}", self.journal.phase, observed.power);
        self.observer.note(&text);
        Ok((observed, untouched))
    }

    /// Finishes what another process has begun.
    async fn go_on(mut self) -> Result<Report> {
        let (observed, untouched) = self.take_over().await?;
        let provider = &self.server().provider;
        let memory_is_lost = provider.keeps_memory() && observed.power == Power::Saved && !untouched;
        let done = match recover::next(self.journal.phase, self.sides.to, &observed, provider.by_hand()) {
            Next::Afresh => return self.begin().await,
            Next::FromQuiesced => {
                self.fresh = memory_is_lost;
                self.go_on_quiesced().await
            }
            Next::Start => self.go().await,
            Next::AskTheImages => {
                self.fresh = self.is_written().await? || memory_is_lost;
                self.go().await
            }
            Next::Commit => Ok(()),
            Next::GoBack => {
                self.fresh = memory_is_lost;
                let because = self.asked_for();
                return self.go_back(because).await;
            }
            Next::Diverged => return Err(self.diverged()),
        };
        match done {
            Ok(()) => self.commit().await,
            Err(error) => self.go_back(error).await,
        }
    }

    /// Undoes what another process has begun, or ends it where that is no longer possible.
    async fn give_up(mut self) -> Result<GivenUp> {
        let (observed, untouched) = self.take_over().await?;
        let provider = &self.server().provider;
        self.fresh = provider.keeps_memory() && observed.power == Power::Saved && !untouched;
        match recover::next(self.journal.phase, self.sides.to, &observed, provider.by_hand()) {
            Next::Commit => {
                let server = self.server();
                self.commit().await?;
                Ok(GivenUp::Committed(sides::load_journal(server).await?))
            }
            Next::Diverged => Err(self.diverged()),
            Next::Afresh | Next::FromQuiesced | Next::Start | Next::AskTheImages | Next::GoBack => {
                let because = self.asked_for();
                Ok(GivenUp::RolledBack(self.go_back(because).await?))
            }
        }
    }

    fn asked_for(&self) -> CutoverError {
        CutoverError::Unfinished { server: self.server().name.clone(), phase: self.journal.phase }
    }

    fn diverged(&self) -> CutoverError {
        CutoverError::Diverged {
            server: self.server().name.clone(),
            problem: format!(
                "it was at {} when its cutover was cut, and runs now where that can't have brought it: both sides may \
                 have been written since",
                self.journal.phase
            ),
            hint: "find out which side holds what counts, shut the server down, and run cutover or rollback again"
                .into(),
        }
    }
}
