//! A fleet that shows what the test has set, and notes what it is asked for.

use std::collections::VecDeque;
use std::sync::Mutex;

use async_trait::async_trait;
use tokio::sync::broadcast;

use crate::fleet::control::{ActionError, FleetControl, Scope};
use crate::fleet::status::*;
use crate::throttle::Rate;

/// How many events a receiver may lie behind: few, so that tests can make it lag.
pub(super) const RECEIVER_EVENTS: usize = 4;

pub(super) struct Scripted {
    pub(super) state: Mutex<State>,
    sender: broadcast::Sender<Event>,
}

pub(super) struct State {
    pub(super) status: FleetStatus,
    pub(super) recent: VecDeque<Event>,
    /// How many of them are kept.
    pub(super) keep: usize,
    pub(super) heartbeat_age_seconds: f64,
    /// What was asked for, in order.
    pub(super) asked: Vec<String>,
    /// What the next actions say.
    pub(super) refusal: Option<ActionError>,
    next_id: u64,
}

impl Default for Scripted {
    fn default() -> Self {
        let state = State {
            status: status(),
            recent: VecDeque::new(),
            keep: 1000,
            heartbeat_age_seconds: 1.0,
            asked: Vec::new(),
            refusal: None,
            next_id: 1,
        };
        Self { state: Mutex::new(state), sender: broadcast::channel(RECEIVER_EVENTS).0 }
    }
}

impl Scripted {
    /// Makes something happen; gives back its id.
    pub(super) fn happen(&self) -> u64 {
        let mut state = self.state.lock().unwrap();
        let id = state.next_id;
        state.next_id += 1;
        let event = Event {
            id,
            at: "2026-01-02T03:04:05Z".into(),
            server: Some("web-1".into()),
            volume: None,
            kind: EventKind::PointCommitted,
            message: format!("event {id}\nwith a second line"),
        };
        state.recent.push_back(event.clone());
        while state.recent.len() > state.keep {
            state.recent.pop_front();
        }
        // Nobody may listen.
        let _ = self.sender.send(event);
        id
    }

    /// How many follow the events.
    pub(super) fn followers(&self) -> usize {
        self.sender.receiver_count()
    }

    fn asked(&self, what: String, scope: &Scope) -> Result<Vec<String>, ActionError> {
        let mut state = self.state.lock().unwrap();
        state.asked.push(what);
        if let Some(refusal) = &state.refusal {
            return Err(refusal.clone());
        }
        match scope {
            Scope::All => Ok(state.status.servers.iter().map(|server| server.name.clone()).collect()),
            Scope::Named(name) if state.status.servers.iter().any(|server| server.name == *name) => {
                Ok(vec![name.clone()])
            }
            Scope::Named(name) => Err(ActionError::UnknownName(name.clone())),
        }
    }
}

#[async_trait]
impl FleetControl for Scripted {
    fn status(&self) -> FleetStatus {
        self.state.lock().unwrap().status.clone()
    }

    fn history(&self, server: &str) -> Option<Vec<Sample>> {
        let sample = Sample {
            at: 1_767_323_045.0,
            lag_seconds: Some(30.0),
            changed_bytes: Some(1 << 20),
            change_rate: None,
            throughput: None,
            predicted_outage_seconds: Some(0.5),
        };
        (server == "web-1").then(|| vec![sample; 2])
    }

    fn recent_events(&self) -> Vec<Event> {
        self.state.lock().unwrap().recent.iter().cloned().collect()
    }

    fn events(&self) -> broadcast::Receiver<Event> {
        self.sender.subscribe()
    }

    async fn pause(&self, scope: &Scope) -> Result<Vec<String>, ActionError> {
        self.asked(format!("pause {scope:?}"), scope)
    }

    async fn resume(&self, scope: &Scope) -> Result<Vec<String>, ActionError> {
        self.asked(format!("resume {scope:?}"), scope)
    }

    async fn sync_now(&self, scope: &Scope) -> Result<Vec<String>, ActionError> {
        self.asked(format!("sync-now {scope:?}"), scope)
    }

