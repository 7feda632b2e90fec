//! What is known of each server, learned from its cycles: lag, rates, predictions, history.

use std::collections::VecDeque;
use std::sync::Arc;

use jiff::Timestamp;

use super::group::{GroupPoint, GroupReport, Seen};
use super::predict::{CostModel, SlowMean, convergence};
use super::status::{Activity, CycleStatus, ErrorStatus, LastCycle, PointStatus, Sample, ServerStatus, VolumeStatus};
use crate::clock;
use crate::plan::{Server, Volume};
use crate::replicate::{Progress, SyncReport};

/// How many samples of a server's history are kept: one a minute for a day.
const HISTORY: usize = 24 * 60;

/// How long it takes until what was measured counts for two thirds of a rate, in seconds.
const RATE_MEMORY: f64 = 600.0;

/// What is known of a server.
#[derive(Debug)]
pub(super) struct ServerTrack {
    point: Option<GroupPoint>,
    /// When it was last seen that nothing had changed since the point.
    unchanged_at: Option<Timestamp>,
    /// The last look: when, and what had changed since the point by then.
    looked: Option<(Timestamp, Option<u64>)>,
    change_rate: SlowMean,
    throughput: SlowMean,
    model: CostModel,
    last_error: Option<ErrorStatus>,
    drift: Vec<String>,
    last_cycle: Option<LastCycle>,
    history: VecDeque<Sample>,
    volumes: Vec<VolumeTrack>,
}

#[derive(Debug, Default)]
struct VolumeTrack {
    size: Option<u64>,
    base: Option<PointStatus>,
    base_at: Option<Timestamp>,
    changed: Option<u64>,
    change_rate: SlowMean,
    throughput: SlowMean,
    cycle: Option<(Timestamp, Arc<Progress>)>,
    failed: bool,
    lease: Option<String>,
}

fn seconds_between(from: Timestamp, until: Timestamp) -> f64 {
    until.duration_since(from).as_secs_f64().max(0.0)
}

/// The share that a measurement over `seconds` has in a rate.
fn share(seconds: f64) -> f64 {
    1.0 - (-seconds / RATE_MEMORY).exp()
}

impl ServerTrack {
    pub(super) fn new(server: &Server) -> Self {
        Self {
            point: None,
            unchanged_at: None,
            looked: None,
            change_rate: SlowMean::default(),
            throughput: SlowMean::default(),
            model: CostModel::default(),
            last_error: None,
            drift: Vec::new(),
            last_cycle: None,
            history: VecDeque::new(),
            volumes: server.volumes.iter().map(|_| VolumeTrack::default()).collect(),
        }
    }

    /// A cycle begins, whose volumes report here.
    pub(super) fn begin(&mut self, now: Timestamp, progress: &[Arc<Progress>]) {
        for (volume, progress) in self.volumes.iter_mut().zip(progress) {
            volume.cycle = Some((now, progress.clone()));
        }
    }

    /// A cycle has ended, however.
    pub(super) fn end(&mut self) {
        for volume in &mut self.volumes {
            volume.cycle = None;
        }
    }

    /// What a look has found.
    pub(super) fn seen(&mut self, now: Timestamp, seen: &[Seen]) {
        self.point = super::group::common_point(seen.iter().map(|seen| &seen.look));
        let mut total = Some(0u64);
        for (volume, seen) in self.volumes.iter_mut().zip(seen) {
            volume.size = Some(seen.size);
            volume.changed = seen.changed;
            let base = seen.look.base();
            volume.base = base.map(|base| PointStatus { snapshot: base.name.clone(), at: base.at.clone() });
            volume.base_at = base.and_then(|base| base.at.parse().ok());
            let since = volume.base_at.map(|at| self.unchanged_at.map_or(at, |unchanged| unchanged.max(at)));
            if let (Some(changed), Some(since)) = (seen.changed, since) {
                let span = seconds_between(since, now).max(0.5);
                volume.change_rate.observe(changed as f64 / span, share(span).max(0.2));
            }
            total = total.zip(seen.changed).map(|(total, changed)| total.saturating_add(changed));
        }
        self.looked = Some((now, total));
        if let (Some(total), Some(point)) = (total, &self.point) {
            let since = self.unchanged_at.map_or(point.at, |unchanged| unchanged.max(point.at));
            let span = seconds_between(since, now).max(0.5);
            self.change_rate.observe(total as f64 / span, share(span).max(0.2));
        }
    }

    /// Nothing had changed when it was looked at `at`.
    pub(super) fn unchanged(&mut self, at: Timestamp) {
        self.unchanged_at = Some(at);
        self.last_error = None;
        self.clear_failures();
    }

