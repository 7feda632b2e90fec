//! The paths and what they answer.

use std::num::NonZeroU64;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::IntoResponse;
use axum::routing::{get, post, put};
use axum::{Json, Router, middleware};
use serde::{Deserialize, Deserializer, Serialize};

use super::guard::{self, Authorised};
use super::reply::{Answer, Refusal, read_json};
use super::{HEARTBEAT_AGE_SECONDS_MAX, Served, stream};
use crate::fleet::control::{ActionError, Scope};
use crate::fleet::status::{
    Activity, Convergence, ErrorStatus, Event, FleetStatus, PointStatus, Sample, ServerStatus, VolumeStatus,
};
use crate::observe::metrics;
use crate::throttle::Rate;

type Shared = State<Arc<Served>>;
type Name = Result<Path<String>, PathRejection>;

/// The index, as a person reads it.
const INDEX: &str = "\
poolshift's API. Actions need the header `Authorization: Bearer TOKEN`; errors are JSON.

GET    /v1/fleet                   everything
GET    /v1/servers                 the servers, without their volumes
GET    /v1/servers/NAME            a server with its volumes
GET    /v1/servers/NAME/history    its last day, a sample a minute
GET    /v1/volumes/NAME            a volume
GET    /v1/events?since=ID         what has happened lately, after the event ID
GET    /v1/events/stream           what happens, as server-sent events
POST   /v1/actions/pause           {\"scope\":\"all\"} or {\"name\":\"web-1\"}
POST   /v1/actions/resume          the same
POST   /v1/actions/sync-now        the same
PUT    /v1/throttles/POOL          {\"bytes_per_second\":N,\"operations_per_second\":N}, null for no limit
DELETE /v1/throttles/POOL          back to what the plan says
GET    /metrics                    for Prometheus
GET    /healthz                    200 while the fleet is alive
";

pub(super) fn router(served: Arc<Served>) -> Router {
    Router::new()
        .route("/v1", get(async || INDEX))
        .route("/v1/fleet", get(fleet))
        .route("/v1/servers", get(servers))
        .route("/v1/servers/{name}", get(server))
        .route("/v1/servers/{name}/history", get(history))
        .route("/v1/volumes/{name}", get(volume))
        .route("/v1/events", get(events))
        .route("/v1/events/stream", get(events_stream))
        .route("/v1/actions/pause", post(pause))
        .route("/v1/actions/resume", post(resume))
        .route("/v1/actions/sync-now", post(sync_now))
        .route("/v1/throttles/{pool}", put(set_throttle).delete(reset_throttle))
        .route("/metrics", get(metrics))
        .route(guard::HEALTH, get(healthz))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(served.clone(), guard::check))
        .with_state(served)
}

async fn unknown_path(uri: Uri) -> Refusal {
    let text = format!("there is no path {:?}", uri.path());
    Refusal::new(StatusCode::NOT_FOUND, "unknown-path", text).hint("GET /v1 lists the paths")
}

/// The router adds `Allow`.
async fn wrong_method(method: Method, uri: Uri) -> Refusal {
    let text = format!("{:?} can't be asked with {method}", uri.path());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "wrong-method", text).hint("the header Allow lists what it takes")
}

fn named(name: Name) -> Result<String, Refusal> {
    let Path(name) = name.map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, "bad-path", error.body_text()))?;
    Ok(name)
}

async fn fleet(State(served): Shared) -> Json<FleetStatus> {
    Json(served.fleet.status())
}

/// A server without its volumes.
#[derive(Serialize)]
struct ServerSummary {
    name: String,
    activity: Activity,
    point: Option<PointStatus>,
    lag_seconds: Option<f64>,
    target_lag_seconds: f64,
    changed_bytes: Option<u64>,
    change_rate: Option<f64>,
    throughput: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    paused_because: Option<String>,
    predicted_outage_seconds: Option<f64>,
    convergence: Convergence,
    next_at: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    drift: Vec<String>,
    last_error: Option<ErrorStatus>,
    /// How many.
    volumes: usize,
}

