//! What stands in the way of a cutover, and how long it would take.

use std::time::Duration;

use futures::future::try_join_all;
use tokio::time::Instant;

use super::metadata;
use super::provider::{Precondition, Side, Verdict};
use super::server::{CutoverError, Options, Readiness, Result, Server, Volume};
use super::sides::Sides;
use crate::clock;
use crate::fleet::group;
use crate::image::{Disk, DiskUser, LeaseOwner};

/// What a last delta is taken to move in a second, in bytes, before a cycle was measured. A pool of disks gives more; a
/// prediction that is too long is the better mistake.
const ASSUMED_RATE: f64 = (64 << 20) as f64;
/// What fencing, looking and journaling take, however little has changed.
const FIXED: Duration = Duration::from_millis(500);

/// How long a worker may take to say who it is after it has opened an image, and to close one after its cycle.
const WORKER_TURN: Duration = Duration::from_secs(5);

/// Looks; changes nothing.
pub(super) async fn look(sides: Sides<'_>) -> Result<Readiness> {
    let server = sides.server;
    let mut preconditions = server.provider.preconditions(sides.to.other()).await;
    let seen = group::look(&sides.members()).await?;
    let volumes = try_join_all(server.volumes.iter().map(|volume| volume_preconditions(sides, volume))).await?;
    preconditions.extend(volumes.into_iter().flatten());
    if sides.to == Side::Target {
        preconditions.push(point_precondition(&seen));
    }
    let changed: Option<u64> = seen.iter().map(|seen| seen.changed).sum();
    let moved = changed.map(|bytes| Duration::from_secs_f64(bytes as f64 / ASSUMED_RATE) + FIXED);
    let pause = server.provider.usual_pause().await;
    let predicted_outage = moved.zip(pause).map(|(moved, pause)| moved + pause);
    Ok(Readiness { preconditions, predicted_delta: moved, predicted_outage, delta_bytes: changed })
}

/// Fails where something stands in the way.
pub(super) fn refuse(server: &Server, readiness: &Readiness, options: &Options) -> Result<()> {
    if readiness.preconditions.iter().any(|found| found.verdict == Verdict::Error) {
        let preconditions = readiness.preconditions.clone();
        return Err(CutoverError::NotReady { server: server.name.clone(), preconditions });
    }
    // What has changed by now is carried over before the stop: of the prediction, only the pause is certain already.
    match (options.max_outage, readiness.predicted_outage) {
        (Some(limit), Some(_)) if limit < FIXED => {
            let how = format!("would be {:.1} s at least, over", FIXED.as_secs_f64());
            Err(CutoverError::TooLong { server: server.name.clone(), how, limit })
        }
        _ => Ok(()),
    }
}

/// A server that was never replicated whole has no point, and its last delta would be a first copy.
fn point_precondition(seen: &[group::Seen]) -> Precondition {
    let point = group::common_point(seen.iter().map(|seen| &seen.look));
    match point {
        Some(point) => match clock::age(point.at, clock::now()) {
            Ok(age) => {
                let text = format!("{}, {} s old", point.snapshot, age.as_secs());
                Precondition::new("newest point", Verdict::Ok, text)
            }
            Err(ahead) => {
                let (snapshot, ahead) = (point.snapshot, ahead.as_secs());
                let text = format!("{snapshot}, {ahead} s ahead of this host's clock: compare the clocks of the hosts");
                Precondition::new("newest point", Verdict::Warning, text)
            }
        },
        None => {
            let found = "there is none that all volumes have: run poolshift replicate (or sync-now) first";
            Precondition::new("newest point", Verdict::Error, found)
        }
    }
}

async fn volume_preconditions(sides: Sides<'_>, volume: &Volume) -> Result<Vec<Precondition>> {
    let mut all = Vec::new();
    for side in [Side::Source, Side::Target] {
        let image = volume.on(side);
        if !image.has_lock() {
            let place = volume.disk.on(side);
            let found = format!(
                "it has no exclusive lock, so that nobody can be kept from writing to it: rbd feature enable {} \
                 exclusive-lock",
                place.to_string().trim_start_matches("rbd:")
            );
            all.push(Precondition::new(image.location(), Verdict::Error, found));
        }
    }
    let clusters = [&volume.source.identity().cluster, &volume.target.identity().cluster];
    if sides.server.provider.needs_one_cluster() && clusters[0] != clusters[1] {
        let found = format!(
            "its sides are in two clusters, {} and {}: {} finds its disks in one only; swap them by commands of your own",
            clusters[0],
            clusters[1],
            sides.server.provider.describe()
        );
        all.push(Precondition::new(format!("volume {}", volume.disk.volume), Verdict::Error, found));
    }
    let arriving = volume.on(sides.to);
    let users = match users_of(arriving.as_ref()).await? {
        Users::Worker(worker) => {
            Precondition::new(arriving.location(), Verdict::Ok, format!("with {}, which is waited for", short(&worker)))
        }
        Users::Stranger(stranger) => {
            let found = format!("it is open at {}: nobody may have it open before the server does", stranger.address);
            Precondition::new(arriving.location(), Verdict::Error, found)
        }
        Users::Nobody => Precondition::new(arriving.location(), Verdict::Ok, "nobody has it open"),
    };
    all.push(users);
    all.extend(metadata::preconditions(volume, sides.to).await?);
    Ok(all)
}

/// Who has an image open that a server is to use.
enum Users {
    Nobody,
    /// A worker of the fleet: it has a target open during its cycles.
    Worker(LeaseOwner),
    Stranger(DiskUser),
}

/// A worker that opens an image, or closes it, is not told from a stranger for a moment: it is looked again.
async fn users_of(image: &dyn Disk) -> Result<Users> {
    let mut since = None;
    loop {
        if let Some(worker) = image.lease_owner().await?.filter(LeaseOwner::is_known) {
            return Ok(Users::Worker(worker));
        }
        match image.users().await?.into_iter().find(|user| !user.is_own) {
            None => return Ok(Users::Nobody),
            Some(stranger) if since.get_or_insert_with(Instant::now).elapsed() >= WORKER_TURN => {
                return Ok(Users::Stranger(stranger));
            }
            Some(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

fn short(owner: &LeaseOwner) -> String {
    format!("process {} on {}", owner.pid, owner.host)
}
