//! The clones of a rehearsal: made of one point, known again by their marks, removed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::future::{join_all, try_join_all};
use jiff::Timestamp;

use super::{Leftovers, Mark, Stage};
use crate::cutover::finalize::{load_state, place, wrong_state};
use crate::cutover::provider::ServerDisk;
use crate::cutover::provider::rehearse::{Boots, StandIn};
use crate::cutover::server::{CutoverError, Result};
use crate::failpoint::failpoint;
use crate::fleet::group::{GroupPoint, common_point};
use crate::image::rbd::RbdImage;
use crate::image::{Disk as _, ErrorKind, ImageError, ImageSpec, SourceImage as _};
use crate::replicate::Look;

/// How long a clone is waited for that somebody still has open: a QEMU that was killed seems to, for 30 s.
const CLOSE_PATIENCE: Duration = Duration::from_secs(45);
/// How often it is looked whether it is closed.
const STEP: Duration = Duration::from_millis(500);
/// How often clones are begun anew, because the daemon has pruned the point that was chosen.
const TRIES: usize = 3;
/// How long a clone may be there before it has its mark: by then whoever made it is gone.
const UNMARKED: Duration = Duration::from_secs(300);

/// What stands for the clone of a target.
enum There {
    /// Its name and id, as a removal that was cut has left them; the id.
    Remains(String),
    /// A clone that was made moments ago, or whose maker was killed before it could mark it.
    Unmarked(RbdImage),
    Marked(RbdImage, Box<Mark>),
}

impl Stage {
    /// What a rehearsal that was killed has left. [`ErrorKind::Busy`] where one is under way, or what is left is for
    /// another host to remove.
    pub async fn leftovers(&self) -> Result<Leftovers> {
        let mut left = Leftovers { server: self.name.clone(), ..Leftovers::default() };
        for ((_, target), disk) in self.targets.iter().zip(&self.stand_in("").disks) {
            for there in self.there(target, &disk.target).await? {
                let name = match there {
                    There::Remains(_) => disk.target.to_string(),
                    There::Unmarked(clone) => {
                        let made = clone.created().await?;
                        if made.is_some_and(|made| !older_than(made, UNMARKED)) || !clone.users().await?.is_empty() {
                            let holder = "somebody who has just made it".to_owned();
                            let hint = "wait for its end; a killed one's is removed after 5 minutes";
                            return Err(busy(&clone, holder, hint).into());
                        }
                        disk.target.to_string()
                    }
                    There::Marked(clone, mark) => {
                        self.refuse_under_way(&clone, &mark).await?;
                        left.by = left.by.or(Some(mark.owner.to_string()));
                        left.ids.insert(mark.id);
                        clone.location().to_owned()
                    }
                };
                left.clones.push(name);
            }
        }
        for id in &left.ids {
            let stand_in = self.stand_in(id);
            // It goes before its clones do; and nobody needs to reach a hypervisor to learn that there is nothing.
            let staged = self.provider.staged(&stand_in).await?;
            if staged.is_some_and(|staged| staged.id.as_ref() == Some(id)) {
                left.stand_in = Some(stand_in.name);
            }
        }
        Ok(left)
    }

    /// Fails unless the rehearsal was left behind, and by this host where a hypervisor's is to be asked.
    async fn refuse_under_way(&self, clone: &RbdImage, mark: &Mark) -> Result<(), ImageError> {
        let over = mark.is_left_behind(Timestamp::now())
            || mark.owner.is_of_another_boot_here() && clone.users().await?.is_empty();
        if !over {
            let holder = format!("{}, which rehearses {} until {} at the latest", mark.owner, mark.server, mark.until);
            return Err(busy(clone, holder, "wait for its end, or end that process: it tidies up"));
        }
        let of_its_host = self.provider.boots() == Boots::Provider && !self.provider.strikes_from_anywhere();
        if of_its_host && !mark.owner.is_of_this_host() {
            let holder = format!("nobody any more, but {} may have left a stand-in there", mark.owner);
            return Err(busy(clone, holder, "remove it on that host: poolshift gc PLAN --yes"));
        }
        Ok(())
    }

    /// All that stands for the clone of a target.
    async fn there(&self, target: &RbdImage, spec: &ImageSpec) -> Result<Vec<There>, ImageError> {
        let named = self.under_its_name(target, spec).await?;
        let known = match &named {
            Some(There::Marked(clone, _) | There::Unmarked(clone)) => Some(clone.identity().image.clone()),
            Some(There::Remains(_)) | None => None,
        };
        let mut all: Vec<There> = named.into_iter().collect();
        if self.provider.renames_clones() {
            all.extend(self.under_other_names(target, known.as_deref()).await?);
        }
        Ok(all)
    }

