//! The two ends of a walk: the commit, after which the side that was left is put out of the way, and the way back before
//! it.

use std::time::Duration;

use futures::future::try_join_all;

use super::driver::Walk;
use super::journal::{Changes, moment};
use super::phase::Phase;
use super::provider::{Observed, Power, ProviderError, Side};
use super::server::{CutoverError, Report, Result};
use super::sides::store_journal;
use crate::failpoint::failpoint;
use crate::fleet::{CUTOVER_NOTE, chain_text};
use crate::image::{ErrorKind, LockHolder};
use crate::pipeline::Limits;
use crate::replicate;

/// For how long the journal may keep a server from going back: the image that it is with may be what has failed.
const JOURNAL_PATIENCE: Duration = Duration::from_secs(5);

/// What a person is told of a provider that could not clean up.
pub(super) fn untidy(error: &ProviderError) -> String {
    let hint = error.hint.as_ref().map(|hint| format!("; {hint}")).unwrap_or_default();
    format!("not all was tidied up: {error}{hint}")
}

impl Walk<'_> {
    /// The server runs on the other side: what is left to be done is off its way. May be repeated.
    pub(super) async fn commit(mut self) -> Result<Report> {
        self.enter(Phase::Committed).await?;
        let (server, to) = (self.server(), self.sides.to);
        // Held already, but by a walk that goes on for one that is gone.
        self.sides.fence(LockHolder::Refuse).await?;
        match to {
            Side::Target => {
                self.mark_sources().await;
                failpoint!("cutover.sources-marked");
                self.sides.name_sources(true).await?;
            }
            Side::Source => {
                self.sides.name_sources(false).await?;
                if self.carries() {
                    for volume in &server.volumes {
                        replicate::turn_back(volume.source.as_ref(), volume.target.as_ref()).await?;
                    }
                }
                for volume in &server.volumes {
                    volume.source.forget_state().await?;
                }
                failpoint!("cutover.states-forgotten");
            }
        }
        self.remarks.extend(server.provider.settle(to, &mut self.journal.notes).await?);
        failpoint!("cutover.settled");
        self.journal.done = true;
        self.journal.ended = Some(jiff::Timestamp::now().to_string());
        match to {
            Side::Target => {
                let at = moment(jiff::Timestamp::now());
                self.leave_note(Some(&format!("{CUTOVER_NOTE} cut over to its targets at {at}"))).await?;
                store_journal(server, Some(&self.journal)).await?;
            }
            Side::Source => {
                let before = self.journal.note_before.clone();
                self.leave_note(before.as_deref()).await?;
                store_journal(server, None).await?;
            }
        }
        // Last, so that nobody else begins anything before all of this is noted. What fails here ends with this process.
        let _ = self.sides.release_fences().await;
        self.sides.release_leases().await;
        Ok(self.report(Phase::Committed, None))
    }

    /// A snapshot of each source as it was left. It is a help for people, and for a way back that is given up half way; so
    /// it may fail.
    async fn mark_sources(&mut self) {
        for (volume, delta) in self.server().volumes.iter().zip(&self.deltas) {
            match volume.source.create_snapshot(delta.name()).await {
                Ok(_) => {}
                Err(error) if error.kind == ErrorKind::AlreadyExists => {}
                Err(error) => {
                    self.remarks.push(format!("{} has no snapshot of how it was left: {error}", volume.disk.volume))
                }
            }
        }
    }

    /// Leaves a note for the fleet's workers, or takes it away.
    pub(super) async fn leave_note(&self, note: Option<&str>) -> Result<()> {
        let Some(first) = self.server().volumes.first() else { return Ok(()) };
        first.target.store_note(note).await?;
        failpoint!("cutover.note-{}", if note.is_some() { "stored" } else { "removed" });
        Ok(())
    }

    /// Something went wrong before the commit: the server goes on where it came from.
    pub(super) async fn go_back(mut self, because: CutoverError) -> Result<Report> {
        match self.try_back().await {
            Ok(Back::Here) => Ok(self.report(Phase::RolledBack, Some(&because))),
            Ok(Back::There) => {
                self.remarks.push(format!("it runs where it was to go all the same, after: {}", chain_text(&because)));
                self.note_outage(std::time::Instant::now());
                // Its disks are its own.
                self.sides.release_leases().await;
                self.commit().await
            }
            Err(error) => Err(CutoverError::NotBrought {
                server: self.server().name.clone(),
                error: Box::new(error),
                because: chain_text(&because),
            }),
        }
    }

    async fn try_back(&mut self) -> Result<Back> {
        let (server, from, to) = (self.server(), self.sides.to.other(), self.sides.to);
        let observed = self.observe().await?;
        let runs_there = observed == (Observed { power: Power::Running, side: Some(to) });
        if self.journal.swapped && runs_there {
            return Ok(Back::There);
        }
        // From the swap on somebody may have started it there.
        let may_have_written =
            self.journal.phase == Phase::Resuming || self.carries() && self.may_have_been_started(&observed);
        if may_have_written && !server.provider.by_hand() && self.is_written().await? {
            return Err(self.has_run_there());
        }
        let entered = self.enter(Phase::RollingBack);
        if may_have_written {
            entered.await?;
        } else {
            // The server comes first: whoever reads the journal finds it running where it was.
            let missing = "the way back is not in the journal";
            match tokio::time::timeout(JOURNAL_PATIENCE, entered).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(error = chain_text(&error), "{missing}"),
                Err(_) => tracing::warn!("{missing}: it gets no answer"),
            }
        }
        self.sides.release_fences().await?;
        let runs = observed == (Observed { power: Power::Running, side: Some(from) });
        if !server.provider.by_hand() {
            let fresh = self.journal.memory_lost;
            server.provider.undo(from, fresh, &mut self.journal.notes).await?;
            failpoint!("cutover.undone");
            let now = self.observe().await?;
            if now != (Observed { power: Power::Running, side: Some(from) }) {
                return Err(self.unexpected("way back", &now));
            }
            if !runs {
                self.note_outage(std::time::Instant::now());
            }
            match server.provider.settle(from, &mut self.journal.notes).await {
                Ok(remarks) => self.remarks.extend(remarks),
                Err(error) => self.remarks.push(untidy(&error)),
            }
        }
        if let Err(error) = self.tidy_up_where_it_was().await {
            // It runs. The next cutover or rollback finds that, and does the rest.
            self.remarks.push(format!("not all was tidied up: {}; run rollback once more", chain_text(&error)));
        }
        Ok(Back::Here)
    }

    async fn tidy_up_where_it_was(&mut self) -> Result<()> {
        if self.sides.to == Side::Source {
            self.sides.name_sources(true).await?;
        }
        self.end_where_it_was().await
    }

    /// Whether the server stands still and would be started on the other side by whoever starts it.
    pub(super) fn may_have_been_started(&self, observed: &Observed) -> bool {
        let from = self.sides.to.other();
        self.journal.swapped && observed.side != Some(from) && observed.power != Power::Running
    }

    fn has_run_there(&self) -> CutoverError {
        CutoverError::Diverged {
            server: self.server().name.clone(),
            problem: "it was started on the other side and has written there, but does not run there now".into(),
            hint: "run the same command again: it is started there once more".into(),
        }
    }

    /// Whether the server, which does not run now, has written on the side that it was to go to. Takes the leases there.
    pub(super) async fn is_written(&mut self) -> Result<bool> {
        self.sides.take_leases(self.observer, self.cancel).await?;
        if self.journal.changes == Some(Changes::Discard) {
            return self.is_written_since_the_cutover().await;
        }
        let to = self.sides.to;
        let compare = self.server().volumes.iter().map(|volume| {
            let (source, target) = (volume.on(to.other()).clone(), volume.on(to).clone());
            async move {
                let look = replicate::look(source.as_ref(), target.as_ref()).await?;
                let Some(base) = look.base() else { return Ok::<_, CutoverError>(true) };
                let found = replicate::compare_heads(&(source as _), &(target as _), base, &Limits::default()).await?;
                Ok(found.first_difference.is_some())
            }
        });
        Ok(try_join_all(compare).await?.contains(&true))
    }

    /// Whether the sources hold anything else than they did when they were left: where nothing was carried back to them,
    /// the snapshots that mark that tell. Without one nobody knows, and it may be.
    async fn is_written_since_the_cutover(&self) -> Result<bool> {
        for volume in &self.server().volumes {
            let look = replicate::look(volume.source.as_ref(), volume.target.as_ref()).await?;
            let snapshots = volume.source.snapshots().await?;
            let mark = look.in_flight.and_then(|last| snapshots.into_iter().find(|have| have.name == last.name));
            match mark {
                Some(mark) if !volume.source.head_differs(&mark).await? => {}
                _ => return Ok(true),
            }
        }
        Ok(false)
    }

    /// The end of a walk that leads back to where it began.
    pub(super) async fn end_where_it_was(&mut self) -> Result<()> {
        self.enter(Phase::RolledBack).await?;
        self.journal.done = true;
        self.journal.ended = Some(jiff::Timestamp::now().to_string());
        match self.sides.to {
            Side::Target => {
                let before = self.journal.note_before.clone();
                self.leave_note(before.as_deref()).await?;
                store_journal(self.server(), None).await?;
            }
            // It is cut over, as it was.
            Side::Source => store_journal(self.server(), Some(&self.journal)).await?,
        }
        // Last, so that nobody else begins anything before all of this is noted.
        self.sides.release_leases().await;
        self.sides.release_fences().await
    }
}

/// Where a server is after an attempt to bring it back.
enum Back {
    /// Where it came from.
    Here,
    /// Where it was to go.
    There,
}
