//! The clones of a rehearsal: made of one point, known again by name and mark, removed.

use std::time::{Duration, Instant};

use futures::future::{join_all, try_join_all};
use jiff::Timestamp;

use super::{Leftovers, Mark, Stage};
use crate::cutover::finalize::{load_state, place, wrong_state};
use crate::cutover::provider::ServerDisk;
use crate::cutover::provider::rehearse::StandIn;
use crate::cutover::server::{CutoverError, Result};
use crate::fleet::group::{GroupPoint, common_point};
use crate::image::rbd::RbdImage;
use crate::image::{ErrorKind, ImageError, ImageSpec, SourceImage as _};
use crate::replicate::Look;

/// How long a clone is waited for that somebody still has open: a QEMU that was killed seems to, for 30 s.
const CLOSE_PATIENCE: Duration = Duration::from_secs(45);
/// How often it is looked whether it is closed.
const STEP: Duration = Duration::from_millis(500);
/// How often clones are begun anew, because the daemon has pruned the point that was chosen.
const TRIES: usize = 3;

impl Stage {
    /// What a rehearsal that was killed has left. [`ErrorKind::Busy`] where one is under way.
    pub async fn leftovers(&self) -> Result<Leftovers> {
        let stand_in = self.stand_in();
        let (mut clones, mut by) = (Vec::new(), None);
        for ((_, target), disk) in self.targets.iter().zip(&stand_in.disks) {
            let Some(clone) = self.open_clone(&disk.target).await? else { continue };
            match self.mark_of(&clone, target).await? {
                Some(mark) if !mark.is_left_behind(Timestamp::now()) => return Err(under_way(&clone, &mark).into()),
                mark => by = by.or(mark.map(|mark| mark.owner.to_string())),
            }
            clones.push(disk.target.to_string());
        }
        // It goes before its clones do; and nobody needs to reach a hypervisor to learn that there is nothing.
        let there = !clones.is_empty() && self.provider.stand_in_exists(&stand_in).await?;
        Ok(Leftovers { server: self.name.clone(), by, stand_in: there.then_some(stand_in.name), clones })
    }

    async fn open_clone(&self, spec: &ImageSpec) -> Result<Option<RbdImage>, ImageError> {
        let (pool, namespace, image) = place(spec)?;
        match RbdImage::open_target(&self.connector, pool, namespace, image).await {
            Ok(image) => Ok(Some(image)),
            Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The mark of a clone; `None` if it was made in the last moment before a crash. An image that only has the name of
    /// one is an error.
    async fn mark_of(&self, clone: &RbdImage, target: &RbdImage) -> Result<Option<Mark>, ImageError> {
        let foreign = |problem: &str| {
            ImageError::new(ErrorKind::AlreadyExists, clone.location(), "rehearse")
                .detail(problem.to_owned())
                .hint("poolshift leaves it alone: rename it, or remove it by hand")
        };
        match clone.rehearsal_mark().await? {
            Some(text) => match serde_json::from_str::<Mark>(&text) {
                Ok(mark) if mark.server == self.name => Ok(Some(mark)),
                Ok(mark) => Err(foreign(&format!("it is of a rehearsal of server {}", mark.server))),
                Err(_) => Err(foreign("the mark of its rehearsal can't be read")),
            },
            None => {
                let parent = clone.relations().await?.parent;
                let ours = parent.is_some_and(|parent| parent.image.id == target.identity().image);
                if ours {
                    Ok(None)
                } else {
                    Err(foreign("an image that poolshift did not make has the name of a clone"))
                }
            }
        }
    }

    /// The newest point that all targets have.
    async fn point(&self) -> Result<(GroupPoint, Vec<Look>)> {
        let looks = try_join_all(self.targets.iter().map(|(_, target)| async {
            let state = load_state(target).await?;
            Ok::<_, CutoverError>(
                state.map(|state| Look { commits: state.commits, in_flight: state.in_flight }).unwrap_or_default(),
            )
        }))
        .await?;
        match common_point(&looks) {
            Some(point) => Ok((point, looks)),
            None => Err(wrong_state(
                &self.name,
                "has no point that all its targets have: there is nothing to rehearse with",
                "run poolshift replicate first; poolshift status PLAN shows when it has one",
            )),
        }
    }

    /// Clones all targets, as of one point; some of them, where it fails.
    pub(super) async fn make_clones(
        &self,
        stand_in: &StandIn,
        mark: impl Fn(&GroupPoint) -> Mark,
    ) -> Result<GroupPoint> {
        let mut tries = 0..TRIES;
        loop {
            let (point, looks) = self.point().await?;
            let mark = serde_json::to_string(&mark(&point)).unwrap_or_default();
            let clones = self.targets.iter().zip(&stand_in.disks).zip(&looks);
            let made = clones.map(|(((_, target), disk), look)| make_clone(target, disk, look, &point, &mark));
            let made = join_all(made).await;
            let Some(error) = made.into_iter().find_map(Result::err) else { return Ok(point) };
            // Pruned meanwhile: there is a newer one.
            if error.kind != ErrorKind::NotFound || tries.next().is_none() {
                return Err(error.into());
            }
            let left = self.remove_clones(stand_in).await;
            if !left.is_empty() {
                return Err(error.into());
            }
        }
    }

    pub(super) async fn remove_clones(&self, stand_in: &StandIn) -> Vec<String> {
        let clones = self.targets.iter().zip(&stand_in.disks);
        let removed = join_all(clones.map(|((_, target), disk)| self.remove_clone(target, &disk.target))).await;
        removed.into_iter().filter_map(|removed| removed.err().map(|error| error.to_string())).collect()
    }

    async fn remove_clone(&self, target: &RbdImage, spec: &ImageSpec) -> Result<(), ImageError> {
        let deadline = Instant::now() + CLOSE_PATIENCE;
        loop {
            let Some(clone) = self.open_clone(spec).await? else { return Ok(()) };
            self.mark_of(&clone, target).await?;
            match clone.remove().await {
                Err(error) if matches!(error.kind, ErrorKind::Busy { .. }) && Instant::now() < deadline => {
                    tokio::time::sleep(STEP).await;
                }
                Err(error) if error.kind == ErrorKind::NotFound => return Ok(()),
                removed => return removed,
            }
        }
    }
}

/// Clones a target as of a point.
async fn make_clone(
    target: &RbdImage,
    disk: &ServerDisk,
    look: &Look,
    point: &GroupPoint,
    mark: &str,
) -> Result<(), ImageError> {
    let commit = look.commits.iter().find(|commit| commit.name == point.snapshot).ok_or_else(|| {
        ImageError::new(ErrorKind::NotFound, target.location(), format!("look for {}", point.snapshot))
    })?;
    let (_, _, name) = place(&disk.target)?;
    target.clone_of_snapshot(&commit.on_target(), name, mark).await.map(drop)
}

fn under_way(clone: &RbdImage, mark: &Mark) -> ImageError {
    let holder = format!("{}, which rehearses {} until {} at the latest", mark.owner, mark.server, mark.until);
    ImageError::new(ErrorKind::Busy { holder: holder.clone() }, clone.location(), "rehearse").detail(holder)
}