    async fn set_throttle(&self, pool: &str, rate: Option<Rate>) -> Result<(), ActionError> {
        let limits = rate.map(|rate| (rate.bytes_per_second, rate.operations_per_second));
        self.asked(format!("throttle {pool} {limits:?}"), &Scope::All)?;
        if pool == "sata" || pool == "a/b ä" { Ok(()) } else { Err(ActionError::UnknownPool(pool.to_owned())) }
    }

    fn heartbeat_age_seconds(&self) -> f64 {
        self.state.lock().unwrap().heartbeat_age_seconds
    }
}

/// A server that waits, in step, with one volume of its own name.
pub(in crate::observe) fn server(name: &str) -> ServerStatus {
    ServerStatus {
        name: name.into(),
        activity: Activity::Waiting,
        paused_because: None,
        point: Some(point()),
        lag_seconds: Some(42.0),
        target_lag_seconds: 300.0,
        changed_bytes: Some(3 << 20),
        change_rate: Some(150_000.0),
        throughput: Some(120e6),
        predicted_outage_seconds: Some(0.8),
        convergence: Convergence::InStep,
        next_at: Some("2026-01-02T03:05:00Z".into()),
        drift: Vec::new(),
        last_error: None,
        last_cycle: None,
        volumes: vec![volume(name)],
    }
}

/// A volume in step.
pub(in crate::observe) fn volume(name: &str) -> VolumeStatus {
    VolumeStatus {
        name: name.into(),
        source: format!("rbd:sata/{name}"),
        target: format!("rbd:sas/{name}"),
        boot: true,
        activity: Activity::Waiting,
        size: Some(64 << 30),
        base: Some(point()),
        lag_seconds: Some(42.0),
        changed_bytes: Some(3 << 20),
        change_rate: Some(150_000.0),
        throughput: Some(120e6),
        cycle: None,
        lease: Some("host-a (4711)".into()),
        last_error: None,
    }
}

fn point() -> PointStatus {
    PointStatus { snapshot: "poolshift-20260102T030405Z".into(), at: "2026-01-02T03:04:05Z".into() }
}

/// Three servers: one in step, one with two disks whose cycle runs, one held with an error.
pub(in crate::observe) fn status() -> FleetStatus {
    let mut db = server("db-1");
    db.activity = Activity::Syncing;
    (db.lag_seconds, db.convergence) = (Some(1_230.0), Convergence::Converging);
    db.changed_bytes = Some(5 << 30);
    db.volumes = vec![volume("db-1-root"), volume("db-1-data")];
    db.volumes[1].activity = Activity::Syncing;
    db.volumes[1].boot = false;
    db.volumes[1].cycle = Some(CycleStatus {
        snapshot: Some("poolshift-20260102T030500Z".into()),
        since: "2026-01-02T03:05:00Z".into(),
        done_bytes: 1 << 30,
        total_bytes: 4 << 30,
    });
    let mut held = server("mail \"x\"\\1");
    held.activity = Activity::Held;
    held.convergence = Convergence::Diverging { cure: "raise the limit of the pool sata above 12 MiB/s".into() };
    (held.lag_seconds, held.throughput, held.predicted_outage_seconds) = (Some(200_000.0), None, None);
    held.last_error = Some(ErrorStatus {
        at: "2026-01-02T02:00:00Z".into(),
        message: "rbd:sas/mail: somebody wrote to the target\nstart over with: poolshift sync --full".into(),
        retryable: false,
        count: 3,
    });
    FleetStatus {
        plan: "/etc/poolshift/plan.toml".into(),
        origin: Origin::Daemon,
        at: "2026-01-02T03:05:10Z".into(),
        worker: Some(WorkerStatus {
            host: "host-a".into(),
            pid: 4711,
            since: "2026-01-01T00:00:00Z".into(),
            volumes_running: 1,
            cycles_completed: 1200,
            cycles_failed: 4,
            resident_bytes: 180 << 20,
        }),
        servers: vec![server("web-1"), db, held],
        throttles: vec![ThrottleStatus {
            pool: "sata".into(),
            bytes_per_second: Some(100 << 20),
            operations_per_second: None,
            reason: "plan".into(),
            latency_seconds: Some(0.012),
            used_bytes_per_second: 52_428_800.0,
        }],
    }
}
