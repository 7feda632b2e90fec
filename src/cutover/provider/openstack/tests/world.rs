//! Volumes of a simulated cloud, whoever has them, and the plan that moves them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use tokio_util::sync::CancellationToken;

use super::super::switch::Images;
use super::super::{OpenStack, OpenStackCutover};
use super::End;
use crate::cutover::journal::{Changes, Journal, kept_name};
use crate::cutover::phase::Phase;
use crate::cutover::provider::{Side, disks_of};
use crate::cutover::sides::Sides;
use crate::cutover::{self, Observer, Options, Server, Volume};
use crate::failpoint::script as failpoints;
use crate::fleet::group;
use crate::image::memory::{MemoryImage, MemoryPools};
use crate::image::{Disk, Layout, Point, SourceImage as _};
use crate::openstack::sim::{SimCloud, VolumeEnd};
use crate::plan::{Cutover, Plan};

/// Where somebody is who has nothing to do with the cloud.
const STRANGER: &str = "10.0.0.9:0/9";

/// Who has the volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// A server that boots from them.
    Server,
    /// A server that has them beside its own.
    Gateway,
    /// Nobody.
    Nobody,
}

/// A simulated cloud with volumes in it, and the plan that moves them.
pub(super) struct World {
    pub(super) cloud: SimCloud,
    held: Held,
    plan: Plan,
    volumes: Vec<String>,
    server: Option<String>,
    /// How the server had its volumes in the beginning.
    had: Vec<(String, String, bool)>,
    /// What a stranger could have done.
    exposed: Mutex<Vec<String>>,
}

/// What others do at every phase: the servers of the cloud write, and a stranger looks for a way to lose data.
struct Others<'a> {
    world: &'a World,
    to: Side,
}

impl Observer for Others<'_> {
    fn phase(&self, phase: Phase) {
        self.world.cloud.write();
        for volume in &self.world.volumes {
            let [source, target] = self.world.images(volume);
            let (leaving, arriving, pool) = match self.to {
                Side::Target => (source, target, "sas"),
                Side::Source => (target, source, "sata"),
            };
            self.world.start_early((volume, pool), &arriving, phase);
            self.world.write_late(&leaving, phase);
        }
    }
}

impl World {
    /// Volumes that were replicated once, and have changed since.
    pub(super) async fn replicated(held: Held) -> Self {
        let cloud = SimCloud::start(MemoryPools::default()).await;
        let volumes: Vec<String> = (0..2).map(|_| cloud.create_volume("sata")).collect();
        volumes.iter().for_each(|volume| cloud.fill(volume));
        let own = (held == Held::Gateway).then(|| cloud.create_volume("sata"));
        let all: Vec<String> = own.into_iter().chain(volumes.iter().cloned()).collect();
        let server = (held != Held::Nobody).then(|| cloud.create_server(&all));
        for volume in &volumes {
            let layout = Layout { object_size: 4096, stripe_unit: 4096, stripe_count: 1 };
            cloud.pools().add("sas", MemoryImage::new(&format!("poolshift-{volume}"), 64 << 10, layout));
        }
        let plan = Plan::parse(&plan_of(held, server.as_deref(), &volumes), Path::new("plan.toml"));
        let plan = plan.unwrap_or_else(|error| panic!("{error:?}"));
        let had = server.as_ref().map(|id| cloud.server(id, &BTreeMap::new()).expect("it runs")).unwrap_or_default();
        let world = Self { cloud, held, plan, volumes, server, had, exposed: Mutex::default() };
        let opened = world.process();
        let sides = Sides { server: &opened, to: Side::Target };
        struct Silent;
        impl group::Observer for Silent {}
        let replicated = group::run(&sides.members(), &sides.group_options(), &Silent, &CancellationToken::new()).await;
        replicated.expect("it is replicated");
        world.write();
        world
    }

    /// Has all servers write.
    pub(super) fn write(&self) {
        self.cloud.write();
    }

    /// As long as an image is written by the copy, nobody who starts the server may get it.
    fn start_early(&self, (volume, pool): (&str, &str), arriving: &MemoryImage, phase: Phase) {
        let is_written = matches!(
            phase,
            Phase::Syncing | Phase::Converged | Phase::Quiescing | Phase::FinalDelta | Phase::Verifying
        );
        let in_use = self.cloud.pools().find(pool, &format!("volume-{volume}"));
        if is_written && in_use.is_some_and(|image| image.is_same(arriving)) {
            self.expose(format!("{phase}: a server that is started gets volume {volume} while it is written"));
        }
    }

