//! A worker over in-memory images: what goes wrong with one server stays with it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Mutex;

use async_trait::async_trait;

use super::*;
use crate::fleet::control::{ActionError, FleetControl, Scope};
use crate::fleet::status::{Activity, FleetStatus, ServerStatus};
use crate::fleet::{Drift, Images, Opener};
use crate::image::memory::MemoryImage;
use crate::image::{ErrorKind, ImageError, Layout, LeaseOwner, SourceImage, TargetImage};
use crate::plan::{Api, ClusterAccess, FleetLimits, Pace, Quiesce, Retention, Volume};

const LAYOUT: Layout = Layout { object_size: 64 << 10, stripe_unit: 64 << 10, stripe_count: 1 };

/// Images by the names of volumes; each opening is a handle of its own, as another process has.
#[derive(Default)]
struct Disks {
    images: Mutex<BTreeMap<String, (MemoryImage, MemoryImage)>>,
    /// Volumes whose sources are called something else by now.
    left: Mutex<BTreeSet<String>>,
    /// What has become of servers where they run.
    drift: Mutex<BTreeMap<String, Drift>>,
}

impl Disks {
    fn disk(&self, name: &str) -> (MemoryImage, MemoryImage) {
        let image = |side: &str| MemoryImage::new(&format!("{side}-{name}"), 256 << 10, LAYOUT);
        let mut disks = self.images.lock().unwrap();
        disks.entry(name.to_owned()).or_insert_with(|| (image("source"), image("target"))).clone()
    }
}

#[async_trait]
impl Opener for Disks {
    async fn open(&self, volume: &Volume, _to_look: bool) -> Result<Images, CycleError> {
        if volume.name.contains("missing") {
            return Err(ImageError::new(ErrorKind::NotFound, "memory:missing", "open the image").into());
        }
        // As the sources of a server that was cut over, which have other names.
        if self.left.lock().unwrap().contains(&volume.name) {
            return Err(ImageError::new(ErrorKind::NotFound, volume.source.to_string(), "open the image").into());
        }
        let (source, target) = self.disk(&volume.name);
        Ok((Arc::new(source.reopen()), Arc::new(target.reopen())))
    }

    async fn open_target(&self, volume: &Volume) -> Result<Arc<dyn TargetImage>, CycleError> {
        if volume.name.contains("missing") {
            return Err(ImageError::new(ErrorKind::NotFound, "memory:missing", "open the image").into());
        }
        Ok(Arc::new(self.disk(&volume.name).1.reopen()))
    }

    async fn drift(&self, server: &Server) -> Option<Vec<Drift>> {
        Some(self.drift.lock().unwrap().get(&server.name).cloned().into_iter().collect())
    }
}

fn server(name: &str, volumes: usize) -> Server {
    let volume = |index| {
        let name = format!("{name}-{index}");
        let spec = |side: &str| format!("rbd:{side}/{name}").parse().unwrap();
        Volume {
            source: spec("sata"),
            target: spec("sas"),
            boot: index == 0,
            rate: Default::default(),
            name,
            cinder: None,
        }
    };
    let pace = Pace {
        interval: Duration::from_millis(200),
        idle_interval: Duration::from_millis(400),
        target_lag: Duration::from_secs(5),
    };
    Server {
        name: name.to_owned(),
        volumes: (0..volumes).map(volume).collect(),
        pace,
        retention: Retention { keep: 1, keep_for: None },
        quiesce: Quiesce::None,
        paused: false,
        cutover: crate::plan::Cutover::None,
    }
}

fn plan(servers: Vec<Server>) -> Plan {
    Plan {
        path: PathBuf::from("fleet.toml"),
        source_cluster: ClusterAccess::default(),
        target_cluster: ClusterAccess::default(),
        servers,
        limits: FleetLimits { volumes: 8, first_syncs: 4, volumes_per_pool: 8, memory: 64 << 20 },
        throttles: Vec::new(),
        api: Api { listen: None, token_file: None },
    }
}

