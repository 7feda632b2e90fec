//! Pools: which images are in one, and how much more may go in.

use serde::Deserialize;

use super::{Connector, Place, RbdImage};
use crate::ceph::{self, CephError, Features};
use crate::image::{ErrorKind, ImageError, Result};

/// An image of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolImage {
    /// Its name.
    pub name: String,
    /// Its id; `None` for an image of the old format 1, which poolshift does not touch.
    pub id: Option<String>,
}

/// How much of a pool is free, in bytes of data: copies and erasure codes are taken into account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolSpace {
    /// What the pool's OSDs take before the first of them is full: `max_avail` of `ceph df`. Pools that share OSDs
    /// share it.
    pub max_avail: u64,
    /// What is stored in it.
    pub stored: u64,
    /// The quota; `None` without one.
    pub quota: Option<u64>,
}

impl PoolSpace {
    /// What may be written: the OSDs' free space, or what is left of the quota, where that is less.
    pub fn available(&self) -> u64 {
        self.quota.map_or(self.max_avail, |quota| self.max_avail.min(quota.saturating_sub(self.stored)))
    }
}

/// The part of `ceph df detail --format json` that counts here.
#[derive(Deserialize)]
struct Df {
    pools: Vec<DfPool>,
}

#[derive(Deserialize)]
struct DfPool {
    id: i64,
    stats: DfStats,
}

#[derive(Deserialize)]
struct DfStats {
    max_avail: u64,
    #[serde(default)]
    stored: u64,
    #[serde(default)]
    quota_bytes: u64,
}

impl Connector {
    /// Opens a pool, and a namespace in it. [`ErrorKind::NotFound`] when it isn't there.
    pub async fn find_pool(&self, pool: &str, namespace: Option<&str>) -> Result<()> {
        self.pool(&Place::new(pool, namespace, "")).await.map(drop)
    }

    /// All images of a pool's namespace, by name; what is in the trash is not among them.
    ///
    /// [`ErrorKind::NotFound`] when the pool or the namespace isn't there.
    pub async fn images(&self, pool: &str, namespace: Option<&str>) -> Result<Vec<PoolImage>> {
        let place = Place::new(pool, namespace, "");
        let opened = self.pool(&place).await?;
        let listed = ceph::blocking("rbd_list2", self.io_timeout, move || opened.images()).await;
        let listed = listed.map_err(|error| self.failure(&place).of("list the images", error))?;
        let mut images: Vec<PoolImage> = listed
            .into_iter()
            .map(|image| PoolImage { name: image.name, id: Some(image.id).filter(|id| !id.is_empty()) })
            .collect();
        images.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        Ok(images)
    }

    /// How much of a pool is free, from the monitors.
    ///
    /// [`ErrorKind::NotFound`] when the pool isn't there, [`ErrorKind::PermissionDenied`] where the user may not ask.
    pub async fn pool_space(&self, pool: &str) -> Result<PoolSpace> {
        let (place, operation) = (Place::new(pool, None, ""), "ask for the pool's free space");
        let id = self.pool(&place).await?.id();
        let cluster = std::sync::Arc::clone(&self.cluster);
        let command = r#"{"prefix": "df", "detail": "detail", "format": "json"}"#;
        let asked = ceph::blocking("rados_mon_command", self.io_timeout, move || cluster.monitor_command(command));
        let answer = asked.await.map_err(|error| self.failure(&place).of(operation, error))?;
        let nonsense = |what: String| {
            let error = CephError::Nonsense { function: "rados_mon_command", what };
            self.failure(&place).of(operation, error)
        };
        let df: Df = serde_json::from_str(&answer).map_err(|error| nonsense(format!("no `ceph df`: {error}")))?;
        let Some(DfPool { stats, .. }) = df.pools.into_iter().find(|pool| pool.id == id) else {
            return Err(ImageError::new(ErrorKind::NotFound, place.location(), operation)
                .detail("the monitors have no statistics of the pool yet")
                .hint("look at ceph df; the manager reports a new pool after some seconds"));
        };
        let quota = Some(stats.quota_bytes).filter(|&quota| quota > 0);
        Ok(PoolSpace { max_avail: stats.max_avail, stored: stats.stored, quota })
    }

    /// Fails with [`ErrorKind::PermissionDenied`] where the user may not write in the pool, or in its namespace. Changes
    /// nothing.
    pub async fn may_write(&self, pool: &str, namespace: Option<&str>) -> Result<()> {
        let place = Place::new(pool, namespace, "");
        let opened = self.pool(&place).await?;
        let error = |error| self.failure(&place).of("write there", error);
        match ceph::blocking("rados_remove", self.io_timeout, move || opened.may_write()).await.map_err(error)? {
            true => Ok(()),
            false => {
                let errno = rustix::io::Errno::PERM.raw_os_error();
                Err(error(CephError::Call { function: "rados_remove", errno }))
            }
        }
    }
}

impl RbdImage {
    /// What keeps poolshift from replicating the image, if anything does: it can't be snapshotted.
    pub fn obstacle(&self) -> Option<&'static str> {
        let features = self.inner.features;
        if features.has(Features::NON_PRIMARY) {
            return Some(
                "it is the non-primary side of mirroring, which can't be snapshotted: replicate it from where it is primary",
            );
        }
        features.has(Features::MIGRATING).then_some("it is being moved by rbd migration: let that finish first")
    }

    /// Whether the image has the exclusive lock, without which fencing is weaker, and the object map with fast-diff,
    /// without which each delta looks at every object.
    pub fn has_fast_features(&self) -> bool {
        self.inner.features.has(Features::EXCLUSIVE_LOCK | Features::OBJECT_MAP | Features::FAST_DIFF)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_counts_where_it_is_less_than_what_is_free() {
        let text = r#"{"stats": {"total_bytes": 9}, "pools": [
            {"name": "a", "id": 1, "stats": {"stored": 70, "max_avail": 100, "quota_bytes": 0, "percent_used": 0.4}},
            {"name": "b", "id": 2, "stats": {"stored": 70, "max_avail": 100, "quota_bytes": 90}},
            {"name": "c", "id": 3, "stats": {"stored": 95, "max_avail": 100, "quota_bytes": 90}}]}"#;
        let df: Df = serde_json::from_str(text).unwrap();
        let available = df.pools.into_iter().map(|DfPool { stats, .. }| {
            let quota = Some(stats.quota_bytes).filter(|&quota| quota > 0);
            PoolSpace { max_avail: stats.max_avail, stored: stats.stored, quota }.available()
        });
        assert_eq!(available.collect::<Vec<_>>(), [100, 20, 0]);
    }
}
