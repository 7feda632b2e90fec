//! A fleet's status without a worker: the truth from the images.

use std::sync::Arc;

use futures::stream::{self, StreamExt};
use jiff::Timestamp;

use super::group::{self, Member};
use super::job::error_text;
use super::shared::{Opener, PAUSED};
use super::status::{Activity, FleetStatus, Origin, ServerStatus};
use super::tracker::ServerTrack;
use crate::image::ErrorKind;
use crate::plan::{Plan, Server};
use crate::replicate::{CycleError, Progress};

/// How many servers are looked at at a time.
const SERVERS_AT_A_TIME: usize = 8;

/// How every server of a plan is, read from the images. Rates, predictions and errors of cycles are missing; what can't
/// be read is that server's error.
pub async fn status_from_images(plan: &Plan, opener: &dyn Opener) -> FleetStatus {
    let looks = plan.servers.iter().map(|server| look_at(server, opener));
    let servers = stream::iter(looks).buffered(SERVERS_AT_A_TIME).collect().await;
    FleetStatus {
        plan: plan.path.display().to_string(),
        origin: Origin::Images,
        at: Timestamp::now().to_string(),
        worker: None,
        servers,
        throttles: Vec::new(),
    }
}

async fn look_at(server: &Server, opener: &dyn Opener) -> ServerStatus {
    let mut track = ServerTrack::new(server);
    let now = Timestamp::now();
    let activity = match find_out(server, opener, &mut track).await {
        Ok(activity) => activity,
        Err((volume, error)) => {
            track.failed(now, server, &volume, error_text(&error), error.is_retryable());
            Activity::Unknown
        }
    };
    let mut status = track.status(server, activity, None, None, now);
    // One look tells how much has changed, not how fast it goes on.
    (status.change_rate, status.throughput, status.predicted_outage_seconds) = (None, None, None);
    status
}

async fn find_out(
    server: &Server,
    opener: &dyn Opener,
    track: &mut ServerTrack,
) -> Result<Activity, (String, CycleError)> {
    let mut members = Vec::new();
    for volume in &server.volumes {
        match opener.open(volume, true).await {
            Ok((source, target)) => {
                let progress = Arc::new(Progress::default());
                members.push(Member { name: volume.name.clone(), source, target, progress });
            }
            Err(CycleError::Image(error))
                if error.kind == ErrorKind::NotFound && error.location == volume.target.to_string() =>
            {
                return Ok(if server.paused { Activity::Paused } else { Activity::NeverSynced });
            }
            Err(error) => return Err((volume.name.clone(), error)),
        }
    }
    let seen = group::look(&members).await.map_err(|error| (error.volume, error.error))?;
    track.seen(Timestamp::now(), &seen);
    let mut paused = server.paused;
    let mut busy = false;
    for (index, member) in members.iter().enumerate() {
        let fail = |error| (member.name.clone(), CycleError::Image(error));
        let owner = member.target.lease_owner().await.map_err(fail)?;
        busy |= owner.is_some();
        track.lease(index, owner.map(|owner| format!("{} ({})", owner.host, owner.pid)));
        if index == 0 {
            let note = member.target.load_note().await.map_err(fail)?;
            paused |= note.is_some_and(|note| note.starts_with(PAUSED));
        }
    }
    Ok(match track.point() {
        _ if paused => Activity::Paused,
        Some(_) if busy => Activity::Syncing,
        None if busy => Activity::FirstSync,
        Some(_) => Activity::Waiting,
        None => Activity::NeverSynced,
    })
}
