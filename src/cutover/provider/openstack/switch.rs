//! A volume is switched to the other pool, and keeps its id: what is to be done next, as a pure function of what is there,
//! and doing it.
//!
//! # How
//!
//! Cinder moves a volume by moving the image of its name. Both real images are given other names before, and a
//! placeholder of 4 MiB has the volume's; Cinder moves that, in an instant whatever the volume's size. Then the real
//! image of the other pool is given the volume's name there.
//!
//! # What can't happen, because no step leads there
//!
//! - A failing migration of Cinder's *deletes* an image of the volume's name in the pool that it goes to: Cinder is
//!   asked for a migration only while nothing has that name there ([`next`]).
//! - Cinder removes, or copies, an image of the volume's name in the pool that it leaves: it is asked only while that is
//!   a placeholder.
//! - An image that poolshift does not know is neither renamed nor removed.

use std::sync::Arc;

use crate::cutover::journal::kept_name;
use crate::image::pools::{Named, Pools, VolumeImage};
use crate::image::rbd::Connector;
use crate::image::{ErrorKind, ImageError, ImageSpec};
use crate::openstack::cinder;
use crate::plan::{self, CinderVolume};

use super::super::Side;

/// What has the volume's name in a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    /// Nothing.
    Nothing,
    /// The image of that side.
    Ours,
    /// A placeholder.
    Placeholder,
    /// An image that poolshift does not know.
    Foreign,
}

/// What is there of one side of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shelf {
    /// What has the volume's name.
    pub(super) in_use: Holds,
    /// Whether the image has the name that it has while no server uses it.
    pub(super) idle: bool,
}

/// What is there of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Whether Cinder is at it.
    pub(super) moving: bool,
    /// In which pool Cinder has it; `None` where its type is none that the plan knows.
    pub(super) pool: Option<Side>,
    /// Whether it has the type that it is to have in that pool, and no helper's.
    pub(super) settled: bool,
    pub(super) source: Shelf,
    pub(super) target: Shelf,
}

impl Seen {
    pub(super) fn on(&self, side: Side) -> Shelf {
        if side == Side::Source { self.source } else { self.target }
    }

    fn on_mut(&mut self, side: Side) -> &mut Shelf {
        if side == Side::Source { &mut self.source } else { &mut self.target }
    }

    /// Which side a server would have it from.
    pub(super) fn side(&self) -> Option<Side> {
        let pool = self.pool.filter(|_| self.settled && !self.moving)?;
        (self.on(pool).in_use == Holds::Ours).then_some(pool)
    }

    /// What is there once that was done.
    pub(super) fn after(&mut self, step: &Step) {
        let (side, in_use, idle) = match *step {
            Step::Hide(side) => (side, Holds::Nothing, true),
            Step::StandIn(side) => (side, Holds::Placeholder, true),
            Step::Aside(side) => (side, Holds::Nothing, self.on(side).idle),
            Step::Place(side) => (side, Holds::Ours, false),
            Step::Wait | Step::Retype | Step::Done | Step::Refuse(_) => return,
        };
        *self.on_mut(side) = Shelf { in_use, idle };
    }
}

/// What is to be done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Cinder is at it.
    Wait,
    /// The image of that side gives up the volume's name.
    Hide(Side),
    /// A placeholder is given the volume's name there.
    StandIn(Side),
    /// The placeholder there gives it up.
    Aside(Side),
    /// The image of that side is given the volume's name.
    Place(Side),
    /// Cinder is asked to give it another type.
    Retype,
    /// Nothing: it is there.
    Done,
    /// A person has to look at it.
    Refuse(String),
}

impl Step {
    /// Its part of the failpoint's name: `retype`, `install-placeholder.source`.
    #[cfg(debug_assertions)]
    pub(super) fn failpoint(&self) -> String {
        match self {
            Self::Hide(side) => format!("rename-to-standby.{}", super::super::name(*side)),
            Self::StandIn(side) => format!("install-placeholder.{}", super::super::name(*side)),
            Self::Aside(side) => format!("retire-placeholder.{}", super::super::name(*side)),
            Self::Place(side) => format!("rename-to-active.{}", super::super::name(*side)),
            Self::Wait => "wait".into(),
            Self::Retype => "retype".into(),
            Self::Done => "done".into(),
            Self::Refuse(_) => "refuse".into(),
        }
    }
}

