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
//! | [`mod@journal`] | what was meant to be done, kept with the first target |
//! | [`provider`] | who stops and starts a server and names its disks: the contract, and the ways of doing it |
//! | `driver`, `warm_up`, `proof`, `finish` | the walk, from the first cycle to either end |
//! | `metadata` | what belongs to a disk beside its bytes |
//! | [`recover`] | what is to be done about a walk that was cut: a pure function of the phase and the world |
//! | `readiness` | what stands in the way, and how long it would take |
//! | [`rehearsal`] | a throw-away server boots from clones, before any of this |
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
mod metadata;
pub mod phase;
mod proof;
pub mod provider;
mod readiness;
pub mod recover;
pub mod rehearsal;
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

use crate::fleet::{CUTOVER_NOTE, chain_text};
use crate::image::LockHolder;

/// What stands in the way of leaving for `to`, and how long it would take. Changes nothing.
pub async fn readiness(server: &Server, to: Side) -> Result<Readiness> {
    readiness::look(Sides { server, to }).await
}

/// The journal, if there is one.
pub async fn journal(server: &Server) -> Result<Option<Journal>> {
    sides::load_journal(server).await
}

/// Whether the server is paused by a cutover that has not got further than that, and may be gone.
pub async fn is_paused_by_a_cutover(server: &Server) -> Result<bool> {
    let Some(first) = server.volumes.first() else { return Ok(false) };
    Ok(first.target.load_note().await?.is_some_and(|note| note.starts_with(&own_note(""))))
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
        Some(found) if found.to == Side::Target && !found.is_over() => walk.again(found)?.go_on().await,
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
        None if is_paused_by_a_cutover(server).await? => there(None)?.take_note_away().await,
        None => Err(CutoverError::WrongState {
            server: server.name.clone(),
            problem: "was not cut over: there is nothing to go back from".into(),
            hint: "poolshift status shows where it is".into(),
        }),
        Some(found) if found.finalizing => Err(being_finalized(&server.name)),
        Some(found) if found.is_cut_over() => {
            let mut walk = back(Some(changes.ok_or_else(needs_a_word)?))?;
            walk.sides.refuse_others(&found)?;
            walk.refuse_half_carried().await?;
            walk.journal.note_before.clone_from(&found.note_before);
            walk.begin().await
        }
        Some(found) if found.to == Side::Source => {
            // What was begun one way is not ended the other: the sources may hold parts of the changes.
            let changes = found.changes;
            back(changes)?.again(found)?.go_on().await
        }
        Some(found) => match there(None)?.again(found)?.give_up(changes).await? {
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

/// How often a server is looked at that is not the same at the second look. One that was told to stop changes once.
const LOOKS_MAX: u32 = 5;

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
        (self.journal.swapped, self.journal.memory_lost) = (false, false);
        self.journal.volumes.iter_mut().for_each(|volume| volume.fence = None);
        let (seen, to) = (sides::load_journal(self.server()).await?, self.sides.to);
        self.pause_workers().await?;
        if let Err(error) = self.sides.take_leases(self.observer, self.cancel).await {
            // Another cutover that has begun, or ended, meanwhile needs the note.
            let now = sides::load_journal(self.server()).await;
            let mine = matches!(&now, Ok(now) if *now == seen) && seen.is_none_or(|seen| !seen.is_cut_over());
            if to == Side::Target && mine {
                self.leave_note(self.journal.note_before.as_deref()).await?;
            }
            return Err(error);
        }
        if sides::load_journal(self.server()).await? != seen {
            self.sides.release_leases().await;
            return Err(self.overtaken());
        }
        match to {
            // Another one that gave up may have taken it away.
            Side::Target => self.leave_note(Some(&self.note())).await?,
            Side::Source => {
                if let Err(half) = self.refuse_half_carried().await {
                    self.sides.release_leases().await;
                    return Err(half);
                }
            }
        }
        match self.warm_up().await {
            Ok(()) => {
                let done = self.stop_and_go().await;
                self.end(done).await
            }
            Err(error) => {
                // Nothing was stopped: it is as if nothing had been begun. What this can't tidy up, the next run can.
                if let Err(untidy) = self.end_before_the_stop().await {
                    tracing::warn!(error = chain_text(&untidy), "what was begun was not tidied up");
                }
                // There is no report to have them.
                self.remarks.iter().for_each(|remark| self.observer.note(remark));
                Err(error)
            }
        }
    }

    /// A cutover that has only paused the server is gone: the leases say so.
    async fn take_note_away(self) -> Result<Report> {
        self.sides.take_leases(self.observer, self.cancel).await?;
        if sides::load_journal(self.server()).await?.is_some() {
            self.sides.release_leases().await;
            return Err(self.overtaken());
        }
        self.end_as_it_is().await
    }

    /// What was begun with the changes is ended with them: the sources hold a part of them.
    async fn refuse_half_carried(&self) -> Result<()> {
        if self.carries() {
            return Ok(());
        }
        for volume in &self.server().volumes {
            if volume.source.load_state().await?.is_some() {
                return Err(CutoverError::WrongState {
                    server: self.server().name.clone(),
                    problem: format!(
                        "was to be brought back with its changes, and {} holds a part of them",
                        volume.source.location()
                    ),
                    hint: "only --with-changes makes it whole".into(),
                });
            }
        }
        Ok(())
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
        self.leave_note(Some(&self.note())).await
    }

    /// What the workers are told.
    fn note(&self) -> String {
        let worker = &self.journal.worker;
        own_note(&format!(" by process {} on {}", worker.pid, worker.host))
    }

    async fn end_before_the_stop(&mut self) -> Result<()> {
        self.enter(Phase::RollingBack).await?;
        if self.sides.to == Side::Source {
            // A walk that was cut may have given them the name back under which servers use them.
            self.sides.name_sources(true).await?;
        }
        let provider = &self.server().provider;
        if provider.names_images() {
            // What it has prepared in the pools is in nobody's way; the next walk needs it again.
            if let Err(error) = provider.settle(self.sides.to.other(), &mut self.journal.notes).await {
                self.remarks.push(finish::untidy(&error));
            }
        }
        self.end_where_it_was().await
    }

    fn overtaken(&self) -> CutoverError {
        CutoverError::WrongState {
            server: self.server().name.clone(),
            problem: "is being worked on by another process, which has gone on meanwhile".into(),
            hint: "look at where it is now with --dry-run".into(),
        }
    }

    /// Whether the journal is still what it was when this began.
    async fn is_as_found(&self) -> Result<bool> {
        let now = sides::load_journal(self.server()).await?;
        Ok(now.is_some_and(|now| now == Journal { worker: now.worker.clone(), ..self.journal.clone() }))
    }

    /// Makes sure that the process that began this is gone, and that nobody else goes on with it: the leases of the side
    /// that the server was to go to decide, or the fence on the other one where the server may run there. Gives back what
    /// is true of the server, and whether what is left is as that process has left it.
    async fn take_over(&mut self) -> Result<(Observed, bool)> {
        let mut tries = 0;
        let (observed, untouched) = loop {
            let (observed, untouched) = (self.observe().await?, self.is_untouched().await?);
            // Who has gone on meanwhile gives the leases back for the server, which is not to find them taken then. What is
            // left is the moment between this look and the leases.
            if !self.is_as_found().await? {
                return Err(self.overtaken());
            }
            self.keep_others_out(&observed).await?;
            let same = self.is_as_found().await?;
            if same && self.observe().await? == observed {
                break (observed, untouched);
            }
            self.sides.release_leases().await;
            self.sides.release_fences().await?;
            tries += 1;
            if !same || tries >= LOOKS_MAX {
                return Err(self.overtaken());
            }
            // What it was told before the process was killed it may do only now: a guest takes its time to shut down.
            self.observer.note("the server is changing by itself: looking again");
        };
        let observed = self.have_stopped(observed).await?;
        if untouched && matches!(self.journal.phase, Phase::Resuming | Phase::Committed) {
            // It is this process now that has kept others out all the time.
            self.note_fences().await?;
            sides::store_journal(self.server(), Some(&self.journal)).await?;
        }
        let text = format!("going on where it was cut, at {}; the server is {}", self.journal.phase, observed.power);
        self.observer.note(&text);
        Ok((observed, untouched))
    }

    /// A server that runs, and was told to stop by a process that is gone, may stop at any moment: it is waited for, so
    /// that nobody takes it for one that goes on.
    async fn have_stopped(&mut self, observed: Observed) -> Result<Observed> {
        let (server, from) = (self.server(), self.sides.to.other());
        let runs = observed == Observed { power: Power::Running, side: Some(from) };
        if !runs || self.journal.phase != Phase::Quiescing || server.provider.by_hand() {
            return Ok(observed);
        }
        if let Err(error) = server.provider.finish_stop(&mut self.journal.notes).await {
            // A guest that does not listen goes on.
            tracing::warn!(error = chain_text(&error), "it was told to stop, and does not");
        }
        self.observe().await
    }

    /// Takes what decides who goes on with a walk that was cut, where the server is as it was found.
    async fn keep_others_out(&mut self, observed: &Observed) -> Result<()> {
        let (to, by_hand) = (self.sides.to, self.server().provider.by_hand());
        let runs_on = |side| !by_hand && *observed == Observed { power: Power::Running, side: Some(side) };
        match self.journal.phase {
            // Its disks are its own.
            Phase::Resuming | Phase::Committed if runs_on(to.other()) => Err(self.diverged()),
            Phase::Resuming | Phase::Committed => self.sides.fence(self.holder(observed)).await,
            Phase::Swapping | Phase::RollingBack if runs_on(to) => self.sides.fence(LockHolder::Refuse).await,
            _ => self.sides.take_leases(self.observer, self.cancel).await,
        }
    }

    /// What is to be done, as things are.
    fn next(&self, observed: &Observed) -> Next {
        let by_hand = self.server().provider.by_hand();
        match recover::next(self.journal.phase, self.sides.to, observed, by_hand) {
            Next::GoBack if !by_hand && self.carries() && self.may_have_been_started(observed) => Next::AskTheImages,
            next => next,
        }
    }

    /// Whether the server, which stands still, has written on the other side; [`CutoverError::Diverged`] where it may as
    /// well have written on the side that it was to leave.
    async fn was_started_there(&mut self, observed: &Observed, untouched: bool) -> Result<bool> {
        let written = self.is_written().await?;
        // While it would be started there, whoever has started it has started it there.
        let doubtful = !untouched && observed.side != Some(self.sides.to);
        if written && doubtful && self.carries() { Err(self.diverged()) } else { Ok(written) }
    }

    /// Finishes what another process has begun.
    async fn go_on(mut self) -> Result<Report> {
        let (observed, untouched) = self.take_over().await?;
        let provider = &self.server().provider;
        self.doubt_memory(&observed, untouched);
        let done = match self.next(&observed) {
            Next::Afresh => {
                if self.journal.phase.is_outage() && !provider.by_hand() {
                    // Its next start is from where it runs, and what was saved of it is old.
                    let remarks = provider.settle(self.sides.to.other(), &mut self.journal.notes).await?;
                    self.remarks.extend(remarks);
                }
                return self.begin().await;
            }
            Next::FromQuiesced => {
                if !provider.by_hand() {
                    self.stay_out(&observed).await?;
                }
                self.go_on_quiesced().await
            }
            Next::Start => self.go().await,
            Next::AskTheImages => {
                let written = self.was_started_there(&observed, untouched).await?;
                self.journal.memory_lost |= written;
                self.stay_out(&observed).await?;
                match self.journal.phase {
                    Phase::Swapping if !written => self.go_on_quiesced().await,
                    Phase::RollingBack if !written => {
                        let because = self.asked_for();
                        return self.go_back(because).await;
                    }
                    _ => match provider.swap(self.sides.to, &mut self.journal.notes).await {
                        Ok(()) => self.go().await,
                        Err(error) => Err(error.into()),
                    },
                }
            }
            Next::Commit => Ok(()),
            Next::GoBack => {
                let because = self.asked_for();
                return self.go_back(because).await;
            }
            Next::Diverged => return Err(self.diverged()),
        };
        self.end(done).await
    }

    /// The commit, or the way back.
    async fn end(self, done: Result<()>) -> Result<Report> {
        match done {
            Ok(()) => self.commit().await,
            Err(error) => self.go_back(error).await,
        }
    }

    /// A memory that was saved knows the disks as they were then.
    fn doubt_memory(&mut self, observed: &Observed, untouched: bool) {
        self.journal.memory_lost |= observed.power == Power::Saved && !untouched;
    }

    /// From here on nobody else writes what is left.
    async fn stay_out(&mut self, observed: &Observed) -> Result<()> {
        self.sides.fence(self.holder(observed)).await?;
        self.note_fences().await
    }

    /// Undoes what another process has begun, or ends it where that is no longer possible.
    async fn give_up(mut self, changes: Option<Changes>) -> Result<GivenUp> {
        let server = self.server();
        if changes == Some(Changes::Discard) && self.was_put_back().await? {
            return Ok(GivenUp::RolledBack(self.end_as_it_is().await?));
        }
        let (observed, untouched) = self.take_over().await?;
        self.doubt_memory(&observed, untouched);
        let next = self.next(&observed);
        let written = next == Next::AskTheImages && self.was_started_there(&observed, untouched).await?;
        match next {
            Next::Commit => self.commit().await?,
            Next::AskTheImages if written => {
                self.journal.memory_lost = true;
                self.stay_out(&observed).await?;
                server.provider.swap(self.sides.to, &mut self.journal.notes).await?;
                self.go().await?;
                self.commit().await?
            }
            Next::Diverged => return Err(self.diverged()),
            Next::Afresh if self.journal.phase == Phase::RolledBack => {
                self.end_where_it_was().await?;
                let because = self.asked_for();
                return Ok(GivenUp::RolledBack(self.report(Phase::RolledBack, Some(&because))));
            }
            Next::Afresh | Next::FromQuiesced | Next::Start | Next::AskTheImages | Next::GoBack => {
                let because = self.asked_for();
                return Ok(GivenUp::RolledBack(self.go_back(because).await?));
            }
        };
        Ok(GivenUp::Committed(sides::load_journal(server).await?))
    }

    /// Whether a person has started the server where it came from, after it was to be started on the other side.
    async fn was_put_back(&self) -> Result<bool> {
        let here = Observed { power: Power::Running, side: Some(self.sides.to.other()) };
        let by_hand = self.server().provider.by_hand();
        Ok(!by_hand && self.journal.phase == Phase::Resuming && self.observe().await? == here)
    }

    /// The server runs where it came from, and what it may have written on the other side is given up.
    async fn end_as_it_is(mut self) -> Result<Report> {
        self.sides.take_leases(self.observer, self.cancel).await?;
        let because = self.asked_for();
        self.end_before_the_stop().await?;
        Ok(self.report(Phase::RolledBack, Some(&because)))
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
            hint: "find out which side holds what counts, and start the server there by hand: on its targets cutover \
                   then finishes, on its sources rollback --discard-changes does"
                .into(),
        }
    }
}
