//! `poolshift plan`: a first plan file, from the images of a pool or the servers of a cloud.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::Path;

use futures::stream::{self, StreamExt as _};
use tokio::io::AsyncWriteExt as _;

use super::config::{CephAccess, Plan as Settings, PlanOf, PoolPlan, Stream, UsageError};
use super::exit::Exit;
use super::streams::Output;
use super::values::{PoolName, human_bytes};
use super::{Context, Interrupted, images, output};
use crate::cutover::journal::KEPT_SUFFIX;
use crate::cutover::rehearsal;
use crate::delta::{self, Method};
use crate::image::pools::PLACEHOLDER_SUFFIX;
use crate::image::rbd::{Connector, PoolImage, RbdImage};
use crate::image::{ErrorKind, ImageError, ImageSpec, Point, SourceImage as _};
use crate::plan::values::matches_glob;
use crate::plan::{FILE_MAX, Plan, VOLUMES_MAX};

mod cloud;
mod cloud_text;

/// How many images are looked at at a time.
const AT_A_TIME: usize = 8;

/// The longest name of a volume that is made of an image's name, in characters; a number may follow.
const NAME_LENGTH: usize = 100;

/// Runs the command.
pub(super) async fn run(context: &Context<'_>, settings: &Settings) -> anyhow::Result<Exit> {
    if let PlanOf::Pool(PoolPlan { from_pool, to_pool, .. }) = &settings.of
        && from_pool == to_pool
        && context.config.source_ceph.conf == context.config.target_ceph.conf
    {
        return Err(UsageError(format!("--from-pool and --to-pool are the same: {from_pool}")).into());
    }
    // Before anything is asked: a name that is taken is found at once.
    let mut file = match &settings.output {
        Stream::Standard => None,
        file => Some(Output::new(file)?),
    };
    let make = async {
        match &settings.of {
            PlanOf::Pool(pools) => of_pool(context, pools, &settings.output).await,
            PlanOf::Cloud(cloud) => cloud::plan(context, cloud, &settings.output).await,
        }
    };
    let (text, count) = tokio::select! {
        made = make => made?,
        () = context.cancel.cancelled() => return Err(Interrupted.into()),
    };
    if text.len() > FILE_MAX {
        let text =
            format!("a plan of {count} volumes would have more than {FILE_MAX} bytes: choose fewer with --match");
        return Err(UsageError(text).into());
    }
    // What is written is what `check` and the fleet will take.
    Plan::parse(&text, Path::new(&settings.output.to_string()))?;
    match &mut file {
        None => output::bytes(text.as_bytes())?,
        Some(file) => file.writer().write_all(text.as_bytes()).await?,
    }
    if let Some(file) = file {
        file.finish().await?;
        context.terminal.note(&format!("{count} volumes; next: poolshift check {}", settings.output));
    }
    Ok(Exit::Success)
}

/// The plan of a pool's images, and how many there are.
async fn of_pool(context: &Context<'_>, pools: &PoolPlan, output: &Stream) -> anyhow::Result<(String, usize)> {
    let (volumes, skipped) = find(context, pools).await?;
    let clusters = (&context.config.source_ceph, &context.config.target_ceph);
    Ok((write(pools, output, clusters, &volumes, &skipped)?, volumes.len()))
}

/// An image that goes into the plan.
struct Found {
    image: String,
    /// Bytes.
    size: u64,
    /// The bytes of all objects that there are; `None` where the object map doesn't tell.
    used: Option<u64>,
}

