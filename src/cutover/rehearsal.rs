//! Rehearsals: a throw-away server boots from clones of a server's newest point, says that it is well, and goes, while
//! the server runs on and its replication goes on.
//!
//! # What is made, and by which names
//!
//! A clone of each volume's target, of the newest point that all of them have, is called by [`clone_name`] and carries a
//! [`Mark`]; the stand-in is called by [`clone_name`] as well, and carries the mark's id. So there is one rehearsal of a
//! server at a time, and what one that was killed has left is found without a search. A provider may have to give a clone
//! another name ([`Rehearse::renames_clones`](super::provider::rehearse::Rehearse::renames_clones)): then it is found among
//! the clones of its target, by its mark. Nothing is removed by its name alone: of two rehearsals that begin at once, each
//! removes what has its own id. The point may be pruned meanwhile: its
//! snapshots live on in the trash for as long as the clones do.
//!
//! # The order
//!
//! What an earlier one has left goes; clones, marked; the stand-in boots, and is judged; it stays for as long as was
//! asked for; the stand-in goes, then the clones. Whatever fails, and whoever interrupts it, the last two are done. After
//! a kill the next rehearsal does them, or `gc`, on the same host where its hypervisor has to be asked. A rehearsal counts
//! as left behind once its process is known to be dead, or the time that it has given itself is over.

mod clones;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::finalize::{journal_of, wrong_state};
use super::journal::moment;
use super::provider::rehearse::{Boots, Judgement, StandIn};
use super::provider::{Precondition, Provider, ServerDisk, Verdict};
use super::server::{CutoverError, Observer, Result};
use crate::failpoint::failpoint;
use crate::fleet::group::GroupPoint;
use crate::image::rbd::{Connector, RbdImage};
use crate::image::{ImageError, ImageSpec, LeaseOwner};

/// What the name of a clone, and of a stand-in, ends with.
pub const SUFFIX: &str = ".poolshift-rehearsal";

/// What a rehearsal needs beside the limits of the plan and what it was asked to stay: its own requests.
const SPARE: Duration = Duration::from_secs(15 * 60);

/// The name of a clone of an image, or of the stand-in of a server.
pub fn clone_name(name: &str) -> String {
    format!("{name}{SUFFIX}")
}

/// What is kept with each clone: who rehearses what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Which rehearsal.
    pub id: String,
    /// The server, by its name in the plan.
    pub server: String,
    /// The point, by the name of its snapshots.
    pub point: String,
    /// The process that rehearses.
    pub owner: LeaseOwner,
    /// When it is over at the latest, RFC 3339.
    pub until: String,
}

impl Mark {
    /// Whether the rehearsal was left behind: its process is known to be dead, or its time is over.
    fn is_left_behind(&self, now: Timestamp) -> bool {
        self.owner.is_known_dead() || self.until.parse::<Timestamp>().is_ok_and(|until| until < now)
    }
}

/// A server, as far as a rehearsal needs it: its targets, and who boots a stand-in.
pub struct Stage {
    name: String,
    provider: Arc<dyn Provider>,
    connector: Connector,
    /// The cluster of the sources, by its fsid, where they are in one.
    source_cluster: Option<String>,
    targets: Vec<(ServerDisk, RbdImage)>,
}

/// How a rehearsal ended.
#[derive(Clone, Debug, Serialize)]
pub struct Rehearsed {
    /// The server.
    pub server: String,
    /// Who booted the stand-in.
    pub by: String,
    /// The point, by the name of its snapshots.
    pub point: String,
    /// When the point was made, RFC 3339.
    pub point_at: String,
    /// The stand-in.
    pub stand_in: String,
    /// The clones that it ran from.
    pub clones: Vec<String>,
    /// Whether it has booted and is well; `None` where only a person can know.
    pub passed: Option<bool>,
    /// What says so, or otherwise.
    pub found: Option<String>,
    /// From the first clone until it was judged.
    #[serde(rename = "took_seconds", serialize_with = "seconds")]
    pub took: Duration,
    /// What a person has to know or to do.
    pub remarks: Vec<String>,
    /// What could not be removed, and why.
    pub left: Vec<String>,
}

