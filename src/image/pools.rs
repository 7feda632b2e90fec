//! The pools of a cluster, as whoever renames images in them sees them: images by their names.
//!
//! A volume of Cinder's is the image of its name, `volume-ID`. While a volume is switched to another pool, its image has
//! another name, and a *placeholder* of one object has the volume's: Cinder moves that in an instant, whatever the
//! volume's size. A placeholder carries a mark, and the limits (QoS) of the image that it stands in for: what Cinder
//! writes to the placeholder, that image is given when it has its name again.

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;

use super::{Disk, Result};

/// The metadata keys of the limits that a volume type may have with it: those that Cinder's driver for RBD writes to the
/// image of a volume's name (`QOS_KEY_MAP` of its `rbd.py`).
pub const LIMIT_KEYS: [&str; 12] = [
    "conf_rbd_qos_iops_limit",
    "conf_rbd_qos_iops_burst",
    "conf_rbd_qos_read_iops_limit",
    "conf_rbd_qos_read_iops_burst",
    "conf_rbd_qos_write_iops_limit",
    "conf_rbd_qos_write_iops_burst",
    "conf_rbd_qos_bps_limit",
    "conf_rbd_qos_bps_burst",
    "conf_rbd_qos_read_bps_limit",
    "conf_rbd_qos_read_bps_burst",
    "conf_rbd_qos_write_bps_limit",
    "conf_rbd_qos_write_bps_burst",
];
/// The value of a limit that limits nothing.
const UNLIMITED: &str = "0";

/// An image's limits, in the order of [`LIMIT_KEYS`]; `None` where one was never written.
pub type Limits = Vec<Option<String>>;

/// The name that the placeholder of `name` has before and after it stands in.
pub fn placeholder_name(name: &str) -> String {
    format!("{name}{PLACEHOLDER_SUFFIX}")
}

/// How the names of placeholders end that do not have a volume's name yet, or any more.
pub const PLACEHOLDER_SUFFIX: &str = ".poolshift-placeholder";

/// What has a name in a pool.
#[derive(Debug)]
pub enum Named<I = Arc<dyn VolumeImage>> {
    /// Nothing.
    Nothing,
    /// A placeholder.
    Placeholder(I),
    /// An image.
    Image(I),
}

/// The image of a volume, or its placeholder.
#[async_trait]
pub trait VolumeImage: Disk + Debug {
    /// Whether poolshift has written to it: it keeps a state or a journal with it.
    async fn is_replicated(&self) -> Result<bool>;

    /// Its limits.
    async fn limits(&self) -> Result<Limits>;

    /// Writes the limits that differ from `has`, and takes away those that are `None`.
    async fn store_limits(&self, has: &Limits, wanted: &Limits) -> Result<()>;

    /// Gives a placeholder another name than that which it stands in for, so that the image can have that.
    async fn put_aside(&self, name: &str) -> Result<()> {
        self.rename(&placeholder_name(name)).await
    }

    /// Gives a placeholder the limits of the image that it is to stand in for. Every limit is written, as none where
    /// there is none: Cinder's driver takes away what it has never written when a type's QoS is for the hypervisor only,
    /// and gives up where there is nothing to take away.
    async fn stand_in_for(&self, image: &dyn VolumeImage) -> Result<()> {
        let (has, wanted) = futures::try_join!(self.limits(), image.limits())?;
        let wanted = wanted.into_iter().map(|limit| Some(limit.unwrap_or_else(|| UNLIMITED.to_owned())));
        self.store_limits(&has, &wanted.collect()).await
    }

    /// Gives an image the limits that a placeholder was given while it stood in for it.
    async fn take_over_from(&self, placeholder: &dyn VolumeImage) -> Result<()> {
        let (has, wanted) = futures::try_join!(self.limits(), placeholder.limits())?;
        let wanted = wanted.into_iter().map(|limit| limit.filter(|limit| limit != UNLIMITED));
        self.store_limits(&has, &wanted.collect()).await
    }
}

/// The pools of a cluster.
#[async_trait]
pub trait Pools: Debug + Send + Sync {
    /// What has that name. [`super::ErrorKind::NotFound`] where there is no such pool or namespace.
    async fn named(&self, pool: &str, namespace: Option<&str>, name: &str) -> Result<Named>;

    /// Makes the placeholder of that name, under its other name ([`placeholder_name`]). There already is no error.
    async fn prepare_placeholder(
        &self,
        pool: &str,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<Arc<dyn VolumeImage>>;

    /// Removes the placeholder that was put aside of that name. Nothing there is no error.
    async fn remove_placeholder(&self, pool: &str, namespace: Option<&str>, name: &str) -> Result<()>;
}