    /// From the last delta until the server runs on the other side, nobody may write to what is left.
    fn write_late(&self, leaving: &MemoryImage, phase: Phase) {
        if matches!(phase, Phase::FinalDelta | Phase::Verifying | Phase::Swapping | Phase::Resuming) {
            leaving.open_as_server(STRANGER);
            if leaving.write_at_server(STRANGER, 0, b"late").is_ok() {
                self.expose(format!("{phase}: somebody may write to {}", leaving.location()));
            }
            leaving.close_as_server(STRANGER);
        }
    }

    fn expose(&self, what: String) {
        self.exposed.lock().expect("no test panics with it").push(what);
    }

    /// The images of a volume, under whichever of their names: on the source, and on the target.
    fn images(&self, volume: &str) -> [MemoryImage; 2] {
        let find = |pool: &str, names: [String; 2]| {
            let found = names.iter().filter_map(|name| self.cloud.pools().find(pool, name));
            let mut found = found.filter(|image| !image.is_placeholder());
            found.next().unwrap_or_else(|| panic!("{pool} has none of {names:?}"))
        };
        let in_use = format!("volume-{volume}");
        [
            find("sata", [kept_name(&in_use), in_use.clone()]),
            find("sas", [format!("poolshift-{volume}"), in_use.clone()]),
        ]
    }

    /// The server of the plan, as a process that has just begun opens it.
    fn process(&self) -> Server {
        self.cloud.pools().reopen();
        let planned = &self.plan.servers[0];
        let Cutover::OpenStack(config) = &planned.cutover else { panic!("the plan has another cutover") };
        let (source, target) = (Arc::new(self.cloud.pools().clone()), Arc::new(self.cloud.pools().clone()));
        let images = Images { source, target, connectors: None };
        let provider = provider(planned, config.clone(), &images, &self.cloud);
        let volume = |(disk, id): (_, &String)| {
            let [source, target] = self.images(id);
            Volume { disk, source: Arc::new(source) as Arc<dyn Disk>, target: Arc::new(target) as Arc<dyn Disk> }
        };
        Server {
            name: planned.name.clone(),
            volumes: disks_of(planned).into_iter().zip(&self.volumes).map(volume).collect(),
            provider: Arc::new(provider),
            retention: planned.retention,
        }
    }

    async fn killed(&self) {
        let by_request = self.cloud.script().killed();
        tokio::select! {
            () = by_request.notified() => {}
            () = failpoints::killed() => {}
        }
    }

    /// Cuts over, as a process of its own; `None` if that is killed.
    pub(super) async fn cut_over(&self) -> End {
        let (server, options, cancel) = (self.process(), Options::default(), CancellationToken::new());
        let observer = Others { world: self, to: Side::Target };
        tokio::select! {
            ended = cutover::cutover(&server, &options, &observer, &cancel) => Some(ended),
            () = self.killed() => None,
        }
    }

    /// Rolls back with the changes, as a process of its own; `None` if that is killed.
    pub(super) async fn roll_back(&self) -> End {
        let (server, options, cancel) = (self.process(), Options::default(), CancellationToken::new());
        let observer = Others { world: self, to: Side::Source };
        tokio::select! {
            ended = cutover::rollback(&server, Some(Changes::Carry), &options, &observer, &cancel) => Some(ended),
            () = self.killed() => None,
        }
    }

    async fn journal(&self) -> Option<Journal> {
        cutover::journal(&self.process()).await.expect("the journal can be read")
    }

    /// Whether a cutover or a rollback was begun that has not come to its end.
    pub(super) async fn is_unfinished(&self) -> bool {
        match self.journal().await {
            Some(journal) => !journal.is_cut_over(),
            None => {
                let server = self.process();
                cutover::is_paused_by_a_cutover(&server).await.expect("the note can be read")
            }
        }
    }