/// A worker that runs.
struct Running {
    fleet: Fleet,
    cancel: CancellationToken,
    reload: mpsc::Sender<Plan>,
    task: tokio::task::JoinHandle<()>,
}

fn start(plan: Plan, disks: &Arc<Disks>) -> Running {
    let (worker, fleet) = Worker::new(plan, disks.clone());
    let (cancel, (reload, plans)) = (CancellationToken::new(), mpsc::channel(1));
    let task = tokio::spawn(worker.run(cancel.clone(), plans, || {}));
    Running { fleet, cancel, reload, task }
}

impl Running {
    /// Waits until the status is as wanted.
    async fn until(&self, what: &str, wanted: impl Fn(&FleetStatus) -> bool) -> FleetStatus {
        let mut events = self.fleet.events();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            let status = self.fleet.status();
            if wanted(&status) {
                return status;
            }
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            assert!(!left.is_zero(), "{what}: {status:#?}");
            // Something happens at least once a second, and what happened is in the status.
            let _ = tokio::time::timeout(left.min(Duration::from_millis(100)), events.recv()).await;
        }
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.task.await.unwrap();
    }
}

fn of<'a>(status: &'a FleetStatus, name: &str) -> &'a ServerStatus {
    status.servers.iter().find(|server| server.name == name).unwrap_or_else(|| panic!("no {name}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_servers_are_held_and_the_others_follow() {
    let disks = Arc::new(Disks::default());
    let running = start(plan(vec![server("web", 2), server("db", 3), server("missing", 1)]), &disks);
    running.until("first points", |s| of(s, "web").point.is_some() && of(s, "db").point.is_some()).await;
    let held = running.until("held", |s| of(s, "missing").activity == Activity::Held).await;
    let error = of(&held, "missing").last_error.clone().unwrap();
    assert!(!error.retryable && error.message.contains("memory:missing"), "{error:?}");
    let first = of(&held, "web").point.clone().unwrap();
    for index in 0..2 {
        disks.disk(&format!("web-{index}")).0.write_as_server(4096 * index, b"changed");
    }
    let after = running.until("a new point", |s| of(s, "web").point.as_ref() != Some(&first)).await;
    assert_eq!(of(&after, "db").volumes.len(), 3);
    assert!(of(&after, "web").lag_seconds.is_some_and(|lag| lag < 60.0));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_is_seen_by_every_worker_and_survives_them() {
    let disks = Arc::new(Disks::default());
    let first = start(plan(vec![server("web", 2)]), &disks);
    first.until("a point", |s| of(s, "web").point.is_some()).await;
    assert_eq!(first.fleet.pause(&Scope::Named("web-1".into())).await.unwrap(), ["web"]);
    assert!(first.fleet.pause(&Scope::Named("nobody".into())).await.is_err());
    first.until("paused", |s| of(s, "web").activity == Activity::Paused).await;
    first.stop().await;
    let second = start(plan(vec![server("web", 2)]), &disks);
    second.until("still paused", |s| of(s, "web").activity == Activity::Paused).await;
    second.fleet.resume(&Scope::All).await.unwrap();
    second.until("resumed", |s| of(s, "web").activity != Activity::Paused).await;
    second.fleet.sync_now(&Scope::All).await.unwrap();
    let count = |s: &FleetStatus| s.worker.as_ref().unwrap().cycles_completed;
    second.until("a cycle", |s| count(s) > 0).await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_of_another_worker_is_respected_until_it_is_free() {
    let disks = Arc::new(Disks::default());
    let other = disks.disk("web-1").1.reopen();
    other.acquire_lease(&LeaseOwner::current().unwrap()).await.unwrap();
    let running = start(plan(vec![server("web", 2), server("db", 1)]), &disks);
    running.until("elsewhere", |s| of(s, "web").activity == Activity::Elsewhere).await;
    running.until("the others go on", |s| of(s, "db").point.is_some()).await;
    other.release_lease().await.unwrap();
    running.until("relieved", |s| of(s, "web").point.is_some()).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_plan_takes_effect_while_running() {
    let disks = Arc::new(Disks::default());
    let running = start(plan(vec![server("web", 1), server("old", 1)]), &disks);
    running.until("points", |s| s.servers.iter().all(|server| server.point.is_some())).await;
    let paused = Server { paused: true, ..server("web", 1) };
    running.reload.send(plan(vec![paused, server("new", 2)])).await.unwrap();
    let status = running
        .until("the new plan", |s| s.servers.iter().any(|server| server.name == "new" && server.point.is_some()))
        .await;
    assert_eq!(of(&status, "web").activity, Activity::Paused);
    assert!(running.fleet.history("web").is_some() && running.fleet.history("old").is_none());
    running.stop().await;
    for name in ["web-0", "old-0", "new-0", "new-1"] {
        assert_eq!(disks.disk(name).1.reopen().lease_owner().await.unwrap(), None, "{name}");
        assert_eq!(disks.disk(name).0.snapshots().await.unwrap().len(), 1, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_workers_share_a_fleet_and_agree() {
    let disks = Arc::new(Disks::default());
    let servers = || (0..6).map(|index| server(&format!("s{index}"), 2)).collect::<Vec<_>>();
    let (one, two) = (start(plan(servers()), &disks), start(plan(servers()), &disks));
    for round in 0..10u64 {
        for index in 0..6 {
            disks.disk(&format!("s{index}-{}", round % 2)).0.write_as_server(4096 * round, &[round as u8 + 1; 100]);
        }
        let events = one.fleet.recent_events().len() + two.fleet.recent_events().len();
        let more = |_: &FleetStatus| one.fleet.recent_events().len() + two.fleet.recent_events().len() > events + 6;
        one.until("more cycles", more).await;
    }
    let done = |running: &Running| running.fleet.status().worker.unwrap().cycles_failed;
    assert_eq!((done(&one), done(&two)), (0, 0), "{:#?}", one.fleet.recent_events());
    one.stop().await;
    two.stop().await;
    let opened = plan(servers());
    let status = crate::fleet::status_from_images(&opened, disks.as_ref()).await;
    assert!(status.servers.iter().all(|server| server.point.is_some() && server.activity == Activity::Waiting));
}

/// Cuts a server over, as far as a worker can see that: its sources are renamed, and its first target has a note.
async fn cut_over(disks: &Disks, server: &Server) {
    let first = disks.disk(&server.volumes[0].name).1.reopen();
    first.store_note(Some("paused: cut over to its targets at 2026-11-25T22:00:00Z")).await.unwrap();
    disks.left.lock().unwrap().extend(server.volumes.iter().map(|volume| volume.name.clone()));
    for volume in &server.volumes {
        let (_, target) = disks.disk(&volume.name);
        target.write_as_server(8192, b"written where it runs now");
    }
}

const REASON: &str = "cut over to its targets at 2026-11-25T22:00:00Z";

fn is_paused_by_its_cutover(status: &FleetStatus) -> bool {
    let web = of(status, "web");
    web.activity == Activity::Paused && web.paused_because.as_deref() == Some(REASON) && web.last_error.is_none()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_was_cut_over_is_paused_for_a_worker_that_ran_and_for_a_new_one() {
    let disks = Arc::new(Disks::default());
    let servers = || vec![server("web", 2), server("db", 1)];
    let first = start(plan(servers()), &disks);
    first.until("points", |s| s.servers.iter().all(|server| server.point.is_some())).await;
    cut_over(&disks, &server("web", 2)).await;
    // What it left still counts as written: the worker that has it open looks again.
    disks.disk("web-1").0.write_as_server(0, b"late");
    first.until("paused", is_paused_by_its_cutover).await;
    first.stop().await;
    let written: Vec<u64> = (0..2).map(|index| disks.disk(&format!("web-{index}")).1.bytes_written()).collect();

    let second = start(plan(servers()), &disks);
    second.until("paused again", is_paused_by_its_cutover).await;
    let held = second.fleet.recent_events().into_iter().find(|event| event.kind == EventKind::Held);
    assert!(held.is_none(), "{held:?}");
    // Nobody resumes it by hand, alone or with all others.
    let refused = second.fleet.resume(&Scope::Named("web".into())).await.unwrap_err();
    assert_eq!(refused, ActionError::CutOver("web".into()));
    assert_eq!(second.fleet.resume(&Scope::All).await.unwrap(), ["db"]);
    second.fleet.pause(&Scope::Named("web".into())).await.unwrap();
    let status = crate::fleet::status_from_images(&plan(servers()), disks.as_ref()).await;
    assert!(is_paused_by_its_cutover(&status), "{status:#?}");
    assert_eq!(of(&status, "db").paused_because, None);
    let after: Vec<u64> = (0..2).map(|index| disks.disk(&format!("web-{index}")).1.bytes_written()).collect();
    assert_eq!(after, written);

    // Brought back: the sources have their names, and the note is gone.
    disks.left.lock().unwrap().clear();
    disks.disk("web-0").1.reopen().store_note(None).await.unwrap();
    second.until("resumed", |s| of(s, "web").activity != Activity::Paused).await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_missing_without_a_note_holds_its_server() {
    let disks = Arc::new(Disks::default());
    disks.left.lock().unwrap().insert("web-1".into());
    let running = start(plan(vec![server("web", 2)]), &disks);
    let held = running.until("held", |s| of(s, "web").activity == Activity::Held).await;
    assert!(of(&held, "web").last_error.as_ref().unwrap().message.contains("rbd:sata/web-1"));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_drifted_is_shown_or_holds() {
    let disks = Arc::new(Disks::default());
    let drift = |about: &str, text: &str, holds| Drift { about: about.into(), text: text.into(), holds };
    let all = [
        ("db", drift("db", "it has one more disk", false)),
        ("web", drift("web-1", "somebody has given it another type", true)),
        // Gone, and that is why.
        ("gone", drift("missing-0", "the cloud has it no more", true)),
        ("left", drift("left-0", "somebody has given it another type", true)),
    ];
    disks.drift.lock().unwrap().extend(all.map(|(name, drift)| (name.to_owned(), drift)));
    let mut gone = server("gone", 1);
    gone.volumes[0].name = "missing-0".into();
    cut_over(&disks, &server("left", 1)).await;
    let running = start(plan(vec![server("db", 1), server("web", 2), gone, server("left", 1)]), &disks);
    let status = running
        .until("all of it", |s| {
            let is = |name, activity| of(s, name).activity == activity;
            of(s, "db").point.is_some()
                && is("web", Activity::Held)
                && is("gone", Activity::Held)
                && is("left", Activity::Paused)
        })
        .await;
    assert_eq!(of(&status, "db").drift, ["db: it has one more disk"]);
    let web = of(&status, "web");
    assert_eq!(web.drift, ["web-1: somebody has given it another type"]);
    let error = web.last_error.clone().unwrap();
    assert!(error.message.contains("rbd:sata/web-1") && error.message.contains("another type"), "{error:?}");
    assert!(of(&status, "gone").last_error.as_ref().unwrap().message.contains("the cloud has it no more"));
    assert_eq!(web.point, None, "nothing of it was replicated");
    let told = running.fleet.recent_events().into_iter().filter(|event| event.kind == EventKind::Drift);
    let told: Vec<String> = told.map(|event| event.message).collect();
    assert!(told.contains(&"db: it has one more disk".to_owned()), "{told:?}");
    running.stop().await;
}
