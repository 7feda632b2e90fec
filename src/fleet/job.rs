//! One job: a server's volumes are opened and carried through one cycle.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::group::{self, GroupEnd, GroupError, GroupOptions, GroupReport, Member};
use super::shared::{self, Shared};
use super::status::EventKind;
use crate::pipeline::Limits;
use crate::plan::{Server, Volume};
use crate::replicate::{CycleError, Progress};

/// How a job ended.
pub(super) enum JobEnd {
    /// The cycle's own end, and when it was looked at.
    Group(Result<GroupEnd, GroupError>, Timestamp),
    /// A volume could not be opened.
    NotOpened(String, CycleError),
    /// A note says that the server is paused.
    Paused(String),
    /// A panic: a defect.
    Defect(String),
}

/// Another worker's point counts for this one if it is younger than this share of the interval.
const YOUNG: f64 = 0.9;

pub(super) async fn run(shared: Arc<Shared>, server: Server, forced: bool, cancel: CancellationToken) -> JobEnd {
    let mut members = Vec::new();
    for volume in &server.volumes {
        match shared.images(volume, false).await {
            Ok((source, target)) => {
                let progress = Arc::new(Progress::default());
                members.push(Member { name: volume.name.clone(), source, target, progress });
            }
            Err(error) if shared::is_missing(&error) => return why_missing(&shared, &server, volume, error).await,
            Err(error) => return JobEnd::NotOpened(volume.name.clone(), error),
        }
    }
    let Some(first) = members.first() else { return JobEnd::Defect("a server without volumes".into()) };
    if shared.drifted(&server).await.is_some() {
        // While it is brought over, or back, it is as its cutover has it; which may have ended just now.
        match shared::pausing_note(first.target.as_ref()).await {
            Ok(Some(reason)) => return JobEnd::Paused(reason),
            Ok(None) => {}
            Err(error) => return JobEnd::NotOpened(first.name.clone(), error),
        }
        if let Some((volume, drifted)) = shared.drifted(&server).await {
            return JobEnd::NotOpened(volume, drifted);
        }
    }
    let looked = crate::clock::now();
    if let Some(mut idle) = shared.take_idle(&server.name)
        && let Some(point) = group::still_unchanged(&members, &mut idle).await
    {
        if idle.note_is_due(Instant::now())
            && let Ok(Some(reason)) = shared::pausing_note(first.target.as_ref()).await
        {
            return JobEnd::Paused(reason);
        }
        shared.keep_idle(&server.name, idle);
        return JobEnd::Group(Ok(GroupEnd::Unchanged { point }), looked);
    }
    match shared::pausing_note(first.target.as_ref()).await {
        Ok(Some(reason)) => return JobEnd::Paused(reason),
        Ok(None) => {}
        Err(error) => return JobEnd::NotOpened(first.name.clone(), error),
    }
    let begun = crate::clock::now();
    let limits = {
        let mut core = shared.core();
        if let Some(track) = core.tracks.get_mut(&server.name) {
            let progress: Vec<Arc<Progress>> = members.iter().map(|member| member.progress.clone()).collect();
            track.begin(begun, &progress);
        }
        // Twice its share, so that one that hangs leaves room for others and one that is alone is not slow.
        let share = core.plan.limits.memory / core.plan.limits.volumes.max(1) as u64 * 2;
        let bytes = Limits::default().bytes.min(share);
        Limits { bytes, shared: Some(core.memory.clone()), ..Limits::default() }
    };
    let options = GroupOptions {
        server: server.name.clone(),
        quiesce: server.quiesce.clone(),
        retention: server.retention,
        limits,
        not_younger_than: server.pace.interval.mul_f64(YOUNG),
        forced,
    };
    let last_seen = Mutex::default();
    let observer = Observer { shared: &shared, server: &server.name, begun, cancel: &cancel, last_seen: &last_seen };
    let end = group::run(&members, &options, &observer, &cancel).await;
    if let (Ok(GroupEnd::Unchanged { .. }), false) = (&end, cancel.is_cancelled()) {
        let seen = last_seen.into_inner().unwrap_or_else(PoisonError::into_inner);
        shared.keep_idle(&server.name, group::Idle::new(seen));
    }
    JobEnd::Group(end, begun)
}

