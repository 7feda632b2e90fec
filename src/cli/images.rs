//! From an image's name to an open image, whatever its backend.

use std::path::Path;
use std::sync::Arc;

use super::Context;
use super::args::ImageFeature;
use super::config::{CephAccess, Create, UsageError};
use crate::ceph::Features;
use crate::image::file::{FileImage, FileOptions};
use crate::image::rbd::{Connector, CreateOptions, RbdImage, RbdOptions};
use crate::image::{ErrorKind, ImageError, ImageSpec, Layout, SourceImage, TargetImage};
use crate::plan::Volume;

/// A source that is open. It keeps its backend's own type, because a new target is made like it.
pub(super) enum Source {
    /// On RBD.
    Rbd(Arc<RbdImage>),
    /// A file or a block device.
    File(Arc<FileImage>),
}

impl Source {
    /// The image.
    pub(super) fn image(&self) -> Arc<dyn SourceImage> {
        match self {
            Self::Rbd(image) => image.clone(),
            Self::File(image) => image.clone(),
        }
    }

    /// What a target is to be like.
    pub(super) async fn model(&self) -> Result<Model, ImageError> {
        match self {
            Self::Rbd(image) => {
                let CreateOptions { size, object_size, features, stripe_unit, stripe_count, .. } =
                    image.source_create_options().await?;
                let layout = Layout { object_size, stripe_unit, stripe_count };
                Ok(Model { size, layout, features: Some(features) })
            }
            Self::File(image) => Ok(Model { size: image.size().await?, layout: Layout::DEFAULT, features: None }),
        }
    }
}

/// What a new target is to be like, unless asked otherwise.
#[derive(Clone, Copy, Debug)]
pub(super) struct Model {
    /// Bytes.
    pub(super) size: u64,
    /// For RBD.
    pub(super) layout: Layout,
    /// RBD's feature bits; poolshift's choice where there are none to follow.
    pub(super) features: Option<u64>,
}

/// Opens a source; its snapshot, if it has one, is not looked at.
pub(super) async fn source(context: &Context<'_>, spec: &ImageSpec) -> anyhow::Result<Source> {
    match spec {
        ImageSpec::Rbd { pool, namespace, image, .. } => {
            let connector = connect(context, &context.config.source_ceph).await?;
            let image = RbdImage::open_source(&connector, pool, namespace.as_deref(), image).await?;
            Ok(Source::Rbd(Arc::new(image)))
        }
        ImageSpec::File { path, .. } => {
            let path = path.clone();
            Ok(Source::File(Arc::new(blocking(spec, move || FileImage::open_source(path)).await?)))
        }
    }
}

/// Opens an image whose clones are to be looked at, in the source's cluster. Command lines with files are refused before.
pub(super) async fn rbd(context: &Context<'_>, spec: &ImageSpec) -> anyhow::Result<Arc<RbdImage>> {
    match source(context, spec).await? {
        Source::Rbd(image) => Ok(image),
        Source::File(_) => Err(UsageError(format!("only images on RBD have clones: {spec} is a file")).into()),
    }
}

/// Opens a target for reading only.
pub(super) async fn target_to_read(
    context: &Context<'_>,
    spec: &ImageSpec,
    state_dir: Option<&Path>,
) -> anyhow::Result<Arc<dyn SourceImage>> {
    match spec {
        ImageSpec::Rbd { pool, namespace, image, .. } => {
            let connector = connect(context, &context.config.target_ceph).await?;
            Ok(Arc::new(RbdImage::open_source(&connector, pool, namespace.as_deref(), image).await?))
        }
        ImageSpec::File { path, .. } => {
            let (path, options) = (path.clone(), FileOptions { state_dir: state_dir.map(Path::to_owned) });
            Ok(Arc::new(blocking(spec, move || FileImage::open_source_with(path, &options)).await?))
        }
    }
}