/// What leads a volume to a side.
pub(super) fn next(to: Side, seen: &Seen) -> Step {
    if seen.moving {
        return Step::Wait;
    }
    let Some(pool) = seen.pool else {
        return Step::Refuse("somebody has given it a type that the plan does not know".into());
    };
    let (here, there) = (seen.on(pool), seen.on(pool.other()));
    if pool == to && seen.settled {
        return match (here.in_use, there.in_use) {
            (Holds::Foreign, _) => foreign(pool),
            (Holds::Placeholder, _) if !here.idle => gone(pool),
            (Holds::Placeholder, _) => Step::Aside(pool),
            (Holds::Nothing, _) if here.idle => Step::Place(pool),
            (Holds::Nothing, _) => gone(pool),
            // Whatever has its name there is in the way of a way back.
            (Holds::Ours, Holds::Ours) => Step::Hide(pool.other()),
            (Holds::Ours, Holds::Placeholder) => Step::Aside(pool.other()),
            (Holds::Ours, Holds::Nothing | Holds::Foreign) => Step::Done,
        };
    }
    match (here.in_use, there.in_use) {
        (Holds::Foreign, _) => foreign(pool),
        (_, Holds::Foreign) => foreign(pool.other()),
        (Holds::Ours, _) => Step::Hide(pool),
        (_, Holds::Ours) => Step::Hide(pool.other()),
        (_, Holds::Placeholder) => Step::Aside(pool.other()),
        // It has to be known where the images are before Cinder is asked for anything.
        _ if !here.idle => gone(pool),
        _ if !there.idle => gone(pool.other()),
        (Holds::Nothing, Holds::Nothing) => Step::StandIn(pool),
        (Holds::Placeholder, Holds::Nothing) => Step::Retype,
    }
}

fn place(side: Side) -> &'static str {
    match side {
        Side::Source => "the source's pool",
        Side::Target => "the target's pool",
    }
}

fn foreign(side: Side) -> Step {
    Step::Refuse(format!("an image that poolshift does not know has its name in {}", place(side)))
}

fn gone(side: Side) -> Step {
    Step::Refuse(format!("its image in {} has gone, or has another name", place(side)))
}

/// The types through which a volume gets from one pool to the other.
struct Way<'a> {
    from: &'a str,
    to: &'a str,
    by_way_of: Option<&'a plan::HelperTypes>,
}

impl<'a> Way<'a> {
    /// The types on the way to that side, in their order, with the pool of each. A helper may be one of the two that the
    /// plan has.
    fn path(&self, to: Side) -> Vec<(&'a str, Side)> {
        let mut path = vec![(self.from, Side::Source)];
        if let Some(helpers) = self.by_way_of {
            path.extend([(helpers.from.as_str(), Side::Source), (helpers.to.as_str(), Side::Target)]);
        }
        path.push((self.to, Side::Target));
        path.dedup();
        if to == Side::Source {
            path.reverse();
        }
        path
    }

    /// The next type, and whether it is in the other pool; `None` at the end of the way, or beside it.
    fn next(&self, now: &str, to: Side) -> Option<(&'a str, bool)> {
        let path = self.path(to);
        let at = path.iter().position(|(name, _)| *name == now)?;
        let (next, pool) = *path.get(at + 1)?;
        Some((next, path[at].1 != pool))
    }

    fn pool_of(&self, volume_type: &str) -> Option<Side> {
        self.path(Side::Target).into_iter().find(|(name, _)| *name == volume_type).map(|(_, pool)| pool)
    }
}

/// A volume with the places of its images.
#[derive(Clone, Debug)]
pub(super) struct CloudVolume {
    /// Its name in the plan.
    pub(super) name: String,
    pub(super) cinder: CinderVolume,
    source: Place,
    target: Place,
    images: Images,
}

