//! The walk: carries a server from one side to the other, or brings it back to where it came from.
//!
//! # What is held, and since when
//!
//! | from | until | what |
//! |---|---|---|
//! | Syncing | Resuming | the leases of the images that the server arrives at: no worker writes them |
//! | FinalDelta | the end of Committed | the fence on the images that the server leaves: nobody writes them |
//! | Syncing | the end | the note that has the fleet's workers leave the server alone |
//!
//! # While the server stands still
//!
//! Nothing is done that could be done before or after it. The targets are at a base, checked and noted down as dirty,
//! before the server is stopped; the last delta is from that base to HEAD ([`replicate::LastDelta`](crate::replicate)), so
//! that no snapshot is waited for; what marks the point on the source is made after the server runs.
//!
//! # The point of no return
//!
//! The journal says [`Phase::Resuming`] before the provider is told to start the server on the other side. From then on the
//! server may have written there, and the way back before the commit is open only while it is proved that it has not:
//! both HEADs are compared wherever either was written since the base.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use jiff::Timestamp;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::journal::{Changes, FORMAT, Journal, JournalVolume};
use super::metadata;
use super::phase::Phase;
use super::proof::{self, Proved};
use super::provider::{Observed, Power, Side};
use super::server::{CutoverError, Observer, Options, PhaseTime, Proof, Report, Result, Server};
use super::sides::{HAS_IT_OPEN, Sides, store_journal};
use super::warm_up;
use crate::failpoint::failpoint;
use crate::fleet::{chain_text, group};
use crate::image::{DiskUser, ImageError, LeaseOwner, LockHolder};
use crate::pipeline::Limits;
use crate::replicate::{self, LastDelta};

/// When a server was stopped: for people, and as a clock counts that nobody sets.
#[derive(Clone, Copy)]
pub(super) struct Stopped {
    at: Timestamp,
    since: Instant,
    /// What had passed by then, of a stop by a process that is gone.
    before: Duration,
}

impl Stopped {
    fn now() -> Self {
        Self { at: Timestamp::now(), since: Instant::now(), before: Duration::ZERO }
    }

    /// What is known of a process that is gone is the time of day.
    fn earlier(at: Timestamp) -> Self {
        let before = Duration::try_from(Timestamp::now().duration_since(at)).unwrap_or_default();
        Self { at, since: Instant::now(), before }
    }

    fn until(self, moment: Instant) -> Duration {
        self.before + moment.saturating_duration_since(self.since)
    }
}

/// A server on its way.
pub(super) struct Walk<'a> {
    pub(super) sides: Sides<'a>,
    pub(super) options: &'a Options,
    pub(super) observer: &'a dyn Observer,
    pub(super) cancel: &'a CancellationToken,
    pub(super) journal: Journal,
    pub(super) phases: Vec<PhaseTime>,
    pub(super) since: Instant,
    pub(super) stopped: Option<Stopped>,
    pub(super) outage: Option<Duration>,
    pub(super) deltas: Vec<LastDelta>,
    pub(super) moved: u64,
    pub(super) proved: Proved,
    pub(super) remarks: Vec<String>,
    /// Its turn to stand still, where the turns are counted.
    pub(super) turn: Option<OwnedSemaphorePermit>,
}

