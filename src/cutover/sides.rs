//! The images of a server in the direction that it moves: those that it leaves, and those that it arrives at.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::journal::{Journal, kept_name};
use super::provider::Side;
use super::server::{CutoverError, Observer, Result, Server, Volume};
use crate::failpoint::failpoint;
use crate::fleet::group::{GroupOptions, Member};
use crate::image::{Disk, DiskUser, ErrorKind, ImageError, ImageSpec, LeaseOwner, LockHolder};
use crate::pipeline::Limits;
use crate::plan::{Quiesce, Retention};
use crate::replicate::Progress;

/// How long a worker of the fleet is waited for: it gives its leases back at the end of a cycle, or at a checkpoint.
const WORKER_PATIENCE: Duration = Duration::from_secs(900);
/// How often it is looked whether it has.
const STEP: Duration = Duration::from_millis(200);
/// How long a server that has stopped may take to close its images.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);
/// How long a client that was killed is taken for one that has its image open: its watch times out after 30 s, which
/// busy OSDs notice later.
const WATCH_PATIENCE: Duration = Duration::from_secs(60);
/// What to do about an image that is open elsewhere.
pub(super) const HAS_IT_OPEN: &str = "find out what has the image open (rbd status), and end it; a watch that is still \
                                      there a minute after its client's end goes when the image's OSD has peered anew \
                                      (ceph osd down ID)";

impl Volume {
    /// The image on that side.
    pub fn on(&self, side: Side) -> &Arc<dyn Disk> {
        match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        }
    }

    /// The name that the source has while it is in use.
    pub(super) fn source_name(&self) -> &str {
        match &self.disk.source {
            ImageSpec::Rbd { image, .. } => image,
            ImageSpec::File { .. } => "",
        }
    }
}

/// A server on its way.
#[derive(Clone, Copy)]
pub(super) struct Sides<'a> {
    pub(super) server: &'a Server,
    pub(super) to: Side,
}

/// This process, as the owner of a lease on that image.
fn this_process(image: &dyn Disk) -> Result<LeaseOwner> {
    let failed = |error| ImageError::from_io(error, image.location(), "say who takes the lease");
    Ok(LeaseOwner::current().map_err(failed)?)
}

