//! A fleet's status without a worker: the truth from the images.

use std::sync::Arc;

use futures::stream::{self, StreamExt};

use super::group::{self, Member};
use super::job::error_text;
use super::shared::{BY_THE_PLAN, Opener, is_missing, pausing_note};
use super::status::{Activity, FleetStatus, Origin, ServerStatus};
use super::tracker::ServerTrack;
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
        at: crate::clock::now().to_string(),
        worker: None,
        servers,
        throttles: Vec::new(),
    }
}

async fn look_at(server: &Server, opener: &dyn Opener) -> ServerStatus {
    let mut track = ServerTrack::new(server);
    let now = crate::clock::now();
    let (activity, paused_because) = match find_out(server, opener, &mut track).await {
        Ok(found) => found,
        Err((volume, error)) => {
            track.failed(now, server, &volume, error_text(&error), error.is_retryable());
            (Activity::Unknown, None)
        }
    };
    let mut status = track.status(server, activity, None, None, now);
    status.paused_because = paused_because;
    // One look tells how much has changed, not how fast it goes on.
    (status.change_rate, status.throughput, status.predicted_outage_seconds) = (None, None, None);
    status
}

/// What a server is doing and, if it is paused, why.
type Found = (Activity, Option<String>);

async fn find_out(
    server: &Server,
    opener: &dyn Opener,
    track: &mut ServerTrack,
) -> Result<Found, (String, CycleError)> {
    let by_the_plan = || server.paused.then(|| BY_THE_PLAN.to_owned());
    let mut members = Vec::new();
    for volume in &server.volumes {
        match opener.open(volume, true).await {
            Ok((source, target)) => {
                let progress = Arc::new(Progress::default());
                members.push(Member { name: volume.name.clone(), source, target, progress });
            }
            Err(error) if is_missing(&error) => {
                // The sources of a server that was cut over have other names.
                if let Some(reason) = note_of_first(server, opener).await {
                    return Ok((Activity::Paused, Some(reason)));
                }
                return match error {
                    CycleError::Image(error) if error.location == volume.target.to_string() => {
                        let paused = by_the_plan();
                        Ok((if paused.is_some() { Activity::Paused } else { Activity::NeverSynced }, paused))
                    }
                    error => Err((volume.name.clone(), error)),
                };
            }
            Err(error) => return Err((volume.name.clone(), error)),
        }
    }
    let seen = group::look(&members).await.map_err(|error| (error.volume, error.error))?;
    track.seen(crate::clock::now(), &seen);
    let mut paused = by_the_plan();
    let mut busy = false;
    for (index, member) in members.iter().enumerate() {
        let owner = member.target.lease_owner().await.map_err(|error| (member.name.clone(), error.into()))?;
        busy |= owner.is_some();
        track.lease(index, owner.map(|owner| format!("{} ({})", owner.host, owner.pid)));
        if index == 0 {
            let note = pausing_note(member.target.as_ref()).await.map_err(|error| (member.name.clone(), error))?;
            paused = note.or(paused);
        }
    }
    let activity = match track.point() {
        _ if paused.is_some() => Activity::Paused,
        Some(_) if busy => Activity::Syncing,
        None if busy => Activity::FirstSync,
        Some(_) => Activity::Waiting,
        None => Activity::NeverSynced,
    };
    Ok((activity, paused))
}

/// The note that pauses a server, if it can be read.
async fn note_of_first(server: &Server, opener: &dyn Opener) -> Option<String> {
    let target = opener.open_target(server.volumes.first()?).await.ok()?;
    pausing_note(target.as_ref()).await.ok()?
}