/// The images that fit, largest first, and those that are left out, with the reason.
async fn find(context: &Context<'_>, settings: &PoolPlan) -> anyhow::Result<(Vec<Found>, Vec<(String, String)>)> {
    let connector = images::connect(context, &context.config.source_ceph).await?;
    let PoolName { pool, namespace } = &settings.from_pool;
    let mut listed = connector.images(pool, namespace.as_deref()).await?;
    listed.retain(|image| settings.pattern.as_ref().is_none_or(|pattern| matches_glob(pattern, &image.name)));
    if listed.len() > VOLUMES_MAX {
        let text = format!("{} images are more than a plan's {VOLUMES_MAX}: choose with --match", listed.len());
        return Err(UsageError(text).into());
    }
    let looks = listed.into_iter().map(|listed| async {
        let name = listed.name.clone();
        (name, look(&connector, &settings.from_pool, listed).await)
    });
    let mut looks = stream::iter(looks).buffered(AT_A_TIME);
    let (mut found, mut skipped) = (Vec::new(), Vec::new());
    while let Some((name, outcome)) = looks.next().await {
        match outcome {
            Ok(Ok(image)) => found.push(image),
            Ok(Err(reason)) => skipped.push((name, reason)),
            // The others are not to wait for what is wrong with one of them. Whatever else it is concerns them all.
            Err(error) if is_of_one(&error.kind) => skipped.push((name, crate::fleet::chain_text(&error))),
            Err(error) => return Err(error.into()),
        }
    }
    if found.is_empty() {
        let what = settings.pattern.as_ref().map_or_else(String::new, |pattern| format!(" that fit {pattern:?}"));
        let mut error = ImageError::new(ErrorKind::NotFound, settings.from_pool.to_string(), "make a plan")
            .detail(format!("it has no images{what}"));
        if let Some((name, reason)) = skipped.first() {
            error = error.detail(format!("{} images can't be replicated; {name:?}: {reason}", skipped.len()));
        }
        return Err(error.into());
    }
    found.sort_by(|one, other| other.size.cmp(&one.size).then_with(|| one.image.cmp(&other.image)));
    Ok((found, skipped))
}

/// Looks at an image; says why it can't be in a plan.
async fn look(connector: &Connector, from: &PoolName, listed: PoolImage) -> Result<Result<Found, String>, ImageError> {
    let name = listed.name;
    let spec = spec(from, &name);
    if name.contains(char::is_control) || spec.to_string().parse() != Ok(spec) {
        return Ok(Err("its name has a character in it that poolshift can't write".into()));
    }
    if listed.id.is_none() {
        return Ok(Err("it is of format 1: make one of format 2 of it with rbd deep cp".into()));
    }
    if let Some(aside) = aside(&name) {
        return Ok(Err(aside.into()));
    }
    let image = RbdImage::open_source(connector, &from.pool, from.namespace.as_deref(), &name).await?;
    if image.is_placeholder().await? {
        return Ok(Err(PLACEHOLDER.into()));
    }
    if image.rehearsal_mark().await?.is_some() {
        return Ok(Err(REHEARSAL.into()));
    }
    if let Some(obstacle) = image.obstacle() {
        return Ok(Err(obstacle.into()));
    }
    let (size, used) = extent(&image).await?;
    Ok(Ok(Found { image: name, size, used }))
}

const PLACEHOLDER: &str = "it is a placeholder, which has a volume's name while poolshift switches it";
const REHEARSAL: &str = "it is a disk of a rehearsal";

/// Whether a name is one of what poolshift, or Cinder, has put aside: no server runs from it.
fn aside(name: &str) -> Option<&'static str> {
    let kept = "it is a source that was kept at a cutover: poolshift finalize removes it";
    let deleted = "it is a volume that Cinder has deleted, and keeps for its clones";
    let suffixes =
        [(KEPT_SUFFIX, kept), (PLACEHOLDER_SUFFIX, PLACEHOLDER), (rehearsal::SUFFIX, REHEARSAL), (".deleted", deleted)];
    suffixes.into_iter().find(|(suffix, _)| name.ends_with(suffix)).map(|(_, reason)| reason)
}

/// Whether an error says something of one image, and nothing of the others in its pool.
fn is_of_one(kind: &ErrorKind) -> bool {
    use ErrorKind::{Corrupt, NotFound, PermissionDenied, ReadOnly, Unsupported};
    matches!(kind, NotFound | PermissionDenied | Unsupported | Corrupt | ReadOnly)
}

/// How large an image is, and how many bytes the objects have that there are; `None` where the object map doesn't tell.
async fn extent(image: &RbdImage) -> Result<(u64, Option<u64>), ImageError> {
    let view = image.view(&Point::Head).await?;
    let plan = delta::plan(view.as_ref(), None).await?;
    Ok((view.size(), (plan.method == Method::TwoLevel).then(|| plan.covered())))
}

