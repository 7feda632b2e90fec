//! From a server of a plan to one whose images are open on both sides.

use std::sync::Arc;

use super::errors::AskError;
use crate::cli::config::{CephAccess, UsageError};
use crate::cli::{Context, images};
use crate::cutover::finalize::{self, Kept};
use crate::cutover::journal::kept_name;
use crate::cutover::provider::openstack::Connectors;
use crate::cutover::provider::{self, Provider, ServerDisk};
use crate::cutover::rehearsal::Stage;
use crate::cutover::{CutoverError, Server, Volume};
use crate::image::rbd::RbdImage;
use crate::image::{ErrorKind, ImageError, ImageSpec, SourceImage as _};
use crate::plan::{self, Cutover, Method, Plan};

/// The server of that name, for every command but `retype`.
pub(in crate::cli) fn find<'p>(plan: &'p Plan, name: &str) -> Result<&'p plan::Server, AskError> {
    let server = named(plan, name)?;
    let problem = "is left to Cinder itself (strategy \"retype\"): nothing of it is replicated, or kept";
    match server.is_left_to_cinder() {
        false => Ok(server),
        true => Err(AskError::OtherStrategy { server: name.to_owned(), problem, command: "poolshift retype" }),
    }
}

/// The server of that name, for `retype`.
pub(in crate::cli) fn find_retyped<'p>(plan: &'p Plan, name: &str) -> Result<&'p plan::Server, AskError> {
    let server = named(plan, name)?;
    let problem = "has not the strategy \"retype\"";
    match server.is_left_to_cinder() {
        true => Ok(server),
        false => Err(AskError::OtherStrategy { server: name.to_owned(), problem, command: "poolshift cutover" }),
    }
}

fn named<'p>(plan: &'p Plan, name: &str) -> Result<&'p plan::Server, AskError> {
    if let Some(server) = plan.servers.iter().find(|server| server.name == name) {
        return Ok(server);
    }
    let owner = plan.volumes().find(|(_, volume)| volume.name == name).map(|(server, _)| server.name.clone());
    let servers = plan.servers.iter().map(|server| server.name.clone()).collect();
    Err(AskError::UnknownServer { plan: plan.path.clone(), name: name.to_owned(), owner, servers })
}

/// Opens both sides of every volume, in the context of the plan. A source that was left is opened under its other name.
pub(in crate::cli) async fn open_server(
    context: &Context<'_>,
    plan: &Plan,
    server: &plan::Server,
    method: Option<Method>,
) -> anyhow::Result<Server> {
    for spec in server.volumes.iter().flat_map(|volume| [&volume.source, &volume.target]) {
        refuse_file(spec)?;
    }
    let provider = provider(context, server, method).await?;
    let mut volumes = Vec::new();
    for disk in provider::disks_of(server) {
        let source = source(context, &disk).await?;
        let target = match open_target(context, (&disk.source, &disk.target), disk.target_in_use.as_ref()).await {
            Ok(target) => target,
            Err(error) if error.kind == ErrorKind::NotFound && images::place_exists(context, &disk.target).await? => {
                let plan = plan.path.display();
                let hint = format!("{} was never copied: run poolshift replicate {plan} first", disk.volume);
                return Err(error.hint(hint).into());
            }
            Err(error) => return Err(error.into()),
        };
        if source.identity() == target.identity() {
            let text = format!("source and target of {} are the same image: {}", disk.volume, source.identity());
            return Err(UsageError(text).into());
        }
        volumes.push(Volume { disk, source, target });
    }
    Ok(Server { name: server.name.clone(), volumes, provider, retention: server.retention })
}

fn refuse_file(spec: &ImageSpec) -> Result<(), ImageError> {
    match spec {
        ImageSpec::Rbd { .. } => Ok(()),
        ImageSpec::File { .. } => Err(ImageError::new(ErrorKind::Unsupported, spec.to_string(), "cut over")
            .detail("a cutover needs RBD images on both sides")
            .hint("by hand: stop the server, run poolshift sync SOURCE TARGET, start it on the target")),
    }
}

/// Who stops and starts the server, in the context of the plan.
async fn provider(
    context: &Context<'_>,
    server: &plan::Server,
    method: Option<Method>,
) -> anyhow::Result<Arc<dyn Provider>> {
    let connectors = match &server.cutover {
        Cutover::OpenStack(_) => Some(Connectors {
            source: images::connect(context, &context.config.source_ceph).await?,
            target: images::connect(context, &context.config.target_ceph).await?,
        }),
        Cutover::None | Cutover::Libvirt(_) | Cutover::Command(_) => None,
    };
    Ok(provider::of(server, method, connectors.as_ref()).map_err(CutoverError::from)?)
}