fn seconds<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

/// A rehearsal, as far as its judgement.
struct Played {
    point: GroupPoint,
    judgement: Judgement,
    remarks: Vec<String>,
}

/// What a rehearsal has left that was killed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Leftovers {
    /// The server.
    pub server: String,
    /// Who rehearsed; `None` where it was killed before it could say so.
    pub by: Option<String>,
    /// Its stand-in, if it is still there.
    pub stand_in: Option<String>,
    /// Its clones.
    pub clones: Vec<String>,
    /// Which rehearsals they are of.
    #[serde(skip)]
    ids: BTreeSet<String>,
}

impl Leftovers {
    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.clones.is_empty()
    }
}

impl Stage {
    /// Opens the targets of a server. Changes nothing. `clusters`: of the sources, unless they are files, and of the
    /// targets.
    pub async fn open(
        name: &str,
        provider: Arc<dyn Provider>,
        disks: Vec<ServerDisk>,
        clusters: (Option<&Connector>, &Connector),
    ) -> Result<Self> {
        let (sources, connector) = clusters;
        let open = |disk: ServerDisk| async move {
            let in_use = disk.target_in_use.as_ref();
            let target = match sources {
                Some(sources) => connector.open_target_of(&disk.target, in_use, (sources, &disk.source)).await?,
                None => connector.open_target(&disk.target, in_use).await?,
            };
            Ok::<_, ImageError>((disk, target))
        };
        let targets = try_join_all(disks.into_iter().map(open)).await?;
        let source_cluster = sources.map(|sources| sources.fsid().to_owned());
        Ok(Self { name: name.to_owned(), provider, connector: connector.clone(), source_cluster, targets })
    }

    /// What the clones and the stand-in of a rehearsal are called.
    fn stand_in(&self, id: &str) -> StandIn {
        let clone_of =
            |(disk, _): &(ServerDisk, RbdImage)| ServerDisk { target: clone_spec(&disk.target), ..disk.clone() };
        let name = clone_name(self.provider.runs_as().unwrap_or(&self.name));
        let disks = self.targets.iter().map(clone_of).collect();
        StandIn { name, id: id.to_owned(), server: self.name.clone(), disks }
    }

    /// Removes what a rehearsal that was killed has left. Gives back what could not be removed, and why.
    pub async fn clear(&self, left: &Leftovers, observer: &dyn Observer) -> Vec<String> {
        if left.is_empty() {
            return Vec::new();
        }
        observer.note(&format!("removing what an earlier rehearsal has left: {}", left.clones.join(", ")));
        for id in &left.ids {
            if let Err(error) = self.provider.strike(&self.stand_in(id)).await {
                // It has the clones open, or will.
                return vec![error.to_string(), format!("its clones: {}", left.clones.join(", "))];
            }
        }
        self.remove_clones(&left.ids, true).await
    }

    /// Rehearses. `keep`: how long the stand-in stays after it was judged, well or not. Told to stop, it tidies up first.
    pub async fn rehearse(
        &self,
        keep: Option<Duration>,
        observer: &dyn Observer,
        cancel: &CancellationToken,
    ) -> Result<Rehearsed> {
        self.refuse(keep).await?;
        let left = self.clear(&self.leftovers().await?, observer).await;
        if !left.is_empty() {
            let problem = format!("has a rehearsal behind it that can't be removed: {}", left.join("; "));
            return Err(wrong_state(&self.name, &problem, "mend that, or remove it by hand, and run it again"));
        }
        let stand_in = self.stand_in(&format!("{:016x}", fastrand::u64(..)));
        self.refuse_unready(&stand_in).await?;
        let begun = Instant::now();
        let (played, staged) = self.play(&stand_in, keep, observer, cancel).await;
        let took = begun.elapsed();
        if let (Some(keep), Ok(played)) = (keep, &played) {
            self.tell_kept(&stand_in, played, keep, observer);
            failpoint!("rehearsal.judged");
            tokio::select! {
                () = tokio::time::sleep(keep) => {}
                () = cancel.cancelled() => {}
            }
        }
        let left = self.strike(&stand_in, staged, observer).await;
        let Played { point, judgement, remarks } = match played {
            Ok(played) => played,
            Err(error) => {
                left.iter().for_each(|left| observer.note(&format!("not removed: {left}")));
                return Err(error);
            }
        };
        let (passed, found) = match judgement {
            Judgement::Well(found) => (Some(true), Some(found)),
            Judgement::NotWell(found) => (Some(false), Some(found)),
            Judgement::Unknown => (None, None),
        };
        Ok(Rehearsed {
            server: self.name.clone(),
            by: self.provider.describe(),
            point: point.snapshot,
            point_at: point.at.to_string(),
            clones: stand_in.disks.iter().map(|disk| disk.target.to_string()).collect(),
            stand_in: stand_in.name,
            passed,
            found,
            took,
            remarks,
            left,
        })
    }