    /// The side on which all is, with nothing lost and nothing left over.
    pub(super) async fn settled(&self) -> Result<Side, String> {
        // What was asked of the cloud by a process that is gone comes to its end.
        tokio::time::sleep(std::time::Duration::from_secs(30)).await;
        self.write();
        let journal = self.journal().await;
        self.cloud.pools().time_out_watches();
        let side = if journal.as_ref().is_some_and(Journal::is_cut_over) { Side::Target } else { Side::Source };
        if side == Side::Source && journal.is_some() {
            return Err(format!("a journal is left: {journal:?}"));
        }
        let mut used = BTreeMap::new();
        for volume in &self.volumes {
            used.insert(volume.clone(), self.judge_volume(volume, side).await?);
        }
        if let Some(server) = &self.server {
            let mut has = self.cloud.server(server, &used)?;
            has.sort_by(|one, other| one.1.cmp(&other.1));
            if has != self.had {
                return Err(format!("the server has {has:?}, and had {:?}", self.had));
            }
        }
        let exposed = self.exposed.lock().expect("no test panics with it").clone();
        match [self.cloud.violations(), exposed].concat() {
            none if none.is_empty() => Ok(side),
            some => Err(some.join("; ")),
        }
    }

    /// Whether a volume is on that side only, with all that was written; its image there.
    async fn judge_volume(&self, id: &str, side: Side) -> Result<String, String> {
        let on_target = side == Side::Target;
        let VolumeEnd { volume_type, pool, status, migration, acknowledged } = self.cloud.volume(id)?;
        let (wanted, usual) =
            (if on_target { "sas" } else { "sata" }, if self.held == Held::Nobody { "available" } else { "in-use" });
        let found = (volume_type.as_str(), pool.as_str(), status.as_str());
        if found != (wanted, wanted, usual) || !matches!(migration.as_deref(), None | Some("success")) {
            return Err(format!("volume {id} is {found:?}, migration {migration:?}, on the {side:?}"));
        }
        let of = |pool: &str| {
            self.cloud.pools().names(pool).into_iter().filter(|name| name.contains(id)).collect::<Vec<_>>()
        };
        let (in_use, idle) = (format!("volume-{id}"), format!("poolshift-{id}"));
        let expected = if on_target { [kept_name(&in_use), in_use.clone()] } else { [in_use.clone(), idle] };
        let names = [of("sata"), of("sas")];
        if names != expected.clone().map(|name| vec![name]) {
            return Err(format!("the pools have {names:?}, and are to have {expected:?}"));
        }
        let [source, target] = self.images(id);
        let (image, left) = if on_target { (target, source) } else { (source, target) };
        if image.bytes_at(&Point::Head) != Some(acknowledged) {
            return Err(format!("volume {id} lacks what was written"));
        }
        let users = [image.users().await, left.users().await].map(|users| users.expect("it is up").len());
        let open = [usize::from(self.held != Held::Nobody), 0];
        if users != open {
            return Err(format!("volume {id}: {users:?} clients have its images open, and {open:?} are to"));
        }
        Ok(format!("{wanted}/{in_use}"))
    }
}

fn provider(planned: &crate::plan::Server, config: OpenStackCutover, images: &Images, cloud: &SimCloud) -> OpenStack {
    OpenStack { access: Some(cloud.access()), ..OpenStack::with_images(planned, config, images) }
}

fn plan_of(held: Held, server: Option<&str>, volumes: &[String]) -> String {
    let holder = match (held, server) {
        (Held::Server, Some(id)) => format!("server = \"{id}\", "),
        (Held::Gateway, Some(id)) => format!("gateway = \"{id}\", "),
        _ => String::new(),
    };
    let mut plan = format!("[[server]]\nname = \"web\"\ncutover = {{ openstack = {{ {holder}limit = \"90s\" }} }}\n");
    for (number, id) in volumes.iter().enumerate() {
        plan += &format!(
            "[[server.volume]]\nname = \"web-{number}\"\nboot = {}\nsource = \"rbd:sata/volume-{id}\"\n\
             target = \"rbd:sas/poolshift-{id}\"\n\
             cinder = {{ volume = \"{id}\", from_type = \"sata\", to_type = \"sas\" }}\n",
            number == 0
        );
    }
    plan
}

/// How a run ended, for people.
pub(super) fn told(ended: &End) -> String {
    match ended {
        None => "it was killed".into(),
        Some(Ok(report)) => format!("{report:?}"),
        Some(Err(error)) => crate::fleet::chain_text(error),
    }
}