    /// All volumes have a new point.
    pub(super) fn committed(&mut self, report: &GroupReport) {
        let changed = self.looked.and_then(|(_, changed)| changed);
        self.last_cycle = Some(LastCycle {
            snapshot: report.point.snapshot.clone(),
            seconds: report.took.as_secs_f64(),
            predicted_seconds: changed.and_then(|changed| self.model.predict(changed)),
            changed_bytes: changed,
            written_bytes: report.volumes.iter().map(|volume| volume.moved.bytes_written).sum(),
            frozen_seconds: report.frozen_for.map(|time| time.as_secs_f64()),
        });
        // A first copy, or one that a look could not measure, says nothing about a small delta.
        if let Some(changed) = changed.filter(|_| !report.finished_first) {
            self.model.observe(changed, report.took.as_secs_f64());
        }
        let transfer = report.volumes.iter().map(|volume| volume.stages.transfer_seconds).fold(0.0, f64::max);
        let moved: u64 = report.volumes.iter().map(moved).sum();
        // What was finished first counts in what was moved, and not in the time.
        if transfer > 0.0 && moved > 0 && !report.finished_first {
            self.throughput.observe(moved as f64 / transfer, 0.3);
        }
        for (volume, volume_report) in self.volumes.iter_mut().zip(&report.volumes) {
            let seconds = volume_report.stages.transfer_seconds;
            if seconds > 0.0 && self::moved(volume_report) > 0 && !report.finished_first {
                volume.throughput.observe(self::moved(volume_report) as f64 / seconds, 0.3);
            }
            volume.size = Some(volume_report.size);
        }
        let point = report.point.clone();
        for volume in &mut self.volumes {
            let at = point.at.to_string();
            volume.base = Some(PointStatus { snapshot: point.snapshot.clone(), at });
            volume.base_at = Some(point.at);
            volume.changed = None;
        }
        self.looked = Some((point.at, Some(0)));
        self.unchanged_at = None;
        self.point = Some(point);
        self.last_error = None;
        self.clear_failures();
    }

    /// What is not as the plan has it, where the server runs.
    pub(super) fn drifted(&mut self, drift: Vec<String>) {
        self.drift = drift;
    }

    /// Another worker has made this point.
    pub(super) fn made_elsewhere(&mut self, point: &GroupPoint) {
        if self.point.as_ref().is_none_or(|own| own.at < point.at) {
            self.point = Some(point.clone());
            self.looked = Some((point.at, Some(0)));
        }
        self.last_error = None;
    }

    /// A cycle failed.
    pub(super) fn failed(&mut self, now: Timestamp, server: &Server, volume: &str, message: String, retryable: bool) {
        let count = self.last_error.as_ref().map_or(0, |error| error.count) + 1;
        self.last_error = Some(ErrorStatus { at: now.to_string(), message, retryable, count });
        self.clear_failures();
        for (track, planned) in self.volumes.iter_mut().zip(&server.volumes) {
            track.failed = planned.name == volume;
        }
    }

    /// It was found paused: what went wrong before is not what it waits for.
    pub(super) fn paused(&mut self) {
        self.last_error = None;
        self.clear_failures();
    }

    fn clear_failures(&mut self) {
        for volume in &mut self.volumes {
            volume.failed = false;
        }
    }

    /// Who holds the lease on a volume's target.
    pub(super) fn lease(&mut self, index: usize, holder: Option<String>) {
        if let Some(volume) = self.volumes.get_mut(index) {
            volume.lease = holder;
        }
    }

    /// The newest point.
    pub(super) fn point(&self) -> Option<&GroupPoint> {
        self.point.as_ref()
    }

    /// How many seconds the next delta is expected to take if it starts one interval from the last point.
    pub(super) fn next_seconds(&self, interval: f64) -> Option<f64> {
        self.model.predict((self.change_rate.get()? * interval) as u64)
    }

    fn lag(&self, now: Timestamp) -> Option<f64> {
        let point = self.point.as_ref()?;
        let at = self.unchanged_at.map_or(point.at, |unchanged| unchanged.max(point.at));
        clock::age(at, now).ok().map(|age| age.as_secs_f64())
    }