    /// What makes no sense, or would be in the way of something else.
    async fn refuse(&self, keep: Option<Duration>) -> Result<()> {
        let refused = |problem: &str, hint: &str| Err(wrong_state(&self.name, problem, hint));
        match (self.provider.boots(), keep) {
            (Boots::Person, None) => {
                return refused(
                    "has nobody in the plan who could boot its stand-in",
                    "say with --keep how long its clones are to stay for a person who does, or name its domain, or a \
                     command, in [server.cutover]",
                );
            }
            (Boots::Command, Some(_)) => {
                return refused(
                    "is rehearsed by a command that removes its stand-in itself",
                    "leave out --keep, and have the command wait",
                );
            }
            _ => {}
        }
        let Some((_, first)) = self.targets.first() else { return Ok(()) };
        match journal_of(first).await? {
            Some(journal) if journal.is_cut_over() => {
                refused("runs from its targets already", "there is nothing left to rehearse")
            }
            Some(journal) if !journal.is_over() => {
                refused("is on its way: a cutover, or a way back, has not ended", "finish or undo that first")
            }
            _ => Ok(()),
        }
    }

    async fn refuse_unready(&self, stand_in: &StandIn) -> Result<()> {
        let mut preconditions = self.provider.rehearsal_preconditions(stand_in).await;
        let elsewhere = self.source_cluster.as_deref().filter(|cluster| *cluster != self.connector.fsid());
        if let (true, Some(cluster)) = (self.provider.needs_one_cluster(), elsewhere) {
            let found = format!(
                "its sources are in the cluster {cluster}, its targets in {}: {} finds its disks in one only",
                self.connector.fsid(),
                self.provider.describe()
            );
            preconditions.push(Precondition::new("clusters", Verdict::Error, found));
        }
        match preconditions.iter().any(|found| found.verdict == Verdict::Error) {
            true => Err(CutoverError::NoStage { server: self.name.clone(), preconditions }),
            false => Ok(()),
        }
    }

    /// Until the stand-in is judged; and whether there may be one. What is asked of the cluster or of libvirt is not cut:
    /// it would go on by itself, and be there after all was tidied up.
    async fn play(
        &self,
        stand_in: &StandIn,
        keep: Option<Duration>,
        observer: &dyn Observer,
        cancel: &CancellationToken,
    ) -> (Result<Played>, bool) {
        let point = match self.clone_all(stand_in, keep).await {
            Ok(point) => point,
            Err(error) => return (Err(error), false),
        };
        observer.note(&format!("cloned as of {}: {}", moment(point.at), names(stand_in)));
        failpoint!("rehearsal.cloned");
        let interrupted = || CutoverError::Interrupted { server: self.name.clone() };
        if cancel.is_cancelled() {
            return (Err(interrupted()), false);
        }
        let remarks = match self.provider.stage(stand_in).await {
            Ok(remarks) => remarks,
            Err(error) => return (Err(error.into()), true),
        };
        failpoint!("rehearsal.launched");
        let boots = self.provider.boots();
        if boots == Boots::Provider {
            observer.note(&format!("{} was started", stand_in.name));
        }
        remarks.iter().for_each(|remark| observer.note(remark));
        let judged = tokio::select! {
            judged = self.provider.judge(stand_in) => judged.map_err(CutoverError::from),
            // A command removes what it has made at its end, and nobody else can.
            () = cancel.cancelled(), if boots != Boots::Command => Err(interrupted()),
        };
        (judged.map(|judgement| Played { point, judgement, remarks }), true)
    }

