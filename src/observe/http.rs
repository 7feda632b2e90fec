//! The HTTP API of a running fleet.
//!
//! # Paths
//!
//! Reads:
//!
//! | path | answer |
//! |---|---|
//! | `GET /v1` | these paths, as text |
//! | `GET /v1/fleet` | [`FleetStatus`](crate::fleet::status::FleetStatus): all of it |
//! | `GET /v1/servers` | a list of servers without their volumes, whose number is in `volumes` |
//! | `GET /v1/servers/NAME` | [`ServerStatus`](crate::fleet::status::ServerStatus) |
//! | `GET /v1/servers/NAME/history` | a list of [`Sample`](crate::fleet::status::Sample), oldest first, one a minute for a day |
//! | `GET /v1/volumes/NAME` | [`VolumeStatus`](crate::fleet::status::VolumeStatus), and its `server` |
//! | `GET /v1/events?since=ID` | a list of the recent [`Event`](crate::fleet::status::Event)s with greater ids, oldest first; without `since` all of them |
//! | `GET /v1/events/stream` | the same as they happen, as server-sent events: see below |
//! | `GET /metrics` | the metrics, in OpenMetrics' text format, which Prometheus reads ([`super::metrics`]) |
//! | `GET /healthz` | 200 `ok`; 503 if the fleet has given no sign of life for [`HEARTBEAT_AGE_SECONDS_MAX`] |
//!
//! Actions, which need the token:
//!
//! | path | body | does |
//! |---|---|---|
//! | `POST /v1/actions/pause` | `{"scope":"all"}` or `{"name":"web-1"}` | stops cycles until resumed |
//! | `POST /v1/actions/resume` | the same | undoes it, and tries again what is held |
//! | `POST /v1/actions/sync-now` | the same | makes a cycle due at once |
//! | `PUT /v1/throttles/POOL` | `{"bytes_per_second":N,"operations_per_second":N}`, both there, `null` for no limit | limits a source pool |
//! | `DELETE /v1/throttles/POOL` | none | gives the pool back to the plan |
//!
//! The first three answer `{"servers":["web-1"]}`, the last two the throttle that was asked for. An action that has
//! begun is brought to an end even if the client goes away.
//!
//! # Server-sent events
//!
//! Each message has the event's id and the event as JSON. `Last-Event-ID` (or `?since=ID`) first replays what came after
//! that event; without it the stream begins with the next event. Nothing is sent twice and nothing left out, as long as
//! the fleet still has it: where it has not, there is one message `event: lagged` with `{"missed":N}`, or with
//! `{"missed":null}` if the id is from another process and nobody knows. Comments keep the connection alive. At most
//! [`Limits::streams`] at a time.
//!
//! # Who may do what
//!
//! - Actions need `Authorization: Bearer TOKEN`. Where no token is configured they are refused (403).
//! - On loopback, reads need none. A browser must not be made to read them for a foreign site whose name was rebound to
//!   loopback, and so a read without the token must have a `Host` that is loopback or `localhost`.
//! - Beyond loopback everything but `/healthz` needs the token.
//! - There is no CORS, nothing is cached (`Cache-Control: no-store`), and there is no TLS: put a proxy before it.
//!
//! # Errors
//!
//! All are `{"error":{"code":"unknown-server","message":"…","hint":"…"}}`; `code` is for programs and stays, the others
//! are for people, and `hint` may be missing. 400 for what can't be read, 401 and 403 for tokens and hosts, 404 for
//! unknown paths and names, 405 for wrong methods (with `Allow`), 408 for a body that doesn't come, 413 for one over
//! 16 KiB, 422 for JSON with wrong or unknown fields, 503 where something has run out or can't be stored.
//!
//! # Bounds
//!
//! See [`Limits`]. A client that doesn't send its headers or its body in time, or doesn't take its answer, is cut off.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::token::Token;
use crate::fleet::control::FleetControl;

mod connections;
mod guard;
mod reply;
mod routes;
mod stream;

#[cfg(test)]
pub(super) use stream::Following;

/// How old the fleet's heartbeat may be before `/healthz` says so, in seconds.
pub const HEARTBEAT_AGE_SECONDS_MAX: f64 = 60.0;

/// The largest body of a request, in bytes.
pub const BODY_BYTES_MAX: usize = 16 << 10;

/// Who may act.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// The token; `None`: nobody acts, and nobody reads from afar.
    pub token: Option<Token>,
}

/// What the server spends on its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at a time; the next one is told 503 and closed.
    pub connections: usize,
    /// Streams of events at a time; the next one is told 503.
    pub streams: usize,
    /// How long a client may take for its headers, for its body, or before it takes more of its answer.
    pub patience: Duration,
    /// How often a stream of events says that it is still there.
    pub keep_alive: Duration,
    /// How long requests may take to end once the server is told to stop.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            streams: 64,
            patience: Duration::from_secs(10),
            keep_alive: Duration::from_secs(15),
            grace: Duration::from_secs(5),
        }
    }
}

/// What every request may use.
struct Served {
    fleet: Arc<dyn FleetControl>,
    access: Access,
    limits: Limits,
    /// Whether only this host can reach the listener.
    loopback: bool,
    /// One permit for each stream of events.
    streams: Arc<Semaphore>,
    cancel: CancellationToken,
}

/// Serves a fleet until cancelled; then ends all streams, and gives requests [`Limits::grace`] to end.
///
/// # Errors
///
/// If the listener has no address. What goes wrong with a connection concerns nobody else.
pub async fn serve(
    listener: TcpListener,
    fleet: Arc<dyn FleetControl>,
    access: Access,
    cancel: CancellationToken,
) -> io::Result<()> {
    serve_within(listener, fleet, access, Limits::default(), cancel).await
}

/// The same, within other limits.
///
/// # Errors
///
/// See [`serve()`].
pub async fn serve_within(
    listener: TcpListener,
    fleet: Arc<dyn FleetControl>,
    access: Access,
    limits: Limits,
    cancel: CancellationToken,
) -> io::Result<()> {
    let address = listener.local_addr()?;
    let loopback = address.ip().to_canonical().is_loopback();
    match (&access.token, loopback) {
        (None, false) => tracing::warn!(%address, "the API answers nobody beyond loopback without api.token_file"),
        (None, true) => tracing::info!(%address, "the API listens, without a token: actions are refused"),
        (Some(_), _) => tracing::info!(%address, "the API listens"),
    }
    let streams = Arc::new(Semaphore::new(limits.streams));
    let served = Arc::new(Served { fleet, access, limits, loopback, streams, cancel: cancel.clone() });
    connections::run(listener, routes::router(served), limits, cancel).await;
    Ok(())
}