impl<'a> Walk<'a> {
    /// A walk that has not begun.
    pub(super) fn new(
        sides: Sides<'a>,
        options: &'a Options,
        (observer, cancel): (&'a dyn Observer, &'a CancellationToken),
        changes: Option<Changes>,
    ) -> Result<Self> {
        let server = sides.server;
        let volumes = server.volumes.iter().map(|volume| JournalVolume {
            name: volume.disk.volume.clone(),
            source: volume.source.identity().clone(),
            source_name: volume.source_name().to_owned(),
            target: volume.target.identity().clone(),
            fence: None,
        });
        let worker = LeaseOwner::current()
            .map_err(|error| ImageError::from_io(error, &server.name, "say who cuts the server over"))?;
        let journal = Journal {
            format: FORMAT,
            server: server.name.clone(),
            to: sides.to,
            changes,
            by: server.provider.describe(),
            phase: Phase::Syncing,
            done: false,
            swapped: false,
            memory_lost: false,
            worker,
            begun: Timestamp::now().to_string(),
            stopped: None,
            ended: None,
            volumes: volumes.collect(),
            notes: super::provider::Notes::new(),
            note_before: None,
            finalizing: false,
        };
        Ok(Self {
            sides,
            options,
            observer,
            cancel,
            journal,
            phases: Vec::new(),
            since: Instant::now(),
            stopped: None,
            outage: None,
            deltas: Vec::new(),
            moved: 0,
            proved: Proved::default(),
            remarks: Vec::new(),
            turn: None,
        })
    }

    /// The same for one that was begun by a process that is gone.
    pub(super) fn again(mut self, found: Journal) -> Result<Self> {
        self.sides.refuse_others(&found)?;
        let worker = self.journal.worker.clone();
        self.stopped = found.stopped.as_deref().and_then(|at| Some(Stopped::earlier(at.parse().ok()?)));
        self.journal = Journal { worker, ..found };
        Ok(self)
    }