    /// What has the name of a clone.
    async fn under_its_name(&self, target: &RbdImage, spec: &ImageSpec) -> Result<Option<There>, ImageError> {
        let (pool, namespace, name) = place(spec)?;
        let clone = match RbdImage::open_target(&self.connector, pool, namespace, name).await {
            Ok(clone) => clone,
            Err(error) if error.kind == ErrorKind::NotFound => {
                let images = self.connector.images(pool, namespace).await?;
                let id = images.into_iter().find(|image| image.name == name).and_then(|image| image.id);
                return Ok(id.map(There::Remains));
            }
            Err(error) => return Err(error),
        };
        let foreign = |problem: &str| {
            ImageError::new(ErrorKind::AlreadyExists, clone.location(), "rehearse")
                .detail(problem.to_owned())
                .hint("poolshift leaves it alone: rename it, or remove it by hand")
        };
        match clone.rehearsal_mark().await? {
            Some(text) => match serde_json::from_str::<Mark>(&text) {
                Ok(mark) if mark.server == self.name => Ok(Some(There::Marked(clone, Box::new(mark)))),
                Ok(mark) => Err(foreign(&format!("it is of a rehearsal of server {}", mark.server))),
                Err(_) => Err(foreign("the mark of its rehearsal can't be read")),
            },
            None => {
                let parent = clone.relations().await?.parent;
                match parent.is_some_and(|parent| parent.image.id == target.identity().image) {
                    true => Ok(Some(There::Unmarked(clone))),
                    false => Err(foreign("an image that poolshift did not make has the name of a clone")),
                }
            }
        }
    }

    /// The clones of a target that carry a mark of this server, whatever they are called, but for the one with the id
    /// `known`. Other clones are somebody else's.
    async fn under_other_names(&self, target: &RbdImage, known: Option<&str>) -> Result<Vec<There>, ImageError> {
        let snapshots = target.relations().await?.snapshots;
        let links = snapshots.into_iter().flat_map(|snapshot| snapshot.clones);
        let mut all = Vec::new();
        for link in links.filter(|link| !link.trash && Some(link.id.as_str()) != known) {
            let clone = match target.open_linked(&link).await {
                Err(error) if error.kind == ErrorKind::NotFound => continue,
                opened => opened?,
            };
            let mark = clone.rehearsal_mark().await?.and_then(|text| serde_json::from_str::<Mark>(&text).ok());
            if let Some(mark) = mark.filter(|mark| mark.server == self.name) {
                all.push(There::Marked(clone, Box::new(mark)));
            }
        }
        Ok(all)
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
        let mut tries = 1..TRIES;
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
            if !self.remove_clones(&BTreeSet::from([stand_in.id.clone()]), false).await.is_empty() {
                return Err(error.into());
            }
        }
    }

    /// Removes the clones of those rehearsals, and `unmarked` ones as well. Gives back what is left, and why.
    pub(super) async fn remove_clones(&self, ids: &BTreeSet<String>, unmarked: bool) -> Vec<String> {
        let disks = self.stand_in("").disks;
        let clones = self.targets.iter().zip(&disks);
        let removed = clones.map(|((_, target), disk)| self.remove_clone(target, &disk.target, ids, unmarked));
        let removed = join_all(removed).await;
        removed.into_iter().filter_map(|removed| removed.err().map(|error| error.to_string())).collect()
    }

    async fn remove_clone(
        &self,
        target: &RbdImage,
        spec: &ImageSpec,
        ids: &BTreeSet<String>,
        unmarked: bool,
    ) -> Result<(), ImageError> {
        let deadline = Instant::now() + CLOSE_PATIENCE;
        loop {
            let mut waits = false;
            for there in self.there(target, spec).await? {
                let clone = match there {
                    There::Remains(id) => {
                        let (pool, namespace, _) = place(spec)?;
                        self.connector.remove_remains(pool, namespace, &id).await?;
                        continue;
                    }
                    There::Marked(clone, mark) if ids.contains(&mark.id) => clone,
                    There::Unmarked(clone) if unmarked => clone,
                    // Another one's.
                    There::Marked(..) | There::Unmarked(_) => continue,
                };
                if clone.users().await?.iter().any(|user| !user.is_own) && Instant::now() < deadline {
                    waits = true;
                    continue;
                }
                match clone.remove().await {
                    Err(error) if error.kind == ErrorKind::NotFound => {}
                    removed => removed?,
                }
                failpoint!("rehearsal.clone-removed");
            }
            if !waits {
                return Ok(());
            }
            tokio::time::sleep(STEP).await;
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
    let made = target.clone_of_snapshot(&commit.on_target(), name, mark).await;
    made.map(drop).map_err(|error| match error.kind {
        ErrorKind::AlreadyExists => {
            error.hint("another rehearsal of the server may have begun: look with poolshift gc PLAN")
        }
        _ => error,
    })
}

fn older_than(at: Timestamp, span: Duration) -> bool {
    Duration::try_from(Timestamp::now().duration_since(at)).is_ok_and(|age| age > span)
}

fn busy(clone: &RbdImage, holder: String, hint: &str) -> ImageError {
    let kind = ErrorKind::Busy { holder: holder.clone() };
    ImageError::new(kind, clone.location(), "rehearse").detail(holder).hint(hint)
}