impl From<ServerStatus> for ServerSummary {
    fn from(server: ServerStatus) -> Self {
        Self {
            name: server.name,
            activity: server.activity,
            point: server.point,
            lag_seconds: server.lag_seconds,
            target_lag_seconds: server.target_lag_seconds,
            changed_bytes: server.changed_bytes,
            change_rate: server.change_rate,
            throughput: server.throughput,
            paused_because: server.paused_because,
            predicted_outage_seconds: server.predicted_outage_seconds,
            convergence: server.convergence,
            next_at: server.next_at,
            drift: server.drift,
            last_error: server.last_error,
            volumes: server.volumes.len(),
        }
    }
}

async fn servers(State(served): Shared) -> Json<Vec<ServerSummary>> {
    Json(served.fleet.status().servers.into_iter().map(ServerSummary::from).collect())
}

fn unknown_server(name: &str) -> Refusal {
    Refusal::unknown("unknown-server", format!("the plan has no server {name:?}"))
}

async fn server(State(served): Shared, name: Name) -> Answer<ServerStatus> {
    let name = named(name)?;
    let mut servers = served.fleet.status().servers.into_iter();
    servers.find(|server| server.name == name).map(Json).ok_or_else(|| unknown_server(&name))
}

async fn history(State(served): Shared, name: Name) -> Answer<Vec<Sample>> {
    let name = named(name)?;
    served.fleet.history(&name).map(Json).ok_or_else(|| unknown_server(&name))
}

#[derive(Serialize)]
struct VolumeOfServer {
    server: String,
    #[serde(flatten)]
    volume: VolumeStatus,
}

async fn volume(State(served): Shared, name: Name) -> Answer<VolumeOfServer> {
    let name = named(name)?;
    for server in served.fleet.status().servers {
        if let Some(volume) = server.volumes.into_iter().find(|volume| volume.name == name) {
            return Ok(Json(VolumeOfServer { server: server.name, volume }));
        }
    }
    Err(Refusal::unknown("unknown-volume", format!("the plan has no volume {name:?}")))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Since {
    since: Option<u64>,
}

fn since(query: Result<Query<Since>, QueryRejection>) -> Result<Option<u64>, Refusal> {
    let bad = |error: QueryRejection| Refusal::new(StatusCode::BAD_REQUEST, "bad-query", error.body_text());
    Ok(query.map_err(bad)?.0.since)
}

async fn events(State(served): Shared, query: Result<Query<Since>, QueryRejection>) -> Answer<Vec<Event>> {
    let since = since(query)?;
    let mut events = served.fleet.recent_events();
    // An id beyond all is another process's: then all of this one's are new.
    let newest = events.last().map_or(0, |event| event.id);
    if let Some(since) = since.filter(|since| *since <= newest) {
        events.retain(|event| event.id > since);
    }
    Ok(Json(events))
}

async fn events_stream(
    State(served): Shared,
    query: Result<Query<Since>, QueryRejection>,
    headers: HeaderMap,
) -> Result<stream::Events, Refusal> {
    // The header is newer: who connects again does so with the first request's query.
    let since = match headers.get("last-event-id") {
        Some(value) => {
            let id = value.to_str().ok().and_then(|text| text.trim().parse().ok());
            let bad = || Refusal::new(StatusCode::BAD_REQUEST, "bad-event-id", "Last-Event-ID is not an event's id");
            Some(id.ok_or_else(bad)?)
        }
        None => since(query)?,
    };
    let place = served.streams.clone().try_acquire_owned().map_err(|_| {
        let text = format!("{} streams of events are open, and there are no more", served.limits.streams);
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "too-many-streams", text)
            .hint("close one, or ask /v1/events now and then")
    })?;
    Ok(stream::follow(&served, since, place))
}

/// Whom an action is for: exactly one of the two.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Whom {
    scope: Option<All>,
    name: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum All {
    All,
}