/// Opens a target that must exist.
pub(super) async fn existing_target(
    context: &Context<'_>,
    spec: &ImageSpec,
    state_dir: Option<&Path>,
) -> Result<Arc<dyn TargetImage>, ImageError> {
    match spec {
        ImageSpec::Rbd { pool, namespace, image, .. } => {
            let connector = connect(context, &context.config.target_ceph).await?;
            Ok(Arc::new(RbdImage::open_target(&connector, pool, namespace.as_deref(), image).await?))
        }
        ImageSpec::File { path, .. } => {
            let (path, options) = (path.clone(), FileOptions { state_dir: state_dir.map(Path::to_owned) });
            Ok(Arc::new(blocking(spec, move || FileImage::open_target_with(path, &options)).await?))
        }
    }
}

/// Opens a target of a plan, under the name that it has now.
pub(super) async fn target_of_plan(context: &Context<'_>, volume: &Volume) -> Result<Arc<dyn TargetImage>, ImageError> {
    match volume.target_in_use() {
        None => existing_target(context, &volume.target, None).await,
        Some(in_use) => {
            let sources = connect(context, &context.config.source_ceph).await?;
            let targets = connect(context, &context.config.target_ceph).await?;
            Ok(Arc::new(targets.open_target_of(&volume.target, Some(&in_use), (&sources, &volume.source)).await?))
        }
    }
}

/// Refuses to replicate what has a volume's name in Cinder's place while the volume is switched.
pub(super) async fn refuse_placeholder(source: &Source, spec: &ImageSpec) -> Result<(), ImageError> {
    match source {
        Source::Rbd(image) if image.is_placeholder().await? => {
            Err(ImageError::new(ErrorKind::NotFound, spec.to_string(), "open the image")
                .detail("a placeholder has its name: the volume is being brought to its target, or was"))
        }
        Source::Rbd(_) | Source::File(_) => Ok(()),
    }
}

/// Opens a target; `None` if it does not exist, though the place for it does.
pub(super) async fn target(
    context: &Context<'_>,
    spec: &ImageSpec,
    state_dir: Option<&Path>,
) -> anyhow::Result<Option<Arc<dyn TargetImage>>> {
    or_none(context, spec, existing_target(context, spec, state_dir).await).await
}

/// `None` for an image that does not exist, though the place for it does.
pub(super) async fn or_none(
    context: &Context<'_>,
    spec: &ImageSpec,
    opened: Result<Arc<dyn TargetImage>, ImageError>,
) -> anyhow::Result<Option<Arc<dyn TargetImage>>> {
    match opened {
        Ok(image) => Ok(Some(image)),
        Err(error) if error.kind == ErrorKind::NotFound => match place_exists(context, spec).await? {
            true => Ok(None),
            false => Err(error.into()),
        },
        Err(error) => Err(error.into()),
    }
}

/// Whether the pool and namespace, or the folder, of a missing image are there.
pub(super) async fn place_exists(context: &Context<'_>, spec: &ImageSpec) -> Result<bool, ImageError> {
    match spec {
        ImageSpec::Rbd { pool, namespace, image, .. } => {
            let connector = connect(context, &context.config.target_ceph).await?;
            match RbdImage::exists(&connector, pool, namespace.as_deref(), image).await {
                Ok(_) => Ok(true),
                Err(error) if error.kind == ErrorKind::NotFound => Ok(false),
                Err(error) => Err(error),
            }
        }
        ImageSpec::File { path, .. } => {
            let folder = super::streams::folder_of(path).to_owned();
            blocking(spec, move || Ok(folder.is_dir())).await
        }
    }
}

