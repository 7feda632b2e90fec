//! A status as Prometheus reads it: OpenMetrics' text format.
//!
//! All names begin with `poolshift_`; times are in seconds, sizes in bytes, rates by the second. A figure that is not
//! known has no sample. An activity is a set of states: one sample for each, of which one is 1.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode as encode_text;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::fleet::status::{Activity, Convergence, FleetStatus, ServerStatus, ThrottleStatus, VolumeStatus};

/// The content type of [`encode()`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Every activity and its name in the label `state`, which is its name in JSON.
const ACTIVITIES: [(Activity, &str); 9] = [
    (Activity::Unknown, "unknown"),
    (Activity::NeverSynced, "never-synced"),
    (Activity::FirstSync, "first-sync"),
    (Activity::Syncing, "syncing"),
    (Activity::Waiting, "waiting"),
    (Activity::BackingOff, "backing-off"),
    (Activity::Held, "held"),
    (Activity::Paused, "paused"),
    (Activity::Elsewhere, "elsewhere"),
];

/// Writes a status, and the age of the fleet's heartbeat in seconds.
///
/// # Errors
///
/// None that could happen: text in memory can be written.
pub fn encode(status: FleetStatus, heartbeat_age_seconds: f64) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("poolshift");
    registry.register("build", "The version", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
    registry.register_collector(Box::new(Fleet { status, heartbeat_age_seconds }));
    let mut text = String::new();
    encode_text(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Fleet {
    status: FleetStatus,
    heartbeat_age_seconds: f64,
}

impl Collector for Fleet {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.worker(&mut encoder)?;
        self.servers(&mut encoder)?;
        self.volumes(&mut encoder)?;
        self.throttles(&mut encoder)
    }
}

/// Where a family is written: the encoder, and what all its samples are of.
type Encoder<'a, 'b> = &'a mut DescriptorEncoder<'b>;

/// Writes a family of gauges. What is not known, and what is no number, has no sample.
fn gauges<'l, const N: usize>(
    encoder: Encoder<'_, '_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = ([(&'static str, &'l str); N], Option<f64>)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in samples {
        if let Some(value) = value.filter(|value| value.is_finite()) {
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn gauge(encoder: Encoder<'_, '_>, name: &str, help: &str, value: f64) -> fmt::Result {
    let gauge = ConstGauge::new(value);
    gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
}

fn counter(encoder: Encoder<'_, '_>, name: &str, help: &str, value: u64) -> fmt::Result {
    let counter = ConstCounter::new(value);
    counter.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)
}

/// Bytes as Prometheus counts: exact below 2^53, 8 PiB.
#[allow(clippy::cast_precision_loss)]
fn number(bytes: u64) -> f64 {
    bytes as f64
}

fn flag(value: bool) -> f64 {
    if value { 1.0 } else { 0.0 }
}

impl Fleet {
    fn worker(&self, encoder: Encoder<'_, '_>) -> fmt::Result {
        gauge(
            encoder,
            "heartbeat_age_seconds",
            "How long ago the fleet gave a sign of life",
            self.heartbeat_age_seconds,
        )?;
        let Some(worker) = &self.status.worker else { return Ok(()) };
        if let Ok(since) = worker.since.parse::<jiff::Timestamp>() {
            gauge(
                encoder,
                "worker_start_time_seconds",
                "When the process started, since 1970",
                since.as_duration().as_secs_f64(),
            )?;
        }
        gauge(
            encoder,
            "worker_volumes_running",
            "Volumes that are worked on now",
            number(worker.volumes_running as u64),
        )?;
        gauge(
            encoder,
            "worker_resident_memory_bytes",
            "Resident memory of the process",
            number(worker.resident_bytes),
        )?;
        counter(encoder, "worker_cycles_completed", "Cycles of servers that came to an end", worker.cycles_completed)?;
        counter(encoder, "worker_cycles_failed", "Cycles of servers that failed", worker.cycles_failed)
    }

    fn servers(&self, encoder: Encoder<'_, '_>) -> fmt::Result {
        type Figure = (&'static str, &'static str, fn(&ServerStatus) -> Option<f64>);
        let figures: [Figure; 8] =
            [
                ("server_lag_seconds", "Age of the newest point on the target", |s| s.lag_seconds),
                ("server_target_lag_seconds", "Lag that the plan wants", |s| Some(s.target_lag_seconds)),
                ("server_changed_bytes", "Changed since the newest point", |s| s.changed_bytes.map(number)),
                ("server_change_rate_bytes_per_second", "What changes on the source in a second", |s| s.change_rate),
                ("server_throughput_bytes_per_second", "What a cycle moves in a second", |s| s.throughput),
                ("server_predicted_outage_seconds", "How long the final delta would take now", |s| {
                    s.predicted_outage_seconds
                }),
                ("server_converging", "1 if the lag is or comes within what the plan wants, 0 if it never will", |s| {
                    match s.convergence {
                        Convergence::Unknown => None,
                        Convergence::Converging | Convergence::InStep => Some(1.0),
                        Convergence::Diverging { .. } => Some(0.0),
                    }
                }),
                ("server_failures", "How many times in a row its cycle has failed", |s| {
                    Some(s.last_error.as_ref().map_or(0.0, |error| f64::from(error.count)))
                }),
            ];
        for (name, help, figure) in figures {
            let servers = &self.status.servers;
            gauges(encoder, name, help, servers.iter().map(|server| ([("server", &*server.name)], figure(server))))?;
        }
        let states = self.status.servers.iter().flat_map(|server| {
            ACTIVITIES.iter().map(|(activity, state)| {
                ([("server", &*server.name), ("state", *state)], Some(flag(server.activity == *activity)))
            })
        });
        gauges(encoder, "server_activity", "What it is doing: 1 for the state it is in", states)
    }

    fn volumes(&self, encoder: Encoder<'_, '_>) -> fmt::Result {
        type Figure = (&'static str, &'static str, fn(&VolumeStatus) -> Option<f64>);
        let figures: [Figure; 7] = [
            ("volume_size_bytes", "Its size", |v| v.size.map(number)),
            ("volume_lag_seconds", "Age of the newest snapshot on both sides", |v| v.lag_seconds),
            ("volume_changed_bytes", "Changed since the newest snapshot on both sides, at most", |v| {
                v.changed_bytes.map(number)
            }),
            ("volume_change_rate_bytes_per_second", "What changes on the source in a second", |v| v.change_rate),
            ("volume_throughput_bytes_per_second", "What a cycle moves in a second", |v| v.throughput),
            ("volume_cycle_done_bytes", "Bytes of the running cycle's delta that are done", |v| {
                v.cycle.as_ref().map(|cycle| number(cycle.done_bytes))
            }),
            ("volume_cycle_bytes", "Bytes of the running cycle's delta, at most", |v| {
                v.cycle.as_ref().map(|cycle| number(cycle.total_bytes))
            }),
        ];
        let volumes = || self.status.servers.iter().flat_map(|s| s.volumes.iter().map(move |v| (s, v)));
        for (name, help, figure) in figures {
            let samples = volumes()
                .map(|(server, volume)| ([("server", &*server.name), ("volume", &*volume.name)], figure(volume)));
            gauges(encoder, name, help, samples)?;
        }
        let states = volumes().flat_map(|(server, volume)| {
            ACTIVITIES.iter().map(move |(activity, state)| {
                let labels = [("server", &*server.name), ("volume", &*volume.name), ("state", *state)];
                (labels, Some(flag(volume.activity == *activity)))
            })
        });
        gauges(encoder, "volume_activity", "What it is doing: 1 for the state it is in", states)
    }

    fn throttles(&self, encoder: Encoder<'_, '_>) -> fmt::Result {
        type Figure = (&'static str, &'static str, fn(&ThrottleStatus) -> Option<f64>);
        let figures: [Figure; 4] = [
            ("throttle_limit_bytes_per_second", "What a source pool may be asked for; no sample: no limit", |t| {
                t.bytes_per_second.map(number)
            }),
            ("throttle_limit_operations_per_second", "The same in requests; no sample: no limit", |t| {
                t.operations_per_second.map(number)
            }),
            ("throttle_used_bytes_per_second", "What it is asked for", |t| Some(t.used_bytes_per_second)),
            ("throttle_latency_seconds", "Mean latency of our reads of it", |t| t.latency_seconds),
        ];
        for (name, help, figure) in figures {
            let throttles = &self.status.throttles;
            gauges(encoder, name, help, throttles.iter().map(|t| ([("pool", &*t.pool)], figure(t))))?;
        }
        Ok(())
    }
}