    async fn clone_all(&self, stand_in: &StandIn, keep: Option<Duration>) -> Result<GroupPoint> {
        let owner = LeaseOwner::current()
            .map_err(|error| ImageError::from_io(error, self.name.as_str(), "say who rehearses"))?;
        let span = self.provider.rehearsal_limit() + keep.unwrap_or_default() + SPARE;
        let until = moment(Timestamp::now().checked_add(span).unwrap_or(Timestamp::MAX)).to_string();
        let mark = |point: &GroupPoint| Mark {
            id: stand_in.id.clone(),
            server: self.name.clone(),
            point: point.snapshot.clone(),
            owner: owner.clone(),
            until: until.clone(),
        };
        self.make_clones(stand_in, mark).await
    }

    fn tell_kept(&self, stand_in: &StandIn, played: &Played, keep: Duration, observer: &dyn Observer) {
        match &played.judgement {
            Judgement::Well(found) => observer.note(&format!("it is well: {found}")),
            Judgement::NotWell(found) => observer.note(&format!("it is NOT well: {found}")),
            Judgement::Unknown => {}
        }
        let until = moment(Timestamp::now().checked_add(keep).unwrap_or(Timestamp::MAX));
        let what = match self.provider.boots() {
            Boots::Provider => format!("{} stays", stand_in.name),
            Boots::Person | Boots::Command => format!("boot from {}, which stay", names(stand_in)),
        };
        let at = moment(played.point.at);
        observer.note(&format!("{what} until {until}, as of {at}; Ctrl-C ends it now"));
    }

    /// Removes the stand-in and the clones, as far as possible. Gives back what is left, and why.
    async fn strike(&self, stand_in: &StandIn, staged: bool, observer: &dyn Observer) -> Vec<String> {
        observer.note(&format!("removing {} and its clones", stand_in.name));
        if staged && let Err(error) = self.provider.strike(stand_in).await {
            return vec![error.to_string(), format!("its clones: {}", names(stand_in))];
        }
        failpoint!("rehearsal.removed");
        self.remove_clones(&BTreeSet::from([stand_in.id.clone()]), false).await
    }
}

fn names(stand_in: &StandIn) -> String {
    let names: Vec<String> = stand_in.disks.iter().map(|disk| disk.target.to_string()).collect();
    names.join(", ")
}

fn clone_spec(target: &ImageSpec) -> ImageSpec {
    match target.without_snapshot() {
        ImageSpec::Rbd { pool, namespace, image, snapshot } => {
            ImageSpec::Rbd { pool, namespace, image: clone_name(&image), snapshot }
        }
        file => file,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rehearsal_is_left_behind_when_its_process_or_its_time_is_over() {
        let now: Timestamp = "2026-11-26T12:00:00Z".parse().unwrap();
        let alive = LeaseOwner::current().unwrap();
        let mark = |owner: &LeaseOwner, until: &str| Mark {
            id: "1".into(),
            server: "web".into(),
            point: "p".into(),
            owner: owner.clone(),
            until: until.into(),
        };
        let dead = LeaseOwner { start_ticks: alive.start_ticks + 1, ..alive.clone() };
        let elsewhere = LeaseOwner { host: "another".into(), ..dead.clone() };
        for (owner, until, left) in [
            (&alive, "2026-11-26T12:00:01Z", false),
            (&alive, "2026-11-26T11:59:59Z", true),
            (&dead, "2026-11-26T12:00:01Z", true),
            (&elsewhere, "2026-11-26T12:00:01Z", false),
            (&elsewhere, "soon", false),
        ] {
            assert_eq!(mark(owner, until).is_left_behind(now), left, "{owner} {until}");
        }
    }

    #[test]
    fn a_clone_stands_beside_its_target() {
        let of = |text: &str| clone_spec(&text.parse().unwrap()).to_string();
        assert_eq!(of("rbd:sas/tenant/web-1"), "rbd:sas/tenant/web-1.poolshift-rehearsal");
    }
}