async fn source(context: &Context<'_>, disk: &ServerDisk) -> Result<Arc<RbdImage>, ImageError> {
    let spec = &disk.source;
    if let (ImageSpec::Rbd { pool, namespace, image, .. }, Some(_)) = (spec, &disk.target_in_use) {
        // Something else may have its name: a placeholder.
        let connector = images::connect(context, &context.config.source_ceph).await?;
        let source = connector.source_of(pool, namespace.as_deref(), image, &kept_name(image)).await?;
        return Ok(Arc::new(source));
    }
    let missing = match open(context, &context.config.source_ceph, spec).await {
        Err(error) if error.kind == ErrorKind::NotFound => error,
        opened => return opened,
    };
    let ImageSpec::Rbd { pool, namespace, image, snapshot } = spec.clone() else { return Err(missing) };
    let kept = ImageSpec::Rbd { pool, namespace, image: kept_name(&image), snapshot };
    match open(context, &context.config.source_ceph, &kept).await {
        Ok(image) => {
            tracing::debug!("{spec} was left, and is kept as {kept}");
            Ok(image)
        }
        // The name in the plan is what a person looks for.
        Err(error) if error.kind == ErrorKind::NotFound => Err(missing.hint(format!(
            "nor is there {kept}, under which it would be kept; if the server was finalized, take it out of the plan"
        ))),
        Err(error) => Err(error),
    }
}

/// Opens an image to write to, as each side may be.
async fn open(context: &Context<'_>, access: &CephAccess, spec: &ImageSpec) -> Result<Arc<RbdImage>, ImageError> {
    let ImageSpec::Rbd { pool, namespace, image, .. } = spec else {
        return refuse_file(spec).and_then(|()| Err(ImageError::new(ErrorKind::Unsupported, spec.to_string(), "open")));
    };
    let connector = images::connect(context, access).await?;
    let image = RbdImage::open_target(&connector, pool, namespace.as_deref(), image).await?;
    Ok(Arc::new(image))
}

/// Opens a target, under the name that it has now.
async fn open_target(
    context: &Context<'_>,
    (source, spec): (&ImageSpec, &ImageSpec),
    in_use: Option<&ImageSpec>,
) -> Result<Arc<RbdImage>, ImageError> {
    refuse_file(spec)?;
    let targets = images::connect(context, &context.config.target_ceph).await?;
    if in_use.is_none() {
        return Ok(Arc::new(targets.open_target(spec, None).await?));
    }
    let sources = images::connect(context, &context.config.source_ceph).await?;
    Ok(Arc::new(targets.open_target_of(spec, in_use, (&sources, source)).await?))
}

/// Refuses a server that is being finalized: its sources are going, or have gone, and it can't be opened as a whole.
pub(in crate::cli) async fn refuse_finalizing(context: &Context<'_>, server: &plan::Server) -> anyhow::Result<()> {
    let Some(first) = server.volumes.first() else { return Ok(()) };
    match target(context, first).await {
        Ok(Some(target)) => Ok(finalize::refuse_begun(&server.name, &target).await?),
        // What is wrong with it is told by those that need it.
        Ok(None) | Err(_) => Ok(()),
    }
}

/// Opens what is kept of a server that was cut over, in the context of the plan.
pub(in crate::cli) async fn open_kept(context: &Context<'_>, server: &plan::Server) -> anyhow::Result<Kept> {
    for spec in server.volumes.iter().flat_map(|volume| [&volume.source, &volume.target]) {
        finalize::place(spec)?;
    }
    let provider = provider(context, server, None).await?;
    let sources = images::connect(context, &context.config.source_ceph).await?;
    let targets = images::connect(context, &context.config.target_ceph).await?;
    Ok(Kept::open(&server.name, provider, provider::disks_of(server), (&sources, &targets)).await?)
}

/// Opens what a rehearsal needs of a server, in the context of the plan. `None` where nothing can have been rehearsed: a
/// target is a file, or is not there.
pub(in crate::cli) async fn open_stage(context: &Context<'_>, server: &plan::Server) -> anyhow::Result<Option<Stage>> {
    if server.volumes.iter().any(|volume| !matches!(volume.target, ImageSpec::Rbd { .. })) {
        return Ok(None);
    }
    let provider = provider(context, server, None).await?;
    let from_rbd = server.volumes.iter().any(|volume| matches!(volume.source, ImageSpec::Rbd { .. }));
    let sources = match from_rbd {
        true => Some(images::connect(context, &context.config.source_ceph).await?),
        false => None,
    };
    let targets = images::connect(context, &context.config.target_ceph).await?;
    match Stage::open(&server.name, provider, provider::disks_of(server), (sources.as_ref(), &targets)).await {
        Ok(stage) => Ok(Some(stage)),
        Err(CutoverError::Image(error)) if error.kind == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Opens a target that keeps a journal; `None` where it is a file, which keeps none.
pub(super) async fn target(context: &Context<'_>, volume: &plan::Volume) -> Result<Option<Arc<RbdImage>>, ImageError> {
    match volume.target {
        ImageSpec::Rbd { .. } => {
            let specs = (&volume.source, &volume.target);
            open_target(context, specs, volume.target_in_use().as_ref()).await.map(Some)
        }
        ImageSpec::File { .. } => Ok(None),
    }
}