/// Whether a note explains that an image is missing: the sources of a server that was cut over have other names.
async fn why_missing(shared: &Shared, server: &Server, volume: &Volume, missing: CycleError) -> JobEnd {
    match shared.pausing_note(server).await {
        Ok(Some(reason)) => JobEnd::Paused(reason),
        Ok(None) => why_gone(shared, server, volume, missing).await,
        // Without a target there is nothing that could explain it.
        Err(error) if shared::is_missing(&error) => why_gone(shared, server, volume, missing).await,
        Err(error) => JobEnd::NotOpened(volume.name.clone(), error),
    }
}

/// Whether somebody else has moved or removed an image where the server runs.
async fn why_gone(shared: &Shared, server: &Server, volume: &Volume, missing: CycleError) -> JobEnd {
    match shared.drifted(server).await {
        Some((volume, drifted)) => JobEnd::NotOpened(volume, drifted),
        None => JobEnd::NotOpened(volume.name.clone(), missing),
    }
}

/// Takes in how far a job is.
struct Observer<'a> {
    shared: &'a Shared,
    server: &'a str,
    begun: Timestamp,
    cancel: &'a CancellationToken,
    last_seen: &'a Mutex<Vec<group::Seen>>,
}

impl group::Observer for Observer<'_> {
    fn seen(&self, seen: &[group::Seen]) {
        // Stopped, it may be a job of the plan before.
        if self.cancel.is_cancelled() {
            return;
        }
        *self.last_seen.lock().unwrap_or_else(PoisonError::into_inner) = seen.to_vec();
        let mut core = self.shared.core();
        let point = group::common_point(seen.iter().map(|seen| &seen.look));
        let now = crate::clock::now();
        core.scheduler.found(self.server, point.map(|point| point.at.min(now).as_millisecond()));
        if let Some(track) = core.tracks.get_mut(self.server) {
            track.seen(self.begun, seen);
        }
    }

    fn leased(&self) {
        self.shared.core().elsewhere.remove(self.server);
        self.shared.events.tell(EventKind::CycleStarted, Some(self.server), None, "a cycle began".to_owned());
    }
}

/// Resumes the servers whose note is gone: whoever resumed them may have asked another worker.
pub(super) async fn ask_paused(shared: Arc<Shared>) {
    let paused: Vec<Server> = {
        let core = shared.core();
        let by_note = |server: &&Server| core.paused_by_note.contains_key(&server.name);
        core.plan.servers.iter().filter(by_note).cloned().collect()
    };
    for server in paused {
        let Some(volume) = server.volumes.first() else { continue };
        let opened = match shared.images(volume, true).await {
            Ok((_, target)) => Ok(target),
            Err(error) if shared::is_missing(&error) => shared.opener.open_target(volume).await,
            Err(error) => Err(error),
        };
        let Ok(target) = opened else { continue };
        // A backend that keeps no notes has not lost one.
        if !target.keeps_notes() {
            continue;
        }
        let note = shared::pausing_note(target.as_ref()).await;
        let mut core = shared.core();
        match (note, core.paused_by_note.contains_key(&server.name)) {
            (Ok(None), true) => {
                core.paused_by_note.remove(&server.name);
                core.scheduler.resume(&server.name, super::worker::now_millis());
            }
            // Whoever paused it may have gone on: from a cutover that runs to one that is done.
            (Ok(Some(reason)), true) => drop(core.paused_by_note.insert(server.name.clone(), reason)),
            _ => {}
        }
    }
}

/// What a commit says to people.
pub(super) fn committed_text(report: &GroupReport) -> String {
    let written: u64 = report.volumes.iter().map(|volume| volume.moved.bytes_written).sum();
    let frozen = report.frozen_for.map(|time| format!(", frozen for {:.2} s", time.as_secs_f64()));
    format!(
        "point {} of {} volumes: {:.1} MiB written in {:.2} s{}",
        report.point.snapshot,
        report.volumes.len(),
        written as f64 / f64::from(1 << 20),
        report.took.as_secs_f64(),
        frozen.unwrap_or_default()
    )
}

/// An error with its causes, in one line.
pub(crate) fn chain_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// An error with its causes and what to do, in one line.
pub(super) fn error_text(error: &CycleError) -> String {
    let mut text = chain_text(error);
    let hint = match error {
        CycleError::Image(error) => error.hint.clone(),
        CycleError::Conflict(conflict) => Some(conflict.kind.hint().to_owned()),
        _ => None,
    };
    if let Some(hint) = hint {
        text.push_str("; ");
        text.push_str(&hint);
    }
    text
}