impl Whom {
    fn scope(self) -> Result<Scope, Refusal> {
        match (self.scope, self.name) {
            (Some(All::All), None) => Ok(Scope::All),
            (None, Some(name)) => Ok(Scope::Named(name)),
            _ => {
                let text = "the body must have either a scope or a name";
                Err(Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, "wrong-fields", text)
                    .hint("write {\"scope\":\"all\"} or {\"name\":\"web-1\"}"))
            }
        }
    }
}

#[derive(Serialize)]
struct Servers {
    servers: Vec<String>,
}

/// Acts in a task of its own: a client that goes away must not leave half of an action behind.
async fn act<T: Send + 'static>(
    action: impl Future<Output = Result<T, ActionError>> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::spawn(action).await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "the action was cut off")
            .hint("the daemon's log says why; look at the status before trying again")),
    }
}

async fn whom(body: Body, served: &Served) -> Result<Scope, Refusal> {
    read_json::<Whom>(body, served.limits.patience).await?.scope()
}

async fn pause(State(served): Shared, _: Authorised, body: Body) -> Answer<Servers> {
    let (scope, fleet) = (whom(body, &served).await?, served.fleet.clone());
    Ok(Json(Servers { servers: act(async move { fleet.pause(&scope).await }).await? }))
}

async fn resume(State(served): Shared, _: Authorised, body: Body) -> Answer<Servers> {
    let (scope, fleet) = (whom(body, &served).await?, served.fleet.clone());
    Ok(Json(Servers { servers: act(async move { fleet.resume(&scope).await }).await? }))
}

async fn sync_now(State(served): Shared, _: Authorised, body: Body) -> Answer<Servers> {
    let (scope, fleet) = (whom(body, &served).await?, served.fleet.clone());
    Ok(Json(Servers { servers: act(async move { fleet.sync_now(&scope).await }).await? }))
}

/// Both limits must be there: one that is forgotten must not become none at all.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Limit {
    #[serde(deserialize_with = "present")]
    bytes_per_second: Option<NonZeroU64>,
    #[serde(deserialize_with = "present")]
    operations_per_second: Option<NonZeroU64>,
}

fn present<'de, D: Deserializer<'de>>(value: D) -> Result<Option<NonZeroU64>, D::Error> {
    Option::deserialize(value)
}

/// What was asked for.
#[derive(Serialize)]
struct ThrottleSet {
    pool: String,
    /// `None`: what the plan says.
    rate: Option<Rate>,
}

async fn set_throttle(State(served): Shared, _: Authorised, pool: Name, body: Body) -> Answer<ThrottleSet> {
    let pool = named(pool)?;
    let Limit { bytes_per_second, operations_per_second } = read_json(body, served.limits.patience).await?;
    throttle(&served, pool, Some(Rate { bytes_per_second, operations_per_second })).await
}

async fn reset_throttle(State(served): Shared, _: Authorised, pool: Name) -> Answer<ThrottleSet> {
    throttle(&served, named(pool)?, None).await
}

async fn throttle(served: &Served, pool: String, rate: Option<Rate>) -> Answer<ThrottleSet> {
    let (fleet, name) = (served.fleet.clone(), pool.clone());
    act(async move { fleet.set_throttle(&name, rate).await }).await?;
    Ok(Json(ThrottleSet { pool, rate }))
}

async fn metrics(State(served): Shared) -> Result<impl IntoResponse, Refusal> {
    let text = metrics::encode(served.fleet.status(), served.fleet.heartbeat_age_seconds())
        .map_err(|_| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "failed", "the metrics can't be written"))?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text))
}

async fn healthz(State(served): Shared) -> Result<&'static str, Refusal> {
    let age = served.fleet.heartbeat_age_seconds();
    // An age that is no number is no sign of life either.
    if age <= HEARTBEAT_AGE_SECONDS_MAX {
        return Ok("ok\n");
    }
    let text = format!("the fleet has given no sign of life for {age:.0} s");
    Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "stale", text)
        .hint("restart the daemon: each volume goes on where it was"))
}