impl Sides<'_> {
    pub(super) fn leaving(&self) -> impl Iterator<Item = &Arc<dyn Disk>> {
        self.server.volumes.iter().map(|volume| volume.on(self.to.other()))
    }

    pub(super) fn arriving(&self) -> impl Iterator<Item = &Arc<dyn Disk>> {
        self.server.volumes.iter().map(|volume| volume.on(self.to))
    }

    /// The volumes as a group of the fleet's, which carries from what is left to where the server arrives.
    pub(super) fn members(&self) -> Vec<Member> {
        let member = |volume: &Volume| Member {
            name: volume.disk.volume.clone(),
            source: volume.on(self.to.other()).clone(),
            target: volume.on(self.to).clone(),
            progress: Arc::new(Progress::default()),
        };
        self.server.volumes.iter().map(member).collect()
    }

    /// How the group's cycles run: without a freeze, and with enough kept to compare the last points, also where one that was begun is finished
    /// first.
    pub(super) fn group_options(&self) -> GroupOptions {
        let Retention { keep, keep_for } = self.server.retention;
        // On the way back nothing goes: the snapshots are those of the way there, too.
        let keep = if self.to == Side::Target { keep.max(3) } else { usize::MAX };
        GroupOptions {
            server: self.server.name.clone(),
            quiesce: Quiesce::None,
            retention: Retention { keep, keep_for },
            limits: Limits::default(),
            not_younger_than: Duration::ZERO,
            forced: true,
        }
    }

    /// Takes the leases of all images that the server arrives at. A worker of the fleet is waited for; another cutover
    /// is not.
    pub(super) async fn take_leases(&self, observer: &dyn Observer, cancel: &CancellationToken) -> Result<()> {
        let begun = Instant::now();
        let mut told = false;
        for image in self.arriving() {
            let owner = this_process(image.as_ref())?;
            loop {
                let busy = match image.acquire_lease(&owner).await {
                    Ok(()) => break,
                    Err(error) => error,
                };
                let ErrorKind::Busy { holder } = &busy.kind else { return Err(self.give_back(busy).await) };
                if let Some(hint) = self.why_not_to_wait(holder, begun).await {
                    return Err(self.give_back(busy.hint(hint)).await);
                }
                if cancel.is_cancelled() {
                    self.release_leases().await;
                    return Err(CutoverError::Interrupted { server: self.server.name.clone() });
                }
                if !told {
                    observer.note(&format!("waiting for {holder} to finish its cycle"));
                    told = true;
                }
                tokio::time::sleep(STEP).await;
            }
        }
        failpoint!("cutover.leases-taken");
        Ok(())
    }

    /// What to do about the holder of a lease that is not, or no longer, waited for; `None`: it is.
    async fn why_not_to_wait(&self, holder: &str, since: Instant) -> Option<&'static str> {
        match () {
            () if !LeaseOwner::is_description(holder) => Some(HAS_IT_OPEN),
            () if self.is_with_another_cutover(holder).await => Some(
                "that process is at a cutover of it: wait for its end, and look with --dry-run where the server is then",
            ),
            () if since.elapsed() >= WORKER_PATIENCE => {
                Some("it has been at one cycle for long: see with poolshift status PLAN at which, or end it")
            }
            () => None,
        }
    }

    async fn give_back(&self, error: ImageError) -> CutoverError {
        self.release_leases().await;
        error.into()
    }

    /// Whether the holder of a lease is at a cutover of this server, which takes longer than a cycle.
    async fn is_with_another_cutover(&self, holder: &str) -> bool {
        let journal = match load_journal(self.server).await {
            Ok(Some(journal)) if !journal.is_over() => journal,
            _ => return false,
        };
        holder.contains(&format!("process {} on {} ", journal.worker.pid, journal.worker.host))
    }

    pub(super) async fn release_leases(&self) {
        let _ = self.give_leases_back().await;
    }

    /// The same where the server is to use the images next: a lock that is kept would be a broken disk to it.
    pub(super) async fn give_leases_back(&self) -> Result<()> {
        release(self.arriving()).await
    }

    /// Keeps everybody from writing to what is left.
    pub(super) async fn fence(&self, holder: LockHolder) -> Result<()> {
        let fence = |image: &Arc<dyn Disk>| {
            let image = image.clone();
            async move {
                let owner = this_process(image.as_ref())?;
                Ok::<_, CutoverError>(image.fence(&owner, holder).await?)
            }
        };
        // All to their end: one that went on would ask a server for its lock that is running again by then.
        join_all(self.leaving().map(fence)).await.into_iter().collect()
    }

    pub(super) async fn release_fences(&self) -> Result<()> {
        release(self.leaving()).await?;
        failpoint!("cutover.fences-released");
        Ok(())
    }

    /// Refuses images that are not those of the journal: a name may have been given to another one.
    pub(super) fn refuse_others(&self, journal: &Journal) -> Result<()> {
        let other = |problem: String| CutoverError::WrongState {
            server: self.server.name.clone(),
            problem,
            hint: "the journal of its cutover names others: give the images their names back, and the plan its volumes"
                .into(),
        };
        if journal.volumes.len() != self.server.volumes.len() {
            let problem = format!("has {} volumes, and had {}", self.server.volumes.len(), journal.volumes.len());
            return Err(other(problem));
        }
        for (volume, known) in self.server.volumes.iter().zip(&journal.volumes) {
            let same = volume.disk.volume == known.name
                && *volume.source.identity() == known.source
                && *volume.target.identity() == known.target;
            if !same {
                let (source, target) = (volume.source.location(), volume.target.location());
                let problem = format!("has other images than it had: {} is {source} and {target} now", known.name);
                return Err(other(problem));
            }
        }
        Ok(())
    }

    /// Who has each image open that is left, beside this process.
    pub(super) async fn users(&self) -> Result<Vec<Vec<DiskUser>>> {
        users(self.leaving()).await
    }

    /// Waits until nobody has what is left open but those that were there before, where the server keeps it open, and
    /// says who has otherwise.
    pub(super) async fn wait_until_closed(&self, may_stay: &[Vec<DiskUser>]) -> Result<Option<String>> {
        let begun = Instant::now();
        loop {
            let now = self.users().await?;
            let stranger = now.iter().enumerate().zip(self.leaving()).find_map(|((index, users), image)| {
                let may = may_stay.get(index).map(Vec::as_slice).unwrap_or_default();
                let stranger = users.iter().find(|user| !may.contains(user))?;
                Some(format!("{} is open at {}", image.location(), stranger.address))
            });
            if stranger.is_none() || begun.elapsed() >= CLOSE_PATIENCE {
                return Ok(stranger);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until no image that is left is open at more than one place, and says which one is otherwise.
    pub(super) async fn wait_until_one_is_left(&self, observer: &dyn Observer) -> Result<Option<String>> {
        let (begun, mut told) = (Instant::now(), false);
        loop {
            let now = self.users().await?;
            let crowd = now.iter().zip(self.leaving()).find(|(users, _)| users.len() > 1).map(|(users, image)| {
                let addresses: Vec<&str> = users.iter().map(|user| user.address.as_str()).collect();
                format!("{} is open at {}, of which one is the server", image.location(), addresses.join(" and "))
            });
            let Some(crowd) = crowd else { return Ok(None) };
            if begun.elapsed() >= WATCH_PATIENCE {
                return Ok(Some(crowd));
            }
            if !std::mem::replace(&mut told, true) {
                observer.note(&format!("{crowd}: waiting for the other one to close it"));
            }
            tokio::time::sleep(STEP).await;
        }
    }

    /// Gives the sources the name under which servers use them, or that under which they are kept.
    pub(super) async fn name_sources(&self, kept: bool) -> Result<()> {
        if self.server.provider.names_images() {
            return Ok(());
        }
        let rename = |volume: &Volume| {
            let (image, name) = (volume.source.clone(), volume.source_name().to_owned());
            async move { image.rename(&if kept { kept_name(&name) } else { name }).await }
        };
        try_join_all(self.server.volumes.iter().map(rename)).await?;
        failpoint!("cutover.sources-{}", if kept { "kept" } else { "renamed-back" });
        Ok(())
    }
}

async fn release(images: impl Iterator<Item = &Arc<dyn Disk>>) -> Result<()> {
    let mut first = Ok(());
    for error in join_all(images.map(|image| image.release_lease())).await.into_iter().filter_map(Result::err) {
        // It is taken over by whoever comes next: this process will be gone, or its watch will.
        tracing::warn!(%error, "a lease was not given back");
        first = first.and(Err(error.into()));
    }
    first
}

async fn users(images: impl Iterator<Item = &Arc<dyn Disk>>) -> Result<Vec<Vec<DiskUser>>> {
    let others = |image: &Arc<dyn Disk>| {
        let image = image.clone();
        async move {
            let users = image.users().await?;
            Ok::<_, CutoverError>(users.into_iter().filter(|user| !user.is_own).collect())
        }
    };
    try_join_all(images.map(others)).await
}

/// The journal of a server, if there is one.
pub(super) async fn load_journal(server: &Server) -> Result<Option<Journal>> {
    let Some(first) = server.volumes.first() else { return Ok(None) };
    let text = first.target.load_journal().await?;
    let parsed = text.as_deref().map(Journal::parse).transpose();
    parsed.map_err(|error| CutoverError::Journal { location: first.target.location().to_owned(), error })
}

/// Stores the journal of a server, or takes it away.
pub(super) async fn store_journal(server: &Server, journal: Option<&Journal>) -> Result<()> {
    let Some(first) = server.volumes.first() else { return Ok(()) };
    let location = || first.target.location().to_owned();
    let text = journal.map(Journal::render).transpose();
    let text = text.map_err(|error| CutoverError::Journal { location: location(), error })?;
    first.target.store_journal(text.as_deref()).await?;
    failpoint!("cutover.journal-{}", if journal.is_some() { "stored" } else { "removed" });
    Ok(())
}