fn spec(pool: &PoolName, image: &str) -> ImageSpec {
    let PoolName { pool, namespace } = pool.clone();
    ImageSpec::Rbd { pool, namespace, image: image.to_owned(), snapshot: None }
}

/// A text from elsewhere that stands in a comment.
fn shown(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// A TOML string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// The plan's text.
fn write(
    pools: &PoolPlan,
    output: &Stream,
    clusters: (&CephAccess, &CephAccess),
    volumes: &[Found],
    skipped: &[(String, String)],
) -> anyhow::Result<String> {
    let PoolPlan { from_pool, to_pool, .. } = pools;
    let size: u64 = volumes.iter().fold(0, |sum, volume| sum.saturating_add(volume.size));
    let used = volumes.iter().try_fold(0u64, |sum, volume| sum.checked_add(volume.used?));
    let used = used.map_or_else(String::new, |used| format!(", at most {} of it used", human_bytes(used)));
    let mut text = format!(
        "# From {from_pool} to {to_pool}: {} volumes, {} provisioned{used}, the largest first.\n",
        volumes.len(),
        human_bytes(size),
    );
    head(&mut text, output, clusters, &from_pool.pool)?;
    if let Some(first) = volumes.first() {
        let sides = [from_pool, to_pool].map(|pool| quoted(&spec(pool, &first.image).to_string()));
        text.push_str(&SERVER.replace("{source}", &sides[0]).replace("{target}", &sides[1]));
    }
    let mut names = HashSet::new();
    for volume in volumes {
        let used = volume
            .used
            .map_or("how much is used is not known".into(), |used| format!("at most {} used", human_bytes(used)));
        let (source, target) = (spec(from_pool, &volume.image), spec(to_pool, &volume.image));
        let name = name(&volume.image, &mut names);
        write!(text, "\n[[volume]]  # {}, {used}\nname = {}\n", human_bytes(volume.size), quoted(&name))?;
        write!(text, "source = {}\ntarget = {}\n", quoted(&source.to_string()), quoted(&target.to_string()))?;
    }
    if !skipped.is_empty() {
        text.push_str("\n# Left out:\n");
    }
    for (name, reason) in skipped {
        writeln!(text, "# {name:?}: {reason}")?;
    }
    Ok(text)
}

/// What every plan begins with, once it is said what it is of.
fn head(text: &mut String, output: &Stream, clusters: (&CephAccess, &CephAccess), pool: &str) -> anyhow::Result<()> {
    let file = match output {
        Stream::Standard => "FILE".into(),
        Stream::File(path) => path.display().to_string().replace(char::is_control, "\u{fffd}"),
    };
    writeln!(text, "# Change what you like, then hold it against the clusters: poolshift check {file}")?;
    for (key, access) in [("source", clusters.0), ("target", clusters.1)] {
        cluster(text, key, access)?;
    }
    text.push_str(&HEAD.replace("{pool}", &quoted(pool)));
    Ok(())
}

/// The way to a cluster, as the command line gave it.
fn cluster(text: &mut String, key: &str, access: &CephAccess) -> anyhow::Result<()> {
    let conf = access.conf.as_ref().map(std::path::absolute).transpose()?;
    if conf.is_none() && access.user.is_none() {
        return Ok(());
    }
    write!(text, "\n[{key}]\n")?;
    if let Some(conf) = conf {
        let conf = conf.to_str().ok_or_else(|| UsageError(format!("{conf:?} is no UTF-8, as a plan must be")))?;
        writeln!(text, "conf = {}", quoted(conf))?;
    }
    if let Some(user) = &access.user {
        writeln!(text, "user = {}", quoted(user))?;
    }
    Ok(())
}

/// A volume's name, made of the image's, unlike all others.
fn name(image: &str, taken: &mut HashSet<String>) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '-' };
    let mut stem: String = image.chars().take(NAME_LENGTH).map(allowed).collect();
    if !stem.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        stem.insert(0, 'v');
    }
    let mut name = stem.clone();
    let mut number = 1;
    while !taken.insert(name.clone()) {
        number += 1;
        name = format!("{stem}-{number}");
    }
    name
}