    pub(super) fn server(&self) -> &'a Server {
        self.sides.server
    }

    /// Begins a phase: in the journal first.
    pub(super) async fn enter(&mut self, phase: Phase) -> Result<()> {
        debug_assert!(self.journal.phase.may_become(phase), "{} -> {phase}", self.journal.phase);
        self.lap();
        self.journal.phase = phase;
        self.observer.phase(phase);
        store_journal(self.server(), Some(&self.journal)).await?;
        failpoint!("cutover.{}", phase.to_string().replace(' ', "-"));
        Ok(())
    }

    /// Enters the phase that has ended into the report.
    fn lap(&mut self) {
        let (phase, took) = (self.journal.phase, self.since.elapsed());
        self.since = Instant::now();
        match self.phases.last_mut() {
            Some(last) if last.phase == phase => last.took += took,
            _ => self.phases.push(PhaseTime { phase, took }),
        }
    }

    /// While the server runs, with the leases held: cycles until little is left, and everything is ready for its stop.
    pub(super) async fn warm_up(&mut self) -> Result<()> {
        self.enter(Phase::Syncing).await?;
        let server = self.server();
        if self.carries() {
            self.turn_round().await?;
            warm_up::run(self).await?;
        }
        self.wait_for_turn().await?;
        server.provider.prepare(self.sides.to.other(), &mut self.journal.notes).await?;
        if self.carries() {
            self.deltas = self.prepare_deltas().await?;
        }
        self.enter(Phase::Converged).await
    }

    /// Waits until few enough others stand still, and says whether it had to. Its turn ends when it runs again.
    pub(super) async fn wait_for_turn(&mut self) -> Result<bool> {
        self.take_free_turn();
        let Some(turns) = self.options.turns.clone().filter(|_| self.turn.is_none()) else { return Ok(false) };
        self.observer.note("waiting for another server to run again");
        tokio::select! {
            biased;
            () = self.cancel.cancelled() => Err(CutoverError::Interrupted { server: self.server().name.clone() }),
            turn = turns.acquire_owned() => {
                self.turn = turn.ok();
                Ok(true)
            }
        }
    }

    /// Takes a turn, unless it has one or none is free.
    fn take_free_turn(&mut self) {
        if let Some(turns) = self.options.turns.as_ref().filter(|_| self.turn.is_none()) {
            self.turn = Arc::clone(turns).try_acquire_owned().ok();
        }
    }

    /// On the way back the sources are to follow the targets.
    async fn turn_round(&self) -> Result<()> {
        if self.sides.to == Side::Source {
            for volume in &self.server().volumes {
                replicate::turn_round(volume.source.as_ref(), volume.target.as_ref()).await?;
            }
        }
        Ok(())
    }

    /// Whether anything is carried over: on the way back with the changes discarded, nothing is.
    pub(super) fn carries(&self) -> bool {
        self.journal.changes != Some(Changes::Discard)
    }

    async fn prepare_deltas(&self) -> Result<Vec<LastDelta>> {
        let to = self.sides.to;
        let prepare = self.server().volumes.iter().map(|volume| {
            let (source, target) = (volume.on(to.other()).clone(), volume.on(to).clone());
            async move { LastDelta::prepare(&(source as _), &(target as _), Limits::default()).await }
        });
        Ok(try_join_all(prepare).await?)
    }

    /// From a server that runs, or was stopped by an earlier walk, to one that runs on the other side.
    pub(super) async fn stop_and_go(&mut self) -> Result<()> {
        // One that was stopped by an earlier walk counts as well, and waits for nobody.
        self.take_free_turn();
        let before = self.users_before().await?;
        let runs = self.stopped.is_none();
        self.stopped.get_or_insert_with(Stopped::now);
        self.journal.stopped = self.stopped.map(|stopped| stopped.at.to_string());
        self.enter(Phase::Quiescing).await?;
        if runs {
            // Until now it ran.
            self.stopped = Some(Stopped::now());
            self.journal.stopped = self.stopped.map(|stopped| stopped.at.to_string());
        }
        let holder = self.within_limit(async |walk: &mut Self| walk.quiesce().await).await?;
        // Whole or not at all: a lock that comes late would be a broken disk to a server that was brought back.
        self.shut_out(holder, &before).await?;
        // The journal is with the first of the images that may have failed: it keeps nobody for longer than they may.
        self.within_limit(async |walk: &mut Self| {
            walk.enter(Phase::FinalDelta).await?;
            walk.last_delta().await
        })
        .await?;
        self.within_limit(async |walk: &mut Self| {
            walk.enter(Phase::Verifying).await?;
            walk.prove().await?;
            if walk.carries() { metadata::carry(walk.sides).await } else { Ok(()) }
        })
        .await?;
        self.journal.swapped = true;
        self.within_limit(async |walk: &mut Self| walk.enter(Phase::Swapping).await).await?;
        let server = self.server();
        if self.sides.to == Side::Source {
            self.sides.name_sources(false).await?;
        }
        server.provider.swap(self.sides.to, &mut self.journal.notes).await?;
        failpoint!("cutover.swapped");
        self.check_limit()?;
        self.go().await
    }

    /// Starts the server on the other side.
    pub(super) async fn go(&mut self) -> Result<()> {
        self.enter(Phase::Resuming).await?;
        let (server, to) = (self.server(), self.sides.to);
        if to == Side::Source {
            self.sides.name_sources(false).await?;
        }
        self.sides.give_leases_back().await?;
        failpoint!("cutover.leases-released");
        // Whoever keeps its memory goes on with disks that are, to the byte, what it knows: not so after a discard.
        let fresh = self.journal.memory_lost || self.journal.changes == Some(Changes::Discard);
        server.provider.start(to, fresh, &mut self.journal.notes).await?;
        failpoint!("cutover.started");
        if server.provider.by_hand() {
            return Ok(());
        }
        let started = Instant::now();
        let observed = self.observe().await?;
        if observed != (Observed { power: Power::Running, side: Some(to) }) {
            return Err(self.unexpected("start", &observed));
        }
        self.note_outage(started);
        self.turn = None;
        Ok(())
    }

    /// The server runs, since that moment at the latest.
    pub(super) fn note_outage(&mut self, started: Instant) {
        self.outage = self.stopped.map(|stopped| stopped.until(started));
    }

    pub(super) async fn observe(&self) -> Result<Observed> {
        Ok(self.server().provider.observe(&self.journal.notes).await?)
    }

    pub(super) fn unexpected(&self, operation: &str, observed: &Observed) -> CutoverError {
        let side = match observed.side {
            Some(Side::Source) => "its sources",
            Some(Side::Target) => "its targets",
            None => "no one side",
        };
        super::provider::ProviderError {
            operation: operation.to_owned(),
            server: self.server().name.clone(),
            problem: format!("afterwards it is {} on {side}", observed.power),
            hint: None,
        }
        .into()
    }

    /// Has the server stand still, and says how what it leaves is to be fenced then.
    async fn quiesce(&mut self) -> Result<LockHolder> {
        let server = self.server();
        if server.provider.by_hand() {
            self.wait_for_a_person().await?;
            return Ok(LockHolder::Refuse);
        }
        server.provider.quiesce(&mut self.journal.notes).await?;
        failpoint!("cutover.quiesced");
        let observed = self.observe().await?;
        if observed.power == Power::Running {
            return Err(self.unexpected("stop", &observed));
        }
        Ok(self.holder(&observed))
    }

    /// How the side that is left is to be fenced, as the server is now.
    pub(super) fn holder(&self, observed: &Observed) -> LockHolder {
        let from = self.sides.to.other();
        let stays = self.server().provider.stays_open()
            && *observed == (Observed { power: Power::Suspended, side: Some(from) });
        if stays { LockHolder::Ask } else { LockHolder::Refuse }
    }

    /// Who has what is left open before the server is stopped. Where it runs that is the server, and nobody else: with
    /// two, nobody could tell later which one is to be let stay.
    async fn users_before(&self) -> Result<Vec<Vec<DiskUser>>> {
        if self.journal.phase == Phase::Converged && !self.server().provider.by_hand() {
            let crowd = tokio::select! {
                biased;
                () = self.cancel.cancelled() => {
                    return Err(CutoverError::Interrupted { server: self.server().name.clone() });
                }
                crowd = self.sides.wait_until_one_is_left(self.observer) => crowd?,
            };
            if let Some(crowd) = crowd {
                return Err(self.in_use(crowd));
            }
        }
        self.sides.users().await
    }

    /// Keeps everybody from writing what is left, and makes sure that nobody is there who might: but the server, where it
    /// stands still with its disks open.
    async fn shut_out(&mut self, holder: LockHolder, before: &[Vec<DiskUser>]) -> Result<()> {
        let may_stay = if holder == LockHolder::Ask { before } else { &[] };
        if let Some(stranger) = self.sides.wait_until_closed(may_stay).await? {
            return Err(self.in_use(stranger));
        }
        self.sides.fence(holder).await?;
        failpoint!("cutover.fenced");
        if let Some(stranger) = self.sides.wait_until_closed(may_stay).await? {
            return Err(self.in_use(stranger));
        }
        self.note_fences().await
    }

    /// Enters who keeps others from writing what is left.
    pub(super) async fn note_fences(&mut self) -> Result<()> {
        let mut fences = Vec::new();
        for image in self.sides.leaving() {
            fences.push(image.lease_owner().await?);
        }
        for (volume, fence) in self.journal.volumes.iter_mut().zip(fences) {
            volume.fence = fence;
        }
        Ok(())
    }

    fn in_use(&self, stranger: String) -> CutoverError {
        super::provider::ProviderError {
            operation: "final delta".to_owned(),
            server: self.server().name.clone(),
            problem: format!("{stranger}: somebody may still write to it"),
            hint: Some(HAS_IT_OPEN.to_owned()),
        }
        .into()
    }

    /// The server is stopped by a person: waits until nobody has its images open.
    async fn wait_for_a_person(&mut self) -> Result<()> {
        self.observer.note("stop the server now: waiting until nobody has its images open");
        loop {
            if self.cancel.is_cancelled() {
                return Err(CutoverError::Interrupted { server: self.server().name.clone() });
            }
            if self.sides.users().await?.iter().all(Vec::is_empty) {
                // Its outage begins when its images are closed, as far as anybody here can tell.
                self.stopped = Some(Stopped::now());
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn last_delta(&mut self) -> Result<()> {
        let progress: Vec<_> = self.deltas.iter().map(|_| replicate::Progress::default()).collect();
        let carried = self.deltas.iter().zip(&progress).map(|(delta, progress)| delta.carry(progress, self.cancel));
        let moved = try_join_all(carried).await?;
        self.moved += moved.iter().map(|moved| moved.bytes).sum::<u64>();
        Ok(())
    }

    async fn prove(&mut self) -> Result<()> {
        if self.options.proof == Proof::None {
            return Ok(());
        }
        proof::prove_last(self.sides, &self.deltas, &mut self.proved).await
    }

    fn too_long(&self, limit: Duration) -> CutoverError {
        CutoverError::TooLong { server: self.server().name.clone(), how: "has passed".into(), limit }
    }

    /// How much is left of the outage that is allowed.
    fn time_left(&self) -> Option<(Duration, Duration)> {
        let (limit, stopped) = (self.options.max_outage?, self.stopped?);
        Some((limit, limit.saturating_sub(stopped.until(Instant::now()))))
    }

    fn check_limit(&self) -> Result<()> {
        match self.time_left() {
            Some((limit, left)) if left.is_zero() => Err(self.too_long(limit)),
            _ => Ok(()),
        }
    }

    /// Does a part of the outage, which ends when the limit on the outage passes, or when a person says so.
    async fn within_limit<T>(&mut self, part: impl AsyncFnOnce(&mut Self) -> Result<T>) -> Result<T> {
        // A person who stops the server by hand takes the time that it takes.
        let left = self.time_left().filter(|_| !self.server().provider.by_hand());
        let left = left.map(|(limit, left)| (left, self.too_long(limit)));
        let (cancel, server) = (self.cancel.clone(), self.server().name.clone());
        let part = part(self);
        let limited = async {
            match left {
                None => part.await,
                Some((left, late)) => tokio::time::timeout(left, part).await.unwrap_or(Err(late)),
            }
        };
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(CutoverError::Interrupted { server }),
            done = limited => done,
        }
    }

    /// For a server that stands still since an earlier walk: whatever that had done, a whole cycle puts it right.
    pub(super) async fn go_on_quiesced(&mut self) -> Result<()> {
        let (server, from) = (self.server(), self.sides.to.other());
        if self.journal.swapped {
            // While its targets are made anew nothing may start it from there.
            server.provider.swap(from, &mut self.journal.notes).await?;
            self.journal.swapped = false;
        }
        self.enter(Phase::Quiescing).await?;
        if self.carries() {
            self.turn_round().await?;
            let (members, options) = (self.sides.members(), self.sides.group_options());
            group::run_held(&members, &options, self.cancel).await?;
            self.deltas = self.prepare_deltas().await?;
        }
        self.stop_and_go().await
    }

    /// Whether the locks on what is left are still those of the process that fenced it: then nobody has written there.
    pub(super) async fn is_untouched(&self) -> Result<bool> {
        for (image, volume) in self.sides.leaving().zip(&self.journal.volumes) {
            let owner = image.lease_owner().await?;
            let same = owner.zip(volume.fence.as_ref()).is_some_and(|(owner, fence)| owner.client == fence.client);
            if !same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What the walk has come to.
    pub(super) fn report(mut self, ended: Phase, because: Option<&CutoverError>) -> Report {
        self.lap();
        let runs_from = if ended == Phase::Committed { self.sides.to } else { self.sides.to.other() };
        Report {
            server: self.server().name.clone(),
            by: self.server().provider.describe(),
            runs_from,
            ended,
            outage: self.outage,
            phases: std::mem::take(&mut self.phases),
            delta_bytes: self.moved,
            proved_bytes: self.proved.0,
            rolled_back_because: because.map(|because| chain_text(because)),
            remarks: std::mem::take(&mut self.remarks),
        }
    }
}