/// The pools of both sides, and their clusters where they are RBD's.
#[derive(Clone, Debug)]
pub(super) struct Images {
    pub(super) source: Arc<dyn Pools>,
    pub(super) target: Arc<dyn Pools>,
    /// `None` for images in memory, for which there is no strategy but keep-ids.
    pub(super) connectors: Option<Connectors>,
}

impl From<&Connectors> for Images {
    fn from(connectors: &Connectors) -> Self {
        let pools = |connector: &Connector| Arc::new(connector.clone()) as Arc<dyn Pools>;
        Self {
            source: pools(&connectors.source),
            target: pools(&connectors.target),
            connectors: Some(connectors.clone()),
        }
    }
}

/// The clusters of both sides.
#[derive(Clone, Debug)]
pub struct Connectors {
    /// That of the sources.
    pub source: Connector,
    /// That of the targets.
    pub target: Connector,
}

/// Where the image of a side is, and what it is called.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) pool: String,
    pub(super) namespace: Option<String>,
    pub(super) in_use: String,
    pub(super) idle: String,
}

impl Place {
    fn image(&self) -> String {
        format!("{}/{}", self.pool, self.in_use)
    }
}

impl CloudVolume {
    /// The volume of the plan; `None` where it is none of Cinder's, which the plan's reader refuses.
    pub(super) fn of(volume: &plan::Volume, images: &Images) -> Option<Self> {
        let cinder = volume.cinder.clone()?;
        let (ImageSpec::Rbd { pool, namespace, image: in_use, .. }, ImageSpec::Rbd { image: idle, .. }) =
            (&volume.source, &volume.target)
        else {
            return None;
        };
        let ImageSpec::Rbd { pool: to_pool, namespace: to_namespace, .. } = &volume.target else { return None };
        let place = |pool: &str, namespace: &Option<String>, idle: String| Place {
            pool: pool.to_owned(),
            namespace: namespace.clone(),
            in_use: in_use.clone(),
            idle,
        };
        Some(Self {
            name: volume.name.clone(),
            cinder,
            source: place(pool, namespace, kept_name(in_use)),
            target: place(to_pool, to_namespace, idle.clone()),
            images: images.clone(),
        })
    }

    /// The pools and the names of its image on that side.
    pub(super) fn at(&self, side: Side) -> (&dyn Pools, &Place) {
        match side {
            Side::Source => (self.images.source.as_ref(), &self.source),
            Side::Target => (self.images.target.as_ref(), &self.target),
        }
    }

    /// The same with the cluster, for what is done with images of RBD only.
    pub(super) fn in_cluster(&self, side: Side) -> Result<(&Connector, &Place), ImageError> {
        let place = self.at(side).1;
        let connectors = self.images.connectors.as_ref().ok_or_else(|| {
            ImageError::new(ErrorKind::Unsupported, place.image(), "reach its cluster").detail("it is not on RBD")
        })?;
        Ok((if side == Side::Source { &connectors.source } else { &connectors.target }, place))
    }

    /// Whether Cinder has the image of that name as the volume's.
    pub(super) fn is_image_of(&self, shown: &cinder::Volume) -> bool {
        shown.image() == self.source.in_use
    }

    /// The image that a server opens on that side, as Cinder names it: `sata/volume-3f…`.
    pub(super) fn image(&self, side: Side) -> String {
        self.at(side).1.image()
    }

    /// The type that it is to have on that side.
    pub(super) fn final_type(&self, side: Side) -> &str {
        match side {
            Side::Source => &self.cinder.from_type,
            Side::Target => &self.cinder.to_type,
        }
    }

    /// The next type on the way to that side, and whether Cinder migrates it for that; `None` at the end of the way, or
    /// beside it.
    pub(super) fn next_type(&self, now: &str, to: Side) -> Option<(&str, bool)> {
        self.way().next(now, to)
    }

    /// In which pool a volume of that type is; `None` where the plan does not know the type.
    pub(super) fn pool_of(&self, volume_type: &str) -> Option<Side> {
        self.way().pool_of(volume_type)
    }