const HEAD: &str = r#"
[defaults]
interval = "5m"        # from the start of one cycle to the start of the next
idle_interval = "30m"  # to this the pace slows while nothing changes
target_lag = "15m"     # the age of the newest point above which a volume counts as lagging
keep = 1               # points that stay on the target, beside the base

[limits]
volumes = 8            # at a time
first_syncs = 4        # of these, those that are copied for the first time
volumes_per_pool = 8   # of one source pool
memory = "256M"        # bytes in flight, in all

# What the pool may be asked for:
#
# [[throttle]]
# pool = {pool}
# bytes_per_second = "200M"
# operations_per_second = 2000
# latency_limit = "80ms"
# windows = [{ during = "22:00-06:00", bytes_per_second = "unlimited", operations_per_second = "unlimited" }]
"#;

const SERVER: &str = r#"
# The disks of one server belong together, so that they share every point in time. Move them from below into:
#
# [[server]]
# name = "web-1"
# quiesce = { virsh = { domain = "web-1", limit = "10s" } }
#
# [[server.volume]]
# name = "web-1-root"
# source = {source}
# target = {target}
# boot = true
#
# [server.cutover]  # how poolshift cutover stops it and starts it from its targets; by hand without
# libvirt = { domain = "web-1", method = "warm", limit = "5m" }
"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(from: &str, to: &str) -> PoolPlan {
        let (from_pool, to_pool) = (from.parse().unwrap(), to.parse().unwrap());
        PoolPlan { from_pool, to_pool, pattern: None }
    }

    fn uncommented(text: &str, from: &str) -> String {
        let (_, behind) = text.split_once(from).unwrap();
        let block = behind.split("\n\n").next().unwrap();
        block.lines().map(|line| line.trim_start_matches('#').trim()).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn what_is_written_is_a_plan() {
        let found = |image: &str, size, used| Found { image: image.into(), size, used };
        let volumes = [
            found("web 1\"root", 40 << 30, Some(12 << 20)),
            found("web-1-root", 8 << 20, None),
            found("web-1\u{e4}root", 8 << 20, Some(0)),
            found("_x", 0, Some(0)),
        ];
        let skipped = [("old\n[x]".to_owned(), "it is of format 1".to_owned())];
        let access = CephAccess { conf: Some("/etc/ceph/a b.conf".into()), user: Some("poolshift".into()) };
        let clusters = (&access, &CephAccess::default());
        let text = write(&pools("sata/tenant", "sas"), &Stream::Standard, clusters, &volumes, &skipped).unwrap();
        let plan = Plan::parse(&text, Path::new("plan.toml")).unwrap_or_else(|error| panic!("{error}\n{text}"));
        let names: Vec<_> = plan.servers.iter().map(|server| server.name.as_str()).collect();
        assert_eq!(names, ["web-1-root", "web-1-root-2", "web-1-root-3", "v_x"]);
        let [_, volume, ..] = &plan.servers[..] else { panic!() };
        let volume = &volume.volumes[0];
        let sides = (volume.source.to_string(), volume.target.to_string());
        assert_eq!(sides, ("rbd:sata/tenant/web-1-root".into(), "rbd:sas/web-1-root".into()));
        assert_eq!(plan.source_cluster.conf.as_deref(), Some(Path::new("/etc/ceph/a b.conf")));
        // What is commented out is right as well, once it isn't.
        let throttle = uncommented(&text, "# What the pool may be asked for:\n");
        let server = uncommented(&text, "Move them from below into:\n");
        let plan = Plan::parse(&format!("{throttle}\n{server}"), Path::new("plan.toml")).unwrap();
        assert_eq!((plan.throttles.len(), plan.servers[0].volumes.len()), (1, 1));
        insta::assert_snapshot!(text.split("\n\n").next().unwrap(), @r#"
        # From rbd:sata/tenant to rbd:sas: 4 volumes, 40.0 GiB provisioned, the largest first.
        # Change what you like, then hold it against the clusters: poolshift check FILE
        "#);
    }
}