    /// What is not as the plan has it, and a point that is of the future by this host's clock.
    fn drift(&self, now: Timestamp) -> Vec<String> {
        let ahead = self.point.as_ref().and_then(|point| Some((point, clock::age(point.at, now).err()?)));
        let ahead = ahead.map(|(point, ahead)| {
            format!(
                "its newest point, {}, is of {}, {} s ahead of this host's clock: its lag is not known; compare the \
                 clocks of the hosts",
                point.snapshot,
                point.at,
                ahead.as_secs()
            )
        });
        self.drift.iter().cloned().chain(ahead).collect()
    }

    /// What has changed since the point by now: what the last look found, and what has come since at the usual rate.
    fn changed(&self, now: Timestamp) -> Option<u64> {
        let (at, changed) = self.looked?;
        let since = self.unchanged_at.filter(|unchanged| *unchanged >= at).unwrap_or(at);
        let rate = self.change_rate.get().unwrap_or(0.0);
        Some(changed?.saturating_add((rate * seconds_between(since, now)) as u64))
    }

    pub(super) fn history(&self) -> Vec<Sample> {
        self.history.iter().copied().collect()
    }

    /// Takes one more sample.
    pub(super) fn sample(&mut self, now: Timestamp) {
        if self.history.len() >= HISTORY {
            self.history.pop_front();
        }
        let changed = self.changed(now);
        self.history.push_back(Sample {
            at: now.as_millisecond() as f64 / 1000.0,
            lag_seconds: self.lag(now),
            changed_bytes: changed,
            change_rate: self.change_rate.get(),
            throughput: self.throughput.get(),
            predicted_outage_seconds: changed.and_then(|changed| self.model.predict(changed)),
        });
    }

    /// All that is known, for `activity` and the next start as the scheduler has them. `throttled` names the limit that
    /// the server's reads run into.
    pub(super) fn status(
        &self,
        server: &Server,
        activity: Activity,
        next_at: Option<Timestamp>,
        throttled: Option<&str>,
        now: Timestamp,
    ) -> ServerStatus {
        let (lag, changed) = (self.lag(now), self.changed(now));
        let target_lag = server.pace.target_lag.as_secs_f64();
        ServerStatus {
            name: server.name.clone(),
            activity,
            paused_because: None,
            point: self.point.as_ref().map(point_status),
            lag_seconds: lag,
            target_lag_seconds: target_lag,
            changed_bytes: changed,
            change_rate: self.change_rate.get(),
            throughput: self.throughput.get(),
            predicted_outage_seconds: changed.and_then(|changed| self.model.predict(changed)),
            convergence: convergence(&self.model, self.change_rate.get(), lag, target_lag, throttled),
            next_at: next_at.map(|at| at.to_string()),
            drift: self.drift(now),
            last_error: self.last_error.clone(),
            last_cycle: self.last_cycle.clone(),
            volumes: server
                .volumes
                .iter()
                .zip(&self.volumes)
                .map(|(planned, track)| {
                    let mut volume = track.status(planned, activity, self.last_error.as_ref());
                    let at = track.base_at.map(|at| self.unchanged_at.map_or(at, |unchanged| unchanged.max(at)));
                    volume.lag_seconds = at.and_then(|at| clock::age(at, now).ok()).map(|age| age.as_secs_f64());
                    volume
                })
                .collect(),
        }
    }
}

/// What a cycle wrote.
fn moved(report: &SyncReport) -> u64 {
    report.moved.bytes_written + report.moved.bytes_zeroed
}

pub(super) fn point_status(point: &GroupPoint) -> PointStatus {
    PointStatus { snapshot: point.snapshot.clone(), at: point.at.to_string() }
}

impl VolumeTrack {
    fn status(&self, planned: &Volume, activity: Activity, error: Option<&ErrorStatus>) -> VolumeStatus {
        VolumeStatus {
            name: planned.name.clone(),
            source: planned.source.to_string(),
            target: planned.target.to_string(),
            boot: planned.boot,
            activity,
            size: self.size,
            base: self.base.clone(),
            lag_seconds: None,
            changed_bytes: self.changed,
            change_rate: self.change_rate.get(),
            throughput: self.throughput.get(),
            cycle: self.cycle.as_ref().map(|(since, progress)| cycle_status(*since, progress)),
            lease: self.lease.clone(),
            last_error: error.filter(|_| self.failed).cloned(),
        }
    }
}

fn cycle_status(since: Timestamp, progress: &Progress) -> CycleStatus {
    let plan = progress.plan();
    let position = progress.counters.position.load(std::sync::atomic::Ordering::Relaxed);
    let (done, total) = plan.map_or((0, 0), |plan| (plan.covered_below(position), plan.covered()));
    CycleStatus { snapshot: progress.snapshot(), since: since.to_string(), done_bytes: done, total_bytes: total }
}