    fn way(&self) -> Way<'_> {
        let CinderVolume { from_type, to_type, by_way_of, .. } = &self.cinder;
        Way { from: from_type, to: to_type, by_way_of: by_way_of.as_ref() }
    }

    /// What is there, with what Cinder says.
    pub(super) async fn look(&self, volume: &cinder::Volume) -> Result<Seen, ImageError> {
        let (source, target) = futures::try_join!(self.look_at(Side::Source), self.look_at(Side::Target))?;
        let now = volume.volume_type.as_deref().unwrap_or_default();
        let pool = self.way().pool_of(now);
        let settled = pool.is_some_and(|pool| self.final_type(pool) == now);
        Ok(Seen { moving: volume.is_moving(), pool, settled, source, target })
    }

    async fn look_at(&self, side: Side) -> Result<Shelf, ImageError> {
        let (pools, place) = self.at(side);
        let named = |name| pools.named(&place.pool, place.namespace.as_deref(), name);
        let (in_use, idle) = futures::try_join!(named(&place.in_use), named(&place.idle))?;
        let idle = match idle {
            Named::Image(image) => Some(image),
            Named::Nothing | Named::Placeholder(_) => None,
        };
        Ok(match (in_use, idle) {
            (Named::Nothing, idle) => Shelf { in_use: Holds::Nothing, idle: idle.is_some() },
            (Named::Placeholder(_), idle) => Shelf { in_use: Holds::Placeholder, idle: idle.is_some() },
            // A rename that was cut leaves it two names to be opened by, of which one counts.
            (Named::Image(image), Some(idle)) if image.identity() == idle.identity() => {
                let counts = image.name().await?;
                let is_idle = counts == place.idle;
                Shelf { in_use: if is_idle { Holds::Nothing } else { Holds::Ours }, idle: is_idle }
            }
            (Named::Image(_), Some(_)) => Shelf { in_use: Holds::Foreign, idle: true },
            (Named::Image(image), None) => {
                let ours = side == Side::Source || image.is_replicated().await?;
                Shelf { in_use: if ours { Holds::Ours } else { Holds::Foreign }, idle: false }
            }
        })
    }

    /// The images that have the volume's name. A placeholder is none: there is nothing of the volume in it.
    pub(super) async fn named_as_in_use(&self) -> Result<Vec<Arc<dyn VolumeImage>>, ImageError> {
        let (source, target) = futures::try_join!(self.named(Side::Source, true), self.named(Side::Target, true))?;
        let image = |named| if let Named::Image(image) = named { Some(image) } else { None };
        Ok([source, target].into_iter().filter_map(image).collect())
    }

    /// Makes the placeholder that the volume leaves a side with.
    pub(super) async fn prepare(&self, from: Side) -> Result<(), ImageError> {
        let (pools, place) = self.at(from);
        let placeholder = pools.prepare_placeholder(&place.pool, place.namespace.as_deref(), &place.in_use).await?;
        match self.named(from, true).await? {
            Named::Image(image) => placeholder.stand_in_for(image.as_ref()).await,
            Named::Nothing | Named::Placeholder(_) => Ok(()),
        }
    }

    /// Removes what is left of placeholders.
    pub(super) async fn tidy_up(&self) -> Result<(), ImageError> {
        for side in [Side::Source, Side::Target] {
            let (pools, place) = self.at(side);
            pools.remove_placeholder(&place.pool, place.namespace.as_deref(), &place.in_use).await?;
        }
        Ok(())
    }

    /// Does a step that is about names.
    pub(super) async fn rename(&self, step: &Step) -> Result<(), ImageError> {
        match *step {
            Step::Hide(side) => self.give_name(side, false).await,
            Step::Place(side) => self.give_name(side, true).await,
            Step::StandIn(side) => {
                let (pools, place) = self.at(side);
                let (pool, namespace) = (place.pool.as_str(), place.namespace.as_deref());
                let placeholder = pools.prepare_placeholder(pool, namespace, &place.in_use).await?;
                if let Named::Image(image) = self.named(side, false).await? {
                    placeholder.stand_in_for(image.as_ref()).await?;
                }
                placeholder.rename(&place.in_use).await
            }
            Step::Aside(side) => match self.named(side, true).await? {
                Named::Placeholder(placeholder) => {
                    if let Named::Image(image) = self.named(side, false).await? {
                        image.take_over_from(placeholder.as_ref()).await?;
                    }
                    let (pools, place) = self.at(side);
                    match placeholder.put_aside(&place.in_use).await {
                        // A walk that was cut has left one of its own there.
                        Err(error) if error.kind == ErrorKind::AlreadyExists => {
                            let (pool, namespace) = (place.pool.as_str(), place.namespace.as_deref());
                            pools.remove_placeholder(pool, namespace, &place.in_use).await?;
                            placeholder.put_aside(&place.in_use).await
                        }
                        done => done,
                    }
                }
                Named::Nothing | Named::Image(_) => Ok(()),
            },
            Step::Wait | Step::Retype | Step::Done | Step::Refuse(_) => Ok(()),
        }
    }

    async fn named(&self, side: Side, in_use: bool) -> Result<Named, ImageError> {
        let (pools, place) = self.at(side);
        let name = if in_use { &place.in_use } else { &place.idle };
        pools.named(&place.pool, place.namespace.as_deref(), name).await
    }

    /// Gives the image of a side the volume's name, or its other one.
    async fn give_name(&self, side: Side, in_use: bool) -> Result<(), ImageError> {
        let place = self.at(side).1;
        let wanted = if in_use { &place.in_use } else { &place.idle };
        // By the name that it is to lose: so a rename that was cut is finished.
        for name in [!in_use, in_use] {
            if let Named::Image(image) = self.named(side, name).await? {
                return image.rename(wanted).await;
            }
        }
        Ok(())
    }
}