/// Creates a target like the model, unless `create` says otherwise, and opens it.
pub(super) async fn create(
    context: &Context<'_>,
    spec: &ImageSpec,
    model: Model,
    create: &Create,
) -> anyhow::Result<Arc<dyn TargetImage>> {
    tracing::info!("creating {spec}");
    match spec {
        ImageSpec::Rbd { pool, namespace, image, .. } => {
            let connector = connect(context, &context.config.target_ceph).await?;
            let options = create_options(model, create);
            RbdImage::create(&connector, pool, namespace.as_deref(), image, &options).await?;
            Ok(existing_target(context, spec, None).await?)
        }
        ImageSpec::File { path, .. } => {
            let path = path.clone();
            Ok(Arc::new(blocking(spec, move || FileImage::create_target(path, model.size)).await?))
        }
    }
}

fn create_options(model: Model, create: &Create) -> CreateOptions {
    let mut options = CreateOptions::new(model.size);
    // Another object size than the source's is another layout: stripes of the old one need not fit into it.
    let layout = match create.object_size {
        Some(object_size) if object_size != model.layout.object_size => {
            Layout { object_size, stripe_unit: object_size, stripe_count: 1 }
        }
        _ => model.layout,
    };
    (options.object_size, options.stripe_unit, options.stripe_count) =
        (layout.object_size, layout.stripe_unit, layout.stripe_count);
    if let Some(features) = &create.features {
        options.features = features.iter().map(|&feature| bit_of(feature)).fold(0, |all, bit| all | bit);
    } else if let Some(features) = model.features {
        options.features = features;
    }
    options.data_pool.clone_from(&create.data_pool);
    options
}

fn bit_of(feature: ImageFeature) -> u64 {
    match feature {
        ImageFeature::Layering => Features::LAYERING,
        ImageFeature::ExclusiveLock => Features::EXCLUSIVE_LOCK,
        ImageFeature::ObjectMap => Features::OBJECT_MAP,
        ImageFeature::FastDiff => Features::FAST_DIFF,
        ImageFeature::DeepFlatten => Features::DEEP_FLATTEN,
        ImageFeature::Journaling => Features::JOURNALING,
    }
}

/// Refuses a target that is the source under another name, or even the same.
pub(super) fn refuse_same(source: &Source, target: &dyn TargetImage) -> Result<(), UsageError> {
    let image = source.image();
    if image.identity() == target.identity() {
        return Err(UsageError(format!("SOURCE and TARGET are the same image: {}", image.identity())));
    }
    Ok(())
}

/// Connects to a cluster, or shares the connection that is there.
pub(super) async fn connect(context: &Context<'_>, access: &CephAccess) -> Result<Connector, ImageError> {
    let options =
        RbdOptions { conf: access.conf.clone(), user: access.user.clone(), io_timeout: context.config.io_timeout };
    Connector::connect(&options).await
}

/// Opening touches the disk: never on a worker of the runtime.
async fn blocking<T: Send + 'static>(
    spec: &ImageSpec,
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ImageError::new(ErrorKind::Io, spec.to_string(), "open the image").caused_by(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_target_is_like_its_source_unless_asked_otherwise() {
        let layout = Layout { object_size: 8 << 20, stripe_unit: 64 << 10, stripe_count: 8 };
        let model = Model { size: 1 << 30, layout, features: Some(1) };
        let like = create_options(model, &Create::default());
        assert_eq!((like.size, like.object_size, like.stripe_unit, like.stripe_count), (1 << 30, 8 << 20, 64 << 10, 8));
        assert_eq!((like.features, like.data_pool), (1, None));

        let asked = Create {
            object_size: Some(4 << 20),
            features: Some(vec![ImageFeature::ExclusiveLock, ImageFeature::ObjectMap]),
            data_pool: Some("ec".into()),
        };
        let other = create_options(model, &asked);
        assert_eq!((other.object_size, other.stripe_unit, other.stripe_count), (4 << 20, 4 << 20, 1));
        assert_eq!((other.features, other.data_pool.as_deref()), (4 | 8, Some("ec")));
        let file = Model { features: None, layout: Layout::DEFAULT, ..model };
        assert_eq!(create_options(file, &Create::default()).features, CreateOptions::FEATURES);
    }
}