/// Whether somebody has an image open who may be a server: somebody who watches it or has its lock, and is none of
/// poolshift's. Who has the lock without a watch may only be out of reach; a server that closes its disks gives it back.
pub(super) async fn is_open(image: &dyn VolumeImage) -> Result<bool, ImageError> {
    let (users, holder) = futures::try_join!(image.users(), image.lease_owner())?;
    let ours = match holder {
        Some(holder) if holder.is_known() => holder.client,
        Some(_) => return Ok(true),
        None => None,
    };
    Ok(users.iter().any(|user| !user.is_own && ours.as_ref() != Some(&user.address)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLDS: [Holds; 4] = [Holds::Nothing, Holds::Ours, Holds::Placeholder, Holds::Foreign];

    /// Every world that there can be: an image has one name only.
    fn worlds() -> Vec<Seen> {
        let mut all = Vec::new();
        let shelves: Vec<Shelf> = HOLDS
            .iter()
            .flat_map(|&in_use| [true, false].map(|idle| Shelf { in_use, idle }))
            .filter(|shelf| !(shelf.in_use == Holds::Ours && shelf.idle))
            .collect();
        for &source in &shelves {
            for &target in &shelves {
                for pool in [None, Some(Side::Source), Some(Side::Target)] {
                    for (moving, settled) in [(false, true), (false, false), (true, true)] {
                        all.push(Seen { moving, pool, settled, source, target });
                    }
                }
            }
        }
        all
    }

    #[test]
    fn cinder_is_asked_only_while_it_can_do_no_harm() {
        for seen in worlds() {
            for to in [Side::Source, Side::Target] {
                if next(to, &seen) != Step::Retype {
                    continue;
                }
                let pool = seen.pool.expect("it is known where it is");
                // What it deletes here is a placeholder, and there is nothing that it could delete there.
                assert_eq!(seen.on(pool).in_use, Holds::Placeholder, "{seen:?}");
                assert_eq!(seen.on(pool.other()).in_use, Holds::Nothing, "{seen:?}");
                assert!(seen.source.idle && seen.target.idle && !seen.moving, "{seen:?}");
            }
        }
    }

    #[test]
    fn what_nobody_knows_is_left_alone() {
        for seen in worlds() {
            for to in [Side::Source, Side::Target] {
                let touched = match next(to, &seen) {
                    Step::Hide(side) => Some((side, Holds::Ours)),
                    Step::Aside(side) => Some((side, Holds::Placeholder)),
                    Step::Place(side) | Step::StandIn(side) => Some((side, Holds::Nothing)),
                    _ => None,
                };
                if let Some((side, was)) = touched {
                    assert_eq!(seen.on(side).in_use, was, "{seen:?} to {to:?}");
                }
            }
        }
    }

    #[test]
    fn every_world_leads_there_or_to_a_person() {
        for mut seen in worlds() {
            for to in [Side::Source, Side::Target] {
                let first = seen.clone();
                for steps in 0.. {
                    assert!(steps < 12, "it goes round in circles: {first:?} to {to:?}");
                    let step = next(to, &seen);
                    match &step {
                        Step::Done => {
                            assert_eq!(seen.side(), Some(to), "{first:?}");
                            break;
                        }
                        Step::Refuse(_) => break,
                        Step::Wait => seen.moving = false,
                        // As Cinder does it.
                        Step::Retype => {
                            let pool = seen.pool.expect("known");
                            if pool != to {
                                seen.on_mut(pool).in_use = Holds::Nothing;
                                seen.on_mut(pool.other()).in_use = Holds::Placeholder;
                                seen.pool = Some(to);
                            }
                            seen.settled = true;
                        }
                        step => seen.after(step),
                    }
                }
                seen = first;
            }
        }
    }

    #[test]
    fn helpers_lead_from_one_pool_to_the_other() {
        let ways = |by_way_of: Option<(&str, &str)>| {
            let helpers = by_way_of.map(|(from, to)| plan::HelperTypes { from: from.into(), to: to.into() });
            let way = Way { from: "sata", to: "sas", by_way_of: helpers.as_ref() };
            let walk = |to: Side| {
                let mut now = if to == Side::Target { "sata" } else { "sas" }.to_owned();
                let mut walked = Vec::new();
                while let Some((next, migrates)) = way.next(&now, to) {
                    walked.push(format!("{next}{}", if migrates { "!" } else { "" }));
                    now = next.to_owned();
                }
                walked.join(" ")
            };
            [walk(Side::Target), walk(Side::Source)]
        };
        assert_eq!(ways(None), ["sas!", "sata!"]);
        assert_eq!(ways(Some(("a", "b"))), ["a b! sas", "b a! sata"]);
        // A side that is plain is its own helper.
        assert_eq!(ways(Some(("sata", "b"))), ["b! sas", "b sata!"]);
        assert_eq!(ways(Some(("a", "sas"))), ["a sas!", "a! sata"]);
        assert_eq!(ways(Some(("sata", "sas"))), ["sas!", "sata!"]);
        let way = Way { from: "sata", to: "sas", by_way_of: None };
        assert_eq!((way.next("nvme", Side::Target), way.pool_of("nvme")), (None, None));
    }

    #[test]
    fn the_usual_way_has_these_steps() {
        let idle = |in_use, idle| Shelf { in_use, idle };
        let mut seen = Seen {
            moving: false,
            pool: Some(Side::Source),
            settled: true,
            source: idle(Holds::Ours, false),
            target: idle(Holds::Nothing, true),
        };
        let mut steps = Vec::new();
        loop {
            let step = next(Side::Target, &seen);
            steps.push(step.clone());
            match step {
                Step::Done => break,
                Step::Retype => {
                    (seen.source.in_use, seen.target.in_use) = (Holds::Nothing, Holds::Placeholder);
                    seen.pool = Some(Side::Target);
                }
                step => seen.after(&step),
            }
        }
        let (from, to) = (Side::Source, Side::Target);
        let usual = [Step::Hide(from), Step::StandIn(from), Step::Retype, Step::Aside(to), Step::Place(to), Step::Done];
        assert_eq!(steps, usual);
    }
}
